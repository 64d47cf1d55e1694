"""Classification in context: a transformer fitted once to random tabular tasks, then asked without further training.

A prior-fitted network (arXiv 2112.10510; TabPFN, 2207.01848) reads a table of labelled rows and answers for unlabelled
ones. Rows are a set: nothing depends on their order. It stands in for the TabPFN v2.5 head of V_0 (2602.03584).
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rollax.agents.layers import attention, attention_init, dense, dense_init, layer_norm, layer_norm_init

FAILURE, SUCCESS, UNKNOWN = 0, 1, 2  # rows of the label embedding


@dataclass(frozen=True)
class HeadConfig:
    """Shape of the head.

    Attributes:
      num_features: F, columns of the table.
      num_layers, width, num_heads: of the transformer over rows; its MLPs are twice as wide.
    """

    num_features: int
    num_layers: int = 3
    width: int = 64
    num_heads: int = 4


def tabular_head_init(key: jax.Array, config: HeadConfig) -> dict:
    """Fresh parameters; the number of heads is in the shapes of the attention kernels.

    Raises:
      ValueError: sizes below 1, or a width that the heads do not divide.
    """
    for name in ("num_features", "num_layers", "width", "num_heads"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}: expected at least 1, got {getattr(config, name)}")
    F, W = config.num_features, config.width
    embed_key, label_key, out_key, layers_key = jax.random.split(key, 4)

    def layer(key):
        attention_key, up_key, down_key = jax.random.split(key, 3)
        return {
            "attention_norm": layer_norm_init(W),
            "attention": attention_init(attention_key, W, config.num_heads),
            "mlp_norm": layer_norm_init(W),
            "up": dense_init(up_key, W, 2 * W),
            "down": dense_init(down_key, 2 * W, W),
        }

    return {
        "embed": dense_init(embed_key, F, W),
        "labels": jax.random.normal(label_key, (3, W)),
        "layers": tuple(layer(k) for k in jax.random.split(layers_key, config.num_layers)),
        "norm": layer_norm_init(W),
        "out": dense_init(out_key, W, 1),
    }


def standardise(context: jax.Array, queries: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both tables with the context's mean 0 and standard deviation 1 in every column; columns of one value become 0."""
    weight = mask[:, None].astype(context.dtype) / jnp.maximum(mask.sum(), 1)
    mean = (weight * context).sum(axis=0)
    scale = jax.lax.rsqrt((weight * jnp.square(context - mean)).sum(axis=0) + 1e-5)
    return (context - mean) * scale, (queries - mean) * scale


def head_logits(params: dict, context: jax.Array, labels: jax.Array, queries: jax.Array, mask: jax.Array) -> jax.Array:
    """Log-odds of success of the queries, without the cases that `in_context_logits` takes care of.

    Args:
      context: `[M, N, F]`; labels: in [0, 1], `[M, N]`, a mixture of the two embeddings in between; queries:
        `[M, Q, F]`; mask: bool `[N]`.
    Returns:
      `[M, Q]`.
    """
    N = context.shape[1]
    failure, success, unknown = params["labels"]
    rows = dense(params["embed"], context) + failure + labels[..., None] * (success - failure)
    x = jnp.concatenate([rows, dense(params["embed"], queries) + unknown], axis=1)
    for p in params["layers"]:
        # Keys are the context alone: no query is seen by anything but itself, through the residual stream.
        normed = layer_norm(p["attention_norm"], x)
        x = x + attention(p["attention"], normed, normed[:, :N], normed[:, :N], mask[None, None])
        up = jax.nn.gelu(dense(p["up"], layer_norm(p["mlp_norm"], x)), approximate=False)
        x = x + dense(p["down"], up)
    return dense(params["out"], layer_norm(params["norm"], x[:, N:]))[..., 0]


def views(members: int, num_features: int) -> np.ndarray:
    """Orders of the columns for an ensemble, int `[M, F]`; the first is the order given."""
    orders = [np.arange(num_features)]
    return np.stack(orders + [np.random.default_rng(i).permutation(num_features) for i in range(1, members)])


def in_context_logits(
    params: dict,
    context: jax.Array,
    labels: jax.Array,
    queries: jax.Array,
    mask: jax.Array | None = None,
    *,
    soft_labels: bool = False,
    members: int = 1,
    temperature: jax.Array | float = 1.0,
) -> jax.Array:
    """Log-odds of success of each query, given labelled rows. jit, vmap and grad.

    Args:
      params: of `tabular_head_init` or `pretrain_tabular_head`.
      context: features of the labelled rows, `[N, F]`; standardised here by their own mean and deviation.
      labels: success rates in [0, 1], `[N]`.
      queries: features, `[Q, F]`.
      mask: bool `[N]`, rows that count; None for all. The others may hold anything.
      soft_labels: static; False rounds the labels (from 0.5 on up), as the paper does, True shows the rates.
      members: static; how many reorderings of the columns are averaged, every other one with the labels exchanged.
      temperature: of each member's logits, before the mean.
    Returns:
      `[Q]`. Where the rows that count all have one label there is nothing to learn from: the log-odds of their mean
      rate then, held half a success away from 0 and 1, and 0 without any row.
    Raises:
      ValueError: shapes that do not fit, or less than one member.
    """
    N, F = context.shape if context.ndim == 2 else (None, None)
    if N is None or queries.ndim != 2 or queries.shape[1] != F or labels.shape != (N,):
        raise ValueError(
            "expected context [N, F], labels [N] and queries [Q, F], "
            f"got {tuple(context.shape)}, {tuple(labels.shape)} and {tuple(queries.shape)}"
        )
    if params["embed"]["kernel"].shape[0] != F:
        raise ValueError(f"context: expected {params['embed']['kernel'].shape[0]} features, got {F}")
    if members < 1:
        raise ValueError(f"members: expected at least 1, got {members}")
    mask = jnp.ones(N, bool) if mask is None else jnp.asarray(mask, bool)
    if mask.shape != (N,):
        raise ValueError(f"mask: expected shape {(N,)}, got {mask.shape}")
    labels = jnp.where(mask, jnp.asarray(labels, context.dtype), 0.0)
    seen = labels if soft_labels else (labels >= 0.5).astype(context.dtype)
    one_label = jnp.where(mask, seen, -jnp.inf).max(initial=-jnp.inf) <= jnp.where(mask, seen, jnp.inf).min(
        initial=jnp.inf
    )
    rows, asked = standardise(jnp.where(mask[:, None], context, 0.0), queries, mask)
    order = views(members, F)
    flip = jnp.arange(members)[:, None] % 2 == 1
    shown = jnp.where(flip, 1 - seen, seen)
    logits = head_logits(params, rows[:, order].swapaxes(0, 1), shown, asked[:, order].swapaxes(0, 1), mask)
    logits = (jnp.where(flip, -logits, logits) / temperature).mean(axis=0)
    count = mask.sum()
    rate = labels.sum() / jnp.maximum(count, 1)
    margin = 0.5 / jnp.maximum(count, 1)
    rate = jnp.where(count > 0, jnp.clip(rate, margin, 1 - margin), 0.5)
    return jnp.where(one_label, jnp.log(rate) - jnp.log1p(-rate), logits)


def tabular_task(key: jax.Array, num_features: int, rows: int, *, rank: int = 8, draws: int = 8):
    """One random task: correlated Gaussian features, and a success rate that a random function makes of their causes.

    A few causes z ~ N(0, 1) are mixed into all columns, with noise. Half of the tasks are logistic in z, half a random
    MLP of it; steepness, base rate, number of causes, noise and draws a label all vary from task to task.

    Args:
      num_features: F.
      rows: R.
      rank: the most causes.
      draws: the most Bernoulli draws whose mean is a label.
    Returns:
      (features `[R, F]`, labels `[R]`, means of draws, rate `[R]`, the probability that they were drawn with).
    """
    hidden = 16
    keys = jax.random.split(key, 4)
    # Few calls: every random array of another shape costs compile time.
    normal = jax.random.normal(
        keys[0], (rows * (rank + num_features) + rank * (num_features + 1 + hidden) + 2 * hidden + 1,)
    )
    sizes = (rows * rank, rows * num_features, rank * num_features, rank, rank * hidden, hidden, hidden, 1)
    z, noise, mixing, linear, first, bias, second, shift = jnp.split(normal, np.cumsum(sizes)[:-1])
    u = jax.random.uniform(keys[1], (4,))
    causes = 1 + jnp.floor(u[0] * rank)
    z = z.reshape(rows, rank) * (jnp.arange(rank) < causes)
    features = z @ mixing.reshape(rank, num_features) / jnp.sqrt(causes)
    features = features + 0.03 * (1 / 0.03) ** u[1] * noise.reshape(rows, num_features)
    wiggly = jnp.tanh(2 * z @ first.reshape(rank, hidden) / jnp.sqrt(causes) + bias) @ second
    score = jnp.where(jax.random.bernoulli(keys[2]), wiggly, z @ linear)
    score = (score - score.mean()) * jax.lax.rsqrt(jnp.square(score - score.mean()).mean() + 1e-6)
    rate = jax.nn.sigmoid(0.5 * 16 ** u[2] * (score + 0.7 * shift))
    count = 1 + jnp.floor(u[3] * draws)
    hits = jax.random.uniform(keys[3], (rows, draws)) < rate[:, None]
    labels = (hits & (jnp.arange(draws) < count)).sum(axis=1) / count
    return features, labels, rate


@partial(jax.jit, static_argnames=("config", "updates", "tasks", "rows", "queries", "rank", "soft_labels"))
def pretrain_tabular_head(
    key: jax.Array,
    config: HeadConfig,
    updates: int,
    *,
    tasks: int = 16,
    rows: int = 64,
    queries: int = 32,
    rank: int = 8,
    soft_labels: bool = False,
    lr: jax.Array | float = 1e-3,
) -> tuple[dict, jax.Array]:
    """A head that has seen `updates * tasks` random tasks; one compiled program, the same for the same key.

    AdamW with warm-up over a twentieth of the updates and a cosine after it, gradient norm at most 1. Contexts have 4
    to `rows` rows, log-uniformly. What is learned is the rate itself, from labels of few draws.

    Args:
      config, tasks, rows, queries, rank: static; `tasks` a batch, each with `queries` queries; see `tabular_task`.
      soft_labels: how contexts are shown, see `in_context_logits`.
      lr: the peak; may be traced.
    Returns:
      (params, loss of every update `[updates]`, nats).
    Raises:
      ValueError: sizes below 1.
    """
    sizes = {"updates": updates, "tasks": tasks, "rows": rows, "queries": queries, "rank": rank}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}")
    init_key, data_key = jax.random.split(key)
    params = tabular_head_init(init_key, config)
    # The schedule is a share of the peak, so that the peak may be traced.
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, max(updates // 20, 1), max(updates, 2))
    optimiser = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(),
        optax.add_decayed_weights(0.01),
        optax.scale_by_schedule(schedule),
        optax.scale(-lr),
    )

    def task_loss(params, key):
        task_key, size_key = jax.random.split(key)
        features, labels, rate = tabular_task(task_key, config.num_features, rows + queries, rank=rank)
        size = 4 * (rows / 4) ** jax.random.uniform(size_key)
        logits = in_context_logits(
            params, features[:rows], labels[:rows], features[rows:], jnp.arange(rows) < size, soft_labels=soft_labels
        )
        return optax.sigmoid_binary_cross_entropy(logits, rate[rows:]).mean()

    def update(carry, step):
        params, opt_state = carry
        keys = jax.random.split(jax.random.fold_in(data_key, step), tasks)
        loss, gradient = jax.value_and_grad(lambda p: jax.vmap(lambda k: task_loss(p, k))(keys).mean())(params)
        change, opt_state = optimiser.update(gradient, opt_state, params)
        return (optax.apply_updates(params, change), opt_state), loss

    (params, _), losses = jax.lax.scan(update, (params, optimiser.init(params)), jnp.arange(updates))
    return params, losses
