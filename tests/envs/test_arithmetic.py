"""Arithmetic against Python's eval, the shaped reward, the curriculum and the held-out split."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rollax.envs import arithmetic, decode
from rollax.envs.arithmetic import ArithmeticState, held_out
from rollax.envs.tokens import PAD, STOP

CONFIGS = [
    pytest.param("+", 2, 2, marks=pytest.mark.slow),
    ("+-*", 2, 3),
    pytest.param("*", 4, 2, marks=pytest.mark.slow),
]


def play(environment, count=400, seed=0):
    def one(key):
        state, observation = environment.reset(key)
        action = environment.expert(key, state)
        return state, observation, action, environment.step(key, state, action)[1]

    return jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(seed), count))


def reply_text(environment, action):
    return decode(action, list(action).index(STOP), environment.spec.vocab)


@pytest.mark.parametrize(("operations", "max_digits", "num_terms"), CONFIGS)
def test_expert_agrees_with_python(operations, max_digits, num_terms):
    environment = arithmetic(operations, max_digits, num_terms)
    _, observation, action, step = play(environment)
    assert np.all(np.asarray(step.reward) == 1) and np.all(np.asarray(step.info["digit_share"]) == 1)
    assert np.all(np.asarray(step.terminated)) and not np.any(np.asarray(step.truncated))
    assert np.all(np.asarray(step.observation.length) == 0)
    assert set(step.info) == {"correct", "digit_share", "stopped", "level"}
    seen = set()
    for i in range(400):
        question = decode(observation.ids[i], observation.length[i], environment.spec.vocab)
        assert question.endswith("=") and not question.startswith("=")
        assert eval(question[:-1]) == int(reply_text(environment, np.asarray(action[i])))
        seen |= set(question) & set("+-*")
        assert np.all(np.asarray(observation.ids[i, observation.length[i] :]) == PAD)
    assert seen == set(operations)
    assert observation.ids.shape[1] == environment.spec.max_observation
    assert len(environment.spec.vocab) == 16


def test_largest_results_fit():
    environment = arithmetic("+-*", 3, 3)
    expert = jax.jit(environment.expert)
    for terms, operations, value in [
        ([999, 999, 999], [2, 2], 999**3),
        ([0, 999, 999], [1, 2], -(999**2)),
        ([0, 0, 0], [1, 0], 0),
        ([100, 0, 10], [2, 1], -10),
    ]:
        state = ArithmeticState(jnp.asarray(terms), jnp.asarray(operations), jnp.int32(3))
        action = np.asarray(expert(None, state))
        assert reply_text(environment, action) == str(value)
        assert str(value) in environment.render(state)


def test_wrong_replies():
    environment = arithmetic()
    step = jax.jit(environment.step)
    state = ArithmeticState(jnp.asarray([57, 66]), jnp.asarray([0]), jnp.int32(2))  # 123

    def grade(text, stop=True):
        ids = [environment.spec.vocab.index(character) for character in text] + [STOP] * stop
        return step(jax.random.key(0), state, jnp.asarray((ids + [5] * 4)[:4]))[1]

    for text, share in [("124", 2 / 3), ("12", 2 / 3), ("", 0), ("321", 1 / 3), ("+12", 0), ("213", 1 / 3)]:
        result = grade(text)
        assert float(result.reward) == 0 == float(result.info["correct"])
        np.testing.assert_allclose(result.info["digit_share"], share, rtol=1e-6)
    assert float(grade("123").reward) == 1
    unstopped = grade("1231", stop=False)
    assert float(unstopped.reward) == 0 and float(unstopped.info["stopped"]) == 0
    np.testing.assert_allclose(unstopped.info["digit_share"], 3 / 4)


def test_levels_follow_their_weights_even_when_traced():
    @jax.jit
    def levels(weights):
        environment = arithmetic("+", 3, level_weights=weights)
        return jax.vmap(environment.reset)(jax.random.split(jax.random.key(0), 600))[0]

    easy = levels(jnp.array([1.0, 0.0, 0.0]))
    assert np.all(np.asarray(easy.level) == 1) and np.asarray(easy.terms).max() == 9
    mixed = levels(jnp.array([1.0, 0.0, 2.0]))
    shares = np.bincount(mixed.level, minlength=4) / 600
    assert shares[2] == 0 and abs(shares[3] - 2 / 3) < 0.08
    for level, largest in ((1, 9), (3, 999)):
        assert np.asarray(mixed.terms)[np.asarray(mixed.level) == level].max() <= largest
    assert int(arithmetic("+", 3).reset(jax.random.key(0))[0].level) == 3


@pytest.mark.parametrize("operation", [0, 1, 2])
def test_split_is_disjoint_balanced_and_blind_to_order(operation):
    a, b = (x.ravel() for x in np.meshgrid(np.arange(100), np.arange(100)))
    terms, operations = np.stack([a, b], -1), np.full((10_000, 1), operation)
    out = np.asarray(jax.vmap(held_out)(ArithmeticState(terms, operations, np.full(10_000, 2)))).reshape(100, 100)
    assert abs(out.mean() - 0.2) < 0.02
    assert np.array_equal(out, out.T) == (operation != 1)  # a - b is another exercise than b - a
    assert 0 < out[:10, :10].sum() < 50  # both sides exist at the smallest level, or drawing would never end
    # No digit, operand or sum is held out as a whole, which a linear hash would do.
    assert out.mean(0).max() < 0.4 and out.mean(0).min() > 0.05
    sums = np.bincount((a + b) % 5, out.ravel()) / 2000
    assert np.abs(sums - 0.2).max() < 0.05


@pytest.mark.parametrize("split", ["train", "held_out", "all"])
def test_draws_stay_on_their_side(split):
    environment = arithmetic("+-*", 2, 3, split=split)
    side = jax.jit(jax.vmap(lambda key: held_out(environment.reset(key)[0])))
    share = np.asarray(side(jax.random.split(jax.random.key(1), 400))).mean()
    assert {"train": share == 0, "held_out": share == 1, "all": 0.1 < share < 0.3}[split]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"operations": "+/"}, "operations"),
        ({"operations": ""}, "operations"),
        ({"operations": "++"}, "operations"),
        ({"num_terms": 1}, "num_terms"),
        ({"operations": "*", "max_digits": 5}, "below"),
        ({"level_weights": jnp.ones(3)}, "level_weights"),
        ({"level_weights": jnp.zeros(2)}, "not all zero"),
        ({"level_weights": [1.0, -1.0]}, "non-negative"),
        ({"level_weights": np.array([1.0, np.nan])}, "finite"),
        ({"split": "test"}, "split"),
    ],
)
def test_bad_arguments(arguments, word):
    with pytest.raises(ValueError, match=word):
        arithmetic(**arguments)
