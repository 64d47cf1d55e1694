"""RetroAgent's intrinsic rewards against the released code's (golden/retroagent.npz, float64) and their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rollax import objectives as ob
from rollax.tests.support import GOLDEN

FILE = dict(np.load(GOLDEN / "retroagent.npz"))


def case(prefix):
    return {name.removeprefix(prefix): x for name, x in FILE.items() if name.startswith(prefix)}


@pytest.mark.parametrize("number", range(3))
def test_iterations_of_the_released_code(number):
    golden = case(f"intrinsic{number}_")
    size, tasks = int(golden["group_size"]), golden["baseline_before"].shape[1]
    task = jnp.repeat(jnp.arange(tasks), size)
    assert number != 0 or len(golden["won"]) == 5

    @jax.jit
    def iteration(baseline, completed, won, predicted):
        phi = ob.subtask_potential(completed, golden["num_subtasks"], won, binary=bool(golden["binary_potential"]))
        intrinsic = ob.capability_reward(phi, baseline[task])
        if golden["center_in_group"]:
            intrinsic = ob.dr_grpo_advantages(intrinsic, task)
        after = ob.update_baseline(baseline, jnp.arange(tasks), won.reshape(tasks, size).mean(axis=1))
        return phi, intrinsic, ob.reflection_reward(predicted, won), after

    with jax.enable_x64(True):
        baseline = jnp.zeros(tasks)
        for i, won in enumerate(golden["won"]):
            np.testing.assert_allclose(baseline, golden["baseline_before"][i], atol=1e-12)
            phi, intrinsic, reflect, baseline = iteration(
                baseline, golden["subtasks_done"][i], won, golden["predicted_success"][i]
            )
            assert intrinsic.dtype == np.float64
            np.testing.assert_allclose(phi, golden["potential"][i], atol=1e-12)
            np.testing.assert_allclose(intrinsic, golden["intrinsic_reward"][i], atol=1e-12)
            np.testing.assert_array_equal(reflect, golden["reflect_reward"][i])
            # The gate of the memory is a right prediction, which is what pays here.
            assert (reflect > 0).sum() == golden["lessons_stored"][i]
            np.testing.assert_allclose(baseline, golden["baseline_after"][i], atol=1e-12)


def test_potential_is_grounded():
    potential = ob.subtask_potential([2, 0, 4, 9, 1], 4, [0, 1, 0, 0, 0], parsed=[True, False, False, True, True])
    np.testing.assert_allclose(potential, [0.5, 1, 0, 1, 0.25])
    np.testing.assert_allclose(ob.subtask_potential([3, 0], [0, 0], [0, 1]), [0, 1])  # an empty list of subtasks
    np.testing.assert_allclose(ob.subtask_potential([3, 0], 4, [0, 1], binary=True), [0, 1])


def test_reward_is_what_lies_above_the_baseline():
    phi, baseline = jnp.array([0.75, 0.5, 1.0]), jnp.array([0.25, 0.75, 1.0])
    np.testing.assert_allclose(ob.capability_reward(phi, baseline), [0.5, 0, 0])
    gradient = jax.grad(lambda x, y: ob.capability_reward(x, y).sum(), argnums=(0, 1))(phi, baseline)
    np.testing.assert_array_equal(gradient, 0)


def test_progress_guided_reward_is_invisible_to_a_group():
    """All members share Phi, so success times (10 + 1 - Phi) has the advantage of success times 10."""
    with jax.enable_x64(True):
        success = jnp.array([1.0, 0, 0, 1, 0, 0, 0, 0])
        group, phi_x = jnp.zeros(8, int), jnp.full(8, 0.25)
        plain = ob.group_advantage(10 * success, group, 1)
        guided = ob.group_advantage(10 * success + ob.capability_reward(success, phi_x), group, 1)
        np.testing.assert_allclose(guided, plain, atol=1e-6)
        potential = jnp.array([1.0, 0.5, 0, 1, 0, 0, 0, 0])
        shaped = ob.group_advantage(10 * success + ob.capability_reward(potential, phi_x), group, 1)
        assert np.abs(shaped - plain).max() > 0.01


def test_baseline_never_falls_and_takes_the_larger():
    baseline = jnp.array([0.5, 0.0, 0.25])
    after = ob.update_baseline(baseline, jnp.array([0, 1, 1, -1, 3]), jnp.array([0.25, 0.5, 0.75, 1.0, 1.0]))
    np.testing.assert_allclose(after, [0.5, 0.75, 0.25])
    many = jax.vmap(ob.update_baseline, (0, None, 0))(
        jnp.stack([baseline, 0 * baseline]), jnp.array([2, 0]), jnp.array([[1.0, 0.5], [0.25, 0.125]])
    )
    np.testing.assert_allclose(many, [[0.5, 0, 1], [0.125, 0, 0.25]])


def test_rules_of_the_reflection_reward():
    predicted, success = jnp.array([1, 1, 0, 0]), jnp.array([1, 0, 1, 0])
    intrinsic = jnp.array([0.5, 0.25, 0, 0])
    rules = ("consistency", "eq3", "r_int")
    reward = {rule: ob.reflection_reward(predicted, success, intrinsic, rule=rule) for rule in rules}
    np.testing.assert_allclose(reward["consistency"], [10, 0, 0, 10])
    np.testing.assert_allclose(reward["eq3"], [10, 0, 0, 0])
    np.testing.assert_allclose(reward["r_int"], [0.5, 0.25, 0, 0])
    scaled = jax.vmap(lambda scale: ob.reflection_reward(predicted, success, scale=scale))(jnp.array([1.0, 2.0]))
    np.testing.assert_allclose(scaled, [[1, 0, 0, 1], [2, 0, 0, 2]])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ob.capability_reward(jnp.ones(2), jnp.ones(3)), r"phi, baseline .* \[\(2,\), \(3,\)\]"),
        (lambda: ob.subtask_potential([1, 2], 4, [1]), r"completed, success .* \[\(2,\), \(1,\)\]"),
        (lambda: ob.update_baseline(jnp.ones(2), [0], jnp.ones(2)), r"task, group_success .* \[\(1,\), \(2,\)\]"),
        (lambda: ob.update_baseline(jnp.ones((2, 1)), [0], [1.0]), r"baseline .* \[K\] and \[G\], got \(2, 1\)"),
        (lambda: ob.reflection_reward([1], [1], rule="eq4"), "rule must be one of .*'eq3'.*, got 'eq4'"),
        (lambda: ob.reflection_reward([1], [1], rule="r_int"), "intrinsic must be an array .* got None"),
        (lambda: ob.reflection_reward([1], [1, 0]), "predicted, success"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
