"""`runs/<study>/<name>/`: what a run was, what it measured, what it found. Files appear whole or not at all.

config.json      the resolved configuration of each label (a model, for example)
versions.json    command, libraries, devices, git state; once more for each resume
metrics.jsonl    means over seeds after each chunk of updates, for `tail -f`
history/         every metric of every seed, one NPZ a chunk: what results are computed from
metrics.parquet  the same in long format, for pandas
checkpoints/     see `checkpoint.py`
results.json, report.html, report.md, curves_*.png, curves_*.pdf
"""

import datetime
import fcntl
import importlib.metadata
import io
import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rollax.experiments.harness import devices
from rollax.experiments.harness.command_line import Options, UserError


class RunFolder:
    """A new run's folder, or with `options.resume` that of a run to go on with.

    One process writes to it at a time: a lock says so, which ends with the process. In a run of several processes
    (`jax.distributed`) only the first writes.

    Args:
      configs: `{label: configuration}`, dataclasses.
    Raises:
      ValueError: the folder holds a run already, cannot be written, or is in use; or a resumed run had another
        configuration: nothing saved is overwritten.
    """

    def __init__(self, study: str, options: Options, configs: dict[str, Any]):
        self.path, self.resumed = Path(options.runs) / study, False
        self.writes, problem = jax.process_index() == 0, ""
        if self.writes:
            try:
                self._open(options, configs)
            except ValueError as error:
                problem = str(error)[:1000]
        opened = json.dumps([self.path.name, self.resumed, problem])
        name, self.resumed, problem = json.loads(devices.broadcast(opened))
        if problem:  # in all processes, so that none waits for another
            raise ValueError(problem)
        self.path = Path(options.runs) / study / name
        if devices.any_process(not (self.path / "config.json").exists()):
            raise ValueError(f"runs: expected a directory that all processes share, got {options.runs}")

    def _open(self, options, configs):
        root = self.path
        self.path = root / (options.name or (latest(root, "sweep" in configs) if options.resume else new_name(root)))
        self.resumed = options.resume and (self.path / "config.json").exists()
        if not self.resumed and holds_a_run(self.path):
            raise ValueError(f"name: expected a new run, but {self.path} already holds one (--resume goes on with it)")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / "lock").open("w")
        except OSError as error:
            raise ValueError(f"runs: cannot write {self.path}: {error.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"name: {self.path} is in use by a running process") from None
        if self.resumed:
            self._check_same(configs)
            before = self.read_json("versions.json") or {}
            self.write_json("versions.json", before | {"resumed": [*before.get("resumed", []), versions()]})
        else:
            self.write_json("versions.json", versions())
            self.write_json("config.json", configs)  # last: with it the folder holds a run

    def close(self) -> None:
        """Lets another run write here."""
        if self.writes:
            self._lock.close()

    def _check_same(self, configs):
        saved, surround = self.read_json("config.json"), Options.names()
        wanted = json.loads(json.dumps(plain(configs)))
        differ = [
            f"{field} was {before.get(field)!r}, is {now.get(field)!r}"
            for label in dict.fromkeys([*saved, *wanted])
            for before, now in [(saved.get(label, {}), wanted.get(label, {}))]
            for field in dict.fromkeys([*before, *now])
            if field not in surround and before.get(field) != now.get(field)
        ]
        if differ:
            raise ValueError(f"resume: {self.path} has another configuration: {'; '.join(dict.fromkeys(differ))}")

    def write_bytes(self, name: str, content: bytes) -> None:
        if not self.writes:
            return
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:  # of a write, which does not say where
            raise OSError(error.errno, error.strerror, str(path)) from None
        os.replace(temporary, path)

    def write_json(self, name: str, value: Any) -> None:
        self.write_bytes(name, (json.dumps(plain(value), indent=1) + "\n").encode())

    def read_json(self, name: str) -> Any:
        """The content of a JSON file; None if there is none."""
        return self.read(self.path, name)

    @staticmethod
    def read(folder: Path, name: str) -> Any:
        """The same of any run's folder, also one that is being written."""
        path = folder / name
        try:
            return json.loads(path.read_text()) if path.exists() else None
        except ValueError as error:
            raise UserError(f"{path}: expected JSON, it is damaged ({error})") from None

    def log(self, metrics: dict[str, Any]) -> None:
        """Appends one line to metrics.jsonl, in one write."""
        if not self.writes:
            return
        file = os.open(self.path / "metrics.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, (json.dumps(plain(metrics)) + "\n").encode())
        finally:
            os.close(file)

    def forget_after(self, label: str, update: int) -> None:
        """Drops what was logged for `label` after `update`: a resumed run computes it again."""
        path = self.path / "metrics.jsonl"
        if not self.writes or not path.exists():
            return
        kept = [line for line in map(readable, path.read_text().splitlines()) if line]
        kept = [line for line in kept if line.get("label") != label or line["update"] <= update]
        self.write_bytes("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept).encode())
        for part in self.history(label):
            if int(part.stem) > update:
                part.unlink()

    def save_history(self, label: str, update: int, arrays: dict[str, np.ndarray]) -> None:
        content = io.BytesIO()
        np.savez_compressed(content, **arrays)
        self.write_bytes(f"history/{label}/{update:08d}.npz", content.getvalue())

    def history(self, label: str) -> list[Path]:
        """The NPZ files of `label`, one for each chunk of updates, in order."""
        return sorted((self.path / "history" / label).glob("[0-9]*.npz"))


def holds_a_run(path: Path) -> bool:
    """Whether there is anything but what a run leaves that was killed before it began."""
    return path.exists() and any(x.name not in ("lock", "versions.json") and x.name[0] != "." for x in path.iterdir())


def latest(root: Path, sweep: bool = False) -> str:
    """The name of the run (or sweep) in `root` that was begun last; ValueError if there is none."""
    started = [path.parent for path in root.glob("*/config.json")]
    started = [path for path in started if (path / "command.json").exists() == sweep]
    if not started:
        raise ValueError(f"resume: expected a run in {root}, found none")
    return max(started, key=lambda path: (path / "config.json").stat().st_mtime).name


def new_name(root: Path) -> str:
    """The time, with a number where several runs begin in the same second."""
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    names = [now, *(f"{now}-{i}" for i in range(2, 1000))]
    return next(name for name in names if not (root / name).exists())


def readable(line: str) -> dict | None:
    """A line of JSON, None for one that was cut by a full disk."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


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


def git_state() -> tuple[str | None, bool]:
    """The commit, None outside of a repository, and whether there are changes on top of it."""

    def git(*arguments):
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError:  # a machine without git
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    return git("rev-parse", "HEAD"), git("status", "--porcelain") not in ("", None)


def versions() -> dict:
    """What a result depends on: the command, Python, libraries, devices, and the state of the repository."""
    commit, changed = git_state()
    libraries = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scipy")
    return {
        "command": [Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]],
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "uncommitted": changed,
        "devices": [str(device) for device in jax.devices()],
        "device_kind": jax.devices()[0].device_kind,
        "processes": jax.process_count(),
        "python": platform.python_version(),
        "platform": platform.platform(),
    } | {name: importlib.metadata.version(name) for name in libraries}
