"""Adapter for the procedural data sets of reasoning-gym (arXiv 2505.24760): questions, and scores on the host.

Their verifiers are Python and often give partial credit, so unlike the other environments these rewards are computed
from text between two compiled programs. The package is optional: `pip install 'rollax[reasoning]'`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from rollax.envs.questions import Question


class ScoredQuestions(NamedTuple):
    """Questions of one data set and their scorer.

    Attributes:
      questions: with the reference answers: one of several right ones in some data sets, "" where there is none.
      score: `score(rows, replies) -> float32 [B]` in [0, 1]: the data set's own verdict on each reply (a text, cleaned
        before) to the question of that row, 0 where it gives none. ValueError for a row that is not there.
    """

    questions: tuple[Question, ...]
    score: Callable[[Sequence[int], Sequence[str]], np.ndarray]


def reasoning_gym_questions(
    name: str, size: int, seed: int = 0, *, clean: Callable[[str], str] = str.strip, **options: Any
) -> ScoredQuestions:
    """Questions of the reasoning-gym data set `name`, e.g. "chain_sum", with its generator's options.

    `clean` as for `scored_questions`.

    Raises:
      ImportError: reasoning-gym is not installed.
      ValueError: `size` below 1 (and whatever reasoning-gym says about its options).
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    try:
        import reasoning_gym
    except ImportError as error:
        raise ImportError("reasoning-gym is missing: pip install 'rollax[reasoning]'") from error
    return scored_questions(reasoning_gym.create_dataset(name, size=size, seed=seed, **options), clean)


def scored_questions(dataset: Any, clean: Callable[[str], str] = str.strip) -> ScoredQuestions:
    """Wrap a data set object with reasoning-gym's interface.

    Args:
      dataset: has a length, `dataset[i]` with "question" and "answer", and `score_answer(answer, entry) -> float`.
      clean: what is done to a reply before it is scored; `clean_answer` for answers of one line without a final full
        stop, or one that cuts out an <answer> tag. The default keeps every line, as grids and lists need.
    """
    entries = [dataset[i] for i in range(len(dataset))]
    questions = tuple(
        Question(
            entry["question"].strip(), "" if entry["answer"] is None else str(entry["answer"]), (entry["question"],)
        )
        for entry in entries
    )

    def score(rows, replies):
        if len(rows) != len(replies):
            raise ValueError(f"rows and replies must be equally many, got {len(rows)} and {len(replies)}")
        if not all(0 <= row < len(entries) for row in rows):
            raise ValueError(f"rows must be in [0, {len(entries)}), got {list(rows)}")
        scores = [
            dataset.score_answer(answer=clean(reply), entry=entries[int(row)]) or 0.0  # None for some bad replies
            for row, reply in zip(rows, replies, strict=True)
        ]
        return np.asarray(scores, np.float32)

    return ScoredQuestions(questions, score)
