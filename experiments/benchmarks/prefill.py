"""Seconds of sparse prefill against dense causal attention, on heads with planted patterns.

    python experiments/benchmarks/prefill.py
    python experiments/benchmarks/prefill.py --lengths 2048 4096 8192 16384 32768
    python experiments/benchmarks/prefill.py --lengths 32768 131072 --heads 32 --width 128 --dtype bfloat16  # on a GPU

One case a length and peer: FlashPrefill (scoring, selection and attention, arXiv 2603.06199) and our dense attention,
each against a dense attention that is not ours. The peers are `jax.nn.dot_product_attention` ("xla"; "cudnn" on NVIDIA
GPUs) and, where it is installed, `tokamax.dot_product_attention`; the one of XLA holds `[S, S]` logits and therefore
takes head by head. The JSON file also has the density, the error against dense attention, the time of scoring as a
share of the peer's, and the fraction of the speed of a large matrix product (the roofline) that attention reaches.
"""

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from rollax.experiments.benchmarks.timing import Row, compile_timed, duel, interleave, publish, seconds_of
from rollax.experiments.flash_prefill import HEADS, planted_head
from rollax.experiments.harness.command_line import parse
from rollax.kernels.flash_prefill import (
    FlashPrefillConfig,
    block_energy,
    compact_index,
    dense_attention,
    flash_prefill,
    mean_pool,
    select_blocks,
)


@dataclass(frozen=True)
class Config:
    """The benchmark."""

    lengths: tuple[int, ...] = (2048, 4096, 8192, 16384)
    """Tokens of the prompt, one case each; multiples of `block`."""
    kinds: tuple[str, ...] = ("vertical", "slash", "blocks")
    """Planted patterns, in turn over the heads."""
    heads: int = 3
    """Heads, each with keys of its own."""
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
    dtype: str = "float32"
    """float32, bfloat16 or float16."""
    implementation: str = ""
    """Of ours; empty for the best here."""
    gradient: bool = False
    """Time forward and backward instead of forward."""
    repeats: int = 5
    """Interleaved repeats."""
    peers: tuple[str, ...] = ()
    """xla, cudnn, tokamax; empty for those that can run here (xla on CPUs only)."""
    peer: bool = True
    """Measure the peers too."""
    out: str = ""
    """The JSON file; empty for runs/benchmarks/prefill.json."""

    def check(self) -> None:
        """Raises ValueError for values that cannot work, before anything is computed."""
        for field in ("heads", "width", "repeats"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}: expected at least 1, got {getattr(self, field)}")
        if not self.lengths or any(x < self.block or x % self.block for x in self.lengths):
            raise ValueError(f"lengths: expected multiples of block ({self.block}), got {self.lengths}")
        if not self.kinds or set(self.kinds) - set(HEADS):
            raise ValueError(f"kinds: expected some of {tuple(HEADS)}, got {self.kinds}")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype: expected float32, bfloat16 or float16, got {self.dtype!r}")
        if set(self.peers) - set(PEERS):
            raise ValueError(f"peers: expected some of {tuple(PEERS)}, got {self.peers}")
        self.selection()

    def selection(self) -> FlashPrefillConfig:
        return FlashPrefillConfig(
            alpha=self.alpha,
            block_size=self.block,
            sink_blocks=self.sink,
            window_blocks=self.window,
            last_full_blocks=self.last_full,
        )


def xla_attention(q, k, v):
    """`[S, H, D]`; one head at a time, since all `[S, S]` logits of a head exist at once."""
    one = partial(jax.nn.dot_product_attention, is_causal=True, implementation="xla")
    heads = (jnp.moveaxis(x, 1, 0)[:, None, :, None] for x in (q, k, v))
    return jnp.moveaxis(jax.lax.map(lambda x: one(*x)[0, :, 0], tuple(heads)), 0, 1)


def cudnn_attention(q, k, v):
    return jax.nn.dot_product_attention(q[None], k[None], v[None], is_causal=True, implementation="cudnn")[0]


def tokamax_attention(q, k, v):
    import tokamax

    return tokamax.dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]


PEERS: dict[str, Callable] = {"xla": xla_attention, "cudnn": cudnn_attention, "tokamax": tokamax_attention}


def peers_of(config: Config) -> tuple[str, ...]:
    if not config.peer or config.peers:
        return config.peers if config.peer else ()
    if jax.default_backend() == "cpu":
        return ("xla",)
    installed = ("tokamax",) if importlib.util.find_spec("tokamax") else ()
    return (("cudnn",) if jax.default_backend() == "gpu" else ()) + installed


def planted(config: Config, length: int):
    """q, k, v `[S, H, D]`: one planted head after another, each with keys of its own."""

    def head(h):
        kind = list(HEADS).index(config.kinds[h % len(config.kinds)])
        q, k, v = planted_head(jax.random.key(h), kind, length=length, block=config.block, width=config.width)
        return q[:, :1], k, v

    heads = zip(*(head(h) for h in range(config.heads)), strict=True)
    return tuple(jnp.concatenate(x, axis=1).astype(config.dtype) for x in heads)


def roofline(config: Config, size: int = 2048) -> float:
    """Floating point operations a second of a large matrix product in the dtype of the case."""
    x = jnp.ones((size, size), config.dtype)
    multiply = jax.jit(lambda x: jnp.matmul(x, x, preferred_element_type=jnp.float32))
    return 2 * size**3 / min(interleave({"product": lambda: seconds_of(multiply, x)}, config.repeats)["product"])


def measure(length: int, peer: str, config: Config, peak: float) -> list[Row]:
    """The rows of a length: sparse and dense prefill of ours against a peer ("" for none)."""
    q, k, v = planted(config, length)
    cfg, n = config.selection(), length // config.block
    how = dict(implementation=config.implementation or None)

    def scoring(q, k):
        return compact_index(select_blocks(block_energy(q, mean_pool(k, config.block), cfg, **how), cfg), n)

    def timed(attention):
        """(compiled program, seconds to compile): the output, or with `gradient` that of its sum of squares."""
        loss = lambda *x: jnp.sum(attention(*x).astype(jnp.float32) ** 2)  # noqa: E731
        return compile_timed(jax.grad(loss, argnums=(0, 1, 2)) if config.gradient else attention, q, k, v)

    ours = {
        "sparse": lambda *x: flash_prefill(*x, cfg, **how)[0],
        "dense": lambda *x: dense_attention(*x, block_size=config.block, **how)[0],
    }
    (scored, _), rival = compile_timed(scoring, q, k), timed(PEERS[peer]) if peer else (None, None)
    out, stats = jax.jit(partial(flash_prefill, cfg=cfg, **how))(q, k, v)
    exact = jax.jit(ours["dense"])(q, k, v)
    far = lambda a, b: float(jnp.linalg.norm((a - b).astype(jnp.float32)) / jnp.linalg.norm(b.astype(jnp.float32)))  # noqa: E731
    scorings = interleave({"scoring": lambda: seconds_of(scored, q, k)}, config.repeats)["scoring"]
    pairs = n * (n + 1) / 2 * config.block**2 * config.heads  # of queries and keys in the blocks of dense attention
    rows = []
    for name, attention in ours.items():
        density = float(stats.density) if name == "sparse" else 1.0
        program, compile_seconds = timed(attention)
        row = duel(
            f"{name}, {length} tokens" + (f", {peer}" if peer else ""),
            "tokens/s",
            length,
            config.repeats,
            lambda program=program: seconds_of(program, q, k, v),
            (lambda: seconds_of(rival[0], q, k, v)) if peer else None,
            compile_ours=compile_seconds,
            compile_peer=rival[1],
        )
        # Two products of the forward pass, five more of the backward pass.
        operations = (14 if config.gradient else 4) * pairs * density * config.width
        notes = {
            "density": density,
            "relative_error": far(out, exact) if name == "sparse" else 0.0,
            "roofline_fraction": operations / float(np.median(row.ours)) / peak,
        }
        if peer:
            notes["scoring_share"] = float(np.median(scorings) / np.median(row.peer))
        if peer and name == "dense":
            notes["peer_error"] = notes["relative_error"] = far(exact, jax.jit(PEERS[peer])(q, k, v))
        rows.append(row._replace(notes=notes))
    return rows


def main(argv: list[str] | None = None) -> None:
    config = parse(Config(), __doc__, argv)
    peak, peers = roofline(config), peers_of(config)
    rows = [row for length in config.lengths for peer in peers or ("",) for row in measure(length, peer, config, peak)]
    for row in rows:
        print(f"{row.case}: " + ", ".join(f"{name.replace('_', ' ')} {x:.3g}" for name, x in row.notes.items()))
    versions = {name: jax.__version__ if name != "tokamax" else importlib.metadata.version(name) for name in peers}
    publish("prefill", rows, config, versions, config.out)


if __name__ == "__main__":
    main()
