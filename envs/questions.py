"""Small questions in English for a pretrained language model, with exact answers and the few-shot prompts around them.

Written on the host from a NumPy generator. The plain "Question: ... Answer:" form with four examples is what a model
of a hundred million parameters follows best; the tasks are those it gets right some of the time, as RL needs.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

# Stripped at both ends of a reply: white space, straight and curly quotes.
IGNORED = " \t\r\"'“”‘’"

WORDS = (
    *("apple", "bread", "chair", "door", "earth", "flower", "green", "house", "island", "juice", "king", "lemon"),
    *("music", "night", "ocean", "plant", "queen", "river", "stone", "sugar", "table", "uncle", "village", "water"),
    *("yellow", "zebra"),
)


class Question(NamedTuple):
    """A question with its exact answer.

    Attributes:
      text: the question in words.
      answer: clean text (`clean_answer` leaves it alone).
      identity: what makes it the same exercise in another order; splits never share one.
      line: the bare left-hand side, such as "7 * 4 =", or None where there is none.
    """

    text: str
    answer: str
    identity: tuple
    line: str | None = None


class QuestionSplit(NamedTuple):
    """Demonstrations, training and held-out questions; no identity is in two of them, no text occurs twice."""

    shots: tuple[Question, ...]
    train: tuple[Question, ...]
    held_out: tuple[Question, ...]


def largest_of_three(rng: np.random.Generator) -> Question:
    """ "Which number is the largest: 42, 20, 51? Answer with a number only.": three different numbers of 1-98."""
    numbers = [int(x) for x in 1 + rng.choice(98, size=3, replace=False)]
    text = f"Which number is the largest: {', '.join(map(str, numbers))}? Answer with a number only."
    return Question(text, str(max(numbers)), tuple(sorted(numbers)))


def products(rng: np.random.Generator) -> Question:
    """ "What is 7 * 4? Answer with a number only.": factors 2-9, so 64 questions in all."""
    a, b = (int(x) for x in rng.integers(2, 10, size=2))
    return _calculation(a, "*", b, a * b)


def sums(rng: np.random.Generator) -> Question:
    """ "What is 9 + 4? Answer with a number only.": terms 1-9, so 81 questions in all."""
    a, b = (int(x) for x in rng.integers(1, 10, size=2))
    return _calculation(a, "+", b, a + b)


def differences(rng: np.random.Generator) -> Question:
    """ "What is 9 - 4? Answer with a number only.": digits 1-9, the larger first, so 45 questions in all."""
    b, a = sorted(int(x) for x in rng.integers(1, 10, size=2))
    return _calculation(a, "-", b, a - b)


def alphabetical_order(rng: np.random.Generator) -> Question:
    """ "Sort these words in alphabetical order: plant, green, music": three of 26 common words."""
    words = [WORDS[i] for i in rng.choice(len(WORDS), size=3, replace=False)]
    text = f"Sort these words in alphabetical order: {', '.join(words)}"
    return Question(text, ", ".join(sorted(words)), tuple(sorted(words)))


QUESTIONS: dict[str, Callable[[np.random.Generator], Question]] = {
    "largest_of_three": largest_of_three,
    "products": products,
    "sums": sums,
    "differences": differences,
    "alphabetical_order": alphabetical_order,
}


def split_questions(
    generate: Callable[[np.random.Generator], Question],
    num_train: int,
    num_held_out: int,
    *,
    num_shots: int = 4,
    seed: int = 0,
) -> QuestionSplit:
    """Different questions for demonstrations, training and test, drawn with `generate`.

    Each new identity goes to a side as it is drawn. Where a small task runs out of questions that way, all of them are
    dealt again, in whole identities, such that every side is filled.

    Args:
      generate: one of `QUESTIONS`, or a function like them.
      num_train, num_held_out: how many of each.
      num_shots: demonstrations, each of another identity.
      seed: of everything.

    Raises:
      ValueError: a negative count, or a task without that many questions (of different identities).
    """
    wanted = {"shots": num_shots, "train": num_train, "held_out": num_held_out}
    if min(wanted.values()) < 0:
        raise ValueError(f"num_train, num_held_out and num_shots must not be negative, got {wanted}")
    rng = np.random.default_rng(seed)
    found: dict[str, list[Question]] = {side: [] for side in wanted}
    side_of: dict[tuple, str] = {}
    texts: set[str] = set()
    orders: dict[tuple, dict[str, Question]] = {}  # all questions seen, by identity and text
    fruitless = 0
    while any(len(found[side]) < count for side, count in wanted.items()):
        if fruitless > 10_000:
            return _deal([list(same.values()) for same in orders.values()], wanted, rng)
        fruitless += 1
        question = generate(rng)
        orders.setdefault(question.identity, {})[question.text] = question
        if question.text in texts:
            continue
        if question.identity not in side_of:
            missing = {side: count - len(found[side]) for side, count in wanted.items()}
            if missing["shots"]:
                side = "shots"
            elif missing["train"] + missing["held_out"] == 0:
                continue
            else:
                odds = missing["train"] / (missing["train"] + missing["held_out"])
                side = "train" if rng.random() < odds else "held_out"
            side_of[question.identity] = side
        elif side_of[question.identity] == "shots":
            continue  # another order of a demonstration
        side = side_of[question.identity]
        if len(found[side]) < wanted[side]:
            found[side].append(question)
            texts.add(question.text)
            fruitless = 0
    return QuestionSplit(*(tuple(found[side]) for side in ("shots", "train", "held_out")))


def few_shot_prompt(shots: Sequence[Question], text: str) -> str:
    """The raw form: "Question: ...\\nAnswer: ...\\n\\n" for each demonstration, then the question up to "Answer:"."""
    examples = "".join(f"Question: {shot.text}\nAnswer: {shot.answer}\n\n" for shot in shots)
    return f"{examples}Question: {text}\nAnswer:"


def line_prompt(shots: Sequence[Question], line: str) -> str:
    """The bare form: a line such as "7 * 4 = 28" for each demonstration, then the left-hand side, "6 * 8 =".

    Raises:
      ValueError: if a demonstration has no such line.
    """
    if any(shot.line is None for shot in shots):
        raise ValueError("shots must have a bare line each, got one without")
    return "".join(f"{shot.line} {shot.answer}\n" for shot in shots) + line


def clean_answer(text: str) -> str:
    """First line of a reply, without spaces and quotes at its ends and without one final full stop."""
    line = text.split("\n", 1)[0].strip(IGNORED)
    return line[:-1].rstrip(IGNORED) if line.endswith(".") else line


def is_correct(reply: str, answer: str) -> bool:
    """Exact match of the cleaned reply: the rule that `envs.prompts.verify` applies to token ids."""
    return clean_answer(reply) == answer


def _deal(groups, wanted, rng):
    """Fill the sides from groups of questions with one identity, none of which may serve two sides."""
    num_shots, num_train, num_held_out = wanted.values()
    groups = [groups[i] for i in rng.permutation(len(groups))]
    if sum(map(len, groups[num_shots:])) < num_train + num_held_out:
        groups.sort(key=len)  # demonstrations use one question of a group: take small groups
    shots, rest = groups[:num_shots], groups[num_shots:]
    rest = [rest[i] for i in rng.permutation(len(rest))]
    # Bit s of sums[i]: some of the groups from i on have s questions together.
    sums = [1]
    for group in reversed(rest):
        sums.append(sums[-1] | sums[-1] << len(group))
    sums.reverse()
    spare = sum(map(len, rest)) - num_train - num_held_out

    def can_fill(i, size):
        """Whether groups from i on can bring training from `size` to `num_train` and at most `spare` more."""
        least, most = max(num_train - size, 0), num_train + spare - size
        return most >= least and sums[i] >> least & ((1 << most - least + 1) - 1) != 0

    if len(shots) < num_shots or not can_fill(0, 0):
        found = sum(map(len, groups))
        raise ValueError(f"the task has too few different questions: wanted {wanted}, found {found} in all")
    train, held_out = [], []
    odds = num_train / max(num_train + num_held_out, 1)
    for i, group in enumerate(rest, 1):
        to_train, to_held_out = can_fill(i, len(train) + len(group)), can_fill(i, len(train))
        (train if to_train and (not to_held_out or rng.random() < odds) else held_out).extend(group)
    return QuestionSplit(tuple(group[0] for group in shots), tuple(train[:num_train]), tuple(held_out[:num_held_out]))


def _calculation(a, operation, b, result):
    identity = (operation, *sorted((a, b)))
    return Question(
        f"What is {a} {operation} {b}? Answer with a number only.", str(result), identity, f"{a} {operation} {b} ="
    )
