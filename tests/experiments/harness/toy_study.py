"""A study that takes no time: a noisy random walk to a target. Tests of the harness run it, also as a script."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rollax.experiments.harness.claims import Claim
from rollax.experiments.harness.command_line import Options, parse
from rollax.experiments.harness.figures import Panel
from rollax.experiments.harness.loop import Results, Train, final, gap
from rollax.experiments.harness.report import Episode, Table
from rollax.experiments.harness.study import Build, Study, main


@dataclass(frozen=True)
class Config(Options):
    """The study."""

    seeds: int = 4
    """Seeds."""
    seed: int = 0
    """The first seed."""
    updates: int = 12
    """Steps."""
    chunk: int = 2
    """Steps of a chunk."""
    width: int = 3
    """Static: dimensions of the walk."""
    lr: float = 0.1
    """Traced: step to the target."""
    noise: float = 0.1
    """Traced: of a step."""
    fail_at: float = -1.0
    """An error for this lr."""

    def check(self) -> None:
        super().check()
        if not self.lr >= 0:
            raise ValueError(f"lr: expected at least 0, got {self.lr}")


class Numbers(NamedTuple):
    lr: float
    noise: float


class State(NamedTuple):
    place: jax.Array
    key: jax.Array
    step: jax.Array


def build(config: Config) -> Build:
    if config.lr == config.fail_at:
        raise ValueError(f"fail_at: told to fail for lr={config.lr}")

    def init(key):
        return State(jax.random.normal(key, (config.width,)), key, jnp.int32(0))

    def update(state, numbers):
        key = jax.random.fold_in(state.key, state.step)
        noise = numbers.noise * jax.random.normal(key, state.place.shape)
        place = state.place - numbers.lr * state.place + noise
        reward = -jnp.sum(place**2)
        metrics = {"reward": reward, "tokens": jnp.int32(config.width), "place": place}
        return State(place, state.key, state.step + 1), metrics

    def advance(state, numbers):
        return jax.lax.scan(lambda s, _: update(s, numbers), state, length=config.chunk)

    def evaluate(state, numbers):
        return {"reward": -jnp.sum(state.place**2)}

    def episodes(state_of) -> Sequence[Episode]:
        return [Episode("where it ended", [str(np.asarray(state_of("plain").place))], 0.0)]

    rows = {"plain": Numbers(config.lr, config.noise), "lazy": Numbers(config.lr / 2, config.noise)}
    return Build(Train(init, advance, evaluate), rows, episodes)


def panels(results: Results) -> list[Panel]:
    curves = {row: values["reward"] for row, values in results.held_out.items()}
    return [Panel("reward", results.evaluated_at, curves)]


STUDY = Study(
    name="toy_study",
    title="A walk to a target",
    configs=lambda argv: {"toy": parse(Config(), __doc__, argv)},
    build=build,
    claims=[Claim("T1", "Larger steps end nearer", gap("plain", "lazy", final), needs=("plain", "lazy"))],
    columns={"reward": final},
    panels=panels,
    traced=Numbers._fields,
    smoke=("--updates", "4"),
    tables=lambda results: {"places & rows": Table(["row"], [[row] for row in results.train])},
)

if __name__ == "__main__":
    main(STUDY)
