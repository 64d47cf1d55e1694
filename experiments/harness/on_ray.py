"""One study as several processes on a Ray cluster: each worker starts one, and they join by `jax.distributed`.

    python -m rollax.experiments.harness.on_ray --processes 4 --gpus 1 --address auto experiments/bandpo.py --name big

What follows the options is the study's file with its arguments; it lies on a disk that all machines see, as do its
results. The first worker is the coordinator; the output of each is shown with its number before it.
"""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rollax.experiments.harness.command_line import one_line_errors, parse


@dataclass(frozen=True)
class Config:
    """Where and how many."""

    processes: int = 2
    """Processes, each in a Ray worker."""
    cpus: int = 1
    """CPUs of each."""
    gpus: int = 0
    """GPUs of each."""
    address: str = ""
    """Of a Ray cluster, `auto` for the one that runs here; a local one is started when empty."""

    def check(self) -> None:
        """Raises ValueError for values that cannot work."""
        for field, least in (("processes", 1), ("cpus", 1), ("gpus", 0)):
            if getattr(self, field) < least:
                raise ValueError(f"{field}: expected at least {least}, got {getattr(self, field)}")


class Worker:
    """An actor: one process of the study."""

    def address(self) -> str:
        """host:port of this worker, for the others."""
        import ray

        with socket.socket() as listener:
            listener.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{listener.getsockname()[1]}"

    def run(self, command: Sequence[str], folder: str, variables: dict[str, str]) -> tuple[int, str]:
        """(exit status, everything printed) of the command, run in `folder`."""
        done = subprocess.run(
            command,
            cwd=folder,
            env=os.environ | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return done.returncode, done.stdout


def run_on_ray(command: Sequence[str], config: Config) -> list[tuple[int, str]]:
    """Runs the command once in every worker, joined; (exit status, output) of each.

    Raises:
      ImportError: Ray is not installed.
    """
    try:
        import ray
    except ImportError:
        raise ImportError("on_ray: ray is not installed: pip install -e '.[ray]'") from None
    started = not ray.is_initialized()
    if started:
        ray.init(address=config.address or None, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        actor = ray.remote(num_cpus=config.cpus, num_gpus=config.gpus, scheduling_strategy="SPREAD")(Worker)
        workers = [actor.remote() for _ in range(config.processes)]
        joined = {"JAX_COORDINATOR_ADDRESS": ray.get(workers[0].address.remote())}
        joined["JAX_NUM_PROCESSES"] = str(config.processes)
        return ray.get(
            [
                worker.run.remote(list(command), os.getcwd(), joined | {"JAX_PROCESS_ID": str(index)})
                for index, worker in enumerate(workers)
            ]
        )
    finally:
        if started:
            ray.shutdown()


def main(argv: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    begins = next((i for i, word in enumerate(words) if word.endswith(".py")), len(words))
    config, study = parse(Config(), __doc__, words[:begins]), words[begins:]
    with one_line_errors():
        if not study:
            raise ValueError("study: expected a file and its arguments behind the options")
        ended = run_on_ray([sys.executable, *study], config)
    for index, (_, said) in enumerate(ended):
        for line in said.splitlines():
            print(f"{index}: {line}")
    failed = [code for code, _ in ended if code]
    raise SystemExit(128 - failed[0] if failed and failed[0] < 0 else (failed or [0])[0])  # a signal is a negative code


if __name__ == "__main__":
    main()
