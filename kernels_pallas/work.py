"""What bench.py times: op x shape, with the least each must compute and move, and what it is compared with."""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.flash_attention import api as flash
from kernels_pallas.flash_attention import shapes as flash_shapes
from kernels_pallas.grouped_matmul import api as grouped
from kernels_pallas.grouped_matmul import shapes as grouped_shapes
from kernels_pallas.latent_attention import api as latent
from kernels_pallas.latent_attention import shapes as latent_shapes
from kernels_pallas.select import target
from kernels_pallas.token_dispatch import api as dispatching

CODES = "int8", "float8_e4m3fn"  # weights of one byte
DENSE = "one dense product of the FLOPs"


@dataclasses.dataclass(frozen=True)
class Peer:
    """What does the same work by other means, timed in the same run: `function(*arguments)`."""

    name: str
    function: Callable
    arguments: tuple


@dataclasses.dataclass(frozen=True)
class Work:
    """One measurement: `run(implementation)(*arguments)` with the least it must compute and move."""

    op: str
    shape: str
    run: Callable  # implementation -> function
    arguments: tuple
    flops: float
    bytes: float
    implementations: tuple[str, ...]
    peer: Peer | None = None


def _size(*arrays) -> int:
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(arrays))


def _gradient(function):
    """(dy, *arguments) -> cotangents of the arguments."""
    return lambda dy, *arguments: jax.vjp(function, *arguments)[1](dy)


# --- flash attention --------------------------------------------------------------------------------------------------


def flash_work(name: str, case: flash_shapes.Case, dtype, rng=None) -> Iterator[Work]:
    (q, k, v), weight, _ = flash_shapes.make_case(dataclasses.replace(case, is_packed=False), dtype, rng)
    pairs = case.batch * case.heads * case.length * (case.length + 1) // 2
    H, V, o, names = case.qk_dim, case.value_dim, weight.astype(dtype), tuple(flash.IMPLEMENTATIONS)

    def forward(implementation):
        return lambda q, k, v: flash.flash_attention(q, k, v, scale=0.1, implementation=implementation)

    def backward(implementation):
        return _gradient(forward(implementation))

    peer, peer_back = cudnn(q, k, v, o) if target().platform == "gpu" else (None, None)
    least = 2 * pairs * (H + V)
    yield Work("flash_attention", name, forward, (q, k, v), least, _size(q, k, v, o), names, peer)
    # Both passes: scores twice, dv, dp, dq and dk.
    least += 2 * pairs * (3 * H + 2 * V)
    moved = 2 * _size(q, k, v, o)
    yield Work("flash_attention gradient", name, backward, (o, q, k, v), least, moved, names, peer_back)


def cudnn(q, k, v, o) -> tuple[Peer, Peer]:
    """cuDNN's attention, which takes values as wide as keys only; they are padded before, outside the clock."""
    v, o = (jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, q.shape[-1] - x.shape[-1]))) for x in (v, o))

    def attend(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, scale=0.1, is_causal=True, implementation="cudnn")

    name = f"cuDNN, values padded to {q.shape[-1]}"
    return Peer(name, attend, (q, k, v)), Peer(name, _gradient(attend), (o, q, k, v))


# --- the experts ------------------------------------------------------------------------------------------------------


def grouped_work(name: str, case: grouped_shapes.Case, dtype, rng=None) -> Iterator[Work]:
    """In the tiles that the model takes here; padding rows are no useful work."""
    case = dataclasses.replace(case, tile=grouped.rows_per_tile(case.tokens * case.choices, case.experts))
    x, (gate, up), weight, layout = grouped_shapes.make_case(case, dtype, rng)
    live, names = int(layout.live_tiles), tuple(grouped.IMPLEMENTATIONS)
    rows = int(jnp.sum(layout.token_of_row_G < case.tokens))
    used = len(np.unique(layout.expert_of_tile[:live])) / case.experts  # of the weights, which are read once
    y, product = weight.astype(dtype), 2 * rows * case.dim * case.width
    live_x, live_y = (rows * a.shape[1] * a.dtype.itemsize for a in (x, y))

    def matmul(implementation):
        return lambda x, w, layout: grouped.grouped_matmul(x, w, layout, implementation=implementation)

    def swiglu(implementation):
        return lambda x, gate, up, layout: grouped.grouped_swiglu(x, gate, up, layout, implementation=implementation)

    def backward(implementation):
        def gradients(dy, x, w, layout):
            return _gradient(lambda x, w: matmul(implementation)(x, w, layout))(dy, x, w)

        return gradients

    # Dense products over as many rows, by one expert's matrices.
    x_RD, y_RF, w_DF = x[:rows], y[:rows], gate[0]
    dense = Peer(DENSE, lambda x, w: x @ w, (x_RD, w_DF))
    dense_wide = Peer(DENSE, lambda x, w: x @ w, (x_RD, jnp.concatenate([w_DF, up[0]], axis=1)))
    dense_down = Peer(DENSE, lambda x, w: x @ w, (y_RF, w_DF.T))
    dense_back = Peer(DENSE, _gradient(lambda x, w: x @ w), (y_RF, x_RD, w_DF))

    moved, matrix = live_x + live_y, used * _size(gate)
    yield Work("grouped_matmul", name, matmul, (x, gate, layout), product, moved + matrix, names, dense)
    back = 3 * live_x + 2 * live_y + 2 * matrix + _size(gate)
    yield Work("grouped_matmul gradient", name, backward, (y, x, gate, layout), 2 * product, back, names, dense_back)
    arguments = x, gate, up, layout
    yield Work("grouped_swiglu", name, swiglu, arguments, 2 * product, moved + 2 * matrix, names, dense_wide)
    arguments = y, jnp.swapaxes(gate, 1, 2), layout
    yield Work("grouped_matmul down", name, matmul, arguments, product, moved + matrix, names, dense_down)

    for code in CODES:
        matrix = used * gate.size  # a byte each
        run, arguments = coded_operation(grouped.grouped_matmul, code, (gate,))
        arguments = x, *arguments, layout
        yield Work(f"grouped_matmul {code}", name, run, arguments, product, moved + matrix, names, dense)
        run, arguments = coded_operation(grouped.grouped_swiglu, code, (gate, up))
        arguments = x, *arguments, layout
        yield Work(f"grouped_swiglu {code}", name, run, arguments, 2 * product, moved + 2 * matrix, names, dense_wide)
    yield from dispatch_work(name, case, dtype, x, layout, rows)


def coded_operation(operation, code: str, matrices) -> tuple[Callable, tuple]:
    """`run` of a Work over weights of one byte, and [weights], [scales]."""
    scale = jnp.full((matrices[0].shape[0], matrices[0].shape[2]), 1 / 30, jnp.float32)

    def run(implementation):
        return lambda x, w, s, layout: operation(x, *w, layout, scales_EF=s, implementation=implementation)

    return run, ([jnp.round(30 * w).astype(code) for w in matrices], [scale] * len(matrices))


def dispatch_work(name: str, case: grouped_shapes.Case, dtype, x, layout, rows: int) -> Iterator[Work]:
    tokens, gates = jnp.ones((case.tokens, case.dim), dtype), jnp.ones((case.tokens, case.choices))
    names, live = tuple(dispatching.IMPLEMENTATIONS), rows * case.dim * x.dtype.itemsize

    def there(implementation):
        return lambda x, layout: dispatching.dispatch(x, layout, implementation=implementation)

    def back(implementation):
        return lambda y, gates, layout: dispatching.combine(y, gates, layout, implementation=implementation)

    yield Work("dispatch", name, there, (tokens, layout), 0, _size(tokens) + live, names)
    moved = _size(tokens, gates) + live
    yield Work("combine", name, back, (x, gates, layout), 2 * rows * case.dim, moved, names)


# --- latent attention -------------------------------------------------------------------------------------------------


def latent_work(name: str, case: latent_shapes.Case, dtype, rng=None) -> Iterator[Work]:
    width, R, T = case.value_dim + case.rope_dim, case.value_dim, case.queries
    if target().platform == "gpu" and case.dtype != "int4":
        case = dataclasses.replace(case, lanes=width)  # no lanes of padding, which Hopper does not need
    (q, pages, table, offset), options = latent_shapes.make_case(case, dtype, rng)
    seen = sum(T * length - T * (T - 1) // 2 for length in case.lengths)
    entry = width * jnp.iinfo(case.dtype).bits / 8 if case.dtype.startswith("int") else width * pages.dtype.itemsize
    entry += 0 if options["scales"] is None else 8
    moved = sum(case.lengths) * entry + _size(q) * (1 + R / width)

    def attend(implementation):
        def run(q, pages, table, offset, scales):
            arguments = options | {"scales": scales, "implementation": implementation}
            return latent.paged_latent_attention(q, pages, table, offset, **arguments)

        return run

    arguments = q, pages, table, offset, options["scales"]
    names = tuple(latent.PAGED_IMPLEMENTATIONS)
    yield Work("paged_latent_attention", name, attend, arguments, 2 * case.heads * seen * (width + R), moved, names)
