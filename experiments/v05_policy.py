"""The third part of the study v05: a network learns modular arithmetic by RL under each baseline and budget."""

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rollax import objectives
from rollax.agents.value_model import (
    adapter_features,
    context_for,
    empty_records,
    record,
    v0_from_features,
)
from rollax.experiments.harness.loop import Train
from rollax.experiments.v05_baselines import SLOTS, Numbers, advantage_of, count_of, index, mean_of, rank_correlation
from rollax.experiments.v05_values import (
    TOKEN_WIDTH,
    V0,
    World,
    fit_v0,
    fitted_head,
    shown,
)

if TYPE_CHECKING:
    from rollax.experiments.v05 import Config

# --- Part 3: a policy that learns arithmetic under each baseline ----------------------------------------------------

WIDE = 4  # as many times the prompts
SOURCES = ("truth", "flipped", "v0", "v0, other world")
OPERATIONS = 3  # plus, minus, times
POLICY_FAMILIES, POLICY_CHECKPOINTS, POLICY_POOL = 12, 6, 768


class Prompts(NamedTuple):
    """Chains such as (3 + 4) * 2 - 1, modulo the modulus, from left to right.

    Attributes:
      ids: int `[P, 1 + 2 length]`: a number, then operation and number in turn; operations behind the end are "stop".
      answer: int `[P]`.
      kind: int `[P]`, its last operation, and its length less one times the number of operations.
    """

    ids: jax.Array
    answer: jax.Array
    kind: jax.Array


def sample_prompts(key: jax.Array, config: "Config", count: int, mixture: jax.Array | None = None) -> Prompts:
    """Random prompts; `mixture` `[length]` are the probabilities of the lengths, else all are as likely."""
    m, length = config.modulus, config.length
    number_key, operation_key, length_key = jax.random.split(key, 3)
    numbers = jax.random.randint(number_key, (count, length + 1), 0, m)
    operations = jax.random.randint(operation_key, (count, length), 0, OPERATIONS)
    mixture = jnp.full(length, 1 / length) if mixture is None else mixture
    steps = 1 + jax.random.categorical(length_key, jnp.log(mixture), shape=(count,))
    value, ids = numbers[:, 0], [numbers[:, 0]]
    for i in range(length):
        a, here = numbers[:, i + 1], i < steps
        after = jnp.stack([value + a, value - a, value * a])[operations[:, i], jnp.arange(count)] % m
        value = jnp.where(here, after, value)
        ids += [jnp.where(here, m + operations[:, i], m + OPERATIONS), jnp.where(here, a, 0)]
    last = jnp.take_along_axis(operations, steps[:, None] - 1, axis=1)[:, 0]
    return Prompts(jnp.stack(ids, axis=1), value, (steps - 1) * OPERATIONS + last)


def network_init(key: jax.Array, config: "Config", outputs: int) -> dict:
    """A GRU over the prompt's tokens (arXiv 1406.1078) and a linear output."""
    W, vocabulary = config.width, config.modulus + OPERATIONS + 1
    keys = jax.random.split(key, 3)
    return {
        "embed": jax.random.normal(keys[0], (vocabulary, 3 * W)),
        "recur": jax.random.normal(keys[1], (W, 3 * W)) * W**-0.5,
        "out": jax.random.normal(keys[2], (W, outputs)) * 0.1 * W**-0.5,
        "bias": jnp.zeros(outputs),
    }


def network(params: dict, ids: jax.Array) -> jax.Array:
    """`[P, outputs]`."""
    W = params["recur"].shape[0]
    state = jnp.zeros((ids.shape[0], W))
    for t in range(ids.shape[1]):
        seen, kept = params["embed"][ids[:, t]], state @ params["recur"]
        reset, update = (jax.nn.sigmoid(seen[:, i * W : (i + 1) * W] + kept[:, i * W : (i + 1) * W]) for i in (0, 1))
        new = jnp.tanh(seen[:, 2 * W :] + reset * kept[:, 2 * W :])
        state = update * state + (1 - update) * new
    return state @ params["out"] + params["bias"]


def right(params: dict, prompts: Prompts) -> jax.Array:
    """Probability of the right answer, `[P]`."""
    probs = jax.nn.softmax(network(params, prompts.ids))
    return jnp.take_along_axis(probs, prompts.answer[:, None], axis=1)[:, 0]


def teach(key: jax.Array, config: "Config", steps: int, mixture: jax.Array, operations: jax.Array) -> Any:
    """Parameters before and after each of POLICY_CHECKPOINTS parts of `steps` supervised steps, `[checkpoints, ...]`.

    mixture, operations: probabilities of lengths, weights of the last operation: what this family learns first.
    """
    optimiser = optax.adam(5e-3)

    def loss(params, prompts):
        losses = optax.softmax_cross_entropy_with_integer_labels(network(params, prompts.ids), prompts.answer)
        weight = operations[prompts.kind % OPERATIONS]
        return (losses * weight).sum() / weight.sum()

    def step(carry, i):
        params, opt = carry
        prompts = sample_prompts(jax.random.fold_in(key, i), config, 128, mixture)
        change, opt = optimiser.update(jax.grad(loss)(params, prompts), opt)
        return (optax.apply_updates(params, change), opt), None

    def part(carry, i):
        length = max(steps // POLICY_CHECKPOINTS, 1)
        carry, _ = jax.lax.scan(step, carry, i * length + jnp.arange(length))
        return carry, carry[0]

    params = network_init(jax.random.fold_in(key, 2**20), config, config.modulus)
    _, checkpoints = jax.lax.scan(part, (params, optimiser.init(params)), jnp.arange(POLICY_CHECKPOINTS))
    return checkpoints


def prompt_tokens(ids: jax.Array, config: "Config") -> jax.Array:
    """The study's own encoder: fixed random vectors of token and place, `[P, T, TOKEN_WIDTH]`."""
    vocabulary = config.modulus + OPERATIONS + 1
    table = jax.random.normal(jax.random.key(17), (vocabulary + ids.shape[1], TOKEN_WIDTH))
    return table[ids] + table[vocabulary + jnp.arange(ids.shape[1])]


def policy_world(key: jax.Array, config: "Config", narrow: bool) -> World:
    """Success of supervised networks on a pool of prompts; "narrow" families know single operations alone."""
    mix_key, weight_key, pool_key, teach_key = jax.random.split(key, 4)
    mixtures = jax.random.dirichlet(mix_key, jnp.ones(config.length), (POLICY_FAMILIES,))
    only_short = jnp.zeros(config.length).at[0].set(1.0)
    mixtures = jnp.where(narrow, only_short, mixtures)
    weights = jax.random.dirichlet(weight_key, jnp.ones(OPERATIONS), (POLICY_FAMILIES,))
    prompts = sample_prompts(pool_key, config, POLICY_POOL)

    def family(mixture, weight, i):
        checkpoints = teach(jax.random.fold_in(teach_key, i), config, 4 * config.warm_start, mixture, weight)
        return jax.lax.map(lambda params: right(params, prompts), checkpoints)

    rate = jax.vmap(family)(mixtures, weights, jnp.arange(POLICY_FAMILIES))
    return World(prompt_tokens(prompts.ids, config), rate)


@functools.cache
def fitted_values(config: "Config", narrow: bool) -> Any:
    """V_0 for the policies of this study: trained on other, supervised ones, never on one that is under RL."""
    head = fitted_head(config.head_updates, config.seed)

    @jax.jit
    def fit(key):
        world = policy_world(jax.random.fold_in(key, 0), config, narrow)
        return fit_v0(key, world, POLICY_FAMILIES, V0, head, config)

    return jax.device_get(fit(jax.random.key(2**16 + config.seed)))


ARMS = {
    "grpo_4": Numbers(index("group_mean"), by_std=1),
    "grpo_16": Numbers(index("group_mean"), SLOTS, SLOTS, by_std=1),
    "grpo_4, wide": Numbers(index("group_mean"), by_std=1, wide=1),
    "dr_grpo_4": Numbers(index("group_mean")),
    "dr_grpo_16": Numbers(index("group_mean"), SLOTS, SLOTS),
    "rloo_4": Numbers(index("others_mean")),
    "dapo_16": Numbers(index("group_mean"), SLOTS, SLOTS, by_std=1, drop_dead=1),
    "moving_average_4": Numbers(index("given")),
    "prior_4, v0": Numbers(index("prior_alone"), source=SOURCES.index("v0")),
    "static_1, v0": Numbers(index("fused"), 1, 1, source=SOURCES.index("v0")),
    "static_2, v0": Numbers(index("fused"), 2, 2, source=SOURCES.index("v0")),
    "static_4, v0": Numbers(index("fused"), source=SOURCES.index("v0")),
    "static_8, v0": Numbers(index("fused"), 8, 8, source=SOURCES.index("v0")),
    "beta_4, v0": Numbers(index("beta_posterior"), source=SOURCES.index("v0")),
    "osla, v0": Numbers(index("fused"), 4, SLOTS, source=SOURCES.index("v0")),
    "osla, of others, v0": Numbers(index("fused_of_others"), 4, SLOTS, source=SOURCES.index("v0")),
    "osla, confirmed, v0": Numbers(index("fused"), 4, SLOTS, confirm=1, source=SOURCES.index("v0")),
    "osla, plug-in, v0": Numbers(index("fused"), 4, SLOTS, plug_in=1, source=SOURCES.index("v0")),
    "beta, osla's draws, v0": Numbers(index("beta_posterior"), 4, SLOTS, source=SOURCES.index("v0")),
    "osla, v0 stale": Numbers(index("fused"), 4, SLOTS, source=SOURCES.index("v0"), refresh=10**6),
    "osla, v0 other world": Numbers(index("fused"), 4, SLOTS, source=SOURCES.index("v0, other world")),
    "osla, truth": Numbers(index("fused"), 4, SLOTS),
    "static_4, truth": Numbers(index("fused")),
    "osla, truth ± 0.5": Numbers(index("fused"), 4, SLOTS, sd=0.5),
    "osla, truth ± 1.0": Numbers(index("fused"), 4, SLOTS, sd=1.0),
    "osla, flipped": Numbers(index("fused"), 4, SLOTS, source=SOURCES.index("flipped")),
    "ppo_4": Numbers(index("given"), critic=1),
    "vapo_4": Numbers(index("given"), critic=1, learn_after=20),  # one token: its lambda by length has nothing to do
}


class State(NamedTuple):
    """All that training carries."""

    params: Any
    opt: Any
    critic: Any
    critic_opt: Any
    average: objectives.MovingAverage
    records: Any  # of V_0: features in the two worlds, and rates
    context: Any  # the records as V_0 reads them, `refresh` updates old at most
    key: jax.Array
    step: jax.Array
    spent: jax.Array  # rollouts


def policy_train(config: "Config", values: tuple[Any, Any]) -> Train:
    """The functions of one run.

    values: V_0's parameters, for its own world and for the other.
    """
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(b2=0.99))
    critic_optimiser = optax.adam(3e-3)
    candidates = WIDE * config.prompts

    def features(ids):
        tokens = prompt_tokens(ids, config)
        return tuple(adapter_features(v["adapter"], tokens, jnp.ones(tokens.shape[:2], bool)) for v in values)

    def bank(key):
        """Prompts to train on and held-out ones, the same for all arms of a seed."""
        return sample_prompts(jax.random.fold_in(key, 2**21), config, config.train_prompts), sample_prompts(
            jax.random.fold_in(key, 2**22), config, 512
        )

    def init(key):
        even = jnp.full(config.length, 1 / config.length)
        start = teach(jax.random.fold_in(key, 2**23), config, config.warm_start, even, jnp.ones(OPERATIONS))
        params = jax.tree.map(lambda x: x[-1], start)
        critic = network_init(jax.random.fold_in(key, 2**24), config, 1)
        shape = jax.eval_shape(features, jax.ShapeDtypeStruct((1, 1 + 2 * config.length), jnp.int32))
        empty = empty_records(
            config.contexts, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), shape)
        )
        return State(
            params,
            optimiser.init(params),
            critic,
            critic_optimiser.init(critic),
            objectives.moving_average_init(config.train_prompts),
            empty,
            empty,
            key,
            jnp.int32(0),
            jnp.float32(0),
        )

    def prior_of(state, key, ids, which, success, n):
        """V, in [-1, 1], from the arm's source."""
        told = jnp.clip(2 * success - 1 + n.sd * jax.random.normal(key, success.shape), -1.0, 1.0)
        visible = context_for(state.context, which).all(axis=0)
        labels = shown(state.context.rate, 0)
        asked = [
            2 * jax.nn.sigmoid(v0_from_features(v["head"], c, labels, f, visible, soft_labels=True)) - 1
            for v, c, f in zip(values, state.context.features, features(ids), strict=True)
        ]
        return jnp.stack([told, -told, *asked])[n.source]

    def update(state, n):
        pick_key, prior_key, draw_key = jax.random.split(jax.random.fold_in(state.key, state.step), 3)
        train, _ = bank(state.key)
        which = jax.random.choice(pick_key, config.train_prompts, (candidates,), replace=False)
        prompts = jax.tree.map(lambda x: x[which], train)
        logits = network(state.params, prompts.ids)
        answers = jax.random.categorical(draw_key, logits[:, None], shape=(candidates, SLOTS))
        rewards = jnp.where(answers == prompts.answer[:, None], 1.0, -1.0)
        success = right(state.params, prompts)
        prior = prior_of(state, prior_key, prompts.ids, which, success, n)
        count = count_of(rewards, prior, n)
        drawn = jnp.arange(SLOTS) < count[:, None]

        # The batch: the first prompts, all for a wide arm, the first mixed ones for DAPO. DAPO pays for what it looked
        # at in rounds of a batch until it had enough.
        mixed = (jnp.where(drawn, rewards, 1.0).min(1) < 0) & (jnp.where(drawn, rewards, -1.0).max(1) > 0)
        usable = jnp.where(n.drop_dead, mixed, True)
        wanted = jnp.where(n.wide, candidates, config.prompts)
        used = usable & (jnp.cumsum(usable) <= wanted)
        needed = jnp.where(used, jnp.arange(candidates), 0).max()
        looked = jnp.where(usable.sum() < wanted, candidates, (needed // config.prompts + 1) * config.prompts)
        paid = jnp.where(jnp.arange(candidates) < looked, count, 0).sum()
        mask = (drawn & used[:, None]).astype(jnp.float32)

        mean = mean_of(rewards, drawn)
        value = jnp.tanh(network(state.critic, prompts.ids)[:, 0])
        average = objectives.moving_average_baseline(state.average, which, fallback=mean)
        other = jnp.where(n.critic, value, average)
        advantage = advantage_of(rewards, mask, n, prior, other)
        weight = mask / jnp.maximum(mask.sum(1, keepdims=True), 1) / jnp.maximum(used.sum(), 1)

        def log_probs(params):
            return jnp.take_along_axis(jax.nn.log_softmax(network(params, prompts.ids)), answers, axis=1)

        old = jnp.take_along_axis(jax.nn.log_softmax(logits), answers, axis=1)

        def loss(params):
            losses = objectives.clipped_surrogate(log_probs(params) - old, advantage, *objectives.clip_bounds(0.2))
            return (weight * losses).sum()

        def step(carry, _):
            params, opt = carry
            gradient = jax.grad(loss)(params)
            change, opt = optimiser.update(gradient, opt)
            rate = n.lr * (state.step >= n.learn_after)
            params = optax.apply_updates(params, jax.tree.map(lambda x: -rate * x, change))
            return (params, opt), optax.global_norm(gradient)

        (params, opt), norms = jax.lax.scan(step, (state.params, state.opt), length=2)
        error = lambda p: (weight * (jnp.tanh(network(p, prompts.ids)) - rewards) ** 2).sum()  # noqa: E731
        change, critic_opt = critic_optimiser.update(jax.grad(error)(state.critic), state.critic_opt)
        critic = optax.apply_updates(state.critic, change)
        known = jax.tree.map(lambda x: x[: config.prompts], (which, features(prompts.ids), (mean + 1) / 2))
        records = record(state.records, known[0], known[1], known[2], state.step, used[: config.prompts])
        fresh = (state.step % n.refresh == 0) | (state.step == 1)
        context = jax.tree.map(lambda new, old: jnp.where(fresh, new, old), records, state.context)
        average = objectives.moving_average_update(state.average, which, mean, valid=used)
        spent = state.spent + paid
        rows = used.astype(jnp.float32)
        entropy = -(jax.nn.softmax(logits) * jax.nn.log_softmax(logits)).sum(1)
        metrics = {
            "reward": (rows * success).sum() / rows.sum(),
            "rollouts": paid / config.prompts,
            "dead groups": (rows * (jnp.abs(mask * advantage).max(1) == 0)).sum() / rows.sum(),
            "gradient norm": norms[0],
            "entropy": (rows * entropy).sum() / rows.sum(),
            "prior's error": jnp.sqrt((rows * (prior - 2 * success + 1) ** 2).sum() / rows.sum()),
            "rank correlation": rank_correlation(count, jnp.abs(prior - 2 * success + 1)),
        }
        state = State(params, opt, critic, critic_opt, average, records, context, state.key, state.step + 1, spent)
        return state, metrics

    def advance(state, n):
        return jax.lax.scan(lambda s, _: update(s, n), state, length=min(config.chunk, config.updates))

    def evaluate(state, n):
        _, held_out = bank(state.key)
        return {"reward": right(state.params, held_out).mean(), "spent": state.spent}

    return Train(init, advance, evaluate)
