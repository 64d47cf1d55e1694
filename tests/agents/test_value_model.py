"""V_0: the authors' adapter to the last digit, what padding and other rows must not change, records, and learning."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rollax.agents.prior_fitted import in_context_logits, pretrain_tabular_head, tabular_task
from rollax.agents.value_model import (
    V0Config,
    V0Masks,
    adapter,
    adapter_from_torch,
    adapter_init,
    context_for,
    empty_records,
    record,
    v0_apply,
    v0_from_features,
    v0_init,
    v0_optimiser,
    v0_partition,
)
from rollax.objectives.value_losses import pair_index, v0_loss
from rollax.tests.support import GOLDEN

D, T, N, Q = 8, 5, 7, 3
CONFIG = V0Config(
    D, num_queries=3, query_width=4, query_heads=2, bottleneck=8, head_layers=1, head_width=8, head_heads=2
)
apply = jax.jit(v0_apply, static_argnames=("soft_labels", "members"))
features = jax.jit(adapter)


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "v05.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def params():
    """A value model whose generator speaks: fresh ones are silent."""
    params = jax.jit(partial(v0_init, config=CONFIG))(jax.random.key(0))
    out = params["adapter"]["generator"]["out"]
    out["kernel"] = jax.random.normal(jax.random.key(1), out["kernel"].shape)
    return params


@pytest.fixture(scope="module")
def inputs():
    """Context, labels, queries, masks: left-padded prompts, and a last row of the context that does not count."""
    a, b = jax.random.split(jax.random.key(2))
    masks = V0Masks(
        context_tokens=jnp.arange(T) >= jnp.array([0, 1, 2, 3, 4, 0, T])[:, None],
        query_tokens=jnp.arange(T) >= jnp.array([0, 2, 4])[:, None],
        context=jnp.arange(N) < N - 1,
    )
    labels = jnp.array([1.0, 0.2, 0.7, 0.0, 0.4, 0.5, 0.9])
    return jax.random.normal(a, (N, T, D)), labels, jax.random.normal(b, (Q, T, D)), masks


def golden_weights(golden):
    return {name.removeprefix("adapter_w_"): x for name, x in golden.items() if name.startswith("adapter_w_")}


def test_the_authors_adapter(golden):
    inputs = golden["adapter_hidden"], golden["adapter_mask"]
    with jax.enable_x64(True):
        params = adapter_from_torch(golden_weights(golden), int(golden["adapter_num_heads"]))
        np.testing.assert_allclose(features(params, *inputs), golden["adapter_out"], rtol=0, atol=1e-10)
    single = jax.tree.map(np.float32, params)
    out = features(single, *map(np.float32, inputs))
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, golden["adapter_out"], atol=2e-5)


def test_the_adapter_is_what_it_says(golden):
    """Each of these mistakes moves the golden output by more than its tolerance."""
    heads = int(golden["adapter_num_heads"])
    params = jax.tree.map(np.float32, adapter_from_torch(golden_weights(golden), heads))
    run = lambda params, mask: np.asarray(features(params, np.float32(golden["adapter_hidden"]), np.float32(mask)))  # noqa: E731
    mask = golden["adapter_mask"] != 0
    off = lambda x: np.abs(x - golden["adapter_out"]).max()  # noqa: E731
    assert off(run(params, np.ones_like(mask))) > 1e-2
    assert off(run(params | {"query_norm": params["key_norm"]}, mask)) > 1e-2
    silent = jax.tree.map(np.zeros_like, params["generator"]["out"])
    assert off(run(params | {"generator": params["generator"] | {"out": silent}}, mask)) > 1e-2
    other = jax.tree.map(np.float32, adapter_from_torch(golden_weights(golden), 2 if heads != 2 else 3))
    assert off(run(other, mask)) > 1e-2


def test_a_fresh_adapter_has_silent_queries(inputs):
    fresh = jax.jit(partial(adapter_init, config=CONFIG))(jax.random.key(0))
    assert fresh["queries"].shape == (3, 4)
    moved = fresh | {
        "generator": fresh["generator"] | {"hidden": jax.tree.map(lambda x: x + 1, fresh["generator"]["hidden"])}
    }
    np.testing.assert_array_equal(features(fresh, inputs[0]), features(moved, inputs[0]))
    assert jax.eval_shape(partial(adapter_init, config=V0Config(16)), jax.random.key(0))["queries"].shape == (168, 6)
    assert V0Config(16).head.num_features == 1008


def test_padding_of_prompts_does_not_matter(params, inputs):
    """Left, right, longer, or full of NaN."""
    tokens, mask = inputs[2], inputs[3].query_tokens
    run = partial(features, params["adapter"])
    expected = run(tokens, mask)
    for row in range(Q):
        np.testing.assert_allclose(run(tokens[row : row + 1, np.asarray(mask[row])])[0], expected[row], atol=1e-5)
    np.testing.assert_array_equal(run(jnp.where(mask[..., None], tokens, jnp.nan), mask), expected)
    right = jnp.argsort(~mask, axis=1, stable=True)
    moved = jnp.take_along_axis(tokens, right[..., None], axis=1), jnp.take_along_axis(mask, right, axis=1)
    np.testing.assert_allclose(run(*moved), expected, atol=1e-5)
    assert not moved[1][2, -1] and mask[2, -1]


def test_dropout(params, inputs):
    run = partial(features, params["adapter"], inputs[2])
    plain, key = run(), jax.random.key(3)
    np.testing.assert_allclose(run(key=key, dropout=0.0), plain, atol=1e-5)
    assert not np.allclose(run(key=key, dropout=0.5), plain)
    assert not np.allclose(run(key=key, dropout=0.5), run(key=jax.random.key(4), dropout=0.5))


def test_rows_do_not_disturb_one_another(params, inputs):
    context, labels, queries, masks = inputs
    before = apply(params, *inputs)
    assert before.shape == (Q,) and np.ptp(before) > 1e-4
    order = np.array([3, 6, 0, 5, 1, 4, 2])
    shuffled = masks._replace(context_tokens=masks.context_tokens[order], context=masks.context[order])
    np.testing.assert_allclose(apply(params, context[order], labels[order], queries, shuffled), before, atol=1e-5)
    changed = apply(params, context, labels, queries.at[1].multiply(-2.0), masks)
    assert changed[1] != before[1]
    np.testing.assert_array_equal(np.delete(changed, 1), np.delete(before, 1))
    shorter = V0Masks(masks.context_tokens[:-1], masks.query_tokens)
    np.testing.assert_allclose(apply(params, context[:-1], labels[:-1], queries, shorter), before, atol=1e-5)
    np.testing.assert_array_equal(
        apply(params, context.at[-1].set(jnp.nan), labels.at[-1].set(0.0), queries, masks), before
    )


def test_one_context_a_query(params, inputs):
    context, labels, queries, masks = inputs
    rows = masks.context & (jnp.arange(N) != jnp.arange(Q)[:, None])
    together = apply(params, context, labels, queries, masks._replace(context=rows))
    for q in range(Q):
        alone = apply(params, context, labels, queries, masks._replace(context=rows[q]))
        np.testing.assert_allclose(together[q], alone[q], atol=1e-5)


def test_kept_features_give_the_same(params, inputs):
    context, labels, queries, masks = inputs
    keep = partial(features, params["adapter"])
    kept = jnp.concatenate([keep(context[:-1], masks.context_tokens[:-1]), jnp.zeros((1, 12))])
    got = jax.jit(v0_from_features)(params["head"], kept, labels, keep(queries, masks.query_tokens), masks.context)
    np.testing.assert_allclose(got, apply(params, *inputs), atol=1e-5)


def test_vmap_over_contexts_is_a_loop(params, inputs):
    several = [jax.tree.map(lambda x, i=i: jnp.roll(x, i, axis=0), inputs[:3]) for i in range(2)]
    batched = jax.jit(jax.vmap(partial(v0_apply, params)))(*map(jnp.stack, zip(*several, strict=True)))
    for row, one in zip(batched, several, strict=True):
        np.testing.assert_allclose(row, apply(params, *one), atol=1e-5)


def test_gradients_stay_in_what_is_trained(params, inputs):
    targets = jnp.array([0.9, 0.1, 0.3])

    def gradient_of(params, joint):
        trained, frozen = v0_partition(params, joint=joint)
        loss = lambda trained: v0_loss(v0_apply(trained | frozen, *inputs), targets, pair_index(targets))  # noqa: E731
        return jax.grad(loss)(trained)

    assert jax.tree.structure(jax.eval_shape(partial(gradient_of, joint=True), params)) == jax.tree.structure(params)
    gradient = jax.jit(partial(gradient_of, joint=False))(params)
    assert set(gradient) == {"adapter"}
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))
    silent = {"queries", "generator", "project", "attention"} - {
        k for k, v in gradient["adapter"].items() if norm(v) > 0
    }
    assert not silent


def norm(tree):
    return float(optax.global_norm(tree))


def test_decay_spares_biases_and_norms():
    shapes = jax.eval_shape(partial(adapter_init, config=CONFIG), jax.random.key(0))
    params = jax.tree.map(lambda x: jnp.ones(x.shape), shapes)
    optimiser = v0_optimiser(4, lr=1.0, weight_decay=0.5)
    state, zero = optimiser.init(params), jax.tree.map(jnp.zeros_like, params)
    for _ in range(2):
        change, state = jax.jit(optimiser.update)(zero, state, params)
    assert (change["queries"] < 0).all() and (change["attention"]["q"]["kernel"] < 0).all()
    assert not change["attention"]["q"]["bias"].any() and not change["query_norm"]["scale"].any()


def test_records():
    add = jax.jit(record)
    ring = empty_records(4, jnp.zeros(2))
    assert not context_for(ring, jnp.array([-1, 0])).any()  # nothing there, whatever is asked
    ring = add(ring, jnp.array([7, 8, 9]), jnp.arange(6.0).reshape(3, 2), jnp.array([0.1, 0.2, 0.3]), 5)
    np.testing.assert_array_equal(ring.prompt, [7, 8, 9, -1])
    np.testing.assert_array_equal(
        context_for(ring, jnp.array([8, 1])), [[True, False, True, False], [True, True, True, False]]
    )
    ring = add(ring, jnp.array([4, 5, 6]), jnp.ones((3, 2)), jnp.ones(3), 6, jnp.array([True, False, True]))
    np.testing.assert_array_equal(ring.prompt, [6, 8, 9, 4])
    np.testing.assert_array_equal(ring.features, [[1, 1], [2, 3], [4, 5], [1, 1]])
    np.testing.assert_allclose(ring.rate, [1, 0.2, 0.3, 1])
    np.testing.assert_array_equal(ring.step, [6, 5, 5, 6])
    assert ring.index == 1
    np.testing.assert_array_equal(context_for(ring, jnp.array([6]), since=6), [[False, False, False, True]])
    rings = jax.tree.map(lambda x: jnp.stack([x, x]), ring)
    both = jax.vmap(record, in_axes=(0, 0, None, 0, None))(
        rings, jnp.array([[1], [2]]), jnp.zeros((1, 2)), jnp.array([[0.0], [1.0]]), 7
    )
    np.testing.assert_array_equal(both.prompt[:, 1], [1, 2])
    np.testing.assert_array_equal(both.rate[:, 1], [0, 1])


def test_what_was_recorded_of_a_prompt_does_not_reach_it(params, inputs):
    """Neither directly nor through the other records, and neither by its label nor by its features."""
    context, labels, queries, masks = inputs
    ids = jnp.arange(N)
    tokens = {"states": context, "mask": masks.context_tokens | (jnp.arange(T) == T - 1)}
    ring = record(empty_records(N, jax.tree.map(lambda x: x[0], tokens)), ids, tokens, labels, 1)
    queries, asked = ring.features["states"][:2], jnp.array([0, 1])
    query_tokens = ring.features["mask"][:2]

    def ask(ring):
        masks = V0Masks(ring.features["mask"], query_tokens, context_for(ring, asked))
        return apply(params, ring.features["states"], ring.rate, queries, masks)

    before = ask(ring)
    lied = ring._replace(rate=ring.rate.at[0].set(0.0), features=ring.features | {"states": context.at[0].add(1.0)})
    after = ask(lied)
    np.testing.assert_allclose(after[0], before[0], atol=1e-6)
    assert abs(after[1] - before[1]) > 1e-5  # the other query may read it


def test_bad_input(params, inputs, golden):
    context, labels, queries, masks = inputs
    with pytest.raises(ValueError, match=r"tokens: expected states \[B, T, 8\], got \(7, 5, 7\)"):
        adapter(params["adapter"], context[..., :-1])
    with pytest.raises(ValueError, match=r"mask of tokens: expected shape \(7, 5\), got \(7, 4\)"):
        adapter(params["adapter"], context, jnp.ones((N, T - 1), bool))
    with pytest.raises(ValueError, match="mask: expected a token in every row, row 6 is all padding"):
        adapter(params["adapter"], context, masks.context_tokens)
    with pytest.raises(ValueError, match=r"masks.context_tokens: expected a token in every row, row 6 is all padding"):
        v0_apply(params, context, labels, queries, masks._replace(context=None))
    with pytest.raises(ValueError, match=r"masks.query_tokens: expected a token in every row, row 0"):
        v0_apply(params, context, labels, queries, masks._replace(query_tokens=jnp.zeros((Q, T), bool)))
    with pytest.raises(ValueError, match=r"masks.context: expected shape \(7,\) or \(3, 7\), got \(3,\)"):
        v0_apply(params, context, labels, queries, masks._replace(context=jnp.ones(Q, bool)))
    with pytest.raises(ValueError, match="num_queries: expected at least 1, got 0"):
        v0_init(jax.random.key(0), V0Config(D, num_queries=0))
    with pytest.raises(ValueError, match="width: expected a multiple of the 4 heads, got 6"):
        v0_init(jax.random.key(0), V0Config(D, query_heads=4))
    weights = golden_weights(golden)
    with pytest.raises(ValueError, match="weights: proj_kv_weight is missing"):
        adapter_from_torch({k: v for k, v in weights.items() if k != "proj_kv_weight"}, 3)
    with pytest.raises(ValueError, match=r"weights: \['other'\] have no place"):
        adapter_from_torch(weights | {"other": np.zeros(1)}, 3)
    with pytest.raises(ValueError, match="num_heads: expected a divisor of the query width 6, got 4"):
        adapter_from_torch(weights, 4)
    with pytest.raises(ValueError, match="capacity: expected at least 1, got 0"):
        empty_records(0, jnp.zeros(2))
    ring = empty_records(2, jnp.zeros(2))
    with pytest.raises(ValueError, match="prompt: expected at most 2 records at a time, got 3"):
        record(ring, jnp.arange(3), jnp.zeros((3, 2)), jnp.zeros(3), 0)
    with pytest.raises(ValueError, match=r"prompt: expected ids \[Q\], got shape \(\)"):
        context_for(ring, jnp.int32(3))
    with pytest.raises(ValueError, match=r"rate: expected shape \(2,\), got \(3,\)"):
        record(ring, jnp.arange(2), jnp.zeros((2, 2)), jnp.zeros(3), 0)


# A world of skills: prompts load on three of them, policies have them in different degrees.
WORLD = V0Config(4, num_queries=4, query_width=6, query_heads=3, bottleneck=16, head_layers=2, head_width=32)
SKILLS, TOKENS, ROWS, ASKED = 3, 6, 32, 16
PRETRAIN = partial(
    pretrain_tabular_head, config=WORLD.head, updates=500, tasks=8, rows=ROWS, queries=ASKED, rank=4, lr=3e-3
)


def auc(score, label):
    """Chance that a success is ranked above a failure, ties counting half."""
    above = np.sign(score[:, None] - score[None])[label[:, None] > label[None]]
    return (above + 1).mean() / 2


def nearest(context, label, queries, k=5):
    """Mean label of the k nearest rows."""
    distance = np.square(queries[:, None] - context[None]).sum(axis=-1)
    return label[np.argsort(distance, axis=1)[:, :k]].mean(axis=1)


@pytest.fixture(scope="module")
def pretrained():
    return jax.jit(PRETRAIN)(jax.random.key(0))


def test_pretraining_is_its_key_and_learns():
    small = dict(config=CONFIG.head, updates=200, tasks=8, rows=16, queries=8, rank=2, lr=1e-2)
    run = jax.jit(partial(pretrain_tabular_head, **small))
    (params, losses), (again, same), (_, others) = jax.device_get([run(jax.random.key(i)) for i in (0, 0, 1)])
    assert losses.shape == (200,) and losses[-50:].mean() < losses[:50].mean() - 0.03
    np.testing.assert_array_equal(losses, same)
    assert all(map(np.array_equal, jax.tree.leaves(params), jax.tree.leaves(again)))
    assert (losses != others).all()


@pytest.mark.slow  # above, a smaller head learns
def test_it_learns_to_learn(pretrained):
    """After 500 updates: the more context the better, better than neighbours, near what the true rates could give."""
    params, losses = pretrained
    assert losses.shape == (500,) and losses[-50:].mean() < losses[:50].mean() - 0.03
    tasks, context, queries = 100, ROWS, 64
    make = jax.vmap(lambda k: tabular_task(k, WORLD.head.num_features, context + queries, rank=4, draws=1))
    x, y, rate = map(np.asarray, jax.jit(make)(jax.random.split(jax.random.key(9), tasks)))
    truth = np.random.default_rng(0).uniform(size=rate.shape) < rate
    run = jax.jit(jax.vmap(partial(in_context_logits, params)))
    score = {}
    for size in (4, ROWS):
        mask = np.tile(np.arange(context) < size, (tasks, 1))
        logits = np.asarray(run(x[:, :context], y[:, :context], x[:, context:], mask))
        score[size] = np.mean([auc(s, t[context:]) for s, t in zip(logits, truth, strict=True)])
    rivals = {
        "neighbours": [nearest(a[:context], b[:context], a[context:]) for a, b in zip(x, y, strict=True)],
        "the rates": rate[:, context:],
    }
    bound = {k: np.mean([auc(s, t[context:]) for s, t in zip(v, truth, strict=True)]) for k, v in rivals.items()}
    assert score[ROWS] > score[4] + 0.05
    assert score[ROWS] > bound["neighbours"] + 0.01
    assert bound["the rates"] > score[ROWS] > bound["the rates"] - 0.15


def world_task(key):
    """Token states, success rates and labels (means of four rollouts) of one new policy on new prompts."""
    keys = jax.random.split(key, 4)
    loading = jax.nn.softmax(2 * jax.random.normal(keys[0], (ROWS + ASKED, SKILLS)))
    rest = jax.random.normal(keys[1], (ROWS + ASKED, 3))  # difficulty and style
    skill = jax.random.normal(keys[2], (SKILLS,))
    rate = jax.nn.sigmoid(4 * (loading @ skill - 0.5 * rest[:, 0]))
    mixing = 0.7 * jax.random.normal(jax.random.key(42), (SKILLS + 3, TOKENS * 4))
    states = jnp.tanh(jnp.concatenate([3 * (loading - 1 / SKILLS), rest], axis=1) @ mixing)
    hits = jax.random.uniform(keys[3], (ROWS + ASKED, 4)) < rate[:, None]
    return states.reshape(-1, TOKENS, 4), hits.mean(axis=1), rate


@pytest.mark.slow
def test_it_learns_to_read_policies(pretrained):
    """On unseen policies and prompts, the trained adapter ranks better than the fresh one beside the same head."""
    params = jax.jit(partial(v0_init, config=WORLD))(jax.random.key(0))
    trained, frozen = v0_partition(params | {"head": pretrained[0]})
    updates = 100
    optimiser = v0_optimiser(updates, lr=1e-2)

    def logits_of(trained, states, labels):
        return v0_apply(trained | frozen, states[:ROWS], labels[:ROWS], states[ROWS:])

    def loss_of(trained, key):
        states, labels, rate = world_task(key)
        return v0_loss(logits_of(trained, states, labels), rate[ROWS:], pair_index(rate[ROWS:]))

    def update(carry, key):
        trained, state = carry
        loss = lambda p: jax.vmap(partial(loss_of, p))(jax.random.split(key, 8)).mean()  # noqa: E731
        value, gradient = jax.value_and_grad(loss)(trained)
        change, state = optimiser.update(gradient, state, trained)
        return (optax.apply_updates(trained, change), state), value

    @jax.jit
    def train(trained):
        return jax.lax.scan(update, (trained, optimiser.init(trained)), jax.random.split(jax.random.key(2), updates))

    states, labels, rate = jax.jit(jax.vmap(world_task))(jax.random.split(jax.random.key(3), 100))
    logits = jax.jit(jax.vmap(logits_of, in_axes=(None, 0, 0)))
    above = np.asarray(rate[:, ROWS:, None] > rate[:, None, ROWS:] + 0.1)

    def ranking(trained):
        """Share of pairs of queries of one policy that are in the right order: nothing that the context's mean says."""
        score = np.asarray(logits(trained, states, labels))
        return (score[:, :, None] > score[:, None])[above].mean()

    before = ranking(trained)
    (trained, _), losses = train(trained)
    after = ranking(trained)
    assert set(trained) == {"adapter"}
    assert losses[-10:].mean() < losses[:10].mean() - 0.02
    assert after > before + 0.03 and after > 0.75
