"""LaCT: a SwiGLU memory, trained on the stream chunk by chunk (arXiv 2505.23884; the layer of Spatial-TTT, 2603.12255).

A chunk is read with the weights that earlier chunks have written, then writes: one gradient step on the negative dot
product of F_W(k) and v, every token with its own rates, optionally with momentum, orthogonalised (Muon) and followed by
a renormalisation of the rows. `lact_scan` takes a whole sequence, `lact_step` any piece of a stream; their outputs and
states agree. State: float32 at least.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rollax.kernels.backends import alike, named
from rollax.kernels.ttt.api import FastWeights, apply_of, check_tokens, check_weights, choose_lact, fold, grads_of
from rollax.kernels.ttt.newton_schulz import FIXED5, MUON5, newton_schulz, newton_schulz_beside
from rollax.kernels.ttt.xla import put

NAMES = ("w0", "w1", "w2")
EPS = 1e-5  # of the rows' norms


class UpdateRule(NamedTuple):
    """How a chunk's gradient changes the weights. Static.

    Attributes:
      muon: orthogonalise it (step size 1 whatever the rates, which then only weigh tokens against each other).
      momentum: add beta times the last one, beta the mean of the chunk's `mom`; no (1 - beta), starts at 0.
      norm: "pre" keeps an unnormalised sum and reads with its rows scaled to their initial norms; "post" scales the
        weights themselves, and so forgets; "none" only adds.
      detach_norms: no gradient through the initial norms.
      detach_ns: the orthogonalised step is a constant to the outer gradient.
      only: which matrices learn; the others stay as they are.
      sign: 1, or -1 for ascent of the inner loss (an ablation).
      coeffs: of Newton-Schulz, `MUON5` or `FIXED5`.
      ns_dtype: that Newton-Schulz iterates in, such as "bfloat16"; None for the state's.
    """

    muon: bool = True
    momentum: bool = True
    norm: str = "pre"
    detach_norms: bool = False
    detach_ns: bool = False
    only: tuple[str, ...] = NAMES
    sign: int = 1
    coeffs: tuple[tuple[float, float, float], ...] = MUON5
    ns_dtype: str | None = None


TRAINED = UpdateRule()  # as Spatial-TTT's training script sets it
NOVEL_VIEWS = UpdateRule(momentum=False, norm="post", detach_norms=True, coeffs=FIXED5)  # LaCT's novel-view code


class LactState(NamedTuple):
    """A memory in the middle of a stream; `[B, H, ...]`.

    Attributes:
      w: weights to read with.
      main: their unnormalised sum, None unless norm is "pre".
      mom: the last accumulated gradient, None without momentum.
      norm0: row norms of the initial weights `[B, H, rows, 1]`, None if norm is "none".
      buf_k, buf_v: tokens not yet written `[B, H, C, d]`, the first n_buf of them valid, zero beyond.
      buf_lr: their rates `[B, H, C, 3]`.
      buf_mom: their momenta `[B, H, C]`, None without momentum.
      n_buf: int32 `[B]`, in 0 .. C - 1.
    """

    w: FastWeights
    main: FastWeights | None
    mom: FastWeights | None
    norm0: FastWeights | None
    buf_k: jax.Array
    buf_v: jax.Array
    buf_lr: jax.Array
    buf_mom: jax.Array | None
    n_buf: jax.Array


class Memory(NamedTuple):
    """The part of a `LactState` that a chunk changes, batch and heads folded."""

    w: FastWeights
    main: FastWeights | None
    mom: FastWeights | None
    norm0: FastWeights | None


class Operators(NamedTuple):
    """Three functions of one implementation, on folded arrays: F_W(q), what a chunk writes, Newton-Schulz."""

    apply: Callable
    grads: Callable
    newton_schulz: Callable


def operators_of(chosen, w, rule, explain):
    """Of the implementation chosen for a rule on weights w `[N, ...]`; `explain` prints that of Newton-Schulz too."""
    together = jax.ShapeDtypeStruct((len(rule.only), *w.w0.shape), w.w0.dtype)  # as `orthogonalised` stacks them
    beside = newton_schulz_beside(chosen, together, rule.coeffs, rule.ns_dtype, explain) if rule.muon else chosen
    return Operators(apply_of(chosen), grads_of(chosen), partial(newton_schulz, implementation=beside))


def alike_trees(*trees):
    """`alike` of all their arrays."""
    leaves, structure = jax.tree.flatten(trees)
    return structure.unflatten(alike(*leaves))


def check_rule(rule, chunk=1):
    """ValueError for a rule or a chunk that cannot work."""
    if not chunk >= 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    if rule.norm not in ("pre", "post", "none"):
        raise ValueError(f'norm must be "pre", "post" or "none", got {rule.norm!r}')
    if not rule.only or set(rule.only) - set(NAMES):
        raise ValueError(f"only must name some of {NAMES}, got {rule.only}")
    if rule.sign not in (1, -1):
        raise ValueError(f"sign must be 1 or -1, got {rule.sign}")


def row_norms(x):
    """Over the input axis, `[..., rows, 1]`; the gradient at a zero row is zero."""
    square = jnp.sum(x * x, -1, keepdims=True)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


def fresh(w, rule):
    """The `Memory` that starts from weights w."""
    norm0 = None if rule.norm == "none" else FastWeights(*(row_norms(x) for x in w))
    return Memory(
        w,
        w if rule.norm == "pre" else None,
        FastWeights(*(alike(x, jnp.zeros_like(x))[1] for x in w)) if rule.momentum else None,
        jax.lax.stop_gradient(norm0) if rule.detach_norms else norm0,
    )


def commit(memory, g, beta, rule, newton_schulz):
    """One update. g: `FastWeights` of directions `[N, ...]`; beta: `[N]` or None."""
    w, main, mom, norm0 = memory
    if rule.momentum:
        g = mom = FastWeights(*(x + beta[:, None, None] * m for x, m in zip(g, mom, strict=True)))

    def update(name, u):
        i = NAMES.index(name)
        total = (w if main is None else main)[i] + rule.sign * u
        new = total if rule.norm == "none" else total / (row_norms(total) + EPS) * norm0[i]
        return new, total

    steps = {name: getattr(g, name) for name in rule.only}
    if rule.muon:
        steps = orthogonalised(steps, rule, newton_schulz)
    updates = {name: update(name, u) for name, u in steps.items()}
    w = w._replace(**{name: new for name, (new, _) in updates.items()})
    if main is not None:
        main = main._replace(**{name: total for name, (_, total) in updates.items()})
    return Memory(w, main, mom, norm0)


def orthogonalised(steps, rule, newton_schulz):
    """Newton-Schulz of every matrix, of all in one batch: w1 stands transposed to the others."""
    turned = lambda name, x: x.mT if name == "w1" else x  # noqa: E731
    together = jnp.stack([turned(name, g) for name, g in steps.items()])
    together = newton_schulz(together, coeffs=rule.coeffs, dtype=rule.ns_dtype)
    if rule.detach_ns:
        together = jax.lax.stop_gradient(together)
    return {name: turned(name, u) for name, u in zip(steps, together, strict=True)}


def write(memory, k, v, lr, mom, rule, operators):
    """A chunk `[N, C, ...]` writes into the memory."""
    g = FastWeights(*operators.grads(*memory.w, k, v, lr))
    return commit(memory, g, jnp.mean(mom, -1) if rule.momentum else None, rule, operators.newton_schulz)


def select(condition, yes, no):
    """`where` over trees, condition `[N]`."""
    pick = lambda a, b: jnp.where(condition.reshape(-1, *[1] * (a.ndim - 1)), a, b)  # noqa: E731
    return jax.tree.map(pick, yes, no)


def unfolded(x, B, H):
    return jax.tree.map(lambda a: a.reshape(B, H, *a.shape[1:]), x)


def folded(x):
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), x)


def lact_init(params, *, batch, chunk, rule=TRAINED, dtype=None):
    """The state before a stream's first token.

    Args:
      params: `FastWeights`, w0, w2 `[H, h, d]` and w1 `[H, d, h]`, or with a batch axis before H.
      batch: number of streams B.
      chunk: tokens between two updates, static, the same in every later call.
      dtype: of the tokens to come, or a wider one; None for that of params, float32 at least.
    """
    check_rule(rule, chunk)
    H, _, d = params[0].shape[-3:]
    dtype = jnp.result_type(*params, jnp.float32) if dtype is None else dtype
    w = check_weights(params, batch, H, d, dtype)
    memory = unfolded(fresh(w, rule), batch, H)
    buffers = empty_buffers(batch, H, chunk, d, dtype, w.w0.dtype, rule)
    return LactState(*memory, *buffers, jnp.zeros(batch, jnp.int32))


def empty_buffers(B, H, C, d, dtype, wide, rule):
    buf_mom = jnp.zeros((B, H, C), wide) if rule.momentum else None
    return jnp.zeros((B, H, C, d), dtype), jnp.zeros((B, H, C, d), dtype), jnp.zeros((B, H, C, 3), wide), buf_mom


def lact_reset(state, params, done, *, rule=TRAINED):
    """States whose `done` `[B]` is true start again from params: what an environment's reset does to its memory."""
    B, _, C, _ = state.buf_k.shape
    check_state(state, rule)
    return select(jnp.asarray(done), lact_init(params, batch=B, chunk=C, rule=rule, dtype=state.buf_k.dtype), state)


def lact_commit(state, g, beta, rule):
    """Applies directions g (`FastWeights` `[B, H, ...]`, from `lact_grads`) to the weights; the buffers stay.

    Args:
      beta: `[B, H]`, the momentum's weight; None without momentum.
    """
    check_rule(rule)
    B, H = state.buf_k.shape[:2]
    memory = commit(
        Memory(*folded(tuple(state[:4]))),
        folded(FastWeights(*g)),
        None if beta is None else fold(beta, B, H),
        rule,
        newton_schulz,
    )
    return state._replace(**unfolded(memory, B, H)._asdict())


def tokens_of(q, k, v, lr, mom, rule, wide):
    """Checked and folded (q, k, v, lr, mom); mom None without momentum."""
    B, H = q.shape[:2]
    check_tokens(q, k, v, lr)
    if not rule.momentum:
        mom = None
    elif mom is None or mom.shape != q.shape[:3]:
        raise ValueError(f"mom must be {q.shape[:3]} for a rule with momentum, got {jnp.shape(mom)}")
    rates = [None if x is None else fold(x.astype(wide), B, H) for x in (lr, mom)]
    return *(fold(x, B, H) for x in (q, k, v)), *rates


def window(initial, memory, buffers, n, x, starts, count, rule, operators):
    """At most C tokens of streams that stand at different places of their chunks, some of them restarting.

    However long the pieces, a window of C tokens contains at most one chunk's end for each stream, because two of them
    are C tokens apart: at most two sets of weights, besides the initial ones after a restart, and one update.

    Args:
      initial: `Memory` after a restart, None if there are no restarts.
      buffers: (k, v, lr, mom) `[N, C, ...]`; the first n `[N]` are pending.
      x: (q, k, v, lr, mom) `[N, T, ...]`, T <= C.
      starts: bool `[N, T]`, the token begins a new segment; None for none.
      count: int `[N]`, how many of the T tokens exist.
    Returns:
      (memory, buffers, n, out `[N, T, d]`).
    """
    q, *x = x
    C, T = buffers[0].shape[1], q.shape[1]
    at = jnp.arange(T)
    first = last = count  # the first restart after token 0, and the last
    if initial is not None:
        restart = starts[:, 0] & (count > 0)
        memory, n = select(restart, initial, memory), jnp.where(restart, 0, n)
        begins = starts & (at > 0) & (at < count[:, None])
        restarted = begins.any(-1)
        first = jnp.where(restarted, jnp.argmax(begins, -1), count)
        last = jnp.where(restarted, T - 1 - jnp.argmax(begins[:, ::-1], -1), count)
    room = C - n
    full = first >= room  # the chunk is complete before the segment ends

    out = operators.apply(*memory.w, q)
    # Pending tokens, then the new ones, in one line of C + T; its first C are the chunk if it is complete.
    place = jnp.arange(C + T)
    line = jax.tree.map(lambda old, new: in_line(old, new, n, place), buffers, tuple(x))

    def written(memory):
        after = write(memory, *(None if a is None else a[:, :C] for a in line), rule, operators)
        later = operators.apply(*after.w, q) if T > 1 else out
        return select(full, after, memory), later

    memory, later = jax.lax.cond(full.any(), written, lambda memory: (memory, out), memory)
    out = jnp.where((full[:, None] & (at >= room[:, None]))[..., None], later, out)
    begin, filled = jnp.where(full, C, 0), n + count - jnp.where(full, C, 0)
    if initial is not None:
        out = jnp.where((at >= first[:, None])[..., None], operators.apply(*initial.w, q), out)
        memory = select(restarted, initial, memory)
        begin, filled = jnp.where(restarted, n + last, begin), jnp.where(restarted, count - last, filled)
    buffers = jax.tree.map(lambda a: cut(a, begin, filled, C), line)
    return memory, buffers, filled.astype(jnp.int32), out


def in_line(old, new, n, place):
    """`[N, C + T, ...]`: the first n of old, then new, then anything."""
    both = jnp.concatenate([old, new], 1)
    C, T = old.shape[1], new.shape[1]
    index = jnp.where(place < n[:, None], place, jnp.minimum(C + place - n[:, None], C + T - 1))
    return jnp.take_along_axis(both, index.reshape(*index.shape, *[1] * (old.ndim - 2)), 1)


def cut(line, begin, count, C):
    """C places of the line from begin, zero beyond count."""
    at = jnp.arange(C)
    index = jnp.minimum(begin[:, None] + at, line.shape[1] - 1)
    shape = (*index.shape, *[1] * (line.ndim - 2))
    piece = jnp.take_along_axis(line, index.reshape(shape), 1)
    return jnp.where((at < count[:, None]).reshape(shape), piece, 0)


def over_windows(initial, memory, buffers, n, x, starts, count, rule, operators, every):
    """`window` over any number of tokens `[N, L, ...]`; count `[N]` of them exist, the rest follow as padding."""
    C, L = buffers[0].shape[1], x[0].shape[1]
    if L == 0:
        return memory, buffers, n, x[0]
    # Places first, and apart: over heads they do not vary, and so the state's n_buf does not.
    n, starts, count = alike_trees(n, starts, count)
    initial, memory, buffers, x, _ = alike_trees(initial, memory, buffers, x, n)

    def body(carry, piece):
        x, starts, at = piece
        there = jnp.clip(count - at, 0, x[0].shape[1])
        *carry, out = window(initial, *carry, x, starts, there, rule, operators)
        return tuple(carry), out

    carry, pieces = (memory, buffers, n), []
    whole = L - L % C
    if whole:
        xs = (by_chunk(x, whole, C), by_chunk(starts, whole, C), jnp.arange(0, whole, C))
        carry, out = scan_in_groups(body, carry, xs, every)
        pieces.append(unchunked(out))
    if L % C:
        piece = jax.tree.map(lambda a: a[:, whole:], (x, starts))
        carry, out = body(carry, (*piece, whole))
        pieces.append(out)
    return *carry, jnp.concatenate(pieces, 1)


def by_chunk(x, whole, C):
    """`[N, L, ...]` to `[whole / C, N, C, ...]`."""
    return jax.tree.map(lambda a: jnp.moveaxis(a[:, :whole].reshape(a.shape[0], -1, C, *a.shape[2:]), 1, 0), x)


def unchunked(x):
    """`[n, N, C, ...]` to `[N, n * C, ...]`."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def scan_in_groups(body, carry, xs, every):
    """`lax.scan` that keeps the carry of every `every`-th step for the backward pass and computes the rest again."""
    n = jax.tree.leaves(xs)[0].shape[0]
    scan = jax.checkpoint(partial(jax.lax.scan, body), prevent_cse=False)
    whole = n - n % every
    outs = []
    if whole:
        groups = jax.tree.map(lambda a: a[:whole].reshape(-1, every, *a.shape[1:]), xs)
        carry, out = jax.lax.scan(scan, carry, groups)
        outs.append(out.reshape(-1, *out.shape[2:]))
    if whole < n:
        carry, out = scan(carry, jax.tree.map(lambda a: a[whole:], xs))
        outs.append(out)
    return carry, jnp.concatenate(outs)


def lact_step(state, q, k, v, lr, mom=None, *, chunk, rule=TRAINED, implementation=None, impl=None, explain=False):
    """Reads, buffers and, at chunk borders, writes any number of tokens of a stream.

    Cut a stream as you like: outputs and final state equal those of `lact_scan` on the whole.

    Args:
      state: from `lact_init` or an earlier call; streams of the batch may stand at different places.
      q, k, v: `[B, H, T, d]`, of one type in all calls: what waits is rounded to it.
      lr: `[B, H, T, 3]`, rates for w0, w1, w2.
      mom: `[B, H, T]`, None without momentum.
      chunk: as in `lact_init`.
    Returns:
      (out `[B, H, T, d]`, state).
    Raises:
      ValueError: shapes that do not fit each other or the state, tokens wider than the state's, a rule that is none.
    """
    q, k, v, lr = (jnp.asarray(x) for x in (q, k, v, lr))
    check_rule(rule, chunk)
    B, H, C, d = state.buf_k.shape
    if chunk != C:
        raise ValueError(f"chunk must be {C}, the state's, got {chunk}")
    if q.ndim != 4 or (*q.shape[:2], q.shape[3]) != (B, H, d):
        raise ValueError(f"q must be [{B}, {H}, T, {d}], as the state, got {q.shape}")
    check_state(state, rule)
    held = state.buf_k.dtype
    if jnp.result_type(k, v, held) != held:
        raise ValueError(f"k and v must not be wider than the state's {held}, got {k.dtype} and {v.dtype}")
    rows = Memory(*folded(tuple(state[:4])))
    x = tokens_of(q, k, v, lr, mom, rule, rows.w.w0.dtype)
    chosen = choose_lact("lact_step", named(implementation, impl), explain, q, rows.w)
    operators = operators_of(chosen, rows.w, rule, explain)
    # What waits is as narrow as it came, so that a chunk is written as `lact_scan` would.
    buffers = jax.tree.map(lambda b, a: b.astype(a.dtype), folded(tuple(state[4:8])), x[1:])
    n = jnp.repeat(state.n_buf, H)
    count = jnp.full(B * H, q.shape[2], jnp.int32)
    memory, buffers, n, out = over_windows(None, rows, buffers, n, x, None, count, rule, operators, 1)
    buffers = jax.tree.map(lambda b, a: b.astype(a.dtype), unfolded(buffers, B, H), tuple(state[4:8]))
    return out.reshape(q.shape), LactState(*unfolded(memory, B, H), *buffers, n.reshape(B, H)[:, 0])


def check_state(state, rule):
    """ValueError for a state made by another rule."""
    needs = {"main": rule.norm == "pre", "mom": rule.momentum, "norm0": rule.norm != "none"}
    for name, needed in needs.items():
        if needed != (getattr(state, name) is not None):
            raise ValueError(f"state.{name} does not fit {rule}: make the state with the same rule")


def lact_scan(
    w0,
    q,
    k,
    v,
    lr,
    mom=None,
    *,
    chunk,
    rule=TRAINED,
    order="apply_update",
    segment_ids=None,
    checkpoint_every=1,
    implementation=None,
    impl=None,
    explain=False,
):
    """A whole sequence through the memory.

    Args:
      w0: initial `FastWeights`, w0, w2 `[H, h, d]` and w1 `[H, d, h]`, or with a batch axis before H.
      q, k, v: `[B, H, L, d]`.
      lr: `[B, H, L, 3]`, the rates of every token for w0, w1, w2.
      mom: `[B, H, L]`, None without momentum.
      chunk: tokens that share one update; static.
      order: "apply_update" reads a chunk before it writes (causal); "update_apply" writes first, so that a token sees
        its whole chunk, the shorter last one too.
      segment_ids: integers `[B, L]`: sequences packed into a row, in consecutive tokens each. Where the id changes,
        weights and chunk grid start again, and so the result equals that of the sequences apart. Tokens with a negative
        id are padding: they neither read (output 0) nor write. For "apply_update".
      checkpoint_every: chunks between two states that the forward pass keeps for the backward pass.
      implementation: see `rollax.kernels.backends`; `impl` is the same.
      explain: print which and why.
    Returns:
      (out `[B, H, L, d]` in q's dtype, the `LactState` after the last token: `lact_step` goes on from there. Every full
      chunk has been written, the last one too; a row of several segments has the last one's state).
    Raises:
      ValueError: shapes that do not fit, chunk or checkpoint_every below 1, a rule or an order that is none.
    """
    q, k, v, lr = (jnp.asarray(x) for x in (q, k, v, lr))
    check_rule(rule, chunk)
    if order not in ("apply_update", "update_apply"):
        raise ValueError(f'order must be "apply_update" or "update_apply", got {order!r}')
    if not checkpoint_every >= 1:
        raise ValueError(f"checkpoint_every must be at least 1, got {checkpoint_every}")
    if q.ndim != 4:
        raise ValueError(f"tokens must be [B, H, L, d], got {q.shape}")
    B, H, L, d = q.shape
    memory = fresh(check_weights(w0, B, H, d, q.dtype), rule)
    x = tokens_of(q, k, v, lr, mom, rule, memory.w.w0.dtype)
    memory, x = alike_trees(memory, x)
    chosen = choose_lact("lact_scan", named(implementation, impl), explain, q, memory.w)
    how = rule, operators_of(chosen, memory.w, rule, explain)
    empty = folded(empty_buffers(B, H, chunk, d, k.dtype, memory.w.w0.dtype, rule))
    if segment_ids is not None:
        if jnp.shape(segment_ids) != (B, L):
            raise ValueError(f"segment_ids must be [{B}, {L}], got {jnp.shape(segment_ids)}")
        if order != "apply_update":
            raise ValueError('segment_ids need order "apply_update"')
        packed = partial(packed_scan, memory, empty, x, jnp.repeat(jnp.asarray(segment_ids), H, 0))
        memory, buffers, n, out = packed(*how, checkpoint_every)
        n = n.reshape(B, H)[:, 0]
    else:
        memory, out = aligned_scan(memory, x, chunk, order, *how, checkpoint_every)
        pending = L % chunk if order == "apply_update" else 0
        rest = lambda a, e: e.at[:, :pending].set(a[:, L - pending :])  # noqa: E731
        buffers = jax.tree.map(rest, x[1:], empty)
        n = jnp.full(B, pending, jnp.int32)
    return out.reshape(q.shape), LactState(*unfolded(memory, B, H), *unfolded(buffers, B, H), n)


def aligned_scan(memory, x, C, order, rule, operators, every):
    """(memory, out) of one sequence a row: every chunk at the same place in every row."""
    L = x[0].shape[1]
    if L == 0:
        return memory, x[0]

    def body(memory, x):
        q, *kv = x
        if order == "update_apply":
            memory = write(memory, *kv, rule, operators)
            return memory, operators.apply(*memory.w, q)
        return write(memory, *kv, rule, operators), operators.apply(*memory.w, q)

    # The last chunk stands outside the loop: the compiler then drops its update if nobody reads the final weights.
    whole = max(0, L - 1) // C * C
    pieces = []
    if whole:
        memory, out = scan_in_groups(body, memory, by_chunk(x, whole, C), every)
        pieces.append(unchunked(out))
    last = jax.tree.map(lambda a: a[:, whole:], x)
    if L - whole == C or order == "update_apply":
        memory, out = body(memory, last)
    else:
        out = operators.apply(*memory.w, last[0])
    return memory, jnp.concatenate([*pieces, out], 1)


def packed_scan(initial, buffers, x, ids, rule, operators, every):
    """(memory, buffers, n, out) of rows with several segments and padding; ids `[N, L]`."""
    there = ids >= 0
    order = jnp.argsort(~there, axis=1, stable=True)  # padding goes to the end, and comes back at the end
    gather = lambda a, i: jnp.take_along_axis(a, i.reshape(*i.shape, *[1] * (a.ndim - 2)), 1)  # noqa: E731
    # Zeros where padding stood: what it held must not reach a gradient.
    x = jax.tree.map(lambda a: jnp.where(there.reshape(*there.shape, *[1] * (a.ndim - 2)), a, 0), x)
    x, ids = jax.tree.map(lambda a: gather(a, order), (x, ids))
    starts = jnp.concatenate([jnp.zeros_like(there[:, :1]), ids[:, 1:] != ids[:, :-1]], 1)
    n = jnp.zeros(ids.shape[0], jnp.int32)
    count = there.sum(1)
    *state, out = over_windows(initial, initial, buffers, n, x, starts, count, rule, operators, every)
    out = gather(out, jnp.argsort(order, axis=1))
    return *state, jnp.where(there[..., None], out, 0)


def lact_segments(
    w0,
    q,
    k,
    v,
    lr,
    mom=None,
    *,
    segments,
    rule=NOVEL_VIEWS,
    implementation=None,
    impl=None,
    explain=False,
):
    """A list of (start, end, update, apply), one after another, as the novel-view form of LaCT: update comes first.

    "Update from all tokens, then apply to all" is a memory that reads in both directions.

    Args:
      w0, q, k, v, lr, mom: as for `lact_scan`.
      segments: tuples of two token positions and two flags; static. Tokens that no segment applies give zeros.
    Returns:
      (out `[B, H, L, d]`, `FastWeights` after the last segment `[B, H, ...]`).
    Raises:
      ValueError: as `lact_scan`; a segment outside the sequence.
    """
    q, k, v, lr = (jnp.asarray(x) for x in (q, k, v, lr))
    check_rule(rule)
    if q.ndim != 4:
        raise ValueError(f"tokens must be [B, H, L, d], got {q.shape}")
    B, H, L, d = q.shape
    segments = [tuple(int(x) for x in segment) for segment in segments]
    for segment in segments:
        if len(segment) != 4 or not 0 <= segment[0] < segment[1] <= L:
            raise ValueError(f"segments must be (start, end, update, apply) within 0..{L}, got {segment}")
    memory = fresh(check_weights(w0, B, H, d, q.dtype), rule)
    x = tokens_of(q, k, v, lr, mom, rule, memory.w.w0.dtype)
    memory, x = alike_trees(memory, x)
    chosen = choose_lact("lact_segments", named(implementation, impl), explain, q, memory.w)
    operators = operators_of(chosen, memory.w, rule, explain)
    out = jnp.zeros_like(x[0])
    for start, end, update, apply in segments:
        part = jax.tree.map(lambda a: a[:, start:end], x)  # noqa: B023
        if update:
            memory = write(memory, *part[1:], rule, operators)
        if apply:
            out = put(out, operators.apply(*memory.w, part[0]), start)  # jaxlib 0.11 dies of a scatter in shard_map
    return out.reshape(q.shape), unfolded(memory.w, B, H)
