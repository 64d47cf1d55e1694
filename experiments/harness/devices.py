"""Devices and processes: the mesh, how runs spread over it, `jax.distributed`, and the switches of a process.

Several processes (hosts) run the same program; arrays then span all of them, and only the first process writes files.
Start each with JAX_COORDINATOR_ADDRESS (host:port of the first), JAX_NUM_PROCESSES and JAX_PROCESS_ID, or all with
`srun`; a Ray worker sets the three from its rank before it calls a study's `main`. All need one disk for the run
folder. When a process is lost the others end too, and `--resume` goes on, with any number of processes.
"""

import atexit
import contextlib
import functools
import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src.xla_bridge import backends_are_initialized  # nothing public tells
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from rollax.agents import make_mesh
from rollax.experiments.harness.command_line import Options

AXES = ("data", "fsdp", "tensor")


def begin(options: Options) -> None:
    """Sets a process up, before JAX is first used: compilation cache, determinism, NaNs, the other processes.

    Raises:
      ValueError: JAX runs already, too late for `deterministic` or for other processes; or see `join`.
    """
    use_compilation_cache()
    flags, flag = os.environ.get("XLA_FLAGS", ""), "--xla_gpu_deterministic_ops=true"
    if options.deterministic and flag not in flags:
        if backends_are_initialized():
            raise ValueError(f"deterministic: expected before JAX has started, which it has: set XLA_FLAGS={flag}")
        os.environ["XLA_FLAGS"] = f"{flags} {flag}".strip()
    jax.config.update("jax_debug_nans", options.debug_nans)
    join()


def use_compilation_cache() -> None:
    """Keeps compiled programs in `.cache/jax` of the checkout (else of the home), or in JAX_COMPILATION_CACHE_DIR."""
    root = Path(__file__).parents[2]
    root = root if (root / "pyproject.toml").is_file() else Path.home()
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(root / ".cache" / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def join() -> None:
    """Joins the other processes of the run, if the environment names any; else does nothing.

    ROLLAX_JOIN_SECONDS (120) is how long it waits for them, ROLLAX_HEARTBEAT_SECONDS (10) how long for a silent one.

    Raises:
      ValueError: variables that are missing or wrong, JAX runs already, or the first process is not to be reached.
    """
    if jax.distributed.is_initialized():
        return
    place, several = {}, whole_number("SLURM_STEP_NUM_TASKS", least=1, default=1)
    if any(name in os.environ for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")):
        several = whole_number("JAX_NUM_PROCESSES", least=1)
        index, address = whole_number("JAX_PROCESS_ID", least=0), os.environ.get("JAX_COORDINATOR_ADDRESS", "")
        if index >= several:
            raise ValueError(f"JAX_PROCESS_ID: expected below JAX_NUM_PROCESSES={several}, got {index}")
        if not address.rpartition(":")[2].isdigit():
            raise ValueError(f"JAX_COORDINATOR_ADDRESS: expected host:port of the first process, got {address!r}")
        place = {"coordinator_address": address, "num_processes": several, "process_id": index}
    if several == 1:
        return
    if backends_are_initialized():
        raise ValueError(f"JAX_NUM_PROCESSES: {several} processes must join before JAX has started, which it has")
    seconds = whole_number("ROLLAX_JOIN_SECONDS", least=1, default=120)
    heartbeat = whole_number("ROLLAX_HEARTBEAT_SECONDS", least=1, default=10)
    if place:
        meet(address, first=index == 0, seconds=seconds)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # what CPUs of several processes talk by
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM away from `loop.stoppable`
    at_death(f"error: jax.distributed: {several} processes did not meet within {seconds} s, or two have one number")
    jax.distributed.initialize(**place, initialization_timeout=seconds, heartbeat_timeout_seconds=heartbeat)
    at_death("error: this process or another one of the run was lost; --resume goes on from the last checkpoint")


def whole_number(name: str, *, least: int, default: int | None = None) -> int:
    """An environment variable; ValueError if it is no integer of at least `least`, or missing without a default."""
    text = os.environ.get(name, default)
    try:
        number = int(text)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: expected an integer, got {text!r}") from None
    if number < least:
        raise ValueError(f"{name}: expected at least {least}, got {number}")
    return number


def meet(address: str, first: bool, seconds: float) -> None:
    """Raises ValueError where JAX would abort: the first process cannot listen, another one cannot reach it."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + seconds
    while True:
        try:
            if first:
                socket.create_server(("", int(port))).close()
            else:
                socket.create_connection((host.strip("[]"), int(port)), timeout=seconds).close()
            return
        except OSError as error:
            if first or time.monotonic() > deadline:
                does = "listen on" if first else f"reach within {seconds} s"
                raise ValueError(f"JAX_COORDINATOR_ADDRESS: cannot {does} {address}: {error.strerror}") from None
        time.sleep(0.2)


@functools.cache
def witness() -> subprocess.Popen:
    """A child that, when this process has ended, prints the last line it was told: JAX ends some from C++, by abort."""
    script = 'while read -r line; do last=$line; done; [ -z "$last" ] || echo "$last" >&2'
    child = subprocess.Popen(["sh", "-c", script], stdin=subprocess.PIPE, start_new_session=True)
    atexit.register(at_death, "")
    atexit.register(jax.distributed.shutdown)  # before that, and it may abort too
    return child


def at_death(line: str) -> None:
    """What is printed when this process ends without having taken it back with an empty line."""
    witness().stdin.write(f"{line}\n".encode())
    witness().stdin.flush()


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """Of several processes, one that fails in the body ends at once: an orderly exit waits for the others, and they
    for this one. One process alone fails as ever."""
    try:
        yield
    except BaseException as error:
        if not jax.distributed.is_initialized() or (isinstance(error, SystemExit) and not error.code):
            raise
        lost = isinstance(error, jax.errors.JaxRuntimeError) and "Gloo" in str(error)
        if not lost:  # else the witness says it
            at_death("")
            if not isinstance(error, SystemExit):
                traceback.print_exc()
            if jax.process_index() == 0:
                time.sleep(1)  # the others may have failed for the same reason, and without the first they would abort
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1)


def parse_mesh(text: str) -> Mesh:
    """ "data=2,fsdp=4" as a mesh; every device along fsdp when empty. ValueError for another form or axis."""
    try:
        shape = {name: int(size) for name, size in (part.split("=") for part in text.split(",") if part)}
    except ValueError:
        raise ValueError(f'mesh: expected a form like "data=2,fsdp=4", got {text!r}') from None
    unknown = set(shape) - set(AXES)
    if unknown or any(size < 1 for size in shape.values()):
        raise ValueError(f"mesh: expected sizes of {', '.join(AXES)}, got {text!r}")
    try:
        return make_mesh(shape or {"fsdp": -1})
    except ValueError as error:
        raise ValueError(f"mesh: {error}") from None


def runs_mesh(text: str, rows: int, seeds: int) -> tuple[Mesh, int]:
    """Devices for many small runs `[rows, seeds]`, each of which fits one device.

    Returns:
      A mesh of one axis "runs" and the axis of the runs that it splits, 0 (rows) or 1 (seeds). Without `text` it has
      as many of the devices as divide the seeds or else the rows.
    Raises:
      ValueError: axes besides data, or a number of devices that divides neither rows nor seeds.
    """
    if text:
        mesh = parse_mesh(text)
        if mesh.shape.keys() - {"data"}:
            raise ValueError(f"mesh: many small runs spread over data alone, got {text!r}")
        wanted = list(mesh.devices.flat)
    else:
        wanted = jax.devices()
    counts = [len(wanted)] if text or jax.process_count() > 1 else range(len(wanted), 0, -1)
    for count in counts:
        for axis, size in ((1, seeds), (0, rows)):
            if size % count == 0:
                return Mesh(np.asarray(wanted[:count]), ("runs",)), axis
    raise ValueError(f"mesh: expected a number of devices that divides {seeds} seeds or {rows} rows, got {len(wanted)}")


def fetch(tree: Any) -> Any:
    """Arrays as numpy, also those that span several processes."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def broadcast(text: str) -> str:
    """What the first process says, in all of them; at most 4096 bytes."""
    if jax.process_count() == 1:
        return text
    line, said = np.zeros(4096, np.uint8), np.frombuffer(text.encode()[:4096], np.uint8)
    line[: said.size] = said
    return bytes(multihost_utils.broadcast_one_to_all(line)).rstrip(b"\0").decode(errors="ignore")


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process; all of them agree."""
    return flag if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(flag)).any())
