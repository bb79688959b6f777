"""Times op x implementation x shape against the roofline of the device, whose two rates are measured in the same run.

    python -m kernels_pallas.bench --shapes=full

writes bench.json (FLOPs, bytes, seconds, roofline seconds, share reached), anew after each measurement, and at the end
roofline.png, into kernels_pallas/results/<device> or --out. Where there is something that does the same work, one dense
product of the FLOPs of a grouped one, or on a GPU cuDNN's attention, it is timed in the same run, and `ratio` is its
time over the kernel's. An implementation that cannot run here, or fails to, is listed with its reason. The default on a
CPU is --shapes=small.
"""

import argparse
import dataclasses
import pathlib
import shlex
import sys
from collections.abc import Iterator

import jax

from kernels_pallas import measuring
from kernels_pallas.flash_attention import shapes as flash_shapes
from kernels_pallas.grouped_matmul import shapes as grouped_shapes
from kernels_pallas.latent_attention import shapes as latent_shapes
from kernels_pallas.measuring import measured_rates, seconds
from kernels_pallas.select import target
from kernels_pallas.work import Peer, flash_work, grouped_work, latent_work

# For a laptop's CPU: the widths of Lite, few tokens.
SMALL = {
    "flash": {"lite, 512": flash_shapes.Case(1, 512, 4, 4)},
    "grouped": {"lite, 512 tokens": grouped_shapes.Case(512, 6, 16, 64, 512, 352)},
    "latent": {
        "lite, 1024": latent_shapes.Case(16, 1, (1024,) * 4, 64),
        "lite int8, 1024": latent_shapes.Case(16, 1, (1024,) * 4, 128, dtype="int8"),
    },
}
FULL = {
    "flash": flash_shapes.FULL,
    "grouped": grouped_shapes.FULL,
    "latent": latent_shapes.FULL | latent_shapes.DECODE,
}


def measured_peer(peer: Peer | None, repeats: int) -> dict:
    if peer is None:
        return {}
    try:
        return {"peer": peer.name, "peer_seconds": seconds(jax.jit(peer.function), peer.arguments, repeats)}
    except (NotImplementedError, RuntimeError, ValueError) as error:  # a library's, which lacks the shape or the device
        return {"peer": peer.name, "peer_reason": f"failed: {error}"[:500]}


def measure(works, rates, repeats: int) -> Iterator[dict]:
    for work in works:
        roofline = max(work.flops / rates[0], work.bytes / rates[1])
        beside = measured_peer(work.peer, repeats)
        for name in work.implementations:
            row = {"op": work.op, "shape": work.shape, "implementation": name, "flops": work.flops, "bytes": work.bytes}
            try:
                taken = seconds(jax.jit(work.run(name)), work.arguments, repeats)
                row |= {"seconds": taken, "roofline_seconds": roofline, "share": roofline / taken} | beside
                if "peer_seconds" in row:
                    row["ratio"] = row["peer_seconds"] / taken
            except ValueError as error:
                if "cannot run" not in str(error):
                    raise
                row["reason"] = str(error)
            except jax.errors.JaxRuntimeError as error:  # the compiler's, or of a device that has too little memory
                row["reason"] = f"failed: {error}"[:500]
            print(f"{work.op:28} {work.shape:20} {name:11} {shown(row)}", flush=True)
            yield row


def shown(row: dict) -> str:
    if "reason" in row:
        return row["reason"]
    ratio = f" {row['ratio']:7.2f} x {row['peer']}" if "ratio" in row else ""
    return f"{row['seconds'] * 1e3:10.3f} ms {row['share']:7.1%}{ratio}"


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
    parser.add_argument("--out", type=pathlib.Path, default=measuring.results_folder())
    args = parser.parse_args(arguments)
    cases, makers = FULL if args.shapes == "full" else SMALL, [flash_work, grouped_work, latent_work]
    rates = measured_rates(args.dtype, 1024 if on_cpu else 8192, args.repeats)
    print(f"{target().kind}, {args.dtype}: {rates[0] / 1e12:.3f} TFLOP/s, {rates[1] / 1e9:.1f} GB/s measured")
    record = measuring.about(shlex.join(["python", "-m", "kernels_pallas.bench", *arguments])) | {
        "dtype": args.dtype,
        "flops_per_second": rates[0],
        "bytes_per_second": rates[1],
        "results": (rows := []),
    }
    for maker, shapes in zip(makers, cases.values()):
        for name, case in shapes.items():
            for work in maker(name, case, args.dtype, None if on_cpu else measuring.OnDevice()):
                kept = tuple(n for n in work.implementations if n != "reference" or args.reference)
                for row in measure([dataclasses.replace(work, implementations=kept)], rates, args.repeats):
                    rows.append(row)
                    measuring.write(record, args.out / "bench.json")
    plot(rows, rates, args.out / "roofline.png")


if __name__ == "__main__":
    main()
