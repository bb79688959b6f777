"""The whole training step at V2-Lite's widths, and what makes its first state, compiled for eight v5p chips."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from small import change

from dsv2_jax import presets, sharding
from dsv2_jax.planning import hardware, plan
from dsv2_jax.planning.analytic import Job
from dsv2_jax.train.state import abstract_state, make_new_state

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra [tpu]: libtpu"),
]
MODEL = change(presets.get("v2_lite"), layers=2)  # a dense layer and one of experts


@pytest.fixture
def devices(monkeypatch):
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)  # what is compiled for absent chips cannot be read back
    yield plan.topology_devices(hardware.parse_topology("v5p:2x2x2"))
    jax.config.update("jax_enable_compilation_cache", before)


@pytest.mark.parametrize("mesh", ["tensor=2,fsdp=4", "context=2,fsdp=4"])
def test_a_step_over_tensor_and_context(devices, mesh):
    job = Job(MODEL, sharding.parse_mesh(mesh), length=4096)
    made = plan.compile_training(job, devices)
    assert made.program.unknown_loops == [] or all("moe" in source for source in made.program.unknown_loops)
    assert not any(one.shape.dims[-2:] == (4096, 4096) for one in made.largest)
    assert sum(made.memory.values()) < 16e9


@pytest.mark.parametrize("mesh", ["expert=8", "tensor=2,context=2,fsdp=2"])
def test_the_first_state(devices, mesh):
    """Each chip makes its part: the temporaries are a fraction of the state's bytes."""
    config = plan.experiment(Job(MODEL, sharding.parse_mesh(mesh), length=4096))
    mesh = sharding.make_mesh(mesh, devices)
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    seed = jax.ShapeDtypeStruct((), jnp.uint32, sharding=whole)
    stats = make_new_state(config, mesh).lower(seed).compile().memory_analysis()
    state = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract_state(config)))
    assert stats.output_size_in_bytes < 1.05 * state / 8
    assert stats.temp_size_in_bytes < state / 8
