"""What every benchmark here shares: interleaved repeats, ratios with quartiles, a table, a JSON file.

A contestant is a function without arguments that does its work once and returns the seconds it took, so that a peer in
another process (`peer.py`) is timed by that process. Contestants take turns within each repeat, and a ratio is formed
within each repeat: what else the machine does then falls on both.
"""

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rollax.experiments.harness.report import show
from rollax.experiments.harness.run_folder import plain, versions
from rollax.kernels.backends import KERNEL_OF

HEAD = ("case", "ours", "peer", "unit", "ratio", "quartiles", "ours compiles", "peer compiles")


class Row(NamedTuple):
    """One case of a benchmark. Times are seconds; ratios say how many times faster ours is.

    Attributes:
      case: what was measured.
      unit: of `ours` and `peer` in the table, such as "steps/s".
      work: units done in one repeat.
      ours, peer: seconds of each repeat; `peer` is empty where the peer was left out.
      compile_ours, compile_peer: seconds before the first repeat could run, None where nothing is compiled.
      notes: further numbers of the case, as they go to the JSON file.
    """

    case: str
    unit: str
    work: float
    ours: list[float]
    peer: list[float]
    compile_ours: float | None = None
    compile_peer: float | None = None
    notes: dict[str, Any] | None = None

    def quartiles(self) -> tuple[float, float, float]:
        """(median, lower, upper quartile) of peer seconds over our seconds, repeat by repeat; NaN without a peer."""
        if not self.peer:
            return (float("nan"),) * 3
        ratios = np.asarray(self.peer) / np.asarray(self.ours)
        return tuple(float(x) for x in np.quantile(ratios, (0.5, 0.25, 0.75)))

    def as_dict(self) -> dict[str, Any]:
        median, lower, upper = self.quartiles()
        return self._asdict() | {
            "ours_per_second": self.work / float(np.median(self.ours)),
            "peer_per_second": self.work / float(np.median(self.peer)) if self.peer else None,
            "ratio": median,
            "ratio_quartiles": [lower, upper],
        }


def check_implementation(name: str) -> None:
    """Raises ValueError for no implementation of a kernel, or another platform's; "" is the best here."""
    platform = jax.default_backend()
    kernels = ("pallas", KERNEL_OF[platform]) if platform in KERNEL_OF else ()
    names = ("reference", "xla", "interpret", *kernels)
    if name and name not in names:
        raise ValueError(f"implementation: expected one of {', '.join(names)} on this {platform}, got {name!r}")


def compile_timed(function: Callable, *args, repeats: int = 1) -> tuple[Callable, float]:
    """(the compiled program of `function` for these arguments, seconds of tracing and compiling, the least of all)."""
    seconds = []
    for _ in range(repeats):
        jax.clear_caches()
        begun = time.perf_counter()
        compiled = jax.jit(function).lower(*args).compile()
        seconds.append(time.perf_counter() - begun)
    return compiled, min(seconds)


def seconds_of(function: Callable, *args) -> float:
    """Wall seconds of one call, until its results are there."""
    begun = time.perf_counter()
    jax.block_until_ready(function(*args))
    return time.perf_counter() - begun


def interleave(contestants: dict[str, Callable[[], float]], repeats: int, *, warm_up=True) -> dict[str, list[float]]:
    """Seconds of each repeat of each contestant, after one turn that warms up. The order turns with every repeat."""
    if repeats < 1:
        raise ValueError(f"repeats: expected at least 1, got {repeats}")
    for measure in contestants.values() if warm_up else ():
        measure()
    seconds = {name: [] for name in contestants}
    order = list(contestants)
    for _ in range(repeats):
        for name in order:
            seconds[name].append(float(contestants[name]()))
        order.reverse()
    return seconds


def duel(
    case: str,
    unit: str,
    work: float,
    repeats: int,
    ours: Callable[[], float],
    peer: Callable[[], float] | None,
    *,
    warm_up: bool = True,
    **more,
) -> Row:
    """A row from interleaved repeats of both sides; `peer` None leaves it out. `more`: further fields of `Row`."""
    contestants = {"ours": ours} | ({} if peer is None else {"peer": peer})
    seconds = interleave(contestants, repeats, warm_up=warm_up)
    return Row(case, unit, work, seconds["ours"], seconds.get("peer", []), **more)


def peak_operations(dtype: str, repeats: int, shape: tuple[int, int] | None = None) -> float:
    """Floating-point operations a second of large matrix products: the roof of what is bound by arithmetic.

    Args:
      dtype: of the matrices; sums are in float32.
      shape: (products of one call, rows of their square matrices). None for what takes this device milliseconds, beside
        which the dispatch of a call is nothing.
    """
    count, size = shape or ((1, 2048) if jax.default_backend() == "cpu" else (8, 8192))
    x = (size**-0.5 * jax.random.normal(jax.random.key(0), (size, size))).astype(dtype)  # powers of it stay of size 1
    product = lambda x, y: jnp.matmul(x, y, preferred_element_type=jnp.float32).astype(dtype)  # noqa: E731
    multiply = jax.jit(lambda x: jax.lax.fori_loop(0, count, lambda _, y: product(x, y), x))
    return 2 * count * size**3 / min(interleave({"products": lambda: seconds_of(multiply, x)}, repeats)["products"])


def lines_of(rows: Sequence[Row]) -> list[list[str]]:
    """Table lines under `HEAD`."""
    rate = lambda work, seconds: f"{work / float(np.median(seconds)):,.4g}" if seconds else "-"  # noqa: E731
    compiled = lambda seconds: "-" if seconds is None else f"{seconds:.2f} s"  # noqa: E731
    lines = []
    for row in rows:
        median, lower, upper = row.quartiles()
        lines.append(
            [
                row.case,
                rate(row.work, row.ours),
                rate(row.work, row.peer),
                row.unit,
                f"{median:.2f}x" if row.peer else "-",
                f"{lower:.2f} to {upper:.2f}" if row.peer else "-",
                compiled(row.compile_ours),
                compiled(row.compile_peer),
            ]
        )
    return lines


def show_notes(rows: Sequence[Row], peak: float) -> None:
    """Prints the roof, operations a second, and the notes of each row, which are numbers."""
    print(f"roofline: {peak / 1e9:,.0f} GFLOP/s")
    for row in rows:
        print(f"{row.case}: " + ", ".join(f"{name.replace('_', ' ')} {x:.3g}" for name, x in row.notes.items()))


def publish(name: str, rows: Sequence[Row], config: Any, peer_versions: dict[str, str], out: str = "") -> Path:
    """Prints the table and writes everything to `out` (default `runs/benchmarks/NAME.json`), replacing what was there.

    Args:
      peer_versions: libraries of the peer's environment, its own name first; empty when it was left out.
    """
    path = Path(out or Path("runs") / "benchmarks" / f"{name}.json")
    rival = " ".join(next(iter(peer_versions.items()))) if peer_versions else "no peer"
    show(f"{name}: ours against {rival}, {jax.devices()[0].device_kind}, jax {jax.__version__}", HEAD, lines_of(rows))
    result = {
        "benchmark": name,
        "config": config,
        "versions": versions() | {"cores": os.cpu_count()},
        "peer_versions": peer_versions,
        "rows": [row.as_dict() for row in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(plain(result), indent=1) + "\n")
    os.replace(temporary, path)
    print(f"results: {path}")
    return path
