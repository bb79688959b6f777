"""What a run must need, from shapes and shardings alone: memory, FLOPs, bytes sent, and the time these take at least.

State bytes are exact. Traffic is the least a mesh of this shape must send: compute-dtype parameter gathers (forward,
and again where the backward pass recomputes), one reduce-scatter of the gradients, and rows sent to experts and back,
forward and backward. The embedding counts as gathered and scattered, though its rows are looked up where they lie
and only activations are sent: a step may send a little less than this. Rows to experts are those of one round, which
holds routing within `expert_slack` of even; what is above goes in further rounds. Activations and the bytes of HBM
traffic are estimates, and marked so.
"""

import dataclasses
import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv2_jax.config import MLAConfig, ModelConfig
from dsv2_jax.model import counting, exchange
from dsv2_jax.planning.hardware import GPU, Topology
from dsv2_jax.sharding import BATCH_AXES, MESH_AXES, STORAGE_AXES, MeshShape, compute_spec, parameter_spec

GRADIENT_BYTES = 4  # held in float32, as the masters are; sent in the compute dtype


@dataclass(frozen=True)
class Job:
    """One training step on a mesh: `per_device` sequences of `length` tokens for each member of the batch axes.

    That many are computed at once, in each of `microbatches`, whose gradients are added up.
    """

    model: ModelConfig
    mesh: MeshShape
    length: int
    per_device: int = 1
    microbatches: int = 1

    @property
    def devices(self) -> int:
        return math.prod(self.mesh.sizes)

    @property
    def microbatch(self) -> int:
        """Sequences computed at once."""
        return self.per_device * math.prod(getattr(self.mesh, axis) for axis in BATCH_AXES)

    @property
    def batch(self) -> int:
        """Sequences of a step."""
        return self.microbatches * self.microbatch

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def local_tokens(self) -> int:
        """Tokens whose activations one device holds at once; those that differ in `tensor` alone hold the same."""
        return self.per_device * self.length // self.mesh.context

    @property
    def abstract_mesh(self) -> jax.sharding.AbstractMesh:
        return jax.sharding.AbstractMesh(self.mesh.sizes, MESH_AXES)


@dataclass(frozen=True)
class Traffic:
    """Bytes one device sends a step, and the mesh axes along which."""

    name: str
    nbytes: float
    axes: tuple[str, ...]
    scattered: bool  # every byte to one other device (dispatch), rather than the same bytes to all (gathers)


# --- state -----------------------------------------------------------------------------------------------------------


@functools.cache
def _abstract(model: ModelConfig):
    return counting.abstract_model(model)


def _parts(spec, mesh: MeshShape) -> int:
    """Pieces into which a PartitionSpec cuts an array."""
    names = [name for part in spec for name in (part if isinstance(part, tuple) else (part,)) if name]
    return math.prod(getattr(mesh, name) for name in names)


def _variables(tree):
    """(variable, shape, dtype) of every nnx.Param; plain arrays have None for the variable."""
    for leaf in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, nnx.Variable)):
        array = jax.tree.leaves(leaf)[0]
        yield (leaf if isinstance(leaf, nnx.Variable) else None), array


def stored_bytes(tree, mesh: MeshShape) -> int:
    """Bytes of an abstract model, moments or state on one device, as `sharding.tree_shardings` lays them out."""
    abstract, total = jax.sharding.AbstractMesh(mesh.sizes, MESH_AXES), 0
    for variable, array in _variables(tree):
        spec = parameter_spec(variable.get_metadata("axes"), array.shape, abstract) if variable is not None else ()
        total += array.size // _parts(spec, mesh) * array.dtype.itemsize
    return total


# --- bytes sent ------------------------------------------------------------------------------------------------------


def traffic(job: Job) -> list[Traffic]:
    """The least bytes a device must send in a training step, by purpose; every microbatch sends them anew.

    But where every device has the whole model, gradients cross after the last one. (XLA may gather the output matrix
    and the dense layers once for all microbatches, and hold them.)
    """
    model, mesh = job.model, job.mesh
    gathers = scatters = copies = 0.0
    again = 1 if model.compute.remat == "none" else 2
    compute_bytes = jnp.dtype(model.compute.dtype).itemsize
    for variable, array in _variables(_abstract(model)):
        axes = variable.get_metadata("axes")
        stored = array.size / _parts(parameter_spec(axes, array.shape, job.abstract_mesh), mesh)
        used = array.size / _parts(compute_spec(axes), mesh)
        outside = "vocab" in axes  # the embedding and the output matrix lie outside what is recomputed
        width = 4 if "router" in axes else compute_bytes
        gathers += (used - stored) * width * (1 if outside else again)
        if len(axes) > 1:
            scatters += (used - stored) * width
        holders = mesh.data if len(axes) > 1 else job.devices
        copies += 2 * (holders - 1) / holders * stored * GRADIENT_BYTES
    if mesh.data == job.devices:
        copies /= job.microbatches  # they cross once a step
    found = [
        Traffic("parameter gathers", gathers, STORAGE_AXES, False),
        Traffic("gradient reduce-scatter", scatters, STORAGE_AXES, False),
        Traffic("gradient all-reduce", copies, ("data",), False),
    ]
    if model.moe and mesh.expert > 1:
        rows = 4 * model.moe_layers * job.local_tokens * rows_sent(model, mesh.expert)
        found.append(Traffic("dispatch and combine", rows * model.dim * compute_bytes, ("expert",), True))
    activation = job.local_tokens * model.dim * compute_bytes
    passes = 1 + again  # forward, perhaps again, backward
    if mesh.tensor > 1:  # attention and FFN each end in an all-reduce, forward and backward
        share = 2 * (mesh.tensor - 1) / mesh.tensor
        found.append(Traffic("tensor", 2 * passes * model.layers * activation * share, ("tensor",), False))
    if mesh.context > 1:  # keys' sources gathered, their gradients scattered
        width = _cached_width(model) * compute_bytes
        entries = job.local_tokens * (mesh.context - 1) * width
        found.append(Traffic("context", passes * model.layers * entries, ("context",), False))
    return [dataclasses.replace(one, nbytes=job.microbatches * one.nbytes) for one in found]


def _cached_width(model: ModelConfig) -> int:
    return counting.cached_elements(model) // model.layers


@functools.cache
def rows_sent(model: ModelConfig, devices: int) -> float:
    """Other devices to which a token's hidden state must go, on average, where all experts are equally likely.

    Experts lie in order on `devices`. Measured on random affinities, as groups are chosen by their best expert.
    """
    moe, rng = model.moe, np.random.default_rng(0)
    scores_TE = rng.random((8192, moe.routed_experts))
    grouped_TDE = scores_TE.reshape(len(scores_TE), moe.groups, moe.experts_per_group)
    rank_TD = np.argsort(np.argsort(-grouped_TDE.max(axis=-1)))
    scores_TE = np.where((rank_TD < moe.groups_kept)[..., None], grouped_TDE, -1.0).reshape(scores_TE.shape)
    chosen_TK = np.argsort(-scores_TE)[:, : moe.experts_per_token]
    reached_TP = np.zeros((len(scores_TE), devices), bool)
    np.put_along_axis(reached_TP, chosen_TK // (moe.routed_experts // devices), True, axis=1)
    return float(reached_TP.sum(axis=1).mean()) * (devices - 1) / devices


def transports(job: Job, topology: Topology) -> dict[str, dict[str, float]]:
    """The two ways rows travel to experts: rows a token, bytes a step, and seconds of a step they alone would take.

    Rows cross five times: x and y forward; x again, dy and dx backward, where the experts are computed again.
    Stepwise sends whole buffers, `expert_slack` times an even share, but what the shared experts compute meanwhile
    hides the three ways there (those back wait for the routed experts). Ragged sends only the rows there are, and
    hides behind nothing.
    """
    model, P = job.model, job.mesh.expert
    if model.moe is None or P == 1:
        return {}
    slack, length = model.compute.expert_slack, job.length // job.mesh.context
    bound = (P - 1) * exchange.rows_per_peer(model.moe, P, job.per_device, length, slack) / job.local_tokens
    tokens = job.microbatches * model.moe_layers * job.local_tokens  # of all layers
    width_shared = model.moe.shared_experts * model.moe.expert_width // job.mesh.tensor
    shared = 18 * tokens * model.dim * width_shared / topology.chip.flops
    result = {}
    for name, rows, hidden in (("stepwise", bound, shared), ("ragged", rows_sent(model, P), 0.0)):
        trip = rows * tokens * model.dim * jnp.dtype(model.compute.dtype).itemsize
        seconds = time_sending(Traffic(name, 5 * trip, ("expert",), True), job, topology)
        visible = max(0.0, 3 / 5 * seconds - hidden) + 2 / 5 * seconds
        result[name] = {"rows_per_token": rows, "bytes": 5 * trip, "seconds": seconds, "visible_seconds": visible}
    return result


def time_sending(one: Traffic, job: Job, topology: Topology) -> float:
    """Seconds, every link busy. Between nodes of GPUs, gathers cross the network once a node, its members sharing."""
    fast = one.nbytes / topology.chip.network_bandwidth
    sizes = [(axis, size) for axis, size in zip(MESH_AXES, job.mesh.sizes) if axis in one.axes and size > 1]
    if topology.chip.kind != GPU or not sizes:
        return fast
    innermost = MESH_AXES.index(sizes[-1][0])
    stride = math.prod(job.mesh.sizes[innermost + 1 :])
    members = math.prod(size for _, size in sizes)
    together = max(1, min(members, topology.per_node // stride))  # members of a group in one node
    if together == members:
        return fast
    outside = (members - together) / (members - 1)
    slow = one.nbytes * outside / (1 if one.scattered else together) / topology.chip.node_bandwidth
    return max(fast, slow)


# --- memory, time ----------------------------------------------------------------------------------------------------


def activations(job: Job) -> dict[str, float]:
    """Estimated bytes: what is kept for the backward pass, and the largest working set of one layer and the loss."""
    model, tokens, mesh = job.model, job.local_tokens, job.mesh
    width = jnp.dtype(model.compute.dtype).itemsize
    attention, heads = model.attention, model.attention.heads // mesh.tensor
    value = attention.value_dim if isinstance(attention, MLAConfig) else attention.head_dim
    in_attention = 2 * tokens * heads * (2 * attention.qk_dim + 2 * value) * width  # with gradients
    if model.moe:
        in_ffn = 2 * tokens * model.moe.experts_per_token * (2 * model.dim + 3 * model.moe.expert_width) * width
    else:
        in_ffn = 2 * tokens * (2 * model.dim + 3 * model.dense_width // mesh.tensor) * width
    kept = model.layers * tokens * model.dim * width
    if model.compute.remat != "full":
        kept += model.layers * (in_attention + in_ffn) / 2
    layer = _layer_bytes(job)
    chunk = min(model.compute.loss_chunk, job.length) * job.per_device
    logits = chunk * model.vocab_size // mesh.tensor * (4 + 4 + width)
    table = model.vocab_size * model.dim // mesh.tensor * (width + GRADIENT_BYTES)
    return {"activations": kept, "temporaries": max(max(in_attention, in_ffn) + layer, logits + table)}


def _layer_bytes(job: Job) -> float:
    """The gathered weights of the largest layer, two at a time, and their gradient before it is scattered."""
    width, largest = jnp.dtype(job.model.compute.dtype).itemsize, 0.0
    model = _abstract(job.model)
    blocks = [(block, 1) for block in model.dense_blocks]
    if job.model.moe_layers:
        blocks.append((model.moe_blocks, job.model.moe_layers))
    for block, layers in blocks:
        used = [
            array.size / layers / _parts(compute_spec(v.get_metadata("axes")), job.mesh)
            for v, array in _variables(block)
        ]
        largest = max(largest, sum(used) * (2 * width + GRADIENT_BYTES))
    return largest


def flops(job: Job) -> dict[str, float]:
    """FLOPs of one device and step: the model's own, and with what the backward pass recomputes."""
    model, per_token = job.model, job.tokens / job.devices
    own = counting.training_flops_per_token(model, job.length)
    counts = counting.parameters(model)
    output = counts.active_parts[counting.UNEMBEDDING]
    again = {"none": 0.0, "dots": own / 3 - 2 * counts.active_in_matmuls, "full": own / 3 - 2 * output}
    return {"model": own * per_token, "with_recomputation": (own + again[model.compute.remat]) * per_token}


def _accumulating(job: Job) -> bool:
    """Whether the sum of the gradients is held beside those of a microbatch."""
    return job.microbatches > 1


def hbm_bytes(job: Job, parameters: int) -> float:
    """Estimated HBM traffic: the optimizer's pass over the state, gathered weights, and activations in and out.

    The update reads masters, gradients and two moments and writes all but the gradients. A weight is written when
    gathered and read by its product in every pass, its gradient written and read once. Activations: each product's
    input and output, in every pass. Microbatches' gradients are read and added to a sum.
    """
    model, passes = job.model, 2 if job.model.compute.remat == "none" else 3
    width, used = jnp.dtype(model.compute.dtype).itemsize, 0.0
    for variable, array in _variables(_abstract(model)):
        used += array.size / _parts(compute_spec(variable.get_metadata("axes")), job.mesh)
    update = parameters / 4 * (16 + 12) + _accumulating(job) * job.microbatches * parameters / 4 * 12
    weights = used * (2 * width * passes + 2 * GRADIENT_BYTES)
    attention, moe = model.attention, model.moe
    per_token = 6 * model.dim + 4 * attention.heads * attention.qk_dim // job.mesh.tensor
    if moe:
        per_token += moe.experts_per_token * (4 * model.dim + 4 * moe.expert_width) // job.mesh.tensor
    else:
        per_token += 4 * model.dense_width // job.mesh.tensor
    computing = weights + 2 * passes * model.layers * job.local_tokens * per_token * width
    return update + job.microbatches * computing


@dataclass(frozen=True)
class Estimate:
    """All that is known without compiling; of one device and one step."""

    memory: dict[str, float]  # bytes by category
    traffic: list[Traffic]
    flops: dict[str, float]
    hbm_bytes: float
    seconds: dict[str, float]  # compute, hbm, network
    transports: dict[str, dict[str, float]]

    @property
    def wire_bytes(self) -> float:
        return sum(one.nbytes for one in self.traffic)

    @property
    def total_bytes(self) -> float:
        return sum(self.memory.values())

    @property
    def step_seconds(self) -> float:
        """The longest of the three: everything hidden behind it."""
        return max(self.seconds.values())


def estimate(job: Job, topology: Topology, state) -> Estimate:
    """The estimate for a job; `state` is the abstract training state (`train.state.abstract_state`)."""
    parameters = stored_bytes(state.model, job.mesh)
    everything = stored_bytes(state, job.mesh)
    memory = {
        "parameters": parameters,
        "optimizer": everything - parameters,
        "gradients": parameters / 4 * GRADIENT_BYTES * (1 + _accumulating(job)),
        **activations(job),
    }
    sent, work = traffic(job), flops(job)
    moved = hbm_bytes(job, parameters)
    seconds = {
        "compute": work["with_recomputation"] / topology.chip.flops,
        "hbm": moved / topology.chip.hbm_bandwidth,
        "network": sum(time_sending(one, job, topology) for one in sent),
    }
    return Estimate(memory, sent, work, moved, seconds, transports(job, topology))


def estimate_decoding(job: Job, topology: Topology, model) -> Estimate:
    """The same for one decoded token a sequence, each with a cache of `job.length`; `model` is abstract, as it decodes.

    Every weight and the whole cache are read once; what is sent depends on where the compiler keeps them.
    """
    config, width = job.model, jnp.dtype(job.model.compute.dtype).itemsize
    cache = job.per_device * job.length * counting.cached_elements(config) * width
    memory = {"parameters": stored_bytes(model, job.mesh), "cache": cache}
    work = counting.decode_flops_per_token(config, job.length) * job.batch / job.devices
    seconds = {"compute": work / topology.chip.flops, "hbm": sum(memory.values()) / topology.chip.hbm_bandwidth}
    flops = {"model": work, "with_recomputation": work}
    return Estimate(memory, [], flops, sum(memory.values()), seconds | {"network": 0.0}, {})


def utilisation(model_flops: float, step_seconds: float, topology: Topology) -> float:
    """Model FLOPs over what the chip could have done in the time: recomputation does not count."""
    return model_flops / (step_seconds * topology.chip.flops)


def device_hours_per_trillion(tokens: int, step_seconds: float, devices: int) -> float:
    """Device-hours for 1e12 tokens at `tokens` a step."""
    return 1e12 / tokens * step_seconds * devices / 3600
