"""All numbers of a study as one Parquet file, a line per seed and update: what pandas, polars and DuckDB open."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

    from rollax.experiments.harness.loop import Results

KEYS = ("label", "row", "seed", "update")


def write_parquet(path: Path, results: "dict[str, Results]", first_seed: dict[str, int]) -> None:
    """Writes one long table; the file appears whole or not at all.

    Columns: label and row (categories), seed, update (how many were done, so 0 is before any), a column for each metric
    of training (a list column where the metric is a vector), and `held_out/<metric>`. A metric is null where it was not
    measured (training at update 0, held-out between evaluations, a metric that a row does not have), and NaN where
    that was the number.

    Args:
      path: of the file, in a folder that exists.
      results: by label, as `loop.Results`.
      first_seed: by label, the seed of the first entry of the seed axis.
    Raises:
      ValueError: no results, a label without a first seed, shapes that do not fit, a metric named like a key column.
      ImportError: pyarrow is not installed.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ImportError("metrics.parquet: pyarrow is not installed: pip install pyarrow") from None

    if not any(result.train for result in results.values()):
        raise ValueError("results: expected at least one label with a row, got none")
    if missing := [label for label in results if label not in first_seed]:
        raise ValueError(f"first_seed: expected a seed for each label, got none for {', '.join(missing)}")
    tables = [
        row_table(label, row, result, first_seed[label]) for label, result in results.items() for row in result.train
    ]
    table = pa.concat_tables(tables, promote_options="permissive").unify_dictionaries()
    names = sorted(table.column_names[len(KEYS) :], key=lambda name: name.startswith("held_out/"))  # stable
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        pq.write_table(table.select([*KEYS, *names]), temporary, compression="zstd")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def row_table(label: str, row: str, result: "Results", first_seed: int) -> "pa.Table":
    """The lines of one row of a program: seeds x updates, seed by seed."""
    import pyarrow as pa

    train, held_out, evaluated_at = result.train[row], result.held_out.get(row, {}), np.asarray(result.evaluated_at)
    seeds, updates = next(iter(train.values())).shape[:2]
    for name, values in train.items():
        expect(f"train[{row!r}][{name!r}]", values, (seeds, updates), name)
    for name, values in held_out.items():
        expect(f"held_out[{row!r}][{name!r}]", values, (seeds, evaluated_at.size), f"held_out/{name}")

    trained = np.arange(1, updates + 1)
    done = np.union1d(trained, evaluated_at)
    keys = {
        "label": constant(label, seeds * done.size),
        "row": constant(row, seeds * done.size),
        "seed": pa.array(np.repeat(np.arange(first_seed, first_seed + seeds), done.size), pa.int64()),
        "update": pa.array(np.tile(done, seeds), pa.int32()),
    }
    at_train, at_held_out = lines(trained, done, seeds), lines(evaluated_at, done, seeds)
    columns = {name: column(values).take(at_train) for name, values in train.items()}
    columns |= {f"held_out/{name}": column(values).take(at_held_out) for name, values in held_out.items()}
    return pa.table(keys | columns)


def expect(argument: str, values: np.ndarray, shape: tuple[int, int], name: str) -> None:
    if values.shape[:2] != shape:
        raise ValueError(f"{argument}: expected the first two axes (seeds, points) to be {shape}, got {values.shape}")
    if name in KEYS:
        raise ValueError(f"{argument}: expected another name than the key columns {', '.join(KEYS)}")


def constant(text: str, size: int) -> "pa.DictionaryArray":
    import pyarrow as pa

    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(size, np.int32)), pa.array([text]))


def lines(measured_at: np.ndarray, done: np.ndarray, seeds: int) -> "pa.Array":
    """For each line (seed, done) the place of its value in an array `[seeds, measured_at]`; null where it has none."""
    import pyarrow as pa

    place = np.searchsorted(measured_at, done)
    absent = ~np.isin(done, measured_at)
    place = place + measured_at.size * np.arange(seeds)[:, None]
    return pa.array(place.ravel(), pa.int64(), mask=np.tile(absent, seeds))


def column(values: np.ndarray) -> "pa.Array":
    """`[seeds, points, ...]` as `[seeds * points]` floats, or lists of floats for what remains of the shape."""
    import pyarrow as pa

    values = np.asarray(values)
    if values.dtype not in (np.float32, np.float64):  # counts, flags, bfloat16
        values = values.astype(np.float64)
    flat = pa.array(values.ravel())
    for axis in reversed(range(2, values.ndim)):
        starts = np.arange(np.prod(values.shape[:axis]) + 1) * values.shape[axis]
        flat = pa.LargeListArray.from_arrays(pa.array(starts, pa.int64()), flat)
    return flat
