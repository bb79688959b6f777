"""Small published folders of both styles, and what conversions must keep of them."""

import functools
import math
import operator

import jax
import ml_dtypes
import numpy as np
import published

from dsv2_jax import checkpoint
from dsv2_jax.data.tokenizer import Tokenizer
from dsv2_jax.hf import mapping
from dsv2_jax.hf.config import model_config
from dsv2_jax.hf.safetensors import Folder
from dsv2_jax.model.transformer import Transformer

CONFIGS = {style: config | {"vocab_size": 272} for style, config in published.CONFIGS.items()}  # for a tokenizer
BFLOAT16 = ml_dtypes.bfloat16


def tensors(style="v2", dtype=BFLOAT16) -> dict[str, np.ndarray]:
    return {name: value.astype(dtype) for name, value in published.weights(CONFIGS[style]).items()}


def write(path, values=None, style="v2", **changes):
    """A published folder with a tokenizer."""
    config = CONFIGS[style] | changes
    values = tensors(style) if values is None else values
    published.write_folder(path, {k: v for k, v in config.items() if v is not ...}, values)
    Tokenizer.train(["a published folder\n"] * 3, 260).save(path / "tokenizer.json")
    (path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "x": 1}')
    return path


@functools.cache
def abstract(style="v2", dtype=np.float32):
    model = functools.partial(Transformer, model_config(CONFIGS[style]))
    shapes = jax.eval_shape(model, jax.random.key(0))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes)


def restored(path, style="v2", dtype=np.float32) -> dict:
    return checkpoint.to_dict(checkpoint.restore_params(path, abstract(style, dtype)))


def assert_holds(path, values, style="v2", tied=False):
    """The checkpoint gives every tensor its place, in float32."""
    found, filled = restored(path, style), 0
    for entry in mapping.table(model_config(CONFIGS[style]), tied):
        array = np.asarray(functools.reduce(operator.getitem, entry.target, found))
        np.testing.assert_array_equal(array[entry.index], entry.to_ours(values[entry.source]).astype(np.float32))
        filled += math.prod(entry.shape)
    assert filled == sum(leaf.size for leaf in jax.tree.leaves(found))


def assert_same_bytes(path, other):
    one, two = Folder(path), Folder(other)
    keys = sorted(one.keys())
    assert keys == sorted(two.keys())
    for key in keys:
        assert (one.dtype(key), one.shape(key)) == (two.dtype(key), two.shape(key))
        assert one.read(key).tobytes() == two.read(key).tobytes(), key
