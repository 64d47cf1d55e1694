"""Run folders: whole files, nothing overwritten, one writer, readable after a crash at any moment."""

import dataclasses
import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from rollax.experiments.harness.command_line import Options
from rollax.experiments.harness.run_folder import RunFolder, plain


@dataclasses.dataclass(frozen=True)
class Config(Options):
    lr: float = 0.1


def open_folder(tmp_path, study="study", name="one", resume=False, **config):
    config = Config(runs=str(tmp_path), name=name, resume=resume, **config)
    return RunFolder(study, config, {"label": config})


def test_a_new_run(tmp_path):
    folder = open_folder(tmp_path)
    folder.log({"update": 1, "reward": np.float32(0.5), "broken": float("nan")})
    folder.log({"update": 2, "reward": np.float32(0.75)})
    lines = [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"update": 1, "reward": 0.5, "broken": None}, {"update": 2, "reward": 0.75}]
    assert folder.read_json("config.json")["label"]["lr"] == 0.1
    versions = folder.read_json("versions.json")
    assert versions["jax"]
    assert versions["devices"]
    assert folder.read_json("nothing.json") is None


def test_nothing_is_overwritten(tmp_path):
    open_folder(tmp_path).close()  # as when its process has ended
    with pytest.raises(ValueError, match=r"name: expected a new run, but .*study/one already holds one .*--resume"):
        open_folder(tmp_path, lr=0.2)
    saved = json.loads((tmp_path / "study" / "one" / "config.json").read_text())
    assert saved["label"]["lr"] == 0.1
    foreign = tmp_path / "study" / "two"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="already holds"):
        open_folder(tmp_path, name="two")


def test_names_by_time_do_not_collide(tmp_path):
    names = {open_folder(tmp_path, name="").path.name for _ in range(3)}
    assert len(names) == 3


def test_resume(tmp_path):
    first = open_folder(tmp_path, lr=0.3)
    with pytest.raises(ValueError, match=r"name: .*study/one is in use by a running process"):
        open_folder(tmp_path, resume=True, lr=0.3)
    first.close()
    with pytest.raises(ValueError, match=r"resume: .* has another configuration: lr was 0.3, is 0.1"):
        open_folder(tmp_path, resume=True)
    folder = open_folder(tmp_path, resume=True, lr=0.3, save_every=1.0)  # what surrounds a run may change
    assert folder.resumed
    assert len(folder.read_json("versions.json")["resumed"]) == 1
    folder.close()
    open_folder(tmp_path, name="two").close()
    os.utime(tmp_path / "study" / "two" / "config.json", (1, 1))
    assert open_folder(tmp_path, name="", resume=True, lr=0.3).path.name == "one"  # the latest
    new = open_folder(tmp_path, name="three", resume=True)  # a name that is new begins a run
    assert not new.resumed
    with pytest.raises(ValueError, match=r"resume: expected a run in .*other, found none"):
        open_folder(tmp_path, study="other", name="", resume=True)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"runs: cannot write .*file/study/one: Not a directory"):
        open_folder(tmp_path / "file")


def test_what_is_after_an_update_is_forgotten(tmp_path):
    folder = open_folder(tmp_path)
    for label in ("a", "b"):
        for update in (0, 2, 4):
            folder.log({"label": label, "update": update})
            folder.save_history(label, update, {"x": np.arange(update)})
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write('{"label": "b", "upd')  # cut by a full disk
    folder.forget_after("a", 2)
    lines = [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["label"], line["update"]) for line in lines] == [("a", 0), ("a", 2), ("b", 0), ("b", 2), ("b", 4)]
    assert [path.name for path in folder.history("a")] == ["00000000.npz", "00000002.npz"]
    assert len(folder.history("b")) == 3


def test_a_machine_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert open_folder(tmp_path).read_json("versions.json")["commit"] is None


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    folder = open_folder(tmp_path)
    folder.write_json("results.json", "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        folder.write_json("results.json", "new")
    assert folder.read_json("results.json") == "old"


def test_killed_at_random_moments(tmp_path):
    """A process that writes as fast as it can, killed again and again: every file is whole."""
    script = textwrap.dedent("""
        import sys, numpy as np
        from rollax.experiments.harness.command_line import Options
        from rollax.experiments.harness.run_folder import RunFolder
        folder = RunFolder("study", Options(runs=sys.argv[1], name="one", resume=True), {})
        print("ready", flush=True)
        for i in range(10**9):
            folder.write_json("results.json", list(range(2000)))
            folder.log({"label": "a", "update": i, "values": list(range(500))})
            folder.save_history("a", i % 7, {"x": np.arange(1000)})
    """)
    rng = np.random.default_rng(0)
    for _ in range(4):
        with subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True
        ) as writer:
            assert writer.stdout.readline() == "ready\n"
            try:
                writer.wait(timeout=rng.uniform(0.0, 0.4))
            except subprocess.TimeoutExpired:
                writer.kill()
        path = tmp_path / "study" / "one"
        for name in ("config.json", "versions.json"):
            json.loads((path / name).read_text())
        if (path / "results.json").exists():
            assert json.loads((path / "results.json").read_text()) == list(range(2000))
        if (path / "metrics.jsonl").exists():
            assert all(len(json.loads(line)["values"]) == 500 for line in (path / "metrics.jsonl").open())
        for saved in path.glob("history/a/[0-9]*.npz"):
            np.testing.assert_array_equal(np.load(saved)["x"], np.arange(1000))


def test_plain():
    value = {"a": np.arange(2), "b": (np.float32(1.5), float("inf")), "c": Config(lr=0.2)}
    assert plain(value) == {"a": [0, 1], "b": [1.5, None], "c": dataclasses.asdict(Config(lr=0.2)) | {"track": []}}
