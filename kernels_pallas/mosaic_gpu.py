"""What the Hopper kernels share: for which devices they are, how many blocks fill one, and how they are interpreted."""

import re

import jax
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.select import Target

InterpretParams = InterpretGPUParams  # exported by plgpu itself from jax 0.11 on
_NO_INDEX = (None,) if jax.__version_info__ < (0, 11) else ()  # of plgpu.load, where the reference is indexed before
WARPGROUP = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup)


def not_hopper(target: Target) -> str | None:
    """Why a Hopper kernel cannot run there; None on an H100, H200, H800, H20 or GH200 (compute capability 9.0)."""
    if target.platform != "gpu":
        return f"a Hopper kernel, not for {target.platform}"
    if not re.search(r"\b(G?H[12]00|H800|H20)\b", target.kind):
        return f"a Hopper kernel (H100, H200, H800, H20, GH200), not for {target.kind}"
    return None


def multiprocessors() -> int:
    """Of the device of the mesh in force, else of the default one; 1 on a host, where kernels are interpreted."""
    if device := jax.sharding.get_abstract_mesh().abstract_device:
        return device.num_cores if device.platform == "gpu" else 1
    return getattr(jax.local_devices()[0], "core_count", 1)


def read(ref, interpret, **options):
    """From global memory, element by element; a plain index, which the interpreter asks for, takes no options."""
    return ref[...] if interpret else plgpu.load(ref, *_NO_INDEX, optimized=False, **options)


def varying_as(inputs, *outputs: jax.Array) -> list[jax.Array]:
    """The outputs of `plgpu.kernel`, which inside shard_map are taken to be alike on all devices; an input may not."""

    def axes(x):
        return jax.typeof(x).manual_axis_type.varying

    varying = frozenset().union(*map(axes, inputs))
    return [jax.lax.pcast(y, tuple(varying - axes(y)), to="varying") if varying - axes(y) else y for y in outputs]
