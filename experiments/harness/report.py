"""What a study found, for people: tables for the terminal, report.md, and report.html, which needs no network."""

import base64
import contextlib
import datetime
import io
import math
import os
import re
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
import rich.markup
import rich.table
from markupsafe import Markup
from rich import box
from rich.console import Console

from rollax.experiments.harness.claims import Verdict, mean_interval
from rollax.experiments.harness.figures import (
    COLOURS,
    Coordinates,
    HeatMap,
    Look,
    Panel,
    draw_map,
    draw_panel,
    looks,
    save,
    save_panels,
    svg,
)

VERDICT_HEAD = ("claim", "says", "verdict", "effect and interval", "asked")
FRAMES = 200  # of an episode that a report shows
LARGEST_FRAME = 480  # pixels
SIGNS = {"above": "> ", "below": "< ", "within": "within ±"}


class Table(NamedTuple):
    """Text for people; every line has a cell for every name in `head`."""

    head: Sequence[str]
    lines: Sequence[Sequence[str]]


class Episode(NamedTuple):
    """One whole episode: `frames` are texts, or uint8 RGB `[T, H, W, 3]`; `reward` is the total."""

    title: str
    frames: Sequence[str] | np.ndarray
    reward: float


class Section(NamedTuple):
    """What one label of a study (a model, a sweep) contributes to its report.

    Attributes:
      label: fit for a file name; the figures are `curves_<label>.png` and `map_<label>_<index>.png`, and PDFs.
      order: arms in the order of their colours.
      seconds: "compile", "train and evaluate".
      rates: for example {"updates/s": 3.1, "sampled tokens/s": 41000.0}.
      maps: the figures of a sweep.
    """

    label: str
    title: str
    table: Table
    verdicts: Sequence[Verdict]
    panels: Sequence[Panel]
    order: Sequence[str] = ()
    episodes: Sequence[Episode] = ()
    seconds: Mapping[str, float] = {}
    rates: Mapping[str, float] = {}
    maps: Sequence[HeatMap | Coordinates] = ()


# --- Tables ---------------------------------------------------------------------------------------------------------


def cell(values: np.ndarray) -> str:
    """Mean and half the 95 % interval over seeds `[seeds]`; the mean alone for one seed, a dash where there is none."""
    mean, low, _ = mean_interval(values)
    if not np.isfinite(mean):
        return "-"
    return f"{mean:.3f} ± {mean - low:.3f}" if np.isfinite(low) else f"{mean:.3f}"


def verdict_lines(verdicts: Sequence[Verdict]) -> list[list[str]]:
    """A line per verdict, under `VERDICT_HEAD`."""
    return [
        [
            v.name,
            v.statement + (f" ({v.note})" if v.note else ""),
            v.verdict,
            f"{effect_and_interval(v)} {v.unit}".strip(),
            asked(v),
        ]
        for v in verdicts
    ]


def signed(value: float) -> str:
    """With three decimals, fewer for large numbers."""
    return f"{value:+.3f}" if not abs(value) >= 10 else f"{value:+,.1f}"


def effect_and_interval(verdict: Verdict) -> str:
    known = math.isfinite(verdict.low) and math.isfinite(verdict.high)
    return signed(verdict.effect) + (f" [{signed(verdict.low)}, {signed(verdict.high)}]" if known else ", no interval")


def asked(verdict: Verdict) -> str:
    """What the claim says of the effect."""
    return f"{SIGNS[verdict.says]}{verdict.bound:g}"


def details(verdict: Verdict) -> list[str]:
    """What else a verdict says of its effect: a test, a standardised size."""
    texts = [f"effect size {verdict.effect_size:.2f}"] if math.isfinite(verdict.effect_size) else []
    if math.isfinite(verdict.p_value):
        texts.append("p" + probability(verdict.p_value))
    if math.isfinite(verdict.p_adjusted) and verdict.p_adjusted != verdict.p_value:
        texts.append("adjusted p" + probability(verdict.p_adjusted))
    return texts


def probability(value: float) -> str:
    return " < 0.001" if value < 0.001 else f" = {value:.3f}"


def basis(verdicts: Sequence[Verdict]) -> str:
    """How many seeds there were, what the intervals are, how the p-values were adjusted."""
    said = [
        (f"{v.seeds} seeds, {100 * v.level:g} % interval" if v.seeds > 1 else "one seed")
        + (f", adjusted by {v.correction.replace('_', ' ')}" if math.isfinite(v.p_adjusted) else "")
        for v in verdicts
    ]
    return " or ".join(dict.fromkeys(said))


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(markdown_text(text) for text in row) + " |" for row in rows)


def markdown_text(text: str) -> str:
    """On one line of Markdown, a cell of a table for example: neither a column nor a tag comes of it."""
    return re.sub(r"<(?=[A-Za-z/!?])", r"\\<", " ".join(text.split("\n")).replace("|", r"\|"))


def fenced(text: str) -> str:
    """A block of Markdown that shows `text` as it is, fences in it included."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def show(title: str, head: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Prints a table; heads may wrap, and the column of statements."""
    table = rich.table.Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(head):
        says = name == "says"
        name = rich.markup.escape(name if says else textwrap.fill(name, 12))
        table.add_column(name, no_wrap=not says, justify="left" if index == 0 or says else "right")
    for line in lines:
        table.add_row(*map(rich.markup.escape, line))
    console = Console()
    console = console if console.is_terminal else Console(width=180)
    console.print(title, style="italic", highlight=False, markup=False)
    console.print(table)


# --- The report -----------------------------------------------------------------------------------------------------


def write_report(
    folder: Path,
    title: str,
    sections: Sequence[Section],
    *,
    config: Mapping[str, Mapping[str, Any]],
    versions: Mapping[str, Any],
) -> Path:
    """Saves the figures (PNG and PDF), report.md and report.html into `folder`; each appears whole or not at all.

    Args:
      config: `{label: {field: value}}`.
      versions: what the result depends on: command (words or text), commit, uncommitted, devices, started, libraries.
    Returns:
      The path of report.html. It loads nothing: figures and frames are inside.
    Raises:
      ValueError: a label that is no file name or comes twice; a table, an episode or a figure of the wrong shape.
    """
    check(sections)
    for section in sections:
        if section.panels:
            save_panels(folder / f"curves_{section.label}.png", section.panels, section.order)
        for index, chart in enumerate(section.maps):
            save(draw_map(chart), folder / f"map_{section.label}_{index}.png")
    write_text(folder / "report.md", markdown_report(title, sections, config, versions))
    write_text(folder / "report.html", html_report(title, sections, config, versions))
    return folder / "report.html"


def check(sections: Sequence[Section]) -> None:
    """Raises ValueError before anything is drawn."""
    labels = [section.label for section in sections]
    for section in sections:
        if not re.fullmatch(r"[\w=,+@-][\w.=,+@-]*", section.label):
            raise ValueError(f"section.label: expected letters, digits and any of _.=,+@-, got {section.label!r}")
        if labels.count(section.label) > 1:
            raise ValueError(f"section.label: expected each once, got {section.label!r} twice")
        for line in section.table.lines:
            if len(line) != len(section.table.head):
                raise ValueError(
                    f"table.lines: expected {len(section.table.head)} cells in {section.label}, got {len(line)}: {line}"
                )
        for episode in section.episodes:
            frames = episode.frames
            if not len(frames):
                raise ValueError(f"episode.frames: expected at least one frame in {episode.title!r}, got none")
            if isinstance(frames, np.ndarray) and (
                frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8
            ):
                raise ValueError(
                    f"episode.frames: expected texts or uint8 [T, H, W, 3], got {frames.dtype} {list(frames.shape)}"
                )


def write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def command_line(versions: Mapping[str, Any]) -> str:
    command = versions.get("command") or ""
    return command if isinstance(command, str) else shlex.join(map(str, command))


def provenance(versions: Mapping[str, Any]) -> dict[str, str]:
    """What ran where and when, in few words."""
    devices = [str(device) for device in versions.get("devices") or []]
    kind = versions.get("device_kind") or (devices[0] if devices else "")
    started = str(versions.get("started") or "")
    with contextlib.suppress(ValueError):  # a time in another form is shown as it is
        started = datetime.datetime.fromisoformat(started).strftime("%-d %B %Y, %H:%M %Z").strip()
    commit = str(versions.get("commit") or "")[:12]
    facts = {
        "started": started,
        "commit": commit + (" + uncommitted changes" if commit and versions.get("uncommitted") else ""),
        "devices": f"{len(devices)} × {kind}" if len(devices) > 1 else str(kind),
        "python": str(versions.get("python") or ""),
        "jax": str(versions.get("jax") or ""),
    }
    return {name: fact for name, fact in facts.items() if fact}


def configuration(config: Mapping[str, Mapping[str, Any]]) -> Table:
    """One line a field, one column a label."""
    fields = dict.fromkeys(field for values in config.values() for field in values)
    return Table(
        ["field", *config],
        [[field, *(plain_text(values.get(field, "")) for values in config.values())] for field in fields],
    )


def plain_text(value: Any) -> str:
    """A value of a configuration or of versions.json."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain_text(item)}" for key, item in value.items())
    return ", ".join(map(plain_text, value)) if isinstance(value, list | tuple) else str(value)


def throughput(section: Section) -> list[tuple[str, str]]:
    """(name, value) of times and rates."""
    times = [(name, duration(value)) for name, value in section.seconds.items()]
    return times + [
        (name, f"{value:,.0f}" if value >= 100 else f"{value:.3g}") for name, value in section.rates.items()
    ]


def duration(seconds: float) -> str:
    """For example "3.2 s", "47 s", "3 min 37 s", "2 h 05 min"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60:02} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60:02} min"


def shown_frames(count: int) -> list[int]:
    """The frames that a report shows: all, or evenly spaced ones from the first to the last."""
    return np.unique(np.linspace(0, count - 1, min(count, FRAMES)).round().astype(int)).tolist()


# --- Markdown -------------------------------------------------------------------------------------------------------


def markdown_report(title, sections, config, versions) -> str:
    facts = ", ".join(f"{name} {fact}" for name, fact in provenance(versions).items())
    text = [f"# {markdown_text(title)}", ""]
    text += [fenced(command_line(versions)), ""] if command_line(versions) else []
    text += [f"{facts}.", ""] if facts else []
    if rivals(sections):
        text += ["Better than the paper at equal cost:", "", *(f"- {markdown_text(x)}" for x in rivals(sections)), ""]
    for section in sections:
        text += [f"## {markdown_text(section.title)}", ""]
        if section.verdicts:
            text += [markdown(VERDICT_HEAD, verdict_lines(section.verdicts)), ""]
        if section.panels:
            text += [f"![curves](curves_{section.label}.png)", ""]
        if section.table.head:
            text += [markdown(*section.table), ""]
        for index, chart in enumerate(section.maps):
            text += [f"![{markdown_text(chart.title)}](map_{section.label}_{index}.png)", ""]
        if spent := throughput(section):
            text += [", ".join(f"{name} {value}" for name, value in spent) + ".", ""]
        for episode in section.episodes:
            if not isinstance(episode.frames, np.ndarray):  # its last frame: report.html has the others
                text += [f"### {markdown_text(episode.title)}: reward {episode.reward:g}", ""]
                text += [fenced(episode.frames[-1]), ""]
    if config:
        text += ["## Configuration", "", markdown(*configuration(config)), ""]
    return "\n".join(text)


# --- HTML -----------------------------------------------------------------------------------------------------------


class Bar(NamedTuple):
    """An interval beside what its claim asks, as shares in percent of the width of a bar.

    Attributes:
      claimed: (from, to), where the claim holds.
      interval: (from, to) of the interval; None where there is none.
      effect: of the mean.
      bounds: (at, text) of the ends of `claimed` inside the bar.
    """

    claimed: tuple[float, float]
    interval: tuple[float, float] | None
    effect: float
    bounds: list[tuple[float, str]]


def interval_bar(verdict: Verdict) -> Bar | None:
    """The verdict as a bar just wide enough for the interval and the bounds; None without a finite effect."""
    if not math.isfinite(verdict.effect):
        return None
    bounds = [-verdict.bound, verdict.bound] if verdict.says == "within" else [verdict.bound]
    finite = [x for x in (verdict.low, verdict.high, verdict.effect, *bounds) if math.isfinite(x)]
    low, high = min(finite), max(finite)
    margin = 0.18 * (high - low) or 1.0

    def at(value):
        return round(100 * min(1.0, max(0.0, (value - low + margin) / (high - low + 2 * margin))), 2)

    start = {"above": verdict.bound, "below": -math.inf, "within": -verdict.bound}[verdict.says]
    end = math.inf if verdict.says == "above" else verdict.bound
    known = math.isfinite(verdict.low) and math.isfinite(verdict.high)
    return Bar(
        claimed=(at(start), at(end)),
        interval=(at(verdict.low), at(verdict.high)) if known else None,
        effect=at(verdict.effect),
        bounds=[(at(bound), f"{bound:g}") for bound in bounds],
    )


class ClaimRow(NamedTuple):
    """One claim and, a column each, what the sections say of it (None where they are silent)."""

    name: str
    statement: str
    asked: str
    verdicts: list[Verdict | None]


def claim_rows(sections: Sequence[Section]) -> list[ClaimRow]:
    """The claims of all sections; a claim that several judge is one row."""
    rows: dict[tuple[str, str, str], list[Verdict | None]] = {}
    for index, section in enumerate(sections):
        for verdict in section.verdicts:
            key = (verdict.name, verdict.statement, f"asked {asked(verdict)} {verdict.unit}".strip())
            rows.setdefault(key, [None] * len(sections))[index] = verdict
    return [ClaimRow(*key, verdicts) for key, verdicts in rows.items()]


class Player(NamedTuple):
    """An episode for the page: `frames` are texts or data URIs, `steps` their places among all `count` frames."""

    title: str
    reward: float
    images: bool
    frames: list[str]
    steps: list[int]
    count: int
    small: bool


def player(episode: Episode) -> Player:
    steps, images = shown_frames(len(episode.frames)), isinstance(episode.frames, np.ndarray)
    frames = [image_uri(episode.frames[i]) if images else str(episode.frames[i]) for i in steps]
    small = images and max(episode.frames.shape[1:3]) < 160  # shown larger, in sharp squares
    return Player(episode.title, episode.reward, images, frames, steps, len(episode.frames), small)


def image_uri(frame: np.ndarray) -> str:
    """uint8 RGB `[H, W, 3]` as a data URI: exact where that is small, as drawn pictures are, else compressed."""
    from PIL import Image  # only an episode with pictures needs it

    image = Image.fromarray(frame)
    image.thumbnail((LARGEST_FRAME, LARGEST_FRAME))
    content = io.BytesIO()
    image.save(content, "WEBP", lossless=True)
    if content.tell() > 20_000:
        content = io.BytesIO()
        image.save(content, "WEBP", quality=75)
    return "data:image/webp;base64," + base64.b64encode(content.getvalue()).decode()


class View(NamedTuple):
    """A section as the template needs it."""

    section: Section
    curves: list[tuple[str, Markup]]
    legend: dict[str, tuple[int, Look, str]]
    maps: list[Markup]
    players: list[Player]
    throughput: list[tuple[str, str]]


def view(index: int, section: Section) -> View:
    """Draws what the page shows of a section."""
    look = looks(section.panels, section.order)
    drawn = {arm for panel in section.panels for arm in panel.curves}
    curves = [
        (panel.title, Markup(svg(draw_panel(panel, look), f"s{index}p{i}"))) for i, panel in enumerate(section.panels)
    ]
    legend = {
        arm: (number, arm_look, f"var(--arm-{COLOURS.index(arm_look.colour)})")
        for number, (arm, arm_look) in enumerate(look.items())
        if arm in drawn
    }
    maps = [Markup(svg(draw_map(chart), f"s{index}m{i}")) for i, chart in enumerate(section.maps)]
    return View(section, curves, legend, maps, [player(e) for e in section.episodes], throughput(section))


def rivals(sections: Sequence[Section]) -> list[str]:
    """What is better than the paper at equal cost, a sentence each."""
    return [
        f"{section.label} {verdict.name}: {verdict.statement}, {effect_and_interval(verdict)} {verdict.unit}".strip()
        for section in sections
        for verdict in section.verdicts
        if verdict.rival and verdict.verdict == "holds"
    ]


def html_report(title, sections, config, versions) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found = [verdict.verdict for section in sections for verdict in section.verdicts]
    return environment.get_template("report.html.jinja").render(
        title=title,
        command=command_line(versions),
        facts=provenance(versions),
        counts={name: found.count(name) for name in ("holds", "fails", "inconclusive")},
        judged=[section for section in sections if section.verdicts],
        claims=claim_rows([section for section in sections if section.verdicts]),
        views=[view(index, section) for index, section in enumerate(sections)],
        rivals=rivals(sections),
        config=configuration(config),
        versions={name: plain_text(value) for name, value in versions.items()},
        asked=asked,
        details=details,
        basis=basis,
        interval_bar=interval_bar,
        effect_and_interval=effect_and_interval,
    )
