"""What collectives that CPUs lack do, by ones they have."""

import jax
import jax.numpy as jnp


def ragged_all_to_all(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """`jax.lax.ragged_all_to_all` as its documentation says; NaN everywhere if sender and receiver disagree."""
    everyone = jax.lax.all_gather((operand, input_offsets, send_sizes, output_offsets), axis_name)
    operand_P, input_PP, send_PP, output_PP = everyone
    me, agreed = jax.lax.axis_index(axis_name), True
    for source in range(send_PP.shape[0]):
        size, row = send_PP[source, me], jnp.arange(output.shape[0]) - output_PP[source, me]
        agreed &= (size == recv_sizes[source]) & (size >= 0) & (output_PP[source, me] + size <= output.shape[0])
        agreed &= input_PP[source, me] + size <= operand.shape[0]
        sent = operand_P[source].at[input_PP[source, me] + row].get(mode="clip")
        output = jnp.where(((row >= 0) & (row < size))[:, None], sent, output)
    return jnp.where(agreed, output, jnp.nan)
