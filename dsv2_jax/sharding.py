"""Where arrays lie on the devices: the mesh, one table from logical to mesh axes, and checks of impossible meshes.

The conventions the rooms above rely on:

- A mesh always has the five axes of MESH_AXES; those not asked for have size 1. `data` holds copies of everything;
  `fsdp` splits parameters and optimizer state; `expert` the routed experts; `tensor` heads and widths; `context` the
  sequence of activations.
- Activations: the batch lies over ("data", "fsdp", "expert"), the sequence over "context", heads and widths over
  "tensor", the model's width over nothing. `constrain(x, "batch", "sequence", "embed")` says so by logical names.
- Parameters, their gradients and moments are *stored* as `parameter_spec` says: the logical axes `expert` and TENSOR
  ones on their own mesh axis, and every mesh axis but `data` that is then left on another dimension, so that only
  `data` holds copies. Axes that a scan or vmap stacked in front are not split. Vectors (norms) are whole everywhere.
- Parameters are *used* as `compute_spec` says: the same, but whole over the axes that were only there to store less.
  `gathered` casts first, so that the all-gather moves compute weights; inside shard_map `gather` does.
- The mesh reaches the model as JAX's ambient mesh, never through a config: `with use(mesh):` around tracing and
  `ambient()` inside. Without one every function here that moves arrays is the identity.
"""

import contextlib
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dsv2_jax.config import ConfigError, MLAConfig, ModelConfig

MESH_AXES = ("data", "fsdp", "expert", "tensor", "context")
BATCH_AXES = ("data", "fsdp", "expert")
STORAGE_AXES = ("fsdp", "expert", "context", "tensor")  # over which the stored state holds no copies

# The one table. Activations and parameters name their dimensions; a name that is absent is not split.
ACTIVATIONS = {"batch": BATCH_AXES, "sequence": "context"}
TENSOR = ("heads", "kv_heads", "mlp", "expert_mlp", "vocab")  # of parameters and activations alike
# Dimensions that may take what is left of STORAGE_AXES, the best first; but a matrix's last one after its others,
# unless they are tokens of the vocabulary: TPUs pad what is left of it to 128, and gather along it by way of a copy.
STORAGE = ("embed", "q_latent", "kv_latent", "expert_mlp", "mlp", "heads", "kv_heads", "head_dim", "vocab", "router")


# --- the mesh --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Devices along each axis. At most one axis may be None: as many as there are left (`rest`)."""

    data: int | None = 1
    fsdp: int | None = 1
    expert: int | None = 1
    tensor: int | None = 1
    context: int | None = 1

    @property
    def sizes(self) -> tuple[int | None, ...]:
        return tuple(getattr(self, axis) for axis in MESH_AXES)

    def __str__(self) -> str:
        named = {axis: size for axis, size in zip(MESH_AXES, self.sizes, strict=True) if size != 1}
        return ",".join(f"{axis}={size or 'rest'}" for axis, size in named.items()) or "data=1"

    def resolve(self, devices: int) -> "MeshShape":
        """The shape for so many devices, `rest` worked out; `ConfigError` if they do not fit."""
        known = math.prod(size for size in self.sizes if size)
        rest = [axis for axis, size in zip(MESH_AXES, self.sizes, strict=True) if size is None]
        if rest and devices % known == 0:
            return dataclasses.replace(self, **{rest[0]: devices // known})
        if not rest and known == devices:
            return self
        if rest:
            remedy = f"the other axes must divide the {devices} devices"
        else:
            remedy = f"it takes {known} devices and there are {devices}; let one axis be the rest, as in fsdp=rest"
        raise ConfigError(f"mesh={str(self)!r}: {remedy}")


def parse_mesh(text: str) -> MeshShape:
    """ "fsdp=16,expert=8" -> MeshShape; one size may be `rest`."""
    sizes: dict[str, int | None] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        axis, _, size = (word.strip() for word in part.partition("="))
        if axis not in MESH_AXES:
            raise ConfigError(f"mesh={text!r}: {axis!r} is no axis; there are {', '.join(MESH_AXES)}")
        if axis in sizes:
            raise ConfigError(f"mesh={text!r}: {axis} is given twice")
        if size != "rest" and not (size.isascii() and size.isdigit() and int(size) > 0):
            raise ConfigError(f"mesh={text!r}: {part!r} must be {axis}=N, N a positive number or the word rest")
        sizes[axis] = None if size == "rest" else int(size)
    if not sizes:
        raise ConfigError(f"mesh={text!r}: must name axes, such as fsdp=16,expert=8 or data=rest")
    if sum(size is None for size in sizes.values()) > 1:
        raise ConfigError(f"mesh={text!r}: only one axis can be the rest")
    return MeshShape(**sizes)


def make_mesh(shape: MeshShape | str, devices=None) -> Mesh:
    """The mesh of `shape` over `devices` (all there are; or those of a topology to compile for), axes of type Auto."""
    shape = parse_mesh(shape) if isinstance(shape, str) else shape
    devices = list(jax.devices() if devices is None else devices)
    sizes = shape.resolve(len(devices)).sizes
    if devices[0].platform == "tpu":
        try:
            placed = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        except (NotImplementedError, ValueError, AssertionError) as error:
            raise ConfigError(f"mesh={str(shape)!r}: it cannot be laid out on these chips: {error}") from None
    else:  # neighbours in the last axes share a process, and so the fastest links
        placed = np.array(devices).reshape(sizes)
    return Mesh(placed, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def use(mesh: Mesh | None):
    """A context in which the model is traced for `mesh`; None: for one device."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def use_of(x: jax.Array):
    """A context in which a function under `jit` is traced for the mesh on which its argument `x` lies.

    It changes nothing inside a `use`, outside of a trace, or where `context` > 1, which reorders columns: ask for it.
    """
    mesh = jax.typeof(x).sharding.mesh
    found = isinstance(x, jax.core.Tracer) and mesh.axis_names == MESH_AXES and mesh.shape["context"] == 1
    inside = not jax.sharding.get_abstract_mesh().empty
    return jax.sharding.use_abstract_mesh(mesh) if found and not inside else contextlib.nullcontext()


def ambient():
    """The abstract mesh of the `use` around; None where there is none, or inside a shard_map over all axes."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.manual_axes else mesh


def axis_size(axis: str) -> int:
    """Devices along an axis of the ambient mesh; 1 without one."""
    mesh = ambient()
    return 1 if mesh is None else mesh.shape[axis]


# --- parameters ------------------------------------------------------------------------------------------------------


def compute_spec(axes: tuple[str, ...]) -> PartitionSpec:
    """How a parameter with these logical axes is used: split over `expert` and `tensor` where a dimension is theirs."""
    return PartitionSpec(*("expert" if axis == "expert" else "tensor" if axis in TENSOR else None for axis in axes))


def parameter_spec(axes: tuple[str, ...], shape: tuple[int, ...], mesh) -> PartitionSpec:
    """How a parameter is stored; so are its gradient and its moments.

    Args:
      axes: its logical axes, as in the metadata of an nnx.Param; `shape` may have more dimensions, stacked in front.
      mesh: a Mesh or an AbstractMesh.
    Raises:
      ConfigError: a dimension that must be split does not divide, or no dimension can take an axis.
    """
    stacked = len(shape) - len(axes)
    if len(axes) < 2:
        return PartitionSpec()
    sizes = dict(zip(axes, shape[stacked:], strict=True))
    placed: dict[str, tuple[str, ...]] = dict.fromkeys(axes, ())
    for axis, mesh_axis in zip(axes, compute_spec(axes), strict=True):
        if mesh_axis and mesh.shape[mesh_axis] > 1:
            _check_divides(sizes[axis], mesh.shape[mesh_axis], axis, mesh_axis)
            placed[axis] = (mesh_axis,)
    used = {name for names in placed.values() for name in names}
    left = tuple(name for name in STORAGE_AXES if mesh.shape[name] > 1 and name not in used)

    def room(axis: str, names: tuple[str, ...]) -> bool:
        return sizes[axis] % math.prod(mesh.shape[name] for name in placed[axis] + names) == 0

    candidates = [axis for axis in STORAGE if axis in axes]
    if axes[0] != "vocab":
        candidates.sort(key=lambda axis: axis == axes[-1])
    whole = next((axis for axis in candidates if room(axis, left)), None)
    for name, names in [("", left)] if whole else [(name, (name,)) for name in left]:
        axis = whole or next((axis for axis in candidates if room(axis, names)), None)
        if axis is None:
            dims = ", ".join(f"{axis}={sizes[axis]}" for axis in candidates)
            rests = (sizes[axis] // math.prod(mesh.shape[name] for name in placed[axis]) for axis in candidates)
            raise ConfigError(
                f"mesh: no dimension of a parameter of axes ({', '.join(axes)}) can be divided by "
                f"{name}={mesh.shape[name]} too ({dims}); here {name} may be {_divisors(*rests)}; or use more data"
            )
        placed[axis] += names
    spec = [names[0] if len(names) == 1 else names or None for names in placed.values()]
    return PartitionSpec(*(None,) * stacked, *spec)


def gradient_spec(axes: tuple[str, ...], shape: tuple[int, ...], mesh) -> PartitionSpec:
    """`parameter_spec` less `tensor` where the parameter is used whole over it: there all its devices have the sum."""
    spec = parameter_spec(axes, shape, mesh)
    if "tensor" in compute_spec(axes):
        return spec
    kept = [tuple(name for name in names if name != "tensor") for names in map(_axes, spec)]
    return PartitionSpec(*(names or None for names in kept))


def parameter_sharding(axes: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """`parameter_spec` on a mesh with devices."""
    return NamedSharding(mesh, parameter_spec(axes, shape, mesh))


def tree_shardings(tree, mesh: Mesh):
    """`tree` (a model, moments, a whole state; abstract or not) with a NamedSharding in the place of every array.

    An nnx.Param is stored as its logical axes say, whatever is no nnx.Param (counters, keys) is whole everywhere.
    """

    def sharding(leaf):
        is_parameter = isinstance(leaf, nnx.Variable)
        array = jax.tree.leaves(leaf)[0]
        spec = parameter_spec(leaf.get_metadata("axes"), array.shape, mesh) if is_parameter else PartitionSpec()
        return jax.tree.map(lambda _: NamedSharding(mesh, spec), leaf)

    return jax.tree.map(sharding, tree, is_leaf=lambda x: isinstance(x, nnx.Variable))


def with_shardings(abstract, mesh: Mesh | None):
    """An abstract tree whose ShapeDtypeStructs say where their arrays lie: for restoring, and to compile for."""
    if mesh is None:
        return abstract

    def place(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, abstract, tree_shardings(abstract, mesh))


def stored(w: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """`w`, laid out as a parameter with the logical `axes` is stored: the layout of its gradient too."""
    mesh = ambient()
    return w if mesh is None else jax.lax.with_sharding_constraint(w, parameter_spec(axes, w.shape, mesh))


def cast(w: jax.Array, dtype) -> jax.Array:
    """A stored parameter in the compute dtype, to be gathered.

    It is rounded before it is cast, which changes nothing: but XLA moves a bare cast of one layer's masters out of the
    loop over layers, and then all layers' weights are held a second time (V2 on 128 chips: 3.7 GB).
    """
    if dtype == jnp.bfloat16 and w.dtype == jnp.float32:
        w = jax.lax.reduce_precision(w, exponent_bits=8, mantissa_bits=7)
    return w.astype(dtype)


def gathered(w: jax.Array, axes: tuple[str, ...], dtype) -> jax.Array:
    """A stored parameter as a compute weight: cast to `dtype`, then gathered as `compute_spec` says."""
    mesh = ambient()
    if mesh is None:
        return w.astype(dtype)
    spec, used = parameter_spec(axes, w.shape, mesh), compute_spec(axes)
    kept = tuple(name for name in used if name)
    local = jax.shard_map(lambda w: gather(cast(w, dtype), spec, kept), in_specs=spec, out_specs=used, check_vma=False)
    return local(w)


def _axes(names: tuple[str, ...] | str | None) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec."""
    return names if isinstance(names, tuple) else (names,) if names else ()


def _moved(spec: PartitionSpec, kept: tuple[str, ...]) -> list[tuple[int, tuple[str, ...]]]:
    """The dimensions of `spec` that are split over other mesh axes than `kept`, each with those axes."""
    moved = [tuple(name for name in _axes(names) if name not in kept) for names in spec]
    return [(dimension, names) for dimension, names in enumerate(moved) if names]


def gather(w: jax.Array, spec: PartitionSpec, kept: tuple[str, ...] = ()) -> jax.Array:
    """Inside a shard_map: this device's part `w` of an array stored as `spec`, made whole over all axes but `kept`.

    Its transpose is `scatter`, in the dtype of `w`: cast before. One mesh axis after another moves the same bytes as
    all at once, for which XLA compiles an all-reduce of twice the bytes for TPUs today.
    """
    for dimension, names in _moved(spec, kept):
        for name in reversed(names):
            w = jax.lax.all_gather(w, name, axis=dimension, tiled=True)
    return w


def scatter(dw: jax.Array, spec: PartitionSpec, kept: tuple[str, ...] = (), dtype=None) -> jax.Array:
    """Inside a shard_map: the sum over devices of the gradients of what `gather` gave, each device its part of it.

    As an all-to-all in `dtype` (None: that of `dw`) and a local sum in float32: the bytes of a reduce-scatter, but no
    sum is rounded on the way. (For a reduce-scatter XLA compiles an all-reduce of twice the bytes for TPUs today.)
    """
    for dimension, names in _moved(spec, kept):
        devices, shape = jax.lax.axis_size(names), dw.shape
        parts = dw.astype(dtype or dw.dtype).reshape(*shape[:dimension], devices, -1, *shape[dimension + 1 :])
        # Parts in front: XLA would put them there in memory, and pad what then is second to last.
        parts = jax.lax.all_to_all(jnp.moveaxis(parts, dimension, 0), names, split_axis=0, concat_axis=0)
        dw = jnp.sum(parts, axis=0, dtype=jnp.float32)
    return dw


# --- activations -----------------------------------------------------------------------------------------------------


def activation_spec(*names: str | None) -> PartitionSpec:
    """The PartitionSpec of an activation whose dimensions have these logical names (None: whole)."""
    return PartitionSpec(*(ACTIVATIONS.get(name, "tensor" if name in TENSOR else None) for name in names))


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """`x`, laid out as its dimensions' logical names say. A dimension that does not divide stays whole.

    That happens only outside training, whose shapes `check_mesh` has seen: one prompt, or one new token, on a pod.
    """
    mesh = ambient()
    if mesh is None:
        return x
    sizes = [_parts(axes, mesh) for axes in activation_spec(*names)]
    spec = [axes if size % n == 0 else None for size, n, axes in zip(x.shape, sizes, activation_spec(*names))]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def divides(x: jax.Array, *names: str | None) -> bool:
    """Whether every dimension of an activation can be split as its logical name says on the ambient mesh."""
    mesh = ambient()
    return all(size % _parts(axes, mesh) == 0 for size, axes in zip(x.shape, activation_spec(*names), strict=True))


def _parts(axes: tuple[str, ...] | str | None, mesh) -> int:
    return math.prod(mesh.shape[axis] for axis in _axes(axes))


# --- checks ----------------------------------------------------------------------------------------------------------


def _divisors(*numbers: int) -> str:
    """What divides one of the numbers, as a list."""
    found = [str(n) for n in range(1, max(numbers) + 1) if any(number % n == 0 for number in numbers)]
    return ", ".join(found if len(found) <= 12 else [*found[:11], "..."])


def _check_divides(size: int, parts: int, what: str, axis: str) -> None:
    if size % parts:
        raise ConfigError(f"mesh: {axis}={parts} does not divide {what}={size}; {axis} may be {_divisors(size)}")


def check_decoding(mesh) -> None:
    """Raise `ConfigError` for a mesh on which nothing can be decoded: new tokens come one by one."""
    if mesh.shape["context"] > 1:
        raise ConfigError(f"mesh: context={mesh.shape['context']} is for training; use tensor, expert, fsdp or data")


def check_mesh(mesh, model: ModelConfig, *, batch_size: int | None = None, sequence_length: int | None = None) -> None:
    """Raise `ConfigError`, saying why and what would do, where `mesh` cannot hold the model or a (micro)batch."""
    sizes = mesh.shape
    heads = {"heads": model.attention.heads, "dense_width": model.dense_width, "vocab_size": model.vocab_size}
    if not isinstance(model.attention, MLAConfig):
        heads["kv_heads"] = model.attention.kv_heads
    if model.moe is None:
        if sizes["expert"] > 1:
            raise ConfigError(f"mesh: expert={sizes['expert']}, but the model has no experts; use fsdp instead")
    else:
        _check_divides(model.moe.routed_experts, sizes["expert"], "routed_experts", "expert")
        heads["expert_width"] = model.moe.expert_width
    for what, size in heads.items():
        _check_divides(size, sizes["tensor"], what, "tensor")
    check_batch(mesh, batch_size, sequence_length)


def check_batch(mesh, batch_size: int | None, sequence_length: int | None) -> None:
    """The part of `check_mesh` that needs no model."""
    sizes = mesh.shape
    if sequence_length is not None:
        parts = 2 * sizes["context"] if sizes["context"] > 1 else 1
        if sequence_length % parts:
            may = _divisors(sequence_length // 2) if sequence_length % 2 == 0 else "1"
            raise ConfigError(
                f"mesh: context={sizes['context']} cuts the sequence into {parts} equal pieces, two for each device, "
                f"and sequence_length={sequence_length} does not divide so; context may be {may}"
            )
    if batch_size is not None:
        parts = math.prod(sizes[axis] for axis in BATCH_AXES)
        if batch_size % parts:
            raise ConfigError(
                f"mesh: data x fsdp x expert = {parts} devices share the sequences computed at once, and {batch_size} "
                f"is not a multiple; use {-(-batch_size // parts) * parts}, or move devices to tensor or context"
            )
