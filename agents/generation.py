"""Sampling from a language model: prefill and decode in one program, with an explicit KV cache.

Every row has its own key, and a draw depends on that key and on the number of tokens sampled so far, on nothing else:
padding, the other rows and the sharding do not change what a row says. The log-probs are those of the training forward
to 1e-4 nats in float32; in bfloat16, where a cache rounds otherwise, they were up to 0.31 nats apart on SmolLM2-135M
(`pytest -s -m "" tests/agents/test_smollm2.py -k generation_and`).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rollax.agents.language_model import LanguageModel, features, logits_of, repeat_rows

EXCLUDED = -1e30  # a finite minus infinity: differences of excluded logits stay finite


class Sampling(NamedTuple):
    """How the next token is drawn; the numbers may be traced.

    Attributes:
      temperature: divides the logits; 0 takes the most likely token.
      top_k: keep the k most likely tokens; None keeps all, and saves the sort.
      top_p: then keep the smallest set of most likely tokens whose probability reaches p; None keeps all.
    """

    temperature: jax.Array | float = 1.0
    top_k: jax.Array | int | None = None
    top_p: jax.Array | float | None = None


class Generation(NamedTuple):
    """What was sampled. Alphabet: `B` rows, `A` new tokens at most.

    Attributes:
      tokens: int32 `[B, A]`, `pad_id` behind the stop token.
      mask: bool `[B, A]`, true on sampled tokens, the stop token included.
      log_prob: float32 `[B, A]`, nats, under the distribution that was sampled (temperature and truncation).
      full_log_prob: the same without truncation, as a training forward at this temperature computes it.
      stopped: bool `[B]`, false where the row ran into the limit A.
    """

    tokens: jax.Array
    mask: jax.Array
    log_prob: jax.Array
    full_log_prob: jax.Array
    stopped: jax.Array


class Context(NamedTuple):
    """Where a row stands between prefill and decode: the cache, next-token logits `[B, V]`, next position `[B]`."""

    cache: Any
    logits: jax.Array
    position: jax.Array


def check_sampling(sampling: Sampling) -> None:
    """Raises ValueError for a concrete temperature < 0, top_k < 1 or top_p outside (0, 1]."""
    for name, valid, expected in (
        ("temperature", lambda x: x >= 0, ">= 0"),
        ("top_k", lambda x: x >= 1, ">= 1 or None"),
        ("top_p", lambda x: 0 < x <= 1, "in (0, 1] or None"),
    ):
        value = getattr(sampling, name)
        if isinstance(value, int | float | np.number) and not valid(value):
            raise ValueError(f"sampling.{name}: expected {expected}, got {value}")


def scale_logits(logits: jax.Array, temperature: jax.Array | float) -> jax.Array:
    """Float32 logits over temperature; at temperature 0 the logits themselves (log-probs are then those at 1)."""
    temperature = jnp.asarray(temperature, jnp.float32)
    return logits.astype(jnp.float32) / jnp.where(temperature > 0, temperature, 1.0)


def truncate_logits(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Excludes what top-k and then top-p exclude, `[..., V] -> [..., V]`; logits are already scaled.

    At least the most likely token stays. Tokens tied with the k-th (or with the last of the nucleus) stay too.
    """
    if sampling.top_k is None and sampling.top_p is None:
        return logits
    ordered = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
    rank = jnp.arange(logits.shape[-1])
    kept = jnp.full(ordered.shape, True)
    if sampling.top_k is not None:
        kept = jnp.broadcast_to(rank < sampling.top_k, ordered.shape)
    if sampling.top_p is not None:
        probs = jax.nn.softmax(jnp.where(kept, ordered, EXCLUDED), axis=-1)
        # Rounding lets a long sum reach 1 early; p = 1 still means all.
        kept &= (jnp.cumsum(probs, axis=-1) - probs < sampling.top_p) | (rank == 0) | (sampling.top_p >= 1)
    threshold = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= threshold, logits, EXCLUDED)


def sample_token(keys: jax.Array, logits: jax.Array, sampling: Sampling) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One token per row: keys `[B]`, logits `[B, V]` -> (token, log_prob, full_log_prob), each `[B]`."""
    full = scale_logits(logits, sampling.temperature)
    truncated = truncate_logits(full, sampling)
    drawn = jax.vmap(jax.random.categorical)(keys, truncated)
    token = jnp.where(jnp.asarray(sampling.temperature) > 0, drawn, jnp.argmax(truncated, axis=-1)).astype(jnp.int32)

    def log_prob(x):
        chosen = jnp.take_along_axis(x, token[:, None], axis=-1)[:, 0]
        return chosen - jax.nn.logsumexp(x, axis=-1)

    return token, log_prob(truncated), log_prob(full)


def start(model: LanguageModel, params, batch: int, slots: int, prefix: jax.Array | None = None) -> tuple[Any, int]:
    """A cache of `batch` rows with room for `slots` tokens, and the position at which they begin.

    Args:
      prefix: token ids `[F]` that every row begins with (demonstrations, a system prompt). They are computed once, at
        batch 1, and the gradient flows through them.
    """
    if prefix is None:
        return model.init_cache(batch, slots), 0
    length = prefix.shape[0]
    positions = jnp.arange(length, dtype=jnp.int32)
    cache = model.init_cache(1, length + slots)
    _, cache = features(model, params, prefix[None], positions[None], cache, model.prefill)
    return repeat_rows(cache, batch), length


def prefill(model: LanguageModel, params, tokens, positions, cache, begin: jax.Array | int) -> Context:
    """Feeds tokens `[B, T]` (position < 0: padding) into the cache.

    Tokens that stand at the beginning see one another by `model.prefill` where it is set; what follows a prefix or an
    earlier turn is dense.

    Args:
      begin: position `[B]` or `[]` at which these tokens begin, for rows that have none. The number 0 says that the
        cache is empty and the rows are right-padded.
    """
    fresh = isinstance(begin, int) and begin == 0
    hidden, cache = features(model, params, tokens, positions, cache, model.prefill if fresh else None)
    last = jnp.argmax(positions, axis=1)
    feature = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    position = jnp.maximum(jnp.max(positions, axis=1) + 1, begin)
    return Context(cache, logits_of(model, params, feature), position)


def decode(
    model: LanguageModel,
    params,
    keys: jax.Array,
    context: Context,
    *,
    max_new_tokens: int,
    stop_ids: tuple[int, ...] = (),
    pad_id: int = 0,
    sampling: Sampling | None = None,
    active: jax.Array | None = None,
    early_exit: bool = True,
) -> tuple[Generation, Context]:
    """Samples up to `max_new_tokens` from where `context` stands.

    The last of the `max_new_tokens` columns is sampled but not fed to the model: a following turn feeds it with its
    observation (`Context.position` already counts it). A single turn thus pays for A - 1 steps.

    Args:
      keys: one key per row, `[B]`.
      stop_ids: ids that end a row; the stop token itself belongs to the row.
      active: bool `[B]`, rows that sample at all (default: all).
      early_exit: leave the loop when every row has stopped. Under `vmap` (many seeds) the exit is decided for all seeds
        together and costs a copy of the cache a step: switch it off there.
    """
    sampling = Sampling() if sampling is None else sampling
    check_sampling(sampling)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: expected >= 1, got {max_new_tokens}")
    batch = keys.shape[0]
    stops = jnp.asarray(stop_ids, jnp.int32)
    params = model.for_decoding(params)
    alive = jnp.ones(batch, bool) if active is None else active

    def sample(step, logits, alive):
        row_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, step)
        token, log_prob, full_log_prob = sample_token(row_keys, logits, sampling)
        token = jnp.where(alive, token, pad_id)
        column = (token, alive, jnp.where(alive, log_prob, 0.0), jnp.where(alive, full_log_prob, 0.0))
        return column, alive & ~jnp.isin(token, stops)

    def write(columns, column, step):
        return jax.tree.map(lambda all_, new: all_.at[:, step].set(new), columns, column)

    def body(carry):
        step, columns, alive, context = carry
        column, still = sample(step, context.logits, alive)
        position = jnp.where(alive, context.position, -1)[:, None]
        hidden, cache = features(model, params, column[0][:, None], position, context.cache)
        logits = logits_of(model, params, hidden[:, 0])
        context = Context(cache, logits.astype(context.logits.dtype), context.position + alive)
        return step + 1, write(columns, column, step), still, context

    def keep_going(carry):
        step, _, alive, _ = carry
        return (step < max_new_tokens - 1) & jnp.any(alive)

    columns = (
        jnp.full((batch, max_new_tokens), pad_id, jnp.int32),
        jnp.zeros((batch, max_new_tokens), bool),
        jnp.zeros((batch, max_new_tokens), jnp.float32),
        jnp.zeros((batch, max_new_tokens), jnp.float32),
    )
    carry = (jnp.int32(0), columns, alive, context)
    if early_exit and stop_ids:
        carry = jax.lax.while_loop(keep_going, body, carry)
    else:
        carry = jax.lax.fori_loop(0, max_new_tokens - 1, lambda _, carry: body(carry), carry)
    _, columns, alive, context = carry
    column, still = sample(jnp.int32(max_new_tokens - 1), context.logits, alive)
    columns = write(columns, column, max_new_tokens - 1)
    return Generation(*columns, stopped=~still), context._replace(position=context.position + alive)


def generate(
    model: LanguageModel,
    params,
    keys: jax.Array,
    tokens: jax.Array,
    lengths: jax.Array,
    *,
    max_new_tokens: int,
    stop_ids: tuple[int, ...] = (),
    pad_id: int = 0,
    sampling: Sampling | None = None,
    samples: int = 1,
    prefix: jax.Array | None = None,
    early_exit: bool = True,
) -> Generation:
    """Continues ragged prompts: prefill and decode in one program; prompts sparsely where `model.prefill` says so.

    Args:
      keys: one key per generated row, `[P * samples]`.
      tokens: prompts `[P, T]`, right-padded, of which `lengths` `[P]` count.
      samples: continuations of each prompt; row `p * samples + g` continues prompt p. Prompts are prefilled once.
      prefix: ids `[F]` that stand before every prompt, computed once. With it `model.prefill` reads the prefix
        alone, and the prompts behind it are dense.
      stop_ids, pad_id, sampling, early_exit: see `decode`.
    Returns:
      A `Generation` of P * samples rows.
    Raises:
      ValueError: for shapes that do not match, or sampling numbers out of range.
    """
    if tokens.ndim != 2 or lengths.shape != tokens.shape[:1]:
        raise ValueError(f"tokens, lengths: expected [P, T] and [P], got {tokens.shape} and {lengths.shape}")
    if keys.shape != (tokens.shape[0] * samples,):
        raise ValueError(f"keys: expected one per row, [{tokens.shape[0] * samples}], got {keys.shape}")
    batch, width = tokens.shape
    cache, begin = start(model, params, batch, width + max_new_tokens, prefix)
    context = prefill(model, params, tokens, padded_positions(lengths, width, begin), cache, begin)
    generation, _ = decode(
        model,
        params,
        keys,
        repeat_rows(context, samples),
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        pad_id=pad_id,
        sampling=sampling,
        early_exit=early_exit,
    )
    return generation


def padded_positions(lengths: jax.Array, width: int, begin: jax.Array | int = 0) -> jax.Array:
    """Positions `[B, T]` of right-padded rows that begin at position `begin`; -1 on padding."""
    index = jnp.arange(width, dtype=jnp.int32)
    return jnp.where(index < lengths[:, None], index + jnp.reshape(jnp.asarray(begin, jnp.int32), (-1, 1)), -1)
