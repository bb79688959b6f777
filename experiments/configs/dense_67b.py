"""DeepSeek 67B, the dense model the report compares V2 with (GQA with 8 groups of heads).

Source: the DeepSeek LLM report (arXiv 2401.02954), section 2: 2T tokens in sequences of 4096; AdamW at a peak of
3.2e-4, 2000 warmup steps, multiplied by 0.316 after 80% and 90% of the tokens; batches of 4608 sequences.
Expected: 2.7 times V2's training FLOPs per token (experiments/describe.py); MMLU 71.3 (5-shot).

The data are yours: --config.data.sources.0.paths='/corpus/*.parquet'. The 64 sequences computed at once are one for
each device of v5p:4x4x4 with --config.mesh=fsdp=64.
"""

from ml_collections import ConfigDict

from dsv2_jax import config_io, presets

SEQUENCE, BATCH = 4096, 4608


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            model=config_io.to_dict(presets.get("dense_67b")),
            train=dict(
                steps=2000 * 10**9 // (SEQUENCE * BATCH),
                sequence_length=SEQUENCE,
                batch_size=BATCH,
                microbatch_size=64,
                optimizer=dict(peak_lr=3.2e-4, warmup_steps=2000, decay_at=(0.8, 0.9), decay_factor=0.316),
                checkpoint=dict(every=500, keep_every=10_000),
            ),
            data=dict(
                sources=(dict(name="corpus", paths=()),),
                quality_filters=("all",),
                dedup=dict(),
                virtual_shards=128,  # the processes share them out evenly; one drives four chips
            ),
        )
    )
