"""The environment protocol: a bundle of pure functions, all of them jit- and vmap-able.

Alphabet: `N` environments, `T` tokens of one observation, `A` tokens of one action (a turn). An episode that ends does
not reset itself: `envs.vector` does that. Terminated (the task ended) and truncated (time ran out) stay apart.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class Tokens(NamedTuple):
    """Token ids, right-padded: `ids` int32 `[T]`, of which the first `length` (int32 `[]`) count.

    In an observation they are what the environment adds to the conversation: the question at reset, its reaction
    after a turn, nothing (`length` 0) when a single-turn episode has ended.
    """

    ids: jax.Array
    length: jax.Array


class Step(NamedTuple):
    """What a transition hands back: rewards float32 `[]`, flags bool `[]`, `info` a dict of arrays (fixed keys)."""

    observation: Any
    reward: jax.Array
    terminated: jax.Array
    truncated: jax.Array
    info: dict[str, jax.Array]


class TokenSpec(NamedTuple):
    """Static facts of a token environment: an action is the ids `[max_action]` of one turn, cut at the first stop id.

    Attributes:
      vocab: the string of each token id, for people to read; its length is the vocabulary size.
      max_observation: T, the padded length of every observation.
      max_action: A, the most tokens of one turn.
      max_turns: turns after which an episode is over.
      stop_ids: ids that end a turn; empty where every turn has exactly `max_action` tokens.
      pad_id: filler behind the end; never counted, never inferred from ids.
    """

    vocab: tuple[str, ...]
    max_observation: int
    max_action: int
    max_turns: int
    stop_ids: tuple[int, ...]
    pad_id: int


class ControlSpec(NamedTuple):
    """Static facts of a classic control environment with float32 observations and discrete actions."""

    observation_shape: tuple[int, ...]
    num_actions: int
    max_steps: int


class Environment(NamedTuple):
    """`reset(key) -> (state, observation)`; `step(key, state, action) -> (state, Step)`.

    Attributes:
      spec: a `TokenSpec` or a `ControlSpec`.
      render: `render(state) -> str`, on the host, for people.
      expert: `expert(key, state) -> action`, optimal or scripted, jit- and vmap-able; None where none is known.
      demonstrate: `demonstrate(key, state) -> action`, a draw from the law that a supervised start imitates where
        that is not the expert's; else None.
    """

    reset: Callable
    step: Callable
    spec: TokenSpec | ControlSpec
    render: Callable[[Any], str] | None = None
    expert: Callable | None = None
    demonstrate: Callable | None = None
