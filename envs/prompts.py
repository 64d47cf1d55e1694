"""A bank of tokenised questions with exact answers: the single-turn environment of a pretrained language model.

The reply is cleaned as in common exact-match scoring (cut at the line's end; spaces, quotes and one final full stop
removed) and compared on device, on token ids. `envs.questions` writes the questions and holds the same rule for text.
Alphabet: `P` prompts, `T` tokens of a prompt, `M` spellings of an answer, `A` tokens of an answer, `V` vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rollax.envs.environment import Environment, Tokens, TokenSpec
from rollax.envs.questions import IGNORED, clean_answer
from rollax.envs.tokens import cut_turn, decode, question_answer


class PromptBank(NamedTuple):
    """Tokenised questions, int32 NumPy arrays.

    Attributes:
      prompts: `[P, T]`, right-padded.
      lengths: `[P]`.
      answers: `[P, M, A]`: M accepted spellings in ids ("42" and " 42" may differ), cleaned but for a full stop glued
        to their last token, right-padded.
      answer_lengths: `[P, M]`; 0 marks a spelling that does not exist.
    """

    prompts: np.ndarray
    lengths: np.ndarray
    answers: np.ndarray
    answer_lengths: np.ndarray


class TokenKinds(NamedTuple):
    """Which ids of a vocabulary the verifier treats specially, bool NumPy `[V]` each.

    Attributes:
      stop: ends the reply (a token with a newline in it, an end-of-text token).
      ignored: stripped at both ends (nothing but spaces and quotes).
      full_stop: removed once at the end.
      glued: other text with a full stop at its end ("2."): the one full stop of the reply that it ends.
    """

    stop: np.ndarray
    ignored: np.ndarray
    full_stop: np.ndarray
    glued: np.ndarray


class PromptState(NamedTuple):
    """`row` int32 `[]`, which prompt of the bank. Make one yourself to go through a test set in order."""

    row: jax.Array


def token_kinds(vocab: Sequence[str], end_ids: Sequence[int] = ()) -> TokenKinds:
    """Sort a vocabulary into the kinds the verifier needs.

    Args:
      vocab: the decoded string of each id (" 4", not a byte-level spelling of the space).
      end_ids: ids that end a reply besides those with a newline: end of text, end of turn.
    """
    stop = np.asarray(["\n" in text for text in vocab])
    stop[list(end_ids)] = True
    ignored = np.asarray([text != "" and text.strip(IGNORED) == "" for text in vocab]) & ~stop
    full_stop = np.asarray([text.strip(IGNORED) == "." for text in vocab]) & ~stop
    glued = np.asarray([text.rstrip(IGNORED).endswith(".") for text in vocab]) & ~stop & ~full_stop
    return TokenKinds(stop, ignored, full_stop, glued)


def tokenize_bank(
    prompts: Sequence[str],
    answers: Sequence[str],
    encode: Callable[[str], list[int]],
    kinds: TokenKinds,
    *,
    max_prompt: int | None = None,
    pad_id: int = 0,
) -> PromptBank:
    """Turn texts into a bank. Each answer is accepted as encoded alone and as encoded after a space.

    Where the encoding glues a final full stop to the answer ("42." in one token), that spelling is accepted too.

    Args:
      prompts: P texts, encoded as they are (special tokens included, if `encode` adds them).
      answers: P texts, already clean.
      encode: text to ids, without special tokens for plain text.
      kinds: of the same vocabulary; spaces at the ends of an encoded answer are dropped, as from a reply.
      max_prompt: T; default: the longest prompt.
      pad_id: filler.

    Raises:
      ValueError: no prompts, different numbers of prompts and answers, a prompt longer than T, or an answer that the
        cleaning rule would not leave as it is.
    """
    if not prompts or len(prompts) != len(answers):
        raise ValueError(f"prompts and answers must be equally many, at least one, got {len(prompts)}, {len(answers)}")
    prompt_ids = [encode(prompt) for prompt in prompts]
    longest = max(map(len, prompt_ids))
    if max_prompt is not None and longest > max_prompt:
        raise ValueError(f"max_prompt must be at least the longest prompt, {longest} tokens, got {max_prompt}")
    spellings = []
    for answer in answers:
        forms = [_strip(encode(space + answer), kinds.ignored) for space in ("", " ")]
        for form in forms:
            if clean_answer(answer) != answer or not form or kinds.stop[form].any():
                raise ValueError(f"answers must be clean (one line, no final full stop), got {answer!r}")
        ended = [_strip(encode(space + answer + "."), kinds.ignored) for space in ("", " ")]
        forms += [form for form in ended if kinds.glued[form[-1]] and not kinds.stop[form].any()]
        spellings.append([form for i, form in enumerate(forms) if form not in forms[:i]])
    num_spellings = max(map(len, spellings))
    flat = [form for forms in spellings for form in (*forms, *[[]] * (num_spellings - len(forms)))]
    ids, lengths = _pad(prompt_ids, max_prompt or longest, pad_id)
    answer_ids, answer_lengths = _pad(flat, max(map(len, flat)), pad_id)
    shape = (len(answers), num_spellings)
    return PromptBank(ids, lengths, answer_ids.reshape(*shape, -1), answer_lengths.reshape(shape))


def prompt_bank(
    bank: PromptBank,
    kinds: TokenKinds,
    vocab: Sequence[str],
    *,
    max_action: int,
    pad_id: int = 0,
) -> Environment:
    """An environment whose reset draws a row of the bank and whose step compares the reply with that row's answer.

    The reply is cut at the first stop id; ignored ids are stripped at both ends, then one final full stop, then ignored
    ids before it; what is left must equal one of the accepted spellings id by id. A reply that never stops is judged as
    it stands after `max_action` tokens.

    Args:
      bank: questions; answers may also be `[P, A]` with lengths `[P]`.
      kinds: tables `[V]`.
      vocab: the string of each id, length V.
      max_action: the most tokens of a reply with its stop.
      pad_id: filler.

    Returns:
      The environment. Reward 1 if the answer is right, else 0. Info, float32: `correct`; `stopped`, the reply ended
      itself; `reply_length`, tokens before the stop.

    Raises:
      ValueError: shapes that disagree, ids or lengths out of range, a row without any spelling, or no stop id.
    """
    bank = PromptBank(*(np.asarray(x, np.int32) for x in bank))
    if bank.answers.ndim == 2:
        bank = bank._replace(answers=bank.answers[:, None], answer_lengths=bank.answer_lengths[:, None])
    num_prompts = bank.prompts.shape[0]
    shapes = [x.shape for x in bank]
    if (
        bank.prompts.ndim != 2
        or num_prompts < 1
        or bank.answers.ndim != 3
        or bank.lengths.shape != (num_prompts,)
        or bank.answers.shape[0] != num_prompts
        or bank.answer_lengths.shape != bank.answers.shape[:2]
    ):
        raise ValueError(f"bank must hold prompts [P, T], lengths [P], answers [P, M, A], lengths [P, M], got {shapes}")
    if not (has_spelling := bank.answer_lengths.any(-1)).all():
        raise ValueError(f"bank must hold a spelling of every answer, got none in row {np.argmin(has_spelling)}")
    for name, lengths, width in (
        ("lengths", bank.lengths, bank.prompts.shape[1]),
        ("answer_lengths", bank.answer_lengths, bank.answers.shape[2]),
    ):
        if lengths.min() < 0 or lengths.max() > width:
            raise ValueError(f"bank.{name} must be in [0, {width}], got {lengths.min()} to {lengths.max()}")
    ids = np.concatenate([bank.prompts.ravel(), bank.answers.ravel()])
    if ids.min() < 0 or ids.max() >= len(vocab):
        raise ValueError(f"bank must hold ids in [0, {len(vocab)}), got {ids.min()} to {ids.max()}")
    if any(kind.shape != (len(vocab),) for kind in kinds):
        raise ValueError(f"kinds must have the shape {(len(vocab),)}, got {[kind.shape for kind in kinds]}")
    if not kinds.stop.any():
        raise ValueError("kinds.stop must mark at least one id")
    longest_answer = int(bank.answer_lengths.max())
    if max_action <= longest_answer:
        raise ValueError(f"max_action must be above the longest answer, {longest_answer} tokens, got {max_action}")
    stop_ids = tuple(int(i) for i in np.flatnonzero(kinds.stop))
    spec = TokenSpec(
        vocab=tuple(vocab),
        max_observation=bank.prompts.shape[1],
        max_action=max_action,
        max_turns=1,
        stop_ids=stop_ids,
        pad_id=pad_id,
    )
    device_bank = PromptBank(*map(jnp.asarray, bank))
    device_kinds = TokenKinds(*map(jnp.asarray, kinds))

    def draw(key):
        return PromptState(jax.random.randint(key, (), 0, num_prompts, jnp.int32))

    def prompt(state):
        return Tokens(device_bank.prompts[state.row], device_bank.lengths[state.row])

    def grade(key, state, action):
        del key
        correct, length, stopped = verify(
            action, device_bank.answers[state.row], device_bank.answer_lengths[state.row], device_kinds
        )
        reward = correct.astype(jnp.float32)
        info = {
            "correct": reward,
            "stopped": stopped.astype(jnp.float32),
            "reply_length": length.astype(jnp.float32),
        }
        return reward, info

    def expert(key, state):
        del key
        best = jnp.argmax(device_bank.answer_lengths[state.row] > 0)
        ids, length = device_bank.answers[state.row, best], device_bank.answer_lengths[state.row, best]
        ids = jnp.pad(ids, (0, max_action))[:max_action]
        at = jnp.arange(max_action)
        return jnp.where(at < length, ids, jnp.where(at == length, stop_ids[0], pad_id)).astype(jnp.int32)

    def render(state):
        row = int(state.row)
        best = int(np.argmax(bank.answer_lengths[row] > 0))
        answer = decode(bank.answers[row, best], bank.answer_lengths[row, best], vocab)
        return f"{decode(bank.prompts[row], bank.lengths[row], vocab)} [{answer.strip(IGNORED)}]"

    return question_answer(draw, prompt, grade, spec, render=render, expert=expert)


def verify(
    action: jax.Array, answers: jax.Array, answer_lengths: jax.Array, kinds: TokenKinds
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Clean a reply and compare it with the accepted spellings.

    The stop token does not belong to the reply, not even what stands before the newline in it: "42" and a token ".\\n"
    are judged as "42". On the text before the stop token the verdict is that of `envs.questions.is_correct`, except
    that a right text in unaccepted tokens ("4", "2" for "42") is not recognised.

    Args:
      action: ids `[max_action]`.
      answers: `[M, A]`, of which `answer_lengths` `[M]` count.
      kinds: tables `[V]`.

    Returns:
      (correct bool `[]`, length of the reply before its stop int32 `[]`, stopped bool `[]`).
    """
    length, stopped = cut_turn(action, kinds.stop[action])
    at = jnp.arange(action.shape[0])
    counts = (at < length) & ~kinds.ignored[action]
    start = jnp.argmax(counts)

    def end_of(counts):
        return jnp.max(jnp.where(counts, at + 1, 0))

    end = end_of(counts)
    final = jnp.maximum(end - 1, 0)
    removes = (end > 0) & kinds.full_stop[action[final]]
    end = jnp.where(removes, end_of(counts & (at < final)), end)
    # Only one full stop is forgiven: not one in a token of its own after one inside the spelling.
    twice = removes & kinds.glued[action[jnp.maximum(end - 1, 0)]]
    width = answers.shape[-1]
    shifted = jnp.pad(action, (0, width))[start + jnp.arange(width)]
    same = (shifted == answers) | (jnp.arange(width) >= answer_lengths[:, None])
    correct = same.all(-1) & (answer_lengths == end - start) & (answer_lengths > 0)
    return correct.any() & ~twice, length, stopped


def _strip(ids, ignored):
    kept = [i for i, token in enumerate(ids) if not ignored[token]]
    return list(ids[kept[0] : kept[-1] + 1]) if kept else []


def _pad(rows, width, pad_id):
    ids = np.full((len(rows), width), pad_id, np.int32)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = tokens
    return ids, np.asarray([len(tokens) for tokens in rows], np.int32)
