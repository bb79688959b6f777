"""What a compiled loop computes anew in each of its steps."""

from dsv2_jax.planning import hlo


def bodies(compiled) -> list[list[hlo.Instruction]]:
    """The instructions of the body of each of the program's loops."""
    module = hlo.parse(compiled.as_text())
    loops = [i.called("body") for computation in module.computations.values() for i in computation.values()]
    return [list(module.computations[name].values()) for name in loops if name]


def made_in_the_loop(compiled, sizes: set[int]) -> int:
    """How many arrays with so many elements the body of the program's one loop makes."""
    (body,) = bodies(compiled)
    moved = [i for i in body if i.opcode not in ("parameter", "get-tuple-element", "tuple", "bitcast")]
    return sum(shape.size in sizes for i in moved for shape in i.shapes)
