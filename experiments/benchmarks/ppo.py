"""Whole PPO runs against rejax on CartPole at equal hyper-parameters: compile time, run time, return over the seeds.

    python experiments/benchmarks/ppo.py

All seeds are one jitted vmap from initialisation to the last update, on both sides; the policies are then evaluated
alike, greedily over one episode of each environment. What is not equal: rejax clips gradients by element, keeps two
optimisers, clips the value loss, normalises advantages per mini-batch and treats a time limit as an end.
The first run puts rejax and the gymnax that it needs into `.cache/benchmarks/rejax`, beside our own jax.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from rollax.experiments import ppo_cartpole
from rollax.experiments.benchmarks.peer import Peer, interpreter, serving
from rollax.experiments.benchmarks.timing import Row, compile_timed, duel, publish, seconds_of
from rollax.experiments.harness.command_line import one_line_end, parse

REJAX = Peer(
    "rejax",
    ("rejax",),
    (
        *("rejax==0.1.3", "gymnax==0.0.9", "distrax==0.1.8", "tfp-nightly", "dm-tree", "decorator", "gast"),
        *("gymnasium==1.3.0", "cloudpickle", "farama-notifications", "six", "seaborn", "pandas"),
    ),
)
COMPILES = 3  # the least of three, on both sides
# What both sides are told; `ppo_cartpole.Config` documents it.
SHARED = ("updates", "num_envs", "steps", "passes", "mini_batches", "width")
SHARED += ("lr", "clip", "discount", "lam", "entropy", "value")


@dataclass(frozen=True)
class Config:
    """The benchmark."""

    seeds: int = 10
    """Seeds in one vmap."""
    updates: int = 240
    """Updates of a run; the other hyper-parameters are the defaults of `ppo_cartpole.py`."""
    repeats: int = 5
    """Interleaved repeats of the whole training."""
    peer: bool = True
    """Measure rejax too."""
    python: str = ""
    """Interpreter for rejax; empty for this one."""
    out: str = ""
    """The JSON file; empty for runs/benchmarks/ppo.json."""

    def check(self) -> None:
        """Raises ValueError for values that cannot work, before anything is computed."""
        for field in ("seeds", "updates", "repeats"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}: expected at least 1, got {getattr(self, field)}")


def seed_keys(seeds: int) -> jax.Array:
    return jax.vmap(jax.random.key)(jnp.arange(seeds))


def measure(config: Config, study: ppo_cartpole.Config, ask) -> Row:
    """The one case; `ask` is None without the peer."""
    train = ppo_cartpole.make_train(dataclasses.replace(study, chunk=study.updates))
    numbers = ppo_cartpole.Numbers(*(float(getattr(study, field)) for field in ppo_cartpole.Numbers._fields))
    keys = seed_keys(config.seeds)
    whole = jax.vmap(lambda key: train.advance(train.init(key), numbers)[0])
    compiled, compile_ours = compile_timed(whole, keys, repeats=COMPILES)
    returns = jax.jit(jax.vmap(lambda state: train.evaluate(state, numbers)["reward"]))(compiled(keys))
    notes = {"return_of_each_seed": {"ours": np.asarray(returns).tolist()}}
    theirs = ask and ask("prepare", seeds=config.seeds, **{field: getattr(study, field) for field in SHARED})
    if theirs:
        notes["return_of_each_seed"]["peer"] = theirs["returns"]
    return duel(
        f"{config.seeds} seeds x {study.updates} updates",
        "env steps/s",
        config.seeds * study.updates * study.num_envs * study.steps,
        config.repeats,
        lambda: seconds_of(compiled, keys),
        ask and (lambda: ask("run")),
        warm_up=False,  # both sides have trained once for their returns
        compile_ours=compile_ours,
        compile_peer=theirs and theirs["compile"],
        notes=notes,
    )


@one_line_end()
def main(argv: list[str] | None = None) -> None:
    config = parse(Config(), __doc__, argv)
    study = ppo_cartpole.Config(seeds=config.seeds, updates=config.updates)
    if not config.peer:
        publish("ppo", [measure(config, study, None)], config, {}, config.out)
        return
    python = interpreter(REJAX, config.python)
    with serving(python, Path(__file__).with_name("ppo_peer.py")) as ask:
        row = measure(config, study, ask)
        for side, returns in row.notes["return_of_each_seed"].items():
            print(f"greedy return of {side}: {np.mean(returns):.1f} of 500 (worst seed {np.min(returns):.1f})")
        publish("ppo", [row], config, ask("versions"), config.out)


if __name__ == "__main__":
    main()
