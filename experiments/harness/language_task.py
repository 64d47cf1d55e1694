"""A pretrained model and a task for it: questions in English, a few examples before each, exact answers on device."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rollax import envs
from rollax.agents import LanguageModel, load_pretrained, restrict_vocabulary
from rollax.envs import Environment, QuestionSplit
from rollax.experiments.harness.devices import parse_mesh

# Questions to train on and to hold out. Calculations with one digit are few.
COUNTS = {"products": (40, 16), "sums": (50, 20), "differences": (28, 10)}


class LanguageTask(NamedTuple):
    """A pretrained model and its task.

    Attributes:
      take: `take() -> params`, handed over to be changed: nothing keeps a second copy. Later calls load them again.
      shapes: of the parameters.
      prefix: what all prompts begin with, ids `[F]`: a policy computes it once per batch, not once per row.
      questions: as text; a state's `row` counts in `questions.train` and `questions.held_out`.
    """

    env: Environment
    held_out: Environment
    model: LanguageModel
    take: Callable[[], Any]
    shapes: Any
    prefix: jax.Array | None
    mesh: Mesh
    questions: QuestionSplit


def load_language_task(
    path: str,
    task: str,
    *,
    mesh: str = "",
    train_questions: int = 0,
    held_out_questions: int = 0,
    bare: bool = False,
    max_answer: int = 8,
    **load: Any,
) -> LanguageTask:
    """Loads the model and tokenises the task.

    Args:
      path: as in `agents.load_pretrained`.
      task: one of `envs.QUESTIONS`.
      mesh: see `parse_mesh`.
      train_questions, held_out_questions: how many; 0 takes 1024 and 128, or what the task has (`COUNTS`).
      bare: examples as bare lines ("7 * 4 = 28"), else "Question: ... Answer: ...".
      max_answer: the most tokens of an answer, its end included.
      load: `dtype`, `remat`, ... of `agents.load_pretrained`.
    Raises:
      ValueError: unknown task, a task without bare lines, a model without a tokenizer, or as `load_pretrained`.
    """
    if task not in envs.QUESTIONS:
        raise ValueError(f"task: expected one of {', '.join(envs.QUESTIONS)} for a pretrained model, got {task!r}")
    counts = COUNTS.get(task, (1024, 128))
    counts = (train_questions or counts[0], held_out_questions or counts[1])
    questions = envs.split_questions(envs.QUESTIONS[task], *counts)
    sides = (questions.train, questions.held_out)
    write: Callable = lambda question: envs.few_shot_prompt(questions.shots, question.text)  # noqa: E731
    if bare:
        if questions.shots[0].line is None:
            raise ValueError(f"bare: the task {task!r} has no bare lines")
        write = lambda question: envs.line_prompt(questions.shots, question.line)  # noqa: E731
    devices = parse_mesh(mesh)
    loaded = load_pretrained(path, mesh=devices, **load)
    if loaded.tokenizer is None:
        raise ValueError(f"model: {path} carries no tokenizer")
    vocab = loaded.tokenizer.tokens()
    kinds = envs.token_kinds(vocab, loaded.stop_ids)
    banks = [
        envs.tokenize_bank(
            [write(question) for question in side], [q.answer for q in side], loaded.tokenizer.encode, kinds
        )
        for side in sides
    ]
    shared = shared_length(
        [row[:length] for bank in banks for row, length in zip(bank.prompts, bank.lengths, strict=True)]
    )
    train, held_out = (
        envs.prompt_bank(
            bank._replace(prompts=bank.prompts[:, shared:], lengths=bank.lengths - shared),
            kinds,
            vocab,
            max_action=max_answer,
            pad_id=loaded.pad_id or 0,
        )
        for bank in banks
    )
    prefix = jnp.asarray(banks[0].prompts[0, :shared]) if shared else None
    model = restrict_vocabulary(loaded.model, len(vocab))
    shapes, ready = jax.eval_shape(lambda x: x, loaded.params), [loaded.params]
    del loaded

    def take():
        return ready.pop() if ready else load_pretrained(path, mesh=devices, **load).params

    return LanguageTask(train, held_out, model, take, shapes, prefix, devices, questions)


def shared_length(rows) -> int:
    """How many ids all rows begin with, leaving every row at least one of its own."""
    first = rows[0]
    shared = min(len(row) for row in rows) - 1
    return next((i for i in range(shared) if any(row[i] != first[i] for row in rows)), shared)
