"""Devices: the mesh, how runs spread over it, arrays that span several processes, and the switches of a process."""

import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src.xla_bridge import backends_are_initialized  # nothing public tells
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from rollax.agents import make_mesh
from rollax.experiments.harness.command_line import Options
from rollax.experiments.harness.processes import join

AXES = ("data", "fsdp", "tensor")


def begin(options: Options) -> None:
    """Sets a process up, before JAX is first used: compilation cache, determinism, the other processes.

    Raises:
      ValueError: JAX runs already, too late for `deterministic`; `debug_nans` in several processes; see also `join`.
    """
    use_compilation_cache()
    flags, flag = os.environ.get("XLA_FLAGS", ""), "--xla_gpu_deterministic_ops=true"
    if options.deterministic and flag not in flags:
        if backends_are_initialized():
            raise ValueError(f"deterministic: expected before JAX has started, which it has: set XLA_FLAGS={flag}")
        os.environ["XLA_FLAGS"] = f"{flags} {flag}".strip()
    join()
    if options.debug_nans and jax.process_count() > 1:
        raise ValueError("debug_nans: expected a run of one process")


def use_compilation_cache() -> None:
    """Keeps compiled programs in `.cache/jax` of the checkout (else of the home), or in JAX_COMPILATION_CACHE_DIR."""
    root = Path(__file__).parents[2]
    root = root if (root / "pyproject.toml").is_file() else Path.home()
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(root / ".cache" / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def parse_mesh(text: str) -> Mesh:
    """ "data=2,fsdp=4" as a mesh; every device along fsdp when empty. ValueError for another form or axis."""
    try:
        shape = {name: int(size) for name, size in (part.split("=") for part in text.split(",") if part)}
    except ValueError:
        raise ValueError(f'mesh: expected a form like "data=2,fsdp=4", got {text!r}') from None
    unknown = set(shape) - set(AXES)
    if unknown or any(size < 1 for size in shape.values()):
        raise ValueError(f"mesh: expected sizes of {', '.join(AXES)}, got {text!r}")
    try:
        mesh = make_mesh(shape or {"fsdp": -1})
    except ValueError as error:
        raise ValueError(f"mesh: {error}") from None
    if jax.process_count() > 1 and mesh.size < jax.device_count():
        raise ValueError(f"mesh: expected all {jax.device_count()} devices of the processes, got {text!r}")
    return mesh


def runs_mesh(text: str, rows: int, seeds: int) -> tuple[Mesh, int]:
    """Devices for many small runs `[rows, seeds]`, each of which fits one device.

    Returns:
      A mesh of one axis "runs" and the axis of the runs that it splits, 0 (rows) or 1 (seeds). Without `text` it has
      as many of the devices as divide the seeds or else the rows.
    Raises:
      ValueError: axes besides data, or a number of devices that divides neither rows nor seeds.
    """
    if text:
        mesh = parse_mesh(text)
        if mesh.shape.keys() - {"data"}:
            raise ValueError(f"mesh: many small runs spread over data alone, got {text!r}")
        wanted = list(mesh.devices.flat)
    else:
        wanted = jax.devices()
    counts = [len(wanted)] if text or jax.process_count() > 1 else range(len(wanted), 0, -1)
    for count in counts:
        for axis, size in ((1, seeds), (0, rows)):
            if size % count == 0:
                return Mesh(np.asarray(wanted[:count]), ("runs",)), axis
    raise ValueError(f"mesh: expected a number of devices that divides {seeds} seeds or {rows} rows, got {len(wanted)}")


def fetch(tree: Any) -> Any:
    """Arrays as numpy, also those that span several processes."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def broadcast(text: str) -> str:
    """What the first process says, in all of them; at most 4096 bytes."""
    if jax.process_count() == 1:
        return text
    line, said = np.zeros(4096, np.uint8), np.frombuffer(text.encode()[:4096], np.uint8)
    line[: said.size] = said
    return bytes(multihost_utils.broadcast_one_to_all(line)).rstrip(b"\0").decode(errors="ignore")


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process; all of them agree."""
    return flag if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(flag)).any())
