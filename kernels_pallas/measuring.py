"""What the scripts that measure share: where results lie, what is said of a run, clocks, large random arrays."""

import json
import pathlib
import re
import statistics
import time

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

from kernels_pallas.select import target

RESULTS = pathlib.Path(__file__).parent / "results"
IN_FLIGHT = 0.05, 500  # seconds of calls that are started before one is waited for, and how many at the most


def results_folder() -> pathlib.Path:
    """Of this device: results/nvidia_h200."""
    return RESULTS / re.sub(r"\W+", "_", target().kind.lower())


def about(command: str) -> dict[str, str]:
    """When, on what and with what a run was made."""
    device = jax.local_devices()[0]
    return {
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
        "device": device.device_kind,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "runtime": device.client.platform_version,  # of libtpu, or CUDA
    }


def write(record: dict, path: pathlib.Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


class OnDevice(np.random.Generator):
    """Random numbers of which normal ones are drawn on the device, in float32: gigabytes in no time."""

    def __init__(self):
        super().__init__(np.random.PCG64(0))

    def normal(self, size):
        return jax.random.normal(jax.random.key(int(self.integers(2**31))), size, jnp.float32)


def seconds(function, arguments, repeats: int) -> float:
    """Median time of a call, after one that compiles.

    On accelerators many calls are under way before the last is waited for, so that what starting one takes the host is
    not measured, as long as it takes the device longer. On CPUs, where they would run beside each other, each is.
    """

    def run(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            out = function(*arguments)  # what the call before gave is freed
        jax.block_until_ready(out)
        return (time.perf_counter() - start) / calls

    run(1)
    calls = 1 if target().platform == "cpu" else max(1, min(IN_FLIGHT[1], int(IN_FLIGHT[0] / run(1))))
    return statistics.median(run(calls) for _ in range(repeats))


def measured_rates(dtype, side: int, repeats: int) -> tuple[float, float]:
    """FLOP/s of one square matmul, bytes/s of one copy, on this device."""
    a = jnp.ones((side, side), dtype)
    flops = 2 * side**3 / seconds(jax.jit(lambda a: a @ a), (a,), repeats)
    big = jnp.ones((16 * side, side), jnp.float32)
    return flops, 2 * big.nbytes / seconds(jax.jit(lambda a: a + 1), (big,), repeats)
