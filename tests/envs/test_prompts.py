"""The bank of prompts: the device's verdict on token ids is the host's verdict on text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rollax.envs import (
    QUESTIONS,
    PromptBank,
    PromptState,
    clean_answer,
    few_shot_prompt,
    is_correct,
    prompt_bank,
    split_questions,
    token_kinds,
    tokenize_bank,
)

# A toy tokenizer with the traps of real ones: words with a space in front, quotes glued to a full stop, newlines.
PIECES = ["<end>", *"0123456789 \"'.,:?\n-+*", " 4", "42", " green", "green", '."', '".', " .", "\n\n", ".\n"]
PIECES += ["..", '""', "  ", "7.", "4.'"]
VOCAB = [*PIECES, *"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"]
KINDS = token_kinds(VOCAB, end_ids=[0])


def encode(text):
    """Greedy longest match."""
    ids = []
    while text:
        best = max((piece for piece in VOCAB[1:] if text.startswith(piece)), key=len)
        ids.append(VOCAB.index(best))
        text = text[len(best) :]
    return ids


@pytest.fixture(scope="module")
def products():
    shots, train, _ = split_questions(QUESTIONS["products"], 20, 5)
    prompts = [few_shot_prompt(shots, question.text) for question in train]
    bank = tokenize_bank(prompts, [question.answer for question in train], encode, KINDS)
    return train, prompts, bank, prompt_bank(bank, KINDS, VOCAB, max_action=8)


def test_token_kinds():
    names = {"stop": {"<end>", "\n", "\n\n", ".\n"}, "ignored": {" ", '"', "'", '""', "  "}}
    names["full_stop"] = {".", '."', '".', " ."}
    names["glued"] = {"..", "7.", "4.'"}
    for kind, expected in names.items():
        assert {VOCAB[i] for i in np.flatnonzero(getattr(KINDS, kind))} == expected


def test_expert_and_prompt(products):
    train, prompts, _, environment = products
    state = PromptState(jnp.arange(20))
    keys = jax.random.split(jax.random.key(0), 20)
    action = jax.vmap(environment.expert)(keys, state)
    step = jax.jit(jax.vmap(environment.step))(keys, state, action)[1]
    assert np.all(np.asarray(step.reward) == 1) and np.all(np.asarray(step.terminated))
    assert set(step.info) == {"correct", "stopped", "reply_length"}
    state, observation = jax.jit(jax.vmap(environment.reset))(jax.random.split(jax.random.key(1), 200))
    assert set(np.asarray(state.row).tolist()) == set(range(20))
    row = int(state.row[0])
    text = "".join(VOCAB[i] for i in np.asarray(observation.ids[0])[: int(observation.length[0])])
    assert text == prompts[row]
    rendered = environment.render(jax.tree.map(lambda x: x[0], state))
    assert rendered == f"{prompts[row]} [{train[row].answer}]"


def test_device_agrees_with_host_on_random_replies():
    answers = ["42", "4", "green", "green, green", "4-2", "3.5"]
    environment = prompt_bank(tokenize_bank(["Q:"] * len(answers), answers, encode, KINDS), KINDS, VOCAB, max_action=9)
    # The decoded text may have other token spellings than the accepted two, so the host compares in the same spelling:
    # a reply counts if its text is right and it is what the tokenizer itself would write, alone or after a space.
    rng = np.random.default_rng(0)
    end, common = VOCAB.index("<end>"), [VOCAB.index(piece) for piece in PIECES[1:]]
    rows, actions = [], []
    for _ in range(8000):
        row = int(rng.integers(len(answers)))
        core = encode(rng.choice(["", " "]) + answers[row])
        if rng.random() < 0.3:
            core = [int(i) for i in rng.choice(common, rng.integers(0, 5))]
        before = [VOCAB.index(piece) for piece in rng.choice([" ", '"', "'", '""'], rng.integers(0, 2))]
        after = [VOCAB.index(piece) for piece in rng.choice([" ", '"', ".", '."', '".', " .", "4"], rng.integers(0, 3))]
        ending = [int(rng.choice([end, VOCAB.index("\n"), VOCAB.index(".\n"), VOCAB.index("\n\n")]))]
        ids = (before + core + after + ending + [int(i) for i in rng.choice(common, 9)])[:9]
        rows.append(row)
        actions.append(ids)
    step = jax.jit(jax.vmap(environment.step, in_axes=(None, 0, 0)))
    reward = np.asarray(step(jax.random.key(0), PromptState(jnp.asarray(rows)), jnp.asarray(actions))[1].reward)
    right = 0
    for row, ids, got in zip(rows, actions, reward, strict=True):
        ids = ids[: next((at for at, i in enumerate(ids) if KINDS.stop[i]), None)]
        text = "".join(VOCAB[i] for i in ids)
        correct = clean_answer(text) == answers[row]
        if correct and not got:
            # Only ever for a spelling the tokenizer would not produce, such as "4", "2" for "42".
            kept = [VOCAB[i] for i in ids]
            assert not any(
                encode(space + answers[row]) == ids[i:j]
                for space in ("", " ")
                for i in range(len(ids))
                for j in range(i, len(ids) + 1)
            ), (kept, answers[row])
        else:
            assert got == correct, (text, answers[row])
        right += int(got)
    assert 1600 < right < 6400


def test_replies_one_by_one(products):
    _, _, _, environment = products
    bank = tokenize_bank(["Q:"], ["42"], encode, KINDS)
    environment = prompt_bank(bank, KINDS, VOCAB, max_action=6)
    step = jax.jit(environment.step)

    def reward(text):
        ids = encode(text)
        return float(step(jax.random.key(0), PromptState(jnp.int32(0)), jnp.asarray((ids + [0] * 6)[:6]))[1].reward)

    for text in ("42", " 42", '"42"', "42.", '"42".', '"42."', "42\n7", "42 .", " 42.\n"):
        assert reward(text) == 1, text
    for text in ("", ".", " ", "421", "142", "42..", "4 2", "\n42", "42 7", "-42", "green", "42,"):
        assert reward(text) == 0, text


def test_a_full_stop_glued_to_the_answer():
    bank = tokenize_bank(["Q:"] * 2, ["37", "42"], encode, KINDS)
    assert bank.answers.shape[1] == 2 and np.all(bank.answer_lengths == [[2, 2], [1, 2]])
    step = jax.jit(prompt_bank(bank, KINDS, VOCAB, max_action=6).step)
    for text in ("37", "37.", " 37.", '"37."', "37.\n", "37..", "37. .", '37.".', "7.", "377."):
        ids = jnp.asarray((encode(text) + [0] * 6)[:6])
        got = float(step(jax.random.key(0), PromptState(jnp.int32(0)), ids)[1].reward)
        assert got == is_correct(text, "37"), text


def test_answers_in_one_spelling_and_without_a_stop():
    bank = PromptBank(np.array([[30]]), np.array([1]), np.array([[3, 5]]), np.array([1]))  # "2", padded
    environment = prompt_bank(bank, KINDS, VOCAB, max_action=2)
    two, space = VOCAB.index("2"), VOCAB.index(" ")
    state = PromptState(jnp.int32(0))
    for action, expected, stopped in [([two, 0], 1, 1), ([space, two], 1, 0), ([two, two], 0, 0), ([0, two], 0, 1)]:
        step = environment.step(jax.random.key(0), state, jnp.asarray(action))[1]
        assert float(step.reward) == expected and float(step.info["stopped"]) == stopped


def test_bad_arguments(products):
    _, _, bank, _ = products
    with pytest.raises(ValueError, match="equally many"):
        tokenize_bank(["a"], [], encode, KINDS)
    with pytest.raises(ValueError, match="max_prompt"):
        tokenize_bank(["abc"], ["4"], encode, KINDS, max_prompt=2)
    for unclean in ("42.", "37.", "", "4\n2"):
        with pytest.raises(ValueError, match="clean"):
            tokenize_bank(["a"], [unclean], encode, KINDS)
    for field, value, word in (
        ("prompts", len(VOCAB), "ids in"),
        ("answers", -1, "ids in"),
        ("lengths", bank.prompts.shape[1] + 1, r"bank\.lengths"),
        ("answer_lengths", bank.answers.shape[2] + 1, r"bank\.answer_lengths"),
        ("answer_lengths", 0, "got none in row 3"),
    ):
        changed = getattr(bank, field).copy()
        changed[3] = value
        with pytest.raises(ValueError, match=word):
            prompt_bank(bank._replace(**{field: changed}), KINDS, VOCAB, max_action=8)
    with pytest.raises(ValueError, match="max_action"):
        prompt_bank(bank, KINDS, VOCAB, max_action=1)
    with pytest.raises(ValueError, match="kinds"):
        prompt_bank(bank, KINDS, VOCAB[:-1], max_action=8)
    with pytest.raises(ValueError, match=r"kinds\.stop"):
        prompt_bank(bank, KINDS._replace(stop=np.zeros(len(VOCAB), bool)), VOCAB, max_action=8)
    with pytest.raises(ValueError, match="bank must hold"):
        prompt_bank(bank._replace(lengths=bank.lengths[1:]), KINDS, VOCAB, max_action=8)
