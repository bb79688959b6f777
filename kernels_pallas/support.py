"""Prints op x implementation x platform: which runs where, at the shapes of DeepSeek-V2, and why one does not.

python -m kernels_pallas.support
"""

import jax
import jax.numpy as jnp

from kernels_pallas.expert_ffn import api as expert_ffn
from kernels_pallas.flash_attention import api as flash_attention
from kernels_pallas.grouped_matmul import api as grouped_matmul
from kernels_pallas.latent_attention import api as latent_attention
from kernels_pallas.select import Target, automatic, unsupported
from kernels_pallas.tiles import make_layout
from kernels_pallas.token_dispatch import api as token_dispatch

TARGETS = {
    "CPU": Target("cpu", "cpu"),
    "TPU v5p": Target("tpu", "TPU v5"),
    "Hopper": Target("gpu", "NVIDIA H200"),
    "other GPU": Target("gpu", "NVIDIA A100-SXM4-40GB"),
}


def _array(*shape: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def operations() -> dict[str, tuple]:
    """Every op's implementations and arguments as its API hands them to `select`, at the shapes of DeepSeek-V2."""
    T, N, K, E, D, F = 4096, 128, 6, 160, 5120, 1536
    qk, values, latents = _array(1, T, N, 192), _array(1, T, N, 128), _array(8, T, 576)
    layout = jax.eval_shape(lambda e_TK: make_layout(e_TK, E, 128), _array(T, K, dtype=jnp.int32))
    rows = _array(len(layout.token_of_row_G), D)
    offset = _array(8, dtype=jnp.int32)
    flash, latent = flash_attention.IMPLEMENTATIONS, latent_attention.IMPLEMENTATIONS
    paged, pages, table = latent_attention.PAGED_IMPLEMENTATIONS, _array(512, 64, 640), _array(8, 64, dtype=jnp.int32)
    return {
        "flash_attention": (flash, (qk, qk, values, 0.1, None, None)),
        "paged_latent_attention": (paged, (_array(8, 1, N, 576), pages, table, offset, 512, 0.1, None)),
        "latent_attention": (latent, (_array(8, 1, N, 576), latents, offset, 512, 0.1)),
        "grouped_matmul": (grouped_matmul.IMPLEMENTATIONS, (rows, [_array(E, D, F)], layout)),
        "token_dispatch": (token_dispatch.IMPLEMENTATIONS, ()),
        "expert_ffn": (expert_ffn.IMPLEMENTATIONS, ()),
    }


def table() -> list[tuple[str, str, str, str | None]]:
    """Rows of (op, implementation, platform, reason why not or None)."""
    return [
        (op, name, place, unsupported(module, *arguments, on=target))
        for op, (implementations, arguments) in operations().items()
        for name, module in implementations.items()
        for place, target in TARGETS.items()
    ]


def main() -> None:
    taken = set()
    for op, name, place, reason in table():
        module = operations()[op][0][name]
        first = reason is None and automatic(module, TARGETS[place]) and (op, place) not in taken
        if first:
            taken.add((op, place))
        print(f"{op:22} {name:12} {place:10} {'automatic' if first else 'yes' if reason is None else 'no: ' + reason}")


if __name__ == "__main__":
    main()
