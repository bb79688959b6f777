"""Compiles the Hopper kernels ahead of time for sm_90a, with no GPU, and holds each to its limits.

    python -m kernels_pallas.check_gpu [CASE ...]      (kernels_pallas/check_gpu.sh makes the environment it needs)

The cases are those of the function `gpu_cases()` in the `shapes.py` of each op's package, at the full shapes of V2
and Lite: a dict

    name -> (function, arguments, temporaries)

    function     what is compiled, under jit; it names its implementation ("gpu"), so that none falls back
    arguments    a tuple of pytrees of jax.ShapeDtypeStruct without sharding
    temporaries  bytes that the program may hold beside its arguments and results

A case is given here as "op/name"; CASE is a part of that. While they are traced the mesh in force is one H200, which
is what `select.target()` and `jax.sharding.get_abstract_mesh().abstract_device` (`num_cores`: 132) then say. Every
Mosaic kernel of a case must use the tensor cores and TMA, and stay within the limits below; a kernel that an earlier
case compiled is printed there only. Exit code 1: a case breaks a limit or does not compile, or no kernel was seen at
all, as where a compilation cache hands out programs.

Dispatch and combine are XLA's on a GPU. Of them it is checked that they read and write the rows in as few passes as the
package counts, and hold no copy of them.
"""

import importlib.util
import os
import re
import sys
import tempfile
from pathlib import Path

import jax
from jax.experimental import topologies

from kernels_pallas.token_dispatch.shapes import abstract_cases
from kernels_pallas.traffic import passes

OPS = "grouped_matmul", "latent_attention", "flash_attention"
PASSES = {"dispatch": 1, "combine": 1, "dispatch gradient": 1, "combine gradients": 2}  # of XLA over rows of V2
SPILLS = 64  # bytes of a thread
SHARED_MEMORY = 227 << 10  # bytes of a block
INSTRUCTIONS = {"HGMMA": "tensor cores", "UTMALDG": "TMA"}  # what the machine code must contain
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 62914560
  clock_rate_ghz: 1.98 device_memory_size: 150754820096 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 12 } runtime_version { major: 13 }
device_description_str: "NVIDIA H200"
"""


def cases() -> dict[str, tuple]:
    """ "op/name" -> (function, arguments, temporaries) of every op that has any."""
    found = {}
    for op in OPS:
        name = f"kernels_pallas.{op}.shapes"
        if importlib.util.find_spec(name) and hasattr(module := importlib.import_module(name), "gpu_cases"):
            found |= {f"{op}/{case}": value for case, value in module.gpu_cases().items()}
    return found


def hopper_mesh() -> jax.sharding.Mesh:
    """One H200 that need not exist. Needs the CUDA plugin of JAX."""
    devices = topologies.get_topology_desc(platform="cuda", target_config=H200, topology="1x1x1").devices
    return jax.sharding.Mesh(devices, ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def compiled(function, arguments, mesh: jax.sharding.Mesh):
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    placed = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole), arguments)
    with jax.set_mesh(mesh):
        return jax.jit(function).trace(*placed).lower(lowering_platforms=("cuda",)).compile()


def kernel(log: Path) -> tuple[str, list[str]]:
    """What the assembler says of a kernel, and the limits it breaks. Its other dumps lie beside `log`."""
    said = log.read_text()
    registers = int(re.search(r"Used (\d+) registers", said)[1])
    spills = max(int(size) for size in re.findall(r"(\d+) bytes spill", said))
    with next(
        log.parent.glob(f"{log.stem}*passes.log")
    ).open() as passes:  # many megabytes: the first line that says it
        shared = next(int(m[1]) for line in passes if (m := re.search(r"dynamic_shared_memory_size %c(\d+)", line)))
    code = next(log.parent.glob(f"{log.stem}*.sass*")).read_text()
    counts = {name: len(re.findall(rf"\b{name}\b", code)) for name in INSTRUCTIONS}
    broken = [f"no {name} ({what})" for name, what in INSTRUCTIONS.items() if not counts[name]]
    broken += ["products wait for one another (wgmma serialised)"] if "serialized" in said else []
    broken += [f"{spills} bytes of registers spilt > {SPILLS}"] if spills > SPILLS else []
    broken += [f"{shared} bytes of shared memory > {SHARED_MEMORY}"] if shared > SHARED_MEMORY else []
    text = f"{registers} registers, {spills} B spilt, {shared / 1024:.1f} KiB shared, "
    return text + ", ".join(f"{n} {name}" for name, n in counts.items()), broken


def check(name: str, case: tuple, mesh: jax.sharding.Mesh, dumps: Path) -> bool:
    """Compiles the case and prints its figures; whether it keeps the limits."""
    function, arguments, most = case
    before = set(dumps.iterdir())
    try:
        program = compiled(function, arguments, mesh)
    except Exception as error:  # the compiler's, of any type
        print(f"{name}: FAILED to compile: {type(error).__name__}: {str(error)[:2000]}", flush=True)
        return False
    temporaries = program.memory_analysis().temp_size_in_bytes
    calls = len(re.findall(r'custom_call_target="mosaic_gpu', program.as_text()))
    print(f"{name}: {calls} kernels, temporaries {temporaries / 2**20:.1f} MiB of {most / 2**20:.1f}", flush=True)
    broken = [] if calls else ["no Mosaic kernel in the program"]
    broken += [f"temporaries of {temporaries} bytes > {most}"] if temporaries > most else []
    for log in sorted(path for path in set(dumps.iterdir()) - before if path.suffix == ".ptxas"):
        text, limits = kernel(log)
        print(f"    {log.stem}: {text}", flush=True)
        broken += [f"{log.stem}: {limit}" for limit in limits]
    for limit in broken:
        print(f"    FAILED: {limit}", flush=True)
    return not broken


def check_passes(name: str, mesh: jax.sharding.Mesh) -> bool:
    """The same of token_dispatch/`name`: passes over arrays of a MiB or more, and temporaries of less than one."""
    program = compiled(*abstract_cases(tile=64, implementation="xla")[name], mesh)
    found, held = passes(program.as_text()), program.memory_analysis().temp_size_in_bytes
    moved = ", ".join(f"{read / 2**20:.0f} MiB read, {written / 2**20:.0f} written" for read, written in found.values())
    print(f"token_dispatch/{name}: {len(found)} passes of {PASSES[name]}: {moved}", flush=True)
    is_kept = len(found) == PASSES[name] and held < 1 << 20
    if not is_kept:
        print(f"    FAILED: {list(found)}, temporaries of {held} bytes", flush=True)
    return is_kept


def main(parts: list[str]) -> int:
    jax.config.update("jax_platforms", "cpu")
    plain = {f"token_dispatch/{name}": name for name in PASSES}
    chosen = [name for name in [*cases(), *plain] if not parts or any(part in name for part in parts)]
    if not chosen:
        print(f"no case is called like {parts}; there are {', '.join([*cases(), *plain])}")
        return 1
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1", MOSAIC_GPU_DUMP_TO=folder)
        mesh = hopper_mesh()
        kept = [
            check_passes(plain[name], mesh) if name in plain else check(name, cases()[name], mesh, Path(folder))
            for name in chosen
        ]
        if not chosen[0].startswith("token_dispatch") and not any(Path(folder).glob("*.ptxas")):
            print("FAILED: no kernel was assembled, and so none was checked")
            return 1
    print(f"{sum(kept)} of {len(kept)} cases keep their limits (jax {jax.__version__}, sm_90a)")
    return 0 if all(kept) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
