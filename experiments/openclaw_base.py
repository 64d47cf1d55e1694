"""The base model of the study openclaw_rl: a transformer that can talk, obeys hints, and does not know what users like.

It imitates procedural replies of persona chat, whose default style is the unwanted one, and in which a hint that stands
in the context is obeyed (arXiv 2603.10165): the knowledge is there, the context is missing.
"""

import functools
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rollax import objectives
from rollax.agents import LanguageModel, Sampling, TransformerConfig, generate, transformer
from rollax.envs.persona_chat import (
    CONTEXT,
    EOS,
    HINT,
    PAD,
    PERSONAS,
    REPLY,
    VOCAB,
    content_ok,
    pretraining_example,
    reset,
    style_ok,
    write_hint,
)
from rollax.experiments.harness.supervised import cached, fit

if TYPE_CHECKING:
    from rollax.experiments.openclaw_rl import Config


def chat_model(config: "Config") -> LanguageModel:
    return transformer(TransformerConfig(len(VOCAB), config.width, config.layers, config.heads))


# --- Replies --------------------------------------------------------------------------------------------------------


class Reply(NamedTuple):
    """What was answered: ids int32 `[B, 12]`, PAD behind the end; mask bool `[B, 12]`, the end token included."""

    ids: jax.Array
    mask: jax.Array


def sample_replies(
    model: LanguageModel, keys: jax.Array, params, context: jax.Array, temperature: float | jax.Array = 1.0
) -> Reply:
    """One reply to each context.

    Args:
      keys: `[B]`.
      context: int32 `[B, 10]`, all of it read, PAD in free feedback slots too.
    """
    length = jnp.sum(context >= 0, axis=1, dtype=jnp.int32)  # all ten; XLA would fold a constant, row by row, for long
    said = generate(
        model,
        params,
        keys,
        context,
        length,
        max_new_tokens=REPLY,
        stop_ids=(EOS,),
        pad_id=PAD,
        sampling=Sampling(temperature),
        early_exit=False,
    )
    return Reply(said.tokens, said.mask)


def reply_log_probs(
    model: LanguageModel, params, context: jax.Array, reply: jax.Array, temperature: float | jax.Array = 1.0
) -> jax.Array:
    """Log-probs of all tokens at every place of a reply, float32 `[B, 12, V]`.

    Args:
      context: int32 `[B, 10]`.
      reply: int32 `[B, 12]`.
    """
    tokens = jnp.concatenate([context, reply[:, :-1]], axis=1)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    logits, _ = model.apply(params, tokens, positions)
    return jax.nn.log_softmax(logits[:, CONTEXT - 1 :].astype(jnp.float32) / temperature)


# --- Pre-training ---------------------------------------------------------------------------------------------------


def pretrain(key: jax.Array, config: "Config"):
    """Parameters after imitation of `persona_chat.pretraining_example`."""
    model = chat_model(config)

    def loss(params, key):
        context, reply = jax.vmap(pretraining_example)(jax.random.split(key, config.base_batch))
        stops = reply == EOS
        mask = jnp.cumsum(stops, axis=1) - stops == 0
        log_probs = reply_log_probs(model, params, context, reply)
        said = jnp.take_along_axis(log_probs, reply[..., None], axis=-1)[..., 0]
        return objectives.aggregate(-said, mask, "token_mean")

    init_key, key = jax.random.split(key)
    schedule = optax.cosine_decay_schedule(config.base_lr, config.base_steps)
    return fit(key, model.init(init_key), loss, steps=config.base_steps, optimizer=optax.adam(schedule))


def base_model(config: "Config"):
    """`pretrain` from the configuration's seed, or what an earlier run with the same settings kept."""
    fields = ("width", "layers", "heads", "base_batch", "base_lr", "base_steps", "base_seed")
    wanted = {field: getattr(config, field) for field in fields}
    kept = cached("openclaw", wanted, functools.partial(pretrain, jax.random.key(config.base_seed), config))
    return jax.tree.map(jnp.asarray, kept)


# --- How good first replies are -------------------------------------------------------------------------------------


class FirstReplies(NamedTuple):
    """First replies to P users of each persona, `[3, P]`.

    Attributes:
      style: bool `[3, P, 3]`, whether the style is that of each of the three preferences.
      content: bool, the answer is right.
      length: int32, tokens with the end.
      cut: bool, the reply ran into the limit.
    """

    style: jax.Array
    content: jax.Array
    length: jax.Array
    cut: jax.Array

    def satisfied(self, preference: jax.Array) -> jax.Array:
        """bool `[3, P]`: of users whose preference is `preference` `[3]`."""
        return jnp.take_along_axis(self.style, preference[:, None, None], axis=2)[..., 0] & self.content


def first_replies(
    key: jax.Array, model: LanguageModel, params, prompts: int, *, hinted=False, temperature: float | jax.Array = 1.0
) -> FirstReplies:
    """Asks `prompts` users of each persona.

    Args:
      hinted: bool, `[]` or `[P]`, whose context names the persona's own preference, as a teacher's does.
    """
    reset_key, reply_key = jax.random.split(key)
    persona = jnp.repeat(jnp.arange(len(PERSONAS)), prompts)
    session, observation = jax.vmap(reset)(jax.random.split(reset_key, persona.size), persona)
    told = jnp.tile(jnp.broadcast_to(jnp.asarray(hinted), prompts), len(PERSONAS))
    hint = jnp.where(told, HINT + persona, PAD)
    context = jax.vmap(write_hint)(observation.ids, hint[:, None])
    reply = sample_replies(model, jax.random.split(reply_key, persona.size), params, context, temperature)

    def style(session, ids):
        of = lambda preference: style_ok(session._replace(preference=preference), ids)  # noqa: E731
        return jax.vmap(of)(jnp.arange(len(PERSONAS)))

    seen = FirstReplies(
        style=jax.vmap(style)(session, reply.ids),
        content=jax.vmap(content_ok)(session, reply.ids),
        length=reply.mask.sum(axis=1),
        cut=~(reply.ids == EOS).any(axis=1),
    )
    return jax.tree.map(lambda x: x.reshape(len(PERSONAS), prompts, *x.shape[1:]), seen)


class Calibration(NamedTuple):
    """Of a base model, float32 `[3]`, a share of first replies for each persona: what RL starts from."""

    alone: jax.Array
    hinted: jax.Array
    content: jax.Array


def calibrate(key: jax.Array, config: "Config", params, prompts: int = 512) -> Calibration:
    """Satisfied without a hint (.07, .06, .02 by the law that is imitated) and with one, and right answers."""
    told = jnp.arange(2 * prompts) >= prompts
    seen = first_replies(key, chat_model(config), params, 2 * prompts, hinted=told, temperature=config.temperature)
    pleased = seen.satisfied(jnp.arange(len(PERSONAS)))
    mean = lambda x: x.mean(axis=1, dtype=jnp.float32)  # noqa: E731
    return Calibration(mean(pleased[:, :prompts]), mean(pleased[:, prompts:]), mean(seen.content[:, :prompts]))
