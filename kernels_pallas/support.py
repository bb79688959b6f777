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
    layout = jax.eval_shape(lambda e_TK: make_layout(e_TK, E, 128), _array(T, K, dtype=jnp.int32))
    rows, offset_B = _array(len(layout.token_of_row_G), D), _array(8, dtype=jnp.int32)
    q_BTNC = _array(8, 1, N, 576)

    def flash(queries=T, dtype=jnp.bfloat16, offset_B=None):
        qkv = (_array(8, *sizes, dtype=dtype) for sizes in ((queries, N, 192), (T, N, 192), (T, N, 128)))
        return flash_attention.IMPLEMENTATIONS, (*qkv, 0.1, None, offset_B)

    def paged(dtype, page):
        pages, table_BP = _array(8 * T // page, page, 640, dtype=dtype), _array(8, T // page, dtype=jnp.int32)
        scales = _array(len(pages), 2, page, dtype=jnp.float32) if jnp.dtype(dtype).itemsize == 1 else None
        return latent_attention.PAGED_IMPLEMENTATIONS, (q_BTNC, pages, table_BP, offset_B, 512, 0.1, scales)

    def grouped(dtype):
        return grouped_matmul.IMPLEMENTATIONS, (rows, [_array(E, D, F, dtype=dtype)], layout)

    coded = {"int8": jnp.int8, "float8": jnp.float8_e4m3fn}
    latents = q_BTNC, _array(8, T, 576), offset_B, 512, 0.1
    return {
        "flash_attention": flash(),
        "flash_attention float32": flash(dtype=jnp.float32),
        "flash_attention over a cache": flash(512, offset_B=offset_B),
        "flash_attention of one token": flash(1, offset_B=offset_B),
        "paged_latent_attention": paged(jnp.bfloat16, 64),
        **{f"paged_latent_attention {x}": paged(dtype, 128) for x, dtype in (coded | {"int4": jnp.int4}).items()},
        "latent_attention": (latent_attention.IMPLEMENTATIONS, latents),
        "grouped_matmul": grouped(jnp.bfloat16),
        **{f"grouped_matmul {x}": grouped(dtype) for x, dtype in coded.items()},
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
    taken, ops = set(), operations()
    for op, name, place, reason in table():
        module = ops[op][0][name]
        first = reason is None and automatic(module, TARGETS[place]) and (op, place) not in taken
        if first:
            taken.add((op, place))
        print(f"{op:30} {name:12} {place:10} {'automatic' if first else 'yes' if reason is None else 'no: ' + reason}")


if __name__ == "__main__":
    main()
