"""The Python loop around a compiled study: chunks of updates with an evaluation after each, and what they gave.

The study's `advance` scans over a chunk of updates; metrics leave the program when a chunk is done.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rollax.experiments.harness.run import RunFolder, progress


class Results(NamedTuple):
    """What a study gave, by row (an arm in a regime).

    Attributes:
      train: `train[row][metric]` is `[seeds, updates, ...]`.
      held_out: `held_out[row][metric]` is `[seeds, evaluations]`, the first before any update.
      evaluated_at: updates done at each evaluation.
      seconds: "compile", "train and evaluate".
    """

    train: dict[str, dict[str, np.ndarray]]
    held_out: dict[str, dict[str, np.ndarray]]
    evaluated_at: np.ndarray
    seconds: dict[str, float]


def run_chunks(
    label: str,
    rows: Sequence[str],
    updates: int,
    folder: RunFolder,
    advance: Callable,
    evaluate: Callable,
    state: Any,
    *arguments: Any,
) -> Results:
    """Compiles `advance` and `evaluate`, calls them in turn until `updates` are done, logs and shows.

    Args:
      rows: names of the rows of the program, the first axis of all metrics.
      advance: `advance(state, *arguments) -> (state, metrics [rows, seeds, updates of a chunk, ...])`; the state is
        donated.
      evaluate: `evaluate(state, *arguments) -> metrics [rows, seeds]`.
    """
    begun = time.perf_counter()
    advance = jax.jit(advance, donate_argnums=0).lower(state, *arguments).compile()
    evaluate = jax.jit(evaluate).lower(state, *arguments).compile()
    compiled = time.perf_counter()
    history, held_out, evaluated_at = [], [jax.device_get(evaluate(state, *arguments))], [0]
    tokens = 0
    with progress(f"{label}: {len(rows)} rows x {held_out[0]['reward'].shape[1]} seeds", updates) as tell:
        while evaluated_at[-1] < updates:
            state, metrics = advance(state, *arguments)
            history.append(jax.device_get(metrics))
            held_out.append(jax.device_get(evaluate(state, *arguments)))
            evaluated_at.append(evaluated_at[-1] + history[-1]["reward"].shape[2])
            for index, row in enumerate(rows):
                train = {name: value[index].mean() for name, value in history[-1].items() if value.ndim == 3}
                test = {f"held_out/{name}": value[index].mean() for name, value in held_out[-1].items()}
                folder.log(label=label, row=row, update=evaluated_at[-1], **train, **test)
            tokens += history[-1]["tokens"].sum()
            rate = tokens / (time.perf_counter() - compiled)
            tell(evaluated_at[-1], f"held-out reward {held_out[-1]['reward'].mean():.3f}, {rate:,.0f} sampled tokens/s")
    seconds = {"compile": compiled - begun, "train and evaluate": time.perf_counter() - compiled}
    train = {name: np.concatenate([part[name] for part in history], axis=2) for name in history[0]}
    test = {name: np.stack([part[name] for part in held_out], axis=2) for name in held_out[0]}

    def by_row(tree):
        return {row: {name: value[i] for name, value in tree.items()} for i, row in enumerate(rows)}

    return Results(by_row(train), by_row(test), np.array(evaluated_at), seconds)


def merge(results: Sequence[Results]) -> Results:
    """Rows and seeds that ran one after the other, as if they had run together."""

    def together(parts):
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    rows = dict.fromkeys(row for result in results for row in result.train)
    train, held_out = (
        {row: together([r[field][row] for r in results if row in r[field]]) for row in rows} for field in (0, 1)
    )
    seconds = {name: sum(result.seconds[name] for result in results) for name in results[0].seconds}
    return Results(train, held_out, results[0].evaluated_at, seconds)


def late(results: Results, row: str, metric: str = "reward") -> np.ndarray:
    """Mean over the last sixth of the updates, `[seeds]`."""
    values = results.train[row][metric]
    return values[:, -max(1, values.shape[1] // 6) :].mean(axis=1)


def early(results: Results, row: str, metric: str = "reward") -> np.ndarray:
    """Mean over the first sixth of the updates, `[seeds]`."""
    values = results.train[row][metric]
    return values[:, : max(1, values.shape[1] // 6)].mean(axis=1)


def final(results: Results, row: str, metric: str = "reward") -> np.ndarray:
    """At the last evaluation, `[seeds]`."""
    return results.held_out[row][metric][:, -1]


def gap(better: str, worse: str, measure: Callable = late, metric: str = "reward") -> Callable[[Results], np.ndarray]:
    """The difference of two rows at equal seeds, `[seeds]`: the effect of a claim."""
    return lambda results: measure(results, better, metric) - measure(results, worse, metric)
