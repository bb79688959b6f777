"""AdamW, its learning rate, and the batch size over a run (report, section 3.1.2).

The report gives its schedules in tokens. They are kept here in sequences, an exact integer that a change of the batch
size does not disturb: 8.1T tokens are 2.0e9 sequences of 4096.
"""

import bisect
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from dsv2_jax.config import OptimizerConfig, TrainConfig, check

# --- batch size ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BatchSchedule:
    """The batch size of every step: stage i begins at `first_step[i]`, `first_sequence[i]` sequences into the run."""

    first_step: tuple[int, ...]
    first_sequence: tuple[int, ...]
    size: tuple[int, ...]

    def size_at(self, step: int) -> int:
        """Sequences in step `step`, counted from 0."""
        return self.size[self._stage(step)]

    def sequences_at(self, step: int) -> int:
        """Sequences consumed before step `step`."""
        stage = self._stage(step)
        return self.first_sequence[stage] + (step - self.first_step[stage]) * self.size[stage]

    def _stage(self, step: int) -> int:
        return bisect.bisect_right(self.first_step, step) - 1


def batch_schedule(config: TrainConfig) -> BatchSchedule:
    """Stages of equal length from `batch_ramp.start` towards `batch_size`, sizes rounded down to whole microbatches.

    A stage ends with the first step that reaches its share of `batch_ramp.sequences`.
    """
    ramp, full = config.batch_ramp, config.batch_size
    if ramp is None:
        return BatchSchedule((0,), (0,), (full,))
    micro = config.microbatch_size or full
    steps, sequences, sizes = [], [], []
    step = consumed = 0
    for stage in range(ramp.stages):
        size = (ramp.start + (full - ramp.start) * stage // ramp.stages) // micro * micro
        steps.append(step)
        sequences.append(consumed)
        sizes.append(size)
        length = max(math.ceil((ramp.sequences * (stage + 1) / ramp.stages - consumed) / size), 0)
        step += length
        consumed += length * size
    return BatchSchedule((*steps, step), (*sequences, consumed), (*sizes, full))


def total_sequences(config: TrainConfig) -> int:
    """Sequences of the whole run."""
    total = batch_schedule(config).sequences_at(config.steps)
    check(total < 2**31, "TrainConfig.steps", config.steps, f"keep the run's {total} sequences below 2^31")
    return total


# --- learning rate ---------------------------------------------------------------------------------------------------


def learning_rate(config: TrainConfig):
    """The function (sequences before the step, sequences of the step) -> learning rate, both int32, traceable.

    Warmup is linear in the sequences consumed, those of the step itself included: the last warmup step has the peak.
    Each share in `decay_at` of the run's sequences, once consumed, multiplies the rate by `decay_factor`.
    """
    optimizer = config.optimizer
    warmup = batch_schedule(config).sequences_at(optimizer.warmup_steps)
    total = total_sequences(config)
    decays = np.asarray([math.ceil(round(share * total, 3)) for share in optimizer.decay_at], np.int32)

    def schedule(before, size):
        rising = jnp.minimum((before + size) / max(warmup, 1), 1.0)
        return optimizer.peak_lr * rising * optimizer.decay_factor ** jnp.sum(before >= decays)

    return schedule


# --- update ----------------------------------------------------------------------------------------------------------


def decay_mask(params):
    """True for the parameters that weight decay applies to: matrices, embeddings included; norm scales are vectors.

    Decided by a parameter's logical axes, not its shape: arrays scanned over layers carry one axis more.
    """

    def mask(parameter: nnx.Variable):
        return jax.tree.map(lambda _: len(parameter.get_metadata("axes")) >= 2, parameter)

    return jax.tree.map(mask, params, is_leaf=lambda x: isinstance(x, nnx.Variable))


def adamw(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW with float32 moments; without its learning rate and sign.

    The step of a parameter p with update u is p - lr u, where u = m / (sqrt(v) + eps) + weight_decay p.
    """
    return optax.chain(
        optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=jnp.float32),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
    )


def apply_adamw(config: OptimizerConfig, gradients, norm, rate, finite, model, moments):
    """(model, moments) after a step of `adamw(config)` with learning rate `rate`; as they were unless `finite`.

    It is what optax computes, in fewer passes over memory, which are all that an optimizer costs. Parameters move by
    the moments that are kept. Were those chosen after optax's update, XLA on CPUs would compute them twice, the second
    time from copies of the old ones, whose place the new ones take.

    Args:
      gradients: their sum, not clipped, with the global `norm`.
      moments: of `adamw(config).init(model)`.
    """
    clipped, adam, decayed = moments
    scale = 1.0 if config.clip_norm is None else jnp.minimum(1.0, config.clip_norm / norm)
    count = jnp.where(finite, adam.count + 1, adam.count)

    def averaged(old, decay, power):
        def average(old, g):
            return jnp.where(finite, decay * old + (1 - decay) * (scale * g) ** power, old)

        return jax.tree.map(average, old, gradients)

    mu, nu = averaged(adam.mu, config.b1, 1), averaged(adam.nu, config.b2, 2)
    mu_scale, nu_scale = 1 / (1 - config.b1**count), 1 / (1 - config.b2**count)

    def update(p, m, v, decays):
        u = m * mu_scale / (jnp.sqrt(v * nu_scale) + config.eps) + (config.weight_decay if decays else 0.0) * p
        return jnp.where(finite, p - rate * u, p)

    model = jax.tree.map(update, model, mu, nu, decay_mask(model))
    return model, (clipped, adam._replace(count=count, mu=mu, nu=nu), decayed)
