"""Print what a model costs: parameters by part, cached elements, training and decoding FLOPs.

All is counted from abstract shapes, so that the largest model needs no memory.
"""

import common
from dsv2_jax import presets
from dsv2_jax.config import ConfigError, MLAConfig, ModelConfig

BITS = 6  # of a cached element as the report serves it (section 3.2.3), against 16


def quantity(count: float) -> str:
    """A count to five digits: 235.74 B."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f}"


def flops(count: float) -> str:
    """FLOPs to five digits: 155.31 GFLOP."""
    return f"{count / 1e9:.2f} GFLOP" if count >= 1e9 else f"{count / 1e6:.2f} MFLOP"


def summary(model: ModelConfig) -> str:
    attention, moe = model.attention, model.moe
    if isinstance(attention, MLAConfig):
        kind = f"MLA (cached latent {attention.kv_latent} + {attention.rope_dim})"
    else:
        kind = f"GQA ({attention.kv_heads} key-value heads of {attention.head_dim})"
    ffn = "dense" if moe is None else f"{moe.shared_experts} shared + {moe.routed_experts} routed experts"
    ffn += "" if moe is None else f", {moe.experts_per_token} chosen"
    return f"{model.layers} layers, width {model.dim}, {attention.heads} heads, {kind}, {ffn}"


def table(model: ModelConfig, length: int) -> str:
    from dsv2_jax.model import counting

    counts = counting.parameters(model)
    lines = [summary(model), "", f"{'parameters':<28}{'total':>12}{'share':>9}{'active per token':>20}"]
    for part, count in counts.parts.items():
        if count:
            active = "one row" if part == counting.EMBEDDING else quantity(counts.active_parts[part])
            lines.append(f"  {part:<26}{quantity(count):>12}{count / counts.total:>9.1%}{active:>20}")
    lines.append(f"  {'all':<26}{quantity(counts.total):>12}{1:>9.1%}{quantity(counts.active):>20}")
    lines.append(f"  {'all, with input embedding':<47}{quantity(counts.active_with_embedding):>20}")

    cached = counting.cached_elements_compared(model)
    own, baseline = cached["this model"], cached["DeepSeek 67B"]
    lines += ["", f"{'cached elements per token':<28}{'count':>12}{'this / it':>12}"]
    lines += [f"  {name:<26}{count:>12,}{own / count:>12.1%}" for name, count in cached.items()]
    less = 1 - own * BITS / (baseline * 16)
    more_or_less = f"{abs(less):.1%} {'less' if less >= 0 else 'more'}"
    lines.append(f"  cache at {BITS} bits an element against DeepSeek 67B's at 16: {more_or_less}")

    training = counting.training_flops_per_token(model, length)
    lines += ["", f"compute per token, length {length}"]
    lines.append(f"  {'training':<26}{flops(training):>16}")
    lines.append(f"  {'decoding':<26}{flops(counting.decode_flops_per_token(model, length)):>16}")
    return "\n".join(lines)


def main() -> None:
    parser = common.argument_parser(__doc__, "python experiments/describe.py --preset=v2")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--preset", metavar="NAME", help=f"one of {', '.join(presets.MODELS)}")
    which.add_argument("--config", metavar="FILE", help="an experiment, of which the model is described")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a sequence and of the cache (%(default)s)")
    arguments = common.parse_arguments(parser)
    if arguments.length < 1:
        parser.error(f"--length={arguments.length}: must be positive")
    if arguments.preset and arguments.overrides:
        raise ConfigError(f"--config.{arguments.overrides[0][0]} needs a --config=FILE that it changes")
    model = presets.get(arguments.preset) if arguments.preset else None
    model = model or common.load_config(arguments.config, arguments.overrides, model_only=True)
    print(f"{arguments.preset or arguments.config}: {table(model, arguments.length)}")


if __name__ == "__main__":
    common.run(main)
