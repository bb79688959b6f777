"""What a compiled loop computes anew in each of its steps."""

from dsv2_jax.planning import hlo


def made_in_the_loop(compiled, sizes: set[int]) -> int:
    """How many arrays with so many elements the body of the program's one loop makes."""
    module = hlo.parse(compiled.as_text())
    loops = [i.called("body") for computation in module.computations.values() for i in computation.values()]
    (body,) = [module.computations[name] for name in loops if name]
    moved = [i for i in body.values() if i.opcode not in ("parameter", "get-tuple-element", "tuple", "bitcast")]
    return sum(shape.size in sizes for i in moved for shape in i.shapes)
