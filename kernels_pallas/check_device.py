"""Compares every kernel with its float32 oracle on the device it is for, forward and backward.

    python -m kernels_pallas.check_device [CASE ...] --shapes=full

At small shapes that a kernel takes and that hold what breaks kernels, then at the full ones of V2 and Lite. CASE is a
part of a case's name. Prints a table; writes check_device.json, anew after each case, into
kernels_pallas/results/<device> or --out. Each kernel runs twice: that both runs give the same bits is a watch for
races. Exit code 1: an element is further from the oracle's than TOLERANCE of the largest, the runs differ, or a
kernel does not run. On a CPU it goes through the portable forms.
"""

import argparse
import pathlib
import shlex
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from kernels_pallas import measuring
from kernels_pallas.device_cases import Check, full, small
from kernels_pallas.select import target

TOLERANCE = 3e-2  # of the largest value: 8 bits of mantissa, through a few operations
KERNELS = {"gpu": "gpu", "tpu": "tpu", "cpu": "xla"}  # by platform


@jax.jit
def _worst(actual, expected):
    """max |actual - expected| / max |expected|, or of 1 where that is nothing; infinite where not finite."""
    actual, expected = (jnp.ravel(x).astype(jnp.float32) for x in (actual, expected))
    largest = jnp.max(jnp.abs(expected), initial=0.0)
    error = jnp.max(jnp.abs(actual - expected), initial=0.0) / jnp.where(largest < 1e-20, 1.0, largest)
    return jnp.where(jnp.isfinite(error), error, jnp.inf)


@jax.jit
def _alike(a, b):
    return jnp.all((a == b) | (jnp.isnan(a) & jnp.isnan(b)))


def _widened(arguments):
    """What is bfloat16 in float32; codes stay what they are."""
    return jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a, arguments)


def compare(check: Check, kernels: str) -> Iterator[dict]:
    """A row for each result of the case: its worst error, or the reason why there is none."""
    name = kernels if kernels in check.implementations else check.elsewhere
    row = {"case": check.name, "implementation": name, "oracle": check.oracle}
    try:
        run = jax.jit(check.run(name))
        found = jax.block_until_ready(run(*check.arguments))
        same = jax.device_get(jax.tree.map(_alike, found, run(*check.arguments)))
        with jax.default_matmul_precision("highest"):  # else a GPU multiplies float32 as TF32
            expected = jax.block_until_ready(jax.jit(check.run(check.oracle))(*_widened(check.arguments)))
    except (jax.errors.JaxRuntimeError, NotImplementedError, RuntimeError, ValueError) as error:
        yield row | {"result": "all", "ok": False, "reason": f"{type(error).__name__}: {error}"[:500]}
        return
    for result, value in expected.items():
        error = float(_worst(found[result], value))
        compared = {"result": result, "error": error, "ok": bool(same[result]) and error <= TOLERANCE}
        yield row | compared | ({} if same[result] else {"reason": "a second run gives other bits"})


def shown(row: dict) -> str:
    error = f"{row['error']:9.2e}" if "error" in row else ""
    state = "" if row["ok"] else f"  FAILED {row.get('reason', f'> {TOLERANCE}')}"
    how = f"{row['implementation']} : {row['oracle']}"
    return f"{row['case']:48} {row['result']:14} {how:16} {error}{state}"


def main(arguments: list[str] | None = None) -> int:
    arguments, on_cpu = sys.argv[1:] if arguments is None else arguments, target().platform == "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE")
    parser.add_argument("--shapes", choices=["small", "full"], default="small" if on_cpu else "full")
    parser.add_argument("--implementation", default=KERNELS[target().platform], help="default: the platform's kernels")
    parser.add_argument("--out", type=pathlib.Path, default=measuring.results_folder())
    args = parser.parse_args(arguments)
    record = measuring.about(shlex.join(["python", "-m", "kernels_pallas.check_device", *arguments])) | {
        "tolerance": TOLERANCE,
        "results": (rows := []),
    }
    makers = small() | (full() if args.shapes == "full" else {})
    chosen = {name: make for name, make in makers.items() if not args.cases or any(part in name for part in args.cases)}
    for name, make in chosen.items():
        for row in compare(make(name), args.implementation):
            print(shown(row), flush=True)
            rows.append(row)
            measuring.write(record, args.out / "check_device.json")
    failed = sum(not row["ok"] for row in rows)
    print(f"{len(chosen)} cases, {len(rows)} results, {failed} failed ({target().kind}, jax {jax.__version__})")
    return 0 if rows and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
