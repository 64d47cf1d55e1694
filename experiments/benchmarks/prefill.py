"""Seconds of sparse prefill against dense causal attention, on heads with planted patterns.

    python experiments/benchmarks/prefill.py
    python experiments/benchmarks/prefill.py --lengths 2048 4096 8192 16384 32768
    python experiments/benchmarks/prefill.py --lengths 131072 --heads 32 --kv-heads 8 --width 128 \\
        --dtype bfloat16 --sink 2 --window 20 --last-full 2  # on a GPU; density .05 (.02 with the paper's window of 4)

One case a length, operator and peer. Ours are FlashPrefill ("sparse": scoring, selection and attention, arXiv
2603.06199), its V2 ("packed": one list for the query heads of a key head, with the mean correction, arXiv 2608.19758;
`--chunk` reads the prompt in chunks after their prefix) and dense attention. Dense peers are
`jax.nn.dot_product_attention` ("xla"; "cudnn" on NVIDIA GPUs) and `tokamax.dot_product_attention`; the one of XLA holds
`[S, S]` logits and therefore takes head by head. "triton" is the authors' own operator of the first paper, forward
only: it needs torch, and the folder `ops` of a checkout of github.com/qhfan/FlashPrefill on PYTHONPATH
(XLA_PYTHON_CLIENT_PREALLOCATE=false leaves it memory). A peer that cannot run is left out, with the reason.

The default heads have a structure (vertical, slash, blocks, in turn); `--kinds` also takes the noisy and the diffuse
head of `experiments/flash_prefill.py`. `--gradient` times the forward pass with the backward pass.

Printed beside the table and in the JSON file are the density, the error against dense attention, that against the peer
of the same operator (of the output, and the largest of the three gradients), the time of scoring and selection as a
share of that row's peer, and the fraction of the speed of large matrix products (the roofline) that the attention to
the blocks that are read reaches. The share is of dense attention, under `--gradient` of both its passes, though scoring
belongs to the forward pass; with "triton" it is of the authors' whole operator, which scores too.
"""

import importlib.metadata
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rollax.experiments.benchmarks.timing import (
    Row,
    check_implementation,
    compile_timed,
    duel,
    interleave,
    peak_operations,
    publish,
    seconds_of,
    show_notes,
)
from rollax.experiments.flash_prefill import HEADS, planted_head
from rollax.experiments.harness.command_line import one_line_end, parse
from rollax.kernels.flash_prefill import (
    FlashPrefillConfig,
    PackedPrefillConfig,
    block_energy,
    compact_index,
    dense_attention,
    flash_prefill,
    flash_prefill_packed,
    mean_pool,
    select_blocks,
)


@dataclass(frozen=True)
class Config:
    """The benchmark."""

    lengths: tuple[int, ...] = (2048, 4096, 8192, 16384)
    """Tokens of the prompt, one case each; multiples of `block`."""
    kinds: tuple[str, ...] = ("vertical", "slash", "blocks")
    """Planted patterns, in turn over the heads: also "noisy blocks" and "diffuse", which has none."""
    heads: int = 3
    """Query heads."""
    kv_heads: int = 0
    """Key heads, each with a pattern of its own; 0 for one a query head."""
    width: int = 64
    """Width of a head."""
    block: int = 128
    """Tokens of a block."""
    alpha: float = 0.1
    """Threshold of the selection."""
    sink: int = 1
    """Blocks always read at the start."""
    window: int = 2
    """Blocks always read up to the diagonal."""
    last_full: int = 0
    """Query blocks at the end that read all."""
    chunk: int = 0
    """Queries at a time of "packed", after the keys before them; 0 for the whole prompt."""
    dtype: str = "float32"
    """float32, bfloat16 or float16."""
    implementation: str = ""
    """Of ours; empty for the best here."""
    gradient: bool = False
    """Time forward and backward instead of forward."""
    repeats: int = 5
    """Interleaved repeats."""
    peers: tuple[str, ...] = ()
    """xla, cudnn, tokamax, triton; empty for those that are made for this platform (xla on CPUs only)."""
    peer: bool = True
    """Measure the peers too."""
    out: str = ""
    """The JSON file; empty for runs/benchmarks/prefill.json."""

    def check(self) -> None:
        """Raises ValueError for values that cannot work, before anything is computed."""
        for field in ("heads", "width", "repeats"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}: expected at least 1, got {getattr(self, field)}")
        if self.kv_heads < 0 or self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"kv_heads: expected 0 or a divisor of heads ({self.heads}), got {self.kv_heads}")
        if not self.lengths or any(x < self.block or x % self.block for x in self.lengths):
            raise ValueError(f"lengths: expected multiples of block ({self.block}), got {self.lengths}")
        if self.chunk < 0 or any(x % (self.chunk or x) for x in self.lengths):
            raise ValueError(f"chunk: expected 0 or a divisor of each of {self.lengths}, got {self.chunk}")
        if not self.kinds or set(self.kinds) - set(HEADS):
            raise ValueError(f"kinds: expected some of {tuple(HEADS)}, got {self.kinds}")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype: expected float32, bfloat16 or float16, got {self.dtype!r}")
        if set(self.peers) - set(PEERS):
            raise ValueError(f"peers: expected some of {tuple(PEERS)}, got {self.peers}")
        check_implementation(self.implementation)
        self.selection()
        self.packed_selection()

    def selection(self) -> FlashPrefillConfig:
        return FlashPrefillConfig(
            alpha=self.alpha,
            block_size=self.block,
            sink_blocks=self.sink,
            window_blocks=self.window,
            last_full_blocks=self.last_full,
        )

    def packed_selection(self) -> PackedPrefillConfig:
        return PackedPrefillConfig(
            alpha=self.alpha,
            block_size=self.block,
            tile_rows=self.block,
            sink_blocks=self.sink,
            window_blocks=self.window,
            last_full_tiles=self.last_full,
        )


def xla_attention(q, k, v):
    """`[S, H, D]`; one head at a time, since all `[S, S]` logits of a head exist at once."""
    one = partial(jax.nn.dot_product_attention, is_causal=True, implementation="xla")
    k, v = (jnp.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    heads = (jnp.moveaxis(x, 1, 0)[:, None, :, None] for x in (q, k, v))
    return jnp.moveaxis(jax.lax.map(lambda x: one(*x)[0, :, 0], tuple(heads)), 0, 1)


def cudnn_attention(q, k, v):
    return jax.nn.dot_product_attention(q[None], k[None], v[None], is_causal=True, implementation="cudnn")[0]


def tokamax_attention(q, k, v):
    import tokamax

    return tokamax.dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]


DENSE = {"xla": xla_attention, "cudnn": cudnn_attention, "tokamax": tokamax_attention}
PEERS = (*DENSE, "triton")


def peers_of(config: Config) -> tuple[str, ...]:
    """The peers that were asked for, or all that are made for this platform."""
    if not config.peer or config.peers:
        return config.peers if config.peer else ()
    return {"cpu": ("xla",), "gpu": ("cudnn", "tokamax", "triton")}.get(jax.default_backend(), ("tokamax",))


class Program(NamedTuple):
    """Something to time: `run(q, k, v)`, the seconds before it could, its output `[S, H, D]` and density.

    gradients: of q, k and v, where it is they that are timed.
    """

    run: Callable
    compile_seconds: float
    out: jax.Array
    density: float = 1.0
    gradients: tuple[jax.Array, ...] = ()


def jax_program(attention: Callable, arguments, gradient: bool) -> Program:
    """Of a function that returns (output, density); with `gradient` it is the gradient of the sum of squares."""
    loss = lambda *x: jnp.sum(attention(*x)[0].astype(jnp.float32) ** 2)  # noqa: E731
    run, seconds = compile_timed(jax.grad(loss, argnums=(0, 1, 2)) if gradient else attention, *arguments)
    out, density = (jax.jit(attention) if gradient else run)(*arguments)
    return Program(run, seconds, out, float(density), run(*arguments) if gradient else ())


def triton_program(cfg: FlashPrefillConfig, arguments, gradient: bool) -> Program:
    """The authors' operator; its first call compiles and tunes. Raises ValueError for gradients, ImportError."""
    if gradient:
        raise ValueError("the authors' operator has no gradient")
    import torch
    from flashprefill_native_forward import flash_prefill as theirs

    q, k, v = (torch.from_dlpack(x[None]) for x in jax.block_until_ready(arguments))
    out = torch.empty_like(q)  # theirs takes [B, S, H, D] and writes here

    def run(*_):
        numbers = cfg.sink_blocks, cfg.window_blocks, cfg.alpha, cfg.last_full_blocks, cfg.min_budget
        theirs(q, k, v, out, cfg.block_size, *numbers)
        torch.cuda.synchronize()

    seconds = seconds_of(run)
    return Program(run, seconds, jnp.from_dlpack(out)[0])


def errors(ours: Program, theirs: Program, kind: str) -> dict[str, float]:
    """The norm of the difference over that of theirs: of the output, and the largest of the gradients."""
    norm = lambda x: jnp.linalg.norm(x.astype(jnp.float32))  # noqa: E731
    far = lambda a, b: float(norm(a - b) / norm(b))  # noqa: E731
    found = {f"{kind}_error": far(ours.out, theirs.out)}
    if ours.gradients:
        found[f"{kind}_gradient_error"] = max(map(far, ours.gradients, theirs.gradients))
    return found


def planted(config: Config, length: int):
    """q `[S, heads, D]`, k and v `[S, kv_heads, D]`: one planted key head after another with its group of queries.

    A planted head has two query heads, which larger groups repeat.
    """
    kv_heads = config.kv_heads or config.heads

    def head(h):
        kind = list(HEADS).index(config.kinds[h % len(config.kinds)])
        q, k, v = planted_head(jax.random.key(h), kind, length=length, block=config.block, width=config.width)
        return q[:, jnp.arange(config.heads // kv_heads) % q.shape[1]], k, v

    heads = zip(*(head(h) for h in range(kv_heads)), strict=True)
    return tuple(jnp.concatenate(x, axis=1).astype(config.dtype) for x in heads)


def contestants(config: Config) -> dict[str, Callable]:
    """Ours by name: functions of q, k, v that return (output, density)."""
    how = dict(implementation=config.implementation or None)

    def sparse(q, k, v):
        out, stats = flash_prefill(q, k, v, config.selection(), **how)
        return out, stats.density

    def packed(q, k, v):
        size = config.chunk or q.shape[0]
        chunks, prefix = q.reshape(-1, size, *q.shape[1:]), jnp.arange(0, q.shape[0], size)
        one = lambda x: flash_prefill_packed(x[0], k, v, config.packed_selection(), prefix=x[1], **how)  # noqa: E731
        out, stats = jax.lax.map(one, (chunks, prefix))
        return out.reshape(q.shape), jnp.average(stats.density, weights=prefix + size / 2)  # keys that a chunk sees

    def dense(q, k, v):
        return dense_attention(q, k, v, block_size=config.block, **how)[0], 1.0

    return {"sparse": sparse, "packed": packed, "dense": dense}


def rivals(config: Config, length: int, arguments) -> dict[str, Program]:
    """The peers that can take these arguments; says of the others why not."""
    found = {}
    for name in peers_of(config):
        try:
            if name == "triton":
                found[name] = triton_program(config.selection(), arguments, config.gradient)
            else:
                found[name] = jax_program(lambda *x, f=DENSE[name]: (f(*x), 1.0), arguments, config.gradient)
        except Exception as error:
            reason = (str(error).splitlines() or [""])[0][:200]
            print(f"{length} tokens, {name}: left out: {type(error).__name__}: {reason}")
    return found


def measure(length: int, config: Config, peak: float) -> list[Row]:
    """The rows of a length: each of ours against each peer, or alone where there is none."""
    arguments = q, k, _ = planted(config, length)
    cfg, n = config.selection(), length // config.block

    def scoring(q, k):
        energy = block_energy(q, mean_pool(k, config.block), cfg, implementation=config.implementation or None)
        return compact_index(select_blocks(energy, cfg), n)

    ours = {name: jax_program(f, arguments, config.gradient) for name, f in contestants(config).items()}
    scored, _ = compile_timed(scoring, q, k)
    peers = rivals(config, length, arguments)
    scorings = interleave({"scoring": lambda: seconds_of(scored, q, k)}, config.repeats)["scoring"]
    pairs = n * (n + 1) / 2 * config.block**2 * config.heads  # of queries and keys in the blocks of dense attention
    rows = []
    for name, mine in ours.items():
        for peer, theirs in (peers or {"": None}).items():
            row = duel(
                f"{name}, {length} tokens" + (f", {peer}" if peer else ""),
                "tokens/s",
                length,
                config.repeats,
                lambda mine=mine: seconds_of(mine.run, *arguments),
                (lambda theirs=theirs: seconds_of(theirs.run, *arguments)) if peer else None,
                compile_ours=mine.compile_seconds,
                compile_peer=theirs.compile_seconds if peer else None,
            )
            # Two products of the forward pass, five more of the backward pass.
            operations = (14 if config.gradient else 4) * pairs * mine.density * config.width
            notes = {
                "density": mine.density,
                **errors(mine, ours["dense"], "relative"),
                "roofline_fraction": operations / float(np.median(row.ours)) / peak,
            }
            if peer:
                notes["scoring_share"] = float(np.median(scorings) / np.median(row.peer))
            if peer and name == ("sparse" if peer == "triton" else "dense"):
                notes |= errors(mine, theirs, "peer")
            rows.append(row._replace(notes=notes))
    return rows


def version_of(peer: str) -> str:
    if peer == "triton":
        return sys.modules["triton"].__version__
    return importlib.metadata.version("tokamax") if peer == "tokamax" else jax.__version__


@one_line_end()
def main(argv: list[str] | None = None) -> None:
    config = parse(Config(), __doc__, argv)
    peak = peak_operations(config.dtype, config.repeats)
    rows = [row for length in config.lengths for row in measure(length, config, peak)]
    show_notes(rows, peak)
    ran = dict.fromkeys(row.case.split(", ")[-1] for row in rows if row.peer)
    publish("prefill", rows, config, {name: version_of(name) for name in ran}, config.out)


if __name__ == "__main__":
    main()
