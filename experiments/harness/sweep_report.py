"""What a sweep found: its points, the best first, the claims over them, curves, maps of the settings."""

import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from rollax.experiments.harness.command_line import UserError
from rollax.experiments.harness.figures import Coordinates, HeatMap, Panel
from rollax.experiments.harness.report import Section, Table, cell, show, write_report
from rollax.experiments.harness.run_folder import RunFolder
from rollax.experiments.harness.study import Study
from rollax.experiments.harness.sweep import Point, outcome

SHOWN = 20  # lines on the terminal
BEST = 6  # curves


class Done(NamedTuple):
    """A point, what it found, and the mean over its seeds that ranks it."""

    point: Point
    found: dict
    value: float


def report(
    study: Study,
    folder: RunFolder,
    points: Sequence[Point],
    fields: Sequence[str],
    *,
    metric: str = "",
    row: str = "",
    minimize: bool = False,
) -> None:
    """To the terminal, results.json and report.html.

    Args:
      fields: that were swept.
      metric: a column of the study or a held-out metric; the first column when empty.
      row: the arm that is ranked; the first when empty.
    Raises:
      UserError: no point has such a metric or row.
    """
    metric = metric or next(iter(study.columns))
    found = [(point, outcome(folder.path, point) or {"error": "has not run"}) for point in points]
    for point, one in found:
        if "error" in one:
            print(f"point {point.name} ({describe(point.values)}): {one['error']}", file=sys.stderr)
    folder.write_json("results.json", {point.name: one for point, one in found})
    whole = [(point, one) for point, one in found if "error" not in one]
    row = row or next((name for _, one in whole for name in one["rows"]), "")
    done = [Done(point, one, value_of(one, row, metric)) for point, one in whole]
    if whole and all(np.isnan(one.value) for one in done):
        check_ranking([one for _, one in whole], row, metric)
    sign = 1 if minimize else -1
    done.sort(key=lambda one: (one.found.get("pruned", False), not np.isfinite(one.value), sign * one.value))
    sections = []
    for label in dict.fromkeys(one.point.label for one in done):
        own = [one for one in done if one.point.label == label]
        sections += [points_section(own, label, fields, metric, row), *claims_section(own, label)]
    for section in sections:
        show(section.title, section.table.head, section.table.lines[:SHOWN])
    if sections:
        config, versions = folder.read_json("config.json"), folder.read_json("versions.json")
        page = write_report(folder.path, f"{study.title}: sweep", sections, config=config, versions=versions)
        print(f"report: {page}")


def value_of(found: dict, row: str, metric: str) -> float:
    """What a search made of it; else the mean over the seeds of a column, or of a held-out metric at the end.

    NaN for a point without such a row or metric.
    """
    if "value" in found:
        return float(to_array(found["value"]))
    columns, curves = found["rows"].get(row, {}), found["held_out"].get(row, {})
    if metric not in columns and metric not in curves:
        return float("nan")
    values = columns[metric] if metric in columns else [curve[-1] for curve in curves[metric]]
    return float(to_array(values).mean())


def check_ranking(found: Sequence[dict], row: str, metric: str) -> None:
    """Raises UserError if no point has the row or the metric."""
    rows = dict.fromkeys(name for one in found for name in one["rows"])
    if row not in rows:
        raise UserError(f"row: expected one of {', '.join(rows)}, got {row!r}")
    names = dict.fromkeys(
        name for one in found if row in one["rows"] for name in (*one["rows"][row], *one["held_out"][row])
    )
    if metric not in names:
        raise UserError(f"metric: expected one of {', '.join(names)}, got {metric!r}")


def points_section(own: Sequence[Done], label: str, fields: Sequence[str], metric: str, row: str) -> Section:
    first = own[0].found
    columns = list(next(iter(first["rows"].values())))
    trained = ["updates"] if any(one.found.get("pruned") for one in own) else []
    lines = [
        [
            *(text_of(one.point.values[field]) for field in fields),
            *(str(one.found["evaluated_at"][-1]) for _ in trained),
            arm,
            *(cell(to_array(values[column])) for column in columns),
        ]
        for one in own
        for arm, values in one.found["rows"].items()
    ]
    seeds = len(next(iter(first["rows"].values()))[columns[0]])
    chosen = "; the best is chosen by its result, confirm it with other seeds" if len(own) > 1 else ""
    return Section(
        label=label,
        title=f"{label}: {len(own)} points, {seeds} seeds each, by {metric} of {row}{chosen}",
        table=Table([*fields, *trained, "arm", *columns], lines),
        verdicts=(),
        panels=[*curves_of(own, row), *lines_of(own, fields, metric)],
        seconds={name: sum(one.found["seconds"][name] for one in own) for name in first["seconds"]},
        rates=first["rates"],
        maps=maps_of(own, fields, metric, row),
    )


def claims_section(own: Sequence[Done], label: str) -> list[Section]:
    """At how many points each claim came out how."""
    verdicts: dict[tuple[str, str], Counter] = {}
    for one in own:
        for claim in one.found["claims"]:
            verdicts.setdefault((claim["name"], claim["statement"]), Counter())[claim["verdict"]] += 1
    if not verdicts:
        return []
    outcomes = ("holds", "fails", "inconclusive")
    lines = [[*claim, *(str(count[outcome]) for outcome in outcomes)] for claim, count in verdicts.items()]
    title = f"{label}: claims, number of the {len(own)} points"
    return [Section(f"{label}_claims", title, Table(["claim", "says", *outcomes], lines), (), ())]


def curves_of(own: Sequence[Done], row: str) -> list[Panel]:
    """Held-out reward of the best points that ran to the end."""
    at = max((one.found["evaluated_at"] for one in own), key=lambda at: at[-1])
    whole = [
        one
        for one in own
        if one.found["evaluated_at"] == at and "reward" in one.found["held_out"].get(row, {}) and np.isfinite(one.value)
    ]
    curves = {describe(one.point.values): to_array(one.found["held_out"][row]["reward"]) for one in whole[:BEST]}
    title = f"held-out reward of {row}, best points"
    return [Panel(title, np.array(at), curves)] if curves else []


def lines_of(own: Sequence[Done], fields: Sequence[str], metric: str) -> list[Panel]:
    """One numeric setting: the metric against it, an arm a line."""
    if len(fields) != 1 or len(own) < 2 or not all(is_number(one.point.values[fields[0]]) for one in own):
        return []
    own = sorted(own, key=lambda one: one.point.values[fields[0]])
    x = np.array([one.point.values[fields[0]] for one in own])
    arms = [arm for arm in own[0].found["rows"] if all(metric in one.found["rows"].get(arm, {}) for one in own)]
    curves = {arm: np.stack([to_array(one.found["rows"][arm][metric]) for one in own], axis=1) for arm in arms}
    return [Panel(f"{metric} against {fields[0]}", x, curves, fields[0])] if curves else []


def maps_of(own: Sequence[Done], fields: Sequence[str], metric: str, row: str) -> list[HeatMap | Coordinates]:
    """A heat map of two settings that were combined, parallel coordinates of others."""
    if len(fields) < 2 or len(own) < 2:
        return []
    title = f"{metric} of {row}"
    settings = [
        [value if is_number(value) else text_of(value) for value in (one.point.values[field] for field in fields)]
        for one in own
    ]
    axes = [
        sorted(set(axis), key=lambda value: (isinstance(value, str), value)) for axis in zip(*settings, strict=True)
    ]
    if len(fields) == 2 and len(axes[0]) * len(axes[1]) == len(own):
        values = np.empty((len(axes[1]), len(axes[0])))
        for (x, y), one in zip(settings, own, strict=True):
            values[axes[1].index(y), axes[0].index(x)] = one.value
        return [HeatMap(title, fields[0], fields[1], axes[0], axes[1], values)]
    return [Coordinates(title, fields, settings, np.array([one.value for one in own]))]


def describe(values: dict[str, Any]) -> str:
    return ", ".join(f"{field}={text_of(value)}" for field, value in values.items())


def text_of(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "+".join(map(str, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def to_array(values: Any) -> np.ndarray:
    """Of JSON, where null is NaN."""
    return np.array(values, np.float64)
