"""Hindsight-guided distillation: golden arrays of OpenClaw-RL (arXiv 2603.10165), definitions, gradients, limits.

Of the golden arrays, `combine` and `topk` come from the released code, `hybrid` from an independent float64 derivation
of version 2 whose gradients are automatic; all of one batch and the tokens' values before any mask.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from rollax import objectives as ob
from rollax.tests.support import GOLDEN as FOLDER

GOLDEN = dict(np.load(FOLDER / "openclaw_rl.npz"))
SELECTIONS, SUBSETS = ("first", "token", "sequence"), ("student", "teacher", "overlap")


def case_of(prefix):
    return {k.removeprefix(prefix + "_"): v for k, v in GOLDEN.items() if k.startswith(prefix + "_")}


def close(found, expected, atol=1e-9):
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


def at(log_prob, tokens):
    return jnp.take_along_axis(log_prob, tokens[..., None], axis=-1)[..., 0]


# --- The released code -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(3))
def test_combined_loss_of_the_released_code(number):
    c = case_of(f"combine{number}")
    inside = np.arange(c["tokens"].shape[1]) < c["length"][:, None]
    clip = (c["clip_low"], c["clip_high"])

    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(logits):
        logp = at(jax.nn.log_softmax(logits / c["temperature"]), c["tokens"])
        gap = ob.token_gap_advantage(c["teacher_logp"], c["old_logp"], inside)
        kind = c["kind_0rl_1opd_2both"]
        advantage = ob.combined_advantage(c["reward"], gap, kind != 1, kind != 0, c["w_rl"], c["w_opd"])
        policy = ob.sample_mean(ob.asymmetric_ppo(logp, c["old_logp"], advantage, c["mask"], clip), c["mask"], 1)
        kl = ob.sample_mean(ob.kl_estimate(logp, c["ref_logp"], "k3"), c["mask"], 1)
        return policy + c["kl_coef"] * kl, (advantage, policy, kl)

    with jax.enable_x64(True):
        (total, (advantage, policy, kl)), gradient = jax.jit(loss)(c["logits"])
    close(np.asarray(advantage) * inside, c["advantage"])
    close((policy, kl, total), (c["pg_loss"], c["kl_loss"], c["loss_sum_over_samples"]))
    close(gradient, c["grad_logits"], 1e-8)


@pytest.mark.parametrize("number", range(2))
def test_topk_kl_of_the_released_code(number):
    c = case_of(f"topk{number}")
    mask = np.arange(c["student_logits"].shape[1]) < c["length"][:, None]

    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(logits):
        each = ob.topk_reverse_kl(logits, c["teacher_topk_logp"], c["teacher_topk_index"])
        return ob.sample_mean(each, mask, 1), each

    with jax.enable_x64(True):
        (total, each), gradient = jax.jit(loss)(c["student_logits"])
    close(np.asarray(each) * mask, c["per_token_kl"] * mask)
    close(total, c["loss_sum_over_samples"])
    close(gradient, c["grad_logits"], 1e-8)


@functools.cache
def hybrid(number):
    """For each way to choose hint and tokens: (loss, metrics, gradient, `TopK` for the chosen hint), in one program."""
    c = case_of(f"hybrid{number}")
    shared = dict(k=int(c["topk"]), diff_clip=float(c["diff_clip_0_means_none"]) or None)
    weights = dict(clip=(c["clip_low"], c["clip_high"]), w_rl=c["w_rl"], w_opd=c["w_opd"])
    tokens, advantage, mask = (c[name][None] for name in ("tokens", "rl_advantage", "mask"))
    old, candidates = c["old_logp_full"][None], c["teacher_logp_full"][:, None]

    def compute(logits, select, subset):
        def loss(logits):
            cur = jax.nn.log_softmax(logits)[None]
            options = shared | weights | dict(select=select, subset=subset)
            return ob.hybrid_loss(cur, old, candidates, tokens, advantage, mask, **options)

        (total, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(logits)
        teacher = jnp.take_along_axis(candidates, metrics["choice"][None, ..., None], axis=0)[0]
        return total, metrics, gradient, ob.topk_advantage(old, teacher, subset=subset, **shared)

    @jax.jit
    def all_ways(logits):
        return {(select, subset): compute(logits, select, subset) for select in SELECTIONS for subset in SUBSETS}

    with jax.enable_x64(True):
        return all_ways(c["logits"])


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("select", SELECTIONS)
@pytest.mark.parametrize("number", range(3))
def test_hybrid_loss(number, select, subset):
    c = case_of(f"hybrid{number}")
    name, mask = f"{select}_{subset}_", c["mask"]
    total, metrics, gradient, target = hybrid(number)[select, subset]
    np.testing.assert_array_equal(metrics["overlap"][:, 0], c["overlap"])
    np.testing.assert_array_equal(metrics["choice"][0], c[name + "k_star"])
    close(total, c[name + "loss"])
    close(metrics["opd_tokens"][0], c[name + "opd_token"] * mask)
    close(metrics["rl_tokens"][0], c["rl_token"] * mask)
    close(gradient, c[name + "grad"], 1e-8)
    full = np.zeros(c["logits"].shape)
    np.put_along_axis(full, np.asarray(target.index[0]), np.asarray(target.advantage[0]), axis=-1)
    close(full, c[name + "adv_full"])
    close(metrics["empty"], np.mean(~target.keep[0].any(axis=-1)[mask > 0]))


def test_kl_estimators_of_the_released_code():
    c = case_of("kl0")
    with jax.enable_x64(True):
        for kind in ("k1", "k2", "k3"):
            close(ob.kl_estimate(c["logp"], c["ref"], kind), c[kind])
        close(ob.kl_estimate(c["logp"], c["ref"], "k3", value_clip=10.0), c["low_var_kl"])


# --- Version 1 -------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=1)
def _distributions(key, shape):
    return jax.nn.log_softmax(2 * jax.random.normal(key, shape))


def distributions(shape, seed=0):
    return _distributions(jax.random.key(seed), shape)


def test_the_student_itself_without_a_hint_teaches_nothing():
    student = distributions((3, 5, 11))
    tokens = jax.random.randint(jax.random.key(1), (3, 5), 0, 11)
    mask = jnp.arange(5) < jnp.asarray([5, 2, 0])[:, None]
    gap = ob.token_gap_advantage(at(student, tokens), at(student, tokens), mask)
    assert not np.any(gap)
    for subset in SUBSETS:
        loss, metrics = jax.jit(functools.partial(ob.topk_opd_loss, subset=subset))(student, student, student, mask)
        assert not np.any(loss) and not np.any(metrics["advantage"])
    full = jnp.broadcast_to(jnp.arange(11), student.shape)
    np.testing.assert_allclose(ob.topk_reverse_kl(student, student, full), 0, atol=1e-6)


def test_gap_is_masked_clipped_and_stopped():
    teacher, old = (
        -jnp.asarray([[1.0, 9.0, jnp.nan], [0.5, 1.0, 2.0]]),
        -jnp.asarray([[3.0, 1.0, 1.0], [1.0, 1.0, 1.0]]),
    )
    mask = jnp.asarray([[1, 1, 0], [1, 0, 1]])
    assert ob.token_gap_advantage(teacher, old, mask).tolist() == [[2, -8, 0], [0.5, 0, -1]]
    clipped = jax.vmap(lambda clip: ob.token_gap_advantage(teacher, old, mask, clip))(jnp.asarray([1.5, jnp.inf]))
    assert clipped.tolist() == [[[1.5, -1.5, 0], [0.5, 0, -1]], [[2, -8, 0], [0.5, 0, -1]]]
    for argument in range(2):
        gradient = jax.grad(lambda *x: ob.token_gap_advantage(*x, mask).sum(), argument)(jnp.nan_to_num(teacher), old)
        assert not np.any(gradient)


def test_combined_advantage_has_an_exact_zero_for_what_is_missing():
    gap = jnp.asarray([[0.5, -2.0]] * 4)
    has_reward, has_hint = jnp.asarray([1, 0, 1, 0], bool), jnp.asarray([1, 1, 0, 0], bool)
    reward = jnp.asarray([-1.0, jnp.nan, 1.0, 1.0])
    found = ob.combined_advantage(reward, gap, has_reward, has_hint, 2.0, 3.0)
    assert found.tolist() == [[-0.5, -8], [1.5, -6], [2, 2], [0, 0]]
    assert not np.any(jax.grad(lambda x: ob.combined_advantage(reward, x, has_reward, has_hint).sum())(gap))
    weights = jnp.asarray([0.0, 2.0])
    several = jax.vmap(lambda w: ob.combined_advantage(reward, gap, has_reward, has_hint, w, 3.0))(weights)
    np.testing.assert_array_equal(several[1], found)


def test_asymmetric_clip_holds_on_one_side_of_each_sign():
    log_ratio = jnp.log(jnp.asarray([[0.5, 0.9, 1.0, 1.25, 1.5]]))
    old = jnp.full((1, 5), -1.0)

    @jax.jit
    def loss(x, sign, mask=None):
        return ob.asymmetric_ppo(x, old, jnp.asarray([sign]), jnp.ones((1, 5)) if mask is None else mask)

    np.testing.assert_allclose(loss(old + log_ratio, 1.0), [[-0.5, -0.9, -1, -1.25, -1.28]], rtol=1e-6)
    np.testing.assert_allclose(loss(old + log_ratio, -1.0), [[0.8, 0.9, 1, 1.25, 1.5]], rtol=1e-6)
    for sign, expected in ((1.0, [-0.5, -0.9, -1, -1.25, 0]), (-1.0, [0, 0.9, 1, 1.25, 1.5])):
        gradient = jax.grad(lambda x, sign=sign: loss(x, sign).sum())(old + log_ratio)
        np.testing.assert_allclose(gradient, [expected], rtol=1e-6)
    hidden = loss(jnp.where(jnp.arange(5) == 1, jnp.nan, old), 1.0, jnp.arange(5)[None] != 1)
    assert hidden.tolist() == [[-1, 0, -1, -1, -1]]
    # What was sampled under other weights is data: nothing flows into it.
    assert not np.any(jax.grad(lambda x: ob.asymmetric_ppo(old, x, jnp.ones(1), jnp.ones((1, 5))).sum())(old))


def test_masked_samples_count_in_the_divisor():
    x = jnp.asarray([[1.0, 3.0], [5.0, jnp.nan], [jnp.nan, 7.0]])
    mask = jnp.asarray([[1, 1], [1, 0], [0, 0]])
    assert float(ob.sample_mean(x, mask, 3)) == pytest.approx(7 / 3)
    # The parts of a batch add up.
    parts = [ob.sample_mean(x[i : i + 1], mask[i : i + 1], jnp.asarray(16)) for i in range(3)]
    assert float(sum(parts)) == pytest.approx(7 / 16)


@pytest.mark.parametrize("k", [1, 4, 9])
def test_topk_kl_by_its_definition(k):
    rng = np.random.default_rng(k)
    logits = rng.normal(size=(2, 3, 9)) * 2
    teacher = jax.nn.log_softmax(rng.normal(size=(2, 3, 9)) * 2)
    values, index = jax.lax.top_k(teacher, k)
    found = jax.jit(ob.topk_reverse_kl)(logits + 7.0, values, index)
    q, p = np.exp(np.asarray(jax.nn.log_softmax(logits))), np.exp(np.asarray(teacher))
    q, p = (np.take_along_axis(x, np.asarray(index), axis=-1) for x in (q, p))
    expected = (q * np.log(q / p)).sum(axis=-1)
    if k < 9:
        q_tail, p_tail = 1 - q.sum(axis=-1), 1 - p.sum(axis=-1)
        expected += q_tail * np.log(q_tail / p_tail)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=3e-6)
    # A coarser grouping of tokens never has more divergence.
    assert np.all(found < (np.exp(jax.nn.log_softmax(logits)) * (jax.nn.log_softmax(logits) - teacher)).sum(-1) + 1e-5)
    gradient = jax.jit(jax.grad(lambda x: ob.topk_reverse_kl(x, values, index).sum()))(logits)
    assert np.all(np.isfinite(gradient)) and np.any(gradient != 0)


# --- Version 2 -------------------------------------------------------------------------------------------------------


def test_overlap_by_sets_and_ties_go_to_the_lowest_token():
    old, candidates = distributions((2, 3, 9)), distributions((4, 2, 3, 9), 1)
    found = jax.jit(ob.hint_overlap, static_argnums=2)(old, candidates, 4)
    best = np.argsort(-np.asarray(old), axis=-1)[..., :4], np.argsort(-np.asarray(candidates), axis=-1)[..., :4]
    for m, b, i in np.ndindex(4, 2, 3):
        assert int(found[m, b, i]) == len(set(best[0][b, i].tolist()) & set(best[1][m, b, i].tolist()))
    assert found.dtype == jnp.int32 and np.all(ob.hint_overlap(old, candidates, 9) == 9)
    tied = jnp.zeros((1, 1, 5))
    assert ob.hint_overlap(tied, tied.at[0, 0, 4].set(1.0)[None], 3).tolist() == [[[2]]]


def test_selection():
    # Three candidates, two samples, three tokens.
    overlap = jnp.asarray(
        [[[1, 4, 0], [2, 2, 2]], [[3, 3, 0], [2, 3, 3]], [[3, 2, 9], [0, 9, 2]]]
    )  # [M = 3, B = 2, L = 3]
    mask = jnp.asarray([[1, 1, 0], [1, 1, 1]])

    def choose(mode, **options):
        return jax.jit(functools.partial(ob.select_hint, mode=mode))(overlap, mask, **options).tolist()

    assert choose("sequence") == [[1] * 3, [2] * 3]  # 5, 6, 5 where the mask is; 6, 8, 11
    assert choose("token") == [[1, 0, 2], [0, 2, 1]]
    assert choose("first") == choose("shortest") == [[0] * 3, [0] * 3] and choose("longest") == [[2] * 3, [2] * 3]
    length = jnp.asarray([[5, 7], [4, 7], [4, 3]])
    assert choose("shortest", length=length) == [[1] * 3, [2] * 3]
    assert choose("longest", length=length) == [[0] * 3, [0] * 3]
    valid = jnp.asarray([[0, 0], [0, 0], [1, 0]], bool)
    for mode in ("sequence", "token", "first", "shortest", "longest"):
        assert choose(mode, valid=valid) == [[2] * 3, [0] * 3]
    some = jnp.asarray([[1, 0], [0, 1], [1, 1]], bool)
    keys = jax.random.split(jax.random.key(0), 600)
    drawn = jax.vmap(lambda key: ob.select_hint(overlap, mask, "random", valid=some, key=key))(keys)
    assert np.all(drawn == drawn[..., :1])  # one for a response
    share = [np.bincount(np.asarray(drawn)[:, b, 0], minlength=3) / 600 for b in range(2)]
    np.testing.assert_allclose(share, [[0.5, 0, 0.5], [0, 0.5, 0.5]], atol=0.1)
    # A tie in the sum goes to the shorter hint.
    assert ob.select_hint(jnp.ones((3, 1, 2), jnp.int32), jnp.ones((1, 2)), "sequence").tolist() == [[0, 0]]


def topk_by_hand(cur, old, teacher, k, subset, c, clip):
    """One position in plain Python."""
    student_best, teacher_best = (np.argsort(-x, kind="stable")[:k].tolist() for x in (old, teacher))
    chosen = {"student": student_best, "teacher": teacher_best}.get(
        subset, [v for v in student_best if v in teacher_best]
    )
    loss, mass = 0.0, sum(np.exp(old[v]) for v in chosen)
    for v in chosen:
        advantage = np.clip(teacher[v] - old[v], -c, c) * np.exp(old[v]) / mass
        ratio = np.exp(cur[v] - old[v])
        loss += max(-advantage * ratio, -advantage * np.clip(ratio, 1 - clip[0], 1 + clip[1]))
    return loss, len(chosen)


@pytest.mark.parametrize("subset", SUBSETS)
def test_topk_loss_by_hand(subset):
    cur, old, teacher = (distributions((4, 5, 12), seed) for seed in range(3))
    mask = jnp.arange(5) < jnp.asarray([5, 3, 1, 4])[:, None]
    compute = jax.jit(
        lambda c, clip: ob.topk_opd_loss(cur, old, teacher, mask, k=3, subset=subset, diff_clip=c, clip=clip)
    )
    for c, clip in ((0.7, (0.2, 0.28)), (jnp.inf, (0.1, 0.5))):
        loss, metrics = compute(c, clip)
        sizes = []
        for b, i in np.ndindex(4, 5):
            rows = (np.asarray(x[b, i], np.float64) for x in (cur, old, teacher))
            expected, size = topk_by_hand(*rows, 3, subset, c, clip)
            np.testing.assert_allclose(loss[b, i], expected * mask[b, i], rtol=1e-4, atol=1e-6)
            sizes.append(size)
        kept = np.asarray(sizes)[np.asarray(mask).ravel()]
        np.testing.assert_allclose(metrics["subset_size"], kept.mean(), rtol=1e-6)
        np.testing.assert_allclose(metrics["empty"], (kept == 0).mean(), rtol=1e-6)
    unclipped = ob.topk_opd_loss(cur, old, teacher, mask, k=3, subset=subset, diff_clip=None, clip=(0.1, 0.5))[0]
    np.testing.assert_allclose(unclipped, loss, rtol=1e-5, atol=1e-6)


def test_an_empty_overlap_is_a_zero_that_still_counts():
    old = jnp.log(jnp.asarray([[[0.45, 0.45, 0.05, 0.05], [0.45, 0.45, 0.05, 0.05]]]))
    teacher = old.at[0, 0].set(jnp.log(jnp.asarray([0.05, 0.05, 0.45, 0.45])))
    mask = jnp.ones((1, 2))

    def loss(cur):
        each, metrics = ob.topk_opd_loss(cur, old, teacher.at[0, 1, 0].add(0.1), mask, k=2, subset="overlap")
        return ob.sample_mean(each, mask, 1), (each, metrics)

    (total, (each, metrics)), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(old)
    assert float(each[0, 0]) == 0 and float(each[0, 1]) != 0 and float(metrics["empty"]) == 0.5
    np.testing.assert_allclose(total, each[0, 1] / 2, rtol=1e-6)
    assert not np.any(gradient[0, 0]) and np.any(gradient[0, 1]) and np.all(np.isfinite(gradient))


def test_only_the_current_policy_has_a_gradient_and_it_is_right():
    cur, old, *candidates = (distributions((2, 3, 7), seed) for seed in range(4))
    candidates = jnp.stack(candidates)
    tokens = jax.random.randint(jax.random.key(9), (2, 3), 0, 7)
    mask = jnp.asarray([[1, 1, 1], [1, 1, 0]])

    @jax.jit
    def loss(cur, old, candidates, advantage):
        return ob.hybrid_loss(cur, old, candidates, tokens, advantage, mask, k=3, clip=(0.3, 0.4))[0]

    advantage = jnp.asarray([1.0, -1.0])
    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(cur, old, candidates, advantage)
    assert np.any(gradients[0]) and not any(np.any(x) for x in gradients[1:])
    assert not np.any(gradients[0][1, 2])  # outside the mask
    with jax.enable_x64(True):
        arguments = [x.astype(jnp.float64) for x in (old, candidates, advantage)]
        check_grads(lambda x: loss(x, *arguments), [cur.astype(jnp.float64)], order=1, modes=["rev"], eps=1e-6)


def test_on_policy_gradient_raises_what_the_teacher_prefers():
    """At rho = 1 the loss is -sum of A, and its gradient in the log-probs is -A."""
    old, teacher = distributions((1, 2, 6)), distributions((1, 2, 6), 1)
    gradient = jax.jit(jax.grad(lambda x: ob.topk_opd_loss(x, old, teacher, jnp.ones((1, 2)), k=6)[0].sum()))(old)
    expected = -jnp.exp(old) * jnp.clip(teacher - old, -1, 1)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-7)


def test_without_hints_hybrid_is_binary():
    cur, old, candidates = distributions((3, 4, 8)), distributions((3, 4, 8), 1), distributions((2, 3, 4, 8), 2)
    tokens, mask = jnp.ones((3, 4), jnp.int32), jnp.asarray([[1, 1, 1, 0]] * 3)
    reward = jnp.asarray([1.0, -1.0, 0.0])
    call = jax.jit(functools.partial(ob.hybrid_loss, cur, old, candidates, tokens, reward, mask))
    binary = ob.sample_mean(ob.asymmetric_ppo(at(cur, tokens), at(old, tokens), reward, mask), mask, 3)
    loss, metrics = call(valid=jnp.zeros((2, 3), bool))
    np.testing.assert_allclose(loss, binary, atol=1e-7)
    assert float(loss) == float(metrics["rl_loss"]) and float(metrics["opd_loss"]) == 0
    # With a hint on one sample, that one alone has a distillation term, and only from a candidate that exists.
    loss, metrics = call(valid=jnp.asarray([[0, 0, 0], [0, 1, 0]], bool), w_opd=0.5)
    assert np.any(metrics["opd_tokens"][1]) and not np.any(metrics["opd_tokens"][jnp.asarray([0, 2])])
    assert np.all(metrics["choice"][1] == 1)
    alone = jax.jit(ob.topk_opd_loss)(cur, old, candidates[1], mask)[0]
    np.testing.assert_allclose(metrics["opd_tokens"][1], alone[1], rtol=1e-6)
    np.testing.assert_allclose(loss, binary + 0.5 * metrics["opd_loss"], atol=1e-6)
    np.testing.assert_allclose(call(batch_size=16)[0] * 16, call()[0] * 3, rtol=1e-6)


def test_the_lean_form_is_the_same_loss():
    """k numbers a token kept with the sample, and the log-sum-exp of the logits in the training step."""
    logits = 3 * jax.random.normal(jax.random.key(0), (2, 4, 50)) + 5
    old, teacher = distributions((2, 4, 50), 1), distributions((2, 4, 50), 2)
    mask = jnp.asarray([[1, 1, 1, 1], [1, 1, 0, 0]])

    def whole(logits):
        return ob.topk_opd_loss(jax.nn.log_softmax(logits), old, teacher, mask, subset="overlap", k=8)[0].sum()

    target = ob.topk_advantage(old, teacher, subset="overlap", k=8)

    def lean(logits):
        return ob.topk_surrogate(ob.log_prob_at(logits, target.index), target, mask)[0].sum()

    (a, a_gradient), (b, b_gradient) = (jax.jit(jax.value_and_grad(f))(logits) for f in (whole, lean))
    np.testing.assert_allclose(a, b, rtol=1e-5)
    np.testing.assert_allclose(a_gradient, b_gradient, rtol=1e-4, atol=1e-6)


def test_numbers_may_be_traced_and_vmap_is_a_loop():
    cur, old, candidates = distributions((2, 3, 8)), distributions((2, 3, 8), 1), distributions((2, 2, 3, 8), 2)
    tokens, mask = jnp.ones((2, 3), jnp.int32), jnp.ones((2, 3))

    def loss(c, low, w_rl, w_opd):
        return ob.hybrid_loss(
            cur,
            old,
            candidates,
            tokens,
            jnp.ones(2),
            mask,
            diff_clip=c,
            clip=(low, 0.28),
            w_rl=w_rl,
            w_opd=w_opd,
        )[0]

    numbers = [jnp.asarray(x) for x in ([0.5, 1.0, jnp.inf], [0.1, 0.2, 0.2], [1.0, 0.0, 1.0], [1.0, 2.0, 0.5])]
    several, one = jax.jit(jax.vmap(loss)), jax.jit(loss)
    np.testing.assert_allclose(several(*numbers), [one(*(float(x[i]) for x in numbers)) for i in range(3)], rtol=1e-5)


def test_steps_of_a_response_choose_alone():
    """A hint for each step is what the steps, taken apart, would choose."""
    overlap = jax.random.randint(jax.random.key(9), (4, 2, 6), 0, 5)
    mask = jnp.asarray([[1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 1, 0]])
    span = jnp.asarray([[0, 0, 2, 2, 2, 5], [1, 1, 1, 1, 3, 3]])
    together = jax.jit(functools.partial(ob.select_hint, mode="sequence"))(overlap, mask, span=span)
    whole = ob.select_hint(overlap, mask, "sequence")
    assert (together != whole).any()
    for row in range(2):
        for step in np.unique(span[row]):
            here = np.asarray(span[row] == step)
            alone = ob.select_hint(overlap[:, row : row + 1, here], mask[row : row + 1, here], "sequence")
            np.testing.assert_array_equal(together[row, here], alone[0])


@pytest.mark.parametrize("subset", SUBSETS)
def test_a_restricted_vocabulary_may_have_fewer_than_k_tokens(subset):
    raw = jax.random.normal(jax.random.key(10), (3, 2, 4, 8))
    cur, old, teacher = jax.nn.log_softmax(jnp.where(jnp.arange(8) < 2, raw, -jnp.inf))
    loss = jax.jit(
        lambda x, k: ob.topk_opd_loss(x, old, teacher, jnp.ones((2, 4)), k=k, subset=subset)[0], static_argnums=1
    )
    np.testing.assert_allclose(loss(cur, 5), loss(cur, 2), rtol=1e-6)
    assert np.isfinite(jax.grad(lambda x: loss(x, 5).sum())(cur)).all()


def test_nan_behind_the_mask_stays_out_of_the_gradient():
    old, mask = jnp.full((1, 3), -1.0), jnp.asarray([[1, 0, 1]])
    gradient = jax.grad(lambda x: ob.asymmetric_ppo(x, old, jnp.ones(1), mask).sum())(old.at[0, 1].set(jnp.nan))
    np.testing.assert_array_equal(gradient, [[-1, 0, -1]])


def test_bad_input():
    x, mask = distributions((2, 3, 5)), jnp.ones((2, 3))
    candidates, tokens = x[None], jnp.zeros((2, 3), jnp.int32)
    hybrid_call = functools.partial(ob.hybrid_loss, x, x, candidates, tokens, jnp.ones(2), mask)
    overlap = jnp.ones((1, 2, 3), jnp.int32)
    for call, message in (
        (lambda: ob.hint_overlap(x, candidates, 6), "k must be in 1..V=5, got 6"),
        (lambda: ob.topk_opd_loss(x, x, x, mask, k=6), "k must be in 1..V=5, got 6"),
        (lambda: ob.topk_opd_loss(x, x, x, mask, k=0), "k must be in 1..V=5, got 0"),
        (lambda: ob.topk_opd_loss(x, x, x, mask, subset="both"), "subset must be one of .*, got 'both'"),
        (lambda: ob.topk_opd_loss(x, x, x, mask, diff_clip=0.0), "diff_clip must be positive, got 0.0"),
        (lambda: ob.topk_opd_loss(x, x, x, mask, clip=(0.0, 0.2)), "clip_low must be positive, got 0.0"),
        (lambda: ob.topk_opd_loss(x, x, x[:1], mask), "cur_logp, old_logp, teacher_logp must have one shape"),
        (lambda: ob.topk_opd_loss(x, x, x, mask[:1]), r"mask must be \[B, L\] = \(2, 3\), got \(1, 3\)"),
        (lambda: ob.asymmetric_ppo(mask, mask, mask, mask, (0.2, -1)), "clip_high must be positive, got -1"),
        (lambda: ob.token_gap_advantage(mask, mask, mask, -1.0), "clip must be positive, got -1.0"),
        (lambda: ob.token_gap_advantage(mask, mask, mask[:1]), "teacher_lp, old_lp, mask must have one shape"),
        (
            lambda: ob.combined_advantage(mask[:, 0], mask, mask[:, 0], mask[:, 0], -1),
            "w_b must not be negative, got -1",
        ),
        (lambda: ob.combined_advantage(mask[0], mask, mask[0], mask[0]), r"got shapes \(3,\) and \(2, 3\)"),
        (lambda: hybrid_call(w_rl=-0.5), "w_rl must not be negative, got -0.5"),
        (lambda: hybrid_call(w_opd=-2), "w_opd must not be negative, got -2"),
        (lambda: hybrid_call(select="best"), "mode must be one of .*, got 'best'"),
        (lambda: hybrid_call(select="random"), "key must be given for mode 'random', got None"),
        (lambda: ob.select_hint(overlap, mask[:1], "first"), r"overlap must be \[M, \*\(1, 3\)\]"),
        (
            lambda: ob.select_hint(overlap, mask, "first", valid=mask > 0),
            "candidates, valid, length must have one shape",
        ),
        (lambda: ob.hint_overlap(x, x, 2), r"cand_logp must be \[M, \*\(2, 3, 5\)\], got \(2, 3, 5\)"),
        (
            lambda: ob.topk_reverse_kl(x, x[..., :2], tokens[..., None]),
            "teacher_topk_logp, teacher_topk_idx must have one",
        ),
        (lambda: ob.topk_reverse_kl(x[..., :1], x[..., :2], jnp.zeros((2, 3, 2), int)), "k must be in 1..V=1, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
