"""Persona chat: user, judge and hints against the rules in plain Python, and the base law's satisfaction."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rollax.envs import persona_chat, pretraining_example, scripted_episode
from rollax.envs.persona_chat import (
    ASSIST,
    BE_WARM,
    BOLD,
    BOS,
    CONTEXT,
    DETAIL,
    DETAIL_FIRST,
    EOS,
    FEEDBACK,
    HINT,
    LONG,
    NO_BOLD,
    PAD,
    PERSONA,
    REDO,
    REPEAT,
    REPLY,
    THANKS,
    VOCAB,
    WARM,
    ZERO,
    Reaction,
    base_reply,
    content_ok,
    context,
    hints,
    judge,
    render,
    reset,
    respond_reply,
    satisfied,
    style_ok,
    write_hint,
)

IDS = {word: i for i, word in enumerate(VOCAB)}


def encode(text, width=REPLY):
    ids = [IDS[{"B": "**bold**", "W": "well-done!", "D": "detail", ".": "<eos>"}.get(word, word)] for word in text]
    return np.asarray(ids + [PAD] * (width - len(ids)), np.int32)


def session_of(digits="123", preference=0):
    session, _ = reset(jax.random.key(0), persona=0, preference=preference)
    return session._replace(digits=jnp.asarray([int(d) for d in digits]))


style_all, content_all, satisfied_all = (
    jax.jit(jax.vmap(f, in_axes=(None, 0))) for f in (style_ok, content_ok, satisfied)
)


def style_by_hand(preference, ids):
    said = ids[: ids.index(EOS)] if EOS in ids else ids
    return [BOLD not in said, said.count(DETAIL) >= 3, WARM in said][preference]


def content_by_hand(digits, ids):
    """The runs of digits, as text: exactly those that copies of the answer (which may overlap) cover."""
    if EOS not in ids:
        return False
    text = "".join(str(i - ZERO) if ZERO <= i < ZERO + 10 else "_" for i in ids[: ids.index(EOS)])
    answer = "".join(map(str, digits[::-1]))
    covered = {i + j for i in range(len(text)) if text[i : i + 3] == answer for j in range(3)}
    return bool(covered) and all(i in covered for i, letter in enumerate(text) if letter != "_")


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ("321.", True),
        ("B321D.", True),
        ("DDD321W.", True),
        ("321321.", True),
        ("321D321.", True),
        ("321", False),
        ("123.", False),
        ("32D1.", False),
        ("3214.", False),
        ("321D4.", False),
        ("32.1", False),
        (".321", False),
        ("DDDDDDDDDD32", False),
        ("32132.", False),
        ("D.321.", False),
    ],
)
def test_content(reply, right):
    assert bool(content_all(session_of(), encode(reply)[None])[0]) == right
    assert content_by_hand([1, 2, 3], encode(reply).tolist()) == right


def test_content_and_style_agree_with_plain_python_on_random_replies():
    rng = np.random.default_rng(0)
    pieces = [[BOLD], [DETAIL], [WARM], [EOS], [ZERO + 3, ZERO + 2, ZERO + 2], [ZERO + 2], [ZERO + 3], [REDO], [PAD]]
    rows = []
    for _ in range(4000):
        drawn = rng.choice(len(pieces), 8, p=[0.1, 0.3, 0.1, 0.1, 0.3, *[0.025] * 4])
        rows.append([*itertools.chain(*(pieces[i] for i in drawn)), *[PAD] * REPLY][:REPLY])
    rows = np.asarray(rows, np.int32)
    session = session_of("223")
    found = np.asarray(content_all(session, rows))
    expected = np.asarray([content_by_hand([2, 2, 3], row.tolist()) for row in rows])
    np.testing.assert_array_equal(found, expected)
    assert 300 < found.sum() < 3700
    for preference in range(3):
        wishing = session._replace(preference=jnp.int32(preference))
        style = np.asarray(style_all(wishing, rows))
        np.testing.assert_array_equal(style, [style_by_hand(preference, row.tolist()) for row in rows])
        assert 300 < style.sum() < 3700
        np.testing.assert_array_equal(satisfied_all(wishing, rows), style & expected)


def test_first_context_never_says_the_preference():
    keys = jax.random.split(jax.random.key(0), 3000)
    session, observation = jax.vmap(reset)(keys)
    ids = np.asarray(observation.ids)
    assert ids.shape == (3000, CONTEXT) and np.all(observation.length == CONTEXT)
    assert np.all(ids[:, 0] == BOS) and np.all(ids[:, -1] == ASSIST) and np.all(ids[:, FEEDBACK] == PAD)
    np.testing.assert_array_equal(ids[:, 1], PERSONA + session.persona)
    np.testing.assert_array_equal(ids[:, 2:5], ZERO + session.digits)
    np.testing.assert_array_equal(session.preference, session.persona)
    assert np.abs(np.bincount(session.persona, minlength=3) - 1000).max() < 130  # five standard deviations
    assert set(np.asarray(session.digits).ravel().tolist()) == set(range(10))
    # A change of mind is not visible either.
    changed, same = reset(keys[0], persona=0, preference=2), reset(keys[0], persona=0)
    np.testing.assert_array_equal(changed[1].ids, same[1].ids)
    assert int(changed[0].preference) == 2


def test_user_complains_or_thanks_and_names_only_a_violated_preference():
    replies = np.stack([encode(text) for text in ("321.", "B321.", "B123.", "123.")])  # right; style; both; content
    session = session_of()

    @jax.jit
    @jax.vmap
    def respond(key):
        return jax.vmap(lambda reply: respond_reply(key, session, reply, p_dir=0.4))(replies)

    after, reaction = jax.tree.map(np.asarray, respond(jax.random.split(jax.random.key(0), 4000)))
    np.testing.assert_array_equal(reaction.satisfied, np.broadcast_to([True, False, False, False], (4000, 4)))
    share = reaction.directive.mean(axis=0)
    assert share[0] == share[3] == 0 and np.all(np.abs(share[1:3] - 0.4) < 0.04)  # five standard errors
    assert np.all(reaction.ids[:, 0] == [THANKS, PAD]) and np.all(reaction.ids[:, 3] == [REDO, PAD])
    hinted = np.where(reaction.directive, NO_BOLD, PAD)
    np.testing.assert_array_equal(reaction.ids[..., 1], hinted)
    np.testing.assert_array_equal(after.feedback[..., 0], reaction.ids[..., 0])
    np.testing.assert_array_equal(after.feedback[..., 1], hinted)
    assert np.all(after.feedback[..., 2:] == PAD) and np.all(after.turn == 1)
    np.testing.assert_array_equal(after.done, reaction.satisfied)


def test_sessions_have_two_turns_and_then_freeze():
    environment = persona_chat()

    next_turn = jax.jit(environment.step)

    def run(key, first, second, third):
        session, _ = environment.reset(key, persona=1)
        steps = []
        for reply in (first, second, third):
            session, step = next_turn(key, session, reply)
            steps.append((session, step))
        return steps

    wrong = jnp.asarray(encode("B."))
    steps = run(jax.random.key(0), wrong, wrong, wrong)
    (one, first), (two, second), (three, third) = steps
    assert not bool(first.terminated | first.truncated) and int(first.observation.length) == CONTEXT
    np.testing.assert_array_equal(first.observation.ids, context(one))
    assert bool(second.truncated) and not bool(second.terminated) and int(second.observation.length) == 0
    assert all(bool(jnp.array_equal(a, b)) for a, b in zip(two, three, strict=True))
    assert bool(third.truncated) and float(third.reward) == 0
    assert np.all(np.asarray(third.info["reaction"]) == PAD) and int(three.turn) == 2
    session, _ = environment.reset(jax.random.key(0), persona=1)
    right = environment.expert(jax.random.key(0), session)
    (end, first), (after, second), _ = run(jax.random.key(0), right, right, wrong)
    assert float(first.reward) == 1 and bool(first.terminated) and not bool(first.truncated)
    assert all(bool(jnp.array_equal(a, b)) for a, b in zip(end, after, strict=True))
    assert float(second.reward) == 0 and bool(second.terminated) and not bool(second.info["satisfied"])


def test_judge():
    count = 20_000
    keys = jax.random.split(jax.random.key(0), count)

    def votes(pleased):
        reaction = Reaction(jnp.asarray(pleased), jnp.asarray(False), jnp.zeros(2, jnp.int32))
        return np.asarray(jax.jit(jax.vmap(lambda key: judge(key, reaction, votes=3, flip=0.25)))(keys))

    for pleased, sign in ((True, 1), (False, -1)):
        drawn = votes(pleased)
        assert drawn.dtype == np.int8 and drawn.shape == (count, 3)
        ambiguous = (drawn == 0).all(axis=1)
        np.testing.assert_array_equal((drawn == 0).any(axis=1), ambiguous)  # a turn is ambiguous, not a vote
        assert abs(ambiguous.mean() - 0.1) < 0.011
        wrong = (drawn == -sign)[~ambiguous]
        assert np.abs(wrong.mean(axis=0) - 0.25).max() < 0.017
        # Independent flips: all three wrong as often as 0.25 cubed.
        assert abs(wrong.all(axis=1).mean() - 0.25**3) < 0.005
    reaction = Reaction(jnp.asarray(True), jnp.asarray(False), jnp.zeros(2, jnp.int32))
    assert judge(jax.random.key(0), reaction, flip=0.0, ambiguous=0.0).tolist() == [1]
    assert judge(jax.random.key(0), reaction, flip=1.0, ambiguous=0.0).tolist() == [-1]


def test_hints():
    told = Reaction(jnp.asarray(False), jnp.asarray(True), jnp.asarray([REDO, BE_WARM]))
    found = hints(told)
    assert found.ids.tolist() == [[BE_WARM, PAD], [BE_WARM, REPEAT], [BE_WARM, DETAIL_FIRST]]
    assert found.length.tolist() == [1, 2, 2] and found.score.tolist() == [1, 1, 1] and found.score.dtype == jnp.int8
    silent = hints(told._replace(directive=jnp.asarray(False), ids=jnp.asarray([REDO, PAD])))
    assert not silent.ids.any() and not silent.length.any() and silent.score.tolist() == [-1, -1, -1]


@pytest.mark.parametrize(
    ("feedback", "hint", "after"),
    [
        ([], [LONG, PAD], [LONG]),
        ([], [LONG, REPEAT], [LONG, REPEAT]),
        ([REDO], [LONG, REPEAT], [REDO, LONG, REPEAT]),
        ([REDO, LONG], [LONG, DETAIL_FIRST], [REDO, LONG, LONG, DETAIL_FIRST]),
        ([REDO, LONG], [PAD, PAD], [REDO, LONG]),
        ([REDO, LONG, LONG], [LONG, REPEAT], [REDO, LONG, LONG, LONG]),
    ],
)
def test_write_hint(feedback, hint, after):
    def filled(words):
        session, _ = reset(jax.random.key(0))
        return context(session._replace(feedback=jnp.asarray(words + [PAD] * (4 - len(words)))))

    np.testing.assert_array_equal(jax.jit(write_hint)(filled(feedback), jnp.asarray(hint)), filled(after))


@pytest.fixture(scope="module")
def examples():
    contexts, replies = jax.jit(jax.vmap(pretraining_example))(jax.random.split(jax.random.key(3), 20_000))
    return np.asarray(contexts), np.asarray(replies)


def test_pretraining_examples_obey_hints_and_are_right(examples):
    contexts, replies = examples
    counts = {"hinted": 0, "plain": 0}
    for shown, reply in zip(contexts[:3000].tolist(), replies[:3000].tolist(), strict=True):
        digits, said = [i - ZERO for i in shown[2:5]], reply[: reply.index(EOS)]
        assert content_by_hand(digits, reply) and set(reply[len(said) + 1 :]) <= {PAD}
        feedback = shown[FEEDBACK]
        words = [word for word in feedback if word != PAD]
        assert feedback == words + [PAD] * (4 - len(words)) and REDO not in words[1:]
        counts["hinted" if set(words) - {REDO} else "plain"] += 1
        assert NO_BOLD not in words or BOLD not in said
        assert LONG not in words or said.count(DETAIL) == 3
        assert BE_WARM not in words or WARM in said
        answer = [ZERO + d for d in digits[::-1]]
        copies = 2 if REPEAT in words else 1
        assert sum(ZERO <= i < ZERO + 10 for i in said) == 3 * copies and " ".join(
            map(str, answer * copies)
        ) in " ".join(map(str, said))
        assert (said[0] == DETAIL) == (DETAIL_FIRST in words)
        if DETAIL_FIRST not in words and DETAIL in said:
            assert said.index(DETAIL) > said.index(answer[-1])
    assert min(counts.values()) > 1000
    assert set(contexts[:, 1].tolist()) == {PERSONA, PERSONA + 1, PERSONA + 2}
    # The fullest reply fits exactly: 1 BOLD, 6 digits, 3 DETAIL, 1 WARM and EOS.
    assert (replies == EOS).argmax(axis=1).max() == REPLY - 1


@pytest.mark.slow  # by default the examples of the law obey hints
def test_base_law_has_the_style_that_nobody_wants_until_told(examples):
    contexts, replies = examples
    hinted = (contexts[:, FEEDBACK] >= HINT).any(axis=1)
    plain = replies[~hinted]
    share = [
        (plain == BOLD).any(axis=1).mean(),
        ((plain == DETAIL).sum(axis=1) >= 3).mean(),
        (plain == WARM).any(axis=1).mean(),
    ]
    np.testing.assert_allclose(share, [0.92, 0.06, 0.04], atol=0.014)  # four standard errors

    @jax.jit
    @jax.vmap
    def satisfaction(key):
        def one(key, told):
            reset_key, reply_key = jax.random.split(key)
            session, observation = reset(reset_key)
            hint = jnp.where(told, HINT + session.preference, PAD)[None]
            return session.persona, satisfied(session, base_reply(reply_key, write_hint(observation.ids, hint)))

        return one(key, False), one(key, True)

    (persona, before), (_, after) = satisfaction(jax.random.split(jax.random.key(0), 9000))
    for p, expected in enumerate([0.08, 0.06, 0.04]):
        assert abs(before[persona == p].mean() - expected) < 0.02
    assert np.all(after)


@pytest.mark.slow  # by default the expert pleases in sessions of two turns, and the examples of the law obey hints
def test_expert_satisfies_everyone_and_a_hint_helps_the_second_reply():
    environment = persona_chat(p_dir=1.0)

    @jax.jit
    def run(keys):
        return tuple(
            jax.vmap(lambda key, act=act: scripted_episode(key, environment, act))(keys)
            for act in (environment.expert, environment.demonstrate)
        )

    expert, base = run(jax.random.split(jax.random.key(1), 2000))
    assert np.all(expert.step.reward[:, 0] == 1) and np.all(expert.state.turn == 1)
    assert not np.any(expert.mask[:, 1])
    pleased = np.asarray(base.step.info["satisfied"])
    assert pleased[:, 0].mean() < 0.09
    # Every complaint named the preference, and the base law obeys.
    assert np.all(pleased[np.asarray(base.mask[:, 1]), 1])
    length = np.asarray(base.step.info["reply_length"])
    np.testing.assert_array_equal(length, np.argmax(np.asarray(base.action) == EOS, axis=-1))


def test_probabilities_may_be_traced_and_vmap_is_a_loop():
    @jax.jit
    @jax.vmap
    def run(p_dir, key):
        environment = persona_chat(p_dir=p_dir)
        return scripted_episode(key, environment, environment.demonstrate, persona=1)

    p_dirs, keys = jnp.asarray([0.0, 0.4, 1.0]), jax.random.split(jax.random.key(4), 3)
    batch = run(p_dirs, keys)
    for i in range(3):
        single = run(p_dirs[i : i + 1], keys[i : i + 1])
        for a, b in zip(jax.tree.leaves(batch), jax.tree.leaves(single), strict=True):
            np.testing.assert_array_equal(a[i], b[0])


@pytest.mark.slow  # the agreement with plain Python is that of compiled rules
def test_jit_changes_nothing():
    keys = jax.random.split(jax.random.key(4), 2)
    with jax.disable_jit():
        session, _ = reset(keys[0])
        plain = respond_reply(keys[1], session, jnp.asarray(encode("B.")))
    session, _ = jax.jit(reset)(keys[0])
    compiled = jax.jit(respond_reply)(keys[1], session, jnp.asarray(encode("B.")))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(compiled), strict=True):
        np.testing.assert_array_equal(a, b)


def test_vocabulary_and_a_readable_session():
    assert len(VOCAB) == len(set(VOCAB)) == 27 and VOCAB[HINT] == "no-bold" and VOCAB[PERSONA + 2] == "teacher:"
    session, _ = reset(jax.random.key(0), persona=2)
    session = session._replace(digits=jnp.asarray([4, 0, 7]))
    assert render(session) == "teacher (wishes a warm word): reverse 4 0 7"
    session, _ = respond_reply(jax.random.key(0), session, jnp.asarray(encode("B704.")), p_dir=1.0)
    assert render(session).splitlines()[1:] == ["  reply: **bold** 7 0 4", "  user:  redo be-warm"]


def test_bad_input():
    for arguments, message in (
        ({"max_turns": 0}, "max_turns must be at least 1, got 0"),
        ({"p_dir": 1.2}, r"p_dir must be in \[0, 1\], got 1.2"),
    ):
        with pytest.raises(ValueError, match=message):
            persona_chat(**arguments)
    environment = persona_chat()
    session, _ = reset(jax.random.key(0))
    with pytest.raises(ValueError, match=r"action must have the shape \(12,\), got \(3,\)"):
        environment.step(jax.random.key(0), session, jnp.zeros(3, jnp.int32))
    _, reaction = respond_reply(jax.random.key(0), session, jnp.zeros(REPLY, jnp.int32))
    with pytest.raises(ValueError, match="votes must be at least 1, got 0"):
        judge(jax.random.key(0), reaction, votes=0)
    with pytest.raises(ValueError, match="flip must be in"):
        judge(jax.random.key(0), reaction, flip=-1.0)
    with pytest.raises(ValueError, match="ambiguous must be in"):
        judge(jax.random.key(0), reaction, ambiguous=3.0)
