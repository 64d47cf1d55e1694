"""Rewards and advantages of single steps: golden arrays of OpenClaw-RL's code (arXiv 2603.10165), buckets by hand."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rollax import objectives as ob
from rollax.tests.support import GOLDEN as FOLDER

GOLDEN = dict(np.load(FOLDER / "openclaw_rl.npz"))
by_index = jax.jit(ob.step_index_advantage)


def case_of(number):
    case = {k.removeprefix(f"step{number}_"): v for k, v in GOLDEN.items() if k.startswith(f"step{number}_")}
    return case, np.arange(case["step_reward"].shape[2]) < case["num_steps"][..., None]


@pytest.mark.parametrize("number", range(2))
def test_released_code(number):
    case, valid = case_of(number)
    with jax.enable_x64(True):
        reward = jax.jit(ob.step_reward)(case["outcome"], case["votes"], case["votes"] != 0, case["coef"])
        advantage, kept = jax.jit(ob.step_index_advantage)(case["step_reward"], valid)
        groups = np.arange(case["outcome"].shape[0]).repeat(case["outcome"].shape[1])
        outcome = [
            ob.grpo_advantages(case["outcome"].ravel(), groups, epsilon=1e-6, scale_by_std=scale)
            for scale in (True, False)
        ]
    np.testing.assert_allclose(np.where(valid, reward, 0), case["step_reward"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(advantage, case["adv_norm"], rtol=0, atol=1e-9)
    np.testing.assert_array_equal(kept, case["kept_norm"])
    for found, name in zip(outcome, ("std", "nostd"), strict=True):
        np.testing.assert_allclose(found, case[f"outcome_adv_{name}_float32"].ravel(), rtol=0, atol=1e-6)


def by_hand(reward, valid, eps, bucket):
    members = collections.OrderedDict()
    for g, n, t in np.argwhere(valid):
        members.setdefault((g, t) if bucket == "step" else g, []).append((g, n, t))
    values = {key: np.asarray([reward[i] for i in each]) for key, each in members.items()}
    keys = [key for key, x in values.items() if len(x) == 1 or x.max() > x.min()] or list(values)[:1]
    advantage, kept = np.zeros(reward.shape), np.zeros(reward.shape, bool)
    for key in keys:
        x = values[key]
        for i, value in zip(members[key], x if len(x) == 1 else (x - x.mean()) / (x.std() + eps), strict=True):
            advantage[i], kept[i] = value, True
    return advantage, kept


@pytest.mark.parametrize("bucket", ["step", "task"])
def test_buckets_by_hand(bucket):
    rng = np.random.default_rng(0)
    shape = (4, 5, 6)
    compute = jax.jit(lambda reward, valid: ob.step_index_advantage(reward, valid, 1e-3, bucket=bucket))
    for _ in range(30):
        reward = rng.choice([-1 / 3, 1.0, 2.0], shape, p=[0.15, 0.7, 0.15])
        valid = np.arange(6) < rng.integers(0, 7, (4, 5))[..., None]
        noise = np.where(valid, reward, np.nan)  # what stands where no step was made is not read
        expected, kept = by_hand(reward, valid, 1e-3, bucket)
        found = compute(noise, valid)
        np.testing.assert_array_equal(found[1], kept)
        np.testing.assert_allclose(found[0], expected, rtol=2e-5, atol=2e-6)
        if bucket == "step":
            assert kept.sum() < valid.sum()


def test_single_constant_and_all_constant_buckets():
    valid = np.asarray([[[1, 1, 0], [1, 0, 0]], [[1, 1, 1], [1, 1, 0]]], bool)
    reward = np.asarray([[[0.5, 2.0, 0], [0.5, 0, 0]], [[1.0, 3.0, -0.7], [2.0, 3.0, 0]]])
    advantage, kept = by_index(reward, valid)
    # Task 0: constant, then one of two trajectories. Task 1: 1 and 2, constant, one.
    np.testing.assert_array_equal(kept, [[[0, 1, 0], [0, 0, 0]], [[1, 0, 1], [1, 0, 0]]])
    np.testing.assert_allclose(advantage, [[[0, 2, 0], [0, 0, 0]], [[-1, 0, -0.7], [1, 0, 0]]], atol=1e-5)
    # Nothing varies: the first bucket stays, with zeros. Its first trajectory need not have made the step.
    valid = np.asarray([[[0, 0], [1, 1], [1, 1]], [[1, 1], [1, 1], [1, 1]]], bool)
    advantage, kept = by_index(np.full(valid.shape, 0.1), valid)
    np.testing.assert_array_equal(kept, [[[0, 0], [1, 0], [1, 0]], [[0, 0], [0, 0], [0, 0]]])
    assert not np.any(advantage)
    advantage, kept = by_index(np.ones((2, 3, 2)), np.zeros((2, 3, 2), bool))
    assert not np.any(advantage) and not np.any(kept)


def test_outcome_and_votes_add_up():
    outcome = jnp.asarray([[1.0, -1.0]])
    votes = jnp.asarray([[[[1, 1, -1], [0, 0, 0]], [[-1, -1, -1], [1, 0, 0]]]], jnp.int8)
    reward = jax.vmap(lambda coef: ob.step_reward(outcome, votes, votes != 0, coef))(jnp.asarray([0.0, 1.0, 0.5]))
    np.testing.assert_allclose(reward[0], [[[1, 1], [-1, -1]]])
    np.testing.assert_allclose(reward[1], [[[4 / 3, 1], [-2, 0]]], rtol=1e-6)
    np.testing.assert_allclose(reward[2], (reward[0] + reward[1]) / 2, rtol=1e-6)


def test_constants_scale_shift_and_order():
    _, valid = case_of(0)
    reward = np.random.default_rng(1).normal(size=valid.shape)
    advantage, kept = by_index(reward, valid, 0.0)
    alone = valid & (valid.sum(axis=1, keepdims=True) == 1)
    moved, _ = by_index(3 * reward - 5, valid, 0.0)
    np.testing.assert_allclose(np.where(alone, 0, moved), np.where(alone, 0, advantage), rtol=1e-4, atol=1e-5)
    order = np.asarray([3, 0, 5, 1, 4, 2])
    swapped, swapped_kept = by_index(reward[:, order], valid[:, order], 0.0)
    np.testing.assert_allclose(swapped, advantage[:, order], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(swapped_kept, kept[:, order])
    gradient = jax.grad(lambda x: by_index(x, valid)[0].sum())(jnp.asarray(reward))
    assert not np.any(gradient)
    several = jax.vmap(by_index, in_axes=(None, None, 0))(reward, valid, jnp.asarray([0.0, 1e-6, 0.5]))
    for i, eps in enumerate((0.0, 1e-6, 0.5)):
        np.testing.assert_allclose(several[0][i], by_index(reward, valid, eps)[0], rtol=1e-6)


def test_bad_input():
    x = jnp.ones((2, 3, 4))
    with pytest.raises(ValueError, match=r"reward, valid must have one shape, got \[\(2, 3, 4\), \(2, 3\)\]"):
        ob.step_index_advantage(x, x[..., 0] > 0)
    with pytest.raises(ValueError, match=r"reward must be \[G, N, T\], got \(3, 4\)"):
        ob.step_index_advantage(x[0], x[0] > 0)
    with pytest.raises(ValueError, match=r"bucket must be one of .*, got 'batch'"):
        ob.step_index_advantage(x, x > 0, bucket="batch")
    with pytest.raises(ValueError, match=r"got shapes \(2, 3, 4\) and \(2, 3, 4\)"):
        ob.step_reward(x, x, x > 0)
