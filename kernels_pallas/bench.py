"""Times op x implementation x shape against the roofline of the device, whose two rates are measured in the same run.

    python -m kernels_pallas.bench --shapes=full --out=results

writes bench.json (FLOPs, bytes, seconds, roofline seconds, share reached), anew after each measurement, and at the end
roofline.png. An implementation that cannot run here, or fails to, is listed with its reason. The default on a CPU is
--shapes=small.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import jaxlib

from kernels_pallas.flash_attention import api as flash
from kernels_pallas.flash_attention import shapes as flash_shapes
from kernels_pallas.grouped_matmul import api as grouped
from kernels_pallas.grouped_matmul import shapes as grouped_shapes
from kernels_pallas.latent_attention import api as latent
from kernels_pallas.latent_attention import shapes as latent_shapes
from kernels_pallas.select import target
from kernels_pallas.token_dispatch import api as dispatching

# For a laptop's CPU: the widths of Lite, few tokens.
SMALL = {
    "flash": {"lite, 512": flash_shapes.Case(1, 512, 4, 4)},
    "grouped": {"lite, 512 tokens": grouped_shapes.Case(512, 6, 16, 64, 512, 352)},
    "latent": {
        "lite, 1024": latent_shapes.Case(16, 1, (1024,) * 4, 64),
        "lite int8, 1024": latent_shapes.Case(16, 1, (1024,) * 4, 128, dtype="int8"),
    },
}


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


def _size(*arrays) -> int:
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(arrays))


def _gradient(function):
    """Of the sum, with respect to every argument."""
    return lambda *arguments: jax.grad(lambda *a: function(*a).astype(jnp.float32).sum(), tuple(range(len(arguments))))(
        *arguments
    )


def flash_work(name, case, dtype):
    (q, k, v), weight, _ = flash_shapes.make_case(dataclasses.replace(case, is_packed=False), dtype)
    pairs = case.batch * case.heads * case.length * (case.length + 1) // 2
    H, V, o = case.qk_dim, case.value_dim, weight.astype(dtype)

    def forward(implementation):
        return functools.partial(flash.flash_attention, scale=0.1, implementation=implementation)

    names = tuple(flash.IMPLEMENTATIONS)
    yield Work("flash_attention", name, forward, (q, k, v), 2 * pairs * (H + V), _size(q, k, v, o), names)
    # Both passes: scores twice, dv, dp, dq and dk.
    both = 2 * pairs * (H + V) + 2 * pairs * (3 * H + 2 * V)
    yield Work(
        "flash_attention gradient",
        name,
        lambda implementation: _gradient(forward(implementation)),
        (q, k, v),
        both,
        2 * _size(q, k, v, o),
        names,
    )


def grouped_work(name, case, dtype):
    """In the tiles that the model takes here; padding rows are no useful work."""
    case = dataclasses.replace(case, tile=grouped.rows_per_tile(case.tokens * case.choices, case.experts))
    x, (gate, up), weight, layout = grouped_shapes.make_case(case, dtype)
    live, names = int(layout.live_tiles), tuple(grouped.IMPLEMENTATIONS)
    rows = int(jnp.sum(layout.token_of_row_G < case.tokens))
    used = len(set(layout.expert_of_tile[:live].tolist())) / case.experts  # of the weights, which are read once
    y, product = weight.astype(dtype), 2 * rows * case.dim * case.width
    live_x, live_y = (rows * a.shape[1] * a.dtype.itemsize for a in (x, y))

    def matmul(implementation):
        return lambda x, w: grouped.grouped_matmul(x, w, layout, implementation=implementation)

    def swiglu(implementation):
        return lambda x, *w: grouped.grouped_swiglu(x, *w, layout, implementation=implementation)

    moved = live_x + live_y + used * _size(gate)
    yield Work("grouped_matmul", name, matmul, (x, gate), product, moved, names)
    moved_back = 3 * live_x + 2 * live_y + used * 2 * _size(gate) + _size(gate)
    both = lambda implementation: _gradient(matmul(implementation))  # noqa: E731
    yield Work("grouped_matmul gradient", name, both, (x, gate), 2 * product, moved_back, names)
    moved = live_x + live_y + used * _size(gate, up)
    yield Work("grouped_swiglu", name, swiglu, (x, gate, up), 2 * product, moved, names)

    tokens = jnp.ones((case.tokens, case.dim), dtype)
    gates, names = jnp.ones((case.tokens, case.choices)), tuple(dispatching.IMPLEMENTATIONS)
    there = lambda implementation: lambda x: dispatching.dispatch(x, layout, implementation=implementation)  # noqa: E731
    back = lambda implementation: lambda y, g: dispatching.combine(y, g, layout, implementation=implementation)  # noqa: E731
    yield Work("dispatch", name, there, (tokens,), 0, _size(tokens) + live_x, names)
    yield Work("combine", name, back, (x, gates), 2 * rows * case.dim, _size(tokens, gates) + live_x, names)


def latent_work(name, case, dtype):
    (q, pages, table, offset), options = latent_shapes.make_case(case, dtype)
    width, R, T = case.value_dim + case.rope_dim, case.value_dim, case.queries
    seen = sum(T * length - T * (T - 1) // 2 for length in case.lengths)
    entry = width * jnp.iinfo(case.dtype).bits / 8 if case.dtype.startswith("int") else width * pages.dtype.itemsize
    entry += 0 if options["scales"] is None else 8
    moved = sum(case.lengths) * entry + _size(q) * (1 + R / width)

    def attend(implementation):
        def run(q, pages, scales):
            arguments = options | {"scales": scales, "implementation": implementation}
            return latent.paged_latent_attention(q, pages, table, offset, **arguments)

        return run

    arguments = q, pages, options["scales"]
    names = tuple(latent.PAGED_IMPLEMENTATIONS)
    yield Work("paged_latent_attention", name, attend, arguments, 2 * case.heads * seen * (width + R), moved, names)


def seconds(function, arguments, repeats: int) -> float:
    """Median time of a call, after one that compiles; each is waited for."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measured_rates(dtype, side: int, repeats: int) -> tuple[float, float]:
    """FLOP/s of one square matmul, bytes/s of one copy, on this device."""
    a = jnp.ones((side, side), dtype)
    flops = 2 * side**3 / seconds(jax.jit(lambda a: a @ a), (a,), repeats)
    big = jnp.ones((16 * side, side), jnp.float32)
    return flops, 2 * _size(big) / seconds(jax.jit(lambda a: a + 1), (big,), repeats)


def measure(works, rates, repeats: int) -> Iterator[dict]:
    for work in works:
        roofline = max(work.flops / rates[0], work.bytes / rates[1])
        for name in work.implementations:
            row = {"op": work.op, "shape": work.shape, "implementation": name, "flops": work.flops, "bytes": work.bytes}
            try:
                taken = seconds(jax.jit(work.run(name)), work.arguments, repeats)
                row |= {"seconds": taken, "roofline_seconds": roofline, "share": roofline / taken}
            except ValueError as error:
                if "cannot run" not in str(error):
                    raise
                row["reason"] = str(error)
            except jax.errors.JaxRuntimeError as error:  # the compiler's, or of a device that has too little memory
                row["reason"] = f"failed: {error}"[:500]
            shown = f"{row['seconds'] * 1e3:10.3f} ms {row['share']:7.1%}" if "share" in row else row["reason"]
            print(f"{work.op:26} {work.shape:20} {name:11} {shown}", flush=True)
            yield row


def plot(rows: list[dict], rates, path: pathlib.Path) -> None:
    """FLOP/s against FLOP per byte, under the roof."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if "seconds" in row and row["flops"]]
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    intensity = sorted({row["flops"] / row["bytes"] for row in rows} | {0.1, rates[0] / rates[1], 1e4})
    axes.loglog(intensity, [min(rates[0], x * rates[1]) for x in intensity], color="black", label="measured roof")
    for op in dict.fromkeys(row["op"] for row in rows):
        for marker, name in zip("o^sdvx", dict.fromkeys(row["implementation"] for row in rows)):
            points = [r for r in rows if (r["op"], r["implementation"]) == (op, name)]
            if points:
                xs, ys = [r["flops"] / r["bytes"] for r in points], [r["flops"] / r["seconds"] for r in points]
                axes.loglog(xs, ys, marker, label=f"{op}, {name}")
    axes.set(xlabel="FLOP per byte that must move", ylabel="FLOP/s", title=f"Roofline: {target().kind}")
    axes.legend(fontsize="x-small")
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> None:
    arguments, on_cpu = sys.argv[1:] if arguments is None else arguments, target().platform == "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=["small", "full"], default="small" if on_cpu else "full")
    parser.add_argument("--dtype", default="float32" if on_cpu else "bfloat16")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--reference", action="store_true", help="time the naive oracles too")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("bench"))
    args = parser.parse_args(arguments)
    full = {"flash": flash_shapes.FULL, "grouped": grouped_shapes.FULL, "latent": latent_shapes.FULL}
    cases, makers = full if args.shapes == "full" else SMALL, [flash_work, grouped_work, latent_work]
    rates = measured_rates(args.dtype, 1024 if on_cpu else 8192, args.repeats)
    print(f"{target().kind}, {args.dtype}: {rates[0] / 1e12:.3f} TFLOP/s, {rates[1] / 1e9:.1f} GB/s measured")
    args.out.mkdir(parents=True, exist_ok=True)
    record = {
        "command": shlex.join(["python", "-m", "kernels_pallas.bench", *arguments]),
        "device": target().kind,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "runtime": jax.local_devices()[0].client.platform_version,  # of libtpu, or CUDA
        "date": time.strftime("%Y-%m-%d"),
        "dtype": args.dtype,
        "flops_per_second": rates[0],
        "bytes_per_second": rates[1],
        "results": (rows := []),
    }
    for maker, shapes in zip(makers, cases.values()):
        for name, case in shapes.items():
            for work in maker(name, case, args.dtype):
                kept = tuple(n for n in work.implementations if n != "reference" or args.reference)
                for row in measure([dataclasses.replace(work, implementations=kept)], rates, args.repeats):
                    rows.append(row)
                    (args.out / "bench.json").write_text(json.dumps(record, indent=1) + "\n")
    plot(rows, rates, args.out / "roofline.png")


if __name__ == "__main__":
    main()
