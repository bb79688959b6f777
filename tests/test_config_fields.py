"""A setting that nothing reads is a bug: every field of every config is changed, and what it governs must change.

The tables below give each field another value. A new field fails `test_the_tables_name_every_field` until it is in one.
"""

import dataclasses
import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from dsv2_jax import config, config_io, sharding
from dsv2_jax.config import ConfigError, DataError, ExperimentConfig
from dsv2_jax.inference import generate
from dsv2_jax.model.transformer import Transformer
from dsv2_jax.train import loop, optimizer, state, step
from dsv2_jax.train.loss import lm_loss
from dsv2_jax.types import Batch

MODEL = {
    "model.vocab_size": "60",
    "model.layers": "4",
    "model.dim": "24",
    "model.dense_layers": "2",
    "model.dense_width": "26",
    "model.max_length": "256",
    "model.norm_eps": "1e-5",
    "model.init_std": "0.3",
    "model.attention.heads": "6",
    "model.attention.nope_dim": "12",
    "model.attention.rope_dim": "10",
    "model.attention.value_dim": "8",
    "model.attention.kv_latent": "16",
    "model.attention.q_latent": "None",
    "model.attention.rope_theta": "500",
    "model.attention.yarn.factor": "20",
    "model.attention.yarn.original_length": "64",
    "model.attention.yarn.beta_slow": "8",
    "model.attention.yarn.beta_fast": "4",
    "model.attention.yarn.mscale": "1.0",
    "model.attention.yarn.mscale_all_dim": "1.0",
    "model.moe.routed_experts": "12",
    "model.moe.shared_experts": "1",
    "model.moe.experts_per_token": "2",
    "model.moe.expert_width": "13",
    "model.moe.balance.expert": "0.5",
    "model.moe.balance.device": "0.5",
    "model.moe.balance.communication": "None",
    "model.moe.groups": "2",
    "model.moe.groups_kept": "3",
    "model.moe.routed_scaling": "2",
    "model.moe.normalize_gates": "true",
    "model.moe.dropping.capacity_factor": "2",
    "model.compute.dtype": "bfloat16",
    "model.compute.remat": "full",
    "model.compute.loss_chunk": "4",
    "model.compute.unroll": "2",
    "model.compute.expert_ffn": "reference",
    "model.compute.grouped_matmul": "reference",
    "model.compute.token_dispatch": "reference",
    "model.compute.flash_attention": "reference",
    "model.compute.latent_attention": "reference",
    "model.compute.expert_transport": "ragged",
    "model.compute.expert_slack": "0.3",
    "model.compute.expert_chunk": "8",
}
GQA = {  # with the baseline's attention
    "model.attention.heads": "8",
    "model.attention.kv_heads": "4",
    "model.attention.head_dim": "10",
    "model.attention.rope_theta": "500",
    "model.attention.yarn.factor": "20",
}
OPTIMIZER = {
    "train.optimizer.b1": "0.8",
    "train.optimizer.b2": "0.9",
    "train.optimizer.eps": "1e-6",
    "train.optimizer.weight_decay": "0.2",
    "train.optimizer.clip_norm": "None",
}
SCHEDULE = {
    "train.steps": "50",
    "train.batch_size": "12",
    "train.microbatch_size": "1",
    "train.batch_ramp.start": "4",
    "train.batch_ramp.sequences": "60",
    "train.batch_ramp.stages": "3",
    "train.optimizer.peak_lr": "0.1",
    "train.optimizer.warmup_steps": "5",
    "train.optimizer.decay_at": "0.5,0.7",
    "train.optimizer.decay_factor": "0.5",
}
DATA = {
    "train.sequence_length": "24",
    "data.tokenizer": "trained on other text",
    "data.held_out_share": "0.5",
    "data.quality_filters": "all",
    "data.blocked_terms": "{folder}/blocked.txt",
    "data.dedup.threshold": "0.1",
    "data.dedup.permutations": "2",
    "data.dedup.ngram": "1",
    "data.malformed_share": "0",
    "data.virtual_shards": "2",
    "data.seed": "1",
    "data.sources.0.name": "renamed",
    "data.sources.0.paths": "{folder}/a.txt,{folder}/b.txt",
    "data.sources.0.weight": "5",
    "data.sources.0.format": "text",
    "data.sources.0.text_field": "other",
}
LOOP = {
    "mesh",
    "train.seed",
    "train.log_every",
    "train.max_bad_steps",
    "train.checkpoint.every",
    "train.checkpoint.keep_last",
    "train.checkpoint.keep_every",
    "train.evaluation.every",
    "train.evaluation.batches",
    "train.profile.start",
    "train.profile.steps",
    "data.workers",
}
YARN = config.YarnConfig(factor=40.0, original_length=4096)
MAPPING = dict(
    model=config_io.to_dict(small.change(small.MODEL, attention__yarn=YARN, moe__dropping=config.DroppingConfig())),
    train=dict(
        steps=40,
        sequence_length=16,
        batch_size=8,
        microbatch_size=2,
        batch_ramp=dict(start=2, sequences=40, stages=2),
        optimizer=dict(peak_lr=1e-2, warmup_steps=3),
        profile=dict(start=1, steps=1),
    ),
    data=dict(sources=(dict(name="a", paths=("a.jsonl",)),), dedup={}),
)
FROM_MLA = {"attention": config_io.to_dict(small.change(small.GQA, yarn=YARN))}


def changed(mapping: dict, field: str, text: str) -> ExperimentConfig:
    return config_io.parse(ExperimentConfig, config_io.override(ExperimentConfig, mapping, field, text))


def test_the_tables_name_every_field():
    paths = set(config_io.paths(ExperimentConfig))
    fields = {path for path in paths if not any(other.startswith(f"{path}.") for other in paths)}
    kinds = {"model.attention.kind"}  # it chooses the class
    tested_alone = {"model.moe.dropping.protected_share"}
    assert fields - kinds - tested_alone == {*MODEL, *GQA, *OPTIMIZER, *SCHEDULE, *DATA, *LOOP}


# --- the model -------------------------------------------------------------------------------------------------------


def abstract_model(model_config: config.ModelConfig) -> Transformer:
    return jax.eval_shape(functools.partial(Transformer, model_config), jax.random.key(0))


def abstract_batch(*rows: int) -> Batch:
    tokens, weights = jax.ShapeDtypeStruct((*rows, 12), "int32"), jax.ShapeDtypeStruct((*rows, 12), "float32")
    return Batch(tokens, tokens, weights, tokens, tokens, tokens)


def program(function, *arguments, **named) -> tuple:
    """The jaxpr of a call and the arrays it closes over."""
    closed = jax.make_jaxpr(function)(*arguments, **named)
    return str(closed), [np.asarray(const).tobytes() for const in closed.consts]


@functools.cache
def initialisation(model_config: config.ModelConfig) -> tuple:
    return program(functools.partial(Transformer, model_config), jax.random.key(0))


@functools.cache
def training_loss(model_config: config.ModelConfig) -> tuple:
    protected = jax.ShapeDtypeStruct((2,), bool)
    loss = functools.partial(lm_loss, training=True)
    return program(loss, abstract_model(model_config), abstract_batch(2), protected_B=protected)


def decoding(model_config: config.ModelConfig) -> tuple:
    token = jax.ShapeDtypeStruct((2, 1), jnp.int32)
    model = abstract_model(model_config)
    return program(lambda model, token: model.decode(token, model.init_cache(2, 16)), model, token)


def refused_length(model_config: config.ModelConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        generate.start(abstract_model(model_config), [[1]], max_new_tokens=10**6)
    return str(caught.value)


@functools.cache
def on_a_mesh(model_config: config.ModelConfig) -> str:
    """The loss lowered for two devices, or why it is refused."""
    mesh = sharding.make_mesh("expert=2", jax.devices()[:2])
    model = sharding.with_shardings(abstract_model(model_config), mesh)
    try:
        with sharding.use(mesh):
            return jax.jit(lm_loss).lower(model, abstract_batch(2)).as_text()
    except ConfigError as error:
        return str(error)


OBSERVATIONS = (initialisation, training_loss, refused_length, decoding, on_a_mesh)  # cheapest first


def some_differ(a: config.ModelConfig, b: config.ModelConfig) -> bool:
    return any(observe(a) != observe(b) for observe in OBSERVATIONS)


def test_equal_models_are_observed_equal():
    model = config_io.parse(ExperimentConfig, MAPPING).model
    assert training_loss(model) == training_loss.__wrapped__(model)
    assert not some_differ(model, config_io.parse(ExperimentConfig, MAPPING).model)


@pytest.mark.parametrize(("field", "text"), MODEL.items())
def test_a_model_field_changes_the_model(field, text):
    assert some_differ(config_io.parse(ExperimentConfig, MAPPING).model, changed(MAPPING, field, text).model)


@pytest.mark.parametrize(("field", "text"), GQA.items())
def test_a_field_of_the_baseline_attention_changes_the_model(field, text):
    mapping = {**MAPPING, "model": {**MAPPING["model"], **FROM_MLA}}
    assert some_differ(config_io.parse(ExperimentConfig, mapping).model, changed(mapping, field, text).model)


# --- the step and its schedules --------------------------------------------------------------------------------------


def test_the_protected_share_changes_the_step():
    def observe(experiment: ExperimentConfig) -> tuple:
        return program(step.make_train_step(experiment), state.abstract_state(experiment), abstract_batch(4, 2))

    field = "model.moe.dropping.protected_share"
    assert observe(config_io.parse(ExperimentConfig, MAPPING)) != observe(changed(MAPPING, field, "0.5"))


def observe_update(train: config.TrainConfig) -> tuple:
    adamw, params = optimizer.adamw(train.optimizer), abstract_model(small.MODEL)
    return program(lambda params: adamw.update(params, adamw.init(params), params), params)


@pytest.mark.parametrize(("field", "text"), OPTIMIZER.items())
def test_a_field_of_the_optimizer_changes_the_update(field, text):
    before, after = config_io.parse(ExperimentConfig, MAPPING), changed(MAPPING, field, text)
    assert observe_update(before.train) != observe_update(after.train)


def observe_schedule(train: config.TrainConfig) -> tuple:
    rate = jax.vmap(optimizer.learning_rate(train), in_axes=(0, None))
    rates = np.asarray(rate(jnp.arange(0, 320, 4, dtype=jnp.int32), jnp.int32(4)))
    return optimizer.batch_schedule(train), optimizer.total_sequences(train), rates.tobytes()


@pytest.mark.parametrize(("field", "text"), SCHEDULE.items())
def test_a_field_of_a_schedule_changes_it(field, text):
    before, after = config_io.parse(ExperimentConfig, MAPPING), changed(MAPPING, field, text)
    assert observe_schedule(before.train) != observe_schedule(after.train)


# --- the data --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Files, the mapping of an experiment that reads them, and what it gives."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    words = [f"word{i}" for i in range(40)]

    def text() -> str:
        return " ".join(rng.choice(words, 30)) + " and one sentence more."

    texts = [text() for _ in range(60)]
    near = [" ".join(rng.permutation(old.split())) for old in texts[:20]]  # the same words, other n-grams
    near += [" ".join([*old.split()[:-4], "and", "another", "end"]) for old in texts[20:40]]  # some other n-grams
    lines = [json.dumps({"text": new, "other": text()}) for new in texts + near]
    (folder / "a.txt").write_text("\n".join([*lines, "{malformed"]))
    (folder / "b.txt").write_text("\n".join(json.dumps({"text": text()}) for _ in range(60)))
    (folder / "blocked.txt").write_text("word7\n")
    sources = (
        dict(name="a", paths=(str(folder / "a.txt"),), format="jsonl"),
        dict(name="b", paths=(str(folder / "b.txt"),), format="jsonl"),
    )
    data = dict(sources=sources, held_out_share=0.1, dedup={}, malformed_share=0.1, virtual_shards=4)
    mapping = {**MAPPING, "data": data, "model": {**MAPPING["model"], "vocab_size": 300}}
    return folder, mapping, observe_data(config_io.parse(ExperimentConfig, mapping), folder / "base")


def observe_data(experiment: ExperimentConfig, workdir) -> tuple | str:
    """The first training and held-out rows and what preparing counted, but nothing that merely repeats the settings."""
    try:
        data = loop.open_data(experiment, workdir)
    except (ConfigError, DataError) as error:
        return type(error).__name__
    batches = [data.rows.next(8), *data.held_out(4)]
    data.rows.close()
    return sorted(data.facts.items()), [leaf.tobytes() for leaf in jax.tree.leaves(batches)]


@pytest.mark.parametrize(("field", "text"), DATA.items())
def test_a_field_of_the_data_changes_them(corpus, tmp_path, field, text):
    folder, mapping, before = corpus
    if field == "data.tokenizer":
        other = changed(mapping, "data.sources.0.paths", str(folder / "b.txt"))
        other = dataclasses.replace(other, data=dataclasses.replace(other.data, dedup=None))
        loop.open_data(other, tmp_path / "other").rows.close()
        text = str(tmp_path / "other" / "data" / "tokenizer.json")
    assert isinstance(before, tuple)
    assert observe_data(changed(mapping, field, text.format(folder=folder)), tmp_path) != before


# --- the loop --------------------------------------------------------------------------------------------------------

NOT_USES = ("config.py", "config_io.py", "dataclasses.py", "copy.py", "<string>")  # checks, copies, equality, hashes


def record_reads(monkeypatch) -> set[tuple[type, str]]:
    """The set into which every (class, field) goes that code outside of `config.py` reads from now on."""
    seen = set()
    classes = [c for c in vars(config).values() if isinstance(c, type) and dataclasses.is_dataclass(c)]
    for cls in classes:
        names = {field.name for field in dataclasses.fields(cls)}

        def read(self, name, cls=cls, names=names):
            if name in names and not sys._getframe(1).f_code.co_filename.endswith(NOT_USES):
                seen.add((cls, name))
            return object.__getattribute__(self, name)

        monkeypatch.setattr(cls, "__getattribute__", read, raising=False)
    return seen


@pytest.mark.slow
def test_a_run_reads_every_field_of_the_loop(corpus, tmp_path, monkeypatch):
    _, mapping, _ = corpus
    model = {**mapping["model"], "moe": None, "layers": 1, "dense_layers": 1}
    train = dict(
        steps=3, sequence_length=16, batch_size=2, optimizer=dict(peak_lr=1e-2), profile=dict(start=1, steps=1)
    )
    train |= dict(log_every=1, evaluation=dict(every=2, batches=1), checkpoint=dict(every=2))
    experiment = config_io.parse(ExperimentConfig, {**mapping, "model": model, "train": train})
    seen = record_reads(monkeypatch)
    loop.train(experiment, tmp_path, matmul_rate=1e9)
    sections = {"checkpoint": config.CheckpointConfig, "evaluation": config.EvaluationConfig}
    sections |= {
        "experiment": ExperimentConfig,
        "profile": config.ProfileConfig,
        "train": config.TrainConfig,
        "data": config.DataConfig,
    }
    named = {path: f"experiment.{path}".split(".")[-2:] for path in LOOP}
    unread = {path for path, (section, name) in named.items() if (sections[section], name) not in seen}
    assert not unread
