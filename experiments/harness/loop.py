"""From a study of one run to all its rows and seeds in one program, and the Python loop around that program.

A study gives `Train`, functions of one run. `vectorize` makes them a `Program` of `[rows, seeds]` by nested `vmap`,
spread over the devices; `run` calls it chunk by chunk of updates, with an evaluation, a log line and now and then a
checkpoint after each. Nothing leaves the program inside a chunk.
"""

import contextlib
import shlex
import signal
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify
from jax.sharding import NamedSharding, PartitionSpec
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rollax.experiments.harness import devices
from rollax.experiments.harness.checkpoint import Checkpoints
from rollax.experiments.harness.command_line import Options, UserError
from rollax.experiments.harness.processes import failing_together
from rollax.experiments.harness.run_folder import RunFolder
from rollax.experiments.harness.track import Sink


class Train(NamedTuple):
    """A study as functions of one run, to be jitted, vmapped and sharded.

    Attributes:
      init: `init(key) -> state`.
      advance: `advance(state, numbers) -> (state, metrics [updates of a chunk, ...])`.
      evaluate: `evaluate(state, numbers) -> metrics`.
      staged: `advance` and `evaluate` of a model that fills the devices compile their own parts, with decisions of the
        host between them, and are called as they are.
    """

    init: Callable[[jax.Array], Any]
    advance: Callable[[Any, Any], tuple[Any, dict[str, jax.Array]]]
    evaluate: Callable[[Any, Any], dict[str, jax.Array]]
    staged: bool = False


class Program(NamedTuple):
    """All rows and seeds of a study; the leading axes of states and metrics are `[rows, seeds]`.

    Attributes:
      rows: what the rows are called.
      state: the state's shapes and shardings.
      init: `init() -> state`.
      advance: `advance(state, numbers) -> (state, metrics [rows, seeds, updates of a chunk, ...])`.
      evaluate: `evaluate(state, numbers) -> metrics [rows, seeds]`.
      numbers: what differs between rows, leaves `[rows]`.
      seeds: how many.
      first: `first(state, row)`, the state of the row's first seed.
      staged: as in `Train`.
    """

    rows: tuple[str, ...]
    state: Any
    init: Callable[[], Any]
    advance: Callable
    evaluate: Callable
    numbers: Any
    seeds: int
    first: Callable[[Any, str], Any]
    staged: bool = False


def stack(rows: dict[str, Any]) -> Any:
    """The numbers of all rows as one tree of float32 or int32 arrays `[rows]`."""
    return jax.tree.map(lambda *x: np.asarray(x, np.float32 if any(isinstance(v, float) for v in x) else np.int32),
                        *rows.values())  # fmt: skip


def vectorize(train: Train | dict[str, Train], rows: dict[str, Any], seeds: Sequence[int], mesh: str = "") -> Program:
    """Every row with every seed in one program: `vmap` over rows of `vmap` over seeds, spread over devices.

    A seed starts alike in every row (one start, one stream of keys), so rows are compared at equal seeds; starts are
    computed once per seed.

    Args:
      train: one for all rows, or one for each row by its name, as different networks need; they then stand beside one
        another in the program (rows with the same one in one `vmap`) and give the same metrics.
      rows: `{name: numbers}`, the numbers of `train.advance` as Python numbers.
      mesh: see `devices.runs_mesh`.
    """
    if isinstance(train, dict):
        alike: dict[Train, dict[str, Any]] = {}
        for row, numbers in rows.items():
            alike.setdefault(train[row], {})[row] = numbers
        return beside([vectorize(one, its_rows, seeds, mesh) for one, its_rows in alike.items()])
    mesh, axis = devices.runs_mesh(mesh, len(rows), len(seeds))
    split = (PartitionSpec("runs"), PartitionSpec(None, "runs"))[axis]
    place = NamedSharding(mesh, split)
    numbers_split = split if axis == 0 else PartitionSpec()

    def spread(function):
        """Each device computes its own runs, so none waits for another inside a chunk."""
        over = jax.vmap(jax.vmap(function, in_axes=(0, None)))
        return jax.shard_map(over, mesh=mesh, in_specs=(split, numbers_split), out_specs=split, check_vma=False)

    def starts(seeds):
        state = jax.vmap(lambda seed: train.init(jax.random.key(seed)))(seeds)
        return jax.tree.map(lambda x: jnp.broadcast_to(x[None], (len(rows), *x.shape)), state)

    seeds = np.asarray(seeds, np.int32)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), jax.eval_shape(starts, seeds)
    )
    init = jax.jit(starts, out_shardings=place)
    return Program(
        tuple(rows),
        shapes,
        lambda: init(seeds),
        spread(train.advance),
        spread(train.evaluate),
        stack(rows),
        len(seeds),
        lambda state, row: jax.tree.map(lambda x: x[list(rows).index(row), 0], state),
    )


def beside(programs: Sequence[Program]) -> Program:
    """Programs as one: their states in a list, their metrics joined over rows."""

    def join(metrics):
        names = [set(m) for m in metrics]
        if any(n != names[0] for n in names):
            raise ValueError(f"metrics: expected the same names in every row, got {sorted(set.union(*names))}")
        return jax.tree.map(lambda *x: jnp.concatenate(x), *metrics)

    def advance(states, numbers):
        states, metrics = zip(
            *(p.advance(s, n) for p, s, n in zip(programs, states, numbers, strict=True)), strict=True
        )
        return list(states), join(metrics)

    def evaluate(states, numbers):
        return join([p.evaluate(s, n) for p, s, n in zip(programs, states, numbers, strict=True)])

    holder = {row: i for i, p in enumerate(programs) for row in p.rows}
    return Program(
        tuple(holder),
        [p.state for p in programs],
        lambda: [p.init() for p in programs],
        advance,
        evaluate,
        [p.numbers for p in programs],
        programs[0].seeds,
        lambda states, row: programs[holder[row]].first(states[holder[row]], row),
    )


def single(train: Train, row: str, numbers: Any, seed: int, state: Any) -> Program:
    """One run that fills the devices by itself; metrics get axes for row and seed.

    Args:
      train: its `init` is called outside of jit, once.
      state: its shapes, `ShapeDtypeStruct`s with the shardings that it keeps.
    """
    numbers = jax.tree.map(lambda x: x[0], stack({row: numbers}))
    places = jax.tree.map(lambda x: x.sharding, state)
    lift = lambda tree: jax.tree.map(lambda x: x[None, None], tree)  # noqa: E731

    def advance(state, numbers):
        state, metrics = train.advance(state, numbers)
        return jax.lax.with_sharding_constraint(state, places), lift(metrics)

    def evaluate(state, numbers):
        return lift(train.evaluate(state, numbers))

    first = lambda state, row: state  # noqa: E731
    return Program(
        (row,), state, lambda: train.init(jax.random.key(seed)), advance, evaluate, numbers, 1, first, train.staged
    )


class Results(NamedTuple):
    """What a study gave, by row (an arm in a regime).

    Attributes:
      train: `train[row][metric]` is `[seeds, updates, ...]`.
      held_out: `held_out[row][metric]` is `[seeds, evaluations]`, the first before any update.
      evaluated_at: updates done at each evaluation.
      seconds: "compile" (of this process) and "train and evaluate" (of all processes that the run took).
    """

    train: dict[str, dict[str, np.ndarray]]
    held_out: dict[str, dict[str, np.ndarray]]
    evaluated_at: np.ndarray
    seconds: dict[str, float]


def run(
    program: Program,
    label: str,
    updates: int,
    folder: RunFolder,
    options: Options,
    *,
    sink: Sink | None = None,
    executables: tuple[Callable, Callable] | None = None,
    watch: Callable[[int, dict, dict], bool] = lambda update, train, held_out: False,
) -> tuple[Results, Any]:
    """Trains until `updates` are done, from the start or from the newest checkpoint of a resumed run.

    SIGINT and SIGTERM end it after the chunk at hand with a checkpoint, a second one at once.

    Args:
      label: of the run's history, metrics and checkpoints in the folder.
      sink: shows the metrics elsewhere.
      executables: what `compiled` gave, where the caller has compiled already.
      watch: `watch(update, train, held_out)` sees the metrics of each chunk; True ends the run early.
    Returns:
      The results and the last state (None for a finished run without checkpoints).
    Raises:
      SystemExit: stopped by a signal, status 130; `--resume` goes on.
      UserError: chunks that do not divide `updates`, a metric with a reserved name, a history with a gap, checkpoints
        that are all damaged.
    """
    checkpoints = Checkpoints(folder.path / "checkpoints" / label, options.save_every)
    with contextlib.closing(checkpoints), failing_together():
        history = folder.history(label) if folder.resumed else []
        if checkpoints.latest() is None and history and int(history[-1].stem) == updates:
            return load_results(folder, label, program.rows), None  # finished, and its checkpoints were removed
        begun = time.perf_counter()
        if executables is None and not (folder.resumed and checkpoints.latest() == updates):
            executables = compiled(program, options)
        compile_seconds = time.perf_counter() - begun
        restored = checkpoints.restore(program.state) if folder.resumed else None
        done, state = restored or (0, program.init())
        folder.forget_after(label, done if restored else -1)
        if done < updates:
            advance, evaluate = executables or compiled(program, options)  # only now, if the last one was damaged
        if not restored:
            begun = time.perf_counter()
            held_out = devices.fetch(evaluate(state, program.numbers))
            save_history(folder, label, 0, time.perf_counter() - begun, {}, held_out)
        chunk, enough, stop = 0, False, False
        with (
            stoppable() as stopped,
            progress(f"{label}: {size(program)}", updates, done, folder.writes) as tell,
            tracing(folder.path / "profile" / label, options.profile) as trace,
        ):
            while done < updates and not enough and not stop:
                trace(chunk)
                begun = time.perf_counter()
                state, metrics = advance(state, program.numbers)
                metrics, held_out = devices.fetch((metrics, evaluate(state, program.numbers)))
                seconds = time.perf_counter() - begun
                steps = next(iter(metrics.values())).shape[2]
                check_metrics(metrics, held_out, updates - done)
                chunk, done = chunk + 1, done + steps
                save_history(folder, label, done, seconds, metrics, held_out)
                log(folder, sink, label, program.rows, done, metrics, held_out)
                tell(done, f"{rates(metrics, seconds)}, compiled in {compile_seconds:.0f} s")
                enough = watch(done, metrics, held_out)
                stop = stopped()
                if done < updates and (stop or checkpoints.due()):
                    checkpoints.save(done, state)
            if done == updates and checkpoints.latest() != updates:
                checkpoints.save(done, state)
    devices.broadcast("all files are written")  # the others read them
    if stop or (done < updates and not enough):
        if folder.writes:
            name = shlex.quote(folder.path.name)
            print(f"stopped after update {done} of {updates}: --resume --name {name} goes on", file=sys.stderr)
        raise SystemExit(130)
    return load_results(folder, label, program.rows, compile_seconds), state


def compiled(program: Program, options: Options) -> tuple[Callable, Callable]:
    """`advance` and `evaluate`, compiled ahead; with `debug_nans` as functions that raise FloatingPointError from the
    line of the study that gave the first NaN. What a staged study compiles itself stays as it is."""
    if program.staged:
        if options.debug_nans:
            raise UserError("debug_nans: expected a study that is one program, this one has several")
        return program.advance, program.evaluate
    if options.debug_nans:
        return stopping_at_nans(program.advance, program), stopping_at_nans(program.evaluate, program)
    advance = jax.jit(program.advance, donate_argnums=0).lower(program.state, program.numbers).compile()
    return advance, jax.jit(program.evaluate).lower(program.state, program.numbers).compile()


def stopping_at_nans(function: Callable, program: Program) -> Callable:
    # checkify, and not jax_debug_nans: that looks at outputs alone, and inside of shard_map and scan it names no line.
    checked = jax.jit(checkify.checkify(function, errors=checkify.nan_checks))
    checked = checked.lower(program.state, program.numbers).compile()

    def call(state, numbers):
        error, result = checked(state, numbers)
        try:
            error.throw()
        except checkify.JaxRuntimeError as problem:  # its cause has the traceback of the line
            raise FloatingPointError(f"debug_nans: {str(problem).splitlines()[0]}") from problem.__cause__
        return result

    return call


def check_metrics(train: dict, held_out: dict, left: int) -> None:
    """Raises UserError for what could not be kept."""
    reserved = {"label", "row", "seed", "update"} & {*train, *held_out}
    if reserved:
        raise UserError(f"metrics: expected names besides label, row, seed and update, got {', '.join(reserved)}")
    steps = next(iter(train.values())).shape[2]
    if left % steps:
        raise UserError(f"updates: expected a multiple of the {steps} updates of a chunk, got {left} to do")


def size(program: Program) -> str:
    rows = len(program.rows)
    return f"{rows} row{'s' * (rows > 1)} x {program.seeds} seed{'s' * (program.seeds > 1)}"


def save_history(folder: RunFolder, label: str, update: int, seconds: float, train: dict, held_out: dict) -> None:
    named = {f"train/{name}": value for name, value in train.items()}
    named |= {f"held_out/{name}": value for name, value in held_out.items()}
    folder.save_history(label, update, named | {"seconds": np.float64(seconds)})


def load_results(folder: RunFolder, label: str, rows: Sequence[str], compile_seconds: float = 0.0) -> Results:
    """The whole history of a label; UserError where a part is missing or damaged."""
    parts, before = [], 0
    for path in folder.history(label):
        try:
            with np.load(path) as saved:
                parts.append({name: saved[name] for name in saved.files})
        except (ValueError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"history: expected an NPZ file, {path} is damaged ({error})") from None
        update, steps = int(path.stem), next((x.shape[2] for n, x in parts[-1].items() if n.startswith("train/")), 0)
        if update - before != steps:
            raise UserError(f"history: expected every part, the one before {path} is missing")
        before = update

    def gather(side, join):
        names = [name for name in parts[-1] if name.startswith(side)]
        whole = {name.removeprefix(side): join([part[name] for part in parts if name in part]) for name in names}
        return {row: {name: value[i] for name, value in whole.items()} for i, row in enumerate(rows)}

    return Results(
        gather("train/", lambda arrays: np.concatenate(arrays, axis=2)),
        gather("held_out/", lambda arrays: np.stack(arrays, axis=2)),
        np.array([int(path.stem) for path in folder.history(label)]),
        {"compile": compile_seconds, "train and evaluate": sum(float(part["seconds"]) for part in parts)},
    )


def log(
    folder: RunFolder, sink: Sink | None, label: str, rows: Sequence[str], update: int, train: dict, held_out: dict
):
    """Means over the seeds and the updates of a chunk, a line for each row."""
    everything = {}
    for index, row in enumerate(rows):
        means = {name: value[index].mean() for name, value in train.items() if value.ndim == 3}
        means |= {f"held_out/{name}": value[index].mean() for name, value in held_out.items()}
        folder.log({"label": label, "row": row, "update": update} | means)
        everything |= {f"{label}/{row}/{name}": float(value) for name, value in means.items()}
    if sink is not None:
        sink.log(update, everything)


UNITS = {"tokens": "sampled tokens/s", "env_steps": "environment steps/s"}  # of a study's metrics that count its work


def rates(train: dict[str, np.ndarray], seconds: float) -> str:
    """Updates and units of work per second; an update is one of all rows and seeds."""
    updates = next(iter(train.values())).shape[2] / seconds
    work = [f"{train[name].sum() / seconds:,.0f} {unit}" for name, unit in UNITS.items() if name in train]
    return ", ".join([f"{updates:.3g} updates/s", *work])


@contextlib.contextmanager
def progress(title: str, total: int, done: int, show: bool) -> Iterator[Callable[[int, str], None]]:
    """A bar with the time left; yields `tell(done, text)`. Plain lines where the output is no terminal."""
    if not show:
        yield lambda done, text: None
        return
    if not sys.stdout.isatty():
        yield lambda done, text: print(f"{title}: {done}/{total}  {text}", flush=True)
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[text]}", markup=False)) as bar:
        task = bar.add_task(title, total=total, completed=done, text="")
        yield lambda done, text: bar.update(task, completed=done, text=text)


@contextlib.contextmanager
def stoppable() -> Iterator[Callable[[], bool]]:
    """Yields `stopped()`: whether SIGINT or SIGTERM came; a second one acts at once. All processes agree."""
    came = []

    def note(number, frame):
        came.append(number)
        for kind, handler in before.items():
            signal.signal(kind, handler)
        print("\nstopping after this chunk of updates (again: at once)", file=sys.stderr)

    if threading.current_thread() is not threading.main_thread():  # which alone may handle signals
        yield lambda: False
        return
    before = {kind: signal.signal(kind, note) for kind in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: devices.any_process(bool(came))
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


@contextlib.contextmanager
def tracing(path: Path, chunks: int) -> Iterator[Callable[[int], None]]:
    """Yields `trace(chunk)`, to be called before each chunk: it writes what the devices do for xprof and TensorBoard,
    from chunk 1 (chunk 0 warms up) for as many `chunks`, or to the end of the run."""
    running = False

    def trace(chunk):
        nonlocal running
        if running and chunk > chunks:
            jax.profiler.stop_trace()
            running = False
        elif chunk == 1 and chunks:
            jax.profiler.start_trace(str(path))
            running = True

    try:
        yield trace
    finally:
        if running:
            jax.profiler.stop_trace()
    if chunks and not path.exists():
        print("profile: nothing traced, for that a run needs a second chunk of updates", file=sys.stderr)


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
