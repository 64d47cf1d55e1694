"""Tasks of the study v05_language: environments, the policy before RL, and what V_0 learns and reads of them.

V_0 learns from policies that are never trained by RL: supervised transformers at several points of their training, or,
where a pretrained model acts, policies drawn at random over the states of a sentence encoder.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rollax import envs, objectives
from rollax.agents import LanguageModel, TransformerConfig, demonstrate, load_sentence_encoder, score, transformer
from rollax.agents.sentence_encoder import encoder_states, tokenise
from rollax.agents.value_model import adapter_features
from rollax.envs import Environment
from rollax.experiments.harness.language_task import load_language_task
from rollax.experiments.harness.supervised import cached, fit
from rollax.experiments.v05_values import TOKEN_WIDTH, V0, World, fit_v0, fitted_head

if TYPE_CHECKING:
    from rollax.experiments.v05_language import Config

FAMILIES, CHECKPOINTS, POOL = 6, 6, 512  # of the supervised policies that V_0 learns from, and their prompts


class Task(NamedTuple):
    """Environments, and the policy before RL."""

    env: Environment
    held_out: Environment
    model: LanguageModel
    start: Callable[[jax.Array], Any]
    features: Callable[[Any, Any], jax.Array]  # of V_0's frozen adapter: (state, observation) -> [P, F]
    head: Any  # of V_0
    prefix: jax.Array | None = None
    shapes: Any = None  # of a pretrained model's parameters
    mesh: Any = None


def arithmetic(level_weights=None) -> Environment:
    """Sums and differences, most of one digit: what is learnt of a prompt helps when it comes again."""
    weights = jnp.array([3.0, 1.0]) if level_weights is None else level_weights
    return envs.arithmetic("+-", 2, split="all", level_weights=weights)


TASKS: dict[str, Callable[..., Environment]] = {
    "arithmetic": arithmetic,
    "countdown": lambda level_weights=None: envs.countdown(3, 20, 99, split="all"),
}


def small_model(config: "Config", env: Environment) -> LanguageModel:
    return transformer(TransformerConfig(len(env.spec.vocab), config.width, config.layers, config.heads))


def imitate(key: jax.Array, params: Any, model: LanguageModel, env: Environment, steps: int) -> Any:
    """Supervised steps on the expert's answers."""

    def loss(params, key):
        seen = demonstrate(key, env, env.expert, 128)
        return objectives.aggregate(-score(model, params, seen, env)[0], seen.mask, "token_mean")

    return fit(key, params, loss, steps=steps, optimizer=optax.adamw(1e-3))


def own_tokens(ids: jax.Array, vocab: int) -> jax.Array:
    """The study's own encoder: fixed random vectors of token and place, `[P, T, TOKEN_WIDTH]`."""
    table = jax.random.normal(jax.random.key(17), (vocab + ids.shape[1], TOKEN_WIDTH))
    return table[ids] + table[vocab + jnp.arange(ids.shape[1])]


def supervised_world(key: jax.Array, config: "Config") -> World:
    """How often supervised transformers, at six points of their training, answer a pool of prompts as the expert does.

    Families differ in their first weights and in the levels that they see.
    """
    pool_key, level_key, teach_key = jax.random.split(key, 3)
    env = TASKS[config.task]()
    model = small_model(config, env)
    pool = demonstrate(pool_key, env, env.expert, POOL)
    steps = max(5 * config.warm_start // (4 * CHECKPOINTS), 1)  # to a little beyond the start of RL

    def family(i, levels):
        env = TASKS[config.task](levels)

        def part(params, j):
            params = imitate(jax.random.fold_in(jax.random.fold_in(teach_key, i), j), params, model, env, steps)
            log_prob, _ = score(model, params, pool, env)
            return params, jnp.exp(log_prob.sum(axis=1))

        params = model.init(jax.random.fold_in(teach_key, i))
        return jax.lax.scan(part, params, jnp.arange(CHECKPOINTS))[1]

    levels = jax.random.dirichlet(level_key, jnp.ones(2), (FAMILIES,))
    rate = jax.vmap(family)(jnp.arange(FAMILIES), levels)
    return World(own_tokens(pool.tokens[:, : env.spec.max_observation], len(env.spec.vocab)), rate)


def small_task(config: "Config") -> Task:
    """The transformer after a supervised start. V_0 has learnt from other supervised ones, never from one under RL."""
    env = TASKS[config.task]()  # evaluated on the prompts that it is trained on: no other prompt is like them
    model = small_model(config, env)
    head = fitted_head(config.head_updates, config.seed)
    of_start = {field: getattr(config, field) for field in ["task", "layers", "width", "heads", "warm_start"]}
    of_start["recipe"] = 2  # to be raised when what makes the two changes
    fields = "head_updates value_updates value_lr contexts queries tasks soft_context seed"
    of_values = of_start | {field: getattr(config, field) for field in fields.split()}

    def begin():
        return imitate(jax.random.key(1), model.init(jax.random.key(0)), model, env, config.warm_start)

    def fitted():
        key = jax.random.key(2**16 + config.seed)
        return fit_v0(key, supervised_world(jax.random.fold_in(key, 0), config), FAMILIES, V0, head, config)

    params = cached("v05-language", of_start, begin)
    values = cached("v05-language-v0", of_values, fitted)

    def start(key):
        del key  # one start for all seeds
        return jax.tree.map(jnp.asarray, params)

    def features(state, observation):
        tokens = own_tokens(observation.ids, len(env.spec.vocab))
        return adapter_features(values["adapter"], tokens, jnp.ones(tokens.shape[:2], bool))

    return Task(env, env, model, start, features, head)


def random_world(key: jax.Array, tokens: jax.Array, directions: int = 8) -> World:
    """Policies drawn at random: success is logistic in a few leading directions of the encoder's mean states."""
    mean = tokens.mean(axis=1)
    left, scale, _ = jnp.linalg.svd(mean - mean.mean(axis=0), full_matrices=False)
    leading = left[:, :directions] * len(mean) ** 0.5  # [P, directions], each of variance 1
    weight_key, level_key = jax.random.split(key)
    weights = 1.5 * jax.random.normal(weight_key, (4 * FAMILIES, directions)) * scale[:directions] / scale[0]
    level = jax.random.normal(level_key, (4 * FAMILIES, 1, 1)) + jnp.linspace(-1.5, 1.5, CHECKPOINTS)[:, None]
    return World(tokens, jax.nn.sigmoid((weights @ leading.T)[:, None] + level))


def encoded(config: "Config", texts: Sequence[str]) -> jax.Array:
    """The encoder's token states, `[P, T, D]`, padded with zeros on the left, so that the last one is real."""
    encoder = load_sentence_encoder(config.encoder)
    ids, mask = tokenise(encoder, texts)
    states = jax.jit(lambda ids, mask: encoder_states(encoder.params, ids, mask, norm_eps=encoder.norm_eps))
    parts = [states(ids[i : i + 64], mask[i : i + 64]) for i in range(0, len(ids), 64)]
    longest = mask.sum(axis=1).max()
    kept = np.where(mask[..., None], np.concatenate(parts), 0.0)[:, :longest]
    return jnp.stack([np.roll(row, longest - count, axis=0) for row, count in zip(kept, mask.sum(axis=1), strict=True)])


def pretrained_task(config: "Config") -> Task:
    """A pretrained model. V_0 reads questions with a sentence encoder, and has learnt from random policies on them."""
    loaded = load_language_task(config.model, config.task, mesh=config.mesh, max_answer=4, dtype=config.dtype)
    tokens = encoded(config, [question.text for question in loaded.questions.train])
    shape = dataclasses.replace(V0, token_width=tokens.shape[-1])
    head = fitted_head(config.head_updates, config.seed)

    @jax.jit
    def features_of(key, tokens):
        world = random_world(jax.random.fold_in(key, 0), tokens)
        values = fit_v0(key, world, len(world.rate), shape, head, config)
        return adapter_features(values["adapter"], tokens, jnp.ones(tokens.shape[:2], bool))

    table = features_of(jax.random.key(2**16 + config.seed), tokens)
    return Task(
        loaded.env,
        loaded.held_out,
        loaded.model,
        lambda key: loaded.take(),
        lambda state, observation: table[state.row],
        head,
        loaded.prefix,
        loaded.shapes,
        loaded.mesh,
    )
