"""V_0 (arXiv 2602.03584): how often will this policy succeed on this prompt, read off a few of its recent successes.

A frozen encoder gives token states; the residual query adapter makes a short feature vector of each prompt; a frozen
in-context head (`agents.prior_fitted`) compares the query with (prompt, success rate) pairs of the current policy. A
new policy is a new context: no weight changes. The encoder is the caller's: `agents.sentence_encoder`, the hidden
states of a `LanguageModel`, or any `[T, D]` per prompt.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rollax.agents.layers import attention, attention_init, dense, dense_init, layer_norm, layer_norm_init
from rollax.agents.prior_fitted import HeadConfig, in_context_logits, tabular_head_init


@dataclass(frozen=True)
class V0Config:
    """Shape of a value model; the defaults of the adapter are the paper's.

    Attributes:
      token_width: D, of the encoder's token states.
      num_queries: K.
      query_width: E; the adapter has K * E features.
      query_heads: attention heads, a divisor of E.
      bottleneck: width inside the generator of queries.
      head_layers, head_width, head_heads: of the in-context head.
    """

    token_width: int
    num_queries: int = 168
    query_width: int = 6
    query_heads: int = 3
    bottleneck: int = 128
    head_layers: int = 3
    head_width: int = 64
    head_heads: int = 4

    @property
    def head(self) -> HeadConfig:
        """The head that reads this adapter, as `pretrain_tabular_head` wants it."""
        return HeadConfig(self.num_queries * self.query_width, self.head_layers, self.head_width, self.head_heads)


class V0Masks(NamedTuple):
    """What counts; None for all. Encoders pad left or right alike.

    Attributes:
      context_tokens: bool `[N, T]`.
      query_tokens: bool `[Q, T]`.
      context: bool `[N]`, rows of the context; or `[Q, N]`, one context a query (`context_for`), which costs Q times
        the head.
    """

    context_tokens: jax.Array | None = None
    query_tokens: jax.Array | None = None
    context: jax.Array | None = None


def adapter_init(key: jax.Array, config: V0Config) -> dict:
    """Fresh adapter: standard normal queries, and a generator that ends in zeros, so that it starts silent.

    Raises:
      ValueError: sizes below 1, or a query width that its heads do not divide.
    """
    for name in ("token_width", "num_queries", "query_width", "query_heads", "bottleneck"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}: expected at least 1, got {getattr(config, name)}")
    D, K, E, width = config.token_width, config.num_queries, config.query_width, config.bottleneck
    queries_key, hidden_key, project_key, attention_key = jax.random.split(key, 4)
    return {
        "queries": jax.random.normal(queries_key, (K, E)),
        "generator": {
            "hidden": dense_init(hidden_key, D, width),
            "norm": layer_norm_init(width),
            "out": dense_init(hidden_key, width, K * E, std=0.0),
        },
        "project": dense_init(project_key, D, E),
        "query_norm": layer_norm_init(E),
        "key_norm": layer_norm_init(E),
        "attention": attention_init(attention_key, E, config.query_heads),
    }


def adapter_from_torch(weights: dict[str, np.ndarray], num_heads: int) -> dict:
    """The released adapter's state dict as our tree; linear maps are `[out, in]` there, q, k and v stacked.

    Args:
      weights: "static_queries", "generator.0.weight", "proj_kv.weight", "mha.in_proj_weight", "ln_q.weight", ...; an
        underscore may stand for each dot.
      num_heads: of the attention; no shape tells it.
    Raises:
      ValueError: a name that is missing or unknown, or a width that the heads do not divide.
    """
    left = {name.replace(".", "_"): jnp.asarray(value) for name, value in weights.items()}

    def take(name):
        if name not in left:
            raise ValueError(f"weights: {name} is missing, left are {sorted(left)}")
        return left.pop(name)

    linear = lambda name: {"kernel": take(f"{name}_weight").T, "bias": take(f"{name}_bias")}  # noqa: E731
    norm = lambda name: {"scale": take(f"{name}_weight"), "bias": take(f"{name}_bias")}  # noqa: E731
    queries = take("static_queries")
    queries = queries.reshape(queries.shape[-2:])
    E = queries.shape[1]
    if num_heads < 1 or E % num_heads:
        raise ValueError(f"num_heads: expected a divisor of the query width {E}, got {num_heads}")
    heads = (num_heads, E // num_heads)
    stacked = zip(jnp.split(take("mha_in_proj_weight"), 3), jnp.split(take("mha_in_proj_bias"), 3), strict=True)
    projections = [{"kernel": w.T.reshape(E, *heads), "bias": b.reshape(heads)} for w, b in stacked]
    out = linear("mha_out_proj")
    params = {
        "queries": queries,
        "generator": {"hidden": linear("generator_0"), "norm": norm("generator_1"), "out": linear("generator_4")},
        "project": linear("proj_kv"),
        "query_norm": norm("ln_q"),
        "key_norm": norm("ln_kv"),
        "attention": dict(zip("qkv", projections, strict=True))
        | {"o": {"kernel": out["kernel"].reshape(*heads, E), "bias": out["bias"]}},
    }
    if left:
        raise ValueError(f"weights: {sorted(left)} have no place in the adapter")
    return params


def check_rows_hold_tokens(name: str, mask: jax.Array, rows=None) -> None:
    """Raises ValueError where a row that counts is all padding; only where the numbers are known."""
    if any(isinstance(x, jax.core.Tracer) or not getattr(x, "is_fully_addressable", True) for x in (mask, rows)):
        return
    empty = ~np.asarray(mask, bool).any(axis=-1)
    if rows is not None:
        empty &= np.asarray(rows, bool).reshape(-1, len(empty)).any(axis=0)
    if empty.any():
        raise ValueError(f"{name}: expected a token in every row, row {int(np.argmax(empty))} is all padding")


def adapter(
    params: dict,
    tokens: jax.Array,
    mask: jax.Array | None = None,
    *,
    key: jax.Array | None = None,
    dropout: jax.Array | float = 0.2,
) -> jax.Array:
    """Features of prompts: learned queries, moved by each prompt's own summary, look at its token states.

    Q = static + generator(g), g the state of the last token that is not padding; attention of LayerNorm(Q) over
    LayerNorm(kv) with the values kv as they are, kv the projected states; no residual, no norm behind. (The released
    code looks at the whole batch for g: the last position if every row has a token there, else by each row's count,
    which is right for padding on one side; it differs from ours in a batch padded on both.)

    Args:
      params: of `adapter_init` or `adapter_from_torch`.
      tokens: the encoder's states, `[B, T, D]`.
      mask: bool `[B, T]`; None for all.
      key: for dropout in training; None for none.
      dropout: share of the generator's hidden units that are dropped; may be traced.
    Returns:
      `[B, K * E]`. Rows of padding alone come out finite and mean nothing.
    Raises:
      ValueError: shapes that do not fit, or a mask, where its numbers are known, with a row of padding alone.
    """
    check_tokens("tokens", params, tokens, mask)
    mask = jnp.ones(tokens.shape[:2], bool) if mask is None else jnp.asarray(mask, bool)
    check_rows_hold_tokens("mask", mask)
    return adapter_features(params, tokens, mask, key, dropout)


def check_tokens(name: str, params: dict, tokens: jax.Array, mask: jax.Array | None) -> None:
    """Raises ValueError for token states that the adapter cannot read."""
    D = params["project"]["kernel"].shape[0]
    if tokens.ndim != 3 or tokens.shape[2] != D:
        raise ValueError(f"{name}: expected states [B, T, {D}], got {tuple(tokens.shape)}")
    if mask is not None and jnp.shape(mask) != tokens.shape[:2]:
        raise ValueError(f"mask of {name}: expected shape {tuple(tokens.shape[:2])}, got {tuple(jnp.shape(mask))}")


def adapter_features(params: dict, tokens: jax.Array, mask: jax.Array, key=None, dropout=0.2) -> jax.Array:
    """`adapter` without its checks."""
    B, T, _ = tokens.shape
    tokens = jnp.where(mask[..., None], tokens, 0.0)  # padding may hold anything
    last = jnp.max(jnp.where(mask, jnp.arange(T), 0), axis=1)
    pooled = jnp.take_along_axis(tokens, last[:, None, None], axis=1)[:, 0]
    generator = params["generator"]
    hidden = jax.nn.gelu(layer_norm(generator["norm"], dense(generator["hidden"], pooled)), approximate=False)
    if key is not None:
        kept = jax.random.uniform(key, hidden.shape) >= dropout
        hidden = jnp.where(kept, hidden / (1 - dropout), 0.0)
    queries = params["queries"] + dense(generator["out"], hidden).reshape(B, *params["queries"].shape)
    states = dense(params["project"], tokens)
    keys = layer_norm(params["key_norm"], states)
    queries = layer_norm(params["query_norm"], queries)
    return attention(params["attention"], queries, keys, states, mask[:, None]).reshape(B, -1)


def v0_init(key: jax.Array, config: V0Config) -> dict:
    """`{"adapter": ..., "head": ...}`, both fresh; put the result of `pretrain_tabular_head` in place of the head."""
    adapter_key, head_key = jax.random.split(key)
    return {"adapter": adapter_init(adapter_key, config), "head": tabular_head_init(head_key, config.head)}


def v0_apply(
    params: dict,
    ctx_tokens: jax.Array,
    ctx_labels: jax.Array,
    query_tokens: jax.Array,
    masks: V0Masks | None = None,
    *,
    soft_labels: bool = False,
    members: int = 1,
    temperature: jax.Array | float = 1.0,
    key: jax.Array | None = None,
    dropout: jax.Array | float = 0.2,
) -> jax.Array:
    """Log-odds that the policy of the context succeeds on each query. jit, vmap (over contexts) and grad.

    The rate is `sigmoid`, and V_0.5's prior for rewards of -1 and 1 is `2 sigmoid - 1`.

    Args:
      params: of `v0_init`.
      ctx_tokens: token states of the context's prompts, `[N, T, D]`.
      ctx_labels: their success rates in [0, 1], `[N]`.
      query_tokens: `[Q, T', D]`.
      masks: what counts; None for all. Rows of the context that do not count may be all padding.
      soft_labels, members, temperature: of the head, see `in_context_logits`, also for contexts of one label.
      key, dropout: of the adapter in training.
    Returns:
      `[Q]`.
    Raises:
      ValueError: shapes that do not fit, or rows without a token where the masks' numbers are known.
    """
    masks = masks or V0Masks()
    N, Q = ctx_tokens.shape[0], query_tokens.shape[0]
    adapter_params = params["adapter"]
    check_tokens("ctx_tokens", adapter_params, ctx_tokens, masks.context_tokens)
    check_tokens("query_tokens", adapter_params, query_tokens, masks.query_tokens)
    if masks.context is not None and jnp.shape(masks.context) not in ((N,), (Q, N)):
        raise ValueError(f"masks.context: expected shape {(N,)} or {(Q, N)}, got {tuple(jnp.shape(masks.context))}")
    rows = jnp.ones(N, bool) if masks.context is None else jnp.asarray(masks.context, bool)
    token_masks = []
    for name, mask, tokens, counts in (
        ("masks.context_tokens", masks.context_tokens, ctx_tokens, rows),
        ("masks.query_tokens", masks.query_tokens, query_tokens, None),
    ):
        token_masks.append(jnp.ones(tokens.shape[:2], bool) if mask is None else jnp.asarray(mask, bool))
        check_rows_hold_tokens(name, token_masks[-1], counts)
    keys = (None, None) if key is None else jax.random.split(key)
    context, queries = (
        adapter_features(adapter_params, tokens, mask, k, dropout)
        for tokens, mask, k in zip((ctx_tokens, query_tokens), token_masks, keys, strict=True)
    )
    return v0_from_features(
        params["head"],
        context,
        ctx_labels,
        queries,
        rows,
        soft_labels=soft_labels,
        members=members,
        temperature=temperature,
    )


def v0_from_features(head: dict, context, labels, queries, mask=None, **how) -> jax.Array:
    """`v0_apply` behind the adapter, for features that were kept: with a frozen adapter a prompt is encoded once.

    Args:
      head: `params["head"]`.
      context, labels, queries: `[N, F]`, `[N]`, `[Q, F]`, features of `adapter`.
      mask: bool `[N]` or `[Q, N]`, as `V0Masks.context`; None for all.
      **how: options of `in_context_logits`.
    Returns:
      `[Q]`.
    """
    if mask is None or jnp.ndim(mask) == 1:
        return in_context_logits(head, context, labels, queries, mask, **how)
    # The context reads itself, so a record that one query must not see has to be hidden from the other records too.
    alone = lambda query, rows: in_context_logits(head, context, labels, query[None], rows, **how)[0]  # noqa: E731
    return jax.vmap(alone)(queries, mask)


def v0_partition(params: dict, *, joint: bool = False) -> tuple[dict, dict]:
    """(what is trained, what is frozen), put together again by `trained | frozen`: the adapter alone, or with the head.

    Take gradients of the first: `jax.grad(lambda trained: loss(trained | frozen))(trained)`.
    """
    trained = {name: part for name, part in params.items() if joint or name == "adapter"}
    return trained, {name: part for name, part in params.items() if name not in trained}


def v0_optimiser(
    updates: int, *, lr: jax.Array | float = 2e-4, weight_decay: float = 0.01
) -> optax.GradientTransformation:
    """The paper's optimiser: AdamW, gradient norm at most 1, warm-up over 5 % of the updates, then a cosine.

    Args:
      updates: static, all of the training.
      lr: the peak; may be traced.
      weight_decay: not of biases and norms.
    """
    decayed = lambda tree: jax.tree_util.tree_map_with_path(  # noqa: E731
        lambda path, _: getattr(path[-1], "key", None) not in ("bias", "scale"), tree
    )
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(),
        optax.add_decayed_weights(weight_decay, decayed),
        optax.scale_by_schedule(optax.warmup_cosine_decay_schedule(0.0, 1.0, max(updates // 20, 1), max(updates, 2))),
        optax.scale_by_learning_rate(lr),
    )


class Records(NamedTuple):
    """The last C (prompt, mean reward) pairs of a policy, as a ring. `C` capacity.

    Attributes:
      prompt: int32 `[C]`, ids of the prompts, negative where nothing was recorded yet.
      features: a tree of arrays `[C, ...]`: adapter features, or token states and their masks.
      rate: success rate in [0, 1], `[C]`.
      step: int32 `[C]`, when it was recorded.
      index: int32 `[]`, where the next record goes.
    """

    prompt: jax.Array
    features: Any
    rate: jax.Array
    step: jax.Array
    index: jax.Array


def empty_records(capacity: int, features: Any) -> Records:
    """A ring without records.

    Args:
      capacity: C, the context's size.
      features: a tree of arrays or shapes, those of one prompt.
    Raises:
      ValueError: a capacity below 1.
    """
    if capacity < 1:
        raise ValueError(f"capacity: expected at least 1, got {capacity}")
    return Records(
        prompt=jnp.full(capacity, -1, jnp.int32),
        features=jax.tree.map(lambda x: jnp.zeros((capacity, *x.shape), x.dtype), features),
        rate=jnp.zeros(capacity),
        step=jnp.zeros(capacity, jnp.int32),
        index=jnp.zeros((), jnp.int32),
    )


def record(
    records: Records, prompt: jax.Array, features: Any, rate: jax.Array, step: jax.Array, valid: jax.Array | None = None
) -> Records:
    """The ring with P more records, over the oldest. jit and vmap.

    Args:
      prompt: int `[P]`, ids, not negative; P at most C.
      features: a tree `[P, ...]`.
      rate: mean success of the rollouts in [0, 1], `[P]`: `(r + 1) / 2` for rewards of -1 and 1.
      step: `[]`.
      valid: bool `[P]`, which to record; None for all.
    Raises:
      ValueError: shapes that do not fit, or more records than the ring has places.
    """
    C, P = records.prompt.shape[0], jnp.shape(prompt)[0]
    shapes = {"rate": jnp.shape(rate), "valid": (P,) if valid is None else jnp.shape(valid)}
    for name, shape in shapes.items():
        if shape != (P,):
            raise ValueError(f"{name}: expected shape {(P,)}, got {shape}")
    if P > C:
        raise ValueError(f"prompt: expected at most {C} records at a time, got {P}")
    valid = jnp.ones(P, bool) if valid is None else jnp.asarray(valid, bool)
    rank = jnp.cumsum(valid) - 1
    at = jnp.where(valid, (records.index + rank) % C, C)  # C is out of range: dropped
    put = lambda old, new: old.at[at].set(jax.lax.stop_gradient(jnp.asarray(new, old.dtype)), mode="drop")  # noqa: E731
    return Records(
        prompt=put(records.prompt, prompt),
        features=jax.tree.map(put, records.features, features),
        rate=put(records.rate, rate),
        step=put(records.step, jnp.full(P, step)),
        index=(records.index + valid.sum(dtype=jnp.int32)) % C,
    )


def context_for(records: Records, prompt: jax.Array, *, since: jax.Array | int = 0) -> jax.Array:
    """Which records may inform about each query: never one of the same prompt. jit and vmap.

    Args:
      prompt: int `[Q]`, ids of the queries.
      since: records of earlier steps are left out; may be traced.
    Returns:
      bool `[Q, C]`, for `V0Masks.context` with `records.features` and `records.rate` as the context. Its `.all(axis=0)`
      is one context for all of them, Q times cheaper and without the records of any.
    Raises:
      ValueError: ids that are not `[Q]`.
    """
    if jnp.ndim(prompt) != 1:
        raise ValueError(f"prompt: expected ids [Q], got shape {jnp.shape(prompt)}")
    fresh = (records.prompt >= 0) & (records.step >= since)
    return fresh & (records.prompt != jnp.asarray(prompt)[:, None])
