"""One training step, `(state, batch) -> (state, metrics)`, and the sums of one held-out batch."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import optax

from dsv2_jax import sharding, types
from dsv2_jax.config import ExperimentConfig
from dsv2_jax.train.loss import LossParts, lm_loss
from dsv2_jax.train.optimizer import apply_adamw, learning_rate
from dsv2_jax.train.state import State, abstract_state
from dsv2_jax.types import Batch, MoEStats


@types.pytree
class StepMetrics:
    """What one step did; read one step late, so that nothing waits for it."""

    loss: jax.Array  # the objective: nll + balance; nats
    nll: jax.Array  # mean over loss tokens; nats
    balance_3: jax.Array  # expert, device, communication: mean over sequences, sum over layers, with coefficients
    bits_per_byte: jax.Array
    tokens: jax.Array  # loss tokens (their weight)
    learning_rate: jax.Array
    gradient_norm: jax.Array  # before clipping
    step: jax.Array  # steps done, this one included; the next two likewise
    bad_steps: jax.Array
    skipped: jax.Array
    moe: MoEStats | None  # sums over the batch, leading layer axis


def make_train_step(config: ExperimentConfig, mesh: jax.sharding.Mesh | None = None, run_rows=None):
    """The jitted step of `config`; it donates the state. Leaves of `batch` are [microbatches, b, T].

    On a mesh it is to be called (or lowered) inside `sharding.use(mesh)`, with a state and batches that lie where
    `abstract_state` and `Placing` say. `run_rows`: of `Placing`; rows are protected from dropping by their place in
    the run, whichever process reads them.

    The objective of the whole batch is nll / (sum of weights) + balance / (sequences). Both denominators are known
    before any microbatch is computed, so each contributes its share of that objective and the gradients add up
    exactly, however unevenly the loss tokens lie. A step whose loss or gradient norm is not finite leaves parameters
    and moments as they were and is counted.
    """
    schedule = learning_rate(config.train)
    dropping = config.model.moe.dropping if config.model.moe else None
    gradient = _gradient
    if mesh is not None and mesh.size == mesh.shape["data"] > 1:
        gradient = _over_copies(mesh)

    def train_step(state: State, batch: Batch) -> tuple[State, StepMetrics]:
        microbatches, rows, length = batch.tokens_BT.shape
        chex.assert_tree_shape_prefix(batch, (microbatches, rows, length))
        weight = jnp.maximum(jnp.sum(batch.weights_BT), 1e-9)
        sequences = jnp.maximum(jnp.sum(jnp.any(batch.segments_BT > 0, axis=-1)), 1)
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        share = dropping.protected_share if dropping else 0.0
        protected_MB = jax.random.bernoulli(key, share, (microbatches, rows)) if dropping else None
        if dropping and run_rows is not None:
            protected_MB = protected_MB[:, run_rows]

        (loss, parts), gradients = gradient(state.model, (weight, sequences), (batch, protected_MB))

        gradient_norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)
        rate = schedule(state.sequences, microbatches * rows)
        update = gradients, gradient_norm, rate, finite
        model, moments = apply_adamw(config.train.optimizer, *update, state.model, state.moments)
        bad = 1 - finite.astype(jnp.int32)
        new = State(
            model=model,
            moments=moments,
            step=state.step + 1,
            sequences=state.sequences + microbatches * rows,
            bad_steps=(state.bad_steps + 1) * bad,
            skipped=state.skipped + bad,
            key=state.key,
        )
        metrics = StepMetrics(
            loss=loss,
            nll=parts.nll_sum / weight,
            balance_3=jnp.zeros(3) if parts.moe is None else jnp.sum(parts.moe.balance_3, axis=0) / sequences,
            bits_per_byte=parts.nll_sum / jnp.log(2.0) / jnp.maximum(parts.bytes, 1),
            tokens=weight,
            learning_rate=rate,
            gradient_norm=gradient_norm,
            step=new.step,
            bad_steps=new.bad_steps,
            skipped=new.skipped,
            moe=parts.moe,
        )
        return new, metrics

    if mesh is None:
        return jax.jit(train_step, donate_argnums=0)
    state_sharding = sharding.tree_shardings(abstract_state(config), mesh)
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    batch_sharding = jax.sharding.NamedSharding(mesh, sharding.activation_spec(None, "batch", "sequence"))
    return jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(state_sharding, batch_sharding),
        out_shardings=(state_sharding, whole),
    )


def _gradient(model, totals, inputs):
    """((objective, LossParts), gradient), summed over the microbatches of `inputs`: (Batch, protected_MB or None)."""
    weight, sequences = totals

    def objective(model, micro: Batch, protected_B):
        parts = lm_loss(model, micro, training=True, protected_B=protected_B)
        balance = 0.0 if parts.moe is None else jnp.sum(parts.moe.balance_3)
        return parts.nll_sum / weight + balance / sequences, parts

    return _accumulate(functools.partial(jax.value_and_grad(objective, has_aux=True), model), inputs)


def _over_copies(mesh: jax.sharding.Mesh):
    """`_gradient` where every device has the whole model: each computes its rows, and the sums cross once a step."""
    on_cpu = mesh.devices.flat[0].platform == "cpu"

    def local(model, totals, inputs):
        if not on_cpu:
            return jax.lax.psum(_gradient(model, totals, inputs), "data")
        # Devices that are cores of one machine gain nothing by sending early, and the faster one waits each time: all
        # crosses after the last layer. The totals cannot, and are made a condition of the first layer (weight > 0): or
        # one device computes what does not need them while the other waits.
        batch, protected_MB = inputs
        batch = dataclasses.replace(batch, tokens_BT=jnp.where(totals[0] > 0, batch.tokens_BT, 0))
        return jax.lax.psum(jax.lax.optimization_barrier(_gradient(model, totals, (batch, protected_MB))), "data")

    whole, rows = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec(None, "data")
    return jax.shard_map(local, mesh=mesh, in_specs=(whole, whole, rows), out_specs=whole, check_vma=False)


def _accumulate(function, inputs):
    """The sum of `function(*slice)`, a pytree, over the leading axis of `inputs`; no buffer for a single slice."""
    if jax.tree.leaves(inputs)[0].shape[0] == 1:
        return function(*jax.tree.map(lambda x: x[0], inputs))

    def add(total, slice_):
        return jax.tree.map(jnp.add, total, function(*slice_)), None

    shapes = jax.eval_shape(lambda x: function(*jax.tree.map(lambda leaf: leaf[0], x)), inputs)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(add, zeros, inputs)[0]


@jax.jit
def evaluate_batch(model, batch: Batch) -> LossParts:
    """The sums of one held-out batch [b, T]: nothing is dropped outside training."""
    return lm_loss(model, batch, training=False)
