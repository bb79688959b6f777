"""What the instructions of a compiled program read from and write to main memory, from its text."""

import math
import re

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
# A TPU's copies into vector memory, ahead, are the reading of what uses them.
_AHEAD = "copy-start", "copy-done", "slice-start", "slice-done", "custom-call"
_NO_PASS = "parameter", "bitcast", "constant", "tuple", "get-tuple-element", *_AHEAD


def _size(type_: str) -> int:
    arrays = re.findall(r"\b(pred|[a-z]+\d+)\[([\d,]*)\]", type_)
    return sum(BYTES[dtype] * math.prod(int(n) for n in shape.split(",") if n) for dtype, shape in arrays)


def passes(text: str, least: int = 1 << 20) -> dict[str, tuple[int, int]]:
    """instruction of the entry computation -> bytes read, bytes written, where either is `least` or more.

    A gather of rows reads as much as it writes; other instructions are taken to read their operands whole, once.
    """
    sizes, found = {}, {}
    for line in text[text.index("\nENTRY ") :].splitlines():
        stated = re.match(r"\s*(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][a-z0-9-]*)\((.*)", line)
        if not stated:
            continue
        name, type_, opcode, rest = stated.groups()
        sizes[name] = written = _size(type_)
        operands = [sizes.get(operand, 0) for operand in re.findall(r"%([\w.-]+)", rest.split("), ")[0])]
        if name.startswith("gather") and operands:
            operands[0] = written
        if opcode not in _NO_PASS and max(written, *operands, 0) >= least:
            found[name] = sum(operands), written
    return found
