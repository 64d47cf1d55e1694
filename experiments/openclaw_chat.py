"""Training by talking, for the study openclaw_rl: sessions, what the judge makes of them, one step on a batch of turns.

Methods of OpenClaw-RL (arXiv 2603.10165) are rows of one program: the votes, version 1's gap of sampled tokens and
version 2's top-k distillation with their weights, and how a hint is chosen, are numbers that may be traced.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rollax import objectives
from rollax.agents import Service, Turn, session_service, simulate
from rollax.envs.persona_chat import (
    FEEDBACK,
    PAD,
    PERSONA,
    PERSONAS,
    Hints,
    Reaction,
    hints,
    judge,
    persona_chat,
    reset,
    write_hint,
)
from rollax.experiments.harness.loop import Results, Train
from rollax.experiments.harness.report import Episode
from rollax.experiments.openclaw_base import (
    Calibration,
    base_model,
    calibrate,
    chat_model,
    first_replies,
    reply_log_probs,
    sample_replies,
)
from rollax.objectives.opd import SELECTIONS

if TYPE_CHECKING:
    from rollax.experiments.openclaw_rl import Config

VOTES = 3
CLIP = (0.2, 0.28)
KS = (2, 4, 8)
IN_A_ROW = 3
OLD_WISH, NEW_WISH = 0, 2  # of the user who changes their mind: first no bold type, then a warm word


class Numbers(NamedTuple):
    """What an arm does, all traced."""

    w_b: float = 0.0  # of the votes
    w_o: float = 0.0  # version 1: of the gap of the sampled tokens
    w_opd: float = 0.0  # version 2: of the loss over the top k
    select: int = SELECTIONS.index("sequence")
    k: int = KS.index(4)
    diff_clip: float = np.inf  # C, of version 2
    self_teacher: int = 0  # the teacher is the current policy, else the frozen base
    flip: float = 0.05  # of a vote
    p_dir: float = 0.4  # probability that a complaint about style names the preference
    lr: float = 0.0
    judge_delay: int = 0  # ticks, where serving and training run side by side
    train_delay: int = 1


class Batch(NamedTuple):
    """Judged turns. Alphabet: `B` turns, `L` tokens of a reply, `M` candidate hints.

    Attributes:
      context, reply: int32 `[B, 10]`, `[B, L]`.
      mask: bool `[B, L]`, the reply's own tokens; all false for a turn that was not made.
      reward: float32 `[B]`, the majority of the votes.
      scored: bool `[B]`, the turn trains by its reward.
      hints: int32 `[B, M, 2]`, PAD behind the end.
      hinted: bool `[B, M]`, the candidate exists.
    """

    context: jax.Array
    reply: jax.Array
    mask: jax.Array
    reward: jax.Array
    scored: jax.Array
    hints: jax.Array
    hinted: jax.Array


class Learner(NamedTuple):
    """What training carries."""

    params: Any
    opt: Any
    key: jax.Array
    updates: jax.Array


class State(NamedTuple):
    """Of a run; the calibration is that of the base on this seed's prompts."""

    learner: Learner
    key: jax.Array
    calibration: Calibration


# --- One step on a batch --------------------------------------------------------------------------------------------


def optimiser_of(config: "Config") -> optax.GradientTransformation:
    """Up to the learning rate, which is traced."""
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), optax.scale_by_adam(b2=0.98))


class Targets(NamedTuple):
    """What the losses of a batch are made of, gradients stopped.

    Attributes:
      old: `[B, L]`, log-probs of the sampled tokens under the policy before the step.
      advantage: `[B, L]`, `w_b r + w_o gap`.
      top: `objectives.TopK`, over the k best tokens of the policy.
      directed: bool `[B, L]`, tokens with a teacher.
      choice: int32 `[B, L]`, the hint that teaches each token.
      entropy: `[B, L]`, nats.
    """

    old: jax.Array
    advantage: jax.Array
    top: objectives.TopK
    directed: jax.Array
    choice: jax.Array
    entropy: jax.Array


def of_sampled(log_probs: jax.Array, reply: jax.Array) -> jax.Array:
    return jnp.take_along_axis(log_probs, reply[..., None], axis=-1)[..., 0]


def best(log_probs: jax.Array, k: jax.Array) -> jax.Array:
    """Log-probs of the `KS[k]` best tokens, minus infinity elsewhere: a top k whose k is traced."""
    ordered = jax.lax.top_k(log_probs, max(KS))[0]
    least = ordered[..., jnp.asarray(KS)[k] - 1, None]
    return jnp.where(log_probs >= least, log_probs, -jnp.inf)


def targets_of(old: jax.Array, log_probs_of: Callable, teacher, batch: Batch, key: jax.Array, n: Numbers) -> Targets:
    """What the batch teaches a policy: it is read again with every candidate hint in its context.

    Args:
      old: `[B, L, V]`, log-probs of that policy.
      log_probs_of: `log_probs_of(params, context, reply) -> [B, L, V]`.
      teacher: parameters.
    """
    turns, candidates = batch.hinted.shape
    told = jax.vmap(jax.vmap(write_hint, in_axes=(None, 0)))(batch.context, batch.hints)  # [B, M, 10]
    told = jnp.moveaxis(told, 1, 0).reshape(candidates * turns, -1)
    with_hint = log_probs_of(teacher, told, jnp.tile(batch.reply, (candidates, 1)))
    with_hint = with_hint.reshape(candidates, *old.shape)

    overlap = jnp.stack([objectives.hint_overlap(old, with_hint, k) for k in KS])[n.k]
    length = jnp.sum(batch.hints != PAD, axis=-1).T
    select = functools.partial(
        objectives.select_hint, overlap, batch.mask, valid=batch.hinted.T, length=length, key=key
    )
    choice = jax.lax.switch(n.select, [functools.partial(select, mode=mode) for mode in SELECTIONS])
    chosen = jnp.take_along_axis(with_hint, choice[None, ..., None], axis=0)[0]

    has_hint = batch.hinted.any(axis=1)
    old_lp = of_sampled(old, batch.reply)
    gap = objectives.token_gap_advantage(of_sampled(chosen, batch.reply), old_lp, batch.mask)
    return jax.lax.stop_gradient(
        Targets(
            old=old_lp,
            advantage=objectives.combined_advantage(batch.reward, gap, batch.scored, has_hint, n.w_b, n.w_o),
            top=objectives.topk_advantage(best(old, n.k), chosen, k=max(KS), diff_clip=n.diff_clip),
            directed=batch.mask & has_hint[:, None],
            choice=choice,
            entropy=-jnp.sum(jnp.exp(old) * old, axis=-1),
        )
    )


def batch_loss(log_probs: jax.Array, batch: Batch, targets: Targets, n: Numbers) -> jax.Array:
    """`L_RL + w_opd L_OPD`, divided by all turns of the batch, those that do not train included.

    Args:
      log_probs: `[B, L, V]`, of the policy that is trained.
    """
    turns = batch.reward.shape[0]
    rl = objectives.asymmetric_ppo(of_sampled(log_probs, batch.reply), targets.old, targets.advantage, batch.mask, CLIP)
    of_top = jnp.take_along_axis(log_probs, targets.top.index, axis=-1)
    opd, _ = objectives.topk_surrogate(of_top, targets.top, targets.directed, clip=CLIP)
    mean = functools.partial(objectives.sample_mean, batch_size=turns)
    return mean(rl, batch.mask) + n.w_opd * mean(opd, targets.directed)


def make_learn(config: "Config", base) -> Callable[[Learner, Batch, Numbers], tuple[Learner, dict[str, jax.Array]]]:
    """`learn(learner, batch, numbers)`: one gradient step.

    Args:
      base: parameters of the frozen teacher.
    """
    model, optimiser = chat_model(config), optimiser_of(config)
    log_probs_of = functools.partial(reply_log_probs, model, temperature=config.temperature)

    def learn(learner, batch, n):
        teacher = jax.tree.map(lambda own, first: jnp.where(n.self_teacher, own, first), learner.params, base)
        key = jax.random.fold_in(learner.key, learner.updates)

        def loss(params):
            # One step a batch, so the policy before the step is the one that is differentiated: all ratios are 1.
            log_probs = log_probs_of(params, batch.context, batch.reply)
            targets = targets_of(jax.lax.stop_gradient(log_probs), log_probs_of, teacher, batch, key, n)
            return batch_loss(log_probs, batch, targets, n), targets

        grads, targets = jax.grad(loss, has_aux=True)(learner.params)
        change, opt = optimiser.update(grads, learner.opt)
        params = optax.apply_updates(learner.params, jax.tree.map(lambda x: -n.lr * x, change))
        of_candidate = targets.choice[..., None] == jnp.arange(batch.hinted.shape[1])
        shares = objectives.masked_mean(of_candidate, targets.directed[..., None], axis=1)  # [B, M]
        told = {
            "reward": objectives.masked_mean(batch.reward, batch.mask.any(axis=1)),
            "scored turns": jnp.sum(batch.scored & (batch.reward != 0), dtype=jnp.float32),
            "hinted turns": jnp.sum(batch.hinted.any(axis=1), dtype=jnp.float32),
            "chosen hints": shares.sum(axis=0),
            "entropy": objectives.masked_mean(targets.entropy, batch.mask),
            "gradient norm": optax.global_norm(grads),
        }
        return Learner(params, opt, learner.key, learner.updates + 1), told

    return learn


# --- Sessions -------------------------------------------------------------------------------------------------------


def judged(keys: jax.Array, info: dict[str, jax.Array], n: Numbers, config: "Config") -> tuple[jax.Array, Hints]:
    """The majority of the votes `[B]` and the candidate hints of turns, from the users' reactions."""
    reaction = Reaction(info["satisfied"], info["directive"], info["reaction"])
    vote = functools.partial(judge, votes=VOTES, flip=n.flip, ambiguous=config.ambiguous)
    votes = jax.vmap(vote)(keys, reaction)
    return objectives.majority_vote(votes, jnp.ones(votes.shape, bool)), jax.vmap(hints)(reaction)


def play_sessions(config: "Config", key, params, n: Numbers, persona=None, preference=None):
    """Sessions of S users side by side, judged turn by turn.

    Args:
      persona, preference: int `[]` of all users, see `persona_chat.reset`.

    Returns:
      (`Batch` of S * turns, session by session; the environment's info `[S, turns]` with `persona`; bool `[S, turns]`,
      the turn was made).
    """
    model = chat_model(config)
    env = persona_chat(n.p_dir, max_turns=config.turns)
    env = env._replace(reset=functools.partial(reset, persona=persona, preference=preference))
    reset_key, act_key, step_key, judge_key = jax.random.split(key, 4)
    at_turn = lambda key, index: jax.random.split(jax.random.fold_in(key, index), config.sessions)  # noqa: E731

    def turn(carry, index):
        session, seen, alive = carry
        said = sample_replies(model, at_turn(act_key, index), params, seen.ids, config.temperature)
        session, step = jax.vmap(env.step)(at_turn(step_key, index), session, said.ids)
        goes_on = alive & ~(step.terminated | step.truncated)
        return (session, step.observation, goes_on), (seen.ids, said.ids, said.mask & alive[:, None], alive, step.info)

    begin = (*jax.vmap(env.reset)(at_turn(reset_key, 0)), jnp.ones(config.sessions, bool))
    _, played = jax.lax.scan(turn, begin, jnp.arange(config.turns))
    context, reply, mask, made, info = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), played)
    flatten = functools.partial(jax.tree.map, lambda x: x.reshape(made.size, *x.shape[2:]))
    reward, hints = judged(jax.random.split(judge_key, made.size), flatten(info), n, config)
    reward = jnp.where(made, reward.reshape(made.shape), 0.0)
    # A user answers every reply, so that each turn has its next state.
    scored = objectives.session_mask(reward, made, made.sum(axis=1))
    hinted = (hints.score == 1) & made.reshape(-1, 1)
    batch = Batch(*flatten((context, reply, mask)), reward.ravel(), scored.ravel(), hints.ids, hinted)
    return batch, info | {"persona": context[..., 1] - PERSONA}, made


def start(config: "Config", base, key: jax.Array) -> State:
    learner_key, calibration_key = jax.random.split(jax.random.fold_in(key, 2**20))
    learner = Learner(base, optimiser_of(config).init(base), learner_key, jnp.int32(0))
    return State(learner, key, calibrate(calibration_key, config, base, config.eval_prompts))


def chat_train(config: "Config", base=None) -> Train:
    """The functions of one run: sessions, a step on what came of them, first replies to held-out users.

    In part "talk" all users are one student, who changes their mind after half of the updates.
    """
    base = base_model(config) if base is None else base
    model, learn, talk = chat_model(config), make_learn(config, base), config.part == "talk"

    def update(state, n):
        key = jax.random.fold_in(state.key, state.learner.updates)
        one = {}
        if talk:
            one = dict(persona=0, preference=jnp.where(state.learner.updates < config.updates // 2, OLD_WISH, NEW_WISH))
        batch, info, made = play_sessions(config, key, state.learner.params, n, **one)
        learner, told = learn(state.learner, batch, n)
        told |= {
            "first reply pleased": info["satisfied"][:, 0],
            "persona": info["persona"][:, 0],
            "reply length": objectives.masked_mean(batch.mask.sum(axis=1), made.ravel()),
            "tokens": batch.mask.sum(),
        }
        return state._replace(learner=learner), told

    def advance(state, n):
        return jax.lax.scan(lambda s, _: update(s, n), state, length=min(config.chunk, config.updates))

    def evaluate(state, n):
        del n
        key = jax.random.fold_in(state.key, 2**21)  # the same users and draws at every evaluation
        seen = first_replies(key, model, state.learner.params, config.eval_prompts, temperature=config.temperature)
        told = evaluated(seen, state.calibration)
        if talk:
            wishes = {"old wish": OLD_WISH, "new wish": NEW_WISH}
            told |= {name: seen.style[0, :, wish].mean(dtype=jnp.float32) for name, wish in wishes.items()}
        return told

    return Train(functools.partial(start, config, base), advance, evaluate)


def evaluated(seen, calibration: Calibration) -> dict[str, jax.Array]:
    """Shares of first replies: satisfied (all and by persona), right, cut at the limit; mean length; the base's own."""
    mean = lambda x: x.mean(dtype=jnp.float32)  # noqa: E731
    pleased = seen.satisfied(jnp.arange(len(PERSONAS)))
    told = {
        "satisfied": mean(pleased),
        "content": mean(seen.content),
        "length": mean(seen.length),
        "cut": mean(seen.cut),
    }
    told |= {f"satisfied, {name}": mean(pleased[i]) for i, name in enumerate(PERSONAS)}
    return told | {f"base, {name}": value.mean() for name, value in calibration._asdict().items()}


# --- Serving and training side by side ------------------------------------------------------------------------------


def asynchronous_train(config: "Config", push: str, base=None) -> Train:
    """The functions of one run of `agents.simulate`; a tick takes the place of an update.

    All ticks are one call of `advance`: the loops have no state between two calls.
    """
    base = base_model(config) if base is None else base
    model, learn = chat_model(config), make_learn(config, base)

    def service_of(n: Numbers) -> Service:
        def act(keys, learner, observation):
            said = sample_replies(model, keys, learner.params, observation.ids, config.temperature)
            return said.ids, said.mask

        users = session_service(persona_chat(n.p_dir, max_turns=config.turns), act)

        def turn(keys, learner, sessions):
            sessions, turns, info = users.turn(keys, learner, sessions)
            context = turns.observation.ids
            info = {
                "pleased": info["satisfied"],
                "first": context[:, FEEDBACK.start] == PAD,
                "persona": context[:, 1] - PERSONA,
                "tokens": turns.extras.sum(axis=1),
            }
            return sessions, turns, info

        return Service(users.reset, turn)

    def advance(state, n):
        def judge(keys, turn: Turn):
            reward, hints = judged(keys, turn.step.info, n, config)
            sample = Batch(
                turn.observation.ids, turn.action, turn.extras, reward, reward != 0, hints.ids, hints.score == 1
            )
            return sample, jnp.ones(reward.shape, bool)  # a user answers every reply

        learner, trace = simulate(
            state.key,
            state.learner,
            service_of(n),
            judge,
            functools.partial(learn, n=n),
            slots=config.slots,
            ticks=config.updates,
            batch=config.sessions * config.turns,
            judge_delay=n.judge_delay,
            train_delay=n.train_delay,
            push=push,
            max_judge_delay=config.longest_delay,
        )
        told = {
            "first reply pleased": trace.info["pleased"],
            "persona": jnp.where(trace.info["first"] & trace.active, trace.info["persona"], -1),
            "served": trace.served,
            "paused": trace.paused.astype(jnp.float32),
            "version": trace.version,
            "updated": trace.updated.astype(jnp.float32),
            "staleness": trace.staleness,
            "tokens": jnp.where(trace.active, trace.info["tokens"], 0).sum(axis=1),
        }
        return state._replace(learner=learner), told

    return chat_train(config, base)._replace(advance=advance)


# --- Measures -------------------------------------------------------------------------------------------------------


def sessions_to_align(pleased: np.ndarray, persona: np.ndarray, whose: int) -> np.ndarray:
    """Sessions of a persona until the first reply pleased three times in a row, these included, `[seeds]`.

    Where that never came, all sessions of the persona: a lower bound.

    Args:
      pleased: bool `[seeds, updates, S]`, in the order of the sessions.
      persona: int `[seeds, updates, S]`; -1 is no session.
    """
    found = []
    for good, who in zip(pleased.reshape(len(pleased), -1), persona.reshape(len(persona), -1), strict=True):
        good = good[who == whose] > 0
        runs = np.convolve(good, np.ones(IN_A_ROW), "valid") if good.size >= IN_A_ROW else np.zeros(0)
        ends = np.flatnonzero(runs == IN_A_ROW)
        found.append(ends[0] + IN_A_ROW if ends.size else good.size)
    return np.array(found, np.float64)


def align(results: Results, row: str, whose: int | None = None) -> np.ndarray:
    """`sessions_to_align` of a row, `[seeds]`: of one persona, or the mean over those that came."""
    told = results.train[row]
    came = np.unique(told["persona"][told["persona"] >= 0]) if whose is None else [whose]
    return np.mean([sessions_to_align(told["first reply pleased"], told["persona"], i) for i in came], axis=0)


def align_again(results: Results, row: str) -> np.ndarray:
    """Sessions after the change of mind until three in a row pleased, `[seeds]`."""
    told = results.train[row]
    half = told["persona"].shape[1] // 2
    return sessions_to_align(told["first reply pleased"][:, half:], told["persona"][:, half:], 0)


def exact_share(results: Results, row: str, candidate: int = 0) -> np.ndarray:
    """Share of a candidate among the hints that taught, `[seeds]`; NaN where none did. Candidate 0 is the exact one."""
    told = results.train[row]
    taught = told["hinted turns"].sum(axis=1)
    return np.where(taught > 0, told["chosen hints"].sum(axis=1)[:, candidate] / np.maximum(taught, 1), np.nan)


# --- To look at -----------------------------------------------------------------------------------------------------


def watch_sessions(config: "Config", params, key: jax.Array, title: str) -> list[Episode]:
    """One whole session of each persona, or of the user who changes their mind before and after, in words."""
    model = chat_model(config)
    env = persona_chat(1.0, max_turns=config.turns)  # users who say what they miss

    @jax.jit
    def say(key, context):
        return sample_replies(model, key[None], params, context[None], config.temperature).ids[0]

    react, episodes = jax.jit(env.step), []
    users = ((0, OLD_WISH), (0, NEW_WISH)) if config.part == "talk" else tuple((i, i) for i in range(len(PERSONAS)))
    for persona, preference in users:
        key, reset_key = jax.random.split(key)
        session, observation = reset(reset_key, persona, preference)
        frames, total = [], 0.0
        while not bool(session.done):
            key, reply_key, step_key = jax.random.split(key, 3)
            session, step = react(step_key, session, say(reply_key, observation.ids))
            observation, total = step.observation, total + float(step.reward)
            frames.append(env.render(session))
        episodes.append(Episode(f"{title}, {PERSONAS[persona]}", frames, total))
    return episodes
