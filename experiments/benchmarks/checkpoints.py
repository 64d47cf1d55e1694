"""What checkpoints cost: saving and restoring against bare orbax, and the share of a run that saving takes.

    python experiments/benchmarks/checkpoints.py

Ours adds a fingerprint of the state, its check at restoring, and the choice of a whole checkpoint. The last case trains
PPO on CartPole with a checkpoint whenever one is due against none before the end; its ratio minus one is the cost.
"""

import shutil
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np

from rollax.experiments import ppo_cartpole
from rollax.experiments.benchmarks.timing import Row, duel, publish
from rollax.experiments.harness import devices
from rollax.experiments.harness.checkpoint import Checkpoints
from rollax.experiments.harness.command_line import one_line_end, parse
from rollax.experiments.harness.loop import compiled, run, vectorize
from rollax.experiments.harness.run_folder import RunFolder


@dataclass(frozen=True)
class Config:
    """The benchmark."""

    megabytes: int = 200
    """Size of the state, in float32 arrays of a megabyte each."""
    repeats: int = 7
    """Interleaved repeats of saving and of restoring."""
    runs: int = 3
    """Interleaved repeats of training."""
    updates: int = 120
    """Of a run."""
    seeds: int = 16
    """Of a run."""
    save_every: float = 2.0
    """Seconds between the checkpoints of a run, at least; the default of a study is 60."""
    out: str = ""
    """The JSON file; empty for runs/benchmarks/checkpoints.json."""

    def check(self) -> None:
        """Raises ValueError for values that cannot work, before anything is computed."""
        for field in ("megabytes", "repeats", "runs", "updates", "seeds"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}: expected at least 1, got {getattr(self, field)}")


def save_and_restore(config: Config) -> list[Row]:
    import orbax.checkpoint as ocp

    root = Path(tempfile.mkdtemp())
    rng = np.random.default_rng(0)
    state = {f"{i:05d}": jax.numpy.asarray(rng.normal(size=2**18), np.float32) for i in range(config.megabytes)}
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    ours = Checkpoints(root / "ours", 0.0)
    bare = ocp.CheckpointManager(root / "bare", options=ocp.CheckpointManagerOptions(max_to_keep=2))
    count = iter(range(10**6))

    def save_ours() -> float:
        begun = time.perf_counter()
        ours.save(next(count), state)
        ours.wait()
        return time.perf_counter() - begun

    def save_bare() -> float:
        begun = time.perf_counter()
        bare.save(next(count), args=ocp.args.StandardSave(state))
        bare.wait_until_finished()
        return time.perf_counter() - begun

    def restore_ours() -> float:
        begun = time.perf_counter()
        jax.block_until_ready(ours.restore(target))
        return time.perf_counter() - begun

    def restore_bare() -> float:
        begun = time.perf_counter()
        jax.block_until_ready(bare.restore(bare.latest_step(), args=ocp.args.StandardRestore(target)))
        return time.perf_counter() - begun

    rows = [
        duel("save", "MB/s", config.megabytes, config.repeats, save_ours, save_bare),
        duel("restore", "MB/s", config.megabytes, config.repeats, restore_ours, restore_bare),
    ]
    ours.close()
    bare.close()
    shutil.rmtree(root)
    return rows


def share_of_a_run(config: Config) -> Row:
    """Seconds of training with checkpoints (ours) and with none before the end (peer)."""
    root = Path(tempfile.mkdtemp())
    study = ppo_cartpole.Config(
        runs=str(root), seeds=config.seeds, updates=config.updates, chunk=min(6, config.updates)
    )
    build = ppo_cartpole.build(study)
    program = vectorize(build.train, build.rows, range(config.seeds))
    executables = compiled(program, study)

    def train(save_every: float) -> float:
        options = replace(study, save_every=save_every, name=str(time.perf_counter_ns()))
        folder = RunFolder("ppo_cartpole", options, {"ppo": options})
        begun = time.perf_counter()
        run(program, "ppo", config.updates, folder, options, executables=executables)
        seconds = time.perf_counter() - begun
        folder.close()
        return seconds

    case = f"training, a checkpoint every {config.save_every:g} s at most"
    row = duel(case, "updates/s", config.updates, config.runs, lambda: train(config.save_every),
               lambda: train(float("inf")))  # fmt: skip
    shutil.rmtree(root)
    return row


@one_line_end()
def main(argv: list[str] | None = None) -> None:
    config = parse(Config(), __doc__, argv)
    devices.use_compilation_cache()
    rows = [*save_and_restore(config), share_of_a_run(config)]
    publish("checkpoints", rows, config, {"orbax-checkpoint": version()}, config.out)


def version() -> str:
    import orbax.checkpoint

    return orbax.checkpoint.__version__


if __name__ == "__main__":
    main()
