"""Sinks that show a run's metrics elsewhere while it trains: TensorBoard, Weights & Biases, trackio.

Everything stays in the run's folder unless the user has configured an account or a server. Tracking never stops a run:
a sink that fails, at its start or later, warns once and is left out from then on.

A resumed run computes again what came after its checkpoint. `track.json` in the run's folder holds the last step that
each sink has of each name; what it has already is not logged again (a resumed run gives the same numbers), so that no
curve turns back. After a hard kill the last moments may therefore be missing where a sink buffers (trackio: half a
second, W&B: what its own process had not written); TensorBoard is flushed at each step.
"""

import contextlib
import importlib.util
import io
import json
import os
import re
import secrets
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

STATE = "track.json"
DASHBOARD_NAME = re.compile(r"[^A-Za-z0-9_-]+")  # what a W&B run id may not hold


class Sink(NamedTuple):
    """`log(step, values)` adds one number per name at a step, `close()` writes out what is buffered.

    Names may have slashes, which group the charts, and each name's steps must rise. NaN and infinities are passed on:
    all three sinks keep them. `log` raises TypeError or ValueError for a value that is not one number.
    """

    log: Callable[[int, dict[str, float]], None]
    close: Callable[[], None]


class Run(NamedTuple):
    """What a sink knows of a run: `id` is unique and stays the same when the run is resumed; `config` is JSON."""

    path: Path
    study: str
    name: str
    config: dict
    id: str
    resumed: bool


def open_sinks(names: Sequence[str], path: Path, *, study: str, name: str, config: dict, resume: bool = False) -> Sink:
    """One sink for all the named ones; it does nothing for no names. Prints where to look, one line a sink.

    Args:
      names: of `SINKS`.
      path: the run's folder; sinks write below it.
      study, name: project and run in the dashboards.
      config: shown beside the curves; what JSON does not know is shown as text.
      resume: go on with the run that was tracked in `path` before.
    Raises:
      ValueError: for an unknown name.
      ImportError: when the library of a sink is not installed. Nothing has been created then.
    """
    names = tuple(dict.fromkeys(names))
    check_sinks(names)
    if not names:
        return Sink(lambda step, values: None, lambda: None)

    path.mkdir(parents=True, exist_ok=True)
    state = {"id": unique_id(study, name), "logged": {}}
    if resume and (path / STATE).exists():
        with going_on_without(STATE, {}):
            state = json.loads((path / STATE).read_text())
    run = Run(path, study, name, json.loads(json.dumps(config, default=str)), state["id"], resume)
    before = {sink: dict(state["logged"].get(sink, {})) for sink in names}
    sinks = {}
    with going_on_without(STATE, {}):
        write_json(path / STATE, state)  # a run that stops before its first step keeps its id
    for sink in names:
        with going_on_without(sink, sinks):
            sinks[sink] = SINKS[sink](run)

    def log(step, values):
        step, values = int(step), {name: float(value) for name, value in values.items()}
        for sink in list(sinks):
            new = {name: value for name, value in values.items() if step > before[sink].get(name, -1)}
            if new:
                with going_on_without(sink, sinks):
                    sinks[sink].log(step, new)
                    state["logged"].setdefault(sink, {}).update(dict.fromkeys(new, step))
        if sinks:
            with going_on_without(STATE, {}):
                write_json(path / STATE, state)

    def close():
        for sink in list(sinks):
            with going_on_without(sink, sinks):
                sinks.pop(sink).close()

    return Sink(log, close)


def check_sinks(names: Sequence[str]) -> None:
    """The errors of `open_sinks` without opening any."""
    for sink in names:
        if sink not in SINKS:
            raise ValueError(f"track: expected some of {', '.join(SINKS)}, got {sink!r}")
    for sink in names:
        if importlib.util.find_spec(sink) is None:
            raise ImportError(f"track: {sink} is not installed: pip install -e '.[track]'")


def unique_id(study: str, name: str) -> str:
    """Readable, and new each time: two runs of one name, here and on another machine, must not meet in one curve."""
    return DASHBOARD_NAME.sub("-", f"{study}-{name}")[:100] + f"-{secrets.token_hex(4)}"


@contextlib.contextmanager
def going_on_without(name: str, sinks: dict[str, Sink]) -> Iterator[None]:
    """Turns any failure (a full disk, no network) into a warning, and takes the sink out of `sinks`."""
    try:
        yield
    except Exception as error:
        sinks.pop(name, None)
        why = " ".join(f"{type(error).__name__}: {error}".split())
        warnings.warn(f"track: {name} failed, going on without it ({why})", RuntimeWarning, stacklevel=3)


def write_json(path: Path, value: dict) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value) + "\n")
    os.replace(temporary, path)


def tensorboard(run: Run) -> Sink:
    """Event files in `tensorboard/`, one per process that ran; needs no TensorFlow. Numbers are kept as float32."""
    from tensorboard.compat import tf  # its own small stand-in where there is no TensorFlow
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.text.summary_v2 import text_pb
    from tensorboard.summary.writer.record_writer import RecordWriter

    folder = run.path / "tensorboard"
    folder.mkdir(exist_ok=True)
    file = folder / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"  # read in this order
    # Not EventFileWriter: it writes in a thread, whose failures would come late and with a traceback.
    writer = RecordWriter(tf.io.gfile.GFile(str(file), "wb"))

    def write(**event):
        writer.write(Event(wall_time=time.time(), **event).SerializeToString())
        writer.flush()

    write(file_version="brain.Event:2")
    if not run.resumed:
        block = json.dumps(run.config, indent=1).replace("\n", "\n    ")  # indented text is verbatim in Markdown
        write(summary=text_pb("config", f"    {block}"))
    print(f"tensorboard: tensorboard --logdir {folder}")

    def log(step, values):
        points = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        write(step=step, summary=Summary(value=points))

    return Sink(log, writer.close)


def wandb(run: Run) -> Sink:
    """A run in `wandb/`, online where an API key is configured, else offline; WANDB_MODE and `wandb offline` hold.

    Online it waits up to 90 seconds for the server to answer (WANDB_INIT_TIMEOUT) before the run goes on without it.

    The x axis of all charts is "update", not W&B's own step, which could not go back to 0 for a second program of the
    same run. A resumed run goes on under the same id: offline it becomes a second folder, and `wandb sync` puts both
    into one run.
    """
    import wandb

    mode, why = wandb.setup().settings.mode, ""
    if mode == "online" and not wandb.login(prompt=False, verify=False):
        mode, why = "offline", " (no API key)"
    live = wandb.init(
        project=run.study,
        name=run.name,
        id=run.id,
        dir=run.path,
        config=run.config,
        mode=mode,
        resume="allow",
        reinit="create_new",  # leaves a run that the caller has open alone
        settings=wandb.Settings(silent=True, console="off"),  # the terminal belongs to the progress bar
    )
    live.define_metric("*", step_metric="update")
    upload = f"; wandb sync {run.path / 'wandb'}/offline-run-* uploads it" if mode == "offline" else ""
    print(f"wandb: {live.url if mode == 'online' else mode + why + upload}")
    return Sink(lambda step, values: live.log({"update": step, **values}), live.finish)


def trackio(run: Run) -> Sink:
    """A database in `trackio/`, no dashboard started; TRACKIO_DIR, TRACKIO_SPACE_ID and TRACKIO_SERVER_URL hold.

    trackio reads its folder once a process, when it is imported: a second run of the same process goes to the folder
    of the first. It reports its own failures, as warnings.
    """
    with trackio_folder(run.path / "trackio"):
        import trackio

    with contextlib.redirect_stdout(io.StringIO()):
        live = trackio.init(
            project=run.study,
            name=run.name,
            config=run.config,
            resume="allow" if run.resumed else "never",
            embed=False,
        )
    print(f"trackio: TRACKIO_DIR={trackio.TRACKIO_DIR} trackio show --project {run.study}")

    def close():
        with contextlib.redirect_stdout(io.StringIO()):
            trackio.finish()

    return Sink(lambda step, values: live.log(values, step=step), close)


@contextlib.contextmanager
def trackio_folder(folder: Path) -> Iterator[None]:
    """TRACKIO_DIR, unless the user has set it or trackio is imported already, for the duration of the import."""
    if "TRACKIO_DIR" in os.environ or "trackio" in sys.modules:
        yield
        return
    os.environ["TRACKIO_DIR"] = str(folder.absolute())
    try:
        yield
    finally:
        del os.environ["TRACKIO_DIR"]


SINKS: dict[str, Callable[[Run], Sink]] = {"tensorboard": tensorboard, "wandb": wandb, "trackio": trackio}
