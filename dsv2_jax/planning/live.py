"""Which buffers a compiled program holds where it needs most memory, from its schedule.

The compiler tells how large all temporaries are, not what they are. HLO of a compiled program lists instructions in the
order they run, so the buffers alive at each of them follow from their last uses. The sum is that of the compiler but
for what its allocator loses and for buffers it shares in ways the text does not show.
"""

import dataclasses
from dataclasses import dataclass

from dsv2_jax.planning.hlo import Instruction, Module, Shape, match, parse

VIEWS = ("bitcast", "get-tuple-element", "tuple", "optimization-barrier", "add-dependency", "domain")
FINISHED = ("copy-done", "async-done", "all-gather-done", "all-reduce-done", "collective-permute-done", "async-update")


@dataclass(frozen=True)
class Buffer:
    """An array in the device's memory."""

    name: str  # of the instruction that makes it
    shape: Shape
    source: str
    loops: tuple[str, ...]  # the loops, from the outside, within which it lives

    @property
    def nbytes(self) -> int:
        return self.shape.padded_bytes


def at_peak(text: str) -> list[Buffer]:
    """The temporaries of HLO `text` alive where they take most, the largest first; arguments and results left out."""
    module = parse(text)
    return sorted(_Schedule(module).peak(module.entry), key=lambda one: -one.nbytes)


class _Schedule:
    def __init__(self, module: Module):
        self.module, self.known = module, {}

    def peak(self, name: str) -> list[Buffer]:
        """What computation `name` holds at its peak beyond its parameters and its result's place."""
        if name not in self.known:
            self.known[name] = self._peak(name)
        return self.known[name]

    def _peak(self, name: str) -> list[Buffer]:
        instructions = list(self.module.computations[name].values())
        holds: dict[str, list[Buffer | None]] = {}  # of every instruction the buffers it may show, None for others'
        last: dict[Buffer, int] = {}
        born: dict[Buffer, int] = {}
        for i, ins in enumerate(instructions):
            views = [holds[operand] for operand in ins.operands if operand in holds]
            for buffers in views:
                last.update((buffer, i) for buffer in buffers if buffer)
            holds[ins.name] = self._made(ins, views)
            for buffer in holds[ins.name]:
                if buffer and buffer not in born:
                    born[buffer] = last[buffer] = i
        results = {buffer for ins in instructions if ins.is_root for buffer in holds[ins.name]}
        events: dict[int, list[Buffer]] = {}
        ends: dict[int, list[Buffer]] = {}
        for buffer, start in born.items():
            if buffer not in results:
                events.setdefault(start, []).append(buffer)
                ends.setdefault(last[buffer], []).append(buffer)
        alive: dict[Buffer, None] = {}
        now = most = 0
        best: list[Buffer] = []
        for i, ins in enumerate(instructions):
            for buffer in events.get(i, ()):
                alive[buffer] = None
                now += buffer.nbytes
            inner = self._inside(ins)
            if (total := now + sum(buffer.nbytes for buffer in inner)) > most:
                most, best = total, [*alive, *inner]
            for buffer in ends.get(i, ()):
                del alive[buffer]
                now -= buffer.nbytes
        return best

    def _made(self, ins: Instruction, views) -> list[Buffer | None]:
        """The buffers that the value of `ins` lies in: its operands' where it is a view or written in place."""
        if ins.opcode == "parameter" or ins.opcode == "constant":
            return [None]
        if ins.opcode == "get-tuple-element":
            index = int(match(r"index=(\d+)", ins.attributes))
            return [views[0][index]] if views and len(views[0]) > index else [None]
        if ins.opcode == "tuple":
            return [buffer for buffers in views for buffer in buffers[:1]]
        if ins.opcode in VIEWS or ins.opcode == "while":
            return list(views[0]) if views else [None]
        if ins.opcode in FINISHED:
            return views[0][:1]
        made = [Buffer(ins.name, shape, ins.source, ()) if shape.in_hbm else None for shape in ins.shapes]
        made = [dataclasses.replace(one, name=f"{ins.name}#{k}") if one and k else one for k, one in enumerate(made)]
        if ins.opcode in ("collective-permute-start", "all-gather-start", "copy-start"):
            return [made[1] if ins.opcode != "copy-start" else made[0]]
        if ins.opcode == "async-start":
            return made[len(ins.operands) : -1] or made
        for k, operand in self._in_place(ins):  # written where an operand lies
            if operand < len(views) and k < len(made) and views[operand]:
                made[k] = views[operand][0]
        return made

    def _in_place(self, ins: Instruction) -> list[tuple[int, int]]:
        """(result, operand) pairs that share a buffer."""
        if ins.opcode in ("dynamic-update-slice", "scatter"):
            return [(0, 0)]
        if ins.opcode != "fusion":
            return []
        called = self.module.computations[ins.called("calls")]
        root = self.module.root(ins.called("calls"))
        outputs = [called[name] for name in root.operands] if root.opcode == "tuple" else [root]
        pairs = []
        for k, output in enumerate(outputs):
            while output.opcode in ("bitcast", "copy", "convert") and output.operands:
                output = called[output.operands[0]]
            if output.opcode in ("dynamic-update-slice", "scatter"):
                target = called[output.operands[0]]
                while target.opcode == "bitcast":
                    target = called[target.operands[0]]
                if target.opcode == "parameter":
                    pairs.append((k, int(target.literal)))
        return pairs

    def _inside(self, ins: Instruction) -> list[Buffer]:
        """What a loop, a conditional or a call holds while it runs."""
        if ins.opcode == "while":
            names = [ins.called("body")]
        elif ins.opcode == "conditional":
            listed = match(r"branch_computations=\{([^}]*)\}", ins.attributes)
            names = [n.strip().lstrip("%") for n in listed.split(",")] if listed else []
            names += [n for n in (ins.called("true_computation"), ins.called("false_computation")) if n]
        elif ins.opcode == "call":
            names = [ins.called("to_apply")]
        else:
            return []
        inner = max((self.peak(name) for name in names), key=lambda found: sum(one.nbytes for one in found))
        if ins.opcode != "while":
            return inner
        return [dataclasses.replace(one, loops=(ins.source or ins.name, *one.loops)) for one in inner]
