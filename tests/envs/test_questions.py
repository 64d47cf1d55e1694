"""Questions in English: formats, answers, splits without overlap, and the cleaning rule."""

import hashlib
import re

import numpy as np
import pytest

from rollax.envs import QUESTIONS, Question, clean_answer, few_shot_prompt, is_correct, line_prompt, split_questions


@pytest.mark.parametrize("name", QUESTIONS)
def test_answers_and_formats(name):
    rng = np.random.default_rng(0)
    texts = set()
    for _ in range(500):
        question = QUESTIONS[name](rng)
        texts.add(question.text)
        assert clean_answer(question.answer) == question.answer
        if name == "largest_of_three":
            found = re.fullmatch(
                r"Which number is the largest: (\d+), (\d+), (\d+)\? Answer with a number only\.", question.text
            )
            numbers = list(map(int, found.groups()))
            assert question.answer == str(max(numbers)) and len(set(numbers)) == 3
            assert min(numbers) >= 1 and max(numbers) <= 98
        elif name == "alphabetical_order":
            words = question.text.removeprefix("Sort these words in alphabetical order: ").split(", ")
            assert question.answer == ", ".join(sorted(words)) and len(set(words)) == 3
        else:
            found = re.fullmatch(r"What is (\d [-+*] \d)\? Answer with a number only\.", question.text)
            assert question.answer == str(eval(found[1])) and int(question.answer) >= 0
            assert question.line == f"{found[1]} ="
    expected = {"products": 64, "sums": 81, "differences": 45}
    assert len(texts) == expected.get(name, len(texts)) and len(texts) > 40


@pytest.mark.parametrize(
    ("name", "num_train", "num_held_out"),
    [("largest_of_three", 300, 100), ("products", 36, 12), ("alphabetical_order", 200, 50)],
)
def test_splits_share_no_question_in_any_order(name, num_train, num_held_out):
    shots, train, held_out = split_questions(QUESTIONS[name], num_train, num_held_out, seed=3)
    assert (len(shots), len(train), len(held_out)) == (4, num_train, num_held_out)
    texts = [question.text for question in (*shots, *train, *held_out)]
    assert len(set(texts)) == len(texts)
    identities = [{question.identity for question in side} for side in (shots, train, held_out)]
    assert not identities[0] & identities[1] and not identities[0] & identities[2] and not identities[1] & identities[2]
    assert len(identities[0]) == 4
    assert split_questions(QUESTIONS[name], num_train, num_held_out, seed=3).train == train
    assert split_questions(QUESTIONS[name], num_train, num_held_out, seed=4).train != train


@pytest.mark.parametrize(
    ("name", "num_train", "num_held_out"),
    [
        ("products", 40, 16),
        pytest.param("products", 44, 16, marks=pytest.mark.slow),
        ("sums", 50, 20),
        ("differences", 28, 10),
        ("differences", 41, 0),
    ],
)
def test_small_tasks_are_split_whenever_they_can_be(name, num_train, num_held_out):
    for seed in range(10):
        split = split_questions(QUESTIONS[name], num_train, num_held_out, seed=seed)
        assert [len(side) for side in split] == [4, num_train, num_held_out]
        assert len({question.text for side in split for question in side}) == 4 + num_train + num_held_out
        identities = [{question.identity for question in side} for side in split]
        assert len(set.union(*identities)) == sum(map(len, identities))
    assert split_questions(QUESTIONS[name], num_train, num_held_out, seed=9) == split


def test_the_default_split_stays_what_it_was():
    split = split_questions(QUESTIONS["largest_of_three"], 1024, 128)
    assert hashlib.sha256(repr(split).encode()).hexdigest()[:16] == "f78290ca64e62907"


def test_too_few_questions():
    with pytest.raises(ValueError, match="too few different questions"):
        split_questions(QUESTIONS["products"], 60, 10)
    with pytest.raises(ValueError, match="too few different questions"):
        split_questions(QUESTIONS["products"], 0, 0, num_shots=37)
    with pytest.raises(ValueError, match="negative"):
        split_questions(QUESTIONS["products"], -1, 10)


def test_few_shot_prompts():
    shots = [Question("What is 7 * 4?", "28", (4, 7), "7 * 4 ="), Question("What is 2 * 3?", "6", (2, 3), "2 * 3 =")]
    assert few_shot_prompt(shots, "What is 5 * 5?") == (
        "Question: What is 7 * 4?\nAnswer: 28\n\nQuestion: What is 2 * 3?\nAnswer: 6\n\n"
        "Question: What is 5 * 5?\nAnswer:"
    )
    assert few_shot_prompt([], "Why?") == "Question: Why?\nAnswer:"
    assert line_prompt(shots, "5 * 5 =") == "7 * 4 = 28\n2 * 3 = 6\n5 * 5 ="
    with pytest.raises(ValueError, match="bare line"):
        line_prompt([Question("Why?", "so", ())], "5 * 5 =")


@pytest.mark.parametrize(
    ("reply", "clean"),
    [
        (" 42", "42"),
        ("42.\n\nQuestion: What", "42"),
        (' "42".', "42"),
        ('"42."', "42"),
        ("42..", "42."),
        ("\n42", ""),
        (".", ""),
        ("", ""),
        ("4 2", "4 2"),
        ("'green, music'", "green, music"),
        ("3.5", "3.5"),
        ("“42”", "42"),
    ],
)
def test_clean_answer(reply, clean):
    assert clean_answer(reply) == clean
    assert is_correct(reply, "42") == (clean == "42")
