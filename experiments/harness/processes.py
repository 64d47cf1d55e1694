"""A run of several processes (hosts): they start together by `jax.distributed`, and fail together.

All run the same program; arrays span them, and only the first writes files, to a disk that all of them see. Start each
with JAX_COORDINATOR_ADDRESS (host:port of the first), JAX_NUM_PROCESSES and JAX_PROCESS_ID, all with `srun`, or on Ray
with `on_ray.py`. When a process is lost the others end too, and `--resume` goes on, with any number of processes.
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

import jax
from jax._src.xla_bridge import backends_are_initialized  # nothing public tells

LOSING = ("Gloo", "oordination", "UNAVAILABLE", "DEADLINE_EXCEEDED", "eartbeat")  # in errors that a lost process makes
LOST = "error: this process or another one of the run was lost; --resume goes on from the last checkpoint"


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
        raise ValueError(f"JAX_NUM_PROCESSES: {several} processes join before JAX has started, which it has")
    seconds = whole_number("ROLLAX_JOIN_SECONDS", least=1, default=120)
    heartbeat = whole_number("ROLLAX_HEARTBEAT_SECONDS", least=1, default=10)
    if place:
        meet(address, first=index == 0, seconds=seconds)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # what CPUs of several processes talk by
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM away from `loop.stoppable`
    at_death(f"error: jax.distributed: {several} processes did not meet within {seconds} s, or two have one number")
    jax.distributed.initialize(**place, initialization_timeout=seconds, heartbeat_timeout_seconds=heartbeat)
    at_death(LOST)


def whole_number(name: str, *, least: int, default: int | None = None) -> int:
    """An environment variable; ValueError if it is too small, no integer, or missing without a default."""
    text = os.environ.get(name, "" if default is None else str(default))
    if not text.isdecimal() or int(text) < least:
        raise ValueError(f"{name}: expected an integer of at least {least}, got {text!r}")
    return int(text)


def meet(address: str, first: bool, seconds: float) -> None:
    """Raises ValueError where JAX would abort: the first process cannot listen, another one cannot reach it."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + seconds
    while True:
        try:
            if first:
                return socket.create_server(("", int(port))).close()
            return socket.create_connection((host.strip("[]"), int(port)), timeout=seconds).close()
        except OSError as error:
            if first or time.monotonic() > deadline:
                does = "listen on" if first else f"within {seconds} s reach"
                raise ValueError(f"JAX_COORDINATOR_ADDRESS: cannot {does} {address}: {error}") from None
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
        code = error.code if isinstance(error, SystemExit) else 1
        if not code or not jax.distributed.is_initialized():
            raise
        lost = isinstance(error, Exception) and any(word in str(error) for word in LOSING)
        if not lost:  # else the witness says it
            at_death("")
            if isinstance(error, OSError):
                print(f"error: {error}", file=sys.stderr)
            elif not isinstance(error, SystemExit):
                traceback.print_exc()
            if jax.process_index() == 0:
                time.sleep(1)  # the others may have failed for the same reason, and without the first they would abort
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)
