"""The released tensors and ours: one table, read in both directions.

Released matrices are [out, in], ours [in, out] with heads on an axis of their own: every layout change is a transpose
and a reshape. Both keep rotary pairs interleaved, (x0, x1), (x2, x3), ..., and both hold [q_C; q_R]
and [k_C; v_C] head by head: no row changes its place.
"""

import itertools
import math
import re
from dataclasses import dataclass

import numpy as np

from dsv2_jax.config import ConfigError, MLAConfig, ModelConfig
from dsv2_jax.hf.safetensors import FP8, SCALE, FolderError

DTYPES = ("bfloat16", "float16", "float32", "float8_e4m3fn")
EMBEDDING, UNEMBEDDING = "model.embed_tokens.weight", "lm_head.weight"
BLOCK = 128  # rows and columns that are transposed at once
BAND = 2 * 2**20  # bytes of a released tensor that are read at once
FINITE = 2**16  # numbers that are looked at together
ROTARY = re.compile(r"model\.layers\.(\d+)\.self_attn\.rotary_emb\.inv_freq")
FUSED_EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


def transpose(matrix: np.ndarray, result: np.ndarray) -> None:
    """`result[:] = matrix.T`, block by block: NumPy's own walks through memory and is many times slower."""
    word = f"uint{8 * matrix.itemsize}"  # NumPy has no fast loops for bfloat16
    source, result = matrix.view(word), result.view(word)
    for row, column in itertools.product(*(range(0, size, BLOCK) for size in source.shape)):
        part = slice(row, row + BLOCK), slice(column, column + BLOCK)
        result[part[::-1]] = source[part].T


@dataclass(frozen=True)
class Entry:
    """One released tensor and its place: `target` names an array of `checkpoint.to_dict(model)`, stacked as scanned."""

    source: str  # key in the released folder
    target: tuple[str, ...]
    index: tuple[int, ...]  # along the leading axes of the target: MoE layer, then expert; () for the whole array
    axes: tuple[tuple[int, ...], ...]  # of target[index]; a group (heads, width) is one axis as released
    transposed: bool  # released as [out, in], ours [in, out]

    @property
    def shape(self) -> tuple[int, ...]:
        """As released."""
        widths = tuple(math.prod(group) for group in self.axes)
        return widths[::-1] if self.transposed else widths

    @property
    def our_shape(self) -> tuple[int, ...]:
        """Of `target[index]`."""
        return sum(self.axes, ())

    def to_ours(self, published: np.ndarray) -> np.ndarray:
        """A view of shape `our_shape` of an array of shape `shape`."""
        return (published.T if self.transposed else published).reshape(self.our_shape)

    def to_published(self, ours: np.ndarray) -> np.ndarray:
        """A view of shape `shape` of a contiguous array of shape `our_shape`."""
        return ours.reshape(self.shape[::-1]).T if self.transposed else ours.reshape(self.shape)

    def read(self, read, index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
        """`target[self.index][index]` in `dtype`, through `read(key, slices)` of the released folder.

        Nothing is read that is not asked for, but that of a group whole heads are read; and band by band, so that the
        released tensor is not held beside ours.
        """
        parts = iter(range(size)[part] for size, part in zip(self.our_shape, index, strict=True))
        published, shape, inside = [], [], []
        for _, *inner in self.axes:
            first, width = next(parts), math.prod(inner)
            published.append(slice(first.start * width, first.stop * width))
            shape += [len(first), *inner]
            inside += [slice(None), *(slice(part.start, part.stop) for part in itertools.islice(parts, len(inner)))]
        rows, *columns = published[::-1] if self.transposed else published
        sizes = [part.stop - part.start for part in (rows, *columns)]
        values = np.empty(sizes[::-1] if self.transposed else sizes, dtype)
        height = max(BLOCK, BAND // (4 * max(1, math.prod(sizes[1:]))) // BLOCK * BLOCK)
        for first in range(0, sizes[0], height):
            last = min(first + height, sizes[0])
            band = read(self.source, (slice(rows.start + first, rows.start + last), *columns))
            band = band.astype(dtype, copy=False)
            if self.transposed:
                transpose(band, values[:, first:last])
            else:
                values[first:last] = band
        return values.reshape(shape)[tuple(inside)]


def is_finite(values: np.ndarray) -> bool:
    """Of bfloat16 or float32: no exponent is all ones. (NumPy's own test converts bfloat16 first.)"""
    exponent = np.uint16(0x7F80) if values.dtype.itemsize == 2 else np.uint32(0x7F800000)
    words = values.reshape(-1).view(exponent.dtype)
    parts = (words[first : first + FINITE] for first in range(0, words.size, FINITE))
    return all(((part & exponent) != exponent).all() for part in parts)


def read_finite(entry: Entry, folder, index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
    """`entry.read` of a `safetensors.Folder`, and `FolderError` for what is infinite or not a number."""
    values = entry.read(folder.read, index, dtype)
    if not is_finite(values):
        where = f"{folder.file(entry.source)}: {entry.source!r}"
        raise FolderError(f"{where} holds values that are not finite as {dtype}; download the file again")
    return values


def check_size(config: ModelConfig, folder) -> None:
    """Raise `FolderError` for a config.json of more layers or experts than `folder` has tensors.

    So that what is built for a model, such as `table`, is bounded by what there is of it.
    """
    counts = {"num_hidden_layers": config.layers, "n_routed_experts": config.moe.routed_experts if config.moe else 0}
    for name, count in counts.items():
        if count > (tensors := len(folder.keys())):
            where = f"{folder.listing.parent / 'config.json'}: {name}={count}"
            raise FolderError(f"{where}: {folder.listing.name} names {tensors} tensors; download both again")


def table(config: ModelConfig, tied: bool = False) -> list[Entry]:
    """Every released tensor of a model, in the order of its layers.

    `tied`: the folder has no output matrix, the embedding is read for it again (our model's are two arrays).
    Raises `ConfigError` for an attention that DeepSeek-V2 folders cannot hold.
    """
    if not isinstance(config.attention, MLAConfig):
        raise ConfigError(f"attention.kind={config.attention.kind!r}: a released DeepSeek-V2 folder holds 'mla' only")
    entries = [_plain(EMBEDDING, ("embed",), (), config.vocab_size, config.dim)]
    for layer in range(config.layers):
        entries += _layer(config, layer)
    entries.append(_plain("model.norm.weight", ("final_norm", "scale"), (), config.dim))
    unembedding = EMBEDDING if tied else UNEMBEDDING
    return [*entries, _matrix(unembedding, ("unembed",), (), (config.dim,), (config.vocab_size,))]


def _plain(source: str, target: tuple[str, ...], index: tuple[int, ...], *sizes: int) -> Entry:
    return Entry(source, target, index, tuple((size,) for size in sizes), transposed=False)


def _matrix(source: str, target: tuple[str, ...], index: tuple[int, ...], inputs: tuple, outputs: tuple) -> Entry:
    return Entry(source, target, index, (inputs, outputs), transposed=True)


def _layer(config: ModelConfig, layer: int) -> list[Entry]:
    dense = layer < config.dense_layers
    block = ("dense_blocks", str(layer)) if dense else ("moe_blocks",)
    at = () if dense else (layer - config.dense_layers,)
    attention, D = config.attention, (config.dim,)
    N, R, P = attention.heads, attention.kv_latent, attention.rope_dim
    query = (attention.q_latent or config.dim,)

    def plain(source: str, target: str, size: int) -> Entry:
        return _plain(f"model.layers.{layer}.{source}.weight", (*block, *target.split(".")), at, size)

    def matrix(source: str, target: str, inputs: tuple, outputs: tuple, *expert: int) -> Entry:
        key = f"model.layers.{layer}.{source}.weight"
        return _matrix(key, (*block, *target.split(".")), (*at, *expert), inputs, outputs)

    def swiglu(source: str, target: str, width: int, *expert: int) -> list[Entry]:
        return [
            matrix(f"{source}.gate_proj", f"{target}.gate", D, (width,), *expert),
            matrix(f"{source}.up_proj", f"{target}.up", D, (width,), *expert),
            matrix(f"{source}.down_proj", f"{target}.down", (width,), D, *expert),
        ]

    entries = [plain("input_layernorm", "attention_norm.scale", config.dim)]
    if attention.q_latent:
        entries.append(matrix("self_attn.q_a_proj", "attention.w_dq", D, query))
        entries.append(plain("self_attn.q_a_layernorm", "attention.q_norm.scale", attention.q_latent))
    q_proj = "self_attn.q_b_proj" if attention.q_latent else "self_attn.q_proj"
    entries += [
        matrix(q_proj, "attention.w_q", query, (N, attention.qk_dim)),
        matrix("self_attn.kv_a_proj_with_mqa", "attention.w_dkv", D, (R + P,)),
        plain("self_attn.kv_a_layernorm", "attention.kv_norm.scale", R),
        matrix("self_attn.kv_b_proj", "attention.w_ukv", (R,), (N, attention.nope_dim + attention.value_dim)),
        matrix("self_attn.o_proj", "attention.w_o", (N, attention.value_dim), D),
        plain("post_attention_layernorm", "ffn_norm.scale", config.dim),
    ]
    if dense:
        return entries + swiglu("mlp", "ffn", config.dense_width)
    moe = config.moe
    entries.append(matrix("mlp.gate", "ffn.centroids", D, (moe.routed_experts,)))
    for expert in range(moe.routed_experts):
        entries += swiglu(f"mlp.experts.{expert}", "ffn", moe.expert_width, expert)
    if moe.shared_experts:
        entries += swiglu("mlp.shared_experts", "ffn.shared", moe.shared_experts * moe.expert_width)
    return entries


def check(config: ModelConfig, folder, tied: bool = False) -> list[str]:
    """What keeps `folder` (see `safetensors.Folder`) from being a model of `config`: a line each, none if nothing does.

    Rotary tables (`rotary_emb.inv_freq`), which some exporters write though they follow from the configuration, and
    block scales beside their FP8 weights are no extra keys.
    """
    shapes = {entry.source: entry.shape for entry in table(config, tied)}
    present = set(folder.keys())
    problems = [f"{key}: is missing in {folder.listing.name}" for key in shapes if key not in present]
    for key, shape in shapes.items():
        if key not in present:
            continue
        where = _where(key, folder)
        if tuple(folder.shape(key)) != shape:
            problems.append(f"{where}: has shape {list(folder.shape(key))}, config.json says {list(shape)}")
        if str(folder.dtype(key)) not in DTYPES:
            problems.append(f"{where}: has dtype {folder.dtype(key)}; it must be one of {', '.join(DTYPES)}")
    extra = sorted(key for key in present - shapes.keys() if not _belongs(key, config, shapes, folder))
    return problems + [f"{_where(key, folder)}: {_extra(key, shapes, tied)}" for key in extra]


def refuse(problems: list[str], path) -> None:
    """Raise `FolderError`, in one line, if `check` found problems of the folder `path`."""
    more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
    if problems:
        raise FolderError(f"{path}: does not hold the model of its config.json: {'; '.join(problems[:5])}{more}")


def _where(key: str, folder) -> str:
    return f"{key} in {folder.file(key).name}"


def _belongs(key: str, config: ModelConfig, shapes: dict, folder) -> bool:
    """Whether a key that is no parameter says what is known without it, or is part of a parameter."""
    weight, rotary = key.removesuffix(SCALE), ROTARY.fullmatch(key)
    if rotary:
        return int(rotary[1]) < config.layers
    return weight != key and weight in shapes and folder.dtype(weight) == FP8


def _extra(key: str, shapes: dict, tied: bool) -> str:
    if tied and key == UNEMBEDDING:
        return "is there, but config.json says tie_word_embeddings=true; set it to false to use this matrix"
    if key.removesuffix(SCALE) in shapes:
        return "would scale a weight in FP8, and the weight is not; download both again"
    if key.endswith(FUSED_EXPERTS):
        return "experts are fused; save the model with transformers' save_pretrained, which writes them apart"
    return "belongs to no parameter of this model"
