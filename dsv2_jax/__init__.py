"""DeepSeek-V2 in JAX. The names of `__all__` are imported when first used: `import dsv2_jax` alone is immediate."""

import importlib

_PUBLIC = {
    "ConfigError": "config.ConfigError",
    "ExperimentConfig": "config.ExperimentConfig",
    "ModelConfig": "config.ModelConfig",
    "Sampling": "inference.sampling.Sampling",
    "Tokenizer": "data.tokenizer.Tokenizer",
    "Transformer": "model.transformer.Transformer",
    "from_pretrained": "hf.pretrained.from_pretrained",
    "generate": "inference.text.generate",
    "preset": "presets.get",
    "pretrain": "train.loop.train",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")
    module, _, attribute = _PUBLIC[name].rpartition(".")
    return getattr(importlib.import_module(f"{__name__}.{module}"), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
