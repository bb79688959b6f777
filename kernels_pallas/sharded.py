"""Pallas kernels on a mesh: the partitioner cannot look into one, so that each device runs it on its share."""

import math

import jax
from jax.sharding import PartitionSpec

# Mesh axes that split an array axis; those of other names leave it whole.
AXES = {"b": ("data", "fsdp", "expert"), "n": ("tensor",)}


def free_axes() -> tuple[str, ...]:
    """Axes of the mesh in force that the partitioner has in hand; none where one device does everything."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types)
    free = tuple(name for name, kind in kinds if kind != jax.sharding.AxisType.Manual)
    return free if math.prod(mesh.axis_sizes) > 1 else ()


def over_mesh(function, arrays, letters, out: str):
    """function(*arrays), each device on its share of the batch and of the heads.

    Args:
      arrays: None passes through.
      letters: for each array a letter per axis: b batch, n heads, . whole. Mesh axes whose sizes do not divide every
        axis of that letter leave it whole, and the devices along them do the same work.
      out: letters of the result.
    """
    free = free_axes()
    if not free:
        return function(*arrays)
    sizes = dict(zip((mesh := jax.sharding.get_abstract_mesh()).axis_names, mesh.axis_sizes))

    def splitting(letter):
        lengths = [n for x, word in zip(arrays, letters) if x is not None for n, c in zip(x.shape, word) if c == letter]
        taken, parts = [], 1
        for name in AXES[letter]:
            if name in free and all(n % (parts * sizes[name]) == 0 for n in lengths):
                taken, parts = [*taken, name], parts * sizes[name]
        return tuple(taken) or None

    axes = {letter: splitting(letter) for letter in AXES} | {".": None}
    specs = [PartitionSpec(*(axes[c] for c in word)) for word in (*letters, out)]
    mapped = jax.shard_map(
        function, in_specs=tuple(specs[:-1]), out_specs=specs[-1], axis_names=set(free), check_vma=False
    )
    return mapped(*arrays)


def kernel_output(shape, dtype, *inputs) -> jax.ShapeDtypeStruct:
    """A kernel's output, which inside shard_map differs from device to device wherever an input does."""
    kinds = [jax.typeof(x).manual_axis_type for x in inputs]
    varying = frozenset().union(*(kind.varying for kind in kinds))
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=type(kinds[0])(varying=varying))
