"""MLA against the oracle, forward and backward, and its invariants."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loops import made_in_the_loop
from small import MODEL, YARN, change, made, normal, packed

from dsv2_jax import presets
from dsv2_jax.model import rope
from dsv2_jax.model.attention import MLA
from oracles.attention import mla as oracle
from oracles.compare import TOLERANCE, assert_close, slope, worst
from oracles.weights import attention as weights

CONFIGS = {
    "compressed": MODEL,
    "lite": change(MODEL, attention__q_latent=None),
    "yarn": change(MODEL, attention__yarn=YARN),
    "lite yarn": change(MODEL, attention__q_latent=None, attention__yarn=YARN),
}
SEGMENTS, POSITIONS = packed(5, 9, total=16)
rope_rotate = rope.rotate
RUN = jax.jit(lambda module, *inputs: module(*inputs))
LATENTS, QUERIES, EXPANDED, ABSORBED = map(jax.jit, (MLA.latents, MLA.queries, MLA.expanded, MLA.absorbed))


@functools.cache
def module(name):
    return made(lambda key: MLA(CONFIGS[name], key))


@jax.jit
def angles(mla, positions_BT):
    return rope.rotations(positions_BT, mla.config.rope_dim, mla.config.rope_theta, mla.config.yarn)


def run(mla, h_BTD, segments_BT=SEGMENTS, positions_BT=POSITIONS):
    return RUN(mla, h_BTD, angles(mla, positions_BT), segments_BT)


def error(name, dtype="float32", positions_BT=POSITIONS + 90):
    """Positions past the original length, so that YaRN shows."""
    mla, h_BTD = module(name), normal(0, 1, 16, 20, dtype=dtype)
    out = run(mla, h_BTD, positions_BT=positions_BT)
    assert out.dtype == dtype
    expected = oracle(weights(mla), mla.config, np.asarray(h_BTD[0], np.float64), SEGMENTS[0], positions_BT[0])
    return worst(out[0, :14], expected[:14])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_forward_matches_the_oracle(name, dtype):
    assert error(name, dtype) <= 2 * TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("where", "defect"),
    [
        ("softmax_scale", lambda dim, yarn: dim**-0.5),
        ("softmax_scale", lambda dim, yarn: dim**-0.5 / 1.5896),
        ("frequencies", lambda dim, theta, yarn: theta ** -(np.arange(0, dim, 2) / dim)),
        ("rotate", lambda x, cos_sin: jnp.roll(rope_rotate(jnp.roll(x, 1, -1), cos_sin), -1, -1)),
    ],
    ids=["no mscale", "inverted mscale", "no ramp", "pairs shifted by one"],
)
def test_the_check_sees_yarn_and_pair_defects(monkeypatch, where, defect):
    """Acceptance cases 1 and 2, through the whole of MLA: each defect is far outside the tolerance."""

    def forget():
        for compiled in (RUN, angles):
            compiled.clear_cache()

    monkeypatch.setattr(rope, where, defect)
    forget()
    try:
        assert error("yarn") > 1e-3
    finally:
        forget()


@pytest.mark.parametrize("name", ["compressed", "lite yarn"])
def test_backward_matches_finite_differences(name):
    mla, h_BTD, weight_TD = module(name), normal(0, 1, 16, 20), np.asarray(normal(1, 16, 20), np.float64)
    weight_TD[14:] = 0  # padding

    def loss(mla, h_BTD):
        return jnp.sum(mla(h_BTD, angles(mla, POSITIONS), SEGMENTS)[0] * weight_TD)

    gradient, gradient_h = jax.jit(jax.grad(loss, (0, 1)))(mla, h_BTD)
    gradient = weights(gradient) | {"h": np.asarray(gradient_h[0], np.float64)}
    at = weights(mla) | {"h": np.asarray(h_BTD[0], np.float64)}

    def expected_loss(w):
        return (oracle(w, mla.config, w["h"], SEGMENTS[0], POSITIONS[0]) * weight_TD).sum()

    rng = np.random.default_rng(3)
    for part in at:
        direction = {name: rng.normal(size=value.shape) * (name == part) for name, value in at.items()}
        size = np.linalg.norm(gradient[part]) * np.linalg.norm(direction[part])
        expected = slope(expected_loss, at, direction)
        assert abs((gradient[part] * direction[part]).sum() - expected) <= 2e-5 * size, part


@pytest.mark.parametrize("name", CONFIGS)
def test_causal_to_the_bit(name):
    """A later token changes no bit of an earlier output, nor has an earlier output a gradient with respect to it."""
    mla, h_BTD = module(name), normal(0, 1, 16, 20)
    one_document = jnp.ones((1, 16), jnp.int32)
    first = run(mla, h_BTD, one_document)
    second = run(mla, h_BTD.at[:, 9:].add(1.0), one_document)
    np.testing.assert_array_equal(first[:, :9], second[:, :9])
    assert not np.array_equal(first[:, 9:], second[:, 9:])
    gradient = jax.grad(lambda h: jnp.sum(run(mla, h, one_document)[:, :9] ** 2))(h_BTD)
    assert (np.asarray(gradient)[:, 9:] == 0).all()
    assert (np.abs(gradient).max(-1)[:, :9] > 0).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_is_separate(name):
    """Acceptance case 10: a document of a packed row comes out as alone; without segments it does not."""
    mla, h_BTD = module(name), normal(0, 1, 16, 20)
    alone = run(mla, h_BTD[:, 5:14], jnp.ones((1, 9), jnp.int32), jnp.arange(9)[None])
    assert worst(run(mla, h_BTD)[:, 5:14], alone) < 1e-5
    assert worst(run(mla, h_BTD, jnp.ones_like(SEGMENTS))[:, 5:14], alone) > 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_absorbed_is_expanded(name, dtype):
    """The two forms of decoding over the same latents agree, for chunks at different places in each row."""
    mla, h_BTD = module(name), normal(0, 2, 12, 20, dtype=dtype)
    offset_B = jnp.array([3, 8])
    cos_sin = angles(mla, jnp.broadcast_to(jnp.arange(12), (2, 12)))
    latents_BSC = LATENTS(mla, h_BTD, cos_sin)
    q_C_BTNH, q_R_BTNP = QUERIES(mla, normal(1, 2, 4, 20, dtype=dtype), angles(mla, offset_B[:, None] + jnp.arange(4)))
    expanded = np.asarray(EXPANDED(mla, q_C_BTNH, q_R_BTNP, latents_BSC, offset_B=offset_B), np.float64)
    assert_close(ABSORBED(mla, q_C_BTNH, q_R_BTNP, latents_BSC, offset_B), expanded, TOLERANCE[dtype])
    swapped = ABSORBED(mla, q_C_BTNH[:, :, ::-1], q_R_BTNP, latents_BSC, offset_B)  # heads in the wrong order
    assert worst(swapped, expanded) > 0.1


def cut_in_a_loop():
    """How many arrays as large as W_UK, W_UV or both of all heads a decoding loop makes anew at every token."""
    mla = module("lite")

    def decode(mla, h_BTD, cache_BSC):
        def step(i, carry):
            h_BTD, cache_BSC = carry
            place_B = jnp.full(2, i)
            return mla.decode(h_BTD, angles(mla, place_B[:, None]), cache_BSC, place_B)

        return jax.lax.fori_loop(0, 7, step, (h_BTD, cache_BSC))

    config = mla.config
    widths = config.nope_dim, config.value_dim, config.nope_dim + config.value_dim
    cache_BSC = jnp.zeros((2, 7, config.kv_latent + config.rope_dim))
    compiled = jax.jit(decode).lower(mla, normal(0, 2, 1, 20), cache_BSC).compile()
    return made_in_the_loop(compiled, {config.kv_latent * config.heads * width for width in widths})


def test_matrices_of_heads_are_cut_before_a_decoding_loop_and_not_in_it(monkeypatch):
    assert cut_in_a_loop() == 0
    monkeypatch.setattr(jax.lax, "optimization_barrier", lambda x: x)
    assert cut_in_a_loop() > 0


def test_absorbing_is_chosen_where_it_is_cheaper():
    """T queries over S keys cost T S 2R absorbed and T S (H + V) + S R (H + V) expanded (rotary part left out)."""
    for config in (MODEL, presets.get("v2"), presets.get("v2_lite")):
        mla, c = jax.eval_shape(lambda config=config: MLA(config, jax.random.key(0))), config.attention
        expanded_width = c.nope_dim + c.value_dim

        def absorbed_cost(queries):
            return queries * 2 * c.kv_latent  # noqa: B023

        def expanded_cost(queries):
            return (queries + c.kv_latent) * expanded_width  # noqa: B023

        last = mla.longest_absorbed
        assert absorbed_cost(last) <= expanded_cost(last)
        assert absorbed_cost(last + 1) > expanded_cost(last + 1)
