"""Published folder -> checkpoint -> published folder."""

import collections
import functools
import json
import operator

import jax
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from conversions import BFLOAT16, CONFIGS, abstract, assert_holds, assert_same_bytes, restored, tensors, write

from dsv2_jax import checkpoint, config_io
from dsv2_jax.checkpoint import CheckpointError, Checkpoints
from dsv2_jax.config import ModelConfig
from dsv2_jax.data.chat import TEMPLATE
from dsv2_jax.data.tokenizer import Tokenizer
from dsv2_jax.hf import arrays, convert, mapping
from dsv2_jax.hf.config import model_config
from dsv2_jax.hf.pretrained import from_pretrained
from dsv2_jax.hf.safetensors import Folder
from dsv2_jax.hf.shard_writer import ShardWriter

TOKENS = np.arange(12)[None] * 7 % 110


def stored_dtypes(path) -> set:
    params = checkpoint.locate(path) / "params"
    leaves = jax.tree.leaves(checkpoint.ocp.PyTreeCheckpointHandler().metadata(params).tree)
    return {np.dtype(leaf.dtype) for leaf in leaves}


@pytest.fixture(scope="module", params=CONFIGS)
def folders(request, tmp_path_factory):
    """(style, a bfloat16 folder, its import, the export of that), converted in small pieces."""
    home, style = tmp_path_factory.mktemp("folders"), request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert, "PIECE", 1000)
        src = write(home / "src", style=style)
        convert.import_folder(src, home / "ours")
        convert.export_folder(home / "ours", home / "back", shard_bytes=60_000)
    return style, src, home / "ours", home / "back"


def test_every_tensor_is_in_its_place(folders):
    style, _, ours, _ = folders
    assert_holds(ours, tensors(style), style)
    assert stored_dtypes(ours) == {np.dtype(BFLOAT16)}
    assert not [path for path in ours.rglob("*") if "import" in path.name]


def test_a_checkpoint_is_restored_in_the_type_asked_for(folders):
    style, _, ours, _ = folders
    wide, narrow = restored(ours, style), restored(ours, style, BFLOAT16)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), wide, narrow)
    assert {leaf.dtype for leaf in jax.tree.leaves(narrow)} == {np.dtype(BFLOAT16)}


def test_bfloat16_comes_back_byte_by_byte(folders):
    _, src, _, back = folders
    assert_same_bytes(src, back)
    files = sorted(path.name for path in back.glob("*.safetensors"))
    assert len(files) > 3
    assert all((back / name).stat().st_size < 80_000 for name in files)


def test_the_files_beside_the_weights(folders):
    style, src, ours, back = folders
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (src / name).read_bytes() == (ours / name).read_bytes() == (back / name).read_bytes()
    config = json.loads((back / "config.json").read_text())
    assert model_config(config) == model_config(CONFIGS[style])
    ids = {name: CONFIGS[style][name] for name in ("bos_token_id", "eos_token_id")}
    assert ids.items() <= config.items()
    assert ids.items() <= json.loads((back / "generation_config.json").read_text()).items()
    saved = checkpoint.load_config(ours)
    assert config_io.parse(ModelConfig, saved["model"]) == model_config(CONFIGS[style])
    assert saved["published"] == CONFIGS[style]


def test_all_three_open_as_the_same_model(folders):
    _, *paths = folders
    models = [from_pretrained(path, dtype="float32")[0] for path in paths]
    for other in models[1:]:
        jax.tree.map(np.testing.assert_array_equal, models[0], other)


def test_a_run_cannot_go_on_from_it_and_says_so(folders):
    style, _, ours, _ = folders
    manager = Checkpoints(ours / "checkpoints")
    with pytest.raises(ValueError, match="holds a model alone, no training"):
        manager.restore_latest(abstract(style), {"step": jax.ShapeDtypeStruct((), np.int32)})
    assert manager.steps() == [0]
    manager.close()


@pytest.mark.parametrize(
    ("dtype", "stored"), [(np.float32, np.float32), (np.float16, np.float32), (BFLOAT16, BFLOAT16)]
)
def test_types_of_the_source(tmp_path, dtype, stored):
    values = tensors(dtype=dtype)
    convert.import_folder(write(tmp_path / "src", values), tmp_path / "ours")
    assert stored_dtypes(tmp_path / "ours") == {np.dtype(stored)}
    assert_holds(tmp_path / "ours", values)
    convert.export_folder(tmp_path / "ours", tmp_path / "back", dtype="float32")
    back = Folder(tmp_path / "back")
    for key, value in values.items():
        np.testing.assert_array_equal(back.read(key), value.astype(np.float32))


def test_one_float32_tensor_keeps_its_array_in_float32(tmp_path):
    values = tensors()
    name = "model.layers.2.mlp.experts.5.up_proj.weight"
    values[name] = values[name].astype(np.float32) * np.float32(1.001)
    convert.import_folder(write(tmp_path / "src", values), tmp_path / "ours")
    assert stored_dtypes(tmp_path / "ours") == {np.dtype(np.float32), np.dtype(BFLOAT16)}
    assert_holds(tmp_path / "ours", values)


def test_fp8_becomes_what_it_stands_for(tmp_path):
    rng, values, stands_for = np.random.default_rng(0), {}, {}
    for name, value in tensors().items():
        values[name] = stands_for[name] = value
        if "proj" in name:
            scale = rng.uniform(0.5, 2, [-(-size // 128) for size in value.shape]).astype(np.float32)
            values[name], values[name + "_scale_inv"] = value.astype(ml_dtypes.float8_e4m3fn), scale
            stands_for[name] = values[name].astype(np.float32) * scale
    src = write(tmp_path / "src")
    for path in src.glob("model*"):
        path.unlink()
    writer = ShardWriter(src, 10**9)
    for name, value in values.items():
        writer.add(name, value.shape, value.dtype, [value])
    writer.finish()
    convert.import_folder(src, tmp_path / "ours")
    assert_holds(tmp_path / "ours", stands_for)
    convert.import_folder(src, tmp_path / "small", dtype="bfloat16")
    assert stored_dtypes(tmp_path / "small") == {np.dtype(BFLOAT16)}
    assert_holds(tmp_path / "small", {name: value.astype(BFLOAT16) for name, value in stands_for.items()})


def test_a_tied_output_matrix_is_the_embedding(tmp_path):
    values = tensors()
    del values["lm_head.weight"]
    convert.import_folder(write(tmp_path / "src", values, tie_word_embeddings=True), tmp_path / "ours")
    assert_holds(tmp_path / "ours", values, tied=True)
    convert.export_folder(tmp_path / "ours", tmp_path / "back")
    back = Folder(tmp_path / "back")
    np.testing.assert_array_equal(back.read("lm_head.weight"), values["model.embed_tokens.weight"])
    assert json.loads((tmp_path / "back" / "config.json").read_text())["tie_word_embeddings"] is False


def trained(path, style="lite"):
    """A run's folder with two checkpoints and no tokenizer; the parameters of the second."""
    config = model_config(CONFIGS[style])
    manager = Checkpoints(path / "checkpoints")
    for step in 1, 2:
        rng = np.random.default_rng(step)
        model = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), abstract(style))  # noqa: B023
        documents = {"iterator": {}, "config": {"model": config_io.to_dict(config)}}
        manager.save(step, params=model, training={"step": np.int32(step)}, **documents)
        manager.wait()
    manager.close()
    return checkpoint.to_dict(model)


def test_export_of_a_run(tmp_path):
    params = trained(tmp_path / "run")
    convert.export_folder(tmp_path / "run", tmp_path / "out")
    convert.export_folder(tmp_path / "run", tmp_path / "first", step=1)
    for path, same in ("out", True), ("first", False):
        folder = Folder(tmp_path / path)
        for entry in mapping.table(model_config(CONFIGS["lite"])):
            array = functools.reduce(operator.getitem, entry.target, params)[entry.index]
            expected = entry.to_published(np.ascontiguousarray(array)).astype(BFLOAT16)
            assert np.array_equal(folder.read(entry.source), expected) == same
    names = ["SHA256SUMS", "config.json", "generation_config.json", "model.safetensors"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names


def test_export_of_a_run_reads_the_vocabulary_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "CHUNK", 1000)
    monkeypatch.setattr(convert, "PIECE", 1000)
    params = trained(tmp_path / "run")
    read, largest = arrays.Arrays.read, collections.Counter()

    def measured(self, names, index=()):
        values = read(self, names, index)
        largest[names] = max(largest[names], values.nbytes)
        return values

    monkeypatch.setattr(arrays.Arrays, "read", measured)
    convert.export_folder(tmp_path / "run", tmp_path / "out")
    assert params["embed"].nbytes == params["unembed"].nbytes == 52_224
    assert max(largest[name] for name in (("embed",), ("unembed",))) <= 16 * 48 * 4  # rows of a chunk's height
    folder = Folder(tmp_path / "out")
    for key, name in ("model.embed_tokens.weight", "embed"), ("lm_head.weight", "unembed"):
        expected = params[name].astype(BFLOAT16)
        np.testing.assert_array_equal(folder.read(key), expected if name == "embed" else expected.T)


def test_weights_beyond_bfloat16_are_not_exported_as_infinity(tmp_path):
    config = model_config(CONFIGS["lite"])
    manager = Checkpoints(tmp_path / "run")
    model = jax.tree.map(lambda leaf: np.full(leaf.shape, 3.4e38, np.float32), abstract("lite"))
    document = {"model": config_io.to_dict(config)}
    manager.save(1, params=model, training={"step": np.int32(1)}, iterator={}, config=document)
    manager.wait()
    manager.close()
    with pytest.raises(CheckpointError, match=r"embed .* not finite as bfloat16"):
        convert.export_folder(tmp_path / "run", tmp_path / "out")
    convert.export_folder(tmp_path / "run", tmp_path / "wide", dtype="float32")


def test_a_tokenizer_of_our_own_is_described(tmp_path):
    trained(tmp_path / "run")
    (tmp_path / "run" / "data").mkdir()
    Tokenizer.train(["some text"], 260).save(tmp_path / "run" / "data" / "tokenizer.json")
    convert.export_folder(tmp_path / "run", tmp_path / "out")
    described = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert described["bos_token"] == "<|begin_of_sentence|>"
    assert described["eos_token"] == described["pad_token"] == "<|end_of_sentence|>"
    assert described["chat_template"] == TEMPLATE
    raw = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path / "out" / "tokenizer.json")
    assert raw.encode("some text").ids == [tokenizer.bos, *tokenizer.encode("some text")]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 1
    assert Tokenizer.load(tmp_path / "out" / "tokenizer.json").bos == 0


def test_specials_that_stand_in_the_vocabulary_alone(tmp_path):
    trained(tmp_path / "run")
    file = tmp_path / "run" / "tokenizer.json"
    Tokenizer.train(["some text"], 260).save(file)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"added_tokens": []}))
    convert.export_folder(tmp_path / "run", tmp_path / "out")
    described = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert described["bos_token"] == "<|begin_of_sentence|>"


def test_what_is_rounded_and_what_transformers_does_otherwise_is_said(tmp_path):
    trained(tmp_path / "run")
    for dtype, expected in ("bfloat16", ["are rounded to bfloat16"]), ("float32", []):
        said = []
        convert.export_folder(tmp_path / "run", tmp_path / dtype, dtype=dtype, report=said.append)
        assert len(said) == len(expected)
        assert all(part in line for part, line in zip(expected, said))
    src, said = write(tmp_path / "src", norm_topk_prob=True), []
    convert.import_folder(src, tmp_path / "ours", report=said.append)
    said.clear()
    convert.export_folder(tmp_path / "ours", tmp_path / "out", report=said.append)
    (line,) = said
    assert "norm_topk_prob=true: transformers does not divide" in line


def test_a_dry_run_lists_every_tensor_and_every_problem_and_writes_nothing(tmp_path):
    values = tensors()
    values["extra"] = values.pop("lm_head.weight")
    src, said = write(tmp_path / "src", values), []
    problems = convert.import_folder(src, tmp_path / "ours", dry_run=True, report=said.append)
    shard = Folder(src).file("extra").name
    assert problems == [
        "lm_head.weight: is missing in model.safetensors.index.json",
        f"extra in {shard}: belongs to no parameter of this model",
    ]
    assert len(said) == len(mapping.table(model_config(CONFIGS["v2"])))
    assert (
        "model.layers.2.mlp.experts.3.up_proj.weight -> moe_blocks.ffn.up[1, 3]  [14, 48] transposed to [48, 14]"
        in said
    )
    assert not (tmp_path / "ours").exists()
    trained(tmp_path / "run")
    convert.export_folder(tmp_path / "run", tmp_path / "out", dry_run=True, report=said.append)
    assert said[-1] == "unembed  [272, 48] transposed to [48, 272] -> lm_head.weight"
    assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_is_not_exported(tmp_path):
    convert.import_folder(write(tmp_path / "src"), tmp_path / "ours")
    sums = tmp_path / "ours" / "checkpoints" / "0" / "checksums" / "metadata"
    document = json.loads(sums.read_text())
    document["params"]["moe_blocks/ffn/up"] ^= 1
    sums.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="the checksum of moe_blocks/ffn/up is wrong"):
        convert.export_folder(tmp_path / "ours", tmp_path / "out")
    assert not list((tmp_path / "out").glob("model*"))
    with pytest.raises(CheckpointError, match="the checksum of moe_blocks/ffn/up is wrong"):
        checkpoint.restore_params(tmp_path / "ours", abstract())


def test_word_sums_are_those_of_a_checkpoint():
    rng = np.random.default_rng(0)
    for dtype in np.float32, BFLOAT16:
        values = rng.normal(size=(40, 7)).astype(dtype)
        parts = sum(arrays.word_sum(part) for part in np.array_split(values.T, 3))
        assert checkpoint._array_sums({"a": jax.numpy.asarray(values)}) == {"a": parts % 2**32}


@pytest.mark.parity
def test_what_is_exported_transformers_loads(folders):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    _, src, _, back = folders
    load = functools.partial(
        transformers.AutoModelForCausalLM.from_pretrained, dtype=torch.float32, experts_implementation="eager"
    )
    model, info = load(back, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    original = load(src)
    with torch.no_grad():
        logits, expected = (m(torch.tensor(TOKENS)).logits.numpy() for m in (model, original))
    np.testing.assert_array_equal(logits, expected)
    ours = np.asarray(from_pretrained(back, dtype="float32")[0](TOKENS))
    assert np.abs(ours - logits).max() <= 2e-4 * np.abs(logits).max()
    text = "a published folder"
    tokenizer = transformers.AutoTokenizer.from_pretrained(back)
    assert tokenizer.encode(text, add_special_tokens=False) == Tokenizer.load(back / "tokenizer.json").encode(text)
