"""Every released tensor has one place in our model, every place one tensor, and slices read what they should."""

import math
import pathlib

import ml_dtypes
import numpy as np
import pytest
import small

from dsv2_jax import checkpoint, presets
from dsv2_jax.config import ConfigError
from dsv2_jax.hf import mapping
from dsv2_jax.model.counting import abstract_model

LITE = small.change(small.MODEL, layers=4, dense_layers=2, attention__q_latent=None, moe__groups=1, moe__groups_kept=1)
MODELS = {
    "v2": small.MODEL,
    "lite": LITE,
    "no dense layer": small.change(small.MODEL, dense_layers=0),
    "all dense": small.change(small.MODEL, moe=None, dense_layers=3),
    "no shared expert": small.change(small.MODEL, moe__shared_experts=0),
    "released v2": presets.get("v2_released"),
    "released lite": presets.get("v2_lite_released"),
}


class Memory:
    """A released folder in memory that counts what is read of each tensor."""

    def __init__(self, arrays: dict[str, np.ndarray]):
        self.arrays, self.numbers_read = arrays, dict.fromkeys(arrays, 0)
        self.listing = pathlib.Path("folder", "model.safetensors.index.json")

    def keys(self):
        return self.arrays.keys()

    def shape(self, key):
        return self.arrays[key].shape

    def dtype(self, key):
        return self.arrays[key].dtype

    def file(self, key):
        return pathlib.Path("folder", f"{key}.safetensors")

    def read(self, key, index=()):
        values = self.arrays[key][index]
        self.numbers_read[key] += values.size
        return values


def released(config, tied=False, seed=0) -> Memory:
    rng = np.random.default_rng(seed)
    shapes = {entry.source: entry.shape for entry in mapping.table(config, tied)}
    return Memory({key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()})


def targets(config) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Name and shape of every array of our model."""
    flat = checkpoint._flat(checkpoint.to_dict(abstract_model(config)))
    return {tuple(name.split("/")): leaf.shape for name, leaf in flat.items()}


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_every_key_is_read_once_and_every_number_of_ours_filled_once(config):
    entries, shapes = mapping.table(config), targets(config)
    assert len({entry.source for entry in entries}) == len(entries)
    assert {entry.target for entry in entries} == shapes.keys()
    places: dict = {}
    for entry in entries:
        shape = shapes[entry.target]
        assert entry.our_shape == shape[len(entry.index) :]
        assert math.prod(entry.shape) == math.prod(entry.our_shape)
        assert all(0 <= i < size for i, size in zip(entry.index, shape))
        places.setdefault(entry.target, []).append(entry.index)
    for target, indices in places.items():
        leading = math.prod(shapes[target][: len(indices[0])])
        assert len(indices) == len(set(indices)) == leading
        assert len({len(index) for index in indices}) == 1


def test_released_keys_and_shapes_of_v2_and_lite():
    """Known from the released indices."""
    v2 = {entry.source: entry.shape for entry in mapping.table(presets.get("v2_released"))}
    lite = {entry.source: entry.shape for entry in mapping.table(presets.get("v2_lite_released"))}
    assert v2["model.layers.0.self_attn.q_b_proj.weight"] == (24576, 1536)
    assert v2["model.layers.59.mlp.experts.159.down_proj.weight"] == (5120, 1536)
    assert v2["model.layers.1.mlp.shared_experts.gate_proj.weight"] == (3072, 5120)
    assert lite["model.layers.0.mlp.down_proj.weight"] == (2048, 10944)
    assert lite["model.layers.26.self_attn.kv_a_proj_with_mqa.weight"] == (576, 2048)
    assert lite["model.layers.26.self_attn.kv_b_proj.weight"] == (4096, 512)
    assert lite["model.layers.3.self_attn.q_proj.weight"] == (3072, 2048)
    assert lite["model.layers.3.mlp.gate.weight"] == (64, 2048)
    assert lite["lm_head.weight"] == lite["model.embed_tokens.weight"] == (102400, 2048)
    assert len(lite) == 5291
    assert sum(math.prod(shape) for shape in lite.values()) == 15_706_484_224


@pytest.mark.parametrize("config", [small.MODEL, LITE], ids=["v2", "lite"])
def test_layout_changes_are_views_and_undo_each_other(config):
    folder = released(config)
    for entry in mapping.table(config):
        published = folder.arrays[entry.source]
        ours = entry.to_ours(published)
        assert ours.shape == entry.our_shape
        assert np.shares_memory(ours, published)
        packed = np.ascontiguousarray(ours)
        back = entry.to_published(packed)
        assert np.shares_memory(back, packed)
        np.testing.assert_array_equal(back, published)


def test_a_matrix_of_heads_keeps_heads_and_rotary_pairs_in_place():
    """Row n * (H + P) + H + 2 j + 1 is the second number of rotary pair j of head n, in both."""
    attention = small.MODEL.attention
    (entry,) = [e for e in mapping.table(small.MODEL) if e.source.endswith("0.self_attn.q_b_proj.weight")]
    published = np.arange(math.prod(entry.shape)).reshape(entry.shape)
    ours = entry.to_ours(published)
    for n in range(attention.heads):
        for j in range(attention.rope_dim // 2):
            row = n * attention.qk_dim + attention.nope_dim + 2 * j + 1
            np.testing.assert_array_equal(ours[:, n, attention.nope_dim + 2 * j + 1], published[row])


@pytest.mark.parametrize("bands", [False, True])
@pytest.mark.parametrize("config", [small.MODEL, LITE], ids=["v2", "lite"])
def test_a_slice_reads_only_itself(config, bands, monkeypatch):
    if bands:
        monkeypatch.setattr(mapping, "BLOCK", 3)
        monkeypatch.setattr(mapping, "BAND", 1)
    folder, rng = released(config), np.random.default_rng(1)
    for entry in mapping.table(config):
        ours = entry.to_ours(folder.arrays[entry.source])
        for _ in range(3):
            bounds = [sorted(rng.integers(0, size + 1, 2)) for size in ours.shape]
            index = tuple(slice(int(first), int(last)) for first, last in bounds)
            folder.numbers_read[entry.source] = 0
            values = entry.read(folder.read, index, np.dtype(np.float32))
            assert values.dtype == np.float32
            np.testing.assert_array_equal(values, ours[index])
            whole_heads = [
                size if place else last - first
                for group, at in zip(entry.axes, np.cumsum([0, *map(len, entry.axes)]))
                for place, (size, (first, last)) in enumerate(zip(group, bounds[at : at + len(group)]))
            ]
            assert folder.numbers_read[entry.source] == math.prod(whole_heads)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(1, 1), (0, 3), (128, 128), (129, 300), (257, 5)])
def test_transposing_by_blocks(dtype, shape):
    matrix = np.random.default_rng(0).normal(size=shape).astype(dtype)
    turned, wide = np.zeros(shape[::-1], dtype), np.zeros((shape[1], shape[0] + 2), dtype)
    mapping.transpose(matrix, turned)
    np.testing.assert_array_equal(turned, matrix.T)
    mapping.transpose(matrix, wide[:, 1 : shape[0] + 1])
    np.testing.assert_array_equal(wide[:, 1 : shape[0] + 1], matrix.T)
    assert not wide[:, 0].any()
    mapping.transpose(matrix[:, ::2], turned[::2])
    np.testing.assert_array_equal(turned[::2], matrix[:, ::2].T)


def test_a_tied_folder_gives_its_embedding_twice():
    entries = mapping.table(small.MODEL, tied=True)
    sources = [entry.source for entry in entries]
    assert "lm_head.weight" not in sources
    assert {entry.target for entry in entries if entry.source == "model.embed_tokens.weight"} == {
        ("embed",),
        ("unembed",),
    }
    assert {entry.target for entry in entries} == targets(small.MODEL).keys()
    assert mapping.check(small.MODEL, released(small.MODEL, tied=True), tied=True) == []


def test_a_whole_folder_has_no_problem():
    folder = released(LITE)
    folder.arrays["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
    fp8 = "model.layers.3.mlp.experts.7.up_proj.weight"
    folder.arrays[fp8] = folder.arrays[fp8].astype(ml_dtypes.float8_e4m3fn)
    folder.arrays[fp8 + "_scale_inv"] = np.zeros((1, 1), np.float32)
    assert mapping.check(LITE, folder) == []


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("model.norm.weight", None, "model.norm.weight: is missing in model.safetensors.index.json"),
        ("model.norm.weight", np.zeros(7, np.float32), "has shape [7], config.json says [20]"),
        ("lm_head.weight", np.zeros((50, 20), np.int8), "has dtype int8; it must be one of bfloat16"),
        ("lm_head.bias", np.zeros(50, np.float32), "belongs to no parameter"),
        ("model.layers.9.mlp.gate.weight_scale_inv", np.zeros(1, np.float32), "belongs to no parameter"),
        (
            "model.layers.1.mlp.experts.7.up_proj.weight_scale_inv",
            np.ones((1, 1), np.float32),
            "would scale a",
        ),
        ("model.layers.3.self_attn.rotary_emb.inv_freq", np.zeros(4, np.float32), "belongs to no parameter"),
        ("extra.rotary_emb.inv_freq", np.zeros(4, np.float32), "belongs to no parameter"),
        ("model.layers.1.mlp.experts.gate_up_proj", np.zeros(1, np.float32), "experts are fused; save"),
    ],
)
def test_a_problem_names_the_key_and_its_file(key, value, problem):
    folder = released(small.MODEL)
    folder.arrays.pop(key, None)
    if value is not None:
        folder.arrays[key] = value
    (found,) = mapping.check(small.MODEL, folder)
    assert found.startswith(key if value is None else f"{key} in {key}.safetensors: ")
    assert problem in found


def test_an_output_matrix_beside_tied_embeddings_is_a_problem():
    (problem,) = mapping.check(small.MODEL, released(small.MODEL), tied=True)
    assert problem.startswith(
        "lm_head.weight in lm_head.weight.safetensors: is there, but config.json says tie_word_embeddings=true"
    )


def test_grouped_query_attention_has_no_released_form():
    with pytest.raises(ConfigError, match=r"attention.kind='gqa'"):
        mapping.table(small.change(small.MODEL, attention=small.GQA))
