"""Reads a compiled program (HLO text): what it sends, what it multiplies, and how often.

`read(compiled.as_text())` walks the program from its entry through calls, fusions, asynchronous wrappers, conditionals
and loops, and counts every collective and every matrix product as often as it runs. All is of one device.
"""

import dataclasses
import functools
import math
import re

from dsv2_jax.planning.hlo import Instruction, Loops, Module, Shape, match, parse

KINDS = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "collective-permute",
    "all-to-all",
    "ragged-all-to-all",
    "collective-broadcast",
)


def group_size(attributes: str, devices: int) -> int:
    """Devices that take part in a collective together; HLO writes `replica_groups` in three ways."""
    if found := re.search(r"replica_groups=mesh\[(.*?)\]\s*\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])  # 'x':(2)4 is a part of 4 of the axis x
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=", attributes):
        return int(found[1].split(",")[-1])
    first = match(r"replica_groups=\{\{([\d,]*)\}", attributes)
    return len(first.split(",")) if first else devices


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of the program, run `times` a step."""

    kind: str
    operand_bytes: int  # once, on one device
    group: int  # devices that take part together
    times: int
    source: str
    asynchronous: bool
    certain: bool = True  # False inside a loop whose length depends on the data: it may never run

    @property
    def wire_bytes(self) -> float:
        """Bytes one device must send, each time, in an algorithm that wastes none.

        all-gather (g - 1) x operand; reduce-scatter, all-to-all (g - 1)/g x operand; all-reduce, being one of each,
        2 (g - 1)/g; collective-permute the operand. A ragged all-to-all counts as if every row of its operand were
        sent and destinations were equally likely.
        """
        g, n = self.group, self.operand_bytes
        match self.kind:
            case "all-gather":
                return n * (g - 1)
            case "all-reduce":
                return 2 * n * (g - 1) / g
            case "collective-permute" | "collective-broadcast":
                return n
        return n * (g - 1) / g


def product_flops(ins: Instruction, operand: list[tuple[Shape, ...]]) -> float:
    """FLOPs of a dot or of a convolution (on TPUs every dot becomes one); 2 a multiplication and addition."""
    if ins.opcode == "dot":
        contracted = match(r"lhs_contracting_dims=\{([\d,]*)\}", ins.attributes) or ""
        return 2.0 * ins.shapes[0].size * math.prod(operand[0][0].dims[int(i)] for i in contracted.split(",") if i)
    lhs_labels, kernel_labels, out_labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", ins.attributes).groups()
    lhs, kernel, out = operand[0][0].dims, operand[1][0].dims, ins.shapes[0].dims
    batch_groups = int(match(r"batch_group_count=(\d+)", ins.attributes) or 1)
    window = {key: values.split("x") for key, values in re.findall(r"(\w+)=([\dx_\-]+)", _window(ins.attributes))}
    places = 1
    for i, label in enumerate(sorted(label for label in out_labels if label.isdigit())):
        places *= _positions(
            lhs[lhs_labels.index(label)],
            kernel[kernel_labels.index(label)],
            out[out_labels.index(label)],
            *(int(window.get(key, ["1"] * (i + 1))[i]) for key in ("stride", "lhs_dilate", "rhs_dilate")),
            int(window["pad"][i].split("_")[0]) if "pad" in window else 0,
        )
    outputs = out[out_labels.index("f")] * out[out_labels.index("b")] / batch_groups
    return 2.0 * places * outputs * kernel[kernel_labels.index("i")]


def _window(attributes: str) -> str:
    return match(r"window=\{([^}]*)\}", attributes) or ""


@functools.cache
def _positions(lhs: int, kernel: int, out: int, stride: int, lhs_dilate: int, rhs_dilate: int, pad: int) -> int:
    """Pairs of an output and a kernel position, along one dimension, that meet an element and not padding."""
    if kernel == 1 and pad == 0 and lhs_dilate == 1:
        return out
    reach = (lhs - 1) * lhs_dilate + 1
    places = (o * stride + k * rhs_dilate - pad for o in range(out) for k in range(kernel))
    return sum(0 <= place < reach and place % lhs_dilate == 0 for place in places)


# --- the walk --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Program:
    """What one run of a compiled program does, on one device."""

    collectives: list[Collective]
    products: list[tuple[float, int, str]]  # (FLOPs once, times, source) of matrix products
    opaque: dict[str, int]  # kernels whose FLOPs cannot be seen: name -> times
    unknown_loops: list[str]  # loops counted once, because only the program knows how often they run

    @property
    def flops(self) -> float:
        return sum(flops * times for flops, times, _ in self.products)

    @property
    def wire_bytes(self) -> float:
        """Bytes that leave the device in every step."""
        return sum(one.wire_bytes * one.times for one in self.collectives if one.certain)

    @property
    def further_wire_bytes(self) -> float:
        """Bytes that leave it besides, if each loop whose length depends on the data runs once."""
        return sum(one.wire_bytes * one.times for one in self.collectives if not one.certain)

    def by_kind(self) -> dict[str, dict[str, float]]:
        """Per kind of collective: how many run in every step, their operands' bytes and those that leave the device."""
        table: dict[str, dict[str, float]] = {}
        for one in filter(lambda one: one.certain, self.collectives):
            row = table.setdefault(one.kind, {"count": 0, "operand_bytes": 0, "wire_bytes": 0.0})
            row["count"] += one.times
            row["operand_bytes"] += one.times * one.operand_bytes
            row["wire_bytes"] += one.times * one.wire_bytes
        return table


def read(text: str) -> Program:
    """The collectives and matrix products of HLO `text`, loops multiplied out.

    Of a conditional the branch that sends most (then: multiplies most) counts. A loop whose number of iterations is
    not in the program is named; its products count once, what it sends is kept apart.
    """
    module = parse(text)
    return _walk(module, Loops(module), module.entry, [])


def _walk(module: Module, loops: Loops, computation: str, parameters) -> Program:
    total = Program([], [], {}, [])
    instructions = module.computations[computation]

    def add(part: Program, times: int = 1) -> None:
        total.collectives += [dataclasses.replace(one, times=one.times * times) for one in part.collectives]
        total.products += [(flops, count * times, source) for flops, count, source in part.products]
        total.unknown_loops += part.unknown_loops
        for name, count in part.opaque.items():
            total.opaque[name] = total.opaque.get(name, 0) + count * times

    def inside(name: str, values=()) -> Program:
        return _walk(module, loops, name, values)

    for ins in instructions.values():
        operand = [instructions[name].shapes for name in ins.operands]
        kind = ins.opcode.removesuffix("-start")
        if kind in KINDS:
            count = 1 if kind == "ragged-all-to-all" else len(operand)  # its other operands are offsets and the output
            nbytes = sum(shape.nbytes for shapes in operand[:count] for shape in shapes)
            group = group_size(ins.attributes, module.devices)
            total.collectives.append(Collective(kind, nbytes, group, 1, ins.source, ins.opcode != kind))
        elif ins.opcode in ("dot", "convolution"):
            total.products.append((product_flops(ins, operand), 1, ins.source))
        elif ins.opcode == "while":
            times = loops.trips(computation, ins, parameters)
            state = loops.invariant(ins, loops.value(computation, ins.operands[0], parameters))
            if times is None:
                total.unknown_loops.append(ins.source or ins.name)
            part = inside(ins.called("body"), [state])
            if times is None:
                part.collectives = [dataclasses.replace(one, certain=False) for one in part.collectives]
            add(part, 1 if times is None else times)
        elif ins.opcode == "conditional":
            add(
                max(
                    map(inside, _branches(ins)),
                    key=lambda part: (part.wire_bytes + part.further_wire_bytes, part.flops),
                )
            )
        elif ins.opcode in ("fusion", "call", "async-start"):
            called = ins.called("calls") or ins.called("to_apply")
            add(inside(called))
        elif ins.opcode == "custom-call":
            add(_custom(ins))
    return total


def _branches(ins: Instruction) -> list[str]:
    listed = match(r"branch_computations=\{([^}]*)\}", ins.attributes)
    if listed:
        return [name.strip().lstrip("%") for name in listed.split(",")]
    return [ins.called("true_computation"), ins.called("false_computation")]


def _custom(ins: Instruction) -> Program:
    """A kernel: what its author says it multiplies, or else its name."""
    if flops := match(r'"cost_estimate":\{"flops":"(\d+)"', ins.attributes):
        return Program([], [(float(flops), 1, ins.source)], {}, [])
    if match(r'custom_call_target="([^"]*)"', ins.attributes) != "tpu_custom_call":
        return Program([], [], {}, [])
    return Program([], [], {re.sub(r"\.\d+$", "", ins.name): 1}, [])
