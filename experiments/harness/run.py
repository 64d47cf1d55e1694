"""What surrounds a study: its command line, its folder of results, its progress.

A study calls `parse`, `RunFolder` and `progress`, and could be read without them.
"""

import contextlib
import datetime
import io
import itertools
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def parse(default: Any, description: str, argv: list[str] | None = None, *, check: bool = True) -> Any:
    """Reads a frozen dataclass from the command line; a bad value gets one line on stderr and exit status 2.

    Args:
      default: an instance; the command line overrides its fields.
      check: call the method `check()`, which raises ValueError for values that cannot work.
    """
    import tyro  # half a second, and only the command line needs it

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            config = tyro.cli(type(default), default=default, description=description, args=argv)
    except SystemExit as stop:
        if stop.code:
            fail(first_message(said.getvalue()))
        raise
    if check:
        with one_line_errors():
            config.check()
    return config


def first_message(boxed: str) -> str:
    """The message of an error that tyro wraps and frames: the lines between the title and the first rule."""
    lines = [line.strip("│ ") for line in boxed.splitlines()[1:]]
    message = itertools.takewhile(lambda line: line.strip("─╰╯"), lines)
    return " ".join(message) or "bad command line"


def fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns the errors that a user can mend (a value, a missing file) into one line and exit status 2."""
    try:
        yield
    except (ValueError, FileNotFoundError, ImportError) as error:
        fail(str(error).strip().splitlines()[0])


@contextlib.contextmanager
def interruptible(folder: "RunFolder") -> Iterator[None]:
    """Ends a run on Ctrl-C with one line that says where its metrics are."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"interrupted: the metrics so far are in {folder.path}", file=sys.stderr)
        raise SystemExit(130) from None


def plain(value: Any) -> Any:
    """A tree of arrays and dataclasses as what JSON knows; numbers that JSON does not know become null."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return plain(np.asarray(value).tolist())
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    return value


class RunFolder:
    """`<root>/<study>/<name>`: configuration, metrics, figures, results. Files appear whole or not at all.

    Raises:
      ValueError: if the folder exists and is not empty: nothing saved is overwritten.
    """

    def __init__(self, root: str, study: str, name: str, config: Any):
        name = name or datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        self.path = Path(root) / study / name
        if self.path.exists() and any(self.path.iterdir()):
            raise ValueError(f"name: expected a new run, but {self.path} already holds one")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"runs: cannot write {self.path}: {error.strerror}") from None
        self.write_json("config.json", config)
        self.write_json("versions.json", versions())

    def write_text(self, name: str, text: str) -> Path:
        path = self.path / name
        temporary = path.with_name(f".{name}.tmp")
        temporary.write_text(text)
        os.replace(temporary, path)
        return path

    def write_json(self, name: str, value: Any) -> Path:
        return self.write_text(name, json.dumps(plain(value), indent=1) + "\n")

    def log(self, **metrics: Any) -> None:
        """Appends one line to metrics.jsonl."""
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(plain(metrics)) + "\n")


def versions() -> dict:
    """What a result depends on: Python, libraries, devices, the command and the state of the repository."""
    import flax
    import optax

    def git(*arguments):
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError:  # a machine without git
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    return {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "flax": flax.__version__,
        "optax": optax.__version__,
        "devices": [str(device) for device in jax.devices()],
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "commit": git("rev-parse", "HEAD"),
        "uncommitted": git("status", "--porcelain") not in ("", None),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


@contextlib.contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int, str], None]]:
    """A bar with the time left; yields `advance(done, text)`. Plain lines where the output is no terminal."""
    if not sys.stdout.isatty():
        yield lambda done, text: print(f"{title}: {done}/{total}  {text}", flush=True)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[text]}")) as bar:
        task = bar.add_task(title, total=total, text="compiling")
        yield lambda done, text: bar.update(task, completed=done, text=text)


def use_compilation_cache() -> None:
    """Keeps compiled programs in `.cache/jax` of the checkout (else of the home), or in JAX_COMPILATION_CACHE_DIR."""
    root = Path(__file__).parents[2]
    root = root if (root / "pyproject.toml").is_file() else Path.home()
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(root / ".cache" / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
