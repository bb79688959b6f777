"""The shape at which experiments/benchmark.py is compared with other implementations, as a training run.

Source: the `peer_tiny` preset: V2-Lite's kind of model (plain routing, no query compression) at 4 layers, width 256.
Expected: the tokens/s of `python experiments/benchmark.py train --preset=peer_tiny --batch=8 --seq=256`; held-out bits
per byte below those of a unigram model within 200 steps.
"""

from ml_collections import ConfigDict

from dsv2_jax import config_io, presets


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            model=config_io.to_dict(presets.get("peer_tiny")),
            train=dict(
                steps=1000,
                sequence_length=256,
                batch_size=8,
                optimizer=dict(peak_lr=1e-3, warmup_steps=100),
                evaluation=dict(every=200, batches=20),
            ),
            data=dict(sources=(dict(name="stdlib", paths=("stdlib",)),)),
        )
    )
