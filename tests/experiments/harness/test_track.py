"""What the sinks and the Parquet file hold, read back with the libraries' own readers. No network, no home folder."""

import json
import os
import shutil
import sqlite3
import struct
import subprocess
import sys
import warnings

import numpy as np
import pytest

from rollax.experiments.harness.columns import write_parquet
from rollax.experiments.harness.loop import Results
from rollax.experiments.harness.track import SINKS, STATE, open_sinks, unique_id

VALUES = {1: {"a/reward": 0.25, "a/entropy": float("nan")}, 2: {"a/reward": 0.5}}
RUN = dict(study="bandpo", name="first run", config={"lr": 0.1, "layers": (1, 2), "out": os})

# Tracks, is interrupted after step 2, and is resumed from a checkpoint at step 1, with another program afterwards.
TWICE = """
import sys
from pathlib import Path
from rollax.experiments.harness.track import open_sinks
run = dict(study="bandpo", name="first run", config={"lr": 0.1, "layers": (1, 2), "most": float("inf")})
sink = open_sinks(sys.argv[1:2], Path(sys.argv[2]), **run)
sink.log(1, {"a/reward": 0.25, "a/entropy": float("nan")})
sink.log(2, {"a/reward": 0.5})
sink.close()
sink = open_sinks(sys.argv[1:2], Path(sys.argv[2]), **run, resume=True)
sink.log(2, {"a/reward": 0.5})
sink.log(3, {"a/reward": 0.75})
sink.log(1, {"b/reward": 0.125})
sink.close()
"""
TRACKED_TWICE = {"a/reward": {1: 0.25, 2: 0.5, 3: 0.75}, "b/reward": {1: 0.125}}


def track_twice(sink, folder, **environment):
    """Runs `TWICE` in a process of its own (trackio and W&B read their environment once); returns what it printed."""
    pytest.importorskip(sink)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "TRACKIO_", "HF_"))}
    home = folder / "home"
    home.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", TWICE, sink, str(folder / "run")],
        env=kept | {"HOME": str(home), "XDG_CACHE_HOME": str(home), "XDG_CONFIG_HOME": str(home)} | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr  # no sink failed or complained
    return done.stdout


def scalars(folder):
    """`{tag: {step: value}}` of a TensorBoard folder; a step that is there twice is an error."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    points = [(tag, event) for tag in events.Tags()["scalars"] for event in events.Scalars(tag)]
    assert len({(tag, event.step) for tag, event in points}) == len(points)
    return {tag: {event.step: event.value for other, event in points if other == tag} for tag, _ in points}


def wandb_records(path):
    """The records of a .wandb file: LevelDB's log format after a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        room = 32768 - at % 32768
        if room < 7:  # a block's end too short for a header
            at += room
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or last part
            yield Record.FromString(parts)
            parts = b""


def wandb_history(path):
    """`{name: {update: value}}` of a .wandb file, and the ids and configurations of its runs."""
    history, runs = {}, []
    for record in wandb_records(path):
        if record.HasField("run"):
            config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
            runs.append((record.run.run_id, record.run.project, record.run.display_name, config))
        items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
        for name in items.keys() - {"update"}:
            if not name.startswith("_"):
                assert items["update"] not in history.setdefault(name, {})
                history[name][items["update"]] = items[name]
    return history, runs


def test_tensorboard_keeps_each_step_once(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    sink = open_sinks(["tensorboard"], tmp_path, **RUN)
    for step, values in VALUES.items():
        sink.log(step, values)
    assert scalars(tmp_path / "tensorboard")["a/reward"] == {1: 0.25, 2: 0.5}  # before it is closed
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sink.close()
        sink.close()  # a second time does nothing
    again = open_sinks(["tensorboard"], tmp_path, **RUN, resume=True)
    again.log(2, {"a/reward": 0.5, "a/kl": 1.5})
    again.log(np.int64(3), {"a/reward": np.float32(0.75)})
    again.log(1, {"b/reward": 0.125})
    again.close()
    read = scalars(tmp_path / "tensorboard")
    assert np.isnan(read.pop("a/entropy")[1])
    assert read == TRACKED_TWICE | {"a/kl": {2: 1.5}}
    assert json.loads((tmp_path / STATE).read_text())["logged"]["tensorboard"]["a/reward"] == 3
    assert capsys.readouterr().out.count("tensorboard --logdir") == 2


def test_wandb_offline_goes_on_in_the_same_run(tmp_path):
    printed = track_twice("wandb", tmp_path)
    assert printed.count("offline (no API key)") == 2
    assert len(printed.splitlines()) == 2
    files = sorted((tmp_path / "run/wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    (first, (run,)), (second, (resumed,)) = sorted(map(wandb_history, files), key=lambda read: "b/reward" in read[0])
    assert np.isnan(float(first.pop("a/entropy")[1]))
    assert first == {"a/reward": {1: 0.25, 2: 0.5}}
    assert second == {"a/reward": {3: 0.75}, "b/reward": {1: 0.125}}
    assert run[0] == resumed[0] == json.loads((tmp_path / "run" / STATE).read_text())["id"]
    assert run[1:3] == ("bandpo", "first run")
    assert {"lr": 0.1, "layers": [1, 2]}.items() <= run[3].items()


def test_wandb_mode_is_the_users(tmp_path):
    assert track_twice("wandb", tmp_path, WANDB_MODE="disabled") == "wandb: disabled\n" * 2
    assert not list((tmp_path / "run").glob("**/*.wandb"))


def test_trackio_keeps_each_step_once(tmp_path):
    printed = track_twice("trackio", tmp_path)
    folder = tmp_path / "run/trackio"
    assert printed == f"trackio: TRACKIO_DIR={folder} trackio show --project bandpo\n" * 2
    with sqlite3.connect(folder / "bandpo.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics order by id").fetchall()
        configs = [json.loads(config) for (config,) in database.execute("select config from configs")]
    points = [(name, step, value) for _, step, metrics in rows for name, value in json.loads(metrics).items()]
    assert points.pop(1) == ("a/entropy", 1, "NaN")
    assert points == [(name, step, value) for name, by_step in TRACKED_TWICE.items() for step, value in by_step.items()]
    assert {run for run, *_ in rows} == {"first run"}
    assert {"lr": 0.1, "layers": [1, 2]}.items() <= configs[0].items()


def test_trackio_writes_where_the_user_says(tmp_path):
    track_twice("trackio", tmp_path, TRACKIO_DIR=str(tmp_path / "mine"))
    assert (tmp_path / "mine/bandpo.db").exists()
    assert not (tmp_path / "run/trackio").exists()


def test_a_failing_sink_warns_once_and_the_rest_goes_on(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    seen = []

    def memory(run):
        from rollax.experiments.harness.track import Sink

        return Sink(lambda step, values: seen.append((step, values)), lambda: seen.append("closed"))

    monkeypatch.setitem(SINKS, "json", memory)  # any name that can be imported
    sink = open_sinks(["tensorboard", "json"], tmp_path, **RUN)
    sink.log(1, {"a": 1.0})
    shutil.rmtree(tmp_path / "tensorboard")  # the disk goes away under it
    with pytest.warns(RuntimeWarning, match="tensorboard failed, going on without it") as caught:
        sink.log(2, {"a": 2.0})
        sink.log(3, {"a": 3.0})
        sink.close()
    assert len([w for w in caught if w.category is RuntimeWarning]) == 1
    assert seen == [(1, {"a": 1.0}), (2, {"a": 2.0}), (3, {"a": 3.0}), "closed"]
    logged = json.loads((tmp_path / STATE).read_text())["logged"]
    assert logged == {"tensorboard": {"a": 1}, "json": {"a": 3}}


def test_a_run_that_stops_before_its_first_step_keeps_its_id(tmp_path):
    pytest.importorskip("tensorboard")
    open_sinks(["tensorboard"], tmp_path, **RUN).close()
    first = json.loads((tmp_path / STATE).read_text())["id"]
    open_sinks(["tensorboard"], tmp_path, **RUN, resume=True).close()
    assert json.loads((tmp_path / STATE).read_text())["id"] == first
    open_sinks(["tensorboard"], tmp_path, **RUN).close()  # a new run
    assert json.loads((tmp_path / STATE).read_text())["id"] != first


def test_a_sink_that_cannot_start_is_left_out(tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    with pytest.warns(RuntimeWarning, match="tensorboard failed"):
        sink = open_sinks(["tensorboard"], tmp_path, **RUN)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sink.log(1, {"a": 1.0})
        sink.close()


def test_bad_names_create_nothing(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"track.*tensorboard, wandb, trackio.*'mlflow'"):
        open_sinks(["mlflow"], tmp_path / "run", **RUN)
    monkeypatch.setitem(SINKS, "no_such_library", SINKS["tensorboard"])
    with pytest.raises(ImportError, match=r"no_such_library is not installed.*\.\[track\]"):
        open_sinks(["tensorboard", "no_such_library"], tmp_path / "run", **RUN)
    nothing = open_sinks([], tmp_path / "run", **RUN)
    nothing.log(1, {"a": 1.0})
    nothing.close()
    assert not (tmp_path / "run").exists()


def test_ids_are_new_and_legal():
    ids = {unique_id("band/po", "läuft: 1" * 50) for _ in range(10)}
    assert len(ids) == 10
    assert all(len(i) < 128 and i.isascii() and not set(i) & set("/\\#?%: ") for i in ids)


SEEDS, UPDATES = 3, 5


def some_results(seed, rows, extra):
    """Results with a scalar, a count, a vector, a NaN, and evaluations after 0, 2 and 5 updates."""
    rng = np.random.default_rng(seed)
    train = {
        row: {
            "reward": rng.normal(size=(SEEDS, UPDATES)).astype(np.float32),
            "tokens": rng.integers(0, 99, (SEEDS, UPDATES)),
            extra: rng.normal(size=(SEEDS, UPDATES, 2)),
        }
        for row in rows
    }
    train[rows[0]]["reward"][1, 2] = np.nan
    held_out = {row: {"reward": rng.normal(size=(SEEDS, 3))} for row in rows}
    return Results(train, held_out, np.array([0, 2, UPDATES]), {})


def test_parquet_holds_every_number(tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    results = {"table": some_results(0, ["clip", "band"], "by_kind"), "transformer": some_results(1, ["band"], "norms")}
    first_seed = {"table": 0, "transformer": 7}
    write_parquet(tmp_path / "metrics.parquet", results, first_seed)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.parquet"]
    table = pq.read_table(tmp_path / "metrics.parquet")
    scalars = ["reward", "tokens", "held_out/reward"]
    assert table.column_names == ["label", "row", "seed", "update", "reward", "tokens", "by_kind", "norms", scalars[-1]]
    assert table.num_rows == 3 * SEEDS * (UPDATES + 1)
    assert str(table.schema.field("row").type).startswith("dictionary")
    lines = {tuple(line[key] for key in ("label", "row", "seed", "update")): line for line in table.to_pylist()}
    assert len(lines) == table.num_rows
    for (label, row, seed, update), line in lines.items():
        result, index = results[label], seed - first_seed[label]
        at = list(result.evaluated_at).index(update) if update in result.evaluated_at else None
        extra, other = ("by_kind", "norms") if label == "table" else ("norms", "by_kind")
        assert line[other] is None
        for name in ("reward", "tokens", extra):
            if update == 0:
                assert line[name] is None
            else:
                np.testing.assert_array_equal(line[name], result.train[row][name][index, update - 1])
        expected = None if at is None else result.held_out[row]["reward"][index, at]
        assert line["held_out/reward"] == expected
    metadata = pq.read_metadata(tmp_path / "metrics.parquet")
    assert metadata.row_group(0).column(4).compression == "ZSTD"


def test_parquet_opens_in_pandas(tmp_path):
    pytest.importorskip("pyarrow")
    pandas = pytest.importorskip("pandas")
    results = {"table": some_results(0, ["clip", "band"], "by_kind")}
    write_parquet(tmp_path / "metrics.parquet", results, {"table": 0})
    frame = pandas.read_parquet(tmp_path / "metrics.parquet")
    assert list(frame["row"].cat.categories) == ["clip", "band"]
    band = frame[(frame["row"] == "band") & (frame["update"] > 0)]
    wide = band.pivot(index="seed", columns="update", values="reward").to_numpy()
    np.testing.assert_array_equal(wide, results["table"].train["band"]["reward"])
    vectors = np.stack(band["by_kind"].to_list()).reshape(SEEDS, UPDATES, 2)
    np.testing.assert_array_equal(vectors, results["table"].train["band"]["by_kind"])
    held_out = frame[frame["row"] == "clip"].dropna(subset="held_out/reward")
    assert list(held_out["update"].unique()) == [0, 2, UPDATES]
    np.testing.assert_array_equal(
        held_out["held_out/reward"].to_numpy().reshape(SEEDS, 3), results["table"].held_out["clip"]["reward"]
    )


def test_parquet_says_what_does_not_fit(tmp_path):
    pytest.importorskip("pyarrow")
    path, result = tmp_path / "metrics.parquet", some_results(0, ["clip"], "by_kind")
    with pytest.raises(ValueError, match=r"results.*none"):
        write_parquet(path, {}, {})
    with pytest.raises(ValueError, match=r"first_seed.*table"):
        write_parquet(path, {"table": result}, {})
    with pytest.raises(ValueError, match=r"held_out\['clip'\]\['reward'\].*\(3, 2\).*\(3, 3\)"):
        write_parquet(path, {"table": result._replace(evaluated_at=np.array([0, 5]))}, {"table": 0})
    with pytest.raises(ValueError, match=r"train\['clip'\]\['seed'\].*key columns"):
        clash = {"clip": result.train["clip"] | {"seed": result.train["clip"]["reward"]}}
        write_parquet(path, {"table": result._replace(train=clash)}, {"table": 0})
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):  # the target cannot be replaced: no half-written file stays
        write_parquet(tmp_path / "folder", {"table": result}, {"table": 0})
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
