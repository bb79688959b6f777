"""A run folder for the scripts that open one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from dsv2_jax import config_io
from dsv2_jax.checkpoint import Checkpoints
from dsv2_jax.config import DataConfig, ExperimentConfig, OptimizerConfig, SourceConfig, TrainConfig
from dsv2_jax.data.tokenizer import Tokenizer
from dsv2_jax.model.transformer import Transformer


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory):
    """As a training run leaves it, with a model of random weights."""
    folder = tmp_path_factory.mktemp("run")
    model = small.change(small.MODEL, layers=2, vocab_size=300)
    sources = (SourceConfig(name="none", paths=("none",)),)
    train = TrainConfig(steps=1, sequence_length=8, batch_size=1, optimizer=OptimizerConfig(peak_lr=1e-3))
    config = ExperimentConfig(model=model, train=train, data=DataConfig(sources=sources))
    rng = np.random.default_rng(0)
    abstract = jax.eval_shape(lambda key: Transformer(model, key), jax.random.key(0))
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype), abstract)
    checkpoints = Checkpoints(folder / "checkpoints")
    state = {"step": jnp.zeros((), jnp.int32)}
    checkpoints.save(7, params=params, training=state, iterator={}, config=config_io.to_dict(config))
    checkpoints.wait()
    checkpoints.close()
    (folder / "data").mkdir()
    Tokenizer.train(["import os\nimport sys\n"] * 3, 290).save(folder / "data" / "tokenizer.json")
    return folder
