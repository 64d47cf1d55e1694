"""RetroAgent's returns and group advantages, GiGPO, reflections: golden arrays, invariances, singletons, constants.

golden/retroagent.npz holds what the authors' functions made of random inputs, in float64 (arXiv 2603.08561).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rollax import objectives as ob
from rollax.objectives.group_advantage import GIGPO_NORMS, NORMS
from rollax.tests.support import GOLDEN as FOLDER

GOLDEN = dict(np.load(FOLDER / "retroagent.npz"))
advantage = jax.jit(ob.group_advantage, static_argnames=("num_groups", "norm"))
gigpo = jax.jit(ob.gigpo_advantage, static_argnames="norm")


def case(name):
    return {k.removeprefix(name): v for k, v in GOLDEN.items() if k.startswith(name)}


@pytest.fixture(params=["adv0_", "adv1_"])
def rows(request):
    """Shuffled rows of four and three groups, one of them a single row and one constant."""
    with jax.enable_x64(True):
        yield case(request.param)


def close(actual, expected, atol=1e-7):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


# --- Golden arrays --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["returns0_", "returns1_"])
def test_returns_of_the_authors(name):
    c = case(name)
    with jax.enable_x64(True):
        to_go = jax.jit(ob.discounted_reward_to_go)(c["rewards"], c["active"], c["gamma"])
        close(to_go, c["reward_to_go"], 1e-9)
        undiscounted = ob.discounted_reward_to_go(c["rewards"], c["active"], 1.0)[:, :1]
        close(undiscounted * c["active"], c["episode_return"], 1e-9)
        close(ob.uniform_return(c["r_ext"] + c["r_int"], c["length"], c["gamma"]), c["paper_G"], 1e-9)


@pytest.mark.parametrize("statistics", ["step", "traj"])
@pytest.mark.parametrize("norm, name", [("std", "std"), ("none", "nostd")])
def test_group_advantage_of_the_authors(rows, statistics, norm, name):
    traj = rows["traj"] if statistics == "traj" else None
    num_groups = int(rows["group"].max()) + 1
    ours = advantage(rows["row_return"], rows["group"], num_groups, traj=traj, norm=norm)
    close(ours[:, None] * rows["mask"], rows[f"grpo_{statistics}_{name}"])


@pytest.mark.parametrize("norm", GIGPO_NORMS)
def test_gigpo_of_the_authors(rows, norm):
    arrays = (rows[k] for k in ("row_return", "step_return", "group", "anchor"))
    ours = gigpo(*arrays, weight=rows["step_weight"], norm=norm)
    close(ours[:, None] * rows["mask"], rows[f"gigpo_{norm}_norm"])


def test_reflection_advantage_of_the_authors(rows):
    close(jax.jit(ob.reflection_advantage)(rows["token_rewards"], rows["mask"]), rows["rpp_advantage"])
    close(ob.discounted_returns(rows["token_rewards"], rows["mask"]), rows["rpp_return"], 1e-9)


# --- Returns --------------------------------------------------------------------------------------------------------


def test_a_terminal_reward_is_worth_less_the_longer_the_way():
    active = jnp.arange(6) < jnp.array([2, 6])[:, None]
    reward = jnp.zeros((2, 6)).at[0, 1].set(10).at[1, 5].set(10)
    to_go = ob.discounted_reward_to_go(reward, active, 0.5)
    np.testing.assert_array_equal(to_go[0], [5, 10, 0, 0, 0, 0])
    np.testing.assert_array_equal(to_go[1], [10 / 32, 10 / 16, 10 / 8, 10 / 4, 5, 10])
    printed = ob.uniform_return(jnp.full(2, 10.0), jnp.array([2, 6]), 0.5)
    assert to_go[0, 0] > to_go[1, 0] and printed[0] < printed[1]


def test_uniform_return_is_a_sum_also_without_a_discount():
    length = jnp.array([1, 3, 50])
    for gamma in (0.0, 0.5, 0.95, 1.0):
        total = [sum(2.0 * gamma**t for t in range(n)) for n in length.tolist()]
        np.testing.assert_allclose(ob.uniform_return(jnp.full(3, 2.0), length, gamma), total, rtol=1e-5)
    slope = jax.grad(lambda gamma: ob.uniform_return(jnp.ones(3), length, gamma).sum())(0.5)
    assert np.isfinite(slope)


# --- Group advantages -----------------------------------------------------------------------------------------------


def random_rows(seed=0, size=24, groups=4):
    rng = np.random.default_rng(seed)
    group = rng.integers(0, groups, size)
    traj = rng.integers(0, 3, size)
    return (
        rng.normal(size=size).astype(np.float32),
        group,
        traj,
        rng.integers(-(2**31), 2**31, 5)[rng.integers(0, 5, size)],
    )


def test_without_trajectories_it_is_grpo():
    row, group, _, _ = random_rows()
    for norm, options in (("std", {}), ("none", dict(scale_by_std=False))):
        expected = ob.grpo_advantages(row, group, num_groups=4, singleton="reward", **options)
        np.testing.assert_allclose(advantage(row, group, 4, norm=norm), expected, atol=1e-6)


def test_progress_guided_reward_is_invisible_to_group_normalisation():
    """All of a group share Phi, so the reward is `success (10 + 1 - Phi)`: only eps tells the two apart."""
    rng = np.random.default_rng(1)
    success = rng.integers(0, 2, 32).astype(np.float32)
    group = np.repeat(np.arange(4), 8)
    baseline = np.array([0.0, 0.25, 0.5, 0.875], np.float32)[group]
    with jax.enable_x64(True):
        plain = advantage(10 * success, group, 4)
        guided = advantage(10 * success + ob.capability_reward(success, baseline), group, 4)
        phi = np.where(success > 0, 1.0, rng.uniform(size=32))
        capability = advantage(10 * success + ob.capability_reward(phi, baseline), group, 4)
    np.testing.assert_allclose(guided, plain, atol=1e-6)
    assert np.abs(np.asarray(capability) - plain).max() > 0.01


def test_norms():
    row = jnp.array([1.0, 3.0, 10.0, 10.0, 10.0, 40.0])
    group = jnp.array([0, 0, 1, 1, 1, 1])
    deviation = np.array([-1, 1, -7.5, -7.5, -7.5, 22.5])
    std = np.array([np.sqrt(2)] * 2 + [15] * 4)
    np.testing.assert_allclose(advantage(row, group, 2, norm="none"), deviation, rtol=1e-6)
    np.testing.assert_allclose(advantage(row, group, 2, eps=0.0), deviation / std, rtol=1e-6)
    np.testing.assert_allclose(
        advantage(row, group, 2, norm="std_floor", floor=0.3), deviation / (std + 0.3 + 1e-6), rtol=1e-6
    )
    np.testing.assert_allclose(
        advantage(row, group, 2, norm="batch"), deviation / (np.std(deviation, ddof=1) + 1e-6), rtol=1e-6
    )


def test_a_floor_keeps_small_rewards_small():
    """A group that failed as a whole, with some intrinsic reward, beside one with successes."""
    row = jnp.array([0.0, 0.0, 0.1, 0.0, 10.0, 0.0, 10.0, 0.0])
    group = jnp.repeat(jnp.arange(2), 4)
    std, floor = advantage(row, group, 2), advantage(row, group, 2, norm="std_floor", floor=0.3)
    assert std[2] > std[4] and floor[2] < 0.3 * floor[4]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("by", ["rows", "trajectories"])
def test_single_and_constant_groups(norm, by):
    row, group = jnp.array([0.1, 5.0, 0.1, 0.1]), jnp.array([2, 0, 2, 2])
    traj = None if by == "rows" else jnp.arange(4)
    result = advantage(row, group, 3, traj=traj, norm=norm)
    np.testing.assert_array_equal(np.asarray(result)[[0, 2, 3]], 0)  # exactly: 0.1 is not its own mean in float32
    scale = float(np.std([5.0, 0, 0, 0], ddof=1)) if norm == "batch" else 1.0
    assert float(result[1]) == pytest.approx(5 / scale, rel=1e-5)


def test_trajectories_weigh_alike_however_long():
    """With one return for all steps of an episode, repeating a step changes nothing but the row that it adds."""
    row, group, traj = jnp.array([1.0, 2.0, 6.0]), jnp.zeros(3, int), jnp.array([7, -5, 9])
    longer = jnp.array([0, 1, 2, 2, 2, 2])
    once = advantage(row, group, 1, traj=traj)
    again = advantage(row[longer], group[longer], 1, traj=traj[longer])
    np.testing.assert_array_equal(again, once[longer])
    assert not np.allclose(advantage(row[longer], group[longer], 1), again)


def test_one_trajectory_alone():
    result = advantage(jnp.array([2.0, 1.0]), jnp.zeros(2, int), 1, traj=jnp.array([3, 3]), norm="batch")
    np.testing.assert_allclose(result, [2, 1], rtol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_order_of_rows_and_names_of_groups_do_not_matter(norm):
    row, group, traj, anchor = random_rows(3)
    returns = row[(group * 3 + traj) % 12]  # one a trajectory, so that any of its rows may speak for it
    order, names = np.random.default_rng(4).permutation(24), np.array([3, 1, 0, 2])
    together = advantage(returns, group, 4, traj=traj, norm=norm)
    shuffled = advantage(returns[order], names[group[order]], 4, traj=traj[order] + 100, norm=norm)
    np.testing.assert_allclose(shuffled, np.asarray(together)[order], atol=2e-5)
    steps = gigpo(returns, row, group, anchor)
    shuffled = gigpo(returns[order], row[order], group[order] * 1000 - 7, anchor[order])
    np.testing.assert_allclose(shuffled, np.asarray(steps)[order], atol=2e-5)


def test_gigpo_without_steps_and_with_observations_seen_once():
    row, group, _, anchor = random_rows(5)
    np.testing.assert_allclose(
        gigpo(row, row, group, anchor, weight=0.0, norm="mean_std"), advantage(row, group, 4), atol=1e-6
    )
    alone = gigpo(row, 100 * row, group, np.arange(24) * 10**6)
    np.testing.assert_allclose(alone, advantage(row, group, 4, norm="none"), atol=1e-6)
    same_anchor = gigpo(np.zeros(4), np.array([1.0, 3.0, 5.0, 9.0]), np.array([0, 0, 1, 1]), np.zeros(4, int))
    np.testing.assert_allclose(same_anchor, [-1, 1, -2, 2])  # an observation counts within its group


def test_numbers_may_be_traced_and_no_gradient_flows():
    row, group, traj, anchor = random_rows(6)
    floors = jnp.array([0.0, 0.3, 2.0])
    run = lambda floor: ob.group_advantage(row, group, 4, traj=traj, norm="std_floor", floor=floor)  # noqa: E731
    together = jax.jit(jax.vmap(run))(floors)
    for floor, one in zip(floors, together, strict=True):
        np.testing.assert_allclose(run(float(floor)), one, rtol=1e-5, atol=1e-6)
    for f in (lambda x: ob.group_advantage(x, group, 4), lambda x: ob.gigpo_advantage(x, x, group, anchor)):
        np.testing.assert_array_equal(jax.jit(jax.grad(lambda x, f=f: f(x).sum()))(jnp.asarray(row)), 0)
    reward = jnp.asarray(row).reshape(4, 6)
    gradient = jax.jit(jax.grad(lambda x: ob.reflection_advantage(x, x > 0)[0].sum()))(reward)
    np.testing.assert_array_equal(gradient, 0)


def test_batches_of_batches():
    batches = [random_rows(seed) for seed in range(3)]
    row, group, traj, anchor = (jnp.stack(x) for x in zip(*batches, strict=True))
    together = jax.jit(jax.vmap(lambda r, g, t: ob.group_advantage(r, g, 4, traj=t)))(row, group, traj)
    steps = jax.jit(jax.vmap(lambda r, g, a: ob.gigpo_advantage(r, r**2, g, a)))(row, group, anchor)
    for i in range(3):
        np.testing.assert_allclose(together[i], advantage(row[i], group[i], 4, traj=traj[i]), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(steps[i], gigpo(row[i], row[i] ** 2, group[i], anchor[i]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda r, g: ob.group_advantage(r, g, 2, norm="max"), r"norm must be one of \('std', .* got 'max'"),
        (
            lambda r, g: ob.group_advantage(r, g, 2, norm="std_floor", floor=-0.1),
            "floor must not be negative, got -0.1",
        ),
        (lambda r, g: ob.group_advantage(r, g, 1), r"group_ids must lie in 0..0, got 0..1"),
        (lambda r, g: ob.group_advantage(r[:3], g, 2), r"must be \[B\], got \(3,\) and \(4,\)"),
        (lambda r, g: ob.group_advantage(r, g, 2, traj=g[:3]), r"row, traj must have one shape"),
        (
            lambda r, g: ob.gigpo_advantage(r, r, g, g, norm="std"),
            r"norm must be one of \('mean', 'mean_std'\), got 'std'",
        ),
        (lambda r, g: ob.gigpo_advantage(r, r, g, g[:2]), "row, step_return, group, anchor must have one shape"),
        (lambda r, g: ob.uniform_return(r, g[:2], 0.9), "reward, length must have one shape"),
        (lambda r, g: ob.discounted_reward_to_go(r[None], g, 0.9), r"\(1, 4\)"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.arange(4.0), jnp.array([0, 0, 1, 1]))
