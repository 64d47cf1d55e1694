"""LaCT: no future leak, any slicing, packing, resets, rules, gradients, sharding, and the memory that it is for."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from rollax.kernels import ttt

B, H, C, D, WIDE = 2, 2, 5, 4, 6
MUON = ttt.UpdateRule()
DESCENT = ttt.UpdateRule(muon=False, momentum=False, norm="none")
RULES = {"muon": MUON, "post": ttt.UpdateRule(norm="post", momentum=False), "descent": DESCENT}


@pytest.fixture(autouse=True)
def float64():
    """Muon lifts every difference to unit scale, so that equality is tested where rounding is small."""
    with jax.enable_x64(True):
        yield


def weights(seed=0, heads=H, width=D, hidden=WIDE):
    draw = np.random.default_rng([seed, 0])  # NumPy has no program to compile for every shape
    normal = lambda rows, columns: draw.normal(size=(heads, rows, columns)) / columns**0.5  # noqa: E731
    return ttt.FastWeights(normal(hidden, width), normal(width, hidden), normal(hidden, width))


def stream(length, seed=1, rows=B, heads=H, width=D):
    """(q, k, v, lr, mom)."""
    draw = np.random.default_rng([seed, 1])
    q, k, v = draw.normal(size=(3, rows, heads, length, width))
    lr = np.logaddexp(draw.normal(size=(rows, heads, length, 3)), 0)
    return q, k, v, lr, 1 / (1 + np.exp(draw.normal(size=(rows, heads, length))))


def cut(x, start, end):
    return tuple(a[:, :, start:end] for a in x)


def close(actual, expected, tolerance=1e-9):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


scan = jax.jit(ttt.lact_scan, static_argnames=("chunk", "rule", "order", "checkpoint_every", "implementation"))
step = jax.jit(ttt.lact_step, static_argnames=("chunk", "rule"))


def test_prefixes():
    w, x = weights(), stream(17)
    out, _ = scan(w, *x, chunk=C, rule=MUON)
    for length in (4, 12):
        close(scan(w, *cut(x, 0, length), chunk=C, rule=MUON)[0], out[:, :, :length])
    noise = stream(17, seed=9)
    for t in range(17):
        later = np.arange(17) >= t
        changed = [np.where(later.reshape(-1, *[1] * (a.ndim - 3)), b, a) for a, b in zip(x, noise, strict=True)]
        other, _ = scan(w, *changed, chunk=C, rule=MUON)
        close(other[:, :, :t], out[:, :, :t])
        assert not np.allclose(other[:, :, t], out[:, :, t])


@pytest.mark.parametrize("rule", ["muon", *(pytest.param(x, marks=pytest.mark.slow) for x in ("post", "descent"))])
def test_any_slicing(rule):
    rule, w, x = RULES[rule], weights(), stream(20)
    expected = scan(w, *x, chunk=C, rule=rule)
    assert np.all(expected[1].n_buf == 0)  # twenty tokens are four chunks, and the last one has been written too
    for sizes in ((1, 3, 7, 7, 1, 1), (7, 3, 3, 7), (3, 1, 1, 1, 7, 7)):
        state = ttt.lact_init(w, batch=B, chunk=C, rule=rule, dtype=x[0].dtype)
        at, pieces = 0, []
        for size in sizes:
            out, state = step(state, *cut(x, at, at + size), chunk=C, rule=rule)
            pieces.append(out)
            at += size
        close((np.concatenate(pieces, 2), state), expected)
    whole, state = step(ttt.lact_init(w, batch=B, chunk=C, rule=rule, dtype=x[0].dtype), *x, chunk=C, rule=rule)
    close((whole, state), expected)
    nothing, unchanged = step(state, *cut(x, 0, 0), chunk=C, rule=rule)
    assert nothing.shape == (B, H, 0, D)
    close(unchanged, state, 0)
    # A state of the scan, pending tokens included, is one to go on from.
    first, state = scan(w, *cut(x, 0, 13), chunk=C, rule=rule)
    np.testing.assert_array_equal(state.n_buf, [3, 3])
    second, state = step(state, *cut(x, 13, 20), chunk=C, rule=rule)
    close((np.concatenate([first, second], 2), state), expected)


def test_streams_at_different_places_and_resets():
    w, x = weights(), stream(20)
    expected, _ = scan(w, *x, chunk=C, rule=MUON)
    states = [scan(w, *cut(x, 0, length), chunk=C, rule=MUON)[1] for length in (4, 12)]
    mixed = jax.tree.map(lambda a, b: jnp.stack([a[0], b[1]]), *states)
    pieces = tuple(np.stack([a[0, :, 4:11], a[1, :, 12:19]]) for a in x)
    out, state = step(mixed, *pieces, chunk=C, rule=MUON)
    np.testing.assert_array_equal(state.n_buf, [1, 4])
    close((out[0], out[1]), (expected[0, :, 4:11], expected[1, :, 12:19]))
    again = ttt.lact_reset(state, w, jnp.asarray([True, False]), rule=MUON)
    out, _ = step(again, *(np.stack([a[0, :, :1], a[1, :, 19:]]) for a in x), chunk=C, rule=MUON)
    close((out[0], out[1]), (expected[0, :, :1], expected[1, :, 19:]))


def test_gradients_through_slices():
    """The second slice completes a chunk and reads after it, in a loop of one window."""
    w, x, rule = weights(), stream(9), MUON._replace(muon=False)  # which the state knows nothing of
    target = np.cos(np.arange(B * H * 9 * D)).reshape(B, H, 9, D)

    def sliced(w, x):
        state = ttt.lact_init(w, batch=B, chunk=C, rule=rule, dtype=x[0].dtype)
        first, state = ttt.lact_step(state, *cut(x, 0, 4), chunk=C, rule=rule)
        return jnp.concatenate([first, ttt.lact_step(state, *cut(x, 4, 9), chunk=C, rule=rule)[0]], 2)

    gradient = lambda f: jax.jit(jax.grad(lambda w, x: jnp.sum(f(w, x) * target), argnums=(0, 1)))(w, x)  # noqa: E731
    close(gradient(sliced), gradient(lambda w, x: ttt.lact_scan(w, *x, chunk=C, rule=rule)[0]), 1e-8)


# Rows of two packings of sequences of 4 and 11 tokens, the longer writing twice; -1 is padding, more than a chunk of it
# in a row.
PACKED = [[0] * 11 + [7] * 4 + [-1] * 8 + [3] * 4, [-1] * 3 + [1] * 4 + [0] * 4 + [2] * 11 + [-1] * 5]


@pytest.mark.parametrize("rule", ["muon", pytest.param("descent", marks=pytest.mark.slow)])
def test_packing(rule):
    rule, ids, w = RULES[rule], np.asarray(PACKED), weights()
    L = ids.shape[1]
    x, cotangent = stream(L), np.random.default_rng(5).normal(size=(B, H, L, D))

    def gradient(w, x, cotangent, ids=None):
        run = lambda w, x: ttt.lact_scan(w, *x, chunk=C, rule=rule, segment_ids=ids, checkpoint_every=2)  # noqa: E731
        out, pull, state = jax.vjp(run, w, x, has_aux=True)
        return out, state, pull(cotangent)

    padded = [np.where((ids < 0)[:, None].reshape(B, 1, L, *[1] * (a.ndim - 3)), np.nan, a) for a in x]
    out, state, (dw, dx) = jax.jit(gradient)(w, tuple(padded), cotangent, ids)
    apart = jax.jit(gradient)
    out, state, dx = jax.device_get((out, state, dx))
    total = jax.tree.map(np.zeros_like, w)
    for row in range(B):
        assert np.all(out[row][:, ids[row] < 0] == 0)
        for a in jax.tree.leaves(dx):
            assert np.all(a[row][:, ids[row] < 0] == 0)
        for i in set(ids[row]) - {-1}:
            at = np.flatnonzero(ids[row] == i)
            pick = lambda a, row=row, at=at: a[row : row + 1, :, at]  # noqa: E731
            one, last, (one_dw, one_dx) = apart(w, tuple(map(pick, x)), pick(cotangent))
            close(pick(out), one)
            close(tuple(map(pick, dx)), one_dx, 1e-8)
            total = jax.tree.map(np.add, total, one_dw)
            if i == ids[row][ids[row] >= 0][-1]:
                close(jax.tree.map(lambda a, row=row: a[row : row + 1], state), last)
    close(dw, total, 1e-8)


@pytest.mark.slow  # `test_packing` has several
def test_one_segment_is_the_plain_scan():
    w, x = weights(), stream(13)
    close(scan(w, *x, chunk=C, segment_ids=jnp.zeros((B, 13), int)), scan(w, *x, chunk=C))


def test_short_sequences_learn_nothing():
    w, x = weights(), stream(C)
    out, _ = scan(w, *x, chunk=C)
    close(out, jax.jit(ttt.lact_apply)(w, x[0]))
    gradients = jax.jit(jax.grad(lambda *x: ttt.lact_scan(w, *x, chunk=C)[0].sum(), argnums=(1, 2, 3, 4)))(*x)
    assert all(np.all(g == 0) for g in gradients)


@pytest.mark.parametrize("rule", [pytest.param("muon", marks=pytest.mark.slow), "post"])  # which has Muon too
def test_nothing_to_write_is_no_nan(rule):
    w, (q, k, v, lr, mom) = weights(), stream(11)

    def loss(w, q, k, v, lr, mom):
        return jnp.sum(ttt.lact_scan(w, q, k, v, lr, mom, chunk=C, rule=RULES[rule])[0] ** 2)

    value, gradients = jax.jit(jax.value_and_grad(loss, argnums=range(6)))(w, q, k, 0 * v, 0 * lr, mom)
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))
    close(value, jnp.sum(ttt.lact_apply(w, q) ** 2), 1e-4)  # renormalising divides by |row| + 1e-5


def test_rules_change_what_they_say():
    w, x = weights(), stream(C)
    names = ("w0", "w1", "w2")
    g = jax.jit(ttt.lact_grads)(w, *x[1:4])
    after = lambda **how: scan(w, *x, chunk=C, rule=DESCENT._replace(**how))[1].w  # noqa: E731
    for name, new, old, step in zip(names, after(), w, g, strict=True):
        close(new, old + step)
        close(getattr(after(sign=-1), name), old - step)
        norms = np.linalg.norm(getattr(after(norm="post"), name), axis=-1)
        close(norms, np.broadcast_to(np.linalg.norm(old, axis=-1), norms.shape), 1e-4)
    only = after(only=("w1",), muon=True)
    close((only.w0, only.w2), tuple(np.broadcast_to(a, (B, *a.shape)) for a in (w.w0, w.w2)), 0)
    newton_schulz = jax.jit(ttt.newton_schulz, static_argnames="coeffs")
    close(only.w1, w.w1 + newton_schulz(g.w1))
    fixed = after(muon=True, coeffs=ttt.FIXED5)
    close(fixed.w0, w.w0 + newton_schulz(g.w0, coeffs=ttt.FIXED5))


def test_detached_gradients():
    w, x = weights(), stream(2 * C - 1)  # one write

    def loss(w, x, rule):
        return jnp.sum(jnp.sin(ttt.lact_scan(w, *x, chunk=C, rule=rule)[0]))

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)
    dw, (_, dk, dv, d_lr, d_mom) = gradient(w, x, MUON._replace(detach_ns=True))
    assert all(np.all(a == 0) for a in (dk, dv, d_lr, d_mom)) and all(np.any(a != 0) for a in dw)
    whole, (_, dk, *_) = gradient(w, x, MUON)
    assert np.any(dk != 0)
    norms, _ = gradient(w, x, MUON._replace(detach_norms=True))
    assert all(not np.allclose(a, b) for a, b in zip(norms, whole, strict=True))


def test_update_then_apply_is_its_segments():
    w, x = weights(), stream(13)
    out, state = scan(w, *x, chunk=C, rule=MUON, order="update_apply")
    segments = [(0, C, 1, 1), (C, 2 * C, 1, 1), (2 * C, 13, 1, 1)]
    close((out, state.w), jax.jit(partial(ttt.lact_segments, segments=segments, rule=MUON))(w, *x))
    assert np.all(state.n_buf == 0)


def test_pieces_make_the_scan():
    w, x = weights(), stream(C + 2)
    q, k, v, lr, mom = cut(x, 0, C)
    state = ttt.lact_init(w, batch=B, chunk=C, rule=MUON, dtype=q.dtype)
    g = ttt.lact_grads(state.w, k, v, lr)
    state = ttt.lact_commit(state, g, mom.mean(-1), MUON)
    out = jnp.concatenate([ttt.lact_apply(w, q), ttt.lact_apply(state.w, x[0][:, :, C:])], 2)
    expected, final = scan(w, *x, chunk=C, rule=MUON)
    close((out, tuple(state[:4])), (expected, tuple(final[:4])))


@pytest.mark.parametrize("implementation", ["xla"])
def test_operators_equal_the_reference(implementation):
    w, (q, k, v, lr, _) = weights(), stream(7)
    cotangents = weights(3)

    def run(name, w, q, k, v, lr):
        read = ttt.lact_apply(w, q, implementation=name)
        wrote = ttt.lact_grads(w, k, v, lr, implementation=name)
        weigh = sum(jnp.sum(a * b) for a, b in zip(wrote, cotangents, strict=True))
        return jnp.sum(jnp.sin(read)) + weigh, (read, wrote)

    both = [
        jax.jit(jax.value_and_grad(partial(run, name), argnums=range(5), has_aux=True))(w, q, k, v, lr)
        for name in (implementation, "reference")
    ]
    close(*both)


def test_gradients_are_finite_differences():
    w, (q, k, v, lr, mom) = weights(heads=1, hidden=3), stream(7, rows=1, heads=1)
    check_grads(jax.jit(ttt.lact_apply), (w, q), 1, ["rev"], 1e-6, 1e-6)
    check_grads(jax.jit(ttt.lact_grads), (w, k, v, lr), 1, ["rev"], 1e-6, 1e-6)
    run = jax.jit(lambda *x: ttt.lact_scan(*x, chunk=3, rule=MUON)[0])
    check_grads(run, (w, q, k, v, lr, mom), 1, ["rev"], 1e-5, 1e-5, eps=1e-6)  # Muon is steep


def pulled(every, w, x):
    """The function from cotangents to gradients of a scan, with what it keeps."""
    return jax.vjp(lambda w, x: ttt.lact_scan(w, *x, chunk=C, rule=MUON, checkpoint_every=every)[0], w, x)[1]


def test_states_are_computed_again():
    """What the backward pass keeps: a state for every `checkpoint_every` chunks, whatever their number of tokens."""

    def kept(every):
        pull = jax.eval_shape(partial(pulled, every), weights(), stream(8 * C))
        return sum(a.size for a in jax.tree.leaves(pull) if hasattr(a, "size"))

    state = 3 * 3 * B * H * D * WIDE  # weights, their sum, momentum
    assert kept(1) - kept(3) >= 4 * state  # seven chunks in a loop: seven states or three


@pytest.mark.slow  # `test_packing` has rows with several checkpoints and sequences apart with one
def test_states_computed_again_are_the_same():
    gradient = lambda every: jax.jit(lambda *a: pulled(every, *a)(jnp.ones((B, H, 8 * C, D))))  # noqa: E731
    close(*(gradient(every)(weights(), stream(8 * C)) for every in (1, 3)))


def test_vmap_and_shard_map():
    """Over batch and heads, in each device for two models; a chunk is written and two tokens wait."""
    w, x = weights(), stream(C + 2, rows=4)

    def loss(w, x):
        value = ttt.lact_scan(w, *x, chunk=C)
        return jnp.sum(jnp.sin(value[0])), value

    gradient = jax.grad(loss, argnums=(0, 1), has_aux=True)
    alone = jax.jit(gradient)
    each = [alone(model, x) for model in (w, weights(8))]
    mesh = Mesh(np.asarray(jax.devices()[:8]).reshape(4, 2), ("batch", "heads"))
    tokens, heads = P(None, "batch", "heads"), P(None, "heads")
    values = jax.tree.map(lambda a: P(None, "batch") if a.ndim == 1 else tokens, each[0][1])
    over_models = jax.tree.map(lambda _: heads, w)
    sharded = jax.shard_map(
        jax.vmap(gradient, in_axes=(0, None)),
        mesh=mesh,
        in_specs=(over_models, (P("batch", "heads"),) * 5),
        out_specs=((over_models, (tokens,) * 5), values),  # gradients are summed over what shares the weights
    )
    models = jax.tree.map(lambda *a: np.stack(a), w, weights(8))
    close(jax.jit(sharded)(models, x), jax.tree.map(lambda *a: np.stack(a), *each))


# By default those that make other programs than `test_vmap_and_shard_map` and need few windows.
@pytest.mark.parametrize("form", [pytest.param("packing", marks=pytest.mark.slow), "stream", "segments"])
def test_shard_map_of_packing_streams_and_segments(form):
    """Over batch and heads, weights shared by the batch; the stream begins inside."""
    w, x, ids = weights(), stream(3), jnp.asarray([[0, 0, 1], [2, -1, 3]])
    how = dict(chunk=2, rule=DESCENT)

    def run(w, x, ids):
        if form == "packing":
            return ttt.lact_scan(w, *x, segment_ids=ids, **how)
        if form == "stream":
            begun = ttt.lact_init(w, batch=x[0].shape[0], dtype=x[0].dtype, **how)
            return ttt.lact_step(begun, *cut(x, 0, 1), **how)
        return ttt.lact_segments(w, *x, segments=[(0, 3, 1, 1)], rule=DESCENT)[0]

    def loss(w, x, ids):
        value = run(w, x, ids)
        return jnp.sum(jnp.sin(jax.tree.leaves(value)[0])), value

    def local(w, x, ids):
        (_, value), gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(w, x, ids)
        return value, gradient

    expected = jax.jit(local)(w, x, ids)
    mesh = Mesh(np.asarray(jax.devices()[:4]).reshape(2, 2), ("batch", "heads"))
    tokens, weights_over = P("batch", "heads"), jax.tree.map(lambda _: P("heads"), w)
    in_specs = (weights_over, (tokens,) * 5, P("batch"))
    values = jax.tree.map(lambda a: P("batch") if a.ndim == 1 else tokens, expected[0])
    sharded = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=(values, in_specs[:2]))
    close(jax.jit(sharded)(w, x, ids), expected)


def test_no_tokens_change_nothing():
    w, x = weights(), cut(stream(1), 0, 0)
    begun = ttt.lact_init(w, batch=B, chunk=C, rule=MUON, dtype=x[0].dtype)
    for order in ("apply_update", "update_apply"):
        out, state = ttt.lact_scan(w, *x, chunk=C, rule=MUON, order=order)
        assert out.shape == (B, H, 0, D)
        close(state, begun, 0)


def test_narrow_tokens_keep_a_wide_state():
    w, x = weights(), stream(C + 3)
    narrow = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (w, x))
    out, state = scan(narrow[0], *narrow[1], chunk=C, rule=DESCENT)
    assert out.dtype == state.buf_k.dtype == jnp.bfloat16
    assert all(a.dtype == jnp.float32 for a in (*state.w, state.buf_lr))
    expected, _ = scan(w, *x, chunk=C, rule=DESCENT)
    np.testing.assert_allclose(np.asarray(out, float), expected, rtol=0.1, atol=0.1 * np.abs(expected).max())
    assert ttt.lact_apply(narrow[0], narrow[1][0], implementation="reference").dtype == jnp.bfloat16
    # A buffer wider than the tokens changes nothing.
    begun, pieces = ttt.lact_init(narrow[0], batch=B, chunk=C, rule=DESCENT), []
    for part in (cut(narrow[1], 0, 3), cut(narrow[1], 3, C + 3)):
        piece, begun = step(begun, *part, chunk=C, rule=DESCENT)
        pieces.append(piece)
    assert begun.buf_k.dtype == jnp.float32
    close((np.concatenate(pieces, 2), begun.w), (out, state.w), 1e-6)


def test_wide_tokens_widen_the_state():
    w, x, rule = weights(), stream(C + 1), MUON._replace(muon=False)  # which holds no state
    narrow = jax.tree.map(lambda a: a.astype(np.float32), w)
    rounded = jax.tree.map(lambda a: a.astype(np.float64), narrow)
    expected = scan(rounded, *x, chunk=C, rule=rule)
    close(scan(narrow, *x, chunk=C, rule=rule), expected)
    state = ttt.lact_init(narrow, batch=B, chunk=C, rule=rule)
    with pytest.raises(ValueError, match="k and v must not be wider than the state's float32, got float64 and float64"):
        ttt.lact_step(state, *x, chunk=C, rule=rule)
    state = ttt.lact_init(narrow, batch=B, chunk=C, rule=rule, dtype=np.float64)
    close(step(state, *x, chunk=C, rule=rule), expected)


def recall(rule, rate, ages, seeds=3, d=64, objects=8, copies=8, chunks=12):
    """Mean recall@1 among a chunk's objects, for chunks that are `ages` chunks old when the stream ends."""

    def one(key):
        keys = jax.random.split(key, 6)
        normal = lambda key, *shape: jax.random.normal(key, shape, jnp.float32)  # noqa: E731
        unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
        w = ttt.FastWeights(*(normal(k, 1, d, d) / d**0.5 for k in keys[:3]))
        names, values = normal(keys[3], chunks, objects, d), jax.nn.silu(normal(keys[4], chunks, objects, d))
        spread = lambda x: jnp.repeat(x, copies, 1).reshape(1, 1, -1, d)  # noqa: E731
        k = unit(spread(unit(names) * d**0.5) + 0.3 * normal(keys[5], 1, 1, chunks * objects * copies, d))
        lr = jnp.full((*k.shape[:3], 3), rate, jnp.float32)
        mom = jnp.full(k.shape[:3], 0.5, jnp.float32)
        _, state = ttt.lact_scan(w, k, k, spread(values), lr, mom, chunk=objects * copies, rule=rule)
        old = jnp.asarray([chunks - 1 - age for age in ages])
        read = ttt.lact_apply(state.w, unit(names[old]).reshape(1, 1, -1, d)).reshape(len(ages), objects, d)
        centred = lambda x: unit(x - x.mean(-2, keepdims=True))  # noqa: E731
        match = centred(read) @ centred(values[old]).mT
        return jnp.mean(jnp.argmax(match, -1) == jnp.arange(objects), -1)

    return np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), seeds)).mean(0))


@pytest.mark.slow  # golden arrays have both norms; this is what they are for
def test_what_the_rules_remember():
    """Pre-norm keeps old chunks, post-norm forgets with age, small plain steps store almost nothing (chance 1/8)."""
    pre = recall(ttt.UpdateRule(norm="pre"), 1e-2, (1, 8))
    post = recall(ttt.UpdateRule(norm="post"), 1e-2, (1, 8))
    small = recall(ttt.UpdateRule(muon=False, momentum=False, norm="post"), 1e-3, (1, 8))
    assert np.all(pre > 0.9)
    assert post[0] > 0.9 and post[1] < 0.7
    assert np.all(small < 0.4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk": 0}, "chunk must be at least 1, got 0"),
        ({"checkpoint_every": 0}, "checkpoint_every must be at least 1, got 0"),
        ({"q": jnp.zeros((B, H, 7))}, r"tokens must be \[B, H, L, d\]"),
        ({"k": jnp.zeros((B, H, 6, D))}, r"k and v must be \(2, 2, 7, 4\)"),
        ({"lr": jnp.zeros((B, H, 7, 2))}, r"lr must be \(2, 2, 7, 3\), one rate a matrix, got \(2, 2, 7, 2\)"),
        ({"mom": None}, "mom must be .* for a rule with momentum"),
        ({"w0": weights()._replace(w1=jnp.zeros((H, WIDE, D)))}, r"w must be w0, w2 \[2, h, 4\]"),
        ({"w0": weights()[:2]}, r"w must be \(w0, w1, w2\), got 2 arrays"),
        ({"segment_ids": jnp.zeros((B, 6), int)}, r"segment_ids must be \[2, 7\]"),
        ({"segment_ids": jnp.zeros((B, 7), int), "order": "update_apply"}, "segment_ids need order"),
        ({"order": "both"}, "order must be"),
        ({"rule": MUON._replace(norm="mid")}, 'norm must be "pre", "post" or "none", got \'mid\''),
        ({"rule": MUON._replace(only=("w3",))}, "only must name some of"),
        ({"rule": MUON._replace(sign=2)}, "sign must be 1 or -1, got 2"),
        ({"implementation": "fast"}, "implementation must be one of .* got 'fast'"),
    ],
)
def test_bad_arguments(change, message):
    arguments = dict(zip(("q", "k", "v", "lr", "mom"), stream(7), strict=True)) | {"w0": weights(), "chunk": C}
    with pytest.raises(ValueError, match=message):
        ttt.lact_scan(**arguments | change)


def test_states_of_other_calls_are_refused():
    state = ttt.lact_init(weights(), batch=B, chunk=C, rule=MUON)
    with pytest.raises(ValueError, match="chunk must be 5, the state's, got 6"):
        ttt.lact_step(state, *stream(3), chunk=6, rule=MUON)
    with pytest.raises(ValueError, match=r"state.main does not fit"):
        ttt.lact_step(state, *stream(3), chunk=C, rule=MUON._replace(norm="post"))
    with pytest.raises(ValueError, match="q must be"):
        ttt.lact_step(state, *stream(3, rows=3), chunk=C, rule=MUON)
    with pytest.raises(ValueError, match="segments must be"):
        ttt.lact_segments(weights(), *stream(3), segments=[(0, 4, 1, 1)], rule=MUON)
