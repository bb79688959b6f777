"""How a result is held against an oracle: by its worst element, relative to the oracle's largest."""

import numpy as np

# float32: a few roundings of sums of some hundred terms. bfloat16: 8 bits of mantissa, through a few operations.
TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2}


def worst(actual, expected) -> float:
    """max |actual - expected| / max |expected|; infinite where a number is not finite or the shapes differ."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    if actual.shape != expected.shape or not np.isfinite(actual).all():
        return np.inf
    return 0.0 if actual.size == 0 else float(np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-30))


def assert_close(actual, expected, tolerance=TOLERANCE["float32"], what="result"):
    error = worst(actual, expected)
    assert error <= tolerance, f"{what}: worst error {error:.2e} of the largest value, allowed {tolerance:.0e}"


def shifted(tree, direction, step):
    """tree + step * direction in float64, through dicts and lists."""
    if isinstance(tree, dict):
        return {name: shifted(tree[name], direction[name], step) for name in tree}
    if isinstance(tree, list):
        return [shifted(a, b, step) for a, b in zip(tree, direction, strict=True)]
    return np.asarray(tree, np.float64) + step * np.asarray(direction, np.float64)


def slope(f, tree, direction, step=1e-5):
    """Central finite difference of the scalar function `f` at `tree` along `direction`."""
    return (f(shifted(tree, direction, step)) - f(shifted(tree, direction, -step))) / (2 * step)
