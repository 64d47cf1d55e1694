"""Checkpoints of a run's whole state with orbax: written beside the training, restored onto any number of devices.

A checkpoint carries a fingerprint of its state, so that damage is noticed and the one before is taken. What was being
written when a process died is ignored.
"""

import contextlib
import logging
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from rollax.experiments.harness import devices
from rollax.experiments.harness.command_line import UserError

SHARE = 0.03  # of the time may go into saving


class Checkpoints:
    """The checkpoints of one program in a folder, the last two of them.

    Args:
      every: seconds between checkpoints, at least; more where saving is slow, but for 0: always.
    """

    def __init__(self, path: Path, every: float):
        import orbax.checkpoint as ocp  # a second, and only runs that are kept need it

        # Orbax logs at every step of its way, warns of what we do on purpose, and raises what it logs as an error.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        options = ocp.CheckpointManagerOptions(max_to_keep=2, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(path.absolute(), item_names=("run",), options=options)
        self._args = ocp.args
        self._every, self._pause, self._last = every, None, time.perf_counter()

    def due(self) -> bool:
        """Whether it is time for the next one; all processes agree."""
        pause = self._every and max(self._every, self._pause or 0.0)
        return devices.broadcast(str(time.perf_counter() - self._last >= pause)) == "True"

    def save(self, update: int, state: Any) -> None:
        """Begins to save; the state may be donated at once. The first save is waited for: it tells what one costs."""
        begun = time.perf_counter()
        kept = {"state": state, "fingerprint": jax.jit(fingerprint)(state)}
        with self._readable_errors():
            self._manager.save(update, args=self._args.Composite(run=self._args.StandardSave(kept)))
            if self._pause is None:
                self._manager.wait_until_finished()
                self._pause = (time.perf_counter() - begun) / SHARE
        self._last = time.perf_counter()

    def latest(self) -> int | None:
        """The update of the newest checkpoint."""
        return self._manager.latest_step()

    def restore(self, target: Any) -> tuple[int, Any] | None:
        """The newest checkpoint that is whole, as (update, state); None if there is none at all.

        Args:
          target: the state's shapes and shardings, `jax.ShapeDtypeStruct` leaves: where the arrays are to lie.
        Raises:
          ValueError: there are checkpoints, but none is whole.
        """
        steps, damaged = sorted(self._manager.all_steps(), reverse=True), []
        place = jax.tree.leaves(target)[0].sharding
        if isinstance(place, NamedSharding):
            place = NamedSharding(place.mesh, PartitionSpec())
        expected = {"state": target, "fingerprint": jax.ShapeDtypeStruct((), jnp.uint32, sharding=place)}
        for step in steps:
            problem = ""
            try:
                wanted = self._args.Composite(run=self._args.StandardRestore(expected))
                restored = self._manager.restore(step, args=wanted)["run"]
            except Exception as error:  # whatever a damaged file makes of orbax
                problem = str(error).strip().split("\n")[0] or type(error).__name__
            if devices.any_process(bool(problem)):
                problem = problem or "another process cannot read it"
            elif int(jax.jit(fingerprint)(restored["state"])) == int(restored["fingerprint"]):
                for newer in damaged:  # only now: if none can be read, the reason may be another one than damage
                    self._manager.delete(newer)
                return step, restored["state"]
            else:
                problem = "its content has changed since it was written"
            what = f"the checkpoint of update {step} is damaged or of another form ({problem})"
            print(f"{what}: trying the one before", file=sys.stderr)
            damaged.append(step)
        if steps:
            where = self._manager.directory
            raise UserError(f"resume: expected a checkpoint of this study's state in {where}, none can be read")
        return None

    def wait(self) -> None:
        """Until what is being saved is complete."""
        with self._readable_errors():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and ends orbax's threads."""
        self.wait()
        self._manager.close()

    @contextlib.contextmanager
    def _readable_errors(self):
        """A full disk comes out of orbax as one of many errors."""
        try:
            yield
        except Exception as error:
            why = str(error).strip().split("\n")[0]
            raise OSError(f"checkpoints: cannot write {self._manager.directory}: {why}") from error


def fingerprint(state: Any) -> jax.Array:
    """A uint32 of all bits of a tree and their places; sums modulo 2^32, so it is the same on any sharding."""

    def of_leaf(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        if x.dtype == bool:
            x = x.astype(jnp.uint8)
        unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[x.dtype.itemsize]
        bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
        place = jnp.uint32(1)
        for axis in range(bits.ndim):
            place = place * jnp.uint32(31) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32) if bits.size else jnp.uint32(0)

    total = jnp.uint32(0)
    for leaf in jax.tree.leaves(state):
        total = total * jnp.uint32(1000003) + of_leaf(leaf)
    return total
