"""The adapter on a data set with the same interface, and on the real package where it is installed."""

import sys

import numpy as np
import pytest

from rollax.envs import clean_answer, few_shot_prompt, reasoning_gym_questions, scored_questions


class FakeDataset:
    """Half a point for the right parity, as real data sets give partial credit."""

    def __len__(self):
        return 3

    def __getitem__(self, i):
        return {"question": f" {i} + 2 =\n", "answer": str(i + 2) if i < 2 else None, "metadata": {"i": i}}

    def score_answer(self, answer, entry):
        right = entry["metadata"]["i"] + 2
        return 1.0 if answer == str(right) else 0.5 if answer.isdigit() and (int(answer) - right) % 2 == 0 else 0.0


def test_adapter():
    questions, score = scored_questions(FakeDataset(), clean=clean_answer)
    assert [(q.text, q.answer) for q in questions] == [("0 + 2 =", "2"), ("1 + 2 =", "3"), ("2 + 2 =", "")]
    assert few_shot_prompt(questions[:1], questions[1].text).endswith("Question: 1 + 2 =\nAnswer:")
    scores = score([0, 1, 2, 1], [' "2".\nQuestion', "5", "4", "none"])
    assert scores.dtype == np.float32
    np.testing.assert_array_equal(scores, [1.0, 0.5, 1.0, 0.0])
    with pytest.raises(ValueError, match="equally many"):
        score([0], [])
    for row in (-1, 3):
        with pytest.raises(ValueError, match=r"rows must be in \[0, 3\)"):
            score([0, row], ["2", "2"])
    _, score = scored_questions(FakeDataset(), clean=lambda reply: reply.split("<answer>")[1])
    assert score(np.array([0]), ["hm <answer>2"])[0] == 1.0


class Grids(FakeDataset):
    """Answers of several lines that end in a full stop; no verdict on an empty reply."""

    def __getitem__(self, i):
        return {"question": "Draw.", "answer": f"{i} .\n. {i}\nDone."}

    def score_answer(self, answer, entry):
        return float(answer == entry["answer"]) if answer else None


def test_answers_of_several_lines():
    questions, score = scored_questions(Grids())
    np.testing.assert_array_equal(score(range(3), [f" {q.answer}\n" for q in questions]), np.ones(3))
    np.testing.assert_array_equal(score([0, 0], ["", "0 ."]), np.zeros(2))


def test_missing_package_and_bad_size(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ImportError, match=r"pip install 'rollax\[reasoning\]'"):
        reasoning_gym_questions("chain_sum", 2)
    with pytest.raises(ValueError, match="size"):
        reasoning_gym_questions("chain_sum", 0)


def test_real_package():
    pytest.importorskip("reasoning_gym")
    questions, score = reasoning_gym_questions(
        "chain_sum", 5, seed=1, min_terms=2, max_terms=2, min_digits=1, max_digits=1
    )
    assert len(questions) == 5
    np.testing.assert_array_equal(score(range(5), [q.answer for q in questions]), np.ones(5))
    assert score([0], ["no idea"])[0] < 0.5
