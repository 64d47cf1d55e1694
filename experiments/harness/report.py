"""Tables for people: the same lines to the terminal and to a Markdown report."""

from collections.abc import Sequence

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from rollax.experiments.harness.claims import Verdict, mean_interval

VERDICT_HEAD = ("claim", "says", "verdict", "effect and interval", "asked")


def cell(values: np.ndarray) -> str:
    """Mean and half the 95 % interval over seeds `[seeds]`; the mean alone for one seed, a dash where there is none."""
    mean, low, _ = mean_interval(values)
    if not np.isfinite(mean):
        return "-"
    return f"{mean:.3f} ± {mean - low:.3f}" if np.isfinite(low) else f"{mean:.3f}"


def verdict_lines(verdicts: Sequence[Verdict]) -> list[list[str]]:
    """A line per verdict, under `VERDICT_HEAD`."""
    signs = {"above": "> ", "below": "< ", "within": "within ±"}
    return [
        [
            v.name,
            v.statement + (f" ({v.note})" if v.note else ""),
            v.verdict,
            f"{v.effect:+.3f} [{v.low:+.3f}, {v.high:+.3f}] {v.unit}".strip(),
            f"{signs[v.says]}{v.bound:g}",
        ]
        for v in verdicts
    ]


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines])


def show(title: str, head: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Prints a table; only the second column of text may wrap."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(head):
        table.add_column(name, no_wrap=name != "says", justify="left" if index == 0 or name == "says" else "right")
    for line in lines:
        table.add_row(*line)
    console = Console()
    console = console if console.is_terminal else Console(width=160)
    console.print(table)
