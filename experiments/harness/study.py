"""A study as a value, and what runs one: train every label's rows and seeds, judge the claims, write the report.

A study file could be read, and its `build` be jitted and vmapped, without any of this.
"""

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from rollax.experiments.harness import devices, statistics
from rollax.experiments.harness.claims import Claim, Verdict, judge_all
from rollax.experiments.harness.columns import write_parquet
from rollax.experiments.harness.command_line import Options, UserError, one_line_errors
from rollax.experiments.harness.figures import Panel
from rollax.experiments.harness.loop import UNITS, Results, Train, compiled, merge, run, single, vectorize
from rollax.experiments.harness.processes import failing_together
from rollax.experiments.harness.report import (
    VERDICT_HEAD,
    Episode,
    Section,
    Table,
    cell,
    show,
    verdict_lines,
    write_report,
)
from rollax.experiments.harness.run_folder import RunFolder
from rollax.experiments.harness.track import Sink, check_sinks, open_sinks


class Build(NamedTuple):
    """A configuration made ready to train.

    Attributes:
      train: the functions of one run, or of one run of each row (`loop.vectorize`).
      rows: what runs: `{name: numbers}`, Python numbers, the second argument of `train.advance`.
      episodes: `episodes(state_of) -> [Episode]`, a few to look at, from `state_of(row)`, the last state of the
        row's first seed.
      state: for a model that fills the devices, the shapes and shardings of its state: its runs go one after the
        other. None for small runs, which all go into one program.
    """

    train: Train | dict[str, Train]
    rows: dict[str, Any]
    episodes: Callable[[Callable[[str], Any]], Sequence[Episode]] | None = None
    state: Any = None


def train_of(build: Build, row: str) -> Train:
    return build.train[row] if isinstance(build.train, dict) else build.train


class Study(NamedTuple):
    """A paper's experiment.

    Attributes:
      name: of its file and of its folder in runs/.
      title: for the report.
      configs: `configs(argv) -> {label: Config}`; a `Config` is a frozen dataclass that inherits `Options` and has
        `seeds`, `seed` and `updates`.
      build: `build(config) -> Build`; all that can be wrong with files and names comes out here, as ValueError.
      claims: what the paper says; `claim.needs` names rows.
      columns: of the table: `{name: f(results, row) -> [seeds]}`.
      panels: of the figure.
      traced: fields of `Config` that `build` passes on in `rows` alone, so that a sweep over them needs no new program.
      order: rows in the order of their colours.
      smoke: arguments that make a run of seconds, for `reproduce --smoke`.
      tables: more of them, for the report alone: `tables(results) -> {title: Table}`.
    """

    name: str
    title: str
    configs: Callable[[Sequence[str] | None], dict[str, Any]]
    build: Callable[[Any], Build]
    claims: Sequence[Claim]
    columns: dict[str, Callable[[Results, str], np.ndarray]]
    panels: Callable[[Results], Sequence[Panel]]
    traced: tuple[str, ...] = ()
    order: tuple[str, ...] = ()
    smoke: tuple[str, ...] = ()
    tables: Callable[[Results], dict[str, Table]] = lambda results: {}


def main(study: Study, argv: Sequence[str] | None = None) -> None:
    """The command line of a study file."""
    configs = study.configs(argv)
    try:
        with failing_together():
            run_and_report(study, configs)
    except KeyboardInterrupt:
        print("interrupted: --resume goes on from the last checkpoint", file=sys.stderr)
        raise SystemExit(130) from None


def run_and_report(study: Study, configs: dict[str, Any]) -> None:
    """Everything after the command line."""
    options: Options = next(iter(configs.values()))
    with one_line_errors():
        check_sinks(options.track)
        devices.begin(options)
        builds = {label: study.build(config) for label, config in configs.items()}
        for label, config in configs.items():
            check_runs(builds[label], config)
        folder = RunFolder(study.name, options, configs)
    if folder.writes:
        print(f"results: {folder.path}", flush=True)
    with one_line_errors(OSError, UserError), contextlib.closing(sink_of(study, folder, options)) as sink:
        everything, episodes = {}, {}
        for label, config in configs.items():
            everything[label], state_of = train(builds[label], config, label, folder, sink)
            # A state that spans several processes is no single process's to play with.
            play = builds[label].episodes if jax.process_count() == 1 and state_of is not None else None
            episodes[label] = play(state_of) if play is not None else ()
        if folder.writes:
            report(study, folder, configs, everything, episodes)


def check_runs(build: Build, config: Any) -> None:
    """Raises ValueError for seeds and devices that cannot work, before anything runs."""
    if not 0 <= config.seed <= 2**31 - config.seeds:
        raise ValueError(f"seed: expected 0 to 2147483648 less the number of seeds, got {config.seed}")
    if build.state is None:
        devices.runs_mesh(config.mesh, len(build.rows), config.seeds)


def sink_of(study: Study, folder: RunFolder, options: Options) -> Sink:
    names, config = (options.track, folder.read_json("config.json")) if folder.writes else ((), {})
    return open_sinks(names, folder.path, study=study.name, name=folder.path.name, config=config, resume=folder.resumed)


def train(
    build: Build, config: Any, label: str, folder: RunFolder, sink: Sink | None = None
) -> tuple[Results, Callable[[str], Any] | None]:
    """All rows and seeds of a configuration; the results, and `state_of(row)`, the last state of its first seed.

    `state_of` is None where no state is at hand, and gives None for rows whose state was not kept.
    """
    seeds = range(config.seed, config.seed + config.seeds)
    if build.state is None:
        program = vectorize(build.train, build.rows, seeds, config.mesh)
        results, state = run(program, label, config.updates, folder, config, sink=sink)
        if state is None:
            return results, None
        return results, lambda row: program.first(state, row)
    parts, states, executables = [], {}, None
    for row, numbers in build.rows.items():
        for seed in seeds:
            program = single(build.train, row, numbers, seed, build.state)
            executables = executables or compiled(program, config)  # all runs have one program
            part = f"{label}/{row}-{seed}"
            results, state = run(program, part, config.updates, folder, config, sink=sink, executables=executables)
            parts.append(results)
            if seed == config.seed and len(build.rows) == 1:  # others would not fit beside the next run
                states[row] = state
    return merge(parts), lambda row: states.get(row)


def report(study: Study, folder: RunFolder, configs: dict, everything: dict[str, Results], episodes: dict) -> None:
    """Tables to the terminal; results.json, metrics.parquet, the figures and the report to the folder."""
    sections, saved = [], {}
    for label, results in everything.items():
        judged = verdicts(study, results, configs[label].looks)
        section = section_of(study, label, results, judged, episodes[label])
        show(section.title, section.table.head, section.table.lines)
        if judged:
            show(f"{label}: claims", VERDICT_HEAD, verdict_lines(judged))
        tables = enumerate(study.tables(results).items(), 1)
        more = [Section(f"{label}_{i}", f"{label}: {title}", table, (), ()) for i, (title, table) in tables]
        sections += [section, *more, *comparison(study, label, results)]
        saved[label] = {
            "claims": [verdict.as_dict() for verdict in judged],
            "rows": {row: {name: f(results, row) for name, f in study.columns.items()} for row in results.train},
            "seconds": results.seconds,
            "rates": section.rates,
        }
    folder.write_json("results.json", saved)
    write_parquet(folder.path / "metrics.parquet", everything, {label: c.seed for label, c in configs.items()})
    config, versions = folder.read_json("config.json"), folder.read_json("versions.json")
    page = write_report(folder.path, study.title, sections, config=config, versions=versions)
    print(f"report: {page}")


def verdicts(study: Study, results: Results, looks: int = 1) -> list[Verdict]:
    """Of the claims whose rows have run with more than one seed."""
    seeds = next(iter(next(iter(results.train.values())).values())).shape[0]
    return judge_all(study.claims, results, looks=looks) if seeds > 1 else []


def section_of(study: Study, label: str, results: Results, judged: Sequence[Verdict], episodes=()) -> Section:
    rows = list(results.train)
    seeds = next(iter(results.train[rows[0]].values())).shape[0]
    columns = {name: [cell(f(results, row)) for row in rows] for name, f in study.columns.items()}
    # Parts of a study share their columns: one that no row of this part has is left out.
    columns = {name: cells for name, cells in columns.items() if any(text != "-" for text in cells)}
    return Section(
        label=label,
        title=f"{label}: mean ± half the 95 % interval over {seeds} seeds" if seeds > 1 else f"{label}: one seed",
        table=Table(["arm", *columns], [list(line) for line in zip(rows, *columns.values(), strict=True)]),
        verdicts=judged,
        panels=study.panels(results),
        order=study.order,
        episodes=episodes,
        seconds=results.seconds,
        rates=rates_of(results),
    )


def comparison(study: Study, label: str, results: Results) -> list[Section]:
    """Every arm against the first at equal seeds, by the first column: aggregates, paired tests, Holm's correction.

    Left out for a single arm or fewer than five seeds, and arms for which a seed gave no number.
    """
    column, measure = next(iter(study.columns.items()))
    scores = {row: np.asarray(measure(results, row), np.float64) for row in results.train}
    first = next(iter(scores))
    scores = {row: values for row, values in scores.items() if np.isfinite(values).all()}
    if len(scores) < 2 or first not in scores or scores[first].size < 5:
        return []
    (first, baseline), *others = scores.items()
    tests = {row: statistics.paired_tests(values, baseline) for row, values in others}
    adjusted = dict(zip(tests, statistics.adjust(np.array([test.t_p for test in tests.values()])), strict=True))
    lines = []
    for row, values in scores.items():
        iqm = statistics.bootstrap_interval(values, statistics.iqm)
        line = [row, f"{iqm.estimate:.3f} [{iqm.low:.3f}, {iqm.high:.3f}]", f"{statistics.median(values):.3f}"]
        if row == first:
            lines.append([*line, "-", "-", "-", "-"])
            continue
        test, better = tests[row], statistics.probability_of_improvement_interval(values, baseline, paired=True)
        lines.append(
            [
                *line,
                f"{test.difference:+.3f} [{test.low:+.3f}, {test.high:+.3f}]",
                f"{test.effect_size:.2f}",
                f"{adjusted[row]:.2g}",
                f"{better.estimate:.2f} [{better.low:.2f}, {better.high:.2f}]",
            ]
        )
    head = ["arm", f"IQM of {column}", "median", f"less {first}", "d_z", "p (Holm)", f"P(better than {first})"]
    title = f"{label}: {column} against {first} at equal seeds"
    return [Section(f"{label}_compared", title, Table(head, lines), (), ())]


def rates_of(results: Results) -> dict[str, float]:
    """Updates and units of work per second of training and evaluating, all rows and seeds together."""
    seconds = results.seconds["train and evaluate"]
    rows = list(results.train.values())
    work = {unit: sum(row[name].sum() for row in rows) for name, unit in UNITS.items() if name in rows[0]}
    updates = sum(next(iter(row.values())).shape[0] * results.evaluated_at[-1] for row in rows)
    return {name: float(value / seconds) for name, value in {"updates of single runs/s": updates, **work}.items()}


def study_names() -> tuple[str, ...]:
    """The studies in experiments/."""
    files = sorted(Path(__file__).parents[1].glob("*.py"))
    return tuple(file.stem for file in files if "\nSTUDY = " in file.read_text())


def load_study(name: str) -> Study:
    """`STUDY` of a file in experiments/ by its name, or of any Python file by its path.

    Raises:
      ValueError: no such file, or one without a `STUDY`.
    """
    if name.endswith(".py"):
        if not Path(name).is_file():
            raise ValueError(f"study: expected a file, found none at {name}")
        spec = importlib.util.spec_from_file_location(Path(name).stem, name)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    else:
        if name not in study_names():
            raise ValueError(f"study: expected one of {', '.join(study_names())} or the path of a file, got {name!r}")
        module = importlib.import_module(f"rollax.experiments.{name}")
    if not isinstance(getattr(module, "STUDY", None), Study):
        raise ValueError(f"study: expected a STUDY in {name}, found none")
    return module.STUDY
