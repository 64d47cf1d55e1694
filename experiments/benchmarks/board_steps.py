"""Steps a second of the board games: our Sokoban and Minesweeper against jumanji's, auto-reset included.

    python experiments/benchmarks/board_steps.py

Both sides play ten by ten cells with four boxes or ten mines, the same random valid actions (a direction, a cell) and,
in Sokoban, levels from the same bank. Each is one jitted scan that hands back what a learner stores: observation,
reward, end of the episode and the observation before a reset. Ours also keep the subtasks, in Minesweeper with a proof
whether the cell was safe, and open whole areas where jumanji opens one cell; jumanji's ends at a cell that is open
already. The first run puts jumanji into `.cache/benchmarks/jumanji`, beside the jax that rollax itself runs.
"""

from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from rollax import envs
from rollax.envs.minesweeper import ACT as FIRST_CELL
from rollax.envs.sokoban import ACT as FIRST_MOVE
from rollax.envs.sokoban import LEVELS
from rollax.experiments.benchmarks.peer import Peer, interpreter, serving
from rollax.experiments.benchmarks.timing import Row, compile_timed, duel, publish, seconds_of
from rollax.experiments.harness.command_line import one_line_end, parse

JUMANJI = Peer(
    "jumanji",
    ("jumanji",),
    (
        "jumanji==1.1.2",
        "chex==0.1.92",
        "dm-env==1.6",
        "dm-tree==0.1.10",
        "esquilax==2.1.0",
        "gymnasium==1.4.0",
        "huggingface-hub==2.4.0",
        "jax-tqdm==0.4.0",
        "absl-py",
        "attrs",
        "cloudpickle",
        "farama-notifications",
        "httpcore2",
        "httpx2",
        "requests",
        "toolz",
        "tqdm",
        "wrapt",
    ),
)
GAMES = ("sokoban", "minesweeper")
SIDE, MINES, HORIZON = 10, 10, 120


@dataclass(frozen=True)
class Config:
    """The benchmark."""

    games: tuple[str, ...] = GAMES
    """Which games."""
    num_envs: tuple[int, ...] = (256, 1024, 4096)
    """Environments, one case each."""
    steps: int = 2**17
    """Environment steps of a repeat, over all environments."""
    levels: int = 512
    """Levels in the bank of Sokoban."""
    block: int = 256
    """Of our environments, so many play all their steps before others do: their boards stay in a core's cache."""
    repeats: int = 21
    """Interleaved repeats."""
    peer: bool = True
    """Measure jumanji too."""
    python: str = ""
    """Interpreter for jumanji; empty for this one."""
    out: str = ""
    """The JSON file; empty for runs/benchmarks/board_steps.json."""

    def check(self) -> None:
        """Raises ValueError for values that cannot work, before anything is computed."""
        if not self.games or set(self.games) - set(GAMES):
            raise ValueError(f"games: expected some of {GAMES}, got {self.games}")
        if not self.num_envs or min(self.num_envs) < 1:
            raise ValueError(f"num_envs: expected numbers of at least 1, got {self.num_envs}")
        if self.steps < max(self.num_envs):
            raise ValueError(f"steps: expected at least one per environment, {max(self.num_envs)}, got {self.steps}")
        if self.levels < 1:
            raise ValueError(f"levels: expected at least 1, got {self.levels}")
        if self.block < 1:
            raise ValueError(f"block: expected at least 1, got {self.block}")
        if self.repeats < 1:
            raise ValueError(f"repeats: expected at least 1, got {self.repeats}")


def random_actions(game: str, steps: int, num_envs: int) -> np.ndarray:
    """The same int32 `[T, N]` for both sides: directions 0 to 3, or cells row by row."""
    limit = 4 if game == "sokoban" else SIDE * SIDE
    return np.random.default_rng(0).integers(0, limit, (steps, num_envs), np.int32)


def bank(levels: int) -> envs.SokobanLevel:
    """Levels for both sides."""
    draw = jax.vmap(lambda key: envs.sokoban_level(key, **LEVELS["hard"]))
    return jax.jit(draw)(jax.random.split(jax.random.key(0), levels))


def rollout(game: str, num_envs: int, levels: int, block: int):
    """`run(state, actions) -> (state, what a learner stores)`, in blocks where they divide, and the first state."""
    if game == "sokoban":
        environment, first = envs.sokoban(levels=bank(levels), horizon=HORIZON), FIRST_MOVE
    else:
        environment, first = envs.minesweeper(SIDE, SIDE, MINES, horizon=SIDE * SIDE), FIRST_CELL
    size = block if num_envs % block == 0 else num_envs
    vector = envs.vectorize(environment, size)

    def of_block(state, actions):
        def body(state, action):
            state, step = vector.step(state, first + action[:, None])
            return state, (step.observation, step.reward, step.done, step.final_observation)

        return jax.lax.scan(body, state, actions)

    def run(state, actions):
        blocks = actions.reshape(len(actions), -1, size).swapaxes(0, 1)
        return jax.lax.map(lambda block: of_block(*block), (state, blocks))

    keys = jax.random.split(jax.random.key(0), num_envs // size)
    return run, jax.jit(jax.vmap(lambda key: vector.reset(key)[0]))(keys)


def measure(game: str, num_envs: int, config: Config, ask) -> Row:
    """One case; `ask` is None without the peer."""
    steps = config.steps // num_envs
    run, state = rollout(game, num_envs, config.levels, config.block)
    actions = jax.numpy.asarray(random_actions(game, steps, num_envs))
    compiled, compile_ours = compile_timed(run, state, actions)
    notes = {"share_of_steps_that_end": {"ours": float(compiled(state, actions)[1][2].mean())}}
    theirs = ask and ask("prepare", game=game, num_envs=num_envs, steps=steps, levels=config.levels)
    if theirs:
        notes["share_of_steps_that_end"]["peer"] = theirs["ended"]
    return duel(
        f"{game}, {num_envs} environments",
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
    cases = [(game, num_envs) for game in config.games for num_envs in config.num_envs]
    if not config.peer:
        publish("board_steps", [measure(*case, config, None) for case in cases], config, {}, config.out)
        return
    python = interpreter(JUMANJI, config.python)
    with serving(python, Path(__file__).with_name("board_steps_peer.py")) as ask:
        rows = [measure(*case, config, ask) for case in cases]
        publish("board_steps", rows, config, ask("versions"), config.out)


if __name__ == "__main__":
    main()
