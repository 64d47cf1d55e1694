"""Tail forks: the coin, the initial law, and the exact expectation against enumeration."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rollax.envs import expected_success, fork_tables, initial_logits, tail_forks


@pytest.fixture(scope="module")
def step():
    environment = tail_forks()
    return jax.jit(jax.vmap(environment.step))


def prompts(count):
    environment = tail_forks()
    return jax.vmap(environment.reset)(jax.random.split(jax.random.key(0), count))


def test_reset_shows_a_uniform_prompt_token():
    state, observation = prompts(8000)
    np.testing.assert_array_equal(observation.ids[:, 0], 32 + state.prompt)
    assert np.all(np.asarray(observation.length) == 1)
    counts = np.bincount(state.prompt, minlength=8)
    assert counts.size == 8 and np.abs(counts - 1000).max() < 150  # five standard deviations
    environment = tail_forks()
    assert len(environment.spec.vocab) == 40 and environment.spec.stop_ids == () and environment.spec.max_action == 6


def test_coin_has_the_stated_probability(step):
    count = 20_000
    state, _ = prompts(count)
    tables = fork_tables()
    rng = np.random.default_rng(0)
    common, good = tables.common[state.prompt], tables.good[state.prompt]
    kind = rng.integers(3, size=common.shape)
    other = np.full_like(common, 35)  # a prompt token: neither
    action = np.where(kind == 0, common, np.where(kind == 1, good, other))
    result = step(jax.random.split(jax.random.key(1), count), state, action)[1]
    share_common, share_good = (kind == 0).mean(1), (kind == 1).mean(1)
    np.testing.assert_allclose(result.info["share_common"], share_common, atol=1e-6)
    np.testing.assert_allclose(result.info["share_good"], share_good, atol=1e-6)
    probability = np.clip(0.35 * share_common + share_good, 0, 1)
    np.testing.assert_allclose(result.info["success_prob"], probability, atol=1e-6)
    reward = np.asarray(result.reward)
    assert set(np.unique(reward)) == {0.0, 1.0} and set(result.info) == {"success_prob", "share_good", "share_common"}
    error = np.sqrt(np.mean(probability * (1 - probability)) / count)
    assert abs(reward.mean() - probability.mean()) < 4 * error
    high = probability > 0.6
    assert reward[high].mean() > 0.6 > 0.4 > reward[probability < 0.4].mean()


def test_expert_always_succeeds_and_nothing_never_does(step):
    environment = tail_forks()
    state, _ = prompts(500)
    keys = jax.random.split(jax.random.key(2), 500)
    action = jax.vmap(environment.expert)(keys, state)
    assert np.all(np.asarray(step(keys, state, action)[1].reward) == 1)
    nothing = step(keys, state, jnp.full((500, 6), 39))[1]
    assert not np.any(np.asarray(nothing.reward)) and np.all(np.asarray(nothing.terminated))


@pytest.mark.parametrize("good_prob", [0.01, 0.03, 0.08])
def test_initial_law(good_prob):
    probs = np.exp(np.asarray(initial_logits(good_prob=good_prob), np.float64))
    tables = fork_tables()
    assert probs.shape == (8, 6, 32) and np.all(tables.common != tables.good)
    np.testing.assert_allclose(probs.sum(-1), 1, rtol=1e-6)
    p, t = np.indices((8, 6))
    np.testing.assert_allclose(probs[p, t, tables.common], 0.6, rtol=1e-6)
    np.testing.assert_allclose(probs[p, t, tables.good], good_prob, rtol=1e-6)
    special = (np.arange(32) == tables.common[..., None]) | (np.arange(32) == tables.good[..., None])
    rest = probs[~special]
    np.testing.assert_allclose(rest, (0.4 - good_prob) / 30, rtol=1e-5)


def test_demonstrations_follow_the_initial_law():
    environment = tail_forks(good_prob=0.08)
    count = 20_000
    state, _ = prompts(count)
    turns = np.asarray(jax.jit(jax.vmap(environment.demonstrate))(jax.random.split(jax.random.key(3), count), state))
    tables = fork_tables()
    common = (turns == tables.common[state.prompt]).mean(0)
    good = (turns == tables.good[state.prompt]).mean(0)
    assert turns.shape == (count, 6) and turns.max() < 32
    assert np.abs(common - 0.6).max() < 0.018 and np.abs(good - 0.08).max() < 0.01  # five standard errors


def test_expected_success_equals_enumeration_over_counts():
    # Law of (number of common, number of good) by dynamic programming over positions; every outcome is clipped.
    rng = np.random.default_rng(0)
    logits = 2 * rng.normal(size=(8, 6, 32)).astype(np.float32)
    tables = fork_tables()
    probs = np.exp(logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True)))
    expected = np.zeros(8)
    for prompt in range(8):
        law = {(0, 0): 1.0}
        for t in range(6):
            common, good = probs[prompt, t, tables.common[prompt, t]], probs[prompt, t, tables.good[prompt, t]]
            after = {}
            for (i, j), mass in law.items():
                for key, p in (((i + 1, j), common), ((i, j + 1), good), ((i, j), 1 - common - good)):
                    after[key] = after.get(key, 0.0) + mass * p
            law = after
        expected[prompt] = sum(mass * np.clip(0.35 * i / 6 + j / 6, 0, 1) for (i, j), mass in law.items())
    np.testing.assert_allclose(expected_success(jnp.asarray(logits), tables), expected, rtol=1e-5)


def test_expected_success_of_the_initial_law_and_of_sampled_turns(step):
    value = np.asarray(expected_success(initial_logits(), fork_tables()))
    np.testing.assert_allclose(value, 0.35 * 0.6 + 0.03, rtol=1e-5)
    environment = tail_forks()
    state, _ = prompts(20_000)
    keys = jax.random.split(jax.random.key(4), 20_000)
    turns = jax.vmap(environment.demonstrate)(keys, state)
    reward = np.asarray(step(jax.random.split(jax.random.key(5), 20_000), state, turns)[1].reward)
    assert abs(reward.mean() - 0.24) < 4 * np.sqrt(0.24 * 0.76 / 20_000)


def test_initial_probability_may_be_traced():
    @jax.jit
    @jax.vmap
    def value(good_prob):
        environment = tail_forks(good_prob=good_prob)
        environment.demonstrate(jax.random.key(0), environment.reset(jax.random.key(0))[0])
        return expected_success(initial_logits(good_prob=good_prob), fork_tables()).mean()

    np.testing.assert_allclose(value(jnp.array([0.01, 0.08])), [0.22, 0.29], rtol=1e-5)


def test_tables_depend_on_the_seed_and_render_names_them():
    assert any(np.any(a != b) for a, b in itertools.pairwise([fork_tables(seed=s).good for s in range(3)]))
    environment = tail_forks()
    text = environment.render(jax.tree.map(lambda x: x[0], prompts(1)[0]))
    assert "common" in text and "good" in text and "prompt" in text


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"num_prompts": 0}, "num_prompts"),
        ({"vocab_size": 2}, "vocab_size"),
        ({"good_prob": 0.0}, "good_prob"),
        ({"good_prob": 0.5, "common_prob": 0.5}, "common_prob"),
    ],
)
def test_bad_arguments(arguments, word):
    with pytest.raises(ValueError, match=word):
        tail_forks(**arguments)


def test_bad_shapes():
    with pytest.raises(ValueError, match="logits"):
        expected_success(jnp.zeros((8, 5, 32)), fork_tables())
    environment = tail_forks()
    with pytest.raises(ValueError, match="action must have the shape"):
        environment.step(jax.random.key(0), environment.reset(jax.random.key(0))[0], jnp.zeros(5, jnp.int32))
