"""The second part of the study v05: V_0 in context, and ordinary value models, on policies that none of them saw."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rollax import objectives
from rollax.agents.prior_fitted import pretrain_tabular_head
from rollax.agents.value_model import V0Config, adapter_features, v0_from_features, v0_init, v0_optimiser
from rollax.experiments.harness.loop import Train

if TYPE_CHECKING:
    from rollax.experiments.v05 import Config

# --- Part 2: V_0 on policies that it never saw ----------------------------------------------------------------------

SKILLS, STYLE, TOKENS, TOKEN_WIDTH = 6, 4, 8, 16
TRAIN_FAMILIES, NEW_FAMILIES, CHECKPOINTS, POOL = 24, 8, 8, 1024
ASKED = 128  # prompts of the pool that no training sees
SIZES = (8, 16, 32, 64)  # of a context
V0 = V0Config(TOKEN_WIDTH, num_queries=12, query_width=6, query_heads=3, bottleneck=32)


class World(NamedTuple):
    """Prompts and what policies make of them.

    Attributes:
      tokens: `[Q, TOKENS, TOKEN_WIDTH]`, all that is seen of a prompt.
      rate: `[families, checkpoints, Q]`, the probability of success.
    """

    tokens: jax.Array
    rate: jax.Array


def skill_world(key: jax.Array) -> World:
    """A prompt asks for a mixture of skills at some level; a policy has them, and each family grows its own way."""
    load_key, level_key, style_key, map_key, noise_key, start_key, growth_key = jax.random.split(key, 7)
    families = TRAIN_FAMILIES + NEW_FAMILIES
    load = jax.random.dirichlet(load_key, jnp.full(SKILLS, 0.5), (POOL,))
    level = jax.random.uniform(level_key, (POOL, 1), minval=0.2, maxval=0.8)
    latent = jnp.concatenate([load, level, jax.random.normal(style_key, (POOL, STYLE))], axis=1)
    latent = (latent - latent.mean(axis=0)) / latent.std(axis=0)  # style is no louder than the rest
    seen = jnp.tanh(
        latent @ jax.random.normal(map_key, (latent.shape[1], TOKENS * TOKEN_WIDTH)) / latent.shape[1] ** 0.5
    )
    seen = seen + 0.05 * jax.random.normal(noise_key, seen.shape)
    start = jax.random.uniform(start_key, (families, 1, SKILLS), maxval=0.6)
    growth = jax.random.dirichlet(growth_key, jnp.full(SKILLS, 0.5), (families,))[:, None]
    skill = start + 1.5 * growth * jnp.linspace(0, 1, CHECKPOINTS)[:, None]
    rate = jax.nn.sigmoid(6 * (skill @ load.T - level[:, 0]))
    return World(seen.reshape(POOL, TOKENS, TOKEN_WIDTH), rate)


class ValueNumbers(NamedTuple):
    """The losses of V_0, traced."""

    alpha: float = 0.25
    hard: int = 0  # targets rounded, as the released trainer has them
    soft_context: int = 0  # rates in the context instead of right or wrong
    joint: int = 0  # the head is trained too


VALUE_ARMS = {
    "v0": ValueNumbers(),
    "v0, cross-entropy": ValueNumbers(alpha=0.0),
    "v0, ranking": ValueNumbers(alpha=1.0),
    "v0, hard targets": ValueNumbers(alpha=0.0, hard=1),
    "v0, soft context": ValueNumbers(soft_context=1),
    "v0, joint": ValueNumbers(joint=1),
    "policy-blind": ValueNumbers(),
    "stale critic": ValueNumbers(),
    "nearest in context": ValueNumbers(),
}


@functools.cache
def fitted_head(updates: int, seed: int) -> Any:
    """V_0's head, from random tables: one for all rows and seeds."""
    return jax.device_get(pretrain_tabular_head(jax.random.key(seed), V0.head, updates)[0])


def shown(rate: jax.Array, soft: jax.Array | int) -> jax.Array:
    """Labels of a context."""
    return jnp.where(soft, rate, (rate >= 0.5).astype(rate.dtype))


def value_logits(params: dict, context, labels, queries, mask=None) -> jax.Array:
    """`v0_apply` of token states, for labels that are shown as they are."""
    features = [adapter_features(params["adapter"], x, jnp.ones(x.shape[:2], bool)) for x in (context, queries)]
    return v0_from_features(params["head"], features[0], labels, features[1], mask, soft_labels=True)


def ten_draws(key: jax.Array, rate: jax.Array) -> jax.Array:
    """Mean success of ten rollouts, as the paper's records have it."""
    return (jax.random.uniform(key, (10, *rate.shape)) < rate).mean(axis=0)


def task_loss(
    params: dict, key: jax.Array, world: World, families: int, config: "Config", n: ValueNumbers
) -> jax.Array:
    """Of one policy: a context and queries from the pool, labelled by ten rollouts each."""
    policy_key, pick_key, draw_key = jax.random.split(key, 3)
    family, checkpoint = (
        jax.random.randint(k, (), 0, high)
        for k, high in zip(jax.random.split(policy_key), (families, world.rate.shape[1]), strict=True)
    )
    seen = jnp.arange(ASKED, world.tokens.shape[0])
    picked = jax.random.choice(pick_key, seen, (config.contexts + config.queries,), replace=False)
    rate = ten_draws(draw_key, world.rate[family, checkpoint, picked])
    tokens, known, asked = world.tokens[picked], rate[: config.contexts], rate[config.contexts :]
    logits = value_logits(params, tokens[: config.contexts], shown(known, n.soft_context), tokens[config.contexts :])
    targets = jnp.where(n.hard, (asked >= 0.5).astype(asked.dtype), asked)
    return objectives.v0_loss(logits, targets, objectives.pair_index(asked), alpha=n.alpha)


def value_step(params, opt_state, key, world: World, families: int, config: "Config", optimiser, n: ValueNumbers):
    """One step on a batch of tasks; the head stays as it is unless `n.joint`."""
    keys = jax.random.split(key, config.tasks)
    loss = lambda p: jax.vmap(lambda k: task_loss(p, k, world, families, config, n))(keys).mean()  # noqa: E731
    value, gradient = jax.value_and_grad(loss)(params)
    steps, opt_state = optimiser.update(gradient, opt_state, params)
    steps["head"] = jax.tree.map(lambda x: x * n.joint, steps["head"])
    return optax.apply_updates(params, steps), opt_state, value


def fit_v0(key: jax.Array, world: World, families: int, shape: V0Config, head: Any, config: "Config") -> dict:
    """V_0 for the policies of `world`, after `config.value_updates` steps on its adapter; `head` of `fitted_head`."""
    optimiser = v0_optimiser(config.value_updates, lr=config.value_lr)
    params = v0_init(jax.random.fold_in(key, 1), shape) | {"head": head}

    def step(carry, i):
        key_i = jax.random.fold_in(key, 2 + i)
        params, opt, loss = value_step(*carry, key_i, world, families, config, optimiser, ValueNumbers())
        return (params, opt), loss

    (params, _), _ = jax.lax.scan(step, (params, optimiser.init(params)), jnp.arange(config.value_updates))
    return params


def pair_auc(score: jax.Array, rate: jax.Array) -> jax.Array:
    """Probability that a success scores above a failure, over all pairs of prompts, exactly; ties count half."""
    weight = rate[:, None] * (1 - rate[None])
    wins = (score[:, None] > score[None]) + 0.5 * (score[:, None] == score[None])
    return (weight * wins).sum() / weight.sum()


def on_new_policies(key: jax.Array, world: World, families: int, ask: Callable) -> dict[str, jax.Array]:
    """AUC within each policy of the families that were not trained on, by size of the context, and the prior's error.

    ask: `ask(context tokens, labels, mask, query tokens, family, checkpoint) -> logits`.
    """
    queries = slice(0, ASKED)
    pool = jnp.arange(ASKED, world.tokens.shape[0])

    def one(policy):
        family, checkpoint = families + policy // world.rate.shape[1], policy % world.rate.shape[1]
        pick_key, draw_key = jax.random.split(jax.random.fold_in(key, policy))
        picked = jax.random.choice(pick_key, pool, (max(SIZES),), replace=False)
        rate = world.rate[family, checkpoint]
        labels = ten_draws(draw_key, rate[picked])

        def at(size):
            mask = jnp.arange(max(SIZES)) < size
            logits = ask(world.tokens[picked], labels, mask, world.tokens[queries], family, checkpoint)
            return pair_auc(logits, rate[queries]), jnp.mean((2 * jax.nn.sigmoid(logits) - 2 * rate[queries]) ** 2)

        return jax.lax.map(at, jnp.array(SIZES))

    policies = jnp.arange((world.rate.shape[0] - families) * world.rate.shape[1])
    auc, error = jax.lax.map(one, policies)
    told = {f"auc, {size} in context": auc[:, i].mean() for i, size in enumerate(SIZES)}
    return told | {"auc": auc[:, -1].mean(), "prior's error": jnp.sqrt(error[:, -1].mean())}


def v0_train(config: "Config", head: Any) -> Train:
    """V_0: the adapter is trained on families, and evaluated on others."""
    optimiser = v0_optimiser(config.updates, lr=config.value_lr)

    def init(key):
        params = v0_init(jax.random.fold_in(key, 1), V0) | {"head": head}
        return {"params": params, "opt": optimiser.init(params), "key": key, "step": jnp.int32(0)}

    def advance(state, n):
        world = skill_world(state["key"])

        def update(state, _):
            key = jax.random.fold_in(state["key"], 2 + state["step"])
            params, opt, loss = value_step(
                state["params"], state["opt"], key, world, TRAIN_FAMILIES, config, optimiser, n
            )
            return {"params": params, "opt": opt, "key": state["key"], "step": state["step"] + 1}, {"loss": loss}

        return jax.lax.scan(update, state, length=min(config.chunk, config.updates))

    def evaluate(state, n):
        def ask(tokens, labels, mask, queries, family, checkpoint):
            return value_logits(state["params"], tokens, shown(labels, n.soft_context), queries, mask)

        return on_new_policies(jax.random.fold_in(state["key"], 0), skill_world(state["key"]), TRAIN_FAMILIES, ask)

    return Train(init, advance, evaluate)


def rival_train(config: "Config", kind: str) -> Train:
    """Without a context: a difficulty model of all policies ("policy-blind"), or an ordinary critic of each new family,
    fitted to its first checkpoint and asked about all ("stale critic"). "nearest in context" learns nothing."""
    stale, hidden = kind == "stale critic", 64
    heads = NEW_FAMILIES if stale else 1
    optimiser = optax.adam(config.value_lr)

    def logits(params, tokens):
        flat = tokens.reshape(*tokens.shape[:-2], -1)
        return jax.nn.gelu(flat @ params["up"] + params["bias"]) @ params["out"]  # [..., heads]

    def init(key):
        up = jax.random.normal(jax.random.fold_in(key, 1), (TOKENS * TOKEN_WIDTH, hidden))
        params = {
            "up": up * (TOKENS * TOKEN_WIDTH) ** -0.5,
            "bias": jnp.zeros(hidden),
            "out": jnp.zeros((hidden, heads)),
        }
        return {"params": params, "opt": optimiser.init(params), "key": key, "step": jnp.int32(0)}

    def advance(state, n):
        world = skill_world(state["key"])

        def update(state, _):
            key = jax.random.fold_in(state["key"], 2 + state["step"])
            keys = jax.random.split(key, 3)
            picked = jax.random.randint(keys[0], (config.tasks * (config.contexts + config.queries),), ASKED, POOL)
            if stale:
                rate = world.rate[TRAIN_FAMILIES:, 0][:, picked].T
            else:
                which = jax.random.randint(keys[1], picked.shape, 0, TRAIN_FAMILIES * CHECKPOINTS)
                rate = world.rate[which // CHECKPOINTS, which % CHECKPOINTS, picked][:, None]
            labels = ten_draws(keys[2], rate)
            loss = lambda p: optax.sigmoid_binary_cross_entropy(logits(p, world.tokens[picked]), labels).mean()  # noqa: E731
            value, gradient = jax.value_and_grad(loss)(state["params"])
            steps, opt = optimiser.update(gradient, state["opt"])
            params = optax.apply_updates(state["params"], steps)
            return {"params": params, "opt": opt, "key": state["key"], "step": state["step"] + 1}, {"loss": value}

        return jax.lax.scan(update, state, length=min(config.chunk, config.updates))

    def evaluate(state, n):
        def ask(tokens, labels, mask, queries, family, checkpoint):
            if kind == "nearest in context":
                return nearest(tokens, labels, mask, queries)
            said = logits(state["params"], queries)
            return said[:, family - TRAIN_FAMILIES] if stale else said[:, 0]

        return on_new_policies(jax.random.fold_in(state["key"], 0), skill_world(state["key"]), TRAIN_FAMILIES, ask)

    return Train(init, advance, evaluate)


def nearest(tokens, labels, mask, queries, neighbours: int = 5) -> jax.Array:
    """Log-odds of the mean rate of the nearest prompts in the context, `[Q]`."""
    distance = ((queries[:, None] - tokens[None]) ** 2).sum((-2, -1)) + jnp.where(mask, 0.0, jnp.inf)
    _, at = jax.lax.top_k(-distance, neighbours)
    rate = jnp.clip(labels[at].mean(axis=1), 0.02, 0.98)
    return jnp.log(rate) - jnp.log1p(-rate)
