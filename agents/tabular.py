"""A policy that is a table of logits, one row per (prompt, position): the exact test of an objective.

Contexts share no parameters: what an objective does to one probability it does to nothing else. The table speaks the
language-model protocol (`agents.language_model`), so generation, rollout and training do not know the difference.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rollax.agents.language_model import LanguageModel


class TabularCache(NamedTuple):
    """The prompt index of each row, int32 `[B]`: all that a table needs to remember."""

    prompt: jax.Array


def tabular(logits: jax.Array) -> LanguageModel:
    """A language model whose next-token logits are `logits[prompt, position]`.

    Args:
      logits: initial table `[P, T, V]`: P prompts, T positions, V action tokens. Token ids V .. V + P - 1 are the
        prompt tokens; an episode is one prompt token at position 0, then T action tokens.
    """
    if logits.ndim != 3:
        raise ValueError(f"logits: expected a table [P, T, V], got shape {logits.shape}")
    num_prompts, horizon, vocab_size = logits.shape

    def apply(params, tokens, positions, cache=None):
        seen = cache.prompt[:, None] if cache is not None else jnp.full((tokens.shape[0], 1), -1, jnp.int32)
        named = jnp.where((tokens >= vocab_size) & (positions >= 0), tokens - vocab_size, -1)
        # The prompt of a slot is the last prompt token at or before it.
        prompt = jax.lax.cummax(jnp.concatenate([seen, named], axis=1), axis=1)[:, 1:]
        rows = params["logits"][jnp.clip(prompt, 0, num_prompts - 1), jnp.clip(positions, 0, horizon - 1)]
        return rows, None if cache is None else TabularCache(prompt[:, -1])

    def init_cache(batch, slots, dtype=None):
        del slots, dtype
        return TabularCache(jnp.full(batch, -1, jnp.int32))

    return LanguageModel(
        init=lambda key: {"logits": jnp.asarray(logits, jnp.float32)},
        apply=apply,
        init_cache=init_cache,
        hidden=None,
        head=None,
        axes={"logits": (None, None, None)},
        vocab_size=vocab_size,
    )
