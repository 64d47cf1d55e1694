"""Learning curves, heat maps and parallel coordinates: PNG and PDF fit for a paper, inline SVG for a report."""

import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
from scipy import stats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAGE, COLUMN = 6.9, 3.3  # inches: a page and a column of most two-column venues
# Stand-ins that `svg` replaces, so that inline figures take the colours of the page around them.
INK, PAPER = "#1b1e23", "#fefefe"
# Okabe and Ito's colours, distinguishable without red-green vision; then repeats, drawn dashed and dotted.
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", INK, "#8c8c8c"]
DASHES = ("none", "4 1.5", "1.2 1.2")  # in line widths, as SVG has them
POINTS = 300  # of a curve: no figure shows more
STYLE = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.linewidth": 0.3,
    "grid.alpha": 0.5,
    "lines.linewidth": 1.2,
    "legend.frameon": False,
    "savefig.dpi": 200,
    "text.parse_math": False,  # names of arms may hold a $
    "pdf.fonttype": 42,  # TrueType, which venues ask for and which can be edited
    "svg.fonttype": "none",
    "svg.hashsalt": "rollax",  # equal figures are equal files
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}


class Panel(NamedTuple):
    """One plot: `curves[arm]` is `[seeds, points]` at the `x` `[points]`."""

    title: str
    x: np.ndarray
    curves: dict[str, np.ndarray]
    x_label: str = "update"


class HeatMap(NamedTuple):
    """A sweep of two settings: `values` `[len(y), len(x)]`, NaN where nothing ran; `x` and `y` numbers or names."""

    title: str
    x_name: str
    y_name: str
    x: Sequence[Any]
    y: Sequence[Any]
    values: np.ndarray


class Coordinates(NamedTuple):
    """A sweep of many settings: run `i` had `points[i]` `[names]`, numbers or names, and reached `values[i]`."""

    title: str
    names: Sequence[str]
    points: Sequence[Sequence[Any]] | np.ndarray
    values: np.ndarray


class Look(NamedTuple):
    """How an arm is drawn in every figure: a colour and the dashes of its line, in line widths."""

    colour: str
    dash: str


def looks(panels: Sequence[Panel], order: Sequence[str] = ()) -> dict[str, Look]:
    """The look of every arm, those of `order` first, so that several figures of a study agree. 24 differ."""
    arms = dict.fromkeys([*order, *(arm for panel in panels for arm in panel.curves)])
    return {arm: Look(COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)]) for i, arm in enumerate(arms)}


def interval(values: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """(mean, half width) over the first axis, by Student's t; half width 0 for a single seed."""
    mean = values.mean(axis=0)
    if values.shape[0] < 2:
        return mean, np.zeros_like(mean)
    return mean, stats.t.ppf(0.5 + level / 2, values.shape[0] - 1) * stats.sem(values, axis=0)


# --- Drawing --------------------------------------------------------------------------------------------------------


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure, in inches, that belongs to no window and no global state."""
    from matplotlib.figure import Figure  # half a second, and only a study that ends needs it

    return Figure(figsize=(width, height), layout="constrained")


def styled():
    """The context in which figures are drawn and saved."""
    import matplotlib

    return matplotlib.rc_context(STYLE)


def draw_curves(axis: "Axes", panel: Panel, look: dict[str, Look]) -> None:
    """Mean and 95 % interval over seeds of every arm; of long curves evenly spaced points, the last among them."""
    x = np.asarray(panel.x)
    if x.ndim != 1 or not x.size:
        raise ValueError(f"panel.x: expected [points], at least one, got shape {x.shape} in {panel.title!r}")
    shown = np.unique(np.linspace(0, len(x) - 1, min(len(x), POINTS)).round().astype(int))
    index = {arm: i for i, arm in enumerate(look)}
    many = len(panel.curves) > 8
    for arm, values in panel.curves.items():
        values = np.asarray(values, np.float64)
        if values.ndim != 2 or values.shape[1] != len(x) or not values.shape[0]:
            raise ValueError(f"panel.curves[{arm!r}]: expected [seeds, {len(x)}], got {list(values.shape)}")
        mean, half = interval(values[:, shown])
        above = 3 - index[arm] / len(look)  # the first arm lies above the others, where curves meet
        (line,) = axis.plot(x[shown], mean, **line_style(look[arm]), zorder=above, gid=f"arm{index[arm]}-line")
        if len(x) == 1:
            line.set_marker("o")
        band = axis.fill_between(x[shown], mean - half, mean + half, color=look[arm].colour, linewidth=0)
        band.set(alpha=0.08 if many else 0.15, gid=f"arm{index[arm]}-band")
    axis.set_xlabel(panel.x_label)
    axis.locator_params(nbins=5)
    axis.margins(x=0.02)


def line_style(look: Look) -> dict[str, Any]:
    """The look as matplotlib's options of a line."""
    dash = "-" if look.dash == "none" else (0, tuple(map(float, look.dash.split())))
    return {"color": look.colour, "linestyle": dash}


def draw_panels(panels: Sequence[Panel], order: Sequence[str] = (), columns: int = 3) -> "Figure":
    """All panels on a page's width under one legend, one look an arm in every panel."""
    from matplotlib.lines import Line2D

    if not panels:
        raise ValueError("panels: expected at least one, got none")
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    width = {1: COLUMN, 2: 0.75 * PAGE}.get(columns, 2.3 * columns)
    look = looks(panels, order)
    drawn = [arm for arm in look if any(arm in panel.curves for panel in panels)]
    # A letter of 7.5 points is 0.065 inches wide, and each entry has a line of 0.4 before it.
    across = max(1, min(len(drawn), int(width / (0.4 + 0.065 * max(map(len, drawn), default=1)))))
    with styled():
        figure = new_figure(width, 1.75 * rows + 0.17 * -(-len(drawn) // across) + 0.1)
        axes = figure.subplots(rows, columns, squeeze=False)
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
        for axis, panel in zip(axes.flat, panels, strict=False):
            draw_curves(axis, panel, look)
            axis.set_title(panel.title)
        handles = [Line2D([], [], **line_style(look[arm])) for arm in drawn]
        # matplotlib leaves out names that begin with an underscore; a space before them changes nothing else.
        names = [f" {arm}" if arm.startswith("_") else arm for arm in drawn]
        figure.legend(handles, names, loc="outside lower center", ncols=across, handlelength=2.2, columnspacing=1.2)
    return figure


def draw_panel(panel: Panel, look: dict[str, Look]) -> "Figure":
    """One panel without title and legend, which the report writes around it."""
    with styled():
        figure = new_figure(COLUMN, 2.1)
        draw_curves(figure.subplots(), panel, look)
    return figure


def draw_map(chart: HeatMap | Coordinates) -> "Figure":
    """The figure of a sweep."""
    return draw_heat_map(chart) if isinstance(chart, HeatMap) else draw_coordinates(chart)


def draw_heat_map(chart: HeatMap) -> "Figure":
    """Every cell with its number where there are few; grey where nothing ran."""
    values = np.asarray(chart.values, np.float64)
    rows, columns = len(chart.y), len(chart.x)
    if values.shape != (rows, columns) or not values.size:
        raise ValueError(f"heat_map.values: expected [{rows}, {columns}], not empty, got {list(values.shape)}")
    few = columns <= 12 and rows <= 20
    with styled():
        figure = new_figure(
            min(PAGE, max(COLUMN, 1.5 + (0.5 if few else 0.25) * columns)), min(6.0, max(1.9, 0.9 + 0.26 * rows))
        )
        axis = figure.subplots()
        axis.grid(False)
        axis.set_facecolor("#8c8c8c55")
        mesh = axis.pcolormesh(
            np.ma.masked_invalid(values), cmap="viridis", edgecolors="face", linewidth=0.2, rasterized=not few
        )
        # More names than fit would overprint each other.
        for names, tick, room in ((chart.x, axis.set_xticks, 14), (chart.y, axis.set_yticks, 20)):
            every = -(-len(names) // room)
            tick(np.arange(0, len(names), every) + 0.5, [short(name) for name in names[::every]])
        if max(len(short(x)) for x in chart.x) > 7:
            axis.tick_params("x", rotation=25)
        decimals = 2 - int(np.floor(np.log10(max(np.abs(values[np.isfinite(values)]).max(initial=0.0), 1e-30))))
        for row, column in np.argwhere(np.isfinite(values)) if few else ():
            red, green, blue, _ = mesh.to_rgba(values[row, column])
            light = 0.299 * red + 0.587 * green + 0.114 * blue > 0.5
            axis.text(
                column + 0.5, row + 0.5, f"{values[row, column]:.{min(max(decimals, 0), 4)}f}", ha="center",
                va="center", fontsize=7, color="#000000" if light else "#ffffff",
            )  # fmt: skip
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        axis.set(xlabel=chart.x_name, ylabel=chart.y_name, title=chart.title)
        bar = figure.colorbar(mesh, ax=axis, fraction=0.05, pad=0.02)
        bar.outline.set_visible(False)
        bar.ax.locator_params(nbins=5)
    return figure


class Scale(NamedTuple):
    """One vertical axis: the height in [0, 1] of every run, and which text stands at which height."""

    heights: np.ndarray
    ticks: list[tuple[float, str]]
    log: bool = False


def scale(values: Sequence[Any], may_be_log: bool = True) -> Scale:
    """Numbers on a line, or on a log line if that centres positive ones better; anything else by its name."""
    if not all(isinstance(v, int | float | np.number) and not isinstance(v, bool) for v in values):
        names = list(dict.fromkeys(map(str, values)))
        at = np.linspace(0.0, 1.0, len(names)) if len(names) > 1 else np.array([0.5])
        height = dict(zip(names, at, strict=True))
        return Scale(np.array([height[str(v)] for v in values]), [(height[name], name) for name in names])
    numbers = np.asarray(values, np.float64)
    distinct = np.unique(numbers[np.isfinite(numbers)])
    if not distinct.size:
        return Scale(np.full(len(numbers), np.nan), [])
    low, high, middle = distinct[0], distinct[-1], np.median(distinct)

    def height(value, line):
        return (line(value) - line(low)) / (line(high) - line(low)) if high > low else 0.5 + 0.0 * value

    log = bool(may_be_log and low > 0 and high >= 20 * low)
    log = log and abs(height(middle, np.log) - 0.5) < abs(height(middle, np.asarray) - 0.5)
    line = np.log if log else np.asarray
    if len(distinct) <= 8:
        between = distinct
    elif log:
        between = 10.0 ** np.arange(np.ceil(np.log10(low)), np.log10(high))
    else:
        step = 10.0 ** np.floor(np.log10(high - low))
        step *= 2.0 if high - low > 5 * step else 1.0 if high - low > 2.5 * step else 0.5
        between = step * np.arange(np.ceil(low / step), np.ceil(high / step))
    kept: list[tuple[float, str]] = []
    for tick in (low, high, *between):
        at = float(height(tick, line))
        if all(abs(at - other) > 0.06 for other, _ in kept):  # closer ones would overprint each other
            kept.append((at, short(tick)))
    return Scale(height(numbers, line), kept, log)


def draw_coordinates(chart: Coordinates) -> "Figure":
    """Parallel coordinates: one line a run, the last axis its value, the highest on top and in strong orange.

    Runs without a finite value are dotted and end before that axis.
    """
    from matplotlib.colors import LinearSegmentedColormap

    values = np.asarray(chart.values, np.float64)
    points = [list(point) for point in chart.points]
    wrong = [point for point in points if len(point) != len(chart.names)]
    if values.shape != (len(points),) or not points or wrong:
        raise ValueError(
            f"coordinates.points: expected [{values.size}, {len(chart.names)}], one row a value, not empty, "
            f"got {len(points)} rows{f', one of {len(wrong[0])}' if wrong else ''}"
        )
    axes = [scale(list(column)) for column in zip(*points, strict=True)] + [scale(list(values), may_be_log=False)]
    heights = np.stack([axis.heights for axis in axes], axis=1)
    colours = LinearSegmentedColormap.from_list("strong", ["#7d93a6", "#cc79a7", "#d55e00"])
    finite = np.isfinite(values)
    rank = stats.rankdata(np.where(finite, values, -np.inf)) / len(values)
    names = [*chart.names, chart.title]
    room = PAGE / len(names)  # inches between axes
    slanted = max(map(len, names)) * 0.065 > room
    with styled():
        figure = new_figure(PAGE, 2.9)
        axis = figure.subplots()
        axis.set_axis_off()
        for run in np.argsort(np.where(finite, values, -np.inf), kind="stable"):
            strong = rank[run] ** 2 if finite[run] else 0.0  # of many runs only the best may stand out
            axis.plot(
                heights[run], color=colours(strong), linewidth=0.5 + 0.9 * strong, alpha=0.35 + 0.6 * strong,
                linestyle="-" if finite[run] else ":", clip_on=False,
            )  # fmt: skip
        for at, (name, line) in enumerate(zip(names, axes, strict=True)):
            last = at == len(names) - 1
            axis.plot([at, at], [0, 1], color=INK, linewidth=0.8, clip_on=False)
            for height, text in line.ticks:
                axis.annotate(
                    text, (at, height), (3, 0), textcoords="offset points", va="center", fontsize=7, zorder=5,
                    bbox=dict(facecolor=PAPER, edgecolor="none", alpha=0.75, pad=0.6),
                )  # fmt: skip
            axis.annotate(
                f"{name}\n(log)" if line.log else name, (at, 0), (0, -10), textcoords="offset points",
                ha="right" if slanted else "center", va="top", rotation=18 if slanted else 0,
                fontweight="bold" if last else "normal",
            )  # fmt: skip
        axis.set(xlim=(-0.1, len(names) - 0.7), ylim=(-0.02, 1.02))
    return figure


def short(value: Any) -> str:
    """A number in three digits, anything else as it is."""
    return re.sub(r"e\+?(-?)0*", r"e\1", f"{value:.3g}") if isinstance(value, float | np.floating) else str(value)


# --- Files ----------------------------------------------------------------------------------------------------------


def save(figure: "Figure", path: Path) -> None:
    """Saves `path`, a PNG, and the PDF beside it, fonts embedded; each appears whole or not at all."""
    if path.suffix != ".png":
        raise ValueError(f"path: expected a name that ends in .png, got {path}")
    for kind, date in (("png", "Creation Time"), ("pdf", "CreationDate")):
        temporary = path.with_name(f".{path.stem}.{kind}.tmp")
        with styled():
            figure.savefig(temporary, format=kind, metadata={date: None})
        os.replace(temporary, path.with_suffix(f".{kind}"))


def save_panels(path: Path, panels: Sequence[Panel], order: Sequence[str] = (), columns: int = 3) -> None:
    """Saves the panels as PNG and PDF: mean and 95 % interval over seeds, one colour an arm in every panel.

    Args:
      path: of the PNG; the PDF stands beside it.
      order: arms in the order of their colours, so that several figures of a study agree.
    """
    save(draw_panels(panels, order, columns), path)


def svg(figure: "Figure", name: str) -> str:
    """The figure as an `<svg>` to put into HTML: no fonts, no addresses, the colours and the font of the page.

    Args:
      name: begins every id in it, so that several figures on a page do not collide.
    """
    content = io.BytesIO()
    with styled():
        figure.savefig(content, format="svg", facecolor="none")
    root = ElementTree.fromstring(content.getvalue())
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    used = set(re.findall(r"(?:url\(#|href=\")#?([^\")]+)", content.getvalue().decode()))
    for parent in list(root.iter()):
        # What would style the page around, and addresses of vocabularies that nobody loads.
        for child in [child for child in parent if plain_name(child.tag) in ("style", "metadata")]:
            parent.remove(child)
    for element in root.iter():
        element.tag = plain_name(element.tag)
        attributes = {plain_name(key): value for key, value in element.attrib.items()}
        if element.tag != "text" and not (element.text or "").strip():
            element.text = None
        element.tail = None
        element.attrib.clear()
        element.attrib.update(inline_attributes(attributes, name, used))
    root.attrib.update({"class": "plot", "width": f"{width * 1.5:.0f}", "height": f"{height * 1.5:.0f}"})
    return ElementTree.tostring(root, encoding="unicode")


def inline_attributes(attributes: dict[str, str], name: str, used: set[str]) -> dict[str, str]:
    """Attributes of an element of an inline SVG: see `svg`. Ids that nothing uses are dropped."""
    result = {}
    for key, value in attributes.items():
        if key == "id":
            if arm := re.fullmatch(r"arm(\d+)-(?:line|band)", value):
                result["data-arm"] = arm[1]
            if value in used:
                result["id"] = f"{name}-{value}"
        elif key == "href":
            result[key] = f"#{name}-{value[1:]}" if value.startswith("#") else value
        elif key == "d":
            result[key] = re.sub(r"\d+\.\d+", lambda number: f"{float(number[0]):.2f}", " ".join(value.split()))
        elif key not in ("version", "type"):
            value = value.replace("url(#", f"url(#{name}-").replace(INK, "currentColor")
            value = value.replace(PAPER, "var(--page)")
            if key == "style":
                value = re.sub(r"font: ((?:bold |\d+ )*)([\d.]+px) [^;]*", r"font-weight: \1; font-size: \2", value)
                value = re.sub(r"font-weight: ;|font-family: [^;]*;? ?", "", value)
                for index, colour in enumerate(COLOURS):
                    value = value.replace(colour, f"var(--arm-{index})")
            result[key] = value
    return result


def plain_name(name: str) -> str:
    """Without the XML namespace: HTML knows SVG's names by themselves."""
    return name.rpartition("}")[2]
