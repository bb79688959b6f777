"""`from_pretrained`: every number where it belongs, each device its slice alone, and what is said where it cannot."""

import json
import math
import pathlib
import shutil

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import published
import pytest
import small
from etils import epath
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import filter_repo_objects
from jax.sharding import Mesh

from dsv2_jax import checkpoint, config_io, sharding
from dsv2_jax.checkpoint import Checkpoints
from dsv2_jax.config import ConfigError
from dsv2_jax.data.tokenizer import Tokenizer
from dsv2_jax.hf import mapping, pretrained
from dsv2_jax.hf.convert import import_folder
from dsv2_jax.hf.pretrained import from_pretrained
from dsv2_jax.hf.safetensors import Folder, FolderError
from dsv2_jax.hf.shard_writer import ShardWriter
from dsv2_jax.inference.generate import generate
from dsv2_jax.model import parallel
from dsv2_jax.model.counting import abstract_model
from dsv2_jax.model.transformer import Transformer

MODEL = small.change(small.MODEL, vocab_size=300)  # for a tokenizer
TOKENS = jnp.arange(24).reshape(2, 12)


@pytest.fixture(scope="module", params=["lite", "v2"])
def released(request, tmp_path_factory):
    """(folder, its tensors, its config.json) of a model in float32."""
    config = published.CONFIGS[request.param] | {"torch_dtype": "float32", "vocab_size": 300}
    tensors = published.weights(config)
    return published.write_folder(tmp_path_factory.mktemp(request.param), config, tensors), tensors, config


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["What is a transformer? User: Assistant:"] * 3, 280)


def make_mesh(**sizes) -> Mesh:
    return sharding.make_mesh(sharding.MeshShape(**sizes), jax.devices()[: math.prod(sizes.values())])


def assert_holds(model: Transformer, tensors: dict[str, np.ndarray], tied: bool = False) -> None:
    leaves = {names: np.asarray(leaf) for names, leaf in pretrained._leaves(model)}
    for entry in mapping.table(model.config, tied):
        names, place = pretrained._unstacked_place(entry.target, entry.index)
        ours, theirs = leaves[names][place], tensors[entry.source]
        np.testing.assert_array_equal(entry.to_published(ours), theirs.astype(ours.dtype))


def test_a_released_folder_number_by_number(released):
    folder, tensors, _ = released
    model, tokenizer = from_pretrained(folder)
    assert tokenizer is None
    assert not model.stacked
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype("float32")}
    assert_holds(model, tensors)
    assert model.config.compute.dtype == "float32"
    logits_BTV = jax.eval_shape(model, TOKENS)
    assert logits_BTV.dtype == jnp.float32
    assert logits_BTV.shape == (2, 12, 300)


def test_bfloat16_as_stored_and_what_stays_float32(released, tmp_path):
    _, tensors, config = released
    halves = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()}
    model, _ = from_pretrained(published.write_folder(tmp_path, config | {"torch_dtype": "bfloat16"}, halves))
    assert model.config.compute.dtype == "bfloat16"
    assert_holds(model, halves)
    for names, leaf in pretrained._leaves(model):
        exact = leaf.ndim == 1 or names[-1] == "centroids"
        assert leaf.dtype == (jnp.float32 if exact else jnp.bfloat16), names
    assert jax.eval_shape(model, TOKENS).dtype == jnp.float32


def test_a_dtype_that_is_asked_for(released):
    folder, tensors, _ = released
    model, _ = from_pretrained(folder, dtype="bfloat16")
    assert_holds(model, tensors)
    assert model.config.compute.dtype == "bfloat16"
    assert model.embed.dtype == jnp.bfloat16


def test_tied_embeddings_are_read_for_the_output_matrix_too(tmp_path):
    config = published.LITE | {"tie_word_embeddings": True, "torch_dtype": "float32"}
    tensors = published.weights(config)
    del tensors["lm_head.weight"]
    model, _ = from_pretrained(published.write_folder(tmp_path, config, tensors))
    np.testing.assert_array_equal(model.unembed[...], tensors["model.embed_tokens.weight"].T)
    assert_holds(model, tensors, tied=True)


@pytest.mark.parametrize("sizes", [None, dict(fsdp=2, expert=4), dict(tensor=2, expert=2)], ids=str)
def test_fp8_is_opened_as_what_it_stands_for(tmp_path, sizes):
    """Several blocks of scales, the last not whole, cut by meshes where no block ends."""
    widths = {"hidden_size": 200, "moe_intermediate_size": 150, "n_routed_experts": 12, "num_hidden_layers": 2}
    config, stands_for, values = published.LITE | widths | {"torch_dtype": "float32"}, {}, {}
    rng = np.random.default_rng(0)
    for name, value in published.weights(config).items():
        stands_for[name] = values[name] = value
        if "proj" in name:
            scale = rng.uniform(0.5, 2, [-(-size // 128) for size in value.shape]).astype(np.float32)
            values[name], values[name + "_scale_inv"] = value.astype(ml_dtypes.float8_e4m3fn), scale
            rows, columns = (np.arange(size) // 128 for size in value.shape)
            stands_for[name] = values[name].astype(np.float32) * scale[rows][:, columns]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with ShardWriter(tmp_path, 10**6) as writer:
        for name, value in values.items():
            writer.add(name, value.shape, value.dtype, [value])
        writer.finish()
    model, _ = from_pretrained(tmp_path, mesh=sizes and make_mesh(**sizes))
    assert_holds(model, stands_for)
    import_folder(tmp_path, tmp_path / "ours", report=lambda _: None)
    imported, _ = from_pretrained(tmp_path / "ours", dtype="float32")
    assert_holds(imported, stands_for)


# --- a mesh ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [dict(fsdp=2, expert=2, tensor=2), dict(expert=4), dict(data=4, fsdp=2)], ids=str)
def test_each_device_receives_its_slice_and_nothing_is_read_twice(tmp_path, monkeypatch, sizes):
    config = published.V2 | {"torch_dtype": "float32"}
    tensors = published.weights(config)
    folder, mesh = published.write_folder(tmp_path, config, tensors), make_mesh(**sizes)
    reads: dict[str, list[int]] = {key: [] for key in tensors}
    read = Folder.read

    def counted(self, key, index=()):
        values = read(self, key, index)
        reads[key].append(values.size)
        return values

    monkeypatch.setattr(Folder, "read", counted)
    model, _ = from_pretrained(folder, mesh=lambda config: mesh if config.moe else None)
    leaves = dict(pretrained._leaves(model))
    split = 0
    for entry in mapping.table(model.config):
        names, place = pretrained._unstacked_place(entry.target, entry.index)
        leaf, whole = leaves[names], entry.to_ours(tensors[entry.source])
        assert leaf.sharding.mesh == mesh
        assert len(leaf.addressable_shards) == mesh.size
        assert sum(reads[entry.source]) == whole.size  # every number once, though several devices may hold it
        shares = {tuple(part.indices(n)[:2] for part, n in zip(s.index, leaf.shape)) for s in leaf.addressable_shards}
        slices = {share[len(place) :] for share in shares}
        assert len(reads[entry.source]) == len(slices)  # and slice by slice, never the whole for a part
        split += len(slices) > 1
        for shard in leaf.addressable_shards:
            inside = list(range(leaf.shape[0])[shard.index[0]]) if place else []
            if not place:
                np.testing.assert_array_equal(shard.data, whole[shard.index])
            elif place[0] in inside:
                np.testing.assert_array_equal(shard.data[inside.index(place[0])], whole[shard.index[1:]])
    experts = leaves["moe_blocks", "0", "ffn", "gate"]
    assert experts.addressable_shards[0].data.shape[0] == 24 // sizes.get("expert", 1)
    assert split or sizes == dict(expert=4)


DIVISIBLE = {"kv_lora_rank": 24, "moe_intermediate_size": 16, "num_hidden_layers": 2}  # by 8; heads by 4
STYLES = {
    "v2": published.V2 | DIVISIBLE | {"q_lora_rank": 32},
    "lite": published.LITE | DIVISIBLE | {"n_routed_experts": 8},
}
MESHES = ["data=8", "fsdp=8", "expert=8", "tensor=2", "tensor=4,fsdp=2", "context=2", "data=2,expert=2,context=2"]


@pytest.mark.parametrize(
    ("style", "meshes"),
    [("v2", MESHES[-1:]), *[pytest.param(style, MESHES, marks=pytest.mark.slow) for style in ("v2", "lite")]],
)
def test_logits_do_not_depend_on_the_mesh(tmp_path, style, meshes):
    """Acceptance case 9, for a released folder, along every axis; the model finds its mesh by itself."""
    config = STYLES[style] | {"torch_dtype": "float32"}
    folder = published.write_folder(tmp_path, config, published.weights(config))
    tokens_BT, forward = jnp.arange(8 * 16).reshape(8, 16) * 7 % 110, jax.jit(lambda model, tokens: model(tokens))
    expected_BTV = np.asarray(forward(from_pretrained(folder)[0], tokens_BT))
    for text in meshes:
        mesh = sharding.make_mesh(text, jax.devices()[: math.prod(sharding.parse_mesh(text).sizes)])
        spread, _ = from_pretrained(folder, mesh=mesh)
        found = np.asarray(forward(spread, tokens_BT))
        assert np.abs(found - expected_BTV).max() <= 1e-5 * np.abs(expected_BTV).max(), text
    order = parallel.zigzag(16, mesh.shape["context"])  # of the last mesh
    with sharding.use(mesh):
        found = np.asarray(forward(spread, tokens_BT[:, order]))
    assert np.abs(found - expected_BTV[:, order]).max() <= 1e-5 * np.abs(expected_BTV).max()


@pytest.mark.slow
@pytest.mark.parametrize("released", ["v2"], indirect=True)
def test_a_model_on_a_mesh_generates_without_being_told(released):
    folder, prompts, mesh = released[0], [[1, 2, 3], [4, 5]], make_mesh(context=2)
    expected = generate(from_pretrained(folder)[0], prompts, max_new_tokens=4).tokens
    spread, _ = from_pretrained(folder, mesh=make_mesh(fsdp=2, tensor=2))
    assert generate(spread, prompts, max_new_tokens=4).tokens == expected
    cut, _ = from_pretrained(folder, mesh=mesh)
    with sharding.use(mesh), pytest.raises(ConfigError, match=r"mesh: context=2 is for training; use tensor, expert"):
        generate(cut, prompts, max_new_tokens=4)


# --- our checkpoints -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer):
    """(folder, model) of a training run."""
    folder, rng = tmp_path_factory.mktemp("run"), np.random.default_rng(0)
    model = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype), abstract_model(MODEL))
    checkpoints = Checkpoints(folder / "checkpoints")
    config = {"model": config_io.to_dict(MODEL)}
    checkpoints.save(3, params=model, training={"step": jnp.zeros(())}, iterator={}, config=config)
    checkpoints.wait()
    checkpoints.close()
    (folder / "data").mkdir()
    tokenizer.save(folder / "data" / "tokenizer.json")
    return folder, model


@pytest.mark.parametrize(("dtype", "mesh"), [(None, None), ("bfloat16", dict(fsdp=2, expert=2))])
def test_a_run_of_ours_is_taken_apart_array_by_array(run, monkeypatch, dtype, mesh):
    folder, model = run
    restored, restore = [], checkpoint.restore_params
    monkeypatch.setattr(checkpoint, "restore_params", lambda *given: restored.append(restore(*given)) or restored[0])
    loaded, tokenizer = from_pretrained(folder, dtype=dtype, mesh=mesh and make_mesh(**mesh))
    expected = model.unstacked(dtype)
    assert loaded.config == expected.config
    assert jax.tree.structure(loaded) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(loaded), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    assert tokenizer.encode("transformer") == Tokenizer.load(folder / "data" / "tokenizer.json").encode("transformer")
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(restored[0].moe_blocks))  # no second model stays
    if mesh:
        gate = loaded.moe_blocks[0].ffn.gate[...]
        assert gate.addressable_shards[0].data.shape == (4, 10, 11)


def test_one_checkpoint_of_a_run(run):
    folder, model = run
    loaded, tokenizer = from_pretrained(str(folder / "checkpoints" / "3"))
    np.testing.assert_array_equal(loaded.embed[...], model.embed[...])
    assert tokenizer is not None


def test_no_tokenizer_is_taken_from_around_a_run(run, tokenizer, tmp_path):
    """One and two levels above, and beside: of a run without its own there is none."""
    here = tmp_path / "runs" / "group" / "mine"
    shutil.copytree(run[0], here)
    found = {"run": here, "checkpoints": here / "checkpoints", "checkpoint": here / "checkpoints" / "3"}
    for path in found.values():
        assert pretrained.find_tokenizer(path) == epath.Path(here / "data" / "tokenizer.json")
    (here / "data" / "tokenizer.json").rename(here / "checkpoints" / "tokenizer.json")
    decoys = (here.parent, here.parent / "data", here.parents[1], tmp_path, here / "checkpoints" / "data")
    for decoy in decoys:
        decoy.mkdir(exist_ok=True)
        tokenizer.save(decoy / "tokenizer.json")
    for path in found.values():
        assert pretrained.find_tokenizer(path) is None
    assert from_pretrained(here)[1] is None
    lone = tmp_path / "runs" / "lone"
    (here / "checkpoints" / "3").rename(lone)
    assert pretrained.find_tokenizer(lone) is None
    tokenizer.save(lone / "tokenizer.json")
    assert pretrained.find_tokenizer(lone) == epath.Path(lone / "tokenizer.json")


def test_the_tokenizer_of_a_bucket_is_found_too(run, monkeypatch):
    """epath's backend of local files under the name of another: such a path is never taken for one of this machine."""
    local = epath.backend.os_backend

    class Bucket:
        def __getattr__(self, name):
            return lambda path, *rest: getattr(local, name)(str(path).replace("gs://bucket", str(run[0])), *rest)

    monkeypatch.setitem(epath.gpath._PREFIX_TO_BACKEND, "gs", Bucket())
    file = pretrained.find_tokenizer("gs://bucket/checkpoints/3")
    assert str(file) == "gs://bucket/data/tokenizer.json"
    assert pretrained.load_tokenizer(file, 300).encode("transformer")


def test_a_tokenizer_of_another_model_is_refused(run, tmp_path):
    """JAX would clamp ids that the embedding lacks, and say nothing."""
    here = tmp_path / "run"
    shutil.copytree(run[0], here)
    Tokenizer.train([pathlib.Path(__file__).read_text()], 320).save(here / "tokenizer.json")
    assert Tokenizer.load(here / "tokenizer.json").vocab_size > 300
    with pytest.raises(ConfigError, match=r"tokenizer.json: has 3\d\d ids, the model's vocabulary 300; it is the tok"):
        from_pretrained(here)


# --- the hub ---------------------------------------------------------------------------------------------------------


def test_a_hub_id_is_downloaded_without_what_is_not_needed(released, monkeypatch, tokenizer):
    folder, tensors, _ = released
    asked = {}

    def download(repo_id, *, allow_patterns):
        asked.update(repo_id=repo_id, allow_patterns=allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    tokenizer.save(folder / "tokenizer.json")
    model, loaded = from_pretrained("deepseek-ai/DeepSeek-V2-Lite")
    (folder / "tokenizer.json").unlink()
    assert asked["repo_id"] == "deepseek-ai/DeepSeek-V2-Lite"
    wanted = {file.name for file in folder.iterdir()} | {"model.safetensors", "tokenizer.json"}
    offered = {*wanted, "pytorch_model.bin", "modeling_deepseek.py", "README.md", "figures/benchmark.png"}
    assert set(filter_repo_objects(offered, allow_patterns=asked["allow_patterns"])) == wanted
    assert_holds(model, tensors)
    assert (loaded.bos, loaded.eos) == (tokenizer.bos, tokenizer.eos)


def test_a_hub_that_fails_is_one_line(monkeypatch):
    def download(repo_id, *, allow_patterns):
        raise HFValidationError("no such repository\nlong explanation")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ConfigError, match=r"^nobody/nothing: .*Hugging Face Hub: no such repository$"):
        from_pretrained("nobody/nothing")


@pytest.mark.parametrize("error", [RuntimeError(), LookupError("  "), ValueError("\n")])
def test_any_error_of_the_hubs_client_is_one_line(monkeypatch, error):
    def download(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ConfigError, match=rf"Hugging Face Hub: {type(error).__name__}$"):
        from_pretrained("nobody/nothing")


# --- mistakes --------------------------------------------------------------------------------------------------------


def test_mistakes_name_the_place_and_the_remedy(released, tmp_path):
    folder, tensors, config = released
    with pytest.raises(ConfigError, match=r"dtype='float16': must be one of float32, bfloat16"):
        from_pretrained(folder, dtype="float16")
    for path in ("no/such/folder", "../nothing"):
        with pytest.raises(ConfigError, match=rf"{path}: there is no such folder"):
            from_pretrained(path)
    with pytest.raises(checkpoint.CheckpointError, match=r"no checkpoint here"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FolderError, match=r"has a config.json, but neither model.safetensors .*, nor a checkpoint; "):
        from_pretrained(tmp_path)
    broken = published.write_folder(tmp_path / "broken", config, tensors)
    (broken / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"broken/config.json: cannot be read as JSON"):
        from_pretrained(broken)
    (broken / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    with pytest.raises(ConfigError, match=r"broken/config.json: model_type='llama': must be 'deepseek_v2'"):
        from_pretrained(broken)
    (broken / "config.json").write_text(json.dumps(config | {"vocab_size": 301, "first_k_dense_replace": 0}))
    with pytest.raises(FolderError, match=r"broken: does not hold the model .*layers.0.mlp.* \(and \d+ more\)"):
        from_pretrained(broken)


def test_a_broken_tokenizer_is_an_error(tmp_path):
    config = published.LITE | {"num_hidden_layers": 1}
    folder = published.write_folder(tmp_path, config, published.weights(config))
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model"')
    with pytest.raises(ConfigError, match=r"tokenizer.json: not a readable tokenizer.json"):
        from_pretrained(folder)
