"""Objectives against rlax and tunix, wherever they define the same function: value, or value and gradient, jitted.

    python experiments/benchmarks/objectives.py
    python experiments/benchmarks/objectives.py --peers rlax

Both sides get the same arrays and must give the same numbers, or the command fails. The first run puts each peer into
`.cache/benchmarks/`, beside the jax that rollax itself runs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rollax import objectives
from rollax.experiments.benchmarks.peer import Peer, interpreter, serving
from rollax.experiments.benchmarks.timing import Row, compile_timed, duel, publish, seconds_of
from rollax.experiments.harness.command_line import one_line_end, parse

PEERS = {
    "rlax": Peer(
        "rlax",
        ("rlax",),
        (
            "rlax==0.1.9",
            "distrax==0.1.8",
            "tfp-nightly",
            "dm-env",
            "dm-tree",
            "decorator",
            "gast",
            "six",
            "cloudpickle",
        ),
    ),
    "tunix": Peer("tunix", ("tunix",), ("google-tunix==0.1.7",), dependencies=True),
}
DISCOUNT, LAM, EPSILON = 0.99, 0.95, 0.2


@dataclass(frozen=True)
class Config:
    """The benchmark."""

    peers: tuple[str, ...] = ("rlax", "tunix")
    """Which peers to measure; none measures ours alone."""
    rows: int = 512
    """Sequences of a batch; groups are of sixteen."""
    tokens: int = 1024
    """Tokens of a sequence, or steps of an environment."""
    calls: int = 10
    """Calls in one repeat."""
    repeats: int = 15
    """Interleaved repeats."""
    python: str = ""
    """Interpreter for the peers; empty for this one."""
    out: str = ""
    """The JSON file; empty for runs/benchmarks/objectives.json."""

    def check(self) -> None:
        """Raises ValueError for values that cannot work, before anything is computed."""
        if unknown := set(self.peers) - set(PEERS):
            raise ValueError(f"peers: expected some of {', '.join(PEERS)}, got {', '.join(sorted(unknown))}")
        if self.rows < 16 or self.rows % 16:
            raise ValueError(f"rows: expected a multiple of 16, got {self.rows}")
        for field in ("tokens", "calls", "repeats"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}: expected at least 1, got {getattr(self, field)}")


class Case(NamedTuple):
    """One function that a peer defines too.

    Attributes:
      peer: which.
      inputs: names of the arrays of `arrays` that it takes, in order.
      ours: our side, of those arrays.
      grad: measure value and gradient with respect to the first of them; `ours` is then a scalar.
    """

    peer: str
    inputs: tuple[str, ...]
    ours: Callable[..., Any]
    grad: bool = False


def arrays(rows: int, tokens: int) -> dict[str, np.ndarray]:
    """A batch, the same on both sides: `[B, T]`, time-major `[T, B]`, and one reward a sequence `[B]`."""
    rng = np.random.default_rng(0)
    log_prob = -rng.exponential(1.0, (rows, tokens)).astype(np.float32)
    length = rng.integers(1, tokens + 1, rows)
    reward, value = rng.normal(size=(2, rows, tokens)).astype(np.float32)
    last_value = rng.normal(size=(1, rows)).astype(np.float32)
    ends = rng.random((tokens, rows)) < 0.02
    return {
        "log_prob": log_prob,
        "old_log_prob": log_prob + 0.2 * rng.normal(size=log_prob.shape).astype(np.float32),
        "log_ratio": 0.2 * rng.normal(size=log_prob.shape).astype(np.float32),
        "advantage": rng.normal(size=log_prob.shape).astype(np.float32),
        "reward": reward,
        "value": value,
        "mask": (np.arange(tokens) < length[:, None]).astype(np.int32),  # as tunix makes its masks
        "ones": np.ones((rows, tokens), np.float32),
        "time_reward": np.ascontiguousarray(reward.T),
        "time_values": np.concatenate([value.T, last_value]),
        "ends": ends,
        "score": rng.normal(size=rows).astype(np.float32),
    }


def gae_time_major(reward, values, ends):
    """Every end a termination, so that the next value is the shifted one."""
    return objectives.gae_time_major(reward, values[:-1], values[1:], ends, jnp.zeros_like(ends), DISCOUNT, LAM)[0]


def clipped_surrogate(log_ratio, advantage):
    return objectives.clipped_surrogate(log_ratio, advantage, *objectives.clip_bounds(EPSILON)).mean()


def gae_whitened(reward, value, mask):
    advantage, target = objectives.gae(reward, value, mask, DISCOUNT, LAM)
    return objectives.whiten(advantage, mask), target


def group_advantages(name):
    """Group ids are constants of the program, as in the studies."""
    return lambda score: objectives.ADVANTAGES[name](
        score, np.arange(score.shape[0]) // 16, num_groups=score.shape[0] // 16
    )


def k3_penalty(log_prob, ref_log_prob, mask):
    return objectives.aggregate(objectives.kl_estimate(log_prob, ref_log_prob, "k3"), mask, "token_mean")


def aggregated(mode):
    return lambda loss, mask: objectives.aggregate(loss, mask, mode)


CASES = {
    "GAE of environments": Case("rlax", ("time_reward", "time_values", "ends"), gae_time_major),
    "discounted returns": Case(
        "rlax", ("reward", "ones"), lambda reward, ones: objectives.discounted_returns(reward, ones, DISCOUNT)
    ),
    "clipped surrogate, gradient": Case("rlax", ("log_ratio", "advantage"), clipped_surrogate, grad=True),
    "GAE of tokens, whitened": Case("tunix", ("reward", "value", "mask"), gae_whitened),
    "GRPO advantages": Case("tunix", ("score",), group_advantages("grpo")),
    "Dr. GRPO advantages": Case("tunix", ("score",), group_advantages("dr_grpo")),
    "RLOO advantages": Case("tunix", ("score",), group_advantages("rloo")),
    "k3 penalty, gradient": Case("tunix", ("log_prob", "old_log_prob", "mask"), k3_penalty, grad=True),
    "token mean, gradient": Case("tunix", ("advantage", "mask"), aggregated("token_mean"), grad=True),
    "sequence mean of token means, gradient": Case(
        "tunix", ("advantage", "mask"), aggregated("seq_mean_token_mean"), grad=True
    ),
}


def prepare(function: Callable, grad: bool, inputs: list, calls: int) -> tuple[Callable[[], float], float, np.ndarray]:
    """(seconds of `calls` calls, seconds of compiling, all results of one call as one flat array)."""
    compiled, seconds = compile_timed(jax.value_and_grad(function) if grad else function, *inputs)

    def run():
        for _ in range(calls - 1):
            jax.block_until_ready(compiled(*inputs))
        return compiled(*inputs)

    results = np.concatenate([np.ravel(x) for x in jax.tree.leaves(compiled(*inputs))])
    return lambda: seconds_of(run), seconds, results


def measure(name: str, config: Config, ask) -> Row:
    """One case; `ask` is None without the peer."""
    case, batch = CASES[name], arrays(config.rows, config.tokens)
    inputs = [jnp.asarray(batch[key]) for key in case.inputs]
    ours, compile_ours, results = prepare(case.ours, case.grad, inputs, config.calls)
    theirs = ask and ask("prepare", name=name, rows=config.rows, tokens=config.tokens, calls=config.calls)
    if theirs:
        expected = np.load(theirs["results"])
        np.testing.assert_allclose(results, expected, rtol=2e-4, atol=2e-5 * np.abs(expected).max(), err_msg=name)
    return duel(
        f"{name} ({case.peer})",
        "calls/s",
        config.calls,
        config.repeats,
        ours,
        ask and (lambda: ask("run")),
        compile_ours=compile_ours,
        compile_peer=theirs and theirs["compile"],
    )


@one_line_end()
def main(argv: list[str] | None = None) -> None:
    config = parse(Config(), __doc__, argv)
    rows, versions = [], {}
    for peer in config.peers:
        python = interpreter(PEERS[peer], config.python)
        with serving(python, Path(__file__).with_name("objectives_peer.py")) as ask:
            rows += [measure(name, config, ask) for name, case in CASES.items() if case.peer == peer]
            versions |= ask("versions", peer=peer)
    rows = rows or [measure(name, config, None) for name in CASES]
    publish("objectives", rows, config, versions, config.out)


if __name__ == "__main__":
    main()
