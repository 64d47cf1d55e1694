"""Sweeps: many configurations of a study, as few programs.

Fields that a study traces, and seeds, go into one program by nested `vmap`, in parts that fit the memory; fields that
are static make separate programs, one process each. A finished point is a file, so a sweep resumes by what is missing.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import time
import traceback
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from rollax.experiments.harness.claims import judge_all
from rollax.experiments.harness.command_line import Options, UserError
from rollax.experiments.harness.loop import Program, Results, compiled, run, vectorize
from rollax.experiments.harness.run_folder import RunFolder, plain
from rollax.experiments.harness.study import Build, Study, rates_of, train, train_of

MEMORY_SHARE = 0.8  # of what is free, for the programs of a sweep


class Point(NamedTuple):
    """One configuration of a sweep. `values` are the fields that differ; `label` is the study's (a model, say)."""

    name: str
    label: str
    values: dict[str, Any]
    config: Any


def parse_value(text: str, kind: Any, field: str) -> Any:
    """A word of the command line as the type of a field; the parts of a tuple are joined by "+"."""
    if typing.get_origin(kind) is tuple:
        return tuple(parse_value(part, typing.get_args(kind)[0], field) for part in text.split("+"))
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"grid: {field} expects true or false, got {text!r}")
        return text.lower() == "true"
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"grid: {field} expects {kind.__name__}, got {text!r}") from None


def parse_grid(words: Sequence[str], config: Any) -> dict[str, list[str]]:
    """`["delta=0.01,0.02", "lr=1e-3"]` as the words of each field, in order.

    Raises:
      ValueError: no "=", no value, a field twice, or one that the configuration does not have.
    """
    fields = [field.name for field in dataclasses.fields(config) if field.name not in Options.names()]
    grid = {}
    for word in words:
        field, equals, values = word.partition("=")
        field = field.replace("-", "_")
        if not equals or not all(values.split(",")):
            raise ValueError(f"grid: expected a form like delta=0.01,0.02, got {word!r}")
        if field not in fields:
            raise ValueError(f"grid: expected one of the fields {', '.join(fields)}, got {field!r}")
        if field in ("seed", "seeds"):
            raise ValueError(f"grid: seeds are no axis, every point has the same ones: use --{field}, got {word!r}")
        if field in grid:
            raise ValueError(f"grid: expected each field once, got {field} twice")
        grid[field] = values.split(",")
    return grid


def with_values(config: Any, words: dict[str, str]) -> tuple[dict[str, Any], Any]:
    """The typed values of some fields, and the configuration with them, checked."""
    kinds = typing.get_type_hints(type(config))
    values = {field: parse_value(word, kinds[field], field) for field, word in words.items()}
    config = dataclasses.replace(config, **values)
    config.check()
    return values, config


def points_of(configs: dict[str, Any], grid: dict[str, list[str]]) -> list[Point]:
    """Every combination of the grid's values for every label; all of them are checked."""
    combined = [
        (label, *with_values(config, dict(zip(grid, words, strict=True))))
        for label, config in configs.items()
        for words in itertools.product(*grid.values())
    ]
    return [Point(f"{index:04d}", *point) for index, point in enumerate(combined)]


def program_key(study: Study, config: Any) -> Any:
    """Equal for configurations that one program can train.

    A traced field may differ, but for being zero: a zero may switch a term off, which changes the program.
    """
    traced = {field: bool(getattr(config, field)) for field in study.traced if hasattr(config, field)}
    return dataclasses.replace(config, **traced)


def programs_of(study: Study, points: Sequence[Point]) -> list[list[Point]]:
    """The points by program, in the order of their first points."""
    programs: dict[Any, list[Point]] = {}
    for point in points:
        programs.setdefault((point.label, program_key(study, point.config)), []).append(point)
    return list(programs.values())


# --- The folder of a sweep ------------------------------------------------------------------------------------------


def point_path(folder: Path, point: Point) -> Path:
    return folder / "points" / f"{point.name}.json"


def outcome(folder: Path, point: Point) -> dict | None:
    """What is known of a point: its results, or its "error"; None if it has not run."""
    try:
        return RunFolder.read(folder, f"points/{point.name}.json")
    except UserError as error:
        return {"error": str(error)}


def finished(folder: Path, point: Point) -> bool:
    found = outcome(folder, point)
    return found is not None and "error" not in found


def write_outcome(folder: Path, point: Point, found: dict) -> None:
    path = point_path(folder, point)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(plain({"values": point.values, "label": point.label} | found)))
    temporary.replace(path)


def summary(study: Study, results: Results) -> dict:
    """The JSON of a point: its columns by row and seed, its learning curves, its claims."""
    seeds = next(iter(next(iter(results.held_out.values())).values())).shape[0]
    judged = judge_all(study.claims, results) if seeds > 1 else []
    return {
        "rows": {row: {name: f(results, row) for name, f in study.columns.items()} for row in results.train},
        "held_out": results.held_out,
        "evaluated_at": results.evaluated_at,
        "claims": [verdict.as_dict() for verdict in judged],
        "seconds": results.seconds,
        "rates": rates_of(results),
    }


# --- One program ----------------------------------------------------------------------------------------------------


def train_points(study: Study, points: Sequence[Point], sweep: Path, memory: float = 0.0, neighbours: int = 1) -> None:
    """Trains the points of one program that are not finished, and writes what came of each.

    Args:
      sweep: its folder.
      memory: GiB that a program may take; 0 for most of what is free.
      neighbours: programs that share what is free.
    """
    builds: dict[str, Build] = {}
    left = [point for point in points if not finished(sweep, point)]
    for point in left:
        with recorded_errors(sweep, [point]):
            builds[point.name] = study.build(point.config)
    left = [point for point in left if point.name in builds]
    if not left:
        return
    folder = program_folder(sweep, points)
    try:
        if builds[left[0].name].state is not None:  # each run fills the devices by itself
            for point in left:
                with recorded_errors(sweep, [point]):
                    results, _ = train(builds[point.name], point.config, point.name, folder)
                    write_outcome(sweep, point, summary(study, results))
            return
        limit = memory * 2**30 or free_memory() / neighbours
        with recorded_errors(sweep, left):  # of compiling
            for part, program, executables, seconds in parts_of(left, builds, limit, folder):
                with recorded_errors(sweep, part):
                    train_part(study, part, program, executables, seconds, folder, sweep)
    finally:
        folder.close()


def program_folder(sweep: Path, points: Sequence[Point]) -> RunFolder:
    config = points[0].config
    study = f"{sweep.parent.name}/{sweep.name}/programs"
    name = label_of(points)
    return RunFolder(study, Options(runs=config.runs, name=name, resume=True), {p.name: p.config for p in points})


def label_of(points: Sequence[Point]) -> str:
    """Checkpoints and history belong to one very set of points."""
    digest = hashlib.sha256(",".join(point.name for point in points).encode()).hexdigest()[:8]
    return f"{points[0].name}-{points[-1].name}-{digest}"


def train_part(
    study: Study, part, program: Program, executables, compile_seconds: float, folder: RunFolder, sweep: Path
) -> None:
    """Points that are one program, with a file for each when they are done."""
    config = part[0].config
    results, _ = run(program, label_of(part), config.updates, folder, config, executables=executables)
    seconds = results.seconds | {"compile": compile_seconds}
    kept = sum(len(rows_of(results, point)) for point in part)
    for point in part:
        rows = rows_of(results, point)
        own = Results(
            {name: results.train[row] for row, name in rows.items()},
            {name: results.held_out[row] for row, name in rows.items()},
            results.evaluated_at,
            {name: value * len(rows) / kept for name, value in seconds.items()},
        )
        with recorded_errors(sweep, [point]):
            write_outcome(sweep, point, summary(study, own))


def rows_of(results: Results, point: Point) -> dict[str, str]:
    """The rows of a point in its part's results, and what they are called in its own."""
    return {row: row.partition(":")[2] for row in results.train if row.startswith(f"{point.name}:")}


def parts_of(points: Sequence[Point], builds: dict[str, Build], limit: float, folder: RunFolder) -> Iterator[tuple]:
    """(points, program, executables, seconds of compiling) of parts that fit the memory, as the compiler measures it.

    All parts have one size, so that there is one compilation; the last repeats a point to fill up. A part that was
    interrupted is formed again, so that it goes on.
    """
    config, begun = points[0].config, time.perf_counter()
    size, executables = len(points), None
    before = (folder.read_json("parts.json") or {}).get("size", size)
    if before < size and (folder.path / "checkpoints" / label_of(points[:before])).exists():
        size = before
    while executables is None:
        program = program_of(points[:size], builds, config)
        executables = compiled(program, config)
        needed = max(map(bytes_of, executables))
        if needed > limit:
            if size == 1:
                gib = f"{limit / 2**30:.3g}, got {needed / 2**30:.3g}"
                raise ValueError(f"memory: expected a point to need at most (in GiB) {gib}")
            fitting = int(size * limit / needed)  # at most: some of what is needed is not per point
            parts = -(-len(points) // max(1, min(size - 1, fitting)))
            size, executables = min(size - 1, -(-len(points) // parts)), None
    if size < len(points):
        print(f"{len(points)} points in parts of {size}, which take {needed / 2**30:.2f} GiB")
    folder.write_json("parts.json", {"size": size})
    seconds = time.perf_counter() - begun
    for start in range(0, len(points), size):
        part = points[start : start + size]
        full = [*part, *[part[-1]] * (size - len(part))]
        yield part, program_of(full, builds, config), executables, seconds * (start == 0)


def program_of(points: Sequence[Point], builds: dict[str, Build], config: Any) -> Program:
    rows, trains = {}, {}
    for index, point in enumerate(points):
        name, build = point.name if points.index(point) == index else f"{point.name} again, {index}", builds[point.name]
        rows |= {f"{name}:{row}": numbers for row, numbers in build.rows.items()}
        trains |= {f"{name}:{row}": train_of(build, row) for row in build.rows}
    train = trains if isinstance(build.train, dict) else build.train
    return vectorize(train, rows, range(config.seed, config.seed + config.seeds), config.mesh)


def bytes_of(executable: Any) -> int:
    """What a compiled function holds at once on a device: arguments, results, temporaries; 0 if it cannot tell."""
    if not hasattr(executable, "memory_analysis"):  # with --debug-nans
        return 0
    used = executable.memory_analysis()
    return used.argument_size_in_bytes + used.output_size_in_bytes + used.temp_size_in_bytes - used.alias_size_in_bytes


def free_memory() -> float:
    """Bytes that the programs of this process may take, on each device."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return MEMORY_SHARE * (stats["bytes_limit"] - stats["bytes_in_use"])
    import psutil

    return MEMORY_SHARE * psutil.virtual_memory().available / len(jax.local_devices())


@contextlib.contextmanager
def recorded_errors(sweep: Path, points: Sequence[Point]) -> Iterator[None]:
    """An error is written to the points that it befell; what has a result keeps it."""
    try:
        yield
    except Exception as error:
        for point in points:
            if not finished(sweep, point):
                write_error(sweep, point, error)


def write_error(sweep: Path, point: Point, error: Exception) -> None:
    where = "".join(traceback.format_exception(error))
    write_outcome(sweep, point, {"error": f"{type(error).__name__}: {error}", "traceback": where})
