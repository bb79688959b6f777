"""Opening a model, ready to compute: a folder as released, a model on the Hugging Face Hub, or a checkpoint of ours."""

import functools
import os
import pathlib
import re
from collections.abc import Callable, Iterator

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from dsv2_jax import checkpoint, config_io, sharding
from dsv2_jax.config import DTYPES, ConfigError, ModelConfig, check
from dsv2_jax.data.tokenizer import Tokenizer
from dsv2_jax.hf import digests, mapping
from dsv2_jax.hf.config import is_tied, model_config, read_json
from dsv2_jax.hf.safetensors import INDEX, SINGLE, Folder, FolderError, reason
from dsv2_jax.model.transformer import Transformer

PUBLISHED_FILES = (
    *("config.json", SINGLE, INDEX, "model-*.safetensors", "generation_config.json"),
    *("tokenizer*.json", "chat_template.jinja", "special_tokens_map.json"),
)
HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[\w.-]+)?")
TOKENIZER = "tokenizer.json"


def from_pretrained(
    path_or_hub_id: str | pathlib.Path,
    *,
    mesh: Mesh | Callable[[ModelConfig], Mesh | None] | None = None,
    dtype: str | None = None,
    verify: bool = False,
) -> tuple[Transformer, Tokenizer | None]:
    """The model of a folder as released, of an id on the Hugging Face Hub, or of a run's folder, and its tokenizer.

        model, tokenizer = dsv2_jax.from_pretrained("deepseek-ai/DeepSeek-V2-Lite")
        tokens_BT = jnp.array([[tokenizer.bos, *tokenizer.encode("What is a transformer?")]])
        logits_BTV = jax.jit(dsv2_jax.Transformer.__call__)(model, tokens_BT)  # float32; model(tokens_BT), compiled

    The MoE layers come as a list (see `Transformer.unstacked`), with which generation is fastest; to train, open a run
    (`dsv2_jax.pretrain`). Norms and the router stay in float32, the other matrices are held in `dtype`, a tensor at a
    time on its way from the folder. Without a tokenizer.json the tokenizer is None.

    Args:
      mesh: of `sharding.make_mesh("fsdp=4,expert=2")`: devices over which the parameters are split by their logical
        axes; each receives only its slice, and a compiled model computes on them. (Inside `sharding.use(mesh)`, with
        `context` > 1, it wants and gives columns in the order of `model.parallel.zigzag`.) None: one device. Or a
        function that chooses it for a model: it is called before JAX is used.
      dtype: "bfloat16" or "float32", of the weights and the computation. None: as config.json states it, which is how
        the weights are stored and were trained (bfloat16, as released; float32 for float16, whose fractions bfloat16
        cannot hold); for a run, as in training.
      verify: first compare every file of a released folder with the SHA-256 that its download recorded, where it did
        (see `hf.digests`): every byte is read once more. Checkpoints are always compared with their own sums.

    Raises `ConfigError` where there is no such model or it is one we do not implement, `FolderError` and
    `CheckpointError` where its files are damaged or do not fit.
    """
    check(dtype is None or dtype in DTYPES, "dtype", dtype, f"be one of {', '.join(DTYPES)}, or None")
    folder = local_folder(path_or_hub_id)
    if folder is not None and ((folder / SINGLE).is_file() or (folder / INDEX).is_file()):
        return _load_published(folder, mesh, dtype, verify)
    if folder is not None and (folder / "config.json").is_file() and not _has_checkpoint(folder):
        weights = f"neither {SINGLE} nor {INDEX}, nor a checkpoint"
        raise FolderError(f"{folder}: has a config.json, but {weights}; download it whole, or train until there is one")
    return _load_checkpoint(path_or_hub_id, mesh, dtype)


def run_folder(folder: str | epath.Path) -> epath.Path:
    """The folder of the run that one checkpoint belongs to: the checkpoint itself where it belongs to none."""
    folder = epath.Path(folder)
    if not folder.name.isdigit():
        return folder
    return folder.parent.parent if folder.parent.name == "checkpoints" else folder.parent


def find_tokenizer(path: str | os.PathLike) -> epath.Path | None:
    """The tokenizer.json of a checkpoint (see `checkpoint.locate`): in its folder or its run's, or in `data` there."""
    folder = checkpoint.locate(path)
    homes = (folder, folder / "data", run_folder(folder), run_folder(folder) / "data")
    return next((home / TOKENIZER for home in homes if (home / TOKENIZER).exists()), None)


def load_tokenizer(file: str | os.PathLike | None, vocab_size: int | None = None) -> Tokenizer | None:
    """None where there is no file. Raises `ConfigError` for one of more ids than `vocab_size`, the model's."""
    if file is None or not epath.Path(file).exists():
        return None
    tokenizer = Tokenizer.load(file)
    if vocab_size is not None and tokenizer.vocab_size > vocab_size:
        sizes = f"has {tokenizer.vocab_size} ids, the model's vocabulary {vocab_size}"
        raise ConfigError(f"{file}: {sizes}; it is the tokenizer of another model")
    return tokenizer


def local_folder(path_or_hub_id: str | pathlib.Path) -> pathlib.Path | None:
    """The folder, downloaded if need be; None for a path that only our checkpoints can have (gs://...)."""
    name = str(path_or_hub_id)
    if "://" in name:
        return None
    if pathlib.Path(name).is_dir():
        return pathlib.Path(name)
    if not HUB_ID.fullmatch(name):
        raise ConfigError(f"{name}: there is no such folder, and the Hugging Face Hub has no such names")
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=list(PUBLISHED_FILES)))
    except Exception as error:  # the Hub's client lets through those of its own libraries
        raise ConfigError(
            f"{name}: there is no such folder, nor can it be had from the Hugging Face Hub: {reason(error)}"
        ) from None


# --- as released -----------------------------------------------------------------------------------------------------


def _load_published(path: pathlib.Path, mesh, dtype: str | None, verify: bool) -> tuple[Transformer, Tokenizer | None]:
    json, origin = read_json(path / "config.json"), str(path / "config.json")
    config, tied = model_config(json, origin), is_tied(json, origin)
    tokenizer, folder = load_tokenizer(path / TOKENIZER, config.vocab_size), Folder(path)
    mapping.check_size(config, folder)
    if verify:
        digests.verify(digests.recorded(folder.files()))
    mapping.refuse(mapping.check(config, folder, tied), path)
    places: dict[tuple[str, ...], list[mapping.Entry]] = {}
    for entry in mapping.table(config, tied):
        names, _ = _unstacked_place(entry.target, entry.index)
        places.setdefault(names, []).append(entry)
    mesh = _chosen(mesh, config)
    abstract = sharding.with_shardings(_abstract(config, dtype), mesh)
    # One at a time: copies to devices are asynchronous, and keep their source.
    arrays = {names: jax.block_until_ready(_array(leaf, folder, places[names])) for names, leaf in _leaves(abstract)}
    return _filled(abstract, arrays), tokenizer


def _unstacked_place(target: tuple[str, ...], index: tuple[int, ...]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Where a place in the stacked MoE blocks lies in a list of them; other places stay."""
    if target[0] != "moe_blocks":
        return target, index
    return (target[0], str(index[0]), *target[1:]), index[1:]


def _array(leaf: jax.ShapeDtypeStruct, folder: Folder, entries: list[mapping.Entry]) -> jax.Array:
    """One parameter, read slice by slice; the copies of a slice that several devices hold are read once."""

    @functools.cache
    def read(*bounds: tuple[int, int]) -> np.ndarray:
        values = np.empty([last - first for first, last in bounds], leaf.dtype)
        for entry in entries:
            _, place = _unstacked_place(entry.target, entry.index)  # () or (expert,)
            leading, rest = bounds[: len(place)], tuple(slice(*pair) for pair in bounds[len(place) :])
            if all(first <= i < last for i, (first, last) in zip(place, leading, strict=True)):
                at = tuple(i - first for i, (first, _) in zip(place, leading, strict=True))
                values[at] = mapping.read_finite(entry, folder, rest, leaf.dtype)
        return values

    def slice_of(index: tuple[slice, ...]) -> np.ndarray:
        return read(*(part.indices(size)[:2] for part, size in zip(index, leaf.shape, strict=True)))

    if leaf.sharding is None:
        return jnp.asarray(slice_of((slice(None),) * len(leaf.shape)))
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, slice_of)


# --- a checkpoint of ours --------------------------------------------------------------------------------------------


def _has_checkpoint(path) -> bool:
    try:
        checkpoint.locate(path)
    except checkpoint.CheckpointError:
        return False
    return True


def _load_checkpoint(path, mesh, dtype: str | None) -> tuple[Transformer, Tokenizer | None]:
    """Restored stacked, as it is stored, then taken apart array by array: the model is never there twice."""
    config = config_io.parse(ModelConfig, checkpoint.load_config(path).get("model"), "model")
    tokenizer, mesh = load_tokenizer(find_tokenizer(path), config.vocab_size), _chosen(mesh, config)
    abstract = _abstract(config, dtype)
    dtypes = {names: leaf.dtype for names, leaf in _leaves(abstract)}
    stacked = sharding.with_shardings(jax.eval_shape(functools.partial(Transformer, config), jax.random.key(0)), mesh)
    layers = range(config.moe_layers)

    def places(names: tuple[str, ...]) -> list[tuple[str, ...]]:
        return [_unstacked_place(names, (layer,))[0] for layer in layers] if names[0] == "moe_blocks" else [names]

    cast = {
        names: jax.ShapeDtypeStruct(leaf.shape, dtypes[places(names)[0]], sharding=leaf.sharding)
        for names, leaf in _leaves(stacked)
    }
    restored = checkpoint.restore_params(path, _filled(stacked, cast))
    arrays = {}
    for names, leaf in _leaves(restored):
        if names[0] != "moe_blocks":
            arrays[names] = leaf
            continue
        arrays |= {place: leaf[layer] for layer, place in zip(layers, places(names), strict=True)}
        jax.block_until_ready([arrays[place] for place in places(names)])
        leaf.delete()
    return _filled(abstract, arrays), tokenizer


# --- abstract models -------------------------------------------------------------------------------------------------


def _chosen(mesh, config: ModelConfig) -> Mesh | None:
    return mesh if mesh is None or isinstance(mesh, Mesh) else mesh(config)


def _abstract(config: ModelConfig, dtype: str | None) -> Transformer:
    """The unstacked model with `jax.ShapeDtypeStruct` in place of every array."""

    def make(key):
        return Transformer(config, key).unstacked(dtype)

    return jax.eval_shape(make, jax.random.key(0))


def _leaves(tree) -> Iterator[tuple[tuple[str, ...], jax.Array | jax.ShapeDtypeStruct]]:
    """Every array of a tree with its names, as `checkpoint.to_dict` nests them."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(checkpoint.to_dict(tree)):
        yield tuple(key.key for key in path), leaf


def _filled(like, arrays: dict[tuple[str, ...], object]):
    """A tree of the structure of `like` with these arrays, by name."""
    named = jax.tree_util.tree_map_with_path(
        lambda path, _: arrays[tuple(key.key for key in path)], checkpoint.to_dict(like)
    )
    return checkpoint.from_dict(like, named)
