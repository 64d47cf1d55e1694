"""A multi-turn rollout inside one program against the same policy and a plain-Python environment, turn by turn.

    python -m rollax.experiments.benchmarks.multi_turn
    python -m rollax.experiments.benchmarks.multi_turn --environments 64 --turns 4

Sessions of `envs.persona_chat` with the small transformer: every turn reads 10 tokens and writes up to 12. Two peers
have the policy of `agents.rollout`, compiled, with its cache and the same keys, and play the same episodes to the last
token: one steps all environments between two calls for the whole batch, the other plays one episode after the other, as
an agent that is served request by request does.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from rollax.agents import LanguageModel, TransformerConfig, language_policy, play, transformer
from rollax.envs import Tokens, persona_chat
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
    REPLY,
    WARM,
    ZERO,
)
from rollax.experiments.benchmarks.timing import compile_timed, duel, publish, seconds_of
from rollax.experiments.harness.command_line import parse


@dataclasses.dataclass(frozen=True)
class Config:
    """The benchmark."""

    environments: int = 512
    """Sessions."""
    turns: int = 8
    """Of a session."""
    width: int = 64
    """Of the transformer of two layers."""
    alone: int = 8
    """Episodes of the peer that plays one after the other; its time is scaled to all."""
    repeats: int = 5
    """Of each side, interleaved."""
    out: str = ""
    """JSON file; runs/benchmarks/multi_turn.json when empty."""

    def check(self) -> None:
        for field in ("environments", "turns", "width", "alone", "repeats"):
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


class TurnByTurn:
    """The compiled policy of `rollout`, asked between two steps of plain environments."""

    def __init__(self, model: LanguageModel, params, env, key: jax.Array, rows: np.ndarray):
        reset_key, sample_key, _ = jax.random.split(key, 3)
        fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
        self.sessions, self.first = jax.device_get(jax.jit(jax.vmap(env.reset))(fold(reset_key, rows)))
        self.keys, self.turns = fold(sample_key, rows), env.spec.max_turns
        policy = functools.partial(language_policy, model, spec=env.spec)
        self.begin = jax.jit(lambda observation: policy(params).begin(observation))
        self.see = jax.jit(lambda memory, observation, alive: policy(params).see(memory, observation, alive))

        def act(keys, turn, memory, alive):
            keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, turn)
            action, memory, _ = policy(params).act(keys, memory, alive)
            return action, memory

        self.act = jax.jit(act)

    def play(self) -> tuple[np.ndarray, np.ndarray]:
        """(actions `[N, K, A]`, padding after the end; rewards `[N, K]`)."""
        N = len(self.keys)
        sessions = [
            PlainSession(int(persona), [int(d) for d in digits], self.turns)
            for persona, digits in zip(self.sessions.persona, self.sessions.digits, strict=True)
        ]
        actions, rewards = np.full((N, self.turns, REPLY), PAD), np.zeros((N, self.turns), np.float32)
        alive = np.ones(N, bool)
        memory = self.begin(Tokens(*self.first))
        for turn in range(self.turns):
            action, memory = self.act(self.keys, turn, memory, alive)
            replies = np.asarray(action)
            ids, length = np.full((N, CONTEXT), PAD, np.int32), np.zeros(N, np.int32)
            for i in np.flatnonzero(alive):
                seen, rewards[i, turn], done = sessions[i].step(replies[i].tolist())
                actions[i, turn] = replies[i]
                alive[i] = not done
                if not done:
                    ids[i], length[i] = seen, CONTEXT
            if not alive.any():
                break
            if turn + 1 < self.turns:
                memory = self.see(memory, Tokens(ids, length), alive)
        return actions, rewards


def in_one_program(model: LanguageModel, params, env, key: jax.Array, environments: int):
    """The same episodes by `play`: (actions, rewards)."""
    spec = env.spec
    played = play(key, env, language_policy(model, params, spec), num_starts=environments, num_steps=spec.max_turns)
    actions = jnp.where(played.mask[..., None], played.record["tokens"][..., spec.max_observation :], spec.pad_id)
    return actions, played.reward


def main(argv: list[str] | None = None) -> None:
    config = parse(Config(), __doc__, argv)
    env = persona_chat(1.0, max_turns=config.turns)
    model = transformer(TransformerConfig(len(env.spec.vocab), config.width, num_layers=2, num_heads=4))
    params, key, N = model.init(jax.random.key(0)), jax.random.key(1), config.environments
    ours = lambda params, key: in_one_program(model, params, env, key, N)  # noqa: E731
    compiled, compile_ours = compile_timed(ours, params, key)
    batched = TurnByTurn(model, params, env, key, np.arange(N))
    single = [TurnByTurn(model, params, env, key, np.arange(i, i + 1)) for i in range(config.alone)]
    for other in single[1:]:  # one program for all
        other.begin, other.see, other.act = single[0].begin, single[0].see, single[0].act
    wanted = compiled(params, key)
    for got, rows in ((batched.play(), slice(None)), *((one.play(), slice(i, i + 1)) for i, one in enumerate(single))):
        for name, x, y in zip(("actions", "rewards"), got, wanted, strict=True):
            if not np.array_equal(x, np.asarray(y)[rows]):
                raise RuntimeError(f"{name}: the episodes of the two sides differ")
    print(f"identical episodes: {N} in a batch, {config.alone} one by one")
    work = N * config.turns
    alone = lambda: sum(seconds_of(one.play) for one in single) * N / config.alone  # noqa: E731
    cases = {
        "Python environments, one batched policy": lambda: seconds_of(batched.play),
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
