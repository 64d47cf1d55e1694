"""Sweeps a study: a grid of values, or a search with Optuna, with all seeds of a point in one program.

    python -m rollax.experiments.sweep bandpo --model tabular --grid delta=0.01,0.02,0.05 lr=0.03,0.1 --seeds 16
    python -m rollax.experiments.sweep ppo_cartpole --grid lr=1e-4..1e-2:log clip=0.1,0.2 --search tpe --trials 40
    python -m rollax.experiments.sweep my_study.py --grid width=32,64 --workers 2
    python -m rollax.experiments.sweep bandpo --grid layers=1,2 --launcher slurm --slurm slurm_partition=gpu

All other options are the study's own. Results come to runs/STUDY/NAME/: report.html, results.json, points/.
"""

import dataclasses
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated

import jax
import tyro

from rollax.experiments.harness import devices, search
from rollax.experiments.harness.command_line import Options, UserError, one_line_errors, parse_known
from rollax.experiments.harness.launchers import LAUNCHERS, Engine
from rollax.experiments.harness.run_folder import RunFolder
from rollax.experiments.harness.study import Study, load_study
from rollax.experiments.harness.sweep import (
    Point,
    finished,
    parse_grid,
    points_of,
    programs_of,
    train_points,
)
from rollax.experiments.harness.sweep_report import report


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What is swept, and where it runs."""

    study: Annotated[str, tyro.conf.Positional]
    """Name of a study in experiments/, or the path of a Python file with a STUDY."""
    grid: tuple[str, ...] = ()
    """FIELD=VALUE,VALUE ...: every combination runs. For a search also FIELD=LOW..HIGH and FIELD=LOW..HIGH:log."""
    metric: str = ""
    """What ranks the points: a column of the study's table, in a search a held-out metric; the first when empty."""
    row: str = ""
    """The row (arm) that is ranked; the first when empty."""
    minimize: bool = False
    """Small is good."""
    search: str = ""
    """Instead of every combination: tpe, random or qmc."""
    trials: int = 40
    """Of a search, by all workers together."""
    memory: float = 0.0
    """GiB that a program may take; 0 for most of what is free."""
    launcher: str = "local"
    """local, ray or slurm."""
    workers: int = 1
    """Processes at a time on this machine, of a search also elsewhere."""
    address: str = ""
    """Of a Ray cluster; a local one is started when empty."""
    cpus: int = 1
    """Of a job, for Ray and SLURM."""
    gpus: int = 0
    """Of a job, for Ray and SLURM."""
    slurm: tuple[str, ...] = ()
    """KEY=VALUE of submitit, such as slurm_partition=gpu, timeout_min=240, or cluster=local."""

    def check(self) -> None:
        if self.launcher not in LAUNCHERS:
            raise ValueError(f"launcher: expected one of {', '.join(LAUNCHERS)}, got {self.launcher!r}")
        for field in ("trials", "workers", "cpus"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}: expected at least 1, got {getattr(self, field)}")
        if not self.memory >= 0:
            raise ValueError(f"memory: expected at least 0 GiB, got {self.memory}")
        if not self.grid:
            raise ValueError("grid: expected FIELD=VALUE,VALUE ..., got nothing to sweep")

    @property
    def engine(self) -> Engine:
        words = (word.partition("=") for word in self.slurm)
        slurm = {key: int(value) if value.isdigit() else value for key, _, value in words}
        return Engine(self.workers, self.address, self.cpus, self.gpus, slurm)


def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["--work"]:  # a job of a sweep that a launcher runs
        work(Path(argv[1]), int(argv[2]))
        return
    sweep, rest = parse_known(Sweep, __doc__, argv)
    with one_line_errors():
        sweep.check()
        study = load_study(sweep.study)
        configs = study.configs(rest)
        grid = parse_grid(sweep.grid, next(iter(configs.values())))
        options: Options = next(iter(configs.values()))
        points = [] if sweep.search else points_of(configs, grid)
        programs = programs_of(study, points)
        jobs = list(range(sweep.workers if sweep.search else len(programs)))
        here = len(jobs) == 1 and sweep.launcher == "local"
        if here:
            devices.begin(options)
        else:
            jax.config.update("jax_platforms", "cpu")  # the devices are for the jobs
        what = search_of(sweep, study, configs, grid)
        folder = RunFolder(study.name, options, configs | {"sweep": {"grid": grid, "search": what}})
        folder.write_json("command.json", argv)  # the jobs read it
    print(f"results: {folder.path}")
    with one_line_errors(OSError, ImportError, UserError), closing(folder):
        todo = jobs if what else [job for job in jobs if not all_finished(folder.path, programs[job])]
        kind = f"{len(jobs)} workers" if what else f"{len(points)} points in {len(jobs)} programs, {len(todo)} to run"
        print(f"{study.name}: {kind}", flush=True)
        if todo and here:
            work(folder.path, todo[0])
        elif todo:
            codes = LAUNCHERS[sweep.launcher](folder.path.absolute(), todo, sweep.engine)
            for job, code in zip(todo, codes, strict=True):
                if code:
                    print(f"job {job} ended with status {code}: {last_line(folder.path, job)}", file=sys.stderr)
        if what:
            points = trials_of(folder.path)
        metric, row = (what.metric, what.row) if what else (sweep.metric, sweep.row)
        report(study, folder, points, list(grid), metric=metric, row=row, minimize=sweep.minimize)
    failed = [point for point in points if not finished(folder.path, point)]
    if what and len(points) - len(failed) < what.trials:
        print(
            f"{len(points) - len(failed)} of {what.trials} trials are done: --resume --name {folder.path.name} goes on"
        )
        raise SystemExit(1)
    if failed and not what:
        print(f"{len(failed)} of {len(points)} points are not finished: --resume --name {folder.path.name} runs them")
        raise SystemExit(1)


def search_of(sweep: Sweep, study: Study, configs: dict, grid: dict) -> search.Search | None:
    """The search that is asked for; its errors come out before anything runs."""
    if not sweep.search:
        return None
    if len(configs) > 1:
        raise ValueError(f"search: expected one configuration, got {', '.join(configs)}: choose one")
    if sweep.search not in search.samplers():
        raise ValueError(f"search: expected one of {', '.join(search.samplers())}, got {sweep.search!r}")
    (config,) = configs.values()
    search.check_space(grid, config)
    metric, row = search.resolve(study, config, sweep.metric, sweep.row)
    return search.Search(grid, sweep.search, sweep.trials, metric, row, sweep.minimize)


def work(path: Path, job: int) -> None:
    """One program of a grid, or one worker of a search, in this process."""
    sweep, rest = parse_known(Sweep, __doc__, RunFolder.read(path, "command.json"))
    study = load_study(sweep.study)
    configs = {label: dataclasses.replace(c, runs=str(path.parents[1])) for label, c in study.configs(rest).items()}
    devices.begin(next(iter(configs.values())))
    grid = parse_grid(sweep.grid, next(iter(configs.values())))
    if sweep.search:
        label, config = next(iter(configs.items()))
        search.work(study, config, label, search_of(sweep, study, configs, grid), path, job)
    else:
        neighbours = sweep.workers if sweep.launcher == "local" else 1
        train_points(study, programs_of(study, points_of(configs, grid))[job], path, sweep.memory, neighbours)


def last_line(path: Path, job: int) -> str:
    """What a job said last, and where the rest is."""
    log = path / "jobs" / f"{job:03d}.txt"
    said = [line for line in log.read_text().splitlines() if line.strip()] if log.exists() else []
    return f"{said[-1] if said else 'it said nothing'} ({log})"


def all_finished(path: Path, points: Sequence[Point]) -> bool:
    return all(finished(path, point) for point in points)


def trials_of(path: Path) -> list[Point]:
    """The trials of a search as points."""
    found = sorted((path / "points").glob("[0-9]*.json"))
    read = [RunFolder.read(path, f"points/{file.name}") for file in found]
    return [Point(file.stem, one["label"], one["values"], None) for file, one in zip(found, read, strict=True)]


if __name__ == "__main__":
    main()
