"""The on-device verifier against Python's own parser and exact fractions."""

import ast
import re
from collections import Counter
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rollax.envs.countdown import VOCAB, countdown, evaluate
from rollax.envs.tokens import PAD, STOP, decode, is_held_out

WIDTH = 24
IDS = {character: i for i, character in enumerate(VOCAB)}
evaluate_all = jax.jit(jax.vmap(evaluate))


def encode(text, width=WIDTH):
    return np.asarray([IDS[character] for character in text] + [PAD] * (width - len(text)), np.int32)


def reference(text, numbers):
    """(well formed, uses each number exactly once, divides by zero, value) by Python's parser and fractions."""
    literals = [int(literal) for literal in re.findall(r"\d+", text)]
    once = Counter(literals) == Counter(numbers)

    def value(node):
        if isinstance(node, ast.Constant):
            return Fraction(node.value)
        a, b = value(node.left), value(node.right)
        if isinstance(node.op, ast.Div):
            return a / b
        return a + b if isinstance(node.op, ast.Add) else a - b if isinstance(node.op, ast.Sub) else a * b

    def binary_only(node):
        if isinstance(node, ast.Constant):
            return True
        return (
            isinstance(node, ast.BinOp)
            and isinstance(node.op, ast.Add | ast.Sub | ast.Mult | ast.Div)
            and binary_only(node.left)
            and binary_only(node.right)
        )

    if re.search(r"(?<!\d)0\d", text) or not re.fullmatch(r"[\d+\-*/()]+", text):
        return False, once, False, None
    try:
        tree = ast.parse(text, mode="eval").body
    except SyntaxError:
        return False, once, False, None
    if not binary_only(tree):
        return False, once, False, None
    try:
        return True, once, False, value(tree)
    except ZeroDivisionError:
        return True, once, True, None


def random_expression(rng, numbers):
    """A random tree over the numbers with brackets where they are needed and, sometimes, where they are not."""
    texts = [str(number) for number in rng.permutation(numbers)]
    while len(texts) > 1:
        i = rng.integers(len(texts) - 1)
        joined = texts[i] + rng.choice(list("+-*/")) + texts[i + 1]
        texts[i : i + 2] = [f"({joined})" if rng.random() < 0.5 else joined]
    return texts[0]


def corrupt(rng, text):
    """One random edit, which often leaves nonsense and sometimes another valid expression."""
    i = rng.integers(len(text) + 1)
    character = rng.choice(list("0123456789+-*/()=,"))
    return [text[:i] + character + text[i:], text[:i] + text[i + 1 :], text[:i] + character + text[i + 1 :]][
        rng.integers(3)
    ]


def compare(texts, numbers):
    found = evaluate_all(
        jnp.asarray([encode(text) for text in texts]),
        jnp.asarray([len(text) for text in texts]),
        jnp.asarray(numbers, jnp.int32),
    )
    found = jax.tree.map(np.asarray, found)
    counts = Counter()
    for i, (text, given) in enumerate(zip(texts, numbers, strict=True)):
        well_formed, once, by_zero, value = reference(text, given)
        assert found.well_formed[i] == well_formed, text
        if not well_formed:
            counts["malformed"] += 1
            continue
        assert found.uses_each_number[i] == once, (text, given)
        if once:  # elsewhere int32 is allowed to wrap
            assert found.divides_by_zero[i] == by_zero, text
            counts["by zero" if by_zero else "valued"] += 1
            if not by_zero:
                assert Fraction(int(found.numerator[i]), int(found.denominator[i])) == value, text
        else:
            counts["other numbers"] += 1
    return counts


def test_verifier_agrees_with_python_on_random_expressions():
    rng = np.random.default_rng(0)
    numbers = [rng.integers(1, rng.choice([3, 5, 100]), 4).tolist() for _ in range(4000)]
    texts = [random_expression(rng, given) for given in numbers]
    texts = [text if i % 2 else corrupt(rng, text) for i, text in enumerate(texts)]
    keep = [i for i, text in enumerate(texts) if len(text) <= WIDTH]
    counts = compare([texts[i] for i in keep], [numbers[i] for i in keep])
    assert counts["valued"] > 2000 and counts["malformed"] > 500
    assert counts["by zero"] > 20 and counts["other numbers"] > 300


def test_verifier_agrees_with_python_on_character_soup():
    rng = np.random.default_rng(1)
    soups = ["".join(rng.choice(list("12+-*/()"), rng.integers(0, 9))) for _ in range(6000)]
    counts = compare(soups, [[1, 2, 1, 2]] * len(soups))
    assert counts["malformed"] > 3000 and counts["other numbers"] > 100


@pytest.mark.parametrize(
    "text",
    [
        "",
        "(",
        ")",
        "()",
        "1+",
        "+1",
        "-1",
        "1+-2",
        "1**2",
        "1//2",
        "(1+2",
        "1+2)",
        "1(2)",
        "(1)2",
        "01+2",
        "1=1",
        "1,2",
        "00",
    ],
)
def test_malformed(text):
    assert not bool(jax.jit(evaluate)(encode(text), len(text), jnp.asarray([1, 2])).well_formed)


def test_extreme_values_stay_exact():
    texts = ["99*99*99*99", "(99+99)*(99+99)", "99-99*99*99", "99/(99-99/99)", "99/99/99/99"]
    assert compare(texts, [[99] * 4] * len(texts))["valued"] == 5
    assert compare(["35*35*35*35*35*35", "35/(35*35*35*35*35)"], [[35] * 6] * 2)["valued"] == 2


@pytest.fixture(scope="module")
def played():
    environment = countdown()

    def play(key):
        state, observation = environment.reset(key)
        action = environment.expert(key, state)
        return state, observation, action, environment.step(key, state, action)[1]

    return environment, jax.jit(jax.vmap(play))(jax.random.split(jax.random.key(0), 1000))


def test_expert_solves_every_puzzle(played):
    environment, (state, _, action, step) = played
    assert np.all(np.asarray(step.reward) == 1) and np.all(np.asarray(step.terminated))
    assert not np.any(np.asarray(step.truncated))
    assert set(step.info) == {"correct", "well_formed", "uses_each_number", "divides_by_zero", "value"}
    np.testing.assert_array_equal(step.info["value"], state.target)
    operations = Counter(VOCAB[i] for i in np.asarray(action).ravel() if VOCAB[i] in "+-*/")
    assert set(operations) == set("+-*/")
    assert np.asarray(state.target).min() >= 1 and np.asarray(state.target).max() <= 999
    assert action.shape == (1000, environment.spec.max_action)


def test_prompt_says_the_puzzle(played):
    environment, (state, observation, _, _) = played
    for i in range(20):
        text = decode(observation.ids[i], observation.length[i], VOCAB)
        assert text == ",".join(map(str, np.asarray(state.numbers[i]))) + f"={state.target[i]}"
        assert str(state.target[i]) in environment.render(jax.tree.map(lambda x, i=i: x[i], state))


def test_wrong_replies_get_nothing(played):
    environment, (state, _, action, _) = played
    step = jax.jit(jax.vmap(environment.step, in_axes=(None, 0, 0)))
    wrong_target = step(jax.random.key(0), state._replace(target=state.target + 1), action)[1]
    assert not np.any(np.asarray(wrong_target.reward)) and np.all(np.asarray(wrong_target.info["well_formed"]))
    # The target itself has the right value but not the right numbers.
    lone = jnp.full_like(action, STOP).at[:, :3].set(np.stack([encode(f"{t:03}", 3) for t in np.asarray(state.target)]))
    cheat = step(jax.random.key(0), state, lone)[1]
    assert not np.any(np.asarray(cheat.reward)) and not np.any(np.asarray(cheat.info["uses_each_number"]))
    silent = step(jax.random.key(0), state, jnp.full_like(action, STOP))[1]
    assert not np.any(np.asarray(silent.reward)) and not np.any(np.asarray(silent.info["well_formed"]))


def test_split_is_respected(played):
    _, (state, *_) = played
    assert not np.any(np.asarray(is_held_out(state.numbers)))
    environment = countdown(3, 9, 99, split="held_out")  # small, and not empty
    state, _ = jax.jit(jax.vmap(environment.reset))(jax.random.split(jax.random.key(1), 200))
    assert np.all(np.asarray(is_held_out(state.numbers)))


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"num_numbers": 1}, "num_numbers"),
        ({"num_numbers": 5, "max_number": 99}, "max_number"),
        ({"max_target": 50}, "max_target"),
        ({"max_action": 5}, "max_action"),
        ({"split": "test"}, "split"),
        ({"num_numbers": 4, "max_number": 2, "max_target": 2, "split": "held_out"}, "has no set of numbers"),
    ],
)
def test_bad_arguments(arguments, word):
    with pytest.raises(ValueError, match=word):
        countdown(**arguments)


def test_a_small_split_that_is_not_empty():
    state, _ = jax.jit(lambda key: countdown(4, 2, 2, split="train").reset(key))(jax.random.key(0))
    assert not is_held_out(state.numbers)
