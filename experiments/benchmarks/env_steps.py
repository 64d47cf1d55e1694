"""Environment steps a second: our vectorised CartPole against gymnax's, auto-reset included.

    python experiments/benchmarks/env_steps.py

Both sides are one jitted scan over the same random actions and hand back what a learner stores: observation, reward,
terminated, truncated and the observation before a reset. Ours also carries the return and length of each episode.
The first run puts gymnax into `.cache/benchmarks/gymnax`, beside the jax that rollax itself runs.
"""

from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from rollax import envs
from rollax.experiments.benchmarks.peer import Peer, interpreter, serving
from rollax.experiments.benchmarks.timing import Row, compile_timed, duel, publish, seconds_of
from rollax.experiments.harness.command_line import one_line_end, parse

GYMNAX = Peer(
    "gymnax",
    ("gymnax",),
    ("gymnax==1.0.1", "gymnasium==1.3.0", "cloudpickle", "farama-notifications", "six", "seaborn", "pandas"),
)


@dataclass(frozen=True)
class Config:
    """The benchmark."""

    num_envs: tuple[int, ...] = (256, 1024, 4096)
    """Environments, one case each."""
    steps: int = 2**20
    """Environment steps of a repeat, over all environments."""
    repeats: int = 21
    """Interleaved repeats."""
    peer: bool = True
    """Measure gymnax too."""
    python: str = ""
    """Interpreter for gymnax; empty for this one."""
    out: str = ""
    """The JSON file; empty for runs/benchmarks/env_steps.json."""

    def check(self) -> None:
        """Raises ValueError for values that cannot work, before anything is computed."""
        if not self.num_envs or min(self.num_envs) < 1:
            raise ValueError(f"num_envs: expected numbers of at least 1, got {self.num_envs}")
        if self.steps < max(self.num_envs):
            raise ValueError(f"steps: expected at least one per environment, {max(self.num_envs)}, got {self.steps}")
        if self.repeats < 1:
            raise ValueError(f"repeats: expected at least 1, got {self.repeats}")


def random_actions(steps: int, num_envs: int) -> np.ndarray:
    """The same int32 `[T, N]` of 0 and 1 for both sides."""
    return np.random.default_rng(0).integers(0, 2, (steps, num_envs), np.int32)


def rollout(num_envs: int):
    """`run(state, actions) -> (state, what a learner stores)`, and the state to begin with."""
    vector = envs.vectorize(envs.cartpole(), num_envs)

    def run(state, actions):
        def body(state, action):
            state, step = vector.step(state, action)
            kept = (step.observation, step.reward, step.terminated, step.truncated, step.final_observation)
            return state, kept

        return jax.lax.scan(body, state, actions)

    return run, vector.reset(jax.random.key(0))[0]


def measure(num_envs: int, config: Config, ask) -> Row:
    """One case; `ask` is None without the peer."""
    steps = config.steps // num_envs
    run, state = rollout(num_envs)
    actions = jax.numpy.asarray(random_actions(steps, num_envs))
    compiled, compile_ours = compile_timed(run, state, actions)
    ended = compiled(state, actions)[1][2].mean()
    notes = {"share_of_steps_that_end": {"ours": float(ended)}}
    theirs = ask and ask("prepare", num_envs=num_envs, steps=steps)
    if theirs:
        notes["share_of_steps_that_end"]["peer"] = theirs["ended"]
    return duel(
        f"{num_envs} environments",
        "steps/s",
        steps * num_envs,
        config.repeats,
        lambda: seconds_of(compiled, state, actions),
        ask and (lambda: ask("run")),
        compile_ours=compile_ours,
        compile_peer=theirs and theirs["compile"],
        notes=notes,
    )


@one_line_end()
def main(argv: list[str] | None = None) -> None:
    config = parse(Config(), __doc__, argv)
    if not config.peer:
        publish("env_steps", [measure(n, config, None) for n in config.num_envs], config, {}, config.out)
        return
    python = interpreter(GYMNAX, config.python)
    with serving(python, Path(__file__).with_name("env_steps_peer.py")) as ask:
        rows = [measure(n, config, ask) for n in config.num_envs]
        publish("env_steps", rows, config, ask("versions"), config.out)


if __name__ == "__main__":
    main()
