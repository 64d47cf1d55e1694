"""Advantages: brute force in NumPy, degenerate groups, tool gaps, truncation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rollax.objectives import (
    ADVANTAGES,
    discounted_returns,
    dr_grpo_advantages,
    gae,
    gae_time_major,
    group_is_constant,
    grpo_advantages,
    reinforce_plus_plus_advantages,
    reinforce_plus_plus_baseline_advantages,
    rloo_advantages,
    vapo_gae,
    vapo_lambda,
    whiten,
)

RNG = np.random.default_rng(0)
IDS = np.array([2, 0, 0, 2, 4, 0, 2, 5, 5])  # any order and sizes; 4 is a singleton, 1 and 3 are empty
REWARD = np.array([1.0, 0.2, 0.7, 0.1, 0.9, 0.4, 0.3, 0.1, 0.1], np.float32)


def brute(rule):
    return np.array([rule(REWARD[i], REWARD[(IDS[i] == IDS) & (np.arange(9) != i)]) for i in range(9)])


@pytest.mark.parametrize("num_groups", [None, 6])
def test_groups_by_brute_force(num_groups):
    def z_score(own, others):
        group = np.append(others, own)
        return (own - group.mean()) / (group.std(ddof=1) + 1e-6) if len(others) and np.ptp(group) else 0

    np.testing.assert_allclose(grpo_advantages(REWARD, IDS, num_groups=num_groups), brute(z_score), rtol=1e-5)
    expected = brute(lambda own, others: own - np.append(others, own).mean())
    np.testing.assert_allclose(dr_grpo_advantages(REWARD, IDS, num_groups=num_groups), expected, rtol=1e-5, atol=1e-7)
    expected = brute(lambda own, others: own - others.mean() if len(others) else 0)
    np.testing.assert_allclose(rloo_advantages(REWARD, IDS, num_groups=num_groups), expected, rtol=1e-5, atol=1e-7)


def test_singletons_by_convention():
    for advantages in (grpo_advantages, dr_grpo_advantages, rloo_advantages):
        np.testing.assert_allclose(advantages(REWARD, IDS)[4], 0.0)
        np.testing.assert_allclose(advantages(REWARD, IDS, singleton="reward")[4], 0.9, rtol=2e-6)


def test_constant_groups_are_exactly_zero():
    """Their mean may be off by a rounding that `epsilon` would blow up: 0.1 summed ten times over."""
    reward, ids = jnp.full(10, 0.1), jnp.zeros(10, int)
    assert np.all(np.asarray(group_is_constant(reward, ids)))
    for advantages in (grpo_advantages, dr_grpo_advantages, rloo_advantages):
        assert np.all(np.asarray(advantages(reward, ids)) == 0)
    gradient = jax.jit(jax.grad(lambda r: grpo_advantages(r, ids).sum()))(reward)
    assert np.all(np.isfinite(gradient))


def test_groups_are_invariant_to_shift_order_and_padding_ids():
    base = grpo_advantages(REWARD, IDS)
    np.testing.assert_allclose(grpo_advantages(REWARD + 5, IDS), base, rtol=1e-4, atol=1e-5)
    order = RNG.permutation(9)
    np.testing.assert_allclose(grpo_advantages(REWARD[order], IDS[order]), np.asarray(base)[order], rtol=1e-5)
    np.testing.assert_allclose(jax.jit(grpo_advantages)(REWARD, IDS), base, rtol=1e-6)
    prompts = grpo_advantages(REWARD.reshape(3, 3).ravel(), jnp.repeat(jnp.arange(3), 3))
    looped = [grpo_advantages(row, jnp.zeros(3, int)) for row in REWARD.reshape(3, 3)]
    np.testing.assert_allclose(prompts, np.concatenate(looped), rtol=1e-5)


def test_whiten():
    x, mask = RNG.normal(3, 5, (4, 6)), RNG.random((4, 6)) < 0.6
    white = np.asarray(whiten(x, mask))[mask]
    np.testing.assert_allclose([white.mean(), white.var(ddof=1)], [0, 1], atol=1e-5)
    kept = np.asarray(whiten(x, mask, shift_mean=False))[mask]
    np.testing.assert_allclose([kept.mean(), kept.var(ddof=1)], [x[mask].mean(), 1], atol=1e-5)
    one = np.zeros((4, 6), bool)
    one[0, 0] = True
    assert np.all(np.isfinite(whiten(x, one))) and whiten(x, one)[0, 0] == 0
    assert np.all(np.isfinite(whiten(x, np.zeros_like(one))))


def squeeze_row(row, mask):
    return np.asarray(row)[np.asarray(mask, bool)]


MASK = np.array([[1, 1, 0, 0, 1, 1, 0], [1, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]])
TOKEN_REWARD = RNG.normal(size=MASK.shape).astype(np.float32)
VALUE = RNG.normal(size=MASK.shape).astype(np.float32)


def test_tool_tokens_take_no_part():
    """Cutting the masked positions out of a row changes nothing at the others."""
    returns = discounted_returns(TOKEN_REWARD, MASK, 0.9)
    plus = reinforce_plus_plus_advantages(TOKEN_REWARD, MASK, 0.9)
    advantage, target = gae(TOKEN_REWARD, VALUE, MASK, 0.9, 0.8)
    assert np.all(np.asarray(returns)[MASK == 0] == 0) and np.all(np.asarray(plus)[MASK == 0] == 0)
    for i in range(4):
        r, v = squeeze_row(TOKEN_REWARD[i], MASK[i]), squeeze_row(VALUE[i], MASK[i])
        n = len(r)
        expected = [sum(0.9 ** (j - t) * r[j] for j in range(t, n)) for t in range(n)]
        np.testing.assert_allclose(squeeze_row(returns[i], MASK[i]), expected, rtol=1e-5, atol=1e-6)
        residual = r + 0.9 * np.append(v[1:], 0)[:n] - v
        expected = [sum(0.72 ** (j - t) * residual[j] for j in range(t, n)) for t in range(n)]
        np.testing.assert_allclose(squeeze_row(advantage[i], MASK[i]), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(target, advantage + VALUE, rtol=1e-6)


def test_lambda_one_and_zero():
    advantage, target = gae(TOKEN_REWARD, VALUE, MASK, 0.9, 1.0)
    own = MASK != 0
    np.testing.assert_allclose(
        np.asarray(target)[own], np.asarray(discounted_returns(TOKEN_REWARD, MASK, 0.9))[own], rtol=1e-4, atol=1e-5
    )
    per_row, _ = gae(TOKEN_REWARD, VALUE, MASK, 0.9, jnp.array([1.0, 0.0, 0.5, 0.0]))
    np.testing.assert_allclose(per_row[0], advantage[0], rtol=1e-5)
    np.testing.assert_allclose(per_row[3], gae(TOKEN_REWARD, VALUE, MASK, 0.9, 0.0)[0][3], rtol=1e-5)
    swept = jax.vmap(lambda lam: gae(TOKEN_REWARD, VALUE, MASK, 0.9, lam)[0])(jnp.array([0.0, 1.0]))
    np.testing.assert_allclose(swept[1], advantage, rtol=1e-5)


def test_vapo():
    np.testing.assert_allclose(vapo_lambda(jnp.array([0, 10, 20, 100]), 0.05), [0, 0, 0, 0.8], rtol=1e-6)
    advantage, target = vapo_gae(TOKEN_REWARD, VALUE, MASK, 0.9, alpha=0.5)
    np.testing.assert_allclose(advantage, gae(TOKEN_REWARD, VALUE, MASK, 0.9, vapo_lambda(MASK.sum(1), 0.5))[0])
    np.testing.assert_allclose(target, gae(TOKEN_REWARD, VALUE, MASK, 0.9, 1.0)[1])


def test_control_gae_by_brute_force():
    T, N, discount, lam = 12, 5, 0.97, 0.9
    reward, value, next_value = RNG.normal(size=(3, T, N))
    ends = RNG.integers(0, 6, (T, N))
    terminated, truncated = ends == 0, ends == 1
    expected = np.zeros((T, N))
    for n in range(N):
        later = 0.0
        for t in reversed(range(T)):
            later = 0.0 if terminated[t, n] or truncated[t, n] else later
            bootstrap = 0.0 if terminated[t, n] else next_value[t, n]
            later = reward[t, n] + discount * bootstrap - value[t, n] + discount * lam * later
            expected[t, n] = later
    with jax.enable_x64(True):
        advantage, target = gae_time_major(reward, value, next_value, terminated, truncated, discount, lam)
        np.testing.assert_allclose(advantage, expected, rtol=1e-10)
        np.testing.assert_allclose(target, expected + value, rtol=1e-10)
    poisoned = np.where(terminated, np.nan, next_value)  # nobody knows the value behind the end
    assert np.all(np.isfinite(gae_time_major(reward, value, poisoned, terminated, truncated)[0]))


def test_reinforce_plus_plus_baseline():
    mask = (RNG.random((9, 5)) < 0.7).astype(np.float32)
    deviation = np.asarray(dr_grpo_advantages(REWARD, IDS))[:, None] * np.ones(5)
    kept = deviation[mask > 0]
    expected = (deviation - kept.mean()) / kept.std(ddof=1) * mask
    actual = reinforce_plus_plus_baseline_advantages(REWARD, IDS, mask)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_bad_input():
    with pytest.raises(ValueError, match=r"group_ids must lie in 0\.\.8, got 0\.\.9"):
        grpo_advantages(REWARD, np.append(IDS[:-1], 9))
    with pytest.raises(ValueError, match=r"group_ids must lie in 0\.\.2, got 0\.\.5"):
        grpo_advantages(REWARD, IDS, num_groups=3)
    with pytest.raises(ValueError, match=r"reward and group_ids must be \[B\], got \(3, 3\) and \(9,\)"):
        rloo_advantages(REWARD.reshape(3, 3), IDS)
    with pytest.raises(ValueError, match="singleton must be 'zero' or 'reward', got 'one'"):
        rloo_advantages(REWARD, IDS, singleton="one")
    with pytest.raises(ValueError, match=r"one shape \[B, T\]"):
        gae(TOKEN_REWARD, VALUE, MASK[:, :3])
    with pytest.raises(ValueError, match=r"one shape \[T, N\]"):
        gae_time_major(*np.zeros((4, 3, 2)), np.zeros((3, 1)))


def test_the_papers_epsilon_of_zero():
    reward, groups = jnp.array([1.0, 1.0, 0.0, 1.0]), jnp.array([0, 0, 1, 1])
    half = 0.5 / np.sqrt(0.5)
    np.testing.assert_allclose(grpo_advantages(reward, groups, epsilon=0.0), [0, 0, -half, half], rtol=1e-6)


def test_by_name():
    reward, groups = jnp.array([1.0, 0.0, 4.0]), jnp.array([0, 0, 0])
    expected = {"dr_grpo": [-2 / 3, -5 / 3, 7 / 3], "rloo": [-1, -2.5, 3.5], "reinforce": [1, 0, 4]}
    for name, values in expected.items():
        np.testing.assert_allclose(ADVANTAGES[name](reward, groups, num_groups=1), values, rtol=1e-6)
    np.testing.assert_array_equal(ADVANTAGES["grpo"](reward, groups), grpo_advantages(reward, groups))
