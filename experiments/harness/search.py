"""Search with Optuna: trials of one study by many workers, who share a SQLite file.

A trial is one configuration with all its seeds in one `vmap`. Its held-out metric after each chunk of updates is what
pruning sees. Trials with equal static fields use one compiled program.
"""

import contextlib
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from rollax.experiments.harness.command_line import Options
from rollax.experiments.harness.loop import compiled, run, vectorize
from rollax.experiments.harness.run_folder import RunFolder
from rollax.experiments.harness.study import Study, train_of
from rollax.experiments.harness.sweep import Point, program_key, summary, with_values, write_error, write_outcome


class Search(NamedTuple):
    """What is searched, and how.

    Attributes:
      space: `{field: words}`: two or more words are choices, one of the form "1e-4..1e-2" a range, with ":log" behind
        it on a logarithmic scale.
      sampler: of `SAMPLERS`.
      trials: that finish or are pruned, by all workers together.
      metric: held-out, of the row; its mean over the seeds counts.
      row: of the study.
      minimize: else maximize.
    """

    space: dict[str, list[str]]
    sampler: str
    trials: int
    metric: str
    row: str
    minimize: bool = False


def samplers() -> dict[str, Callable[[int], Any]]:
    try:
        import optuna
    except ImportError:
        raise ImportError("search: optuna is not installed: pip install -e '.[sweep]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return {
        "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed, constant_liar=True),
        "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
        "qmc": lambda seed: optuna.samplers.QMCSampler(seed=seed, warn_independent_sampling=False),
    }


def open_trials(sweep: Path, search: Search, seed: int) -> Any:
    """The Optuna study in `optuna.db` of the sweep's folder; a trial whose worker died is marked as failed."""
    known = samplers()
    if search.sampler not in known:
        raise ValueError(f"search: expected one of {', '.join(known)}, got {search.sampler!r}")
    import optuna

    storage = optuna.storages.RDBStorage(
        f"sqlite:///{sweep.absolute() / 'optuna.db'}",
        engine_kwargs={"connect_args": {"timeout": 60}},
        heartbeat_interval=10,
    )
    return optuna.create_study(
        storage=storage,
        study_name="sweep",
        direction="minimize" if search.minimize else "maximize",
        sampler=known[search.sampler](seed),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=5),
        load_if_exists=True,
    )


def range_of(field: str, values: list[str], kind: type) -> tuple[float, float, bool] | None:
    """(low, high, logarithmic) of `["1e-4..1e-2:log"]`, of a field's type; None for choices; else ValueError."""
    low, dots, high = values[0].partition("..")
    if len(values) > 1 or not dots:
        return None
    high, _, scale = high.partition(":")
    try:
        low, high = (int(low), int(high)) if kind is int else (float(low), float(high))
    except ValueError:
        low, high = 0, 0
    if kind not in (int, float) or not low < high or scale not in ("", "log") or (scale and low <= 0):
        raise ValueError(f"grid: {field} expects a range like 1e-4..1e-2:log, got {values[0]!r}")
    return low, high, scale == "log"


def resolve(study: Study, config: Any, metric: str, row: str) -> tuple[str, str]:
    """The held-out metric and the row that are searched by, the first ones where empty; ValueError for others."""
    build = study.build(config)
    if build.state is not None:
        raise ValueError("search: expected small runs that share a program, got a model that fills the devices")
    row = row or next(iter(build.rows))
    if row not in build.rows:
        raise ValueError(f"row: expected one of {', '.join(build.rows)}, got {row!r}")
    train = train_of(build, row)
    held_out = jax.eval_shape(train.evaluate, jax.eval_shape(train.init, jax.random.key(0)), build.rows[row])
    metric = metric or next(iter(held_out))
    if metric not in held_out:
        raise ValueError(f"metric: expected one of {', '.join(held_out)}, got {metric!r}")
    return metric, row


def check_space(space: dict[str, list[str]], config: Any) -> None:
    """Raises ValueError where a choice or an end of a range is no value of its field."""
    kinds = typing.get_type_hints(type(config))
    for field, values in space.items():
        ends = range_of(field, values, kinds[field])
        for word in values if ends is None else [repr(end) for end in ends[:2]]:
            with_values(config, {field: word})


def suggest(trial: Any, space: dict[str, list[str]], config: Any) -> dict[str, str]:
    """The words of a trial, as on the command line."""
    words, kinds = {}, typing.get_type_hints(type(config))
    for field, values in space.items():
        ends = range_of(field, values, kinds[field])
        if ends is None:
            words[field] = trial.suggest_categorical(field, values)
        else:
            ask = trial.suggest_int if isinstance(ends[0], int) else trial.suggest_float
            words[field] = repr(ask(field, ends[0], ends[1], log=ends[2]))
    return words


def work(study: Study, config: Any, label: str, search: Search, sweep: Path, worker: int) -> None:
    """Runs trials until all workers together have finished `search.trials`. A trial without a finite value is pruned.

    Several workers may finish a few more, those that ran when the last one was counted. Three failures in a row end a
    worker: they are not about the values of a trial.
    """
    import optuna
    from optuna.trial import TrialState

    trials = open_trials(sweep, search, config.seed + worker)
    optuna.storages.fail_stale_trials(trials)
    executables: dict[Any, tuple] = {}
    failures = []

    def objective(trial):
        values, own = with_values(config, suggest(trial, search.space, config))
        point = Point(f"{trial.number:04d}", label, values, own)
        try:
            value = run_trial(study, point, search, sweep, trial, executables)
        except optuna.TrialPruned:
            raise
        except Exception as error:
            write_error(sweep, point, error)
            raise
        return value

    def count(trials, trial):
        failures.append(trial.state == TrialState.FAIL)
        done = trials.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
        if len(done) >= search.trials or (len(failures) >= 3 and all(failures[-3:])):
            trials.stop()

    before = trials.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    if len(before) < search.trials:
        trials.optimize(objective, n_trials=search.trials - len(before) + 3, catch=(Exception,), callbacks=[count])


def run_trial(study: Study, point: Point, search: Search, sweep: Path, trial: Any, executables: dict) -> float:
    """The value of a trial; raises TrialPruned when it is not worth going on."""
    import optuna

    config = point.config
    build = study.build(config)
    index = list(build.rows).index(search.row)
    program = vectorize(build.train, build.rows, range(config.seed, config.seed + config.seeds), config.mesh)
    key = program_key(study, config)
    if key not in executables:
        executables[key] = compiled(program, config)

    def watch(update, train, held_out) -> bool:
        value = float(np.mean(held_out[search.metric][index]))
        trial.report(value, update)
        return not np.isfinite(value) or trial.should_prune()

    options = Options(runs=config.runs, name=point.name, save_every=float("inf"))
    folder = RunFolder(f"{sweep.parent.name}/{sweep.name}/trials", options, {point.name: config})
    with contextlib.closing(folder):
        results, _ = run(
            program, point.name, config.updates, folder, options, executables=executables[key], watch=watch
        )
    value = float(results.held_out[search.row][search.metric][:, -1].mean())
    pruned = bool(results.evaluated_at[-1] < config.updates) or not np.isfinite(value)
    write_outcome(sweep, point, summary(study, results) | {"pruned": pruned, "value": value})
    if pruned:
        raise optuna.TrialPruned
    return value
