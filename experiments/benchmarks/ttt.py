"""Seconds of test-time training: TTT-Linear, TTT-MLP and LaCT against the straightforward scan of the same memory.

    python experiments/benchmarks/ttt.py
    python experiments/benchmarks/ttt.py --lengths 2048 8192 --batch 8
    python experiments/benchmarks/ttt.py --cases ttt_linear lact --width 64 --dtype bfloat16  # on a GPU or TPU

One case a memory, pass and scan. TTT (arXiv 2407.04620) has two straightforward scans, both with inner gradients by
autodiff: "primal" takes a mini-batch at a time and holds the fast weights of each of its tokens, "tokens" goes token
by token. LaCT (arXiv 2505.23884) has one, chunk by chunk with an autodiff pass for every matrix. Both sides get the
same arrays and must give the same numbers. Printed beside the table and in the JSON file are the error against the
peer, relative and the most of any array, and the roofline fraction: operations by the cost model of the dual form and
of the chunk update, a backward pass counted as two forward passes, over the speed of large matrix products.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from rollax.experiments.benchmarks.timing import (
    Row,
    check_implementation,
    compile_timed,
    duel,
    peak_operations,
    publish,
    seconds_of,
    show_notes,
)
from rollax.experiments.harness.command_line import one_line_end, parse
from rollax.kernels import ttt
from rollax.kernels.ttt.reference import fast_model, layer_norm

CASES = ("ttt_linear", "ttt_mlp", "lact")
SCANS = {"ttt_linear": ttt.ttt_linear_scan, "ttt_mlp": ttt.ttt_mlp_scan}


@dataclass(frozen=True)
class Config:
    """The benchmark."""

    cases: tuple[str, ...] = CASES
    """Memories to measure."""
    lengths: tuple[int, ...] = (2048,)
    """Tokens of a sequence, one case each; multiples of `mini_batch` and `chunk`."""
    batch: int = 4
    """Sequences."""
    heads: int = 4
    """Heads of a sequence."""
    width: int = 64
    """Width of a head."""
    mini_batch: int = 16
    """Tokens of a TTT mini-batch."""
    chunk: int = 512
    """Tokens of a LaCT chunk."""
    lact_heads: int = 1
    """Fast-weight heads of LaCT, `heads * width / lact_heads` wide."""
    dtype: str = "float32"
    """float32 or bfloat16, of the tokens."""
    implementation: str = ""
    """Of ours; empty for the best here."""
    peer: bool = True
    """Measure the straightforward scans too."""
    repeats: int = 5
    """Interleaved repeats."""
    out: str = ""
    """The JSON file; empty for runs/benchmarks/ttt.json."""

    def check(self) -> None:
        """Raises ValueError for values that cannot work, before anything is computed."""
        if unknown := set(self.cases) - set(CASES):
            raise ValueError(f"cases: expected some of {', '.join(CASES)}, got {', '.join(sorted(unknown))}")
        for field in ("batch", "heads", "width", "mini_batch", "chunk", "lact_heads", "repeats"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}: expected at least 1, got {getattr(self, field)}")
        if not self.lengths or any(x % self.mini_batch or x % self.chunk or x < 1 for x in self.lengths):
            raise ValueError(f"lengths: expected multiples of mini_batch and chunk, got {self.lengths}")
        if self.heads * self.width % self.lact_heads:
            raise ValueError(f"lact_heads: expected a divisor of {self.heads * self.width}, got {self.lact_heads}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype: expected float32 or bfloat16, got {self.dtype!r}")
        check_implementation(self.implementation)


def token_scan(q, k, v, eta_pos, gate, params, ln, *, mini_batch):
    """TTT as one would first write it: a scan over tokens that carries the mini-batch's initial weights and the sum of
    its gradients."""

    def head(q, k, v, gate, params, weight, bias):
        def inner_loss(params, key, value):
            reconstruction = layer_norm(fast_model(params, key[None])[0], weight, bias)
            return 0.5 * jnp.sum((reconstruction - (value - key)) ** 2)

        def step(carry, token):
            start, written = carry
            q, k, v, gate, i = token
            gradients = jax.grad(inner_loss)(start, k, v)
            written = jax.tree.map(lambda w, g: w + gate * g, written, gradients)
            now = jax.tree.map(lambda w, g: w - eta_pos[i] * g, start, written)
            ends = i == mini_batch - 1
            start = jax.tree.map(lambda a, b: jnp.where(ends, a, b), now, start)
            written = jax.tree.map(lambda w: jnp.where(ends, 0, w), written)
            return (start, written), q + layer_norm(fast_model(now, q[None])[0], weight, bias)

        start = params, jax.tree.map(jnp.zeros_like, params)
        places = jnp.arange(q.shape[0]) % mini_batch
        (params, _), out = jax.lax.scan(step, start, (q, k, v, gate, places))
        return out, params

    over_heads = jax.vmap(head)
    return jax.vmap(over_heads, in_axes=(0, 0, 0, 0, None, None, None))(q, k, v, gate, params, *ln)


def ttt_case(name: str, length: int, config: Config):
    """(arguments, ours, the straightforward scans by name, operations of a forward pass)."""
    keys = jax.random.split(jax.random.key(0), 8)
    B, H, f, K = config.batch, config.heads, config.width, config.mini_batch
    q, k, v = (jax.random.normal(key, (B, H, length, f)).astype(config.dtype) for key in keys[:3])
    gate = jax.nn.sigmoid(jax.random.normal(keys[3], (B, H, length)))
    eta_pos = (1.0 if name == "ttt_linear" else 0.1) / jnp.arange(1, K + 1) / f
    shapes = ((f, f), (1, f)) if name == "ttt_linear" else ((f, 4 * f), (1, 4 * f), (4 * f, f), (1, f))
    params = tuple(0.02 * jax.random.normal(key, (H, *s)) for key, s in zip(keys[4:], shapes, strict=False))
    arguments = q, k, v, eta_pos, gate, params, (jnp.ones((H, f)), jnp.zeros((H, f)))
    ours = partial(SCANS[name], mini_batch=K, implementation=config.implementation or None)
    peers = {
        "primal": partial(SCANS[name], mini_batch=K, form="primal"),
        "tokens": partial(token_scan, mini_batch=K),
    }
    operations = 6 * K * f**2 + 6 * K**2 * f if name == "ttt_linear" else 56 * K * f**2 + 30 * K**2 * f
    return arguments, ours, peers, operations * B * H * length / K


def lact_case(length: int, config: Config):
    """The same for LaCT with Muon, momentum and pre-norm."""
    B, H, C = config.batch, config.lact_heads, config.chunk
    d = config.heads * config.width // H
    keys = jax.random.split(jax.random.key(0), 8)
    q, k, v = (jax.random.normal(key, (B, H, length, d)) for key in keys[:3])
    unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    q, k, v = (x.astype(config.dtype) for x in (unit(q), unit(k), v))
    lr = jax.nn.softplus(jax.random.normal(keys[3], (B, H, length, 3)) - 4.6)
    mom = jax.nn.sigmoid(jax.random.normal(keys[4], (B, H, length)))
    w = ttt.FastWeights(*(jax.random.normal(key, (H, d, d)) / d**0.5 for key in keys[5:]))
    scan = lambda implementation: lambda *x: ttt.lact_scan(*x, chunk=C, implementation=implementation)[0]  # noqa: E731
    chunks = length // C
    operations = B * H * (6 * length * d**2 + (chunks - 1) * (12 * C * d**2 + 90 * d**3))  # the last one only reads
    return (w, q, k, v, lr, mom), scan(config.implementation or None), {"chunks": scan("reference")}, operations


def passes(run: Callable) -> dict[str, tuple[Callable, int]]:
    """Forward, and forward with backward: a function of the arguments and its cost in forward passes."""
    first = lambda out: out[0] if isinstance(out, tuple) else out  # noqa: E731
    loss = lambda arguments: jnp.mean(first(run(*arguments)).astype(jnp.float32) ** 2)  # noqa: E731
    return {"forward": (lambda arguments: first(run(*arguments)), 1), "forward and backward": (jax.grad(loss), 3)}


def agree(ours, theirs, case: str, dtype: str) -> float:
    """How far two trees of results are apart, the most of any array and of its norm; raises if rounding is not why."""
    bound, worst = 1e-3 if dtype == "float32" else 0.1, 0.0
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        error = np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)
        if not error < bound:
            raise ValueError(f"{case}: both sides differ by {error:.2g} of the norm, more than {bound}")
        worst = max(worst, float(error))
    return worst


def measure(name: str, length: int, config: Config, peak: float) -> list[Row]:
    """The rows of a memory at a length: each pass against each straightforward scan."""
    arguments, ours, peers, operations = lact_case(length, config) if name == "lact" else ttt_case(name, length, config)
    rivals = {peer: passes(run) for peer, run in peers.items()} if config.peer else {None: {}}
    rows = []
    for kind, (function, cost) in passes(ours).items():
        program, compile_ours = compile_timed(function, arguments)
        for peer, theirs in rivals.items():
            case = f"{name} {kind}, {length} tokens" + (f", {peer}" if peer else "")
            rival, compile_peer = compile_timed(theirs[kind][0], arguments) if peer else (None, None)
            notes = {}
            if peer:
                notes["peer_error"] = agree(program(arguments), rival(arguments), case, config.dtype)
            row = duel(
                case,
                "tokens/s",
                length * config.batch,
                config.repeats,
                lambda program=program: seconds_of(program, arguments),
                (lambda rival=rival: seconds_of(rival, arguments)) if peer else None,
                compile_ours=compile_ours,
                compile_peer=compile_peer,
            )
            fraction = cost * operations / float(np.median(row.ours)) / peak
            rows.append(row._replace(notes=notes | {"roofline_fraction": fraction}))
    return rows


@one_line_end()
def main(argv: list[str] | None = None) -> None:
    config = parse(Config(), __doc__, argv)
    peak = peak_operations(config.dtype, config.repeats)
    rows = [row for length in config.lengths for name in config.cases for row in measure(name, length, config, peak)]
    show_notes(rows, peak)
    publish("ttt", rows, config, {"straightforward scans": jax.__version__} if config.peer else {}, config.out)


if __name__ == "__main__":
    main()
