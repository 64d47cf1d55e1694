"""Where the programs of a sweep run: processes of this machine, a Ray cluster, or SLURM through submitit.

Each job is the same command in a process of its own, which leaves its results in the sweep's folder: all machines see
that folder. A job that dies takes no other with it.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple


class Engine(NamedTuple):
    """How to launch.

    Attributes:
      workers: jobs at a time on this machine.
      address: of a Ray cluster; a local one is started when empty.
      cpus, gpus: of a job, for Ray and SLURM.
      slurm: submitit's parameters, such as {"slurm_partition": "gpu", "timeout_min": 240}; {"cluster": "local"} runs
        the jobs on this machine.
    """

    workers: int = 1
    address: str = ""
    cpus: int = 1
    gpus: int = 0
    slurm: Mapping[str, Any] = MappingProxyType({})


def start_job(sweep: Path, job: int, folder: str) -> subprocess.Popen:
    """One job, in a working folder; its output goes to `jobs/<job>.txt` of the sweep."""
    log = sweep / "jobs" / f"{job:03d}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "rollax.experiments.sweep", "--work", str(sweep), str(job)]
    with log.open("a") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=folder)


def run_job(sweep: str, job: int, folder: str) -> int:
    """Runs one job to its end, and returns its exit status."""
    return start_job(Path(sweep), job, folder).wait()


def launch_local(sweep: Path, jobs: Sequence[int], engine: Engine) -> list[int]:
    """Some processes at a time. SIGTERM and SIGINT are handed on to them, and no further one starts."""
    running, stopping = [], []

    def run(job):
        if stopping:
            return 130
        running.append(start_job(sweep, job, os.getcwd()))
        return running[-1].wait()

    def stop(number, frame):
        stopping.append(number)
        for process in running:
            if process.poll() is None:
                process.terminate()

    kinds = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {kind: signal.signal(kind, stop) for kind in kinds}
    try:
        with ThreadPoolExecutor(engine.workers) as pool:
            return list(pool.map(run, jobs))
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def launch_ray(sweep: Path, jobs: Sequence[int], engine: Engine) -> list[int]:
    """Ray, which queues what does not fit. Its workers see `sweep` on a shared file system."""
    try:
        import ray
    except ImportError:
        raise ImportError("launcher: ray is not installed: pip install -e '.[ray]'") from None
    started = not ray.is_initialized()
    if started:
        ray.init(address=engine.address or None, include_dashboard=False, log_to_driver=False)
    try:
        remote = ray.remote(num_cpus=engine.cpus, num_gpus=engine.gpus, max_retries=0)(run_job)
        return ray.get([remote.remote(str(sweep), job, os.getcwd()) for job in jobs])
    finally:
        if started:
            ray.shutdown()


def launch_slurm(sweep: Path, jobs: Sequence[int], engine: Engine) -> list[int]:
    """One SLURM job array; waits for it."""
    try:
        import submitit
    except ImportError:
        raise ImportError("launcher: submitit is not installed: pip install -e '.[sweep]'") from None
    parameters = dict(engine.slurm)
    executor = submitit.AutoExecutor(folder=sweep / "slurm", cluster=parameters.pop("cluster", None))
    executor.update_parameters(
        name="rollax", cpus_per_task=engine.cpus, gpus_per_node=engine.gpus, **{"timeout_min": 24 * 60} | parameters
    )
    submitted = executor.map_array(run_job, [str(sweep)] * len(jobs), jobs, [os.getcwd()] * len(jobs))
    return [job.result() for job in submitted]


LAUNCHERS: dict[str, Callable[[Path, Sequence[int], Engine], list[int]]] = {
    "local": launch_local,
    "ray": launch_ray,
    "slurm": launch_slurm,
}
