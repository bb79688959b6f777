"""The whole architecture in miniature on the source of Python's own library: what experiments/quickstart.py runs.

Source: the `tiny` preset; the recipe of the DeepSeek-V2 report (section 3.1.2) with its lengths scaled down.
Expected: under 3 minutes on two CPU cores; held-out bits per byte at most 0.6 of a unigram model's.
"""

from ml_collections import ConfigDict

from dsv2_jax import config_io, presets


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            model=config_io.to_dict(presets.get("tiny")),
            train=dict(
                steps=300,
                sequence_length=256,
                batch_size=16,
                optimizer=dict(peak_lr=3e-3, warmup_steps=30),
                checkpoint=dict(every=100),
                evaluation=dict(every=100, batches=20),
            ),
            data=dict(sources=(dict(name="stdlib", paths=("stdlib",)),)),
        )
    )
