"""Where the programs of a sweep run: processes of this machine, a Ray cluster, or SLURM through submitit.

Each job is the same command in a process of its own, which leaves its results in the sweep's folder: all machines see
that folder. A job that dies takes no other with it.
"""

import subprocess
import sys
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


def run_job(sweep: str, job: int) -> int:
    """Runs one job to its end; its output goes to `jobs/<job>.txt`. Returns its exit status."""
    log = Path(sweep) / "jobs" / f"{job:03d}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "rollax.experiments.sweep", "--work", sweep, str(job)]
    with log.open("a") as file:
        return subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode


def launch_local(sweep: Path, jobs: Sequence[int], engine: Engine) -> list[int]:
    with ThreadPoolExecutor(engine.workers) as pool:
        return list(pool.map(run_job, [str(sweep)] * len(jobs), jobs))


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
        return ray.get([remote.remote(str(sweep), job) for job in jobs])
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
    submitted = executor.map_array(run_job, [str(sweep)] * len(jobs), jobs)
    return [job.result() for job in submitted]


LAUNCHERS: dict[str, Callable[[Path, Sequence[int], Engine], list[int]]] = {
    "local": launch_local,
    "ray": launch_ray,
    "slurm": launch_slurm,
}
