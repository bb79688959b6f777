"""DeepSeek-V2-Lite, 15.7B parameters of which 2.4B are active, as pre-trained.

Source: the DeepSeek-V2 report (arXiv 2405.04434), appendix B: 5.7T tokens in sequences of 4096; AdamW at a peak of
4.2e-4, 2000 warmup steps, multiplied by 0.316 after 80% and 90% of the tokens; batches of 4608 sequences; expert
balance coefficient 0.001.
Expected, with the report's data: MMLU 58.3 (5-shot), GSM8K 41.1, HumanEval 29.9.

The data are yours: --config.data.sources.0.paths='/corpus/*.parquet'. The 64 sequences computed at once fit 8 to 64
devices of 80 GB or more: v5p:2x2x2 with --config.mesh=expert=8.
"""

from ml_collections import ConfigDict

from dsv2_jax import config_io, presets

SEQUENCE, BATCH = 4096, 4608


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            model=config_io.to_dict(presets.get("v2_lite")),
            train=dict(
                steps=5700 * 10**9 // (SEQUENCE * BATCH),
                sequence_length=SEQUENCE,
                batch_size=BATCH,
                microbatch_size=64,
                optimizer=dict(peak_lr=4.2e-4, warmup_steps=2000, decay_at=(0.8, 0.9), decay_factor=0.316),
                checkpoint=dict(every=500, keep_every=10_000),
            ),
            data=dict(
                sources=(dict(name="corpus", paths=()),),
                quality_filters=("all",),
                dedup=dict(),
                virtual_shards=64,  # the processes share them out evenly; one drives four chips
            ),
        )
    )
