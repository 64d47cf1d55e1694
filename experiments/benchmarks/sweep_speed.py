"""One sweep against separate runs: 16 seeds x 9 settings of the tabular BandPO study, in wall time.

    python experiments/benchmarks/sweep_speed.py            # times 6 of the 144 separate runs and scales them up
    python experiments/benchmarks/sweep_speed.py --all      # times them all

Both sides are commands as a user types them, from the start of the process to the report, with a warm compilation
cache. The second case leaves out processes, compilation and reports: one program of 144 runs against 144 calls of a
compiled program of one run.
"""

import itertools
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import jax

from rollax.experiments.bandpo import STUDY
from rollax.experiments.benchmarks.timing import Row, compile_timed, duel, publish, seconds_of
from rollax.experiments.harness import devices, sweep
from rollax.experiments.harness.command_line import one_line_end, parse
from rollax.experiments.harness.loop import vectorize

FLAGS = ("--model", "tabular", "--arms", "band_kl")


@dataclass(frozen=True)
class Config:
    """The benchmark."""

    deltas: tuple[str, ...] = ("0.02", "0.05", "0.1")
    """Values of delta."""
    lrs: tuple[str, ...] = ("0.03", "0.1", "0.2")
    """Values of lr, combined with those of delta."""
    seeds: int = 16
    """Seeds of each combination."""
    updates: int = 60
    """Of each run."""
    timed: int = 6
    """Separate runs that are timed; their mean stands for the others."""
    all: bool = False
    """Time every separate run."""
    repeats: int = 3
    """Of the second case."""
    out: str = ""
    """The JSON file; empty for runs/benchmarks/sweep_speed.json."""

    def check(self) -> None:
        """Raises ValueError for values that cannot work, before anything is computed."""
        for field in ("seeds", "updates", "timed", "repeats"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}: expected at least 1, got {getattr(self, field)}")
        if not self.deltas or not self.lrs:
            raise ValueError(f"deltas, lrs: expected at least one value each, got {self.deltas} and {self.lrs}")


def command_seconds(*command: str) -> float:
    """Wall seconds of a command that must succeed."""
    begun = time.perf_counter()
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{' '.join(command)}: {done.stderr.strip().splitlines()[-1]}")
    return time.perf_counter() - begun


def commands(config: Config) -> Row:
    """The sweep command against one command for each setting and seed."""
    runs = Path(tempfile.mkdtemp())
    common = [*FLAGS, "--updates", str(config.updates), "--chunk", str(min(10, config.updates)), "--runs", str(runs)]
    grid = ["--grid", f"delta={','.join(config.deltas)}", f"lr={','.join(config.lrs)}"]
    together = ["-m", "rollax.experiments.sweep", "bandpo", *grid, "--seeds", str(config.seeds), *common]
    settings = list(itertools.product(config.deltas, config.lrs, range(config.seeds)))
    chosen = settings if config.all else settings[:: max(1, len(settings) // config.timed)][: config.timed]
    script = str(Path(__file__).parents[1] / "bandpo.py")

    def alone(index, delta, lr, seed):
        values = ["--delta", delta, "--lr", lr, "--seed", str(seed), "--seeds", "1", "--name", f"alone-{index}"]
        return command_seconds(script, *common, *values)

    command_seconds(*together, "--name", "warm")  # both programs into the compilation cache
    alone("warm", *settings[0])
    ours = [command_seconds(*together, "--name", "together")]
    separate = [alone(index, *setting) for index, setting in enumerate(chosen)]
    shutil.rmtree(runs)
    peer = [len(settings) * sum(separate) / len(separate)]
    case = f"{len(settings)} runs as commands"
    return Row(case, "runs/s", len(settings), ours, peer, notes={"separate": separate, "timed": len(chosen)})


def programs(config: Config) -> Row:
    """One program of all runs against calls of a program of one, both compiled."""
    (study,) = STUDY.configs([*FLAGS, "--updates", str(config.updates), "--chunk", str(config.updates)]).values()
    grid = {"delta": list(config.deltas), "lr": list(config.lrs)}
    points = sweep.points_of({"tabular": study}, grid)
    builds = [STUDY.build(point.config) for point in points]
    rows = {f"{point.name}:band_kl": b.rows["band_kl"] for point, b in zip(points, builds, strict=True)}
    whole = vectorize(builds[0].train, rows, range(config.seeds), "data=1")
    one = vectorize(builds[0].train, {"band_kl": builds[0].rows["band_kl"]}, range(1), "data=1")
    (all_at_once, compile_ours), (single, compile_peer) = (
        compile_timed(program.advance, program.init(), program.numbers) for program in (whole, one)
    )
    states, start = whole.init(), one.init()
    runs = len(rows) * config.seeds

    def ours() -> float:
        return seconds_of(all_at_once, states, whole.numbers)

    def peer() -> float:
        begun = time.perf_counter()
        for run in range(runs):
            numbers = jax.tree.map(lambda x, row=run // config.seeds: x[row : row + 1], whole.numbers)
            jax.block_until_ready(single(start, numbers))
        return time.perf_counter() - begun

    case = f"{runs} runs, compiled"
    return duel(case, "runs/s", runs, config.repeats, ours, peer, compile_ours=compile_ours, compile_peer=compile_peer)


@one_line_end()
def main(argv: list[str] | None = None) -> None:
    config = parse(Config(), __doc__, argv)
    devices.use_compilation_cache()
    rows = [commands(config), programs(config)]
    publish("sweep_speed", rows, config, {"separate runs": ""}, config.out)


if __name__ == "__main__":
    main()
