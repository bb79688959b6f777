"""The MoE layer of V2's shape, compiled for eight v5p chips without any: what the TPU compiler makes of it."""

import importlib.util
import math
import os
import re

import jax
import jax.numpy as jnp
import pytest
from small import change

from dsv2_jax import presets, sharding
from dsv2_jax.model import exchange
from dsv2_jax.model.moe import MoE

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra [tpu]: libtpu"),
]
T = 2048
V2 = change(presets.get("v2"), moe__expert_width=256, compute__dtype="bfloat16", compute__expert_chunk=4096)
S = exchange.rows_per_peer(V2.moe, 8, 1, T, V2.compute.expert_slack)


def compiled(transport: str) -> str:
    """Scheduled HLO of the layer's forward pass; one sequence of T tokens to a chip, routing and widths of V2."""
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x2")
    config = change(V2, compute__expert_transport=transport)
    mesh = sharding.make_mesh("expert=8", topology.devices)
    layer = sharding.with_shardings(jax.eval_shape(lambda: MoE(config, jax.random.key(0))), mesh)
    place = jax.sharding.NamedSharding(mesh, sharding.activation_spec("batch", "sequence", None))
    y_BTD = jax.ShapeDtypeStruct((8, T, V2.dim), jnp.bfloat16, sharding=place)
    with sharding.use(mesh):
        function = jax.jit(lambda layer, y_BTD: layer(y_BTD, jnp.ones(y_BTD.shape[:2], bool))[0])
        return function.lower(layer, y_BTD).compile().as_text()


def instructions(text: str) -> list[str]:
    """Of the entry computation, in the order of the schedule."""
    assert "is_scheduled=true" in text.splitlines()[0]
    return text[text.index("\nENTRY ") :].splitlines()


def test_shared_experts_are_computed_while_rows_travel():
    """A matmul of the shared experts stands between a permute's start and its done."""
    lines = instructions(compiled("stepwise"))
    rows = f"bf16[{S},{V2.dim}]"
    travelling, overlapped, permutes = set(), 0, 0
    for line in lines:
        name = re.match(r"\s*(?:ROOT )?%([\w.-]+) = ", line)
        if name and " collective-permute-start(" in line and rows in line:
            travelling.add(name[1])
            permutes += 1
        elif name and " collective-permute-done(" in line:
            travelling.discard(re.search(r"collective-permute-done\(%?([\w.-]+)", line)[1])
        elif travelling and re.search(r"fusion\(|convolution\(", line) and re.search(r"/shared/dot_general", line):
            overlapped += 1
    assert permutes == 2 * 7
    assert overlapped >= 1


def test_the_ragged_send_operand_holds_at_most_m_rows_a_token():
    """Device-limited routing: M = 3 rows a token at the most, not K = 6; on the way back those that arrived."""
    text = compiled("ragged")
    shapes = re.findall(r"%([\w.-]+) = \(?bf16\[([\d,]+)\]", text)
    rows = {
        name: math.prod(map(int, shape.split(","))) // V2.dim for name, shape in shapes
    }  # the compiler cuts rows up
    calls = re.findall(r"%([\w.-]+) = \S+ ragged-all-to-all\(%([\w.-]+), ", text)
    assert {(rows[operand], rows[output]) for output, operand in calls} == {(3 * T, 8 * S), (8 * S, 3 * T)}
    assert 8 * S < 4 * T  # what a chip can hold of others in one round: the slack more than its even share
