"""From one run to all rows and seeds, chunk by chunk; a run that was stopped or killed goes on bitwise the same."""

import functools
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rollax.experiments.harness import loop
from rollax.experiments.harness.command_line import UserError
from rollax.experiments.harness.loop import (
    Results,
    early,
    final,
    gap,
    late,
    load_results,
    merge,
    run,
    single,
    vectorize,
)
from rollax.experiments.harness.run_folder import RunFolder

HERE = Path(__file__).parent
spec = importlib.util.spec_from_file_location("toy_study", HERE / "toy_study.py")
toy = importlib.util.module_from_spec(spec)
sys.modules["toy_study"] = toy
spec.loader.exec_module(toy)

SEEDS = range(4)


def test_measures_of_results():
    train = {"x": {"reward": np.arange(24.0).reshape(2, 12)}, "y": {"reward": np.zeros((2, 12))}}
    held_out = {row: {"reward": np.array([[0.0, 1.0], [0.0, 2.0]])} for row in train}
    results = Results(train, held_out, np.array([0, 12]), {"compile": 1.0})
    np.testing.assert_array_equal(early(results, "x"), [0.5, 12.5])
    np.testing.assert_array_equal(late(results, "x"), [10.5, 22.5])
    np.testing.assert_array_equal(final(results, "x"), [1.0, 2.0])
    np.testing.assert_array_equal(gap("x", "y")(results), [10.5, 22.5])
    parts = [Results({r: train[r]}, {r: held_out[r]}, results.evaluated_at, {"compile": 1.0}) for r in train]
    both = merge(parts)
    assert list(both.train) == ["x", "y"]
    assert both.seconds == {"compile": 2.0}


def test_rows_of_different_programs_stand_beside_one_another():
    """Rows with the same functions share a `vmap`; every row is what it is alone."""
    build = toy.build(toy.Config())
    other = build.train._replace(evaluate=lambda state, numbers: {"reward": jnp.sum(state.place)})
    trains = {"a": build.train, "b": other, "c": build.train}
    numbers = {"a": build.rows["plain"], "b": build.rows["lazy"], "c": build.rows["lazy"]}
    program = vectorize(trains, numbers, SEEDS, "data=1")
    assert program.rows == ("a", "c", "b")
    state, _ = jax.jit(program.advance)(program.init(), program.numbers)
    told = jax.jit(program.evaluate)(state, program.numbers)["reward"]
    for i, row in enumerate(program.rows):
        alone = vectorize(trains[row], {row: numbers[row]}, SEEDS, "data=1")
        end, _ = jax.jit(alone.advance)(alone.init(), alone.numbers)
        np.testing.assert_allclose(told[i], alone.evaluate(end, alone.numbers)["reward"][0], rtol=1e-6)
        np.testing.assert_allclose(program.first(state, row).place, alone.first(end, row).place, rtol=1e-6)


@functools.cache
def default_program():
    """(program, executables) of the toy's default configuration, compiled once for all tests."""
    build = toy.build(toy.Config())
    program = vectorize(build.train, build.rows, SEEDS)
    return program, loop.compiled(program, toy.Config())


def train(tmp_path, name, *, stop_at=None, program=None, **changes):
    """Trains the toy in process; an error at the update `stop_at` stands for a crash."""
    config = toy.Config(runs=str(tmp_path), name=name, resume=True, **{"save_every": 0.0, **changes})
    folder = RunFolder("toy_study", config, {"toy": config})
    program, executables = default_program() if program is None else (program, None)

    def watch(update, train, held_out):
        if stop_at is not None and update >= stop_at:
            raise RuntimeError("crash")
        return False

    try:
        return run(program, "toy", config.updates, folder, config, executables=executables, watch=watch), folder
    finally:
        folder.close()


def same(one, other):
    for side in ("train", "held_out"):
        for row, metrics in getattr(one, side).items():
            for name, values in metrics.items():
                np.testing.assert_array_equal(values, getattr(other, side)[row][name])


def test_rows_and_seeds_equal_single_runs(tmp_path):
    (results, state), _ = train(tmp_path, "together")
    assert results.train["plain"]["place"].shape == (4, 12, 3)
    np.testing.assert_array_equal(results.evaluated_at, np.arange(0, 13, 2))
    build = toy.build(toy.Config())
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        jax.eval_shape(build.train.init, jax.random.key(0)),
    )
    for index, (row, numbers) in enumerate(build.rows.items()):
        program = single(build.train, row, numbers, 2, shapes)
        (one, last), _ = train(tmp_path, f"alone-{row}", program=program)
        np.testing.assert_allclose(one.train[row]["reward"][0], results.train[row]["reward"][2], rtol=1e-5)
        np.testing.assert_allclose(last.place, state.place[index, 2], rtol=1e-5)


def rows_of_two_widths(**renamed):
    """(trains, rows): the toy in 3 and in 5 dimensions, without its metric of that shape; metrics may be renamed."""
    trains, rows = {}, {}
    for row, width in (("narrow", 3), ("wide", 5)):
        build, name = toy.build(toy.Config(width=width)), renamed.get(row, "reward")

        def advance(state, numbers, build=build, name=name):
            state, metrics = build.train.advance(state, numbers)
            return state, {name: metrics["reward"]}

        trains[row], rows[row] = build.train._replace(advance=advance), build.rows["plain"]
    return trains, rows


def test_rows_of_different_programs(tmp_path):
    """Each row is what it is alone, also when the run crashed and was resumed."""
    trains, rows = rows_of_two_widths()
    program = vectorize(trains, rows, SEEDS)
    with pytest.raises(RuntimeError, match="crash"):
        train(tmp_path, "both", program=program, stop_at=6)
    (both, state), _ = train(tmp_path, "both", program=program)
    for row, width in (("narrow", 3), ("wide", 5)):
        (alone, last), _ = train(tmp_path, row, program=vectorize(trains[row], {row: rows[row]}, SEEDS))
        same(alone, Results({row: both.train[row]}, {row: both.held_out[row]}, both.evaluated_at, {}))
        assert program.first(state, row).place.shape == (width,)
        np.testing.assert_array_equal(program.first(state, row).place, last.place[0, 0])


def test_rows_of_different_programs_have_one_set_of_metrics(tmp_path):
    trains, rows = rows_of_two_widths(wide="loss")
    with pytest.raises(ValueError, match=r"metrics: expected the same names in every row, got \['loss', 'reward'\]"):
        train(tmp_path, "both", program=vectorize(trains, rows, SEEDS))


def test_a_crash_loses_nothing_and_changes_nothing(tmp_path):
    (whole, state), _ = train(tmp_path, "whole")
    for stop in (4, 6, 10):
        with pytest.raises(RuntimeError, match="crash"):
            train(tmp_path, "cut", stop_at=stop)
    (resumed, last), folder = train(tmp_path, "cut")
    same(whole, resumed)
    jax.tree.map(np.testing.assert_array_equal, *(jax.tree.leaves(x._replace(key=0)) for x in (state, last)))
    np.testing.assert_array_equal(jax.random.key_data(state.key), jax.random.key_data(last.key))
    lines = [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["update"], line["row"]) for line in lines] == [
        (update, row) for update in range(2, 13, 2) for row in ("plain", "lazy")
    ]
    (again, _), _ = train(tmp_path, "cut")  # a finished run is read, not trained again
    same(whole, again)


def test_few_checkpoints_still_resume_the_same(tmp_path):
    """Nothing saved before the crash: it begins anew. Then one at the end alone."""
    with pytest.raises(RuntimeError, match="crash"):
        train(tmp_path, "cut", stop_at=6, save_every=float("inf"))
    (resumed, _), folder = train(tmp_path, "cut", save_every=float("inf"))
    (whole, _), _ = train(tmp_path, "whole")
    same(whole, resumed)
    assert [path.name for path in (folder.path / "checkpoints" / "toy").iterdir() if path.name.isdigit()] == ["12"]


@pytest.mark.parametrize("damage", ["truncate", "remove", "flip", "state"])
def test_a_damaged_checkpoint_falls_back(tmp_path, capsys, damage):
    (whole, _), _ = train(tmp_path, "whole")
    with pytest.raises(RuntimeError, match="crash"):
        train(tmp_path, "cut", stop_at=10)
    newest = tmp_path / "toy_study" / "cut" / "checkpoints" / "toy" / "8"
    if damage == "remove":
        shutil.rmtree(newest / "run")
    elif damage == "state":  # whole files of another state, which only the fingerprint tells
        shutil.rmtree(newest / "run")
        shutil.copytree(newest.parent / "6" / "run", newest / "run")
        write_other_state(newest)
    else:
        for path in (x for x in newest.rglob("*") if x.is_file() and "d" in x.parts and x.stat().st_size):
            content = bytearray(path.read_bytes())
            path.write_bytes(content[: len(content) // 2] if damage == "truncate" else bytes(255 - x for x in content))
    (resumed, _), _ = train(tmp_path, "cut")
    same(whole, resumed)
    said = capsys.readouterr().err
    assert "the checkpoint of update 8 is damaged or of another form" in said
    assert "trying the one before" in said


def write_other_state(path):
    import orbax.checkpoint as ocp

    saved = ocp.StandardCheckpointer().restore(path / "run")
    saved["state"]["place"] = np.asarray(saved["state"]["place"]) + 1e-3
    shutil.rmtree(path / "run")
    with ocp.StandardCheckpointer() as writer:
        writer.save(path / "run", saved)


def test_all_checkpoints_damaged_is_one_clear_error(tmp_path):
    with pytest.raises(RuntimeError, match="crash"):
        train(tmp_path, "cut", stop_at=10)
    for path in (tmp_path / "toy_study" / "cut" / "checkpoints" / "toy").glob("*/run"):
        shutil.rmtree(path)
    with pytest.raises(UserError, match=r"resume: expected a checkpoint of this study.* in .*cut/checkpoints/toy"):
        train(tmp_path, "cut")


def test_a_disk_that_fills_up_is_one_clear_error(tmp_path, monkeypatch):
    """The checkpoint cannot be written: what was saved before is intact, and the run goes on from there."""
    (whole, _), _ = train(tmp_path, "whole")

    def full(*_, **__):
        raise RuntimeError("RESOURCE_EXHAUSTED: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("orbax.checkpoint.CheckpointManager.save", full)
        with pytest.raises(OSError, match=r"checkpoints: cannot write .*cut/checkpoints/toy: .*No space left"):
            train(tmp_path, "cut")
    (resumed, _), _ = train(tmp_path, "cut")
    same(whole, resumed)


def start(tmp_path, *argv):
    command = [sys.executable, str(HERE / "toy_study.py"), "--runs", str(tmp_path), "--updates", "4000", "--chunk", "4"]
    return subprocess.Popen([*command, "--save-every", "0", *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for(folder, chunks, process):
    begun = time.monotonic()
    while len(list(folder.glob("history/toy/[0-9]*.npz"))) < chunks:
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() - begun < 60
        time.sleep(0.01)


def test_signals_of_a_real_process(tmp_path):
    """SIGTERM stops with a checkpoint and status 130; SIGKILL, perhaps inside a save, loses nothing."""
    folder = tmp_path / "toy_study" / "cut"
    for kill, chunks in ((signal.SIGTERM, 10), (signal.SIGKILL, 25)):
        process = start(tmp_path, "--name", "cut", "--resume")
        wait_for(folder, chunks, process)
        process.send_signal(kill)
        said = process.communicate(timeout=60)[1].decode()
        if kill == signal.SIGTERM:
            assert process.returncode == 130
            assert "--resume --name cut goes on" in said
    newest = max(int(path.name) for path in (folder / "checkpoints" / "toy").iterdir() if path.name.isdigit())
    assert newest > 4
    # Resumed here and ended a little later, it agrees with a run from the start on all that both have done.
    build = toy.build(toy.Config(chunk=4))
    program = vectorize(build.train, build.rows, SEEDS, "data=1")
    with pytest.raises(RuntimeError, match="crash"):
        train(tmp_path, "cut", program=program, updates=4000, chunk=4, stop_at=200)
    train(tmp_path, "whole", program=program, updates=200, save_every=float("inf"))
    twins = tmp_path / "toy_study" / "whole" / "history" / "toy"
    both = [path for path in folder.glob("history/toy/*.npz") if (twins / path.name).exists()]
    assert len(both) >= 39
    for path in both:
        with np.load(path) as a, np.load(twins / path.name) as b:
            for name in set(a.files) - {"seconds"}:
                np.testing.assert_array_equal(a[name], b[name])
    cut = load_results(RunFolderView(folder), "toy", ("plain", "lazy"))
    assert cut.train["plain"]["reward"].shape[1] >= 39 * 4


class RunFolderView:
    """The reading half of a run folder."""

    def __init__(self, path):
        self.path = path

    history = RunFolder.history


def test_ctrl_c_twice_acts_at_once():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background of a shell ignores it
    with pytest.raises(KeyboardInterrupt), loop.stoppable() as stopped:
        os.kill(os.getpid(), signal.SIGINT)
        assert stopped()
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the second one should have raised")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_watcher_ends_a_run_early(tmp_path):
    config = toy.Config(runs=str(tmp_path), name="early")
    build = toy.build(config)
    program = vectorize(build.train, build.rows, SEEDS)
    folder = RunFolder("toy_study", config, {"toy": config})
    results, _ = run(program, "toy", 12, folder, config, watch=lambda update, train, held_out: update >= 4)
    assert results.train["plain"]["reward"].shape == (4, 4)


def test_a_finished_run_without_checkpoints_keeps_its_history(tmp_path):
    (whole, _), folder = train(tmp_path, "done")
    shutil.rmtree(folder.path / "checkpoints")
    stamps = [path.stat().st_mtime_ns for path in folder.history("toy")]
    (again, state), _ = train(tmp_path, "done")
    assert state is None
    same(whole, again)
    assert [path.stat().st_mtime_ns for path in folder.history("toy")] == stamps


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_gap_in_the_history_is_named(tmp_path, damage):
    _, folder = train(tmp_path, "done")
    path = folder.history("toy")[3]
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError, match=r"history: expected .*0000000[68].npz is (missing|damaged)"):
        train(tmp_path, "done")


def test_chunks_that_do_not_divide_the_updates_are_refused(tmp_path):
    with pytest.raises(UserError, match="updates: expected a multiple of the 2 updates of a chunk, got 13 to do"):
        train(tmp_path, "odd", updates=13)


def test_reserved_names_of_metrics_are_refused():
    with pytest.raises(UserError, match=r"metrics: expected names besides .*, got seed"):
        loop.check_metrics({"seed": np.zeros((1, 1, 2))}, {}, 2)


def test_a_signal_in_the_last_chunk_stops_too(tmp_path, capsys):
    config = toy.Config(runs=str(tmp_path), name="last")
    build = toy.build(config)
    folder = RunFolder("toy_study", config, {"toy": config})

    def watch(update, train, held_out):
        if update == config.updates:
            os.kill(os.getpid(), signal.SIGTERM)
        return False

    with pytest.raises(SystemExit) as stop:
        run(vectorize(build.train, build.rows, SEEDS), "toy", config.updates, folder, config, watch=watch)
    assert stop.value.code == 130
    assert "stopped after update 12 of 12" in capsys.readouterr().err
    assert (folder.path / "checkpoints" / "toy" / "12").exists()


def test_numbers_keep_their_kind():
    numbers = loop.stack({"a": (1, 2.0), "b": (3, 4)})
    assert [x.dtype for x in numbers] == [np.int32, np.float32]
