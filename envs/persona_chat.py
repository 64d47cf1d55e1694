"""Persona chat: three users whose unspoken wish about style shows only in how they take a reply.

The personal track of OpenClaw-RL (arXiv 2603.10165) in 27 tokens: a user asks, complains or thanks, sometimes says what
was wrong, and a judge and a hint writer read that next state. Everything is ground truth but for explicit keys.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rollax.envs.environment import Environment, Step, Tokens, TokenSpec
from rollax.envs.hidden_clusters import check_share
from rollax.envs.tokens import cut_turn

PERSONAS = ("student", "assistant", "teacher")
VOCAB = (
    *("<pad>", "<bos>", "<reply>", "<eos>", "redo", "thanks", "**bold**", "well-done!", "detail"),
    *"0123456789",
    *(f"{persona}:" for persona in PERSONAS),
    *("no-bold", "longer", "be-warm", "repeat-it", "detail-first"),
)
PAD, BOS, ASSIST, EOS, REDO, THANKS, BOLD, WARM, DETAIL, ZERO = range(10)
PERSONA = ZERO + 10  # the token of persona p is PERSONA + p
NO_BOLD, LONG, BE_WARM, REPEAT, DETAIL_FIRST = range(PERSONA + 3, PERSONA + 8)
HINT = NO_BOLD  # the token that names preference p is HINT + p
NUM_DIGITS, NUM_FEEDBACK, CONTEXT, REPLY = 3, 4, 10, 12
# Where the feedback stands in `[BOS, persona, d, d, d, f, f, f, f, ASSIST]`.
FEEDBACK = slice(2 + NUM_DIGITS, 2 + NUM_DIGITS + NUM_FEEDBACK)
ENOUGH_DETAIL = 3
NUM_CANDIDATES = 3


class Session(NamedTuple):
    """One session of a user.

    Attributes:
      persona: int32 `[]`, who writes: 0 student, 1 teaching assistant, 2 teacher. The context shows it.
      preference: int32 `[]`, the wish: 0 no BOLD, 1 at least three DETAIL, 2 a WARM. The context never shows it; it is
        the persona's own unless one changes it.
      digits: int32 `[3]`, the question; the answer is the digits reversed.
      feedback: int32 `[4]`, what the user said to the last reply (REDO, perhaps a hint), left-packed, or PAD.
      turn: int32 `[]`, replies given so far.
      satisfied: bool `[]`, the last reply pleased.
      done: bool `[]`.
      reply: int32 `[12]`, the last reply, PAD before the first: for the renderer.
    """

    persona: jax.Array
    preference: jax.Array
    digits: jax.Array
    feedback: jax.Array
    turn: jax.Array
    satisfied: jax.Array
    done: jax.Array
    reply: jax.Array


class Reaction(NamedTuple):
    """The next state of a turn: what the user makes of a reply.

    Attributes:
      satisfied: bool `[]`, style and content are right.
      directive: bool `[]`, the user says which preference was violated.
      ids: int32 `[2]`: `[THANKS, PAD]`, `[REDO, PAD]` or `[REDO, hint]`.
    """

    satisfied: jax.Array
    directive: jax.Array
    ids: jax.Array


class Hints(NamedTuple):
    """The judge's M = 3 candidate hints for a turn, shortest first.

    Attributes:
      ids: int32 `[M, 2]`, PAD behind the end: {exact}, {exact, repeat-it}, {exact, detail-first}.
      length: int32 `[M]`, content tokens.
      score: int8 `[M]`, +1 where a hint exists (the turn is directive), else -1.
    """

    ids: jax.Array
    length: jax.Array
    score: jax.Array


def persona_chat(p_dir: float | jax.Array = 0.4, *, max_turns: int = 2) -> Environment:
    """Sessions with a random persona; an action is a reply of up to 12 tokens, ended by EOS.

    Every observation is a whole context of 10 tokens, PAD in free feedback slots included, so that a turn can be
    answered, scored and trained on by itself.

    Args:
      p_dir: probability that a complaint about style names the preference; may be traced.
      max_turns: replies in a session; it ends earlier with a satisfied user.

    Returns:
      The environment. `reset(key, persona=None, preference=None)`. Reward 1 for a satisfied user, else 0. Info: bool
      `satisfied`, `style_ok`, `content_ok`, `directive`; int32 `reply_length`, tokens before EOS; int32 `reaction`
      `[2]`, the user's words. The expert knows the preference; `demonstrate` is the base law, see `base_reply`.

    Raises:
      ValueError: `max_turns` below 1, or a concrete `p_dir` outside [0, 1].
    """
    if max_turns < 1:
        raise ValueError(f"max_turns must be at least 1, got {max_turns}")
    check_share("p_dir", p_dir)
    spec = TokenSpec(
        vocab=VOCAB,
        max_observation=CONTEXT,
        max_action=REPLY,
        max_turns=max_turns,
        stop_ids=(EOS,),
        pad_id=PAD,
    )

    def step(key, session, action):
        after, reaction = respond_reply(key, session, action, p_dir=p_dir, max_turns=max_turns)
        goes_on = ~after.done
        observation = Tokens(jnp.where(goes_on, context(after), PAD), jnp.where(goes_on, CONTEXT, 0).astype(jnp.int32))
        info = {
            "satisfied": reaction.satisfied,
            "style_ok": style_ok(session, action),
            "content_ok": content_ok(session, action),
            "directive": reaction.directive,
            "reply_length": cut_turn(action, action == EOS)[0],
            "reaction": reaction.ids,
        }
        reward = jnp.where(session.done, 0.0, reaction.satisfied.astype(jnp.float32))
        return after, Step(observation, reward, after.satisfied, after.done & ~after.satisfied, info)

    def expert(key, session):
        del key
        bold = jnp.zeros((), bool)
        detail = jnp.where(session.preference == 1, ENOUGH_DETAIL, 0)
        return _write_reply(session.digits, bold, detail, session.preference == 2, bold, bold)

    def demonstrate(key, session):
        return base_reply(key, context(session))

    return Environment(reset, step, spec, render=render, expert=expert, demonstrate=demonstrate)


def reset(key: jax.Array, persona=None, preference=None) -> tuple[Session, Tokens]:
    """A new session and its first context, which never states the preference.

    Args:
      persona: int `[]`; None draws one of three.
      preference: int `[]`; None for the persona's own.
    """
    persona_key, digit_key = jax.random.split(key)
    if persona is None:
        persona = jax.random.randint(persona_key, (), 0, len(PERSONAS), jnp.int32)
    persona = jnp.asarray(persona, jnp.int32)
    session = Session(
        persona=persona,
        preference=persona if preference is None else jnp.asarray(preference, jnp.int32),
        digits=jax.random.randint(digit_key, (NUM_DIGITS,), 0, 10, jnp.int32),
        feedback=jnp.full(NUM_FEEDBACK, PAD, jnp.int32),
        turn=jnp.int32(0),
        satisfied=jnp.zeros((), bool),
        done=jnp.zeros((), bool),
        reply=jnp.full(REPLY, PAD, jnp.int32),
    )
    return session, Tokens(context(session), jnp.int32(CONTEXT))


def context(session: Session) -> jax.Array:
    """What the policy reads, int32 `[10]`: `[BOS, persona, d, d, d, f, f, f, f, ASSIST]`."""
    return jnp.concatenate(
        [
            jnp.stack([jnp.int32(BOS), PERSONA + session.persona]),
            ZERO + session.digits,
            session.feedback,
            jnp.full(1, ASSIST, jnp.int32),
        ]
    )


def respond_reply(
    key: jax.Array, session: Session, reply: jax.Array, *, p_dir: float | jax.Array = 0.4, max_turns: int = 2
) -> tuple[Session, Reaction]:
    """The user reads a reply: THANKS where satisfied, else REDO; a complaint about *style* may name the preference.

    A session that is done stays as it is, and its reaction is silence (PAD).

    Args:
      reply: ids `[12]`, of which those up to the first EOS count.
      p_dir: probability of naming the preference where the style is wrong.

    Raises:
      ValueError: a reply that is not `[12]`.
    """
    pleased = satisfied(session, reply)
    directive = ~style_ok(session, reply) & jax.random.bernoulli(key, p_dir)
    live = ~session.done
    words = jnp.stack([jnp.where(pleased, THANKS, REDO), jnp.where(directive, HINT + session.preference, PAD)]).astype(
        jnp.int32
    )
    reaction = Reaction(pleased & live, directive & live, jnp.where(live, words, PAD))
    after = session._replace(
        feedback=jnp.concatenate([words, jnp.full(NUM_FEEDBACK - 2, PAD, jnp.int32)]),
        turn=session.turn + 1,
        satisfied=pleased,
        done=pleased | (session.turn + 1 >= max_turns),
        reply=jnp.asarray(reply, jnp.int32),
    )
    return jax.tree.map(lambda old, new: jnp.where(session.done, old, new), session, after), reaction


def style_ok(session: Session, reply: jax.Array) -> jax.Array:
    """bool `[]`: the reply is as the user likes it, whatever it says."""
    _check_reply(reply)
    counts = jnp.arange(REPLY) < cut_turn(reply, reply == EOS)[0]

    def number(token):
        return jnp.sum(counts & (reply == token))

    wishes = jnp.stack([number(BOLD) == 0, number(DETAIL) >= ENOUGH_DETAIL, number(WARM) > 0])
    return wishes[session.preference]


def content_ok(session: Session, reply: jax.Array) -> jax.Array:
    """bool `[]`: the reply ends with EOS and says the digits reversed, in one piece and without any other digit.

    Saying the answer twice is no mistake.
    """
    _check_reply(reply)
    length, stopped = cut_turn(reply, reply == EOS)
    counts = jnp.arange(REPLY) < length
    is_digit = counts & (reply >= ZERO) & (reply < ZERO + 10)
    answer = ZERO + session.digits[::-1]
    width = REPLY - NUM_DIGITS + 1
    starts = jnp.ones(width, bool)
    for i in range(NUM_DIGITS):
        starts &= counts[i : i + width] & (reply[i : i + width] == answer[i])
    covered = jnp.zeros(REPLY, bool)
    for i in range(NUM_DIGITS):
        covered = covered.at[i : i + width].set(covered[i : i + width] | starts)
    return stopped & starts.any() & ~jnp.any(is_digit & ~covered)


def satisfied(session: Session, reply: jax.Array) -> jax.Array:
    """bool `[]`: style and content are right."""
    return style_ok(session, reply) & content_ok(session, reply)


def judge(
    key: jax.Array,
    reaction: Reaction,
    *,
    votes: int = 1,
    flip: float | jax.Array = 0.05,
    ambiguous: float | jax.Array = 0.1,
) -> jax.Array:
    """Votes on (reply, next state), int8 `[m]`: +1 on THANKS, -1 on REDO, 0 where the turn reads ambiguous.

    A turn is ambiguous or not for all its votes; each vote is flipped by a draw of its own.

    Args:
      votes: m.
      flip: probability that a vote has the wrong sign; may be traced.
      ambiguous: probability of an ambiguous turn; may be traced.

    Raises:
      ValueError: no vote, or a concrete probability outside [0, 1].
    """
    if votes < 1:
        raise ValueError(f"votes must be at least 1, got {votes}")
    check_share("flip", flip)
    check_share("ambiguous", ambiguous)
    ambiguous_key, flip_key = jax.random.split(key)
    sign = jnp.where(reaction.satisfied, 1, -1)
    flipped = jax.random.bernoulli(flip_key, flip, (votes,))
    unclear = jax.random.bernoulli(ambiguous_key, ambiguous)
    return jnp.where(unclear, 0, jnp.where(flipped, -sign, sign)).astype(jnp.int8)


def hints(reaction: Reaction) -> Hints:
    """The judge's candidates: the named preference alone, and with each of two distractors; none if nothing was named.

    The longest hint, first on ties, is therefore a distracting one.
    """
    exact = reaction.ids[1]
    ids = jnp.stack(
        [
            jnp.stack([exact, jnp.int32(PAD)]),
            jnp.stack([exact, jnp.int32(REPEAT)]),
            jnp.stack([exact, jnp.int32(DETAIL_FIRST)]),
        ]
    )
    length = jnp.asarray([1, 2, 2], jnp.int32)
    return Hints(
        ids=jnp.where(reaction.directive, ids, PAD),
        length=jnp.where(reaction.directive, length, 0),
        score=jnp.where(reaction.directive, jnp.ones(NUM_CANDIDATES, jnp.int8), jnp.int8(-1)),
    )


def write_hint(context: jax.Array, hint: jax.Array) -> jax.Array:
    """The context a teacher reads: the hint in the first free feedback slots, int32 `[10]`.

    Args:
      context: int32 `[10]`, of the turn that is scored.
      hint: int32 `[n]`, PAD behind the end; what finds no free slot is dropped.
    """
    for i in range(hint.shape[0]):
        slots = context[FEEDBACK]
        place = jnp.where((slots == PAD).any() & (hint[i] != PAD), jnp.argmax(slots == PAD), NUM_FEEDBACK)
        context = context.at[FEEDBACK.start + place].set(
            jnp.where(place < NUM_FEEDBACK, hint[i], context[FEEDBACK.start + place])
        )
    return context


def base_reply(
    key: jax.Array,
    context: jax.Array,
    *,
    bold: float | jax.Array = 0.92,
    detailed: float | jax.Array = 0.06,
    warm: float | jax.Array = 0.04,
) -> jax.Array:
    """A reply by the law that the base model imitates, int32 `[12]`: right content, unwanted style, hints obeyed.

    BOLD, the answer, DETAIL, WARM, EOS in this order, PAD behind. A hint token in the context, whoever the user is,
    fixes its part: no BOLD, three DETAIL, a WARM, the answer twice, DETAIL (at least one) before everything else.

    Args:
      context: int32 `[10]`.
      bold, detailed, warm: probabilities, where no hint speaks, of BOLD, of three DETAIL (else two, one or none with
        weights 1 : 2 : 7) and of WARM; may be traced.
    """
    bold_key, detailed_key, few_key, warm_key = jax.random.split(key, 4)
    said = context[FEEDBACK]

    def hinted(token):
        return jnp.any(said == token)

    few = jax.random.categorical(few_key, jnp.log(jnp.asarray([7.0, 2.0, 1.0])))
    many = jax.random.bernoulli(detailed_key, detailed) | hinted(LONG)
    detail = jnp.where(many, ENOUGH_DETAIL, few)
    return _write_reply(
        context[2 : 2 + NUM_DIGITS] - ZERO,
        jax.random.bernoulli(bold_key, bold) & ~hinted(NO_BOLD),
        jnp.where(hinted(DETAIL_FIRST), jnp.maximum(detail, 1), detail),
        jax.random.bernoulli(warm_key, warm) | hinted(BE_WARM),
        hinted(REPEAT),
        hinted(DETAIL_FIRST),
    )


def pretraining_example(key: jax.Array, *, silent: float | jax.Array = 0.4) -> tuple[jax.Array, jax.Array]:
    """A random context and a reply of the base law: data of a base model that knows hints but no preference.

    With probability `silent` the feedback is empty; else REDO (half of the time) and zero to three of the five hint
    tokens, with replacement: every context that a session or a teacher can show is among them.

    Returns:
      (context int32 `[10]`, reply int32 `[12]`); what follows the reply's EOS does not count.
    """
    session_key, silent_key, redo_key, number_key, hint_key, reply_key = jax.random.split(key, 6)
    session, _ = reset(session_key)
    redo = jax.random.bernoulli(redo_key).astype(jnp.int32)
    number = jax.random.randint(number_key, (), 0, NUM_FEEDBACK)
    drawn = jax.random.randint(hint_key, (NUM_FEEDBACK,), HINT, HINT + 5, jnp.int32)
    slot = jnp.arange(NUM_FEEDBACK)
    said = jnp.where(slot < redo, REDO, jnp.where(slot < redo + number, drawn, PAD))
    said = jnp.where(jax.random.bernoulli(silent_key, silent), PAD, said)
    shown = context(session._replace(feedback=said.astype(jnp.int32)))
    return shown, base_reply(reply_key, shown)


def render(session: Session) -> str:
    """Who asked what, and how the last reply was taken, on the host."""

    def words(ids):
        ids = [int(i) for i in np.asarray(ids) if i != PAD]
        return " ".join(VOCAB[i] for i in (ids[: ids.index(EOS)] if EOS in ids else ids))

    wish = ("no bold type", "at least three details", "a warm word")[int(session.preference)]
    lines = [f"{PERSONAS[int(session.persona)]} (wishes {wish}): reverse {words(ZERO + session.digits)}"]
    if int(session.turn):
        lines += [f"  reply: {words(session.reply)}", f"  user:  {words(session.feedback)}"]
    return "\n".join(lines)


def _write_reply(digits, bold, detail, warm, repeat, detail_first):
    """BOLD, answer, DETAIL, WARM, EOS, or with the DETAIL first; at most 1 + 6 + 3 + 1 + 1 = 12 tokens."""
    answer = ZERO + digits[::-1]
    details, three = jnp.full(ENOUGH_DETAIL, DETAIL), jnp.arange(ENOUGH_DETAIL)
    # Every token that may stand in a reply, in order, and whether it does.
    tokens = jnp.concatenate([details, jnp.asarray([BOLD]), answer, answer, details, jnp.asarray([WARM, EOS])])
    present = jnp.concatenate(
        [
            (three < detail) & detail_first,
            bold[None],
            jnp.ones(NUM_DIGITS, bool),
            jnp.broadcast_to(repeat, NUM_DIGITS),
            (three < detail) & ~detail_first,
            warm[None],
            jnp.ones(1, bool),
        ]
    )
    place = jnp.where(present, jnp.cumsum(present) - 1, REPLY)
    return jnp.full(REPLY, PAD, jnp.int32).at[place].set(tokens.astype(jnp.int32), mode="drop")


def _check_reply(reply):
    if jnp.shape(reply) != (REPLY,):
        raise ValueError(f"action must have the shape {(REPLY,)}, got {jnp.shape(reply)}")
