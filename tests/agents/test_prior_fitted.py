"""The in-context head: its symmetries, what it must not see, its fallbacks, and the tasks it is fitted to."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rollax.agents.prior_fitted import (
    HeadConfig,
    in_context_logits,
    pretrain_tabular_head,
    tabular_head_init,
    tabular_task,
)

F, N, Q = 5, 9, 4
CONFIG = HeadConfig(F, num_layers=2, width=16, num_heads=4)
apply = jax.jit(in_context_logits, static_argnames=("soft_labels", "members"))


@pytest.fixture(scope="module")
def params():
    return jax.jit(partial(tabular_head_init, config=CONFIG))(jax.random.key(0))


@pytest.fixture(scope="module")
def table():
    """Context, labels of both classes, queries, and a mask that hides two rows."""
    a, b, c = jax.random.split(jax.random.key(1), 3)
    labels = jax.random.uniform(b, (N,)).at[:3].set(jnp.array([0.9, 0.2, 0.5]))
    mask = jnp.arange(N) < N - 2
    return jax.random.normal(a, (N, F)), labels, jax.random.normal(c, (Q, F)), mask


def test_the_context_is_a_set(params, table):
    context, labels, queries, mask = table
    order = np.random.default_rng(0).permutation(N)
    for how in ({}, {"soft_labels": True}, {"members": 2, "temperature": 2.0}):
        shuffled = apply(params, context[order], labels[order], queries, mask[order], **how)
        np.testing.assert_allclose(shuffled, apply(params, *table, **how), atol=1e-5)


def test_rows_that_do_not_count(params, table):
    context, labels, queries, mask = table
    expected = apply(params, context[: N - 2], labels[: N - 2], queries)
    np.testing.assert_allclose(apply(params, *table), expected, atol=1e-5)
    filled, labels = context.at[N - 2 :].set(jnp.nan), labels.at[N - 2 :].set(jnp.nan)
    loss = lambda p, x: in_context_logits(p, x, labels, queries, mask).sum()  # noqa: E731
    np.testing.assert_allclose(apply(params, filled, labels, queries, mask), expected, atol=1e-5)
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, filled)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))
    np.testing.assert_array_equal(gradient[1][N - 2 :], 0)


def test_queries_do_not_see_one_another(params, table):
    context, labels, queries, mask = table
    changed = apply(params, context, labels, queries.at[1].add(3.0), mask)
    before = apply(params, *table)
    assert abs(changed[1] - before[1]) > 1e-3
    np.testing.assert_array_equal(np.delete(changed, 1), np.delete(before, 1))
    alone = apply(params, context, labels, queries[:1], mask)
    np.testing.assert_allclose(alone, before[:1], atol=1e-5)


def test_scale_and_shift_of_a_column_do_not_matter(params, table):
    context, labels, queries, mask = table
    scale, shift = jnp.array([2.0, 0.5, 10.0, 1.0, 3.0]), jnp.arange(F) - 2.0
    moved = apply(params, context * scale + shift, labels, queries * scale + shift, mask)
    np.testing.assert_allclose(moved, apply(params, *table), atol=1e-3)


def test_hard_and_soft_labels(params, table):
    context, labels, queries, mask = table
    hard = (labels >= 0.5).astype(jnp.float32)
    assert 0.5 in labels  # a tie is a success
    np.testing.assert_array_equal(apply(params, *table), apply(params, context, hard, queries, mask))
    soft = apply(params, *table, soft_labels=True)
    np.testing.assert_array_equal(
        apply(params, context, hard, queries, mask, soft_labels=True), apply(params, context, hard, queries, mask)
    )
    assert np.abs(soft - apply(params, *table)).max() > 1e-3


def test_members(params, table):
    """Two members: the order given, and another order with the labels exchanged, whose log-odds are turned back."""
    context, labels, queries, mask = table
    order = np.random.default_rng(1).permutation(F)
    hard = (labels >= 0.5).astype(jnp.float32)
    first = apply(params, *table)
    second = -apply(params, context[:, order], 1 - hard, queries[:, order], mask)
    pair = apply(params, *table, members=2, temperature=2.0)
    np.testing.assert_allclose(pair, (first + second) / 4, atol=1e-5)


def test_contexts_of_one_label(params, table):
    context, _, queries, mask = table
    logit = lambda p: np.log(p / (1 - p))  # noqa: E731
    run = lambda labels, mask=mask, **how: apply(params, context, jnp.asarray(labels), queries, mask, **how)  # noqa: E731
    count = N - 2
    np.testing.assert_allclose(run(np.r_[np.full(count, 0.7), 0, 0]), np.full(Q, logit(0.7)), rtol=1e-5)
    np.testing.assert_allclose(run(np.r_[np.full(count, 1.0), 0, 0]), np.full(Q, logit(1 - 0.5 / count)), rtol=1e-5)
    np.testing.assert_allclose(run(np.zeros(N)), np.full(Q, logit(0.5 / count)), rtol=1e-5)
    np.testing.assert_array_equal(run(np.ones(N), jnp.zeros(N, bool)), np.zeros(Q))
    # Rates that differ but round alike: the mean if rounded, something to learn from if not.
    rates = np.r_[np.linspace(0.6, 0.9, count), 0, 0]
    np.testing.assert_allclose(run(rates), np.full(Q, logit(0.75)), rtol=1e-5)
    assert np.ptp(run(rates, soft_labels=True)) > 1e-3
    gradient = jax.jit(jax.grad(lambda p: in_context_logits(p, context, jnp.ones(N), queries, mask).sum()))(params)
    assert all((x == 0).all() for x in jax.tree.leaves(gradient))


def test_vmap_is_a_loop(params, table):
    tables = [jax.tree.map(lambda x, i=i: jnp.roll(x, i, axis=0), table[:3]) for i in range(3)]
    batched = jax.jit(jax.vmap(partial(in_context_logits, params)))(*map(jnp.stack, zip(*tables, strict=True)))
    for row, one in zip(batched, tables, strict=True):
        np.testing.assert_allclose(row, apply(params, *one), atol=1e-5)


def test_bad_input(params, table):
    context, labels, queries, mask = table
    with pytest.raises(ValueError, match=r"expected context \[N, F\], labels \[N\] and queries \[Q, F\], got"):
        in_context_logits(params, context, labels[:-1], queries)
    with pytest.raises(ValueError, match="context: expected 5 features, got 4"):
        in_context_logits(params, context[:, :4], labels, queries[:, :4])
    with pytest.raises(ValueError, match=r"mask: expected shape \(9,\), got \(4,\)"):
        in_context_logits(params, context, labels, queries, mask[:4])
    with pytest.raises(ValueError, match="members: expected at least 1, got 0"):
        jax.eval_shape(lambda: in_context_logits(params, *table, members=0))
    with pytest.raises(ValueError, match="width: expected a multiple of the 3 heads, got 16"):
        tabular_head_init(jax.random.key(0), HeadConfig(F, width=16, num_heads=3))
    with pytest.raises(ValueError, match="tasks: expected at least 1, got 0"):
        pretrain_tabular_head(jax.random.key(0), CONFIG, 1, tasks=0)
    with pytest.raises(ValueError, match="num_layers: expected at least 1, got 0"):
        tabular_head_init(jax.random.key(0), HeadConfig(F, num_layers=0))


def test_tasks_are_what_they_say():
    features, labels, rate = jax.jit(jax.vmap(lambda k: tabular_task(k, 6, 200)))(
        jax.random.split(jax.random.key(5), 200)
    )
    assert features.shape == (200, 200, 6) and np.isfinite(features).all()
    # Labels are means of 1 to 8 draws of the rate: unbiased, with every count represented.
    assert abs((labels - rate).mean()) < 5e-3
    counts = {
        next(n for n in range(1, 9) if np.allclose(row * n, np.round(row * n), atol=1e-4)) for row in np.asarray(labels)
    }
    assert counts == set(range(1, 9))
    assert rate.mean(axis=1).min() < 0.25 and rate.mean(axis=1).max() > 0.75
