"""The values that travel between the rooms; all are pytrees."""

import dataclasses

import jax


def pytree(cls):
    """A frozen dataclass whose every field is a pytree child."""
    cls = dataclasses.dataclass(frozen=True)(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    return jax.tree_util.register_dataclass(cls, data_fields=names, meta_fields=[])


@pytree
class Batch:
    """Packed rows. Padding has segment 0 and weight 0; documents of a row have segments 1, 2, ..."""

    tokens_BT: jax.Array  # int32
    targets_BT: jax.Array  # int32: the token that follows, in the same document
    weights_BT: jax.Array  # float32: weight of the loss of predicting the target
    segments_BT: jax.Array  # int32
    positions_BT: jax.Array  # int32: position inside the document
    bytes_BT: jax.Array  # int32: UTF-8 bytes of the target's text (0 for special tokens), for bits per byte


@pytree
class MoEStats:
    """What one MoE layer did with one batch; with a leading layer axis after the scan over layers."""

    load_E: jax.Array  # float32: assignments computed per routed expert, after dropping
    assignments: jax.Array  # float32: (token, expert) pairs chosen, before dropping
    dropped: jax.Array  # float32: pairs dropped
    sends: jax.Array  # float32: (token, group) pairs: hidden states that would cross to a device group
    crossed: jax.Array  # float32: hidden states that went from one device of the mesh to another to reach their experts
    balance_3: jax.Array  # float32: expert, device, communication losses, summed over sequences, coefficients included
    sequences: jax.Array  # float32: sequences (packed rows with any token) the balance losses are summed over
