"""Learning curves with intervals, in a style fit for a paper."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

STYLE = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "grid.linewidth": 0.3,
    "grid.alpha": 0.5,
    "lines.linewidth": 1.2,
    "legend.frameon": False,
    "savefig.dpi": 200,
}
# Okabe and Ito's colours, distinguishable without red-green vision; then darker repeats, drawn dashed.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999"]


class Panel(NamedTuple):
    """One plot: `curves[arm]` is `[seeds, points]` at the `x` `[points]`."""

    title: str
    x: np.ndarray
    curves: dict[str, np.ndarray]
    x_label: str = "update"


def interval(values: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """(mean, half width) over the first axis, by Student's t; half width 0 for a single seed."""
    mean = values.mean(axis=0)
    if values.shape[0] < 2:
        return mean, np.zeros_like(mean)
    return mean, stats.t.ppf(0.5 + level / 2, values.shape[0] - 1) * stats.sem(values, axis=0)


def save_panels(path: Path, panels: Sequence[Panel], order: Sequence[str] = (), columns: int = 3) -> None:
    """Saves the panels as one PNG: mean and 95 % interval over seeds, one colour an arm in every panel.

    Args:
      order: arms in the order of their colours, so that several figures of a study agree.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    arms = list(dict.fromkeys([*order, *(arm for panel in panels for arm in panel.curves)]))
    look = {arm: (COLOURS[i % len(COLOURS)], ("-", "--", ":")[i // len(COLOURS) % 3]) for i, arm in enumerate(arms)}
    rows = -(-len(panels) // columns)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(rows, columns, figsize=(2.5 * columns, 1.9 * rows + 0.6), squeeze=False)
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
        for axis, panel in zip(axes.flat, panels, strict=False):
            for arm, values in panel.curves.items():
                mean, half = interval(np.asarray(values, np.float64))
                colour, line = look[arm]
                axis.plot(panel.x, mean, line, color=colour, label=arm)
                axis.fill_between(panel.x, mean - half, mean + half, color=colour, alpha=0.15, linewidth=0)
            axis.set_title(panel.title)
            axis.set_xlabel(panel.x_label)
        handles = {
            text: handle for axis in axes.flat for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)
        }
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(7, len(handles)))
        figure.set_layout_engine("constrained")
        figure.savefig(path)
        plt.close(figure)
