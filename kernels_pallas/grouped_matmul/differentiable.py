"""The ops and their gradients from two kernels: of rows, and of the weights' gradient."""

import functools
from collections.abc import Callable

import jax

from kernels_pallas import swiglu


def operations(rows: Callable, weights: Callable, total: Callable) -> tuple[Callable, Callable, Callable]:
    """grouped_matmul, grouped_swiglu and quantised, as `api` calls them.

    Args:
      rows: (xs, ws, layout, epilogue, outputs, interpret, transposed=False, scales=()) -> `outputs` arrays [G, N] of
        epilogue(x w, ...): one x meets every w; or one for each.
      weights: (x_GD, dy_GF, layout, w_EDF, interpret) -> dw_EDF, in the dtype of w.
      total: what `rows` hands to the epilogue for two xs, as their sum.
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
    def grouped_matmul(x_GD, w_EDF, layout, interpret=False):
        return rows([x_GD], [w_EDF], layout, lambda y: (y,), 1, interpret)[0]

    def matmul_forward(x_GD, w_EDF, layout, interpret):
        return grouped_matmul(x_GD, w_EDF, layout, interpret), (x_GD, w_EDF, layout)

    def matmul_backward(interpret, residuals, dy_GF):
        x_GD, w_EDF, layout = residuals
        (dx_GD,) = rows([dy_GF], [w_EDF], layout, lambda dx: (dx,), 1, interpret, transposed=True)
        dx_GD, x_GD, dy_GF = _first(dx_GD, x_GD, dy_GF)
        return dx_GD, weights(x_GD, dy_GF, layout, w_EDF, interpret), None

    grouped_matmul.defvjp(matmul_forward, matmul_backward)

    @functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
    def grouped_swiglu(x_GD, gate_EDF, up_EDF, layout, interpret=False):
        """One pass: the rows are read once for both matrices, and only h is written."""
        return rows([x_GD], [gate_EDF, up_EDF], layout, lambda a, b: (_silu_times(a, b),), 1, interpret)[0]

    def swiglu_forward(x_GD, gate_EDF, up_EDF, layout, interpret):
        def epilogue(a, b):
            return _silu_times(a, b), a, b

        h_GF, a_GF, b_GF = rows([x_GD], [gate_EDF, up_EDF], layout, epilogue, 3, interpret)
        return h_GF, (x_GD, gate_EDF, up_EDF, layout, a_GF, b_GF)

    def swiglu_backward(interpret, residuals, dh_GF):
        x_GD, gate_EDF, up_EDF, layout, a_GF, b_GF = residuals
        da_GF, db_GF = swiglu.gradients(a_GF, b_GF, dh_GF)
        ws = [gate_EDF, up_EDF]
        (dx_GD,) = rows([da_GF, db_GF], ws, layout, lambda *dx: (total(*dx),), 1, interpret, transposed=True)
        dx_GD, x_GD, da_GF, db_GF = _first(dx_GD, x_GD, da_GF, db_GF)
        dgate, dup = (weights(x_GD, dy_GF, layout, w_EDF, interpret) for dy_GF, w_EDF in zip([da_GF, db_GF], ws))
        return dx_GD, dgate, dup, None

    grouped_swiglu.defvjp(swiglu_forward, swiglu_backward)

    def quantised(which: str, x_GD, codes, scales_EF, layout, interpret=False):
        """`grouped_matmul` or `grouped_swiglu` by weights of one byte, which stay so until they are on the chip."""
        epilogue = _silu_times if which == "grouped_swiglu" else lambda y: y
        return rows([x_GD], codes, layout, lambda *y: (epilogue(*y),), 1, interpret, scales=scales_EF)[0]

    return grouped_matmul, grouped_swiglu, quantised


def _first(dx_GD, *inputs):
    """The rows' gradient, and what those of the weights are made of after it: then the weights themselves are gone."""
    return jax.lax.optimization_barrier((dx_GD, *inputs))


def _silu_times(a, b):
    return a * jax.nn.sigmoid(a) * b
