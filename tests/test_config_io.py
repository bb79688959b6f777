"""Plain data to configs and back: what is given comes back exactly, what is wrong is named by its path."""

import contextlib
import copy
import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from dsv2_jax import config, config_io, presets
from dsv2_jax.config import ConfigError, ExperimentConfig, ModelConfig

# --- generated configurations ----------------------------------------------------------------------------------------

WIDTH = st.integers(1, 64)
EVEN = WIDTH.map(lambda n: 2 * n)
RATE = st.floats(1e-9, 1e9)
SHARE = st.floats(0.001, 0.999)


def maybe(strategy):
    return st.none() | strategy


YARN = st.builds(config.YarnConfig, factor=st.floats(1, 100), original_length=WIDTH, mscale=RATE, mscale_all_dim=RATE)
ROPE = dict(rope_theta=st.floats(2, 1e7), yarn=maybe(YARN))
HEADS = dict(heads=WIDTH, nope_dim=WIDTH, rope_dim=EVEN, value_dim=WIDTH, kv_latent=WIDTH, q_latent=maybe(WIDTH))
MLA = st.builds(config.MLAConfig, **HEADS, **ROPE)
GQA = st.tuples(WIDTH, WIDTH).flatmap(
    lambda n: st.builds(config.GQAConfig, heads=st.just(n[0] * n[1]), kv_heads=st.just(n[1]), head_dim=EVEN, **ROPE)
)
BALANCE = st.builds(config.BalanceConfig, expert=maybe(RATE), device=maybe(RATE), communication=maybe(RATE))
DROPPING = st.builds(config.DroppingConfig, capacity_factor=RATE, protected_share=st.floats(0, 1))


@st.composite
def moe_configs(draw):
    groups, per_group = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    kept = draw(st.integers(1, groups))
    return config.MoEConfig(
        routed_experts=groups * per_group,
        shared_experts=draw(st.integers(0, 3)),
        experts_per_token=draw(st.integers(1, kept * per_group)),
        expert_width=draw(WIDTH),
        balance=draw(BALANCE),
        groups=groups,
        groups_kept=kept,
        routed_scaling=draw(RATE),
        normalize_gates=draw(st.booleans()),
        dropping=draw(maybe(DROPPING)),
    )


@st.composite
def experiment_configs(draw):
    moe, layers = draw(maybe(moe_configs())), draw(st.integers(2, 9))
    model = ModelConfig(
        vocab_size=draw(WIDTH),
        layers=layers,
        dim=draw(WIDTH),
        dense_layers=layers if moe is None else draw(st.integers(0, layers - 1)),
        dense_width=draw(WIDTH),
        attention=draw(MLA | GQA),
        moe=moe,
        max_length=512,
        compute=draw(st.builds(config.ComputeConfig, dtype=st.sampled_from(config.DTYPES), loss_chunk=WIDTH)),
    )
    decay = tuple(sorted(draw(st.lists(SHARE, max_size=3))))
    optimizer = config.OptimizerConfig(peak_lr=draw(RATE), decay_at=decay, clip_norm=draw(maybe(RATE)))
    train = config.TrainConfig(
        steps=draw(WIDTH),
        sequence_length=draw(st.integers(1, 512)),
        batch_size=8,
        microbatch_size=draw(maybe(st.sampled_from((1, 2, 4)))),
        optimizer=optimizer,
        batch_ramp=draw(maybe(st.just(config.BatchRampConfig(start=8, sequences=99)))),
        evaluation=draw(maybe(st.builds(config.EvaluationConfig, every=WIDTH, batches=maybe(WIDTH)))),
    )
    names = draw(st.lists(st.from_regex(r"[a-z]{1,8}", fullmatch=True), min_size=1, max_size=3, unique=True))
    paths = st.lists(st.text(st.characters(codec="utf-8"), max_size=9), min_size=1, max_size=3).map(tuple)
    sources = tuple(config.SourceConfig(name=name, paths=draw(paths), weight=draw(RATE)) for name in names)
    data = config.DataConfig(
        sources=sources, held_out_share=draw(SHARE), dedup=draw(maybe(st.just(config.DedupConfig())))
    )
    return ExperimentConfig(model=model, train=train, data=data)


def quick() -> dict:
    """A small valid experiment, as a config file would state it."""
    return dict(
        model=config_io.to_dict(presets.get("tiny")),
        train=dict(steps=3, sequence_length=16, batch_size=4, optimizer=dict(peak_lr=1e-3)),
        data=dict(sources=(dict(name="a", paths=("x",)),)),
    )


# --- round trips -----------------------------------------------------------------------------------------------------


@given(experiment_configs())
def test_configs_survive_plain_data_json_and_config_dict(experiment):
    mapping = config_io.to_dict(experiment)
    assert config_io.parse(ExperimentConfig, mapping) == experiment
    assert config_io.parse(ExperimentConfig, ConfigDict(mapping).to_dict()) == experiment
    text = config_io.to_json(experiment)
    assert config_io.from_json(ExperimentConfig, text) == experiment
    assert config_io.to_json(config_io.from_json(ExperimentConfig, text)) == text


@pytest.mark.parametrize("name", presets.MODELS)
def test_presets_survive(name):
    model = presets.get(name)
    assert config_io.from_json(ModelConfig, config_io.to_json(model)) == model


def test_absent_fields_take_their_defaults_and_integers_stand_for_floats():
    mapping = quick()
    mapping["train"]["optimizer"]["peak_lr"] = 1
    experiment = config_io.parse(ExperimentConfig, mapping)
    assert type(experiment.train.optimizer.peak_lr) is float
    assert experiment.train.checkpoint == config.CheckpointConfig()
    assert experiment.data.sources[0].paths == ("x",)


# --- refusals --------------------------------------------------------------------------------------------------------


def planted(path: str, value) -> dict:
    """`quick()` with `value` at the dotted `path`."""
    mapping = quick()
    node = mapping
    *parents, last = path.split(".")
    for name in parents:
        node = node[int(name) if isinstance(node, tuple) else name]
    node[last] = value
    return mapping


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("train.stepps", 3, "train.stepps: is not a field of TrainConfig; did you mean train.steps?"),
        ("model.attention.kv_heads", 3, "model.attention.kv_heads: is not a field of MLAConfig"),
        ("modle", {}, "modle: is not a field of ExperimentConfig; did you mean model?"),
        (
            "data.sources.0.wieght",
            1,
            "data.sources.0.wieght: is not a field of SourceConfig; did you mean data.sources.0.w",
        ),
        ("train.steps", True, "train.steps=True: must be an integer"),
        ("train.steps", 3.0, "train.steps=3.0: must be an integer"),
        ("train.steps", "3", "train.steps='3': must be an integer"),
        ("train.steps", None, "train.steps=None: must be an integer"),
        ("train.microbatch_size", "x", "train.microbatch_size='x': must be an integer or None"),
        ("model.init_std", True, "model.init_std=True: must be a number"),
        ("model.init_std", float("nan"), "model.init_std=nan: must be finite"),
        ("model.init_std", float("inf"), "model.init_std=inf: must be finite"),
        ("model.init_std", 10**400, "model.init_std=10000"),
        ("model.moe.normalize_gates", 1, "model.moe.normalize_gates=1: must be true or false"),
        ("data.sources.0.paths", "x", "data.sources.0.paths='x': must be a tuple, each element a string"),
        ("data.sources.0.paths", (), "data.sources.0.paths=(): must name at least one file or glob"),
        ("data.sources.0.paths", ("x", 3), "data.sources.0.paths.1=3: must be a string"),
        (
            "data.sources",
            {"name": "a"},
            "data.sources={'name': 'a'}: must be a tuple, each element a section (SourceConfig)",
        ),
        ("model.attention", None, "model.attention=None: must be a section (MLAConfig) or a section (GQAConfig)"),
        ("model.attention.kind", "mha", "model.attention.kind='mha': must be one of mla, gqa"),
        ("model.attention.kind", [], "model.attention.kind=[]: must be one of mla, gqa"),
        ("model.attention", {"heads": 2}, "model.attention.kind=None: must be one of mla, gqa"),
        ("model.moe", 3, "model.moe=3: must be a section (MoEConfig) or None"),
        ("model.moe.groups", 3, "model.moe.groups=3: must divide routed_experts=16"),
        ("model.attention.yarn", {}, "model.attention.yarn.factor: is missing, and has no default in YarnConfig"),
        (
            "train.batch_ramp",
            dict(start=8, sequences=9),
            "train: BatchRampConfig.start=8: must not exceed batch_size=4",
        ),
        ("train.seed", -1, "train.seed=-1: must lie between 0 and 2**32 - 1"),
        ("train.seed", 2**32, "train.seed=4294967296: must lie between 0 and 2**32 - 1"),
        ("data.seed", -1, "data.seed=-1: must not be negative"),
        (
            "model.compute.flash_attention",
            "xls",
            "model.compute.flash_attention='xls': must be one of auto, tpu, gpu, xla, reference",
        ),
        ("train.sequence_length", 2048, "ExperimentConfig: TrainConfig.sequence_length=2048: must not exceed"),
        ("model", [], "model=[]: must be a section (ModelConfig)"),
    ],
)
def test_a_wrong_setting_is_named_by_its_path(path, value, message):
    with pytest.raises(ConfigError) as caught:
        config_io.parse(ExperimentConfig, planted(path, value))
    assert str(caught.value).startswith(message)


COEFFICIENT = "model.moe.balance.expert"  # acceptance case 5: never a silent zero


@pytest.mark.parametrize(
    "path", ["model", "model.vocab_size", COEFFICIENT, "train.optimizer.peak_lr", "data.sources.0.name"]
)
def test_a_missing_field_is_named_by_its_path(path):
    mapping = quick()
    node = mapping
    *parents, last = path.split(".")
    for name in parents:
        node = node[int(name) if isinstance(node, tuple) else name]
    del node[last]
    with pytest.raises(ConfigError, match=f"^{path}: is missing, and has no default"):
        config_io.parse(ExperimentConfig, mapping)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"model": 1}', "[" * 100_000, "1" * 5000])
def test_a_damaged_config_json_is_a_config_error(text):
    with pytest.raises(ConfigError):
        config_io.from_json(ExperimentConfig, text)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.binary(max_size=3)
JUNK = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SCALARS, inner, max_size=3))


def places(node, path=()):
    """The path of every container entry in nested dicts and tuples."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, (tuple, list)) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def replaced(node, path, change):
    """A copy of `node` in which `change` was applied to the container that holds the last of `path`."""
    if len(path) == 1:
        node = list(node) if isinstance(node, tuple) else copy.copy(node)
        change(node, path[0])
        return node
    if isinstance(node, dict):
        return {**node, path[0]: replaced(node[path[0]], path[1:], change)}
    return (*node[: path[0]], replaced(node[path[0]], path[1:], change), *node[path[0] + 1 :])


@given(experiment_configs(), st.data())
def test_any_mutation_parses_or_is_a_config_error(experiment, data):
    mapping = config_io.to_dict(experiment)
    path = data.draw(st.sampled_from(sorted(places(mapping), key=str)))
    junk = data.draw(JUNK)

    def change(node, key):
        action = data.draw(st.sampled_from(("value", "key", "delete")))
        if action == "value" or isinstance(node, list):
            node[key] = junk
        else:
            value = node.pop(key)
            if action == "key":
                node[data.draw(SCALARS)] = value

    mutated = replaced(mapping, path, change)
    try:
        parsed = config_io.parse(ExperimentConfig, mutated)
    except ConfigError:
        pass
    else:
        assert config_io.from_json(ExperimentConfig, config_io.to_json(parsed)) == parsed


# --- overrides -------------------------------------------------------------------------------------------------------


def overridden(path: str, text: str):
    return config_io.parse(ExperimentConfig, config_io.override(ExperimentConfig, quick(), path, text))


@pytest.mark.parametrize(
    ("path", "text", "differences"),
    [
        ("train.steps", "7", [("train.steps", 3, 7)]),
        ("train.log_every", "7", [("train.log_every", 10, 7)]),  # not in the mapping: a default
        ("train.checkpoint.every", "7", [("train.checkpoint.every", 500, 7)]),
        ("train.optimizer.peak_lr", "1", [("train.optimizer.peak_lr", 1e-3, 1.0)]),
        (
            "train.optimizer.decay_at",
            "0.5,0.75",
            [("train.optimizer.decay_at.0", 0.6, 0.5), ("train.optimizer.decay_at.1", 0.9, 0.75)],
        ),
        ("train.optimizer.decay_at", "(0.5,)", [("train.optimizer.decay_at", (0.6, 0.9), (0.5,))]),
        ("train.optimizer.decay_at", "", [("train.optimizer.decay_at", (0.6, 0.9), ())]),
        ("train.optimizer.clip_norm", "None", [("train.optimizer.clip_norm", 1.0, None)]),
        ("train.evaluation", "None", [("train.evaluation", {"every": 500, "batches": None}, None)]),
        ("train.evaluation.batches", "4", [("train.evaluation.batches", None, 4)]),
        ("train.profile.start", "4", [("train.profile", None, {"start": 4, "steps": 3})]),
        (
            "model.moe.dropping.capacity_factor",
            "1.5",
            [("model.moe.dropping", None, {"capacity_factor": 1.5, "protected_share": 0.1})],
        ),
        ("model.moe.dropping", "{}", [("model.moe.dropping", None, {"capacity_factor": 1.0, "protected_share": 0.1})]),
        ("model.moe.normalize_gates", "true", [("model.moe.normalize_gates", False, True)]),
        ("model.compute.remat", "full", [("model.compute.remat", "none", "full")]),
        ("model.attention.q_latent", "None", [("model.attention.q_latent", 64, None)]),
        ("data.sources.0.paths", "a,b*.txt", [("data.sources.0.paths", ("x",), ("a", "b*.txt"))]),
        ("data.sources[0].paths", "('a,b',)", [("data.sources.0.paths.0", "x", "a,b")]),
        ("data.sources.0.paths", "[ab]*.txt", [("data.sources.0.paths.0", "x", "[ab]*.txt")]),
        ("data.sources.0.paths", "(1)/*.txt,b", [("data.sources.0.paths", ("x",), ("(1)/*.txt", "b"))]),
        ("data.sources.0.name", "None", [("data.sources.0.name", "a", "None")]),
        ("data.tokenizer", "3", [("data.tokenizer", None, "3")]),
    ],
)
def test_overrides_are_read_as_the_field_declares(path, text, differences):
    assert config_io.diff(config_io.parse(ExperimentConfig, quick()), overridden(path, text)) == differences


def test_a_whole_section_is_replaced():
    attention = overridden(
        "model.attention", "{'kind': 'gqa', 'heads': 4, 'kv_heads': 1, 'head_dim': 8}"
    ).model.attention
    assert attention == config.GQAConfig(heads=4, kv_heads=1, head_dim=8)


@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        ("train.stepps", "3", "train.stepps: is not a field of TrainConfig; did you mean train.steps?"),
        ("peak_lr", "3", "peak_lr: is not a field of ExperimentConfig; did you mean train.optimizer.peak_lr?"),
        ("train.peak_lr", "3", "train.peak_lr: is not a field of TrainConfig; did you mean train.optimizer.peak_lr?"),
        (
            "model.moe.droping.capacity_factor",
            "3",
            "model.moe.droping: is not a field of MoEConfig; did you mean model.moe.dropping?",
        ),
        ("train.steps.x", "3", "train.steps.x: train.steps is an integer and has no fields"),
        ("train.steps", "1.5", "train.steps='1.5': must be an integer"),
        ("train.steps", "None", "train.steps='None': must be an integer"),
        ("train.optimizer.peak_lr", "fast", "train.optimizer.peak_lr='fast': must be a number"),
        ("train.profile.steps", "4", "train.profile.start: is missing"),
        ("data.sources.1.name", "b", "data.sources.1: data.sources has 1 elements, numbered from 0"),
        ("data.sources.x.name", "b", "data.sources.x: data.sources has 1 elements, numbered from 0"),
        ("model.moe", "{1", "model.moe='{1': must be a section (MoEConfig) or None"),
        ("model.moe.normalize_gates", "yes", "model.moe.normalize_gates='yes': must be true or false"),
        ("", "3", ": is not a field of ExperimentConfig"),
    ],
)
def test_a_wrong_override_is_named_by_its_path(path, text, message):
    with pytest.raises(ConfigError) as caught:
        overridden(path, text)
    assert str(caught.value).startswith(message)


PATHS = st.sampled_from(sorted(config_io.paths(ExperimentConfig))) | st.text("amodel.t0[]_", max_size=20)


@given(PATHS, st.text(max_size=12) | st.sampled_from(("None", "{}", "1", "0.5", "(", "[" * 5000, "1" * 5000)))
def test_any_override_parses_or_is_a_config_error(path, text):
    before = quick()
    mapping = copy.deepcopy(before)
    with contextlib.suppress(ConfigError):
        config_io.parse(ExperimentConfig, config_io.override(ExperimentConfig, mapping, path, text))
    assert mapping == before


# --- differences and paths -------------------------------------------------------------------------------------------


@given(experiment_configs(), experiment_configs())
def test_diff_is_empty_exactly_for_equal_configs(a, b):
    assert config_io.diff(a, a) == []
    assert bool(config_io.diff(a, b)) == (a != b)


def test_diff_names_a_changed_kind_as_a_whole_section():
    model = presets.get("tiny")
    other = dataclasses.replace(model, attention=config.GQAConfig(heads=2, kv_heads=1, head_dim=8), dim=8)
    assert [path for path, _, _ in config_io.diff(model, other)] == ["dim", "attention"]


def test_paths_lists_every_field_once_and_reaches_inside_options_and_tuples():
    paths = list(config_io.paths(ExperimentConfig))
    assert {"model", "model.attention.kv_latent", "model.attention.kv_heads", "data.sources.0.paths"} <= set(paths)
    assert json.loads(config_io.to_json(config_io.parse(ExperimentConfig, quick()))).keys() == {
        "model",
        "train",
        "data",
        "mesh",
    }
