"""Surrogates: shapes of the clip, broadcasting, metrics by hand, relations between the losses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rollax import objectives as ob

RNG = np.random.default_rng(0)
B, T = 6, 9
OLD = jnp.asarray(np.log(RNG.uniform(0.02, 0.9, (B, T))), jnp.float32)
NEW = jnp.minimum(OLD + jnp.asarray(RNG.normal(size=(B, T)) * 0.5, jnp.float32), -1e-3)
MASK = jnp.asarray(RNG.random((B, T)) < 0.7).at[0].set(False).at[1].set(False).at[1, 3].set(True)
ADVANTAGE = jnp.asarray([1.0, -1.0, 0.5, -2.0, 0.0, 1.5])

LOSSES = {
    "ppo": lambda new: ob.clipped_surrogate(new - OLD, ADVANTAGE, *ob.clip_bounds(0.2), dual_clip=3.0, ratio_cap=5.0),
    "band": lambda new: ob.clipped_surrogate(new - OLD, ADVANTAGE, *ob.band_bounds(OLD, 0.05)),
    "dcpo": lambda new: ob.clipped_surrogate(new - OLD, ADVANTAGE, *ob.dcpo_bounds(OLD)),
    "dppo": lambda new: ob.masked_surrogate(new, OLD, ADVANTAGE, ob.dppo_mask(new, OLD, ADVANTAGE, 0.05)),
    "cispo": lambda new: ob.cispo_surrogate(new, OLD, ADVANTAGE, epsilon_high=4.0),
    "gspo": lambda new: ob.gspo_surrogate(new, OLD, ADVANTAGE, MASK),
    "gspo_token": lambda new: ob.gspo_surrogate(new, OLD, ADVANTAGE, MASK, form="token"),
    "gmpo": lambda new: ob.gmpo_surrogate(new, OLD, ADVANTAGE, MASK),
    "sapo": lambda new: ob.sapo_surrogate(new - OLD, ADVANTAGE),
    "vespo": lambda new: ob.vespo_surrogate(new, OLD, ADVANTAGE, MASK),
    "policy_gradient": lambda new: ob.policy_gradient(new, ADVANTAGE),
}


@functools.partial(jax.jit, static_argnums=(0, 2))
def value_and_grad(loss, new, mode="token_mean"):
    return jax.value_and_grad(lambda x: ob.aggregate(loss(x), MASK, mode))(new)


@pytest.mark.parametrize("name", LOSSES)
def test_on_policy_gradient_is_the_policy_gradient(name):
    """At ratio one every surrogate has REINFORCE's gradient (the sequence forms under their own reduction)."""
    mode = "seq_mean_token_mean"
    _, expected = value_and_grad(LOSSES["policy_gradient"], OLD, mode)
    _, gradient = value_and_grad(LOSSES[name], OLD, mode)
    np.testing.assert_allclose(gradient, expected, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("name", LOSSES)
def test_shape_and_finiteness(name):
    assert jax.eval_shape(LOSSES[name], NEW).shape == (B, T)
    for shift in (0.0, -60.0, 60.0):  # ratios far beyond e^20
        value, gradient = value_and_grad(LOSSES[name], NEW + shift)
        assert np.isfinite(value) and np.all(np.isfinite(gradient))
        assert np.all(np.asarray(gradient)[~np.asarray(MASK)] == 0)
    half = jax.eval_shape(LOSSES[name], NEW.astype(jnp.bfloat16))
    assert half.dtype == jnp.float32


def test_ratios_beyond_the_limit_have_no_gradient():
    log_ratio = jnp.array([[25.0, -25.0, 0.0]])
    gradient = jax.grad(lambda x: ob.clipped_surrogate(x, -jnp.ones(1), 0.8, 1.2).sum())(log_ratio)
    np.testing.assert_allclose(gradient, [[0.0, 0.0, 1.0]])


def test_clip_by_hand():
    ratio, up, down = jnp.array([[0.5, 1.0, 1.5, 4.0]]), jnp.ones(1), -jnp.ones(1)
    log_ratio = jnp.log(ratio)
    np.testing.assert_allclose(ob.clipped_surrogate(log_ratio, up, 0.8, 1.2), -jnp.minimum(ratio, 1.2), rtol=1e-6)
    np.testing.assert_allclose(ob.clipped_surrogate(log_ratio, down, 0.8, 1.2), jnp.maximum(ratio, 0.8), rtol=1e-6)
    dual = ob.clipped_surrogate(log_ratio, down, 0.8, 1.2, dual_clip=3.0)
    np.testing.assert_allclose(dual, [[0.8, 1.0, 1.5, 3.0]], rtol=1e-6)
    capped = ob.clipped_surrogate(log_ratio, down, 0.8, 1.2, ratio_cap=3.0)
    np.testing.assert_allclose(capped, dual, rtol=1e-6)  # the same for negative advantages


def test_empty_interval_keeps_the_on_policy_gradient():
    gradient = jax.grad(lambda x: ob.clipped_surrogate(x, jnp.ones(1), 1.0, 1.0).sum())(jnp.zeros((1, 3)))
    np.testing.assert_array_equal(gradient, -jnp.ones((1, 3)))


def test_advantage_by_sequence_or_by_token():
    by_token = jnp.broadcast_to(ADVANTAGE[:, None], (B, T))
    np.testing.assert_array_equal(
        ob.clipped_surrogate(NEW - OLD, ADVANTAGE, 0.8, 1.2), ob.clipped_surrogate(NEW - OLD, by_token, 0.8, 1.2)
    )
    with pytest.raises(ValueError, match=r"advantage must broadcast along the leading axes of \(6, 9\), got \(9,\)"):
        ob.clipped_surrogate(NEW - OLD, jnp.ones(T), 0.8, 1.2)


def test_gspo_forms_differ_only_where_advantages_vary():
    varying = ADVANTAGE[:, None] * jnp.linspace(0.5, 1.5, T)
    for advantage, agree in ((ADVANTAGE, True), (varying, False)):
        results = [
            value_and_grad(
                lambda new, form=form, advantage=advantage: ob.gspo_surrogate(
                    new, OLD, advantage, MASK, epsilon_low=0.9, epsilon_high=9.0, form=form
                ),
                NEW,
            )
            for form in ("sequence", "token")
        ]
        np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-5)
        assert np.allclose(results[0][1], results[1][1], rtol=1e-4, atol=1e-6) == agree


def test_cispo_conventions():
    offset = ob.cispo_surrogate(NEW, OLD, ADVANTAGE, epsilon_high=0.28, epsilon_low=1.0)
    bound = ob.cispo_surrogate(NEW, OLD, ADVANTAGE, epsilon_high=1.28, epsilon_high_is="bound")
    np.testing.assert_allclose(offset, bound, rtol=1e-6)
    assert not np.allclose(offset, ob.cispo_surrogate(NEW, OLD, ADVANTAGE, epsilon_high=1.28))
    with pytest.raises(ValueError, match="epsilon_high_is must be 'offset' or 'bound', got 'ratio'"):
        ob.cispo_surrogate(NEW, OLD, ADVANTAGE, epsilon_high=1.28, epsilon_high_is="ratio")


def test_sapo_gradient_fades():
    def weight(ratio):
        gradient = jax.grad(lambda x: ob.sapo_surrogate(x, jnp.ones(1)).sum())(jnp.log(jnp.array([[ratio]])))
        return -float(gradient[0, 0]) / ratio

    gate = 1 / (1 + np.exp(-0.5))
    np.testing.assert_allclose([weight(1.0), weight(1.5)], [1.0, 4 * gate * (1 - gate)], rtol=1e-5)


def test_vespo_weight():
    new, old, mask = jnp.array([[-1.0, -2.0]]), jnp.array([[-1.2, -2.3]]), jnp.ones((1, 2))
    w = np.exp(0.5)
    for advantage, k, lam in ((1.0, 2.0, 3.0), (-1.0, 3.0, 2.0)):
        expected = -(w**k) * np.exp(lam * (1 - w)) * advantage * np.asarray(new)
        np.testing.assert_allclose(ob.vespo_surrogate(new, old, jnp.array([advantage]), mask), expected, rtol=1e-5)


def test_metrics_by_hand():
    old = jnp.log(jnp.array([[0.1, 0.1, 0.5, 0.95, 0.3, 0.3]]))
    log_ratio = jnp.log(jnp.array([[2.0, 0.5, 1.1, 1.25, 2.0, 9.0]]))
    mask = jnp.array([[1, 1, 1, 1, 1, 0]])
    metrics = jax.jit(lambda a, mask: ob.clip_metrics(log_ratio, old, 0.8, 1.2, a, mask))
    m = metrics(jnp.array([1.0]), mask)
    np.testing.assert_allclose([m["clip_fraction"], m["clip_fraction_up"], m["clip_fraction_down"]], [0.6, 0.6, 0])
    np.testing.assert_allclose([m["outside_fraction_up"], m["outside_fraction_down"]], [0.6, 0.2])
    np.testing.assert_array_equal(m["clip_count_by_prob"], [1, 1, 0, 0, 1])
    np.testing.assert_array_equal(m["outside_up_count_by_prob"], [1, 1, 0, 0, 1])
    np.testing.assert_array_equal(m["outside_down_count_by_prob"], [1, 0, 0, 0, 0])
    np.testing.assert_array_equal(m["token_count_by_prob"], [2, 1, 1, 0, 1])
    np.testing.assert_allclose(m["ppo_kl"], -np.log(2 * 0.5 * 1.1 * 1.25 * 2) / 5, rtol=1e-5)
    np.testing.assert_allclose(m["ratio_max"], 2.0, rtol=1e-6)
    m = jax.jit(lambda a: ob.clip_metrics(log_ratio, old, 0.8, 1.2, a, mask, dual_clip=1.5))(jnp.array([-1.0]))
    np.testing.assert_allclose([m["clip_fraction"], m["dual_clip_fraction"]], [0.2, 0.4], rtol=1e-6)
    assert all(np.all(np.asarray(x) == 0) for x in metrics(jnp.array([-1.0]), mask * 0).values())


def test_clip_fraction_counts_lost_gradients():
    m = jax.jit(ob.clip_metrics)(NEW - OLD, OLD, 0.8, 1.2, ADVANTAGE, MASK)
    gradient = jax.jit(jax.grad(lambda x: ob.clipped_surrogate(x - OLD, ADVANTAGE, 0.8, 1.2).sum()))(NEW)
    lost = (gradient == 0) & (ADVANTAGE != 0)[:, None]
    np.testing.assert_allclose(m["clip_fraction"], ob.masked_mean(lost, MASK), rtol=1e-6)
    assert m["clip_fraction"] > 0


def test_traced_numbers_sweep():
    def loss(epsilon, c):
        return ob.aggregate(
            ob.clipped_surrogate(NEW - OLD, ADVANTAGE, *ob.clip_bounds(epsilon), dual_clip=c), MASK, "token_mean"
        )

    epsilon, c = jnp.array([0.1, 0.2, 0.4]), jnp.array([2.0, 3.0, 10.0])
    swept = jax.jit(jax.vmap(loss))(epsilon, c)
    np.testing.assert_allclose(swept, [loss(e, d) for e, d in zip(epsilon, c, strict=True)], rtol=1e-5)


def test_bad_input():
    with pytest.raises(ValueError, match=r"epsilon_low must not be negative, got -0\.1"):
        ob.clip_bounds(-0.1)
    with pytest.raises(ValueError, match="epsilon_high must not be negative, got nan"):
        ob.clip_bounds(0.2, np.nan)
    with pytest.raises(ValueError, match=r"old_log_prob must be log-probabilities .* 0\.5"):
        ob.dcpo_bounds(jnp.array([-1.0, 0.5]))
    with pytest.raises(ValueError, match="dual_clip must be above 1"):
        ob.clipped_surrogate(NEW - OLD, ADVANTAGE, 0.8, 1.2, dual_clip=0.5)
    with pytest.raises(ValueError, match="log_prob, old_log_prob must have one shape"):
        ob.cispo_surrogate(NEW, OLD[:, :3], ADVANTAGE, epsilon_high=4.0)
    with pytest.raises(ValueError, match="form must be 'sequence' or 'token', got 'word'"):
        ob.gspo_surrogate(NEW, OLD, ADVANTAGE, MASK, form="word")
    with pytest.raises(ValueError, match="mode must be 'mean' or 'sum', got 'max'"):
        ob.sequence_log_ratio(NEW - OLD, MASK, "max")
    with pytest.raises(ValueError, match=r"advantage must be \[B\]"):
        ob.gmpo_surrogate(NEW, OLD, jnp.ones((B, T)), MASK)


def test_gmpo_is_finite_on_both_sides():
    old = jnp.full((2, 1), -200.0)

    @jax.jit
    @jax.value_and_grad
    def loss(new, advantage):
        return ob.gmpo_surrogate(new, old, jnp.full(2, advantage), jnp.ones((2, 1))).sum()

    for advantage in (1.0, -1.0):
        for new in (jnp.zeros((2, 1)), old - 200):
            value, slope = loss(new, advantage)
            assert jnp.isfinite(value)
            assert jnp.isfinite(slope).all()
