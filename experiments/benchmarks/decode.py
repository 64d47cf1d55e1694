"""Decode attention over partly filled caches against `jax.nn.dot_product_attention`, and what bandwidth it reaches.

    python experiments/benchmarks/decode.py
    python experiments/benchmarks/decode.py --dtypes bfloat16 --slots 16384 --batches 1
    python experiments/benchmarks/decode.py --agents          # against the attention of agents/transformer.py

A step reads keys and values once and computes little, so the bound is bandwidth: the last columns give the bytes in use
over the time, as a share of what a sum over an array of the same device reaches. On a GPU the peer is cuDNN where it
takes the call, and tokamax is measured beside it where it is installed. Rows differ in length: from half of `fill` to
all of it.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from rollax.agents.transformer import attend
from rollax.experiments.benchmarks.timing import (
    Row,
    check_implementation,
    compile_timed,
    duel,
    interleave,
    publish,
    seconds_of,
)
from rollax.experiments.harness.command_line import one_line_end, parse
from rollax.experiments.harness.report import show
from rollax.kernels.decode_attention import decode_attention

STREAM = 2**26  # float32 numbers of the array that measures bandwidth, 256 MiB


@dataclass(frozen=True)
class Config:
    """The benchmark."""

    batches: tuple[int, ...] = (1, 8)
    """Rows decoded at once."""
    slots: tuple[int, ...] = (1024, 4096, 16384)
    """Slots of the cache."""
    fills: tuple[float, ...] = (0.25, 1.0)
    """Length of the longest row over the slots."""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    """Of queries and cache."""
    heads: int = 32
    """Query heads."""
    kv_heads: int = 8
    """Key and value heads."""
    width: int = 128
    """Of a head."""
    gigabytes: float = 1.1
    """Caches larger than this are left out."""
    implementation: str = ""
    """Ours; empty for the best of the platform."""
    agents: bool = False
    """The peer is the attention of agents/transformer.py."""
    repeats: int = 7
    """Interleaved repeats."""
    out: str = ""
    """The JSON file; empty for runs/benchmarks/decode.json."""

    def check(self) -> None:
        """Raises ValueError for values that cannot work, before anything is computed."""
        for field in ("batches", "slots", "heads", "kv_heads", "width", "repeats"):
            value = getattr(self, field)
            if min(value if isinstance(value, tuple) else (value,), default=0) < 1:
                raise ValueError(f"{field}: expected at least 1, got {value}")
        if not all(0 < fill <= 1 for fill in self.fills):
            raise ValueError(f"fills: expected numbers in (0, 1], got {self.fills}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads: expected a multiple of kv_heads {self.kv_heads}, got {self.heads}")
        if not self.dtypes or set(self.dtypes) - {"float32", "bfloat16", "float16"}:
            raise ValueError(f"dtypes: expected some of float32, bfloat16 and float16, got {self.dtypes}")
        check_implementation(self.implementation)


def lengths(batch: int, slots: int, fill: float) -> jax.Array:
    """int32 `[B]`: the first row is `fill * slots` long, the last half of that."""
    return jnp.asarray(np.ceil(np.linspace(1, 0.5, batch) * fill * slots), jnp.int32)


def dot_product_attention(implementation: str | None, q, k, v, length):
    """JAX's own, which wants the cache as `[B, S, K, d]`."""
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    out = jax.nn.dot_product_attention(
        q[:, None], k, v, key_value_seq_lengths=length, implementation=implementation
    )  # fmt: skip
    return out[:, 0]


def of_agents(q, k, v, length):
    """The attention of `agents/transformer.py` in a step of one token."""
    visible = (jnp.arange(k.shape[2]) < length[:, None])[:, None]
    return attend(q[:, None], k.swapaxes(1, 2), v.swapaxes(1, 2), visible)[:, 0]


def tokamax_attention(q, k, v, length):
    import tokamax

    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    return tokamax.dot_product_attention(q[:, None], k, v, key_value_seq_lengths=length)[:, 0]


def rivals(config: Config) -> dict[str, Callable]:
    """The peer first, then what else there is on this platform."""
    if config.agents:
        return {"agents/transformer.py": of_agents}
    jax_nn = lambda name: lambda *args: dot_product_attention(name, *args)  # noqa: E731
    found = {"jax.nn (xla)": jax_nn("xla")}
    if jax.default_backend() == "gpu":
        found = {"jax.nn (cuDNN)": jax_nn("cudnn")} | found
        if importlib.util.find_spec("tokamax"):
            found["tokamax"] = tokamax_attention
    return found


def bandwidth(repeats: int) -> float:
    """Bytes a second at which this device sums an array."""
    array = jnp.ones(STREAM, jnp.float32)
    total = jax.jit(jnp.sum)
    seconds = interleave({"sum": lambda: seconds_of(total, array)}, repeats)["sum"]
    return array.nbytes / float(np.median(seconds))


def measure(config: Config, batch: int, slots: int, fill: float, dtype: str, stream: float) -> Row:
    """One case; a rival that cannot take it is left out, and the reason goes to the notes."""
    keys = jax.random.split(jax.random.key(0), 3)
    cache = (batch, config.kv_heads, slots, config.width)
    shapes = ((batch, config.heads, config.width), cache, cache)
    q, k, v = (jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True))
    args = (q, k, v, lengths(batch, slots, fill))
    ours, seconds = compile_timed(lambda *a: decode_attention(*a, implementation=config.implementation or None), *args)
    expected = np.asarray(ours(*args), np.float32)
    peers, notes = {}, {"left_out": {}, "difference": {}}
    for name, function in rivals(config).items():
        try:
            compiled, compile_peer = compile_timed(function, *args)
            notes["difference"][name] = float(np.abs(np.asarray(compiled(*args), np.float32) - expected).max())
            peers[name] = (lambda f=compiled: seconds_of(f, *args)), compile_peer
        except Exception as error:
            notes["left_out"][name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    first = next(iter(peers), None)
    if first:
        notes["peer_error"] = notes["difference"][first] / float(np.abs(expected).max())
    used = 2 * int(args[3].sum()) * config.kv_heads * config.width * q.dtype.itemsize
    row = duel(
        f"{dtype}, {batch} rows, {slots} slots, {fill:.0%} full",
        "steps/s",
        1,
        config.repeats,
        lambda: seconds_of(ours, *args),
        peers[first][0] if first else None,
        compile_ours=seconds,
        compile_peer=peers[first][1] if first else None,
        notes=notes | {"peer": first, "bytes": used, "stream_bytes_per_second": stream},
    )
    others = interleave({name: f for name, (f, _) in peers.items() if name != first}, config.repeats)
    row.notes["others"] = {name: float(np.median(times)) for name, times in others.items()}
    return row


def roofline(row: Row) -> list[str]:
    """Case, milliseconds of ours and of each rival, and the share of the measured bandwidth that each reaches."""
    best = row.notes["bytes"] / row.notes["stream_bytes_per_second"]
    times = {"ours": float(np.median(row.ours))} | row.notes["others"]
    if row.peer:
        times[row.notes["peer"]] = float(np.median(row.peer))
    text = ", ".join(f"{name} {1e3 * s:.3g} ms = {best / s:.0%}" for name, s in times.items())
    return [row.case, f"{row.notes['bytes'] / 2**20:,.0f} MiB", text]


@one_line_end()
def main(argv: list[str] | None = None) -> None:
    config = parse(Config(), __doc__, argv)
    stream = bandwidth(config.repeats)
    cases = [
        (batch, slots, fill, dtype)
        for dtype in config.dtypes
        for batch in config.batches
        for slots in config.slots
        for fill in config.fills
    ]
    size = lambda batch, slots, dtype: 2 * batch * slots * config.kv_heads * config.width * jnp.dtype(dtype).itemsize  # noqa: E731
    rows = [
        measure(config, *case, stream) for case in cases if size(case[0], case[1], case[3]) <= config.gigabytes * 1e9
    ]
    publish("decode", rows, config, {next(iter(rivals(config))): ""}, config.out)
    show(
        f"share of {stream / 1e9:.3g} GB/s, the speed of a sum",
        ("case", "in use", "time = share"),
        [roofline(row) for row in rows],
    )


if __name__ == "__main__":
    main()
