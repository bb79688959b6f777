"""DeepSeek-V2, 236B parameters of which 21B are active, as pre-trained.

Source: the DeepSeek-V2 report (arXiv 2405.04434), section 3.1.2: 8.1T tokens in sequences of 4096; AdamW at a peak
of 2.4e-4, 2000 warmup steps, multiplied by 0.316 after 60% and 90% of the tokens; batches of 2304 growing to 9216
sequences over the first 225B tokens; balance coefficients 0.003, 0.05, 0.02; token dropping at capacity factor 1, 10%
of the sequences protected.
Expected, with the report's data: MMLU 78.5 (5-shot), Pile test 0.606 bits per byte.

The data are yours: --config.data.sources.0.paths='/corpus/*.parquet'. The 128 sequences computed at once are one for
each device of v5p:4x4x8 with --config.mesh=fsdp=16,expert=8, in 32 processes.
"""

from ml_collections import ConfigDict

from dsv2_jax import config_io, presets

SEQUENCE = 4096
RAMP = 225 * 10**9 // SEQUENCE  # sequences
SIZES = (2304, 4608, 6912)  # of the ramp's three stages; then 9216
STEPS = sum(RAMP // 3 // size for size in SIZES) + (8100 * 10**9 // SEQUENCE - RAMP) // 9216


def get_config() -> ConfigDict:
    model = config_io.to_dict(presets.get("v2"))
    model["moe"]["dropping"] = dict(capacity_factor=1.0, protected_share=0.1)
    return ConfigDict(
        dict(
            model=model,
            train=dict(
                steps=STEPS,
                sequence_length=SEQUENCE,
                batch_size=9216,
                microbatch_size=128,
                batch_ramp=dict(start=2304, sequences=RAMP, stages=3),
                optimizer=dict(peak_lr=2.4e-4, warmup_steps=2000, decay_at=(0.6, 0.9), decay_factor=0.316),
                checkpoint=dict(every=500, keep_every=10_000),
            ),
            data=dict(
                sources=(dict(name="corpus", paths=()),),
                quality_filters=("all",),
                dedup=dict(),
                virtual_shards=512,  # the processes share them out evenly; one drives four chips
            ),
        )
    )
