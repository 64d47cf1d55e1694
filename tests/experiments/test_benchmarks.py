"""Every benchmark runs and forms its ratios; what it measures is for its reader, not for a test."""

import dataclasses
import json
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from rollax.experiments import bandpo, ppo_cartpole
from rollax.experiments.benchmarks import (
    band_bounds,
    board_steps,
    checkpoints,
    decode,
    env_steps,
    generation,
    log_probs,
    multi_turn,
    objectives,
    peer,
    ppo,
    prefill,
    sweep_speed,
    timing,
    ttt,
    value_models,
)

TINY_LLAMA = Path(__file__).parents[1] / "golden" / "hf_tiny" / "llama"


def lone_rows(path):
    """Rows of a run without the peer: a rate of ours each, and no ratio."""
    result = json.loads(path.read_text())
    assert result["versions"]["jax"] == jax.__version__ and not result["peer_versions"]
    for row in result["rows"]:
        assert row["ours_per_second"] > 0 and row["compile_ours"] > 0
        assert row["peer_per_second"] is None and row["ratio"] is None
    return result["rows"]


@pytest.mark.slow  # compiles seven updates of a study
def test_band_bounds(monkeypatch):
    monkeypatch.setattr(band_bounds, "REPEATS", 1)
    config = next(iter(bandpo.configs_of([]).values()))
    lines = band_bounds.measure(dataclasses.replace(config, seeds=1, passes=1, mini_batches=1))
    assert [line[0] for line in lines][-2:] == ["tabular, band_chi2", "tabular, clip"]
    assert all(line[-1].endswith("%") for line in lines)


@pytest.mark.slow
def test_env_steps(tmp_path):
    out = tmp_path / "folder" / "out.json"
    env_steps.main(["--no-peer", "--num-envs", "2", "4", "--steps", "401", "--repeats", "2", "--out", str(out)])
    rows = lone_rows(out)
    assert [row["work"] for row in rows] == [400, 400] and len(rows[0]["ours"]) == 2
    for row in rows:  # random actions fall after some twenty steps
        assert 0.02 < row["notes"]["share_of_steps_that_end"]["ours"] < 0.1


@pytest.mark.slow
def test_board_steps(tmp_path):
    out = tmp_path / "out.json"
    size = ["--num-envs", "2", "--steps", "401", "--levels", "3", "--repeats", "2", "--out", str(out)]
    board_steps.main(["--no-peer", *size])
    rows = lone_rows(out)
    assert [row["case"].split(",")[0] for row in rows] == ["sokoban", "minesweeper"]
    assert [row["work"] for row in rows] == [400, 400] and len(rows[0]["ours"]) == 2
    ends = [row["notes"]["share_of_steps_that_end"]["ours"] for row in rows]
    assert ends[0] < 0.02 and 0.03 < ends[1] < 0.3  # at the horizon; at the tenth cell or so


@pytest.mark.slow
def test_multi_turn(tmp_path):
    """The two peers play the same episodes as the one program; else it raises."""
    out = tmp_path / "out.json"
    size = ["--environments", "6", "--turns", "3", "--width", "16", "--alone", "2", "--repeats", "2"]
    multi_turn.main([*size, "--out", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert [row["work"] for row in rows] == [18, 18] and all(row["ratio"] > 0 for row in rows)


def test_episodes_that_differ_are_noticed():
    fields = dict(positions=[[0, 1, -1]], tokens=[[5, 6, 7]], mask=[[0, 1, 0]], reward=[[1.0]], terminated=[True])
    ours = types.SimpleNamespace(truncated=[False], **fields)
    multi_turn.same_episodes(ours, types.SimpleNamespace(truncated=[False], **fields | dict(tokens=[[5, 6, 8]])))
    for name, changed in dict(tokens=[[5, 7, 7]], reward=[[0.0]], mask=[[0, 1, 1]]).items():
        with pytest.raises(RuntimeError, match=f"{name}: the episodes of the two sides differ"):
            multi_turn.same_episodes(ours, types.SimpleNamespace(truncated=[False], **fields | {name: changed}))


@pytest.mark.slow
def test_value_models():
    kinds = value_models.value_model("none", prompts=3, seeds=2)
    assert list(kinds) == ["adapter and head", "and the baseline"]
    prior, arguments = kinds["adapter and head"]
    assert jax.eval_shape(prior, *arguments).shape == (2, 3)
    whole, arguments = kinds["and the baseline"]  # the prior is a part of it
    assert jax.eval_shape(whole, *arguments).shape == (2, 3, 16)


def test_objectives(tmp_path):
    out = tmp_path / "out.json"
    size = ["--rows", "32", "--tokens", "8", "--calls", "2", "--repeats", "1"]
    objectives.main(["--peers", *size, "--out", str(out)])
    assert len(lone_rows(out)) == len(objectives.CASES)


@pytest.mark.slow
def test_generation(tmp_path):
    out = tmp_path / "out.json"
    size = ["--batches", "1", "3", "--prompt", "5", "--new", "4", "--repeats", "1"]
    generation.main(["--no-peer", "--model", str(TINY_LLAMA), *size, "--out", str(out)])
    assert [row["work"] for row in lone_rows(out)] == [4, 12]


def test_agreement_counts_whole_rows():
    ours = np.array([[1, 2, 3], [4, 5, 6]])
    assert generation.agreement(ours, ours) == 1.0
    assert generation.agreement(ours, np.array([[1, 2, 3], [4, 5, 7]])) == 0.5


@pytest.mark.slow
def test_ppo(tmp_path):
    config = ppo.Config(seeds=2, updates=1, repeats=1)
    study = ppo_cartpole.Config(seeds=2, updates=1, num_envs=4, steps=8, passes=1, mini_batches=1, width=8)
    row = ppo.measure(config, study, None)
    returns = row.notes["return_of_each_seed"]["ours"]
    assert row.work == 2 * 4 * 8 and len(returns) == 2 and all(1 <= x <= 500 for x in returns)


KERNELS = {
    prefill: (["--lengths", "128", "--block", "8", "--heads", "4", "--kv-heads", "2", "--width", "8", "--chunk", "64",
               "--peers", "xla", "tokamax", "triton"], 6),
    ttt: (["--cases", "ttt_linear", "--lengths", "64", "--chunk", "32", "--batch", "1", "--heads", "2",
           "--width", "8"], 2),
    decode: (["--batches", "2", "--slots", "64", "--fills", "0.5", "--dtypes", "float32", "--heads", "2",
              "--kv-heads", "1", "--width", "8"], 1),
    log_probs: (["--tokens", "16", "--width", "8", "--vocabularies", "64"], 2),
}  # fmt: skip


@pytest.fixture
def modules_of_a_gpu(monkeypatch):
    """The authors' operator and what it needs of torch, on NumPy arrays; no tokamax."""

    def flash_prefill(q, k, v, out, block_size, attention_sink, window_size, alpha, last_n_block_full, min_budget):
        cfg = prefill.FlashPrefillConfig(
            alpha=alpha,
            block_size=block_size,
            sink_blocks=attention_sink,
            window_blocks=window_size,
            last_full_blocks=last_n_block_full,
            min_budget=min_budget,
        )
        out[0] = sparse(q[0], k[0], v[0], cfg)[0]

    sparse = jax.jit(prefill.flash_prefill, static_argnums=3)
    cuda = types.SimpleNamespace(synchronize=lambda: None)
    torch = types.SimpleNamespace(from_dlpack=np.from_dlpack, empty_like=np.empty_like, cuda=cuda, device=None)
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__="3.3.0"))
    monkeypatch.setitem(sys.modules, "flashprefill_native_forward", types.SimpleNamespace(flash_prefill=flash_prefill))
    monkeypatch.setitem(sys.modules, "tokamax", None)


@pytest.mark.parametrize(
    "benchmark",
    [pytest.param(x, marks=pytest.mark.slow if x in (prefill, ttt) else ()) for x in KERNELS],
    ids=lambda module: module.__name__.split(".")[-1],
)
def test_kernels(tmp_path, benchmark, modules_of_a_gpu, capsys):
    """Against peers that are part of JAX or written out: both sides run and agree, and a ratio is formed."""
    size, least = KERNELS[benchmark]
    out = tmp_path / "out.json"
    benchmark.main([*size, "--repeats", "1", "--out", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) >= least and all(row["ours"] and row["peer"] and row["ratio"] > 0 for row in rows)
    errors = {row["case"]: row["notes"].get("peer_error") for row in rows}
    if benchmark is prefill:  # sparse attention is no peer of dense attention: what it leaves out is in the notes
        assert "128 tokens, tokamax: left out: ModuleNotFoundError: " in capsys.readouterr().out
        far = {row["case"].split(",")[0]: row["notes"]["relative_error"] for row in rows}
        assert 0 < far["packed"] < far["sparse"] < 0.5 and far["dense"] == 0
        errors = {case: error for case, error in errors.items() if error is not None}
        assert list(errors) == ["sparse, 128 tokens, triton", "dense, 128 tokens, xla"]
    assert errors and all(error < 1e-5 for error in errors.values()), errors


MAINS = [module.main for module in (env_steps, board_steps, multi_turn, objectives, generation, ppo, *KERNELS)]


@pytest.mark.parametrize("main", MAINS)
def test_bad_values_get_one_line(main, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--repeats", "0"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: repeats: expected at least 1, got 0\n"


def test_ratios_are_formed_within_each_repeat(tmp_path):
    ours, theirs = iter([9.0, 1.0, 2.0, 4.0]), iter([9.0, 2.0, 2.0, 12.0])  # the first turn warms up
    row = timing.duel("case", "units/s", 8.0, 3, lambda: next(ours), lambda: next(theirs), compile_ours=0.5)
    assert row.ours == [1.0, 2.0, 4.0] and row.peer == [2.0, 2.0, 12.0]
    assert row.quartiles() == (2.0, 1.5, 2.5)  # of 2, 1 and 3
    path = timing.publish("test", [row], {}, {"rival": "1.0"}, str(tmp_path / "out.json"))
    (published,) = json.loads(path.read_text())["rows"]
    assert published["ratio"] == 2.0 and published["ratio_quartiles"] == [1.5, 2.5]
    assert published["ours_per_second"] == 4.0 and published["peer_per_second"] == 4.0
    assert timing.lines_of([row])[0] == ["case", "4", "4", "units/s", "2.00x", "1.50 to 2.50", "0.50 s", "-"]


def test_the_roof_counts_every_product(monkeypatch):
    made = []
    monkeypatch.setattr(timing, "seconds_of", lambda multiply, x: made.append((x, multiply(x))) or 0.5)
    assert timing.peak_operations("float32", 1, shape=(3, 16)) == 3 * 2 * 16**3 / 0.5
    x, product = made[0]
    np.testing.assert_allclose(product, np.linalg.matrix_power(np.asarray(x, np.float64), 4), atol=1e-5)


def test_contestants_take_turns():
    order = []
    turn = lambda name: lambda: order.append(name) or 1.0  # noqa: E731
    timing.interleave({"a": turn("a"), "b": turn("b")}, 3)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"


PEER_SIDE = """
import os
print("to stderr, not into the answers")
def handlers():
    told = lambda: os.environ["TOLD"]
    return {"double": lambda x: 2 * x, "fail": lambda: 1 / 0, "told": told, "die": lambda: os._exit(3)}
"""


def test_a_peer_answers_fails_and_dies(tmp_path):
    file = tmp_path / "side.py"
    file.write_text(PEER_SIDE)
    with peer.serving(sys.executable, file, TOLD="yes") as ask:
        assert ask("double", x=[1, 2]) == [1, 2, 1, 2] and ask("told") == "yes"
        with pytest.raises(RuntimeError, match="fail: ZeroDivisionError"):
            ask("fail")
        assert ask("double", x=4) == 8  # a failed question does not end it
        with pytest.raises(RuntimeError, match="ended with status 3"):
            ask("die")


def test_an_interpreter_that_has_the_modules_is_taken_as_it_is():
    assert peer.interpreter(peer.Peer("none", ("json",), ())) == sys.executable
    assert peer.interpreter(peer.Peer("none", ("json",), ()), sys.executable) == sys.executable
    with pytest.raises(ValueError, match="python: expected an interpreter, got 'no-such-python'"):
        peer.interpreter(peer.Peer("none", ("json",), ()), "no-such-python")


@pytest.mark.slow
def test_checkpoints(tmp_path):
    out = tmp_path / "out.json"
    tiny = ["--megabytes", "2", "--repeats", "1", "--runs", "1", "--updates", "6", "--seeds", "2", "--save-every", "0"]
    checkpoints.main([*tiny, "--out", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert [row["case"].split(",")[0] for row in rows] == ["save", "restore", "training"]
    assert all(row["ratio"] > 0 for row in rows)


@pytest.mark.slow
def test_one_program_of_a_sweep_against_single_ones(tmp_path):
    config = sweep_speed.Config(deltas=("0.05",), lrs=("0.1", "0.2"), seeds=2, updates=2, repeats=1)
    row = sweep_speed.programs(config)
    assert row.work == 4 and row.as_dict()["ratio"] > 0


@pytest.mark.parametrize("benchmark", KERNELS, ids=lambda module: module.__name__.split(".")[-1])
def test_benchmarks_of_kernels_end_in_one_line(benchmark, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    def says(argv):
        with pytest.raises(SystemExit) as stop:
            benchmark.main(argv)
        return stop.value.code, capsys.readouterr().err

    expected = "implementation: expected one of reference, xla, interpret on this cpu, got"
    for name in ("foo", "pallas", "pallas_tpu") if benchmark is not log_probs else ():
        assert says(["--implementation", name]) == (2, f"error: {expected} {name!r}\n")
    monkeypatch.setattr(benchmark, "parse", interrupted)
    assert says([]) == (130, "interrupted\n")


def test_errors_of_gradients_are_shown(capsys):
    one, two = (prefill.Program(None, 0.0, x, 1.0, (x, 2 * x)) for x in (np.ones(4), np.array([1.0, 1, 1, 3])))
    found = prefill.errors(two, one, "peer")
    assert found == {"peer_error": 1.0, "peer_gradient_error": 1.0}
    assert prefill.errors(two._replace(gradients=()), one, "relative") == {"relative_error": 1.0}
    timing.show_notes([timing.Row("case", "s", 1.0, [], [], notes=found)], 3e9)
    assert capsys.readouterr().out == "roofline: 3 GFLOP/s\ncase: peer error 1, peer gradient error 1\n"
