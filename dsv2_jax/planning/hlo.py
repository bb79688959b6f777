"""HLO text: its instructions, and how often its loops run."""

import dataclasses
import functools
import math
import re

BYTES = {"pred": 1, "token": 0, "opaque": 0}  # the others are told from their names: bf16, f8e4m3fn, s32, c64


# --- parsing ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Shape:
    dtype: str
    dims: tuple[int, ...]
    layout: str = ""  # 1,0:T(8,128)S(1) and the like

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def nbytes(self) -> int:
        return math.ceil(self.size * _bits(self.dtype) / 8)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"

    @property
    def is_integer(self) -> bool:
        return self.dtype[0] in "su"

    @property
    def in_hbm(self) -> bool:
        """Whether it lies in the device's main memory, rather than on chip or with the host."""
        return not re.search(r"S\([1-9]", self.layout)

    @property
    def padded_bytes(self) -> int:
        """Bytes with the padding of its tiles: the most minor dimensions are filled up to whole tiles."""
        tile = match(r"T\(([\d,]+)\)", self.layout)
        order = [int(i) for i in self.layout.split(":")[0].split(",") if i.isdigit()]
        if tile is None or len(order) != len(self.dims):
            return self.nbytes
        dims = [self.dims[i] for i in order]  # the most minor first
        for i, side in enumerate(reversed([int(n) for n in tile.split(",")])):
            if i < len(dims):
                dims[i] = -(-dims[i] // side) * side
        return math.ceil(math.prod(dims) * _bits(self.dtype) / 8)


@functools.cache
def _bits(dtype: str) -> int:
    return 8 * BYTES[dtype] if dtype in BYTES else int(re.match(r"[a-z]+(\d+)", dtype)[1])


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    shapes: tuple[Shape, ...]  # one, or those of a tuple, flattened
    operands: tuple[str, ...]
    literal: str  # what stands between the parentheses
    attributes: str  # what follows them
    is_root: bool

    @property
    def nbytes(self) -> int:
        return sum(shape.nbytes for shape in self.shapes)

    @property
    def source(self) -> str:
        """The JAX operation it comes from, such as jit(f)/while/body/dot_general."""
        return match(r'op_name="([^"]*)"', self.attributes) or ""

    def called(self, attribute: str) -> str | None:
        return match(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)


Computation = dict[str, Instruction]

_SHAPE = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\](?:\{([^}]*)\})?")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)$")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*->.*\{\s*$")
_END = re.compile(r"\}(, execution_thread=.*)?$")
_STARTS = re.compile(r"\s+(ROOT )?%[\w.\-]+ = |\}(, exec.*)?$|$|(ENTRY )?%[\w.\-]+ \(|HloModule|[A-Z]\w+$|\d+ ")
_COMMENT = re.compile(r"/\*.*?\*/")


@dataclasses.dataclass(frozen=True)
class Module:
    computations: dict[str, Computation]
    entry: str
    devices: int

    def root(self, name: str) -> Instruction:
        return next(ins for ins in self.computations[name].values() if ins.is_root)


def match(pattern: str, text: str) -> str | None:
    found = re.search(pattern, text)
    return found[1] if found else None


def _close(text: str) -> int:
    """Where the parenthesis that is open at the beginning of `text` closes."""
    depth = 1
    for found in re.finditer(r'[()]|"(?:[^"\\]|\\.)*"', text):
        depth += {"(": 1, ")": -1}.get(found[0], 0)
        if depth == 0:
            return found.start()
    raise ValueError(f"unbalanced parentheses in {text[:80]!r}")


def shapes_of(text: str) -> tuple[Shape, ...]:
    """All array shapes written in `text`: "(f32[2,3]{1,0:T(8,128)}, s32[])" has two."""
    found = _SHAPE.findall(text)
    return tuple(Shape(dtype, tuple(map(int, filter(None, dims.split(",")))), layout) for dtype, dims, layout in found)


def parse(text: str) -> Module:
    """HLO text -> its computations, by name; each a dictionary of instructions in the order they are written."""
    computations, current, entry = {}, None, None
    for line in _whole_lines(text):
        if found := (current is not None and _LINE.match(_COMMENT.sub("", line))):
            root, name, result, opcode, rest = found.groups()
            end = _close(rest)
            inside, after = rest[:end], rest[end + 1 :]
            operands = tuple(re.findall(r"%([\w.\-]+)", inside))
            current[name] = Instruction(name, opcode, shapes_of(result), operands, inside, after, bool(root))
        elif _END.match(line):
            current = None
        elif current is None and (found := _HEADER.match(line)):
            current = computations.setdefault(found[2], {})
            entry = found[2] if found[1] else entry
    if entry is None:
        raise ValueError("this is no HLO module: it has no ENTRY computation")
    counts = (match(rf"\b{name}=(\d+)", text[:100_000]) for name in ("num_partitions", "replica_count"))
    return Module(computations, entry, math.prod(int(count or 1) for count in counts))


def _whole_lines(text: str):
    """The lines of `text`, those that an attribute's own line breaks have cut joined again."""
    held = None
    for line in text.splitlines():
        if held is not None and not _STARTS.match(line):
            held += line
            continue
        if held is not None:
            yield held
        held = line
    if held is not None:
        yield held


# --- loops -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Element:
    """Element `index` of the loop's state at the beginning of an iteration, plus a number."""

    index: int
    plus: int = 0


class Loops:
    """Evaluates the few integers that decide how often loops run."""

    def __init__(self, module: Module):
        self.module, self.kept = module, {}

    def value(self, computation: str, name: str, parameters):
        """An integer, an `Element`, a list (a tuple), or None where it is not known before the program runs.

        `parameters`: the values of the computation's parameters, by their number.
        """
        ins = self.module.computations[computation][name]
        if len(ins.shapes) == 1 and not (ins.shapes[0].is_integer and not ins.shapes[0].dims):
            return None  # of a long chain of sums, each term of which is met again in the next, nothing is to be known
        operand = functools.partial(self._operand, computation, ins, parameters)
        match ins.opcode:
            case "constant":
                return int(ins.literal) if re.fullmatch(r"-?\d+", ins.literal) else None
            case "parameter":
                number = int(ins.literal)
                return parameters[number] if number < len(parameters) else None
            case "copy" | "bitcast" | "convert" | "copy-start" | "copy-done" | "optimization-barrier":
                return operand(0)
            case "tuple":
                return [operand(i) for i in range(len(ins.operands))]
            case "get-tuple-element":
                return self._element(computation, ins, parameters)
            case "add" | "subtract":
                return _add(operand(0), operand(1), 1 if ins.opcode == "add" else -1)
            case "fusion" | "call":
                called = ins.called("calls") or ins.called("to_apply")
                inner = [operand(i) for i in range(len(ins.operands))]
                return self.value(called, self.module.root(called).name, inner)
        return None

    def _operand(self, computation, ins, parameters, number):
        return self.value(computation, ins.operands[number], parameters)

    def _element(self, computation, ins, parameters):
        index, base = int(match(r"index=(\d+)", ins.attributes)), ins.operands[0]
        source = self.module.computations[computation][base]
        if source.opcode == "tuple":  # not all of it: tuples of loops are long
            return self.value(computation, source.operands[index], parameters)
        if source.opcode == "while":
            body = source.called("body")
            if not self._kept(body)[index]:
                return None
            start = self.module.computations[computation][source.operands[0]]
            if start.opcode == "tuple":
                return self.value(computation, start.operands[index], parameters)
            state = self.value(computation, start.name, parameters)
        else:
            state = self.value(computation, base, parameters)
        if state == "state":
            return Element(index)
        return state[index] if isinstance(state, list) and index < len(state) else None

    def invariant(self, loop: Instruction, start):
        """The loop's state with what changes in it, or is not known, replaced by None."""
        if not isinstance(start, list):
            return None
        return [value if keep else None for value, keep in zip(start, self._kept(loop.called("body")), strict=True)]

    def _kept(self, body: str) -> list[bool]:
        """Which elements of its state a loop's body hands on as they are."""
        if body not in self.kept:
            root = self.module.root(body)
            if root.opcode == "tuple":
                self.kept[body] = [
                    self.value(body, name, ["state"]) == Element(i) for i, name in enumerate(root.operands)
                ]
            else:
                self.kept[body] = [False] * len(root.shapes)
        return self.kept[body]

    def trips(self, computation: str, loop: Instruction, parameters) -> int | None:
        """How often the body of a while instruction runs; None where the program itself decides."""
        if known := match(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
            return int(known)
        start = self.value(computation, loop.operands[0], parameters)
        found = self._compare(loop.called("condition"), ["state"])
        if found is None or not isinstance(start, list):
            return None
        left, right, direction = found
        if isinstance(right, Element) and not isinstance(left, Element):
            left, right, direction = right, left, direction.translate(str.maketrans("LG", "GL"))
        invariant, body = self.invariant(loop, start), loop.called("body")
        if isinstance(right, Element):
            right = _add(invariant[right.index], right.plus)
        if isinstance(left, Element) and isinstance(right, Element):
            return None
        if not isinstance(left, Element) or right is None or start[left.index] is None:
            return None
        root = self.module.root(body)
        after = self.value(body, root.operands[left.index], ["state"]) if root.opcode == "tuple" else None
        after = _add(after, 0) if not isinstance(after, Element) else after
        if not isinstance(after, Element) or after.index != left.index or after.plus == 0:
            return None
        first, step = start[left.index] + left.plus, after.plus
        if direction != "NE" and (direction[0] == "L") != (step > 0):  # it moves away from its end
            holds = first < right + (direction == "LE") if direction[0] == "L" else first > right - (direction == "GE")
            return None if holds else 0
        distance = right - first + {"LE": 1, "GE": -1}.get(direction, 0)
        return max(0, math.ceil(distance / step))

    def _compare(self, computation: str, parameters):
        """(left, right, direction) of the comparison that a condition's root is, through fusions."""
        root = self.module.root(computation)
        operands = [self.value(computation, name, parameters) for name in root.operands]
        if root.opcode == "compare":
            return *operands, match(r"direction=(\w+)", root.attributes)
        if root.opcode in ("fusion", "call"):
            return self._compare(root.called("calls") or root.called("to_apply"), operands)
        return None


def _add(left, right, sign: int = 1):
    if isinstance(left, Element) and isinstance(right, int):
        return Element(left.index, left.plus + sign * right)
    if isinstance(right, Element) and isinstance(left, int) and sign == 1:
        return Element(right.index, right.plus + left)
    return left + sign * right if isinstance(left, int) and isinstance(right, int) else None
