"""What every language policy is here: a bundle of pure functions over a plain tree of arrays.

`agents.transformer` and `agents.tabular` build one; `agents.generation` and `agents.rollout` know only this file.
Padding is said by positions: a negative position marks a slot that holds no token, in prompts and in the cache alike.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rollax.kernels.flash_prefill import (
    FlashPrefillConfig,
    PackedPrefillConfig,
    flash_prefill,
    flash_prefill_packed,
)
from rollax.kernels.linear_log_prob import linear_log_prob


class LanguageModel(NamedTuple):
    """Functions of one model. Alphabet: `B` batch, `T` tokens, `S` cache slots, `D` width, `V` vocabulary.

    Attributes:
      init: `init(key) -> params`, a plain tree (dicts, tuples, arrays).
      apply: `apply(params, tokens[B, T], positions[B, T], cache=None) -> (logits[B, T, V], cache)`.
        Without a cache, plain causal attention over the T slots; the returned cache is None. With one, the T tokens
        go to the next T slots and see all the slots before them. A slot is visible iff its position is >= 0 and it is
        not later in slot order; the position numbers themselves feed the position encoding only.
      init_cache: `init_cache(batch, slots, dtype=None) -> cache`, empty. Its array leaves have the batch as leading
        axis, except scalars (the fill index), which all rows share.
      hidden: `hidden(params, tokens, positions, cache=None, prefill=None) -> (hidden[B, T, D], cache)`, the input of
        the output head; None where there is no such thing (a table). With `prefill`, see below, the T tokens see one
        another by that operator: they must be right-padded and the cache, if any, empty.
      head: `head(params) -> [D, V]`, so that `logits = hidden @ head`; None as above.
      axes: a tree like params, each leaf a tuple of logical axis names (`agents.sharding`).
      vocab_size: V.
      for_decoding: `for_decoding(params) -> params`, the form that one-token steps run fastest on (a stack of layers
        taken apart); all functions take both forms.
      prefill: the causal attention of fresh prompts when text is generated: `prefill(q[B, T, H, d], k[B, T, K, d], v,
        length[B]) -> [B, T, H, d]`, of which `length` tokens count. None for the dense attention that training and
        decoding have in any case. On the sampler: `model._replace(prefill=sparse_prefill(cfg))`.
    """

    init: Callable[..., Any]
    apply: Callable[..., tuple[Any, Any]]
    init_cache: Callable[..., Any]
    hidden: Callable[..., tuple[Any, Any]] | None
    head: Callable[..., Any] | None
    axes: Any
    vocab_size: int
    for_decoding: Callable[[Any], Any] = lambda params: params
    prefill: Callable[..., jax.Array] | None = None


def sparse_prefill(cfg: FlashPrefillConfig | PackedPrefillConfig, **options) -> Callable[..., jax.Array]:
    """FlashPrefill as a `LanguageModel.prefill`: version 1 or 2, by the type of `cfg`; its alpha may be traced.

    It reads what stands at the beginning: a `prefix` where generation has one, and the prompts themselves where not.

    Args:
      options: of `kernels.flash_prefill.flash_prefill` or `flash_prefill_packed`, such as `implementation`.
    """
    operator = flash_prefill if isinstance(cfg, FlashPrefillConfig) else flash_prefill_packed
    return jax.vmap(lambda q, k, v, length: operator(q, k, v, cfg, length=length, **options)[0])


def repeat_rows(cache: Any, times: int) -> Any:
    """Each row of a cache `times` times in a row, `[B, ...] -> [B * times, ...]`: one prompt, many samples."""
    return jax.tree.map(lambda x: jnp.repeat(x, times, axis=0) if x.ndim else x, cache)


def features(model: LanguageModel, params, tokens, positions, cache=None, prefill=None) -> tuple[jax.Array, Any]:
    """What the output head reads, `[B, T, D]`, and the cache; the logits themselves where the model has no head.

    Args:
      prefill: see `LanguageModel`; the caller says where it is used.
    Raises:
      ValueError: `prefill` for a model without attention.
    """
    if prefill is None:
        return (model.hidden or model.apply)(params, tokens, positions, cache)
    if model.hidden is None:
        raise ValueError("prefill: expected None for a model without attention, got an operator")
    return model.hidden(params, tokens, positions, cache, prefill)


def logits_of(model: LanguageModel, params, feature: jax.Array) -> jax.Array:
    """Next-token logits `[..., V]` from `features`."""
    if model.head is None:
        return feature
    # At least float32, as training forms them: rounded to bfloat16, sampled and trained distributions would differ.
    wide = jnp.promote_types(feature.dtype, jnp.float32)
    head = model.head(params)
    if feature.size == head.shape[0]:
        # One row is a matrix times a vector: written the other way round, CPUs took seven times as long (jax 0.12).
        logits = jnp.matmul(head.T, feature.reshape(-1), preferred_element_type=wide)
        return logits.reshape(*feature.shape[:-1], -1)
    return jnp.matmul(feature, head, preferred_element_type=wide)


def restrict_vocabulary(model: LanguageModel, size: int) -> LanguageModel:
    """The model over its first `size` ids alone, in sampling and training alike: published embeddings are padded.

    Raises:
      ValueError: a size outside 1..V.
    """
    if not 1 <= size <= model.vocab_size:
        raise ValueError(f"size: expected 1 to {model.vocab_size}, got {size}")
    if size == model.vocab_size:
        return model

    def apply(*args):
        logits, cache = model.apply(*args)
        return logits[..., :size], cache

    head = model.head and (lambda params: model.head(params)[:, :size])
    return model._replace(apply=apply, head=head, vocab_size=size)


def log_prob_and_entropy(
    model: LanguageModel,
    params: Any,
    feature: jax.Array,
    targets: jax.Array,
    *,
    temperature: jax.Array | float = 1.0,
    chunk: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Log-probs of next tokens from `features` `[B, T, D]`, with gradients and, where there is a head, without logits.

    Args:
      targets: int32 `[B, T]`. Values at padding mean nothing: mask them.
      temperature: positive, divides the logits; may be traced.
      chunk: tokens whose logits exist at one time, see `rollax.kernels.linear_log_prob`.
    Returns:
      (log_prob, entropy of the distribution), float32 `[B, T]`, nats.
    """
    if model.head is not None:
        return linear_log_prob(feature, model.head(params), targets, temperature=temperature, chunk=chunk)
    log_probs = jax.nn.log_softmax(feature.astype(jnp.promote_types(feature.dtype, jnp.float32)) / temperature)
    ids = jnp.clip(targets, 0, model.vocab_size - 1)[..., None]
    # A table may hold -inf for tokens that never come; 0 * -inf is 0 here, and so is its gradient.
    possible = log_probs != -jnp.inf
    safe = jnp.where(possible, log_probs, 0.0)
    entropy = -jnp.sum(jnp.where(possible, jnp.exp(safe) * safe, 0.0), axis=-1)
    return jnp.take_along_axis(log_probs, ids, axis=-1)[..., 0], entropy


def token_log_probs(
    model: LanguageModel,
    params: Any,
    tokens: jax.Array,
    positions: jax.Array,
    targets: jax.Array,
    cache: Any = None,
    *,
    temperature: jax.Array | float = 1.0,
    chunk: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`log_prob_and_entropy` of a forward pass.

    Args:
      tokens, positions: int32 `[B, T]`, as for `model.apply`; negative positions are padding.
      targets: int32 `[B, T]`, the token that follows each of `tokens`.
      cache: what the tokens continue, such as a prompt's cache after `repeat_rows`; gradients flow into it. Its update
        is dropped.
    Raises:
      ValueError: shapes that do not fit.
    """
    if targets.shape != tokens.shape:
        raise ValueError(f"targets must have the shape of tokens {tuple(tokens.shape)}, got {tuple(targets.shape)}")
    feature, _ = features(model, params, tokens, positions, cache)
    return log_prob_and_entropy(model, params, feature, targets, temperature=temperature, chunk=chunk)
