"""Every setting of the project, as frozen nested dataclasses that are checked once, when they are made.

`ml_collections.ConfigDict` lives at the command line only; `parse` turns its plain nested dicts into these classes.
"Off" is `None`. Meshes, devices and paths of a run never enter `ModelConfig`.
"""

import dataclasses
from dataclasses import dataclass


class ConfigError(ValueError):
    """A setting is missing, unknown or impossible; the message names the field, the value and the remedy."""


class DataError(ValueError):
    """The data, not a setting, is at fault; the message names the file and the remedy."""


def check(condition: bool, field: str, value, must: str) -> None:
    """Raise `ConfigError` naming `field` and `value` unless `condition` holds; `must` says what would be accepted."""
    if not condition:
        raise ConfigError(f"{field}={value!r}: must {must}")


def _positive(config, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        check(value is not None and value > 0, f"{type(config).__name__}.{name}", value, "be positive")


# --- the model -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class YarnConfig:
    """YaRN context extension of the rotary part (arXiv 2309.00071; DeepSeek-V2 report, section 3.1.4)."""

    factor: float  # s: how many times longer than the original length
    original_length: int = 4096
    beta_slow: float = 1.0  # alpha of the report: rotations below which a frequency is fully interpolated
    beta_fast: float = 32.0  # beta of the report: rotations above which a frequency is kept
    mscale: float = 0.707  # numerator of the cos/sin factor
    mscale_all_dim: float = 0.707  # its denominator, and the one that scales the softmax

    def __post_init__(self):
        _positive(self, "original_length", "beta_slow")
        check(self.factor >= 1, "YarnConfig.factor", self.factor, "be at least 1")
        check(self.beta_fast > self.beta_slow, "YarnConfig.beta_fast", self.beta_fast, "exceed beta_slow")
        for name in ("mscale", "mscale_all_dim"):
            check(getattr(self, name) >= 0, f"YarnConfig.{name}", getattr(self, name), "not be negative")


def _check_rope(config, rotary: str) -> None:
    name = type(config).__name__
    check(getattr(config, rotary) % 2 == 0, f"{name}.{rotary}", getattr(config, rotary), "be even: it rotates in pairs")
    check(config.rope_theta > 1, f"{name}.rope_theta", config.rope_theta, "exceed 1")


@dataclass(frozen=True)
class MLAConfig:
    """Multi-head Latent Attention (report, section 2.1)."""

    heads: int  # n_h
    nope_dim: int  # d_h: width of the un-rotated query and key of a head
    rope_dim: int  # d_R: width of the rotary query of a head and of the one shared rotary key
    value_dim: int  # d_v
    kv_latent: int  # d_c
    q_latent: int | None  # d_c'; None: queries are not compressed (V2-Lite)
    rope_theta: float = 10000.0
    yarn: YarnConfig | None = None
    kind: str = "mla"

    def __post_init__(self):
        _positive(self, "heads", "nope_dim", "rope_dim", "value_dim", "kv_latent")
        check(self.kind == "mla", "MLAConfig.kind", self.kind, "be 'mla'")
        check(self.q_latent is None or self.q_latent > 0, "MLAConfig.q_latent", self.q_latent, "be positive, or None")
        _check_rope(self, "rope_dim")

    @property
    def qk_dim(self) -> int:
        return self.nope_dim + self.rope_dim


@dataclass(frozen=True)
class GQAConfig:
    """Grouped-query attention, the report's baseline: `kv_heads` = `heads` is MHA, `kv_heads` = 1 is MQA."""

    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float = 10000.0
    yarn: YarnConfig | None = None
    kind: str = "gqa"

    def __post_init__(self):
        _positive(self, "heads", "kv_heads", "head_dim")
        check(self.kind == "gqa", "GQAConfig.kind", self.kind, "be 'gqa'")
        check(self.heads % self.kv_heads == 0, "GQAConfig.kv_heads", self.kv_heads, f"divide heads={self.heads}")
        _check_rope(self, "head_dim")

    @property
    def qk_dim(self) -> int:
        return self.head_dim


@dataclass(frozen=True)
class BalanceConfig:
    """Coefficients of the balance losses (report, section 2.2.3). None switches one off, and the trainer says so."""

    expert: float | None  # alpha_1
    device: float | None  # alpha_2
    communication: float | None  # alpha_3

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            ok = value is None or value > 0
            check(ok, f"BalanceConfig.{field.name}", value, "be positive; None switches the loss off")


@dataclass(frozen=True)
class DroppingConfig:
    """Device-level token dropping in training (report, section 2.2.4); budgets are per device group and sequence."""

    capacity_factor: float = 1.0  # budget of a group = ceil(factor * T * K / groups) assignments
    protected_share: float = 0.1  # share of the sequences whose tokens are never dropped

    def __post_init__(self):
        _positive(self, "capacity_factor")
        ok = 0 <= self.protected_share <= 1
        check(ok, "DroppingConfig.protected_share", self.protected_share, "lie between 0 and 1")


@dataclass(frozen=True)
class MoEConfig:
    """DeepSeekMoE (report, section 2.2)."""

    routed_experts: int  # N_r
    shared_experts: int  # N_s
    experts_per_token: int  # K_r
    expert_width: int
    balance: BalanceConfig
    groups: int = 1  # D: device groups of the routed experts; 1 is plain top-K
    groups_kept: int = 1  # M: at most this many groups receive one token
    routed_scaling: float = 1.0  # multiplies the gates where they are not renormalised
    normalize_gates: bool = False  # divide the chosen gates by their sum
    dropping: DroppingConfig | None = None

    def __post_init__(self):
        _positive(self, "routed_experts", "experts_per_token", "expert_width", "groups", "groups_kept")
        _positive(self, "routed_scaling")
        check(self.shared_experts >= 0, "MoEConfig.shared_experts", self.shared_experts, "not be negative")
        ok = self.routed_experts % self.groups == 0
        check(ok, "MoEConfig.groups", self.groups, f"divide routed_experts={self.routed_experts}")
        ok = self.groups_kept <= self.groups
        check(ok, "MoEConfig.groups_kept", self.groups_kept, f"not exceed groups={self.groups}")
        reachable = self.groups_kept * self.routed_experts // self.groups
        ok = self.experts_per_token <= reachable
        check(ok, "MoEConfig.experts_per_token", self.experts_per_token, f"not exceed the {reachable} experts kept")

    @property
    def experts_per_group(self) -> int:
        return self.routed_experts // self.groups


REMAT_POLICIES = ("none", "dots", "full")
DTYPES = ("float32", "bfloat16")
TRANSPORTS = ("auto", "stepwise", "ragged")
IMPLEMENTATIONS = {  # of every op of kernels_pallas, in the order in which "auto" tries them
    "expert_ffn": ("composed", "xla", "reference"),
    "grouped_matmul": ("tpu", "gpu", "xla", "reference"),
    "token_dispatch": ("tpu", "xla", "reference"),
    "flash_attention": ("tpu", "gpu", "xla", "reference"),
    "latent_attention": ("tpu", "gpu", "xla", "reference"),
}


@dataclass(frozen=True)
class ComputeConfig:
    """How the model is computed; nothing here changes what it computes, beyond rounding."""

    dtype: str = "bfloat16"  # of activations and of the weights as they are used; masters stay float32
    remat: str = "full"  # what a block keeps for its backward pass: "none" keeps all, "dots" matmuls, "full" its input
    unroll: int = 1  # MoE layers per step of the scan over them: more compile longer and copy less
    loss_chunk: int = 256  # positions of each sequence whose logits are held at once
    expert_ffn: str = "auto"  # one of IMPLEMENTATIONS, or "auto"; so are the following
    grouped_matmul: str = "auto"
    token_dispatch: str = "auto"
    flash_attention: str = "auto"
    latent_attention: str = "auto"
    # On a mesh: how hidden states reach the devices of their experts. "stepwise" permutes, which overlap with compute;
    # "ragged" sends the exact bytes in one step, on TPU and GPU only; "auto" is stepwise.
    expert_transport: str = "auto"
    expert_slack: float = 1.25  # rows from one device to another at once, over the even share; others follow after
    expert_chunk: int = 16384  # (token, expert) rows that a device computes at once

    def __post_init__(self):
        _positive(self, "unroll", "loss_chunk", "expert_slack", "expert_chunk")
        check(self.dtype in DTYPES, "ComputeConfig.dtype", self.dtype, f"be one of {', '.join(DTYPES)}")
        check(self.remat in REMAT_POLICIES, "ComputeConfig.remat", self.remat, f"be one of {', '.join(REMAT_POLICIES)}")
        ok = self.expert_transport in TRANSPORTS
        check(ok, "ComputeConfig.expert_transport", self.expert_transport, f"be one of {', '.join(TRANSPORTS)}")
        for op, names in IMPLEMENTATIONS.items():
            name, known = getattr(self, op), ("auto", *names)
            check(name in known, f"ComputeConfig.{op}", name, f"be one of {', '.join(known)}")


@dataclass(frozen=True)
class ModelConfig:
    """One DeepSeek-V2 shaped transformer (report, sections 2 and 3.1.2)."""

    vocab_size: int
    layers: int
    dim: int
    dense_layers: int  # how many first layers have a dense FFN; the others are MoE
    dense_width: int
    attention: MLAConfig | GQAConfig
    moe: MoEConfig | None  # None: every layer is dense
    max_length: int  # longest sequence the rotary embedding is meant for
    norm_eps: float = 1e-6
    init_std: float = 0.006
    compute: ComputeConfig = ComputeConfig()

    def __post_init__(self):
        _positive(self, "vocab_size", "layers", "dim", "dense_width", "max_length", "norm_eps", "init_std")
        most = self.layers if self.moe is None else self.layers - 1
        least = self.layers if self.moe is None else 0
        must = f"equal layers={self.layers} without moe" if self.moe is None else f"lie in 0..{most}"
        check(least <= self.dense_layers <= most, "ModelConfig.dense_layers", self.dense_layers, must)

    @property
    def moe_layers(self) -> int:
        return self.layers - self.dense_layers


# --- training --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warmup and step decay (report, section 3.1.2)."""

    peak_lr: float
    warmup_steps: int = 2000
    decay_at: tuple[float, ...] = (0.6, 0.9)  # shares of the run's sequences after which the rate is multiplied ...
    decay_factor: float = 0.316  # ... by this
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # of matrices only
    clip_norm: float | None = 1.0

    def __post_init__(self):
        _positive(self, "peak_lr", "decay_factor", "eps")
        check(self.warmup_steps >= 0, "OptimizerConfig.warmup_steps", self.warmup_steps, "not be negative")
        ok = all(0 < share < 1 for share in self.decay_at) and list(self.decay_at) == sorted(self.decay_at)
        check(ok, "OptimizerConfig.decay_at", self.decay_at, "be rising shares between 0 and 1")
        for name in ("b1", "b2"):
            check(0 <= getattr(self, name) < 1, f"OptimizerConfig.{name}", getattr(self, name), "lie in [0, 1)")
        check(self.weight_decay >= 0, "OptimizerConfig.weight_decay", self.weight_decay, "not be negative")
        ok = self.clip_norm is None or self.clip_norm > 0
        check(ok, "OptimizerConfig.clip_norm", self.clip_norm, "be positive, or None")


@dataclass(frozen=True)
class BatchRampConfig:
    """Batch size grown in equal stages over the first sequences of the run (report: 2304 to 9216 over 225B tokens)."""

    start: int  # sequences a step at the beginning
    sequences: int  # the full batch size is reached after this many sequences
    stages: int = 4  # distinct batch sizes before the full one

    def __post_init__(self):
        _positive(self, "start", "sequences", "stages")


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 500  # steps
    keep_last: int = 3
    keep_every: int | None = None  # steps; checkpoints at its multiples are kept for good

    def __post_init__(self):
        _positive(self, "every", "keep_last")
        ok = self.keep_every is None or self.keep_every > 0
        check(ok, "CheckpointConfig.keep_every", self.keep_every, "be positive, or None")


@dataclass(frozen=True)
class EvaluationConfig:
    every: int = 500  # steps
    batches: int | None = None  # None: the whole held-out set

    def __post_init__(self):
        _positive(self, "every")
        check(
            self.batches is None or self.batches > 0, "EvaluationConfig.batches", self.batches, "be positive, or None"
        )


@dataclass(frozen=True)
class ProfileConfig:
    """A profiler trace of a few steps, for XProf or Perfetto."""

    start: int
    steps: int = 3

    def __post_init__(self):
        _positive(self, "start", "steps")


@dataclass(frozen=True)
class TrainConfig:
    steps: int
    sequence_length: int
    batch_size: int  # sequences a step
    optimizer: OptimizerConfig
    microbatch_size: int | None = None  # sequences computed at once, gradients accumulated; None: the whole batch
    batch_ramp: BatchRampConfig | None = None
    seed: int = 0
    log_every: int = 10  # steps
    max_bad_steps: int = 10  # non-finite steps in a row before the run stops
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig | None = EvaluationConfig()
    profile: ProfileConfig | None = None

    def __post_init__(self):
        _positive(self, "steps", "sequence_length", "batch_size", "log_every", "max_bad_steps")
        micro = self.batch_size if self.microbatch_size is None else self.microbatch_size
        check(0 <= self.seed < 2**32, "TrainConfig.seed", self.seed, "lie between 0 and 2**32 - 1")
        ok = micro > 0 and self.batch_size % micro == 0
        check(ok, "TrainConfig.microbatch_size", self.microbatch_size, f"divide batch_size={self.batch_size}")
        if self.batch_ramp:
            ok = self.batch_ramp.start <= self.batch_size and self.batch_ramp.start % micro == 0
            must = f"not exceed batch_size={self.batch_size} and be a multiple of microbatch_size={micro}"
            check(ok, "BatchRampConfig.start", self.batch_ramp.start, must)


# --- data ------------------------------------------------------------------------------------------------------------

FORMATS = ("text", "jsonl", "parquet", "arrayrecord")


@dataclass(frozen=True)
class SourceConfig:
    """Files of one kind. A document is a line of JSONL, a row of Parquet, an ArrayRecord record, or a text file,
    long ones cut at line ends into pieces of about 32 KiB."""

    name: str
    paths: tuple[str, ...]  # files or globs ("**" too); the one word "stdlib" is the source of Python's own library
    weight: float = 1.0  # relative share of the documents drawn
    format: str | None = None  # None: told from the file ending (.jsonl, .parquet, .arrayrecord, all others text)
    text_field: str = "text"  # JSONL key or Parquet column

    def __post_init__(self):
        check(len(self.paths) > 0, "SourceConfig.paths", self.paths, "name at least one file or glob")
        ok = self.name.replace("_", "").replace("-", "").isalnum()
        check(ok, "SourceConfig.name", self.name, "be letters, digits, '-' and '_' (it names a folder)")
        check(self.weight > 0, "SourceConfig.weight", self.weight, "be positive")
        ok = self.format is None or self.format in FORMATS
        check(ok, "SourceConfig.format", self.format, f"be None or one of {', '.join(FORMATS)}")


@dataclass(frozen=True)
class DedupConfig:
    """Exact and MinHash near-duplicate removal (Broder 1997; as in the Gopher and GPT-3 reports)."""

    threshold: float = 0.8  # Jaccard similarity of word n-grams above which a document counts as a duplicate
    permutations: int = 128
    ngram: int = 5

    def __post_init__(self):
        check(0 < self.threshold < 1, "DedupConfig.threshold", self.threshold, "lie between 0 and 1")
        _positive(self, "permutations", "ngram")


@dataclass(frozen=True)
class DataConfig:
    sources: tuple[SourceConfig, ...]
    tokenizer: str | None = None  # a tokenizer.json; None: one is trained on the sources and kept in the run folder
    held_out_share: float = 0.02  # of the documents, chosen by a hash of their text
    quality_filters: tuple[str, ...] = ()  # rule names of data/filters.py, or ("all",)
    blocked_terms: str | None = None  # a text file, one term a line; documents with any of them are left out
    dedup: DedupConfig | None = None
    malformed_share: float = 0.01  # share of malformed records above which preparing stops with their list
    virtual_shards: int = 16  # the data order depends on this number, never on the number of processes or workers
    workers: int = 0  # processes that pack ahead of the trainer; 0: a thread
    seed: int = 0

    def __post_init__(self):
        names = [source.name for source in self.sources]
        check(len(names) > 0, "DataConfig.sources", self.sources, "name at least one source")
        check(len(set(names)) == len(names), "DataConfig.sources", names, "have distinct names")
        check(0 < self.held_out_share < 1, "DataConfig.held_out_share", self.held_out_share, "lie between 0 and 1")
        check(0 <= self.malformed_share <= 1, "DataConfig.malformed_share", self.malformed_share, "lie between 0 and 1")
        _positive(self, "virtual_shards")
        for name in ("workers", "seed"):
            check(getattr(self, name) >= 0, f"DataConfig.{name}", getattr(self, name), "not be negative")


@dataclass(frozen=True)
class ExperimentConfig:
    """All of a training run but where it is kept."""

    model: ModelConfig
    train: TrainConfig
    data: DataConfig
    mesh: str | None = None  # "fsdp=16,expert=8": devices along each axis (sharding.py); None: one, or a CPU's cores

    def __post_init__(self):
        length, most = self.train.sequence_length, self.model.max_length
        check(length <= most, "TrainConfig.sequence_length", length, f"not exceed ModelConfig.max_length={most}")
