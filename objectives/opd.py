"""Hindsight-guided on-policy distillation: a hint told after the fact, turned into losses per token (arXiv 2603.10165).

OpenClaw-RL's version 1 (the gap of sampled tokens) and version 2 (the top of a distribution, a choice of hints), as in
the released code: a teacher that was shown the hint re-scores the response really given. Alphabet: `B` samples, `L`
tokens of a response, `V` vocabulary, `M` candidate hints, `k` best tokens. Only the current policy carries gradients.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rollax.objectives.arrays import accurate, check_same_shape, concrete, masked
from rollax.objectives.reduction import aggregate, masked_mean
from rollax.objectives.surrogates import clip_bounds, clipped_surrogate

SUBSETS = ("student", "teacher", "overlap")
SELECTIONS = ("sequence", "token", "first", "shortest", "longest", "random")
TAIL = 1e-7  # the least mass of the bin that holds all tokens outside a top-k


def _check_positive(**numbers):
    for name, x in numbers.items():
        if x is not None and (known := concrete(x)) is not None and not np.all(known > 0):
            raise ValueError(f"{name} must be positive, got {x}")


def _check_weights(**weights):
    for name, x in weights.items():
        if (known := concrete(x)) is not None and not np.all(known >= 0):
            raise ValueError(f"{name} must not be negative, got {x}")


def _check_k(k, size):
    if not 1 <= k <= size:
        raise ValueError(f"k must be in 1..V={size}, got {k}")


def _bounds(clip):
    low, high = clip
    _check_positive(clip_low=low, clip_high=high)
    return clip_bounds(low, high)


# --- Version 1: one advantage per token ---------------------------------------------------------------------------


def token_gap_advantage(teacher_lp, old_lp, mask, clip=None):
    """`log pi_T(a | s + hint) - log pi_old(a | s)` of the tokens that were sampled.

    It can only push an unwanted token down: a token that was not sampled is not named. Student and teacher must be read
    at one temperature; then the student itself without a hint is a teacher whose gap is exactly 0.

    Args:
      teacher_lp, old_lp: `[B, L]`.
      mask: `[B, L]`, bool or 0/1.
      clip: the gap is held in [-clip, clip]; None for no clip, as in the paper; may be traced.

    Returns:
      `[B, L]`, 0 outside the mask, gradients stopped.

    Raises:
      ValueError: different shapes, or a concrete clip that is not positive.
    """
    check_same_shape(teacher_lp=teacher_lp, old_lp=old_lp, mask=mask)
    _check_positive(clip=clip)
    gap = masked(accurate(teacher_lp) - accurate(old_lp), mask)
    return jax.lax.stop_gradient(gap if clip is None else jnp.clip(gap, -clip, clip))


def combined_advantage(reward, gap, has_reward, has_hint, w_b=1.0, w_o=1.0):
    """`w_b r + w_o gap`: the evaluative and the directive signal of a turn in one advantage.

    A turn without a hint gets exactly `w_b r`. (The released code stores the behaviour's log-probs as its teacher and
    re-computes the student's a version later, so that noise takes the place of that zero.)

    Args:
      reward: `[B]`, the majority of the votes.
      gap: `[B, L]`, of `token_gap_advantage`.
      has_reward, has_hint: bool `[B]`.
      w_b, w_o: may be traced.

    Returns:
      `[B, L]`, gradients stopped; the reward stands on every column, the loss's mask chooses.

    Raises:
      ValueError: shapes that do not fit, or a concrete negative weight.
    """
    _check_weights(w_b=w_b, w_o=w_o)
    check_same_shape(reward=reward, has_reward=has_reward, has_hint=has_hint)
    if jnp.ndim(gap) != 2 or jnp.shape(reward) != jnp.shape(gap)[:1]:
        raise ValueError(f"reward must be [B] and gap [B, L], got shapes {jnp.shape(reward)} and {jnp.shape(gap)}")
    evaluative = masked(reward, has_reward)[:, None]
    directive = masked(gap, jnp.broadcast_to(jnp.asarray(has_hint)[:, None], jnp.shape(gap)))
    return jax.lax.stop_gradient(w_b * evaluative + w_o * directive)


def asymmetric_ppo(logp, old_lp, adv, mask, clip=(0.2, 0.28)):
    """PPO's loss per token with a higher upper bound: `max(-A rho, -A clip(rho, 1 - low, 1 + high))`.

    Where `old_lp` is the trainer's own and each batch makes one step, rho is 1 and the clip never acts.

    Args:
      logp, old_lp: of the sampled tokens, `[B, L]`.
      adv: `[B, L]` or `[B]`.
      mask: `[B, L]`, bool or 0/1.
      clip: (low, high), may be traced.

    Returns:
      `[B, L]`, 0 outside the mask.

    Raises:
      ValueError: shapes that do not fit, or a concrete bound that is not positive.
    """
    check_same_shape(logp=logp, old_lp=old_lp, mask=mask)
    lower, upper = _bounds(clip)
    log_ratio = masked(accurate(logp) - jax.lax.stop_gradient(accurate(old_lp)), mask)
    return masked(clipped_surrogate(log_ratio, jax.lax.stop_gradient(adv), lower, upper), mask)


def sample_mean(x, mask, batch_size):
    """`sum_i mean_t x / batch_size`: the mean over samples of the mean over their tokens.

    `aggregate` with a fixed denominator: a sample without a token adds 0 and is still counted.

    Args:
      x: `[B, L]`.
      mask: `[B, L]`, bool or 0/1.
      batch_size: samples of the whole batch, those of other parts and masked ones included; may be traced.
    """
    return aggregate(x, mask, "seq_mean_token_mean", norm=batch_size)


def topk_reverse_kl(student_logits, teacher_topk_logp, teacher_topk_idx):
    """`sum_j q_j (log q_j - log p_j)` over the teacher's k best tokens and one bin for all others.

    The student's KL to the teacher from k + 1 numbers of it. With k = V the bin is empty on both sides, and is held at
    1e-7.

    Args:
      student_logits: `[B, L, V]`, of any offset; it carries the gradient.
      teacher_topk_logp: `[B, L, k]`.
      teacher_topk_idx: int `[B, L, k]`, different tokens.

    Returns:
      `[B, L]`.

    Raises:
      ValueError: shapes that do not fit, or k > V.
    """
    check_same_shape(teacher_topk_logp=teacher_topk_logp, teacher_topk_idx=teacher_topk_idx)
    _check_k(jnp.shape(teacher_topk_idx)[-1], jnp.shape(student_logits)[-1])
    student = _with_tail(log_prob_at(student_logits, teacher_topk_idx))
    teacher = jax.lax.stop_gradient(_with_tail(accurate(teacher_topk_logp)))
    return jnp.sum(jnp.exp(student) * (student - teacher), axis=-1)


def _with_tail(logp):
    """`[..., k + 1]`: the last is the log of the mass that the k leave, which rounding may make nothing or less."""
    covered = jnp.minimum(jax.nn.logsumexp(logp, axis=-1, keepdims=True), -TAIL)
    return jnp.concatenate([logp, jnp.log(-jnp.expm1(covered))], axis=-1)


def log_prob_at(logits, index):
    """Log-probs of a few tokens: the k gathered logits less the log-sum-exp of the whole row, `[..., k]`.

    For a large vocabulary: no second array of V columns is kept. Log-probs may stand for the logits.

    Args:
      logits: `[..., V]`.
      index: int `[..., k]`.
    """
    logits = accurate(logits)
    return jnp.take_along_axis(logits, index, axis=-1) - jax.nn.logsumexp(logits, axis=-1, keepdims=True)


# --- Version 2: the top of a distribution, and a choice among hints ----------------------------------------------


def hint_overlap(old_logp, cand_logp, k):
    """How many of the student's k best tokens are among the k best with each hint.

    A hint that belongs to the response changes few of them.

    Args:
      old_logp: `[B, L, V]`, without a hint.
      cand_logp: `[M, B, L, V]`, with each candidate.
      k: static; among equals the lower token is the better.

    Returns:
      int32 `[M, B, L]`.

    Raises:
      ValueError: shapes that do not fit, or k outside 1..V.
    """
    if jnp.shape(cand_logp)[1:] != jnp.shape(old_logp):
        raise ValueError(f"cand_logp must be [M, *{jnp.shape(old_logp)}], got {jnp.shape(cand_logp)}")
    _check_k(k, jnp.shape(old_logp)[-1])
    student, teacher = (jax.lax.top_k(jax.lax.stop_gradient(x), k)[1] for x in (old_logp, cand_logp))
    return _among(student, teacher).sum(axis=-1).astype(jnp.int32)


def _among(index, other):
    """bool, like `index` (broadcast to `other`): whether a token `[..., k]` is among the others' `[..., k]`."""
    return (index[..., :, None] == other[..., None, :]).any(axis=-1)


def select_hint(overlap, mask, mode, *, valid=None, length=None, span=None, key=None):
    """Which candidate hint teaches each token (version 2; "longest" is version 1's rule).

    Args:
      overlap: int `[M, B, L]`, of `hint_overlap`; the candidates are ordered, the shortest first.
      mask: `[B, L]`, bool or 0/1.
      mode: static. "sequence": the largest overlap summed over the response. "token": the largest at each token.
        "first". "shortest", "longest": by `length`; without it the first and the last. "random": one for each sample.
      valid: bool `[M, B]`, which candidates exist; None for all.
      length: int `[M, B]`.
      span: int `[B, L]` in 0..L-1, the step of the response that a token belongs to; "sequence" then sums over, and
        chooses for, each step alone. None: the response is one.
      key: for "random".

    Returns:
      int32 `[B, L]`, the lowest index of equals; 0 where a sample has no candidate.

    Raises:
      ValueError: an unknown mode, "random" without a key, shapes that do not fit.
    """
    if mode not in SELECTIONS:
        raise ValueError(f"mode must be one of {SELECTIONS}, got {mode!r}")
    if mode == "random" and key is None:
        raise ValueError("key must be given for mode 'random', got None")
    overlap = jnp.asarray(overlap)
    if overlap.ndim != 3 or overlap.shape[1:] != jnp.shape(mask):
        raise ValueError(f"overlap must be [M, *{jnp.shape(mask)}], the shape of mask, got {overlap.shape}")
    order = jnp.broadcast_to(jnp.arange(overlap.shape[0])[:, None], overlap.shape[:2])
    valid = jnp.ones(order.shape, bool) if valid is None else jnp.asarray(valid, bool)
    length = order if length is None else jnp.asarray(length)
    check_same_shape(candidates=order, valid=valid, length=length)
    if mode == "token":
        value = overlap
    elif mode == "sequence":
        value = jnp.where(jnp.asarray(mask) != 0, overlap, 0)
        if span is None:
            value = value.sum(axis=-1, keepdims=True)
        else:
            check_same_shape(span=span, mask=mask)
            over_step = jax.vmap(lambda x, step: jax.ops.segment_sum(x, step, num_segments=x.size)[step])
            value = jax.vmap(over_step, in_axes=(0, None))(value, jnp.asarray(span))
    elif mode == "random":
        value = jax.random.uniform(key, order.shape)[..., None]
    else:
        value = {"first": -order, "shortest": -length, "longest": length}[mode][..., None]
    least = -jnp.inf if jnp.issubdtype(value.dtype, jnp.floating) else jnp.iinfo(value.dtype).min
    best = jnp.argmax(jnp.where(valid[..., None], value, least), axis=0)
    return jnp.broadcast_to(best, overlap.shape[1:]).astype(jnp.int32)


class TopK(NamedTuple):
    """What a top-k distillation step needs of student and teacher: k numbers a token instead of V.

    Attributes:
      index: int32 `[B, L, k]`, the tokens S.
      keep: bool `[B, L, k]`, false where the subset has fewer than k.
      old_logp: `[B, L, k]`, log pi_old of them.
      delta: `[B, L, k]`, the clipped `log pi_T - log pi_old`; 0 where not kept.
      advantage: `[B, L, k]`, `delta` times its weight in pi_old renormalised over S.
    """

    index: jax.Array
    keep: jax.Array
    old_logp: jax.Array
    delta: jax.Array
    advantage: jax.Array


def topk_advantage(old_logp, teacher_logp, *, k=4, subset="student", diff_clip=1.0):
    """Advantages of a few tokens at every position, sampled or not: `w_v clip(Delta_v, -C, C)`.

    `Delta_v` is a difference of global log-probs; the weights alone are renormalised.

    Args:
      old_logp, teacher_logp: `[B, L, V]`.
      k: static.
      subset: static. "student": S is the student's top k. "teacher": the teacher's. "overlap": what they share.
      diff_clip: C; None for no clip; may be traced. The paper has 1 for the personal track, 2 for the others.

    Returns:
      `TopK`, gradients stopped.

    Raises:
      ValueError: different shapes, k outside 1..V, an unknown subset, or a concrete C that is not positive.
    """
    check_same_shape(old_logp=old_logp, teacher_logp=teacher_logp)
    _check_k(k, jnp.shape(old_logp)[-1])
    _check_positive(diff_clip=diff_clip)
    if subset not in SUBSETS:
        raise ValueError(f"subset must be one of {SUBSETS}, got {subset!r}")
    old_logp, teacher_logp = jax.lax.stop_gradient((accurate(old_logp), accurate(teacher_logp)))
    _, index = jax.lax.top_k(teacher_logp if subset == "teacher" else old_logp, k)
    keep = jnp.ones(index.shape, bool)
    if subset == "overlap":
        keep = _among(index, jax.lax.top_k(teacher_logp, k)[1])
    old, teacher = (jnp.take_along_axis(x, index, axis=-1) for x in (old_logp, teacher_logp))
    keep &= old > -jnp.inf  # a restricted vocabulary may have fewer than k tokens
    delta = jnp.where(keep, teacher - jnp.where(keep, old, 0.0), 0.0)
    if diff_clip is not None:
        delta = jnp.clip(delta, -diff_clip, diff_clip)
    # A row that keeps nothing has weights of 0, not 0 / 0.
    largest = jnp.max(jnp.where(keep, old, -jnp.inf), axis=-1, keepdims=True)
    mass = jnp.where(keep, jnp.exp(old - jnp.where(keep.any(axis=-1, keepdims=True), largest, 0.0)), 0.0)
    total = mass.sum(axis=-1, keepdims=True)
    weight = mass / jnp.where(total > 0, total, 1.0)
    return TopK(index, keep, old, delta, weight * delta)


def topk_surrogate(cur_topk_logp, target, mask, *, clip=(0.2, 0.28)):
    """`sum_{v in S} max(-A_v rho_v, -A_v clip(rho_v, 1 - low, 1 + high))`: a sum, not a mean.

    The ratios are global: with renormalised ones the student could please the loss by moving mass out of S.

    For a large vocabulary this is the lean form of `topk_opd_loss`: keep a `TopK` with the sample, and take
    `cur_topk_logp = log_prob_at(logits, target.index)` in the training step.

    Args:
      cur_topk_logp: `[B, L, k]`, log pi of the tokens of `target`; the only one that carries a gradient.
      target: `TopK`.
      mask: `[B, L]`, bool or 0/1.
      clip: (low, high), may be traced.

    Returns:
      (loss `[B, L]`, 0 outside the mask; metrics, means over the masked tokens, gradients stopped). "subset_size": |S|;
      "empty": share of tokens with an empty S; "advantage": sum of A_v; "clip_fraction": share of S that the clip cuts
      off from a gradient.

    Raises:
      ValueError: shapes that do not fit, or a concrete bound that is not positive.
    """
    check_same_shape(cur_topk_logp=cur_topk_logp, index=target.index)
    if jnp.shape(mask) != jnp.shape(target.index)[:-1]:
        raise ValueError(f"mask must be [B, L] = {jnp.shape(target.index)[:-1]}, got {jnp.shape(mask)}")
    lower, upper = _bounds(clip)
    target = jax.lax.stop_gradient(target)
    log_ratio = jnp.where(target.keep, accurate(cur_topk_logp) - target.old_logp, 0.0)
    each = masked(clipped_surrogate(log_ratio, target.advantage, lower, upper), target.keep)
    loss = masked(each.sum(axis=-1), mask)
    ratio = jnp.exp(jax.lax.stop_gradient(log_ratio))
    cut = jnp.where(target.advantage > 0, ratio > upper, (target.advantage < 0) & (ratio < lower))
    size = target.keep.sum(axis=-1)
    every = jnp.asarray(mask)[..., None] * target.keep
    metrics = {
        "subset_size": masked_mean(size, mask),
        "empty": masked_mean(size == 0, mask),
        "advantage": masked_mean(target.advantage.sum(axis=-1), mask),
        "clip_fraction": masked_mean(cut, every),
    }
    return loss, metrics


def topk_opd_loss(cur_logp, old_logp, teacher_logp, mask, *, k=4, subset="student", diff_clip=1.0, clip=(0.2, 0.28)):
    """The clipped top-k distillation loss of version 2, from whole distributions.

    `topk_advantage` then `topk_surrogate`; see there for what is meant and for vocabularies too large for this.

    Args:
      cur_logp, old_logp, teacher_logp: `[B, L, V]`; the first carries the gradient. `old_logp` must be the trainer's
        own, at the temperature of `cur_logp`.
      mask: `[B, L]`, bool or 0/1.
      k, subset, diff_clip: see `topk_advantage`.
      clip: (low, high), may be traced.

    Returns:
      (loss `[B, L]`, 0 outside the mask and where the subset is empty; metrics, see `topk_surrogate`).

    Raises:
      ValueError: see the two.
    """
    check_same_shape(cur_logp=cur_logp, old_logp=old_logp, teacher_logp=teacher_logp)
    target = topk_advantage(old_logp, teacher_logp, k=k, subset=subset, diff_clip=diff_clip)
    return topk_surrogate(jnp.take_along_axis(cur_logp, target.index, axis=-1), target, mask, clip=clip)


def hybrid_loss(
    cur_logp,
    old_logp,
    cand_logp,
    tokens,
    rl_advantage,
    mask,
    *,
    k=4,
    subset="student",
    select="sequence",
    diff_clip=1.0,
    clip=(0.2, 0.28),
    w_rl=1.0,
    w_opd=1.0,
    valid=None,
    length=None,
    span=None,
    key=None,
    batch_size=None,
):
    """`w_rl L_RL + w_opd L_OPD`: the loss of OpenClaw-RL's version 2.

    Args:
      cur_logp, old_logp: `[B, L, V]`, log-probs of the current policy, which carries the gradient, and of the old one.
      cand_logp: `[M, B, L, V]`, of the teacher with each candidate hint.
      tokens: int `[B, L]`, the response.
      rl_advantage: `[B]` or `[B, L]`, the reward of the turn; 0 where it has none.
      mask: `[B, L]`, bool or 0/1.
      k, subset, diff_clip: see `topk_advantage`.
      select, length, span, key: see `select_hint`.
      clip: (low, high) of both losses.
      w_rl, w_opd: may be traced.
      valid: bool `[M, B]`, which candidates exist; None for all. A sample without one has no distillation term.
      batch_size: see `sample_mean`; None for B.

    Returns:
      (loss `[]`; metrics: those of `topk_surrogate` over samples with a hint, "rl_loss" and "opd_loss" `[]` before
      their weights, "rl_tokens" and "opd_tokens" `[B, L]`, "overlap" int32 `[M, B, L]`, "choice" int32 `[B, L]`; no
      gradient passes through the metrics).

    Raises:
      ValueError: shapes that do not fit, a concrete negative weight, and see the parts.
    """
    _check_weights(w_rl=w_rl, w_opd=w_opd)
    check_same_shape(tokens=tokens, mask=mask)
    overlap = hint_overlap(old_logp, cand_logp, k)
    choice = select_hint(overlap, mask, select, valid=valid, length=length, span=span, key=key)
    teacher = jnp.take_along_axis(jnp.asarray(cand_logp), choice[None, ..., None], axis=0)[0]
    hinted = jnp.asarray(mask)
    if valid is not None:
        hinted = hinted * jnp.asarray(valid, bool).any(axis=0)[:, None]
    opd_tokens, metrics = topk_opd_loss(
        cur_logp, old_logp, teacher, hinted, k=k, subset=subset, diff_clip=diff_clip, clip=clip
    )
    cur, old = (jnp.take_along_axis(x, tokens[..., None], axis=-1)[..., 0] for x in (cur_logp, old_logp))
    rl_tokens = asymmetric_ppo(cur, old, rl_advantage, mask, clip)
    batch_size = jnp.shape(mask)[0] if batch_size is None else batch_size
    rl_loss, opd_loss = (sample_mean(x, mask, batch_size) for x in (rl_tokens, opd_tokens))
    metrics |= dict(
        rl_loss=rl_loss, opd_loss=opd_loss, rl_tokens=rl_tokens, opd_tokens=opd_tokens, overlap=overlap, choice=choice
    )
    return w_rl * rl_loss + w_opd * opd_loss, jax.lax.stop_gradient(metrics)
