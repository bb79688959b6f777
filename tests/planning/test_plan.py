"""What a plan says without compiling agrees with the compiler, with counting by hand and with random routing."""

import dataclasses
import importlib.util
import math

import jax
import numpy as np
import pytest
import small

from dsv2_jax import presets, sharding
from dsv2_jax.config import ConfigError, DroppingConfig
from dsv2_jax.model import counting, exchange, router
from dsv2_jax.planning import analytic, hardware, plan
from dsv2_jax.planning.analytic import Job, Traffic
from dsv2_jax.train.state import abstract_state

# Widths that eight devices can share, no two alike.
MODEL = small.change(
    small.MODEL,
    vocab_size=48,
    dim=16,
    dense_width=40,
    attention=small.change(small.MLA, heads=4, kv_latent=24, q_latent=32),
    moe__expert_width=56,
    compute__dtype="bfloat16",
    compute__remat="full",
)
MESHES = ["data=8", "fsdp=8", "expert=8", "fsdp=2,expert=4", "data=2,expert=2,tensor=2", "fsdp=2,context=4"]


def job(mesh="fsdp=8", model=MODEL, length=16, per_device=1, microbatches=1) -> Job:
    return Job(model, sharding.parse_mesh(mesh), length, per_device, microbatches)


def v2(mesh="fsdp=16,expert=8", **changes) -> Job:
    return job(mesh, small.change(presets.V2, **changes), 4096)


V5P = hardware.parse_topology("v5p:4x4x8")


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", MESHES)
def test_state_bytes_are_those_of_the_compiler(mesh):
    one = job(mesh)
    state = abstract_state(plan.experiment(one), sharding.make_mesh(one.mesh))
    compiled = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree)).lower(state).compile()
    assert analytic.stored_bytes(state, one.mesh) == compiled.memory_analysis().argument_size_in_bytes


DENSE = small.change(MODEL, layers=1, dense_layers=1, moe=None, attention=small.GQA)


@pytest.mark.parametrize(
    ("mesh", "model"), [("data=2,fsdp=4", DENSE), pytest.param("fsdp=2,expert=4", MODEL, marks=pytest.mark.slow)]
)
def test_the_compiled_training_step_takes_the_state_and_the_batch(mesh, model):
    one = job(mesh, model)
    compiled = plan.compile_training(one, jax.devices()[:8])
    state = abstract_state(plan.experiment(one))
    assert compiled.memory["parameters"] == analytic.stored_bytes(state.model, one.mesh)
    batch, counters = 6 * 4 * one.local_tokens, 4 * 4 + 2 * 4  # six arrays of 32 bits; four integers and a key
    optimizer_step = 4
    assert compiled.memory["optimizer"] == 2 * compiled.memory["parameters"] + optimizer_step
    assert compiled.memory["other arguments"] == batch + counters
    assert compiled.memory["temporaries"] > 0
    assert compiled.program.wire_bytes > 0
    # Loops over chunks of rows end when the rows do; all others are multiplied out.
    assert all("moe" in source for source in compiled.program.unknown_loops)


def test_the_compiled_decoding_step_takes_the_weights_and_the_cache():
    one = job("data=2,fsdp=4", DENSE, per_device=2)
    compiled = plan.compile_decoding(one, jax.devices()[:8])
    cache = one.per_device * one.length * counting.cached_elements(DENSE) * 2
    assert compiled.memory["cache"] == cache + 4 * one.per_device  # and the tokens each row holds
    assert compiled.memory["other arguments"] == 4 * one.per_device  # the newest tokens
    assert compiled.program.by_kind()["all-gather"]["wire_bytes"] > 0


def test_state_of_236b_parameters_on_128_chips():
    one = v2()
    total = analytic.stored_bytes(abstract_state(plan.experiment(one)), one.mesh)
    assert total == pytest.approx(12 * counting.parameters(presets.V2).total / 128, rel=2e-3)  # norms are copied


# --- bytes sent ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("remat", "again"), [("none", 1), ("full", 2)])
def test_gathers_and_scatters_by_hand(remat, again):
    one = job("fsdp=8", small.change(MODEL, compute__remat=remat))
    parts = counting.parameters(one.model).parts
    vocabulary, routers, norms = (
        parts[counting.EMBEDDING] + parts[counting.UNEMBEDDING],
        parts[counting.ROUTER],
        parts[counting.NORMS],
    )
    blocks = sum(parts.values()) - vocabulary - routers - norms
    sent = {traffic.name: traffic.nbytes for traffic in analytic.traffic(one)}
    assert sent["parameter gathers"] == 7 / 8 * (2 * vocabulary + again * (2 * blocks + 4 * routers))
    assert sent["gradient reduce-scatter"] == 7 / 8 * (2 * vocabulary + 2 * blocks + 4 * routers)
    assert sent["gradient all-reduce"] == 2 * 7 / 8 * 4 * norms


@pytest.mark.parametrize(
    ("groups", "kept", "chosen", "devices"), [(1, 1, 6, 8), (8, 3, 6, 8), (4, 2, 3, 4), (8, 3, 6, 16), (4, 2, 3, 2)]
)
def test_rows_sent_agree_with_random_routing(groups, kept, chosen, devices):
    moe = small.change(small.MOE, routed_experts=32, groups=groups, groups_kept=kept, experts_per_token=chosen)
    one = small.change(MODEL, moe=moe)
    scores_BTE = jax.nn.softmax(jax.random.normal(jax.random.key(0), (8, 512, 32)))
    _, expert_BTK = router.choose(scores_BTE, moe)
    device_BTK = np.asarray(expert_BTK) // (32 // devices)
    reached = np.mean([len(set(row) - {0}) for row in device_BTK.reshape(-1, chosen).tolist()])  # a token of device 0
    assert analytic.rows_sent(one, devices) == pytest.approx(reached, rel=0.03)


def test_a_token_of_v2_reaches_at_most_its_three_groups():
    assert 2 < analytic.rows_sent(presets.V2, 8) < 3 * 7 / 8 + 1e-9
    none_on_one_device = math.comb(56, 6) / math.comb(64, 6)  # Lite: any 6 of 64 experts, 8 a device
    assert analytic.rows_sent(presets.V2_LITE, 8) == pytest.approx(7 * (1 - none_on_one_device), rel=0.01)


def test_stepwise_sends_its_slack_and_ragged_what_there_is():
    ways = analytic.transports(v2(), V5P)
    assert ways["ragged"]["rows_per_token"] == analytic.rows_sent(presets.V2, 8)
    assert ways["stepwise"]["rows_per_token"] == pytest.approx(7 / 8 * 3 * 1.25, rel=0.01)
    tight = analytic.transports(v2(moe__dropping=DroppingConfig(0.5, 0.0)), V5P)["stepwise"]
    assert tight["rows_per_token"] == pytest.approx(7 * 0.5 * 6 / 8, rel=0.01)  # the budget of a group


def test_rows_cross_five_times_and_two_of_them_are_never_hidden():
    """Forward x and y; backward x and dy, then dx: the shared experts hide what goes out, not what comes back."""
    one = v2()
    rows = 7 * exchange.rows_per_peer(presets.V2.moe, 8, 1, 4096, presets.V2.compute.expert_slack)
    ways = analytic.transports(one, V5P)
    assert ways["stepwise"]["bytes"] == 5 * presets.V2.moe_layers * rows * presets.V2.dim * 2
    hidden = analytic.transports(one, dataclasses.replace(V5P, chip=dataclasses.replace(V5P.chip, flops=1.0)))
    slow, ragged = hidden["stepwise"], hidden["ragged"]
    assert slow["visible_seconds"] == pytest.approx(2 / 5 * slow["seconds"])
    assert ragged["visible_seconds"] == pytest.approx(ragged["seconds"])
    at_once = analytic.transports(one, dataclasses.replace(V5P, chip=dataclasses.replace(V5P.chip, flops=1e30)))
    assert at_once["stepwise"]["visible_seconds"] == pytest.approx(slow["seconds"])


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_compiled_step_sends_the_rows_of_stepwise(remat):
    """What is recomputed for the backward pass sends nothing."""
    model = small.change(MODEL, compute__dtype="float32", compute__remat=remat)  # CPUs would send bfloat16 as float32
    one = job("fsdp=2,expert=4", model)
    sent = plan.compile_training(one, jax.devices()[:8]).program.by_kind()["collective-permute"]
    assert sent["wire_bytes"] == analytic.transports(one, V5P)["stepwise"]["bytes"]


def test_between_nodes_a_gather_is_shared_and_a_dispatch_is_not():
    chip, nodes = hardware.CHIPS["h100"], hardware.parse_topology("h100:8x16")
    one, nbytes = v2(), 1e9
    inside = analytic.time_sending(Traffic("", nbytes, ("expert",), True), one, nodes)
    assert inside == nbytes / chip.network_bandwidth  # expert is the inner axis: eight neighbours
    across = analytic.time_sending(Traffic("", nbytes, ("fsdp", "expert"), False), one, nodes)
    assert across == pytest.approx(nbytes * 120 / 127 / 8 / chip.node_bandwidth)
    alone = analytic.time_sending(Traffic("", nbytes, ("fsdp",), True), one, nodes)
    assert alone == nbytes / chip.node_bandwidth


# --- microbatches ----------------------------------------------------------------------------------------------------


def test_microbatches_send_and_multiply_as_often_and_hold_the_sum_of_gradients():
    one, four = v2(), dataclasses.replace(v2(), microbatches=4)
    state = abstract_state(plan.experiment(one))
    first, found = (analytic.estimate(each, V5P, state) for each in (one, four))
    assert (four.tokens, four.batch, four.local_tokens) == (4 * one.tokens, 4 * one.batch, one.local_tokens)
    assert found.wire_bytes == pytest.approx(4 * first.wire_bytes)
    assert found.flops["model"] == pytest.approx(4 * first.flops["model"])
    assert found.memory == first.memory | {"gradients": 2 * first.memory["parameters"]}
    assert first.hbm_bytes < found.hbm_bytes < 4 * first.hbm_bytes  # one update
    rows = (analytic.transports(each, V5P)["stepwise"]["bytes"] for each in (four, one))
    assert next(rows) == 4 * next(rows)
    assert plan.make_plan(four, V5P, compiling=False).to_dict()["microbatches"] == 4


def test_a_compiled_step_of_microbatches_counts_them_all():
    one, three = (plan.compile_training(job("data=2,fsdp=4", DENSE, microbatches=n), jax.devices()[:8]) for n in (1, 3))
    scattered = [each.program.by_kind()["all-to-all"]["wire_bytes"] for each in (one, three)]
    assert scattered[1] == 3 * scattered[0] > 0  # gathers can be fewer: XLA may keep those of one layer
    assert three.program.flops == pytest.approx(3 * one.program.flops)
    assert three.memory["gradients"] >= one.memory["parameters"]
    assert three.memory["other arguments"] > one.memory["other arguments"]
    made = plan.make_plan(job("data=2,fsdp=4", DENSE), hardware.parse_topology("h100:8"), compiling=False)
    told = dataclasses.replace(made, compiled=one).to_dict()
    kinds = told["collectives"]["by_kind"].values()
    assert sum(row["wire_bytes_per_token"] for row in kinds) * 16 == pytest.approx(one.program.wire_bytes)
    assert told["memory"]["bound_bytes_per_device"] == one.bound >= told["memory"]["total_bytes_per_device"]
    held = [buffer["bytes"] for buffer in told["memory"]["largest_temporaries"]]
    assert held == sorted(held, reverse=True)
    assert 0 < held[0] <= sum(held) <= told["memory"]["total_bytes_per_device"]
    assert told["loops_counted_once"] == []
    unknown = dataclasses.replace(one.program, unknown_loops=["b", "a", "b"])
    told = dataclasses.replace(made, compiled=dataclasses.replace(one, program=unknown)).to_dict()
    assert told["loops_counted_once"] == ["a", "b"]


def test_copies_of_the_whole_model_send_their_gradients_once_a_step():
    jobs = [job("data=8", DENSE, microbatches=n) for n in (1, 3)]
    one, three = (plan.compile_training(each, jax.devices()[:8]).program.by_kind() for each in jobs)
    assert one.keys() == three.keys() == {"all-reduce"}
    assert three["all-reduce"]["wire_bytes"] == one["all-reduce"]["wire_bytes"]
    least = [sum(sent.nbytes for sent in analytic.traffic(each)) for each in jobs]
    assert least == pytest.approx([one["all-reduce"]["wire_bytes"]] * 2, rel=1e-3)  # and the sums of loss and tokens


# --- time ------------------------------------------------------------------------------------------------------------


def test_the_reported_hours_are_a_quarter_of_the_peak():
    """172.8K H800 hours a trillion tokens: between 20 and 30% of the peak, and of the bound's hours at most all."""
    topology = hardware.parse_topology("h800:8x16")
    made = plan.make_plan(v2(), topology, compiling=False)
    per_token = counting.training_flops_per_token(presets.V2, 4096)
    assert made.device_hours * made.utilisation == pytest.approx(1e12 * per_token / topology.chip.flops / 3600)
    assert 0.2 < made.device_hours * made.utilisation / 172.8e3 < 0.3
    assert made.device_hours < 172.8e3 < made.unhidden_device_hours * 2


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_recomputation_costs_at_most_another_forward_pass(remat):
    work = analytic.flops(v2(compute__remat=remat))
    share = work["with_recomputation"] / work["model"]
    assert {"none": share == 1, "dots": 1 < share < 1.15, "full": 1.3 < share < 4 / 3}[remat]


# --- plans -----------------------------------------------------------------------------------------------------------


def test_gpus_are_planned_without_a_compiler():
    made = plan.make_plan(v2(), hardware.parse_topology("h800:8x16"))
    assert made.compiled is None
    assert "plan compiles for TPUs only, not for h800" in made.not_compiled
    assert made.to_dict()["memory"]["total_bytes_per_device"] == made.estimate.total_bytes


def test_search_ranks_meshes_that_fit_first_and_only_possible_ones():
    topology = hardware.parse_topology("h100:8")
    order = plan.ranked(plan.meshes(presets.V2_LITE, topology, 4096, 1), topology)
    fits = [one.estimate.total_bytes <= topology.chip.hbm_bytes for one in order]
    assert fits == sorted(fits, reverse=True)
    assert True in fits
    assert False in fits  # data=8 holds eight copies
    assert {one.job.devices for one in order} == {8}
    hours = [one.unhidden_device_hours for one, fit in zip(order, fits) if fit]
    assert hours == sorted(hours)


@pytest.mark.parametrize(
    ("mesh", "complaint"),
    [
        (
            "expert=7",
            "expert=7 does not divide routed_experts=160; expert may be 1, 2, 4, 5, 8, 10, 16, 20, 32, 40, 80",
        ),
        ("context=3", "context=3 cuts the sequence into 6 equal pieces, .* context may be 1, 2, 4, 8"),
        ("tensor=3", "tensor=3 does not divide heads=128; tensor may be 1, 2, 4, 8, 16, 32, 64, 128"),
        ("fsdp=7", r"can be divided by fsdp=7 too \(.*\); here fsdp may be 1, 2, .*8, .*; or use more data"),
    ],
)
def test_impossible_meshes_say_why_and_what_would_do(mesh, complaint):
    with pytest.raises(ConfigError, match=complaint):
        plan.make_plan(v2(mesh), V5P, compiling=False)


def test_decoding_is_not_planned_where_nothing_can_be_decoded():
    with pytest.raises(ConfigError, match="context=8 is for training"):
        plan.make_plan(job("context=8", length=64), hardware.parse_topology("h100:8"), decoding=True, compiling=False)


def test_topologies():
    assert (V5P.devices, V5P.per_node, str(V5P)) == (128, 128, "v5p:4x4x8")
    assert hardware.parse_topology("h800:8x256").per_node == 8
    for text, complaint in [
        ("v7:2x2", "there are v4:4x4x8, v5e:4x8"),
        ("v5p", "must be v5p:4x4x8 or like it"),
        ("v5e:2x2x2", "v5e takes 2 numbers"),
        ("h100:8x0", "must be h100:8x16"),
        ("h100:8x2x2", "GPUs a node x nodes"),
    ]:
        with pytest.raises(ConfigError, match=complaint):
            hardware.parse_topology(text)


def test_every_chip_names_its_source():
    for chip in hardware.CHIPS.values():
        assert "://" in chip.source or "arXiv" in chip.source
        assert chip.flops > 1e14
        assert 10e9 < chip.hbm_bytes < 200e9
        assert 1e10 < chip.link_bandwidth <= chip.network_bandwidth < chip.hbm_bandwidth


def test_without_libtpu_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install -e \"\.\[tpu\]\""):
        plan.topology_devices(V5P)
