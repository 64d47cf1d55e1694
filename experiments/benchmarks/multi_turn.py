"""A multi-turn rollout inside one program against the same policy and a plain-Python environment, turn by turn.

    python -m rollax.experiments.benchmarks.multi_turn
    python -m rollax.experiments.benchmarks.multi_turn --environments 64 --turns 4

Sessions of `envs.persona_chat` with the small transformer: every turn reads 10 tokens and writes up to 12. Two peers
have the policy of `agents.rollout` by `agents.host_rollout`, compiled, with its cache and the same keys, and play the
same episodes to the last token: one steps all environments between two calls for the whole batch, the other plays one
episode after the other, as an agent that is served request by request does.
"""

import dataclasses

import jax
import numpy as np

from rollax.agents import Trajectory, TransformerConfig, host_sampler, rollout, transformer
from rollax.envs import Environment, HostEnvironment, Step, Tokens, persona_chat
from rollax.envs.persona_chat import (
    ASSIST,
    BOLD,
    BOS,
    CONTEXT,
    DETAIL,
    ENOUGH_DETAIL,
    EOS,
    HINT,
    NUM_FEEDBACK,
    PAD,
    PERSONA,
    REDO,
    WARM,
    ZERO,
)
from rollax.experiments.benchmarks.timing import compile_timed, duel, publish, seconds_of
from rollax.experiments.harness.command_line import one_line_end, parse


@dataclasses.dataclass(frozen=True)
class Config:
    """The benchmark."""

    environments: int = 512
    """Sessions."""
    turns: int = 8
    """Of a session."""
    width: int = 48
    """Of the transformer of two layers, that of the study openclaw_rl."""
    stages: int = 3
    """How often our cache grows after the first turn; the peers' grows once."""
    alone: int = 8
    """Episodes of the peer that plays one after the other; its time is scaled to all."""
    repeats: int = 5
    """Of each side, interleaved."""
    out: str = ""
    """JSON file; runs/benchmarks/multi_turn.json when empty."""

    def check(self) -> None:
        for field in ("environments", "turns", "width", "stages", "alone", "repeats"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}: expected at least 1, got {getattr(self, field)}")
        if self.alone > self.environments:
            raise ValueError(f"alone: expected at most environments={self.environments}, got {self.alone}")


class PlainSession:
    """`envs.persona_chat` with p_dir 1, in plain Python."""

    def __init__(self, persona: int, digits: list[int], turns: int):
        self.persona, self.digits, self.turns = persona, digits, turns
        self.feedback, self.turn, self.done = [PAD] * NUM_FEEDBACK, 0, False

    def context(self) -> list[int]:
        return [BOS, PERSONA + self.persona, *(ZERO + d for d in self.digits), *self.feedback, ASSIST]

    def step(self, reply: list[int]) -> tuple[list[int], float, bool]:
        """(the next context, reward, the session is over)."""
        stopped = EOS in reply
        said = reply[: reply.index(EOS)] if stopped else reply
        style = (BOLD not in said, said.count(DETAIL) >= ENOUGH_DETAIL, WARM in said)[self.persona]
        pleased = style and stopped and self.answers(said)
        words = [REDO, PAD if style else HINT + self.persona]
        self.feedback = words + [PAD] * (NUM_FEEDBACK - 2)
        self.turn += 1
        self.done = pleased or self.turn >= self.turns
        return self.context(), float(pleased), self.done

    def answers(self, said: list[int]) -> bool:
        """The reversed digits in one piece, and no other digit."""
        answer = [ZERO + d for d in reversed(self.digits)]
        covered = [False] * len(said)
        for i in range(len(said) - len(answer) + 1):
            if said[i : i + len(answer)] == answer:
                covered[i : i + len(answer)] = [True] * len(answer)
        digits = [ZERO <= token < ZERO + 10 for token in said]
        return any(covered) and all(covered[i] for i, digit in enumerate(digits) if digit)


def plain_sessions(env: Environment) -> HostEnvironment:
    """N plain sessions on the host; `env` draws the persona and the digits of each."""
    spec, draw = env.spec, jax.jit(jax.vmap(env.reset))

    def reset(keys):
        drawn, observation = jax.device_get(draw(keys))
        sessions = [
            PlainSession(int(persona), digits.tolist(), spec.max_turns)
            for persona, digits in zip(drawn.persona, drawn.digits, strict=True)
        ]
        return sessions, observation

    def step(keys, sessions, action, alive):
        del keys
        N = len(sessions)
        ids, length = np.full((N, CONTEXT), PAD, np.int32), np.zeros(N, np.int32)
        reward, done = np.zeros(N, np.float32), np.zeros(N, bool)
        for i in np.flatnonzero(alive):
            seen, reward[i], done[i] = sessions[i].step(action[i].tolist())
            if not done[i]:
                ids[i], length[i] = seen, CONTEXT
        pleased = reward > 0
        return sessions, Step(Tokens(ids, length), reward, pleased, done & ~pleased, {})

    return HostEnvironment(reset, step, spec)


def same_episodes(ours: Trajectory, theirs: Trajectory) -> None:
    """Raises RuntimeError where two trajectories differ in a token that counts, a mask, a reward or an end."""
    for name in ("positions", "mask", "reward", "terminated", "truncated", "tokens"):
        x, y = (np.asarray(getattr(side, name)) for side in (ours, theirs))
        if name == "tokens":
            x, y = (np.where(np.asarray(ours.positions) >= 0, side, PAD) for side in (x, y))
        if not np.array_equal(x, y):
            raise RuntimeError(f"{name}: the episodes of the two sides differ")


@one_line_end()
def main(argv: list[str] | None = None) -> None:
    config = parse(Config(), __doc__, argv)
    env = persona_chat(1.0, max_turns=config.turns)
    model = transformer(TransformerConfig(len(env.spec.vocab), config.width, num_layers=2, num_heads=4))
    params, key, N = model.init(jax.random.key(0)), jax.random.key(1), config.environments
    ours = lambda params, key: rollout(key, model, params, env, num_prompts=N, stages=config.stages)  # noqa: E731
    compiled, compile_ours = compile_timed(ours, params, key)
    batched, single = (host_sampler(model, plain_sessions(env), num_prompts=rows) for rows in (N, 1))
    wanted = jax.device_get(compiled(params, key))
    same_episodes(wanted, batched(key, params))
    for i in range(config.alone):
        same_episodes(jax.tree.map(lambda x: x[i : i + 1], wanted), single(key, params, i))  # noqa: B023
    print(f"identical episodes: {N} in a batch, {config.alone} one by one")
    work = N * config.turns

    def alone():
        return sum(seconds_of(single, key, params, i) for i in range(config.alone)) * N / config.alone

    cases = {
        "Python environments, one batched policy": lambda: seconds_of(batched, key, params),
        "one episode at a time": alone,
    }
    rows = [
        duel(
            f"{case}: {N} environments, {config.turns} turns",
            "turns/s",
            work,
            config.repeats,
            lambda: seconds_of(compiled, params, key),
            peer,
            compile_ours=compile_ours,
        )
        for case, peer in cases.items()
    ]
    publish("multi_turn", rows, config, {"plain Python": "turn by turn"}, config.out)


if __name__ == "__main__":
    main()
