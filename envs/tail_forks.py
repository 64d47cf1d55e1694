"""Tail forks: at every position a common token earns a little and one rare token earns much.

A procedural task for the question of BandPO (arXiv 2603.04918): does a ratio bound let a policy raise tokens that it
almost never samples? Small enough for a tabular policy, whose expected reward is exact.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rollax.envs.environment import Environment, Tokens, TokenSpec
from rollax.envs.tokens import question_answer

COMMON_WEIGHT, GOOD_WEIGHT = 0.35, 1.0


class ForkTables(NamedTuple):
    """The two tokens that count, `common` and `good`: int32 NumPy `[P, T]`, different at every (prompt, position)."""

    common: np.ndarray
    good: np.ndarray


class TailForksState(NamedTuple):
    """`prompt` int32 `[]`, which of the P prompt types."""

    prompt: jax.Array


def tail_forks(
    num_prompts: int = 8,
    horizon: int = 6,
    vocab_size: int = 32,
    good_prob: float | jax.Array = 0.03,
    common_prob: float | jax.Array = 0.6,
    seed: int = 0,
) -> Environment:
    """Write `horizon` tokens; success is a coin with probability 0.35 * share of common + 1.0 * share of good tokens.

    The ids 0 .. V-1 are action tokens, V .. V+P-1 the prompt tokens (so the vocabulary has V+P). An observation is the
    single prompt token. There is no stop id: every turn has exactly `horizon` tokens.

    Args:
      num_prompts: P.
      horizon: T.
      vocab_size: V, at least 3.
      good_prob, common_prob: the initial law that `demonstrate` draws from (see `initial_logits`); may be traced.
        They do not touch the rewards.
      seed: of the tables, concrete.

    Returns:
      The environment. Reward 1 or 0, drawn with the step's key. Info, float32: `success_prob`, `share_good`,
      `share_common`. The expert writes the good tokens; `demonstrate` draws a turn from the initial law, for a
      supervised start of a transformer.

    Raises:
      ValueError: as `fork_tables` and `initial_logits`.
    """
    tables = fork_tables(num_prompts, horizon, vocab_size, seed)
    logits = initial_logits(num_prompts, horizon, vocab_size, good_prob, common_prob, seed)
    common, good = jnp.asarray(tables.common), jnp.asarray(tables.good)
    spec = TokenSpec(
        vocab=(*(f"<a{i}>" for i in range(vocab_size)), *(f"<p{i}>" for i in range(num_prompts))),
        max_observation=1,
        max_action=horizon,
        max_turns=1,
        stop_ids=(),
        pad_id=0,
    )

    def draw(key):
        return TailForksState(jax.random.randint(key, (), 0, num_prompts, jnp.int32))

    def prompt(state):
        return Tokens((vocab_size + state.prompt)[None], jnp.int32(1))

    def grade(key, state, action):
        num_common = (action == common[state.prompt]).sum().astype(jnp.float32)
        num_good = (action == good[state.prompt]).sum().astype(jnp.float32)
        success_prob = jnp.clip((COMMON_WEIGHT * num_common + GOOD_WEIGHT * num_good) / horizon, 0.0, 1.0)
        reward = jax.random.bernoulli(key, success_prob).astype(jnp.float32)
        info = {
            "success_prob": success_prob,
            "share_good": num_good / horizon,
            "share_common": num_common / horizon,
        }
        return reward, info

    def expert(key, state):
        del key
        return good[state.prompt]

    def demonstrate(key, state):
        return jax.random.categorical(key, logits[state.prompt]).astype(jnp.int32)

    def render(state):
        i = int(state.prompt)
        rows = ["  ".join(f"{x:>3}" for x in row) for row in (tables.common[i], tables.good[i])]
        return f"prompt {i}\n  common {rows[0]}\n  good   {rows[1]}"

    return question_answer(draw, prompt, grade, spec, render=render, expert=expert, demonstrate=demonstrate)


def fork_tables(num_prompts: int = 8, horizon: int = 6, vocab_size: int = 32, seed: int = 0) -> ForkTables:
    """The common and the good token of every (prompt, position), two different uniform draws from V.

    Raises:
      ValueError: a size below 1, or a vocabulary below 3.
    """
    if num_prompts < 1 or horizon < 1 or vocab_size < 3:
        raise ValueError(
            f"num_prompts and horizon must be >= 1 and vocab_size >= 3, got {num_prompts}, {horizon} and {vocab_size}"
        )
    rng = np.random.default_rng(seed)
    common = rng.integers(vocab_size, size=(num_prompts, horizon))
    good = (common + rng.integers(1, vocab_size, size=(num_prompts, horizon))) % vocab_size
    return ForkTables(common.astype(np.int32), good.astype(np.int32))


def initial_logits(
    num_prompts: int = 8,
    horizon: int = 6,
    vocab_size: int = 32,
    good_prob: float | jax.Array = 0.03,
    common_prob: float | jax.Array = 0.6,
    seed: int = 0,
) -> jax.Array:
    """Log-probabilities `[P, T, V]` of the initial law: the common token, the rare good one, the rest uniform.

    Args:
      good_prob, common_prob: positive and together below 1; may be traced (then they are not checked).

    Raises:
      ValueError: concrete probabilities out of range, or bad sizes.
    """
    tables = fork_tables(num_prompts, horizon, vocab_size, seed)
    if not isinstance(good_prob, jax.core.Tracer) and not isinstance(common_prob, jax.core.Tracer):
        good, common = float(good_prob), float(common_prob)
        if not (good > 0 and common > 0 and good + common < 1):
            raise ValueError(
                f"good_prob and common_prob must be positive and sum to less than 1, got {good} and {common}"
            )
    tokens = jnp.arange(vocab_size)
    rest = (1.0 - good_prob - common_prob) / (vocab_size - 2)
    is_common, is_good = (table[..., None] == tokens for table in tables)
    return jnp.log(jnp.where(is_common, common_prob, jnp.where(is_good, good_prob, rest)).astype(jnp.float32))


def expected_success(logits: jax.Array, tables: ForkTables) -> jax.Array:
    """Exact expected reward of a policy that draws each position independently, float32 `[P]`.

    A token is common or good, never both, so the weighted share is at most 1, the clip is never active, and the
    expectation is linear: the mean over positions of 0.35 * P(common) + P(good).

    Args:
      logits: unnormalised log-probabilities `[P, T, >= V]`.
      tables: of the environment, `[P, T]`.

    Raises:
      ValueError: if the shapes disagree.
    """
    if logits.ndim != 3 or logits.shape[:2] != tables.common.shape:
        raise ValueError(f"logits must have the shape {(*tables.common.shape, 'V')}, got {logits.shape}")
    probs = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    common, good = (jnp.take_along_axis(probs, table[..., None], axis=-1)[..., 0] for table in tables)
    return (COMMON_WEIGHT * common + GOOD_WEIGHT * good).mean(-1)
