"""The BandPO study: every model and task runs, claims are judged, learning is real, bad values get one line."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rollax.agents import make_mesh
from rollax.agents.pretrained import Pretrained, save_pretrained
from rollax.agents.transformer import TransformerConfig, transformer
from rollax.experiments import bandpo
from rollax.experiments.bandpo import CLAIMS, Config, Policy, configs_of, make_train, numbers_of
from rollax.experiments.harness import study
from rollax.experiments.harness.claims import judge, judge_all
from rollax.experiments.harness.loop import Results, stack

TINY = ["--updates", "2", "--chunk", "1", "--seeds", "2", "--prompts", "4", "--samples", "8", "--mini-batches", "4"]
TINY += [
    "--passes",
    "1",
    "--eval-prompts",
    "2",
    "--eval-samples",
    "4",
    "--warm-start",
    "2",
    "--width",
    "16",
    "--layers",
    "1",
]


def run(tmp_path, *argv):
    study.main(bandpo.STUDY, [*TINY, "--runs", str(tmp_path), "--name", "run", *argv])
    folder = tmp_path / "bandpo" / "run"
    return folder, json.loads((folder / "results.json").read_text())


# By default test_a_pretrained_model is the run from end to end; the table's program and the claims have tests below.
@pytest.mark.slow
@pytest.mark.parametrize("models", [("tabular",), ("tabular", "transformer")])
def test_a_study_end_to_end(tmp_path, capsys, models):
    argv = ("--model", "both" if len(models) > 1 else models[0])
    folder, results = run(tmp_path, *argv)
    assert set(results) == set(models)
    assert set(results["tabular"]["rows"]) >= {
        "clip",
        "dcpo",
        "dppo_tv",
        "band_kl/small",
        "no_clip/small",
        "clip/stale",
    }
    for model, part in results.items():
        assert {claim["name"] for claim in part["claims"]} == {claim.name for claim in CLAIMS}
        assert (folder / f"curves_{model}.png").read_bytes().startswith(b"\x89PNG")
        for values in part["rows"].values():
            assert len(values["reward"]) == 2
            assert all(0 <= reward <= 1 for reward in values["reward"])
    report = (folder / "report.md").read_text()
    assert all(word in report for word in ("R5c", "curves_tabular.png"))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {line["update"] for line in lines} == {1, 2}
    lr = {"tabular": 0.1, "transformer": 2e-4}
    config = json.loads((folder / "config.json").read_text())
    assert {model: config[model]["lr"] for model in models} == {model: lr[model] for model in models}
    said = capsys.readouterr().out
    assert all(word in said for word in ("R1a", str(folder)))
    with pytest.raises(SystemExit):  # a second run of that name does not overwrite the first
        study.main(bandpo.STUDY, [*TINY, *argv, "--runs", str(tmp_path), "--name", "run"])
    assert "already holds" in capsys.readouterr().err
    assert (folder / "report.md").read_text() == report


@pytest.mark.slow
@pytest.mark.parametrize("task", ["sorting", "arithmetic", "countdown"])
def test_every_task_of_the_transformer(tmp_path, task):
    argv = ("--model", "transformer", "--task", task, "--arms", "clip", "band_kl", "--kl-coefficient", "0.01")
    _, results = run(tmp_path, *argv, "--staleness", "1")
    assert set(results["transformer"]["rows"]) == {"clip", "band_kl", "band_kl/small", "clip/stale", "band_kl/stale"}


def tiny_lm():
    config = TransformerConfig(vocab_size=320, width=32, num_layers=1, num_heads=2)
    return config, transformer(config)


def test_a_pretrained_model(tmp_path):
    """A Hugging Face directory through `--model PATH`, on a mesh of all devices, with accumulated gradients."""
    from rollax.agents.tokenizer import load_tokenizer
    from rollax.tests.support import GOLDEN

    config, model = tiny_lm()
    tokenizer = load_tokenizer(GOLDEN / "hf_tiny" / "llama")
    source = Pretrained(model, config, jax.jit(model.init)(jax.random.key(0)), tokenizer, (0,), 1, 2)
    save_pretrained(tmp_path / "model-0.5", source)
    argv = ("--model", str(tmp_path / "model-0.5"), "--task", "products", "--bare", "--train-questions", "24")
    argv += ("--held-out-questions", "8", "--micro-batches", "2", "--block", "2", "--mini-batches", "2", "--seeds", "2")
    folder, results = run(tmp_path, *argv, "--max-answer", "6", "--arms", "band_kl", "--mesh", "data=2,fsdp=2,tensor=2")
    assert len(results["model-0.5"]["rows"]["band_kl"]["reward"]) == 2
    assert [claim["name"] for claim in results["model-0.5"]["claims"]] == ["R1b"]
    report = (folder / "report.md").read_text()
    assert all(word in report for word in ("R1b", "curves_model-0.5.png", "=>"))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {line["update"] for line in lines} == {1, 2}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--arms", "band_xy"], "arms: expected some of clip, clip_higher,"),
        (["--model", "transformer", "--task", "chess"], "task: expected one of tail_forks, sorting"),
        (["--model", "gpt17"], "model: expected tabular, transformer, both, smollm2 or an existing path, got 'gpt17'"),
        (["--model", "tabular", "--task", "sorting"], "task: the tabular policy knows tail_forks alone, got 'sorting'"),
        (["--delta", "-0.1"], "delta: expected at least 0, got -0.1"),
        (["--seeds", "0"], "seeds: expected at least 1, got 0"),
        (["--samples", "6", "--block", "4"], "block: expected a divisor of samples=6, got 4"),
        (["--mini-batches", "7"], "mini_batches: 7 parts do not divide the 32 blocks"),
        (["--chunk", "3", "--updates", "7"], "chunk: expected a divisor of updates=7, got 3"),
        (["--aggregation", "median"], "aggregation: expected one of token_mean"),
        (["--good-prob", "0.5"], "good_prob"),
        (["--delta", "much"], "'much'"),
        (["--delta", "inf"], "delta: expected a finite number, got inf"),
        (["--label-noise", "2"], "label_noise: expected a share, at most 1, got 2.0"),
        (["--upper-max", "0.5"], "upper_max: expected at least 1, got 0.5"),
        (["--max-grad-norm", "-1"], "max_grad_norm: expected above 0, got -1.0"),
        (
            ["--model", "{empty}", "--task", "products", "--mesh", "rows=2"],
            "mesh: expected sizes of data, fsdp, tensor",
        ),
        (["--model", "{empty}", "--task", "products"], "config.json"),
        (["--model", "{empty}", "--task", "tail_forks"], "task: expected one of largest_of_three"),
        (["--model", "{gguf}", "--task", "products"], "GGUF"),
    ],
)
def test_a_bad_value_gets_one_line_and_costs_nothing(tmp_path, capsys, argv, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03")
    argv = [word.format(empty=tmp_path / "empty", gguf=tmp_path / "cut.gguf") for word in argv]
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, *argv)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert words in said
    assert not (tmp_path / "bandpo").exists()


# At temperature 1 the common token has probability 0.6, the edge of a bin, where rounding decides.
SMALL = Config(model="tabular", updates=4, chunk=4, prompts=4, samples=8, mini_batches=4, passes=1, eval_prompts=2,
               aggregation="token_mean", temperature=1.1)  # fmt: skip

CLIP, BAND, AGAIN = (bandpo.Row(*row, 0.1) for row in (("clip", "clip"), ("band_kl", "band_kl"), ("again", "clip")))
ALL_ARMS, OLDEST = ("clip", "band_kl", "dppo_kl", "no_clip"), 3


@functools.cache
def program(config):
    """(functions of one run, starts `[seeds]`, `advance` of rows and seeds), with the arms and lags of all tests."""
    train = make_train(config, *bandpo.prepare(config), ALL_ARMS, OLDEST)
    start = jax.jit(jax.vmap(lambda seed: train.init(jax.random.key(seed))))(jnp.arange(2))
    return train, start, jax.jit(jax.vmap(jax.vmap(train.advance, in_axes=(0, None)), in_axes=(None, 0)))


def as_numbers(config, rows):
    numbers, arms = numbers_of(config, list(rows))
    return stack({row: n._replace(arm=ALL_ARMS.index(arms[n.arm])) for row, n in numbers.items()})


@functools.cache
def trained(config, rows=(CLIP, BAND, AGAIN)):
    """States and metrics of a tabular run, `[rows, seeds]`; three rows, whatever is traced, share a program."""
    same = dataclasses.replace(SMALL, aggregation=config.aggregation, micro_batches=config.micro_batches)
    train, start, advance = program(same)
    numbers = as_numbers(config, rows)
    return advance(start, numbers), (train, start, numbers)


def apart(x, y, start):
    """How far two results are from each other, as a share of how far they are from their start (Adam divides by the
    gradient's size, so rounding in a small gradient is not small in a step)."""
    x, y, start = map(np.asarray, (x, y, start))
    assert np.linalg.norm(x - start) > 0
    return np.linalg.norm(x - y) / np.linalg.norm(x - start)


@functools.cache
def single_runs(config):
    """State and metrics of the first row's first seed and of the second row's second one, each run by itself."""
    train, start, _ = program(config)
    numbers, advance = as_numbers(config, (CLIP, BAND)), jax.jit(train.advance)
    at = lambda tree, i: jax.tree.map(lambda x: x[i], tree)  # noqa: E731
    return [advance(at(start, i), at(numbers, i)) for i in range(2)]


# Single runs accumulate their gradients, the rows and seeds of one `vmap` do not: one pair of programs for two tests.
IN_PARTS = dataclasses.replace(SMALL, micro_batches=4)


def test_rows_and_seeds_in_one_vmap_equal_single_runs():
    (states, metrics), (_, start, _) = trained(SMALL)
    for i, (state, one) in enumerate(single_runs(IN_PARTS)):
        assert apart(states.params["logits"][i, i], state.params["logits"], start.params["logits"][i]) < 5e-3
        np.testing.assert_array_equal(metrics["reward"][i, i], one["reward"])


@pytest.mark.parametrize("aggregation", ["token_mean", pytest.param("seq_mean_token_mean", marks=pytest.mark.slow)])
def test_accumulated_gradients_and_metrics_equal_whole_ones(aggregation):
    (whole, told), (_, start, _) = trained(dataclasses.replace(SMALL, aggregation=aggregation))
    for i, (state, one) in enumerate(single_runs(dataclasses.replace(IN_PARTS, aggregation=aggregation))):
        assert apart(whole.params["logits"][i, i], state.params["logits"], start.params["logits"][i]) < 5e-3
        for name in ("clip_fraction", "entropy", "ratio_max", "token_count_by_prob"):
            np.testing.assert_allclose(told[name][i, i], one[name], rtol=1e-3, err_msg=name)


def test_every_claim_is_judged_of_the_rows_that_run_by_default():
    """Results are made up: random numbers, and nine of ten clipped tokens were improbable."""
    rng = np.random.default_rng(0)
    for config in configs_of([]).values():
        rows = [row.label for row in bandpo.make_rows(config)]
        of_update = {name: {row: rng.random((3, 12)) for row in rows} for name in ("reward", "entropy", "kl_reached")}
        train = {row: {name: values[row] for name, values in of_update.items()} for row in rows}
        for values in train.values():
            values |= {
                "clip_fraction": np.full((3, 12), 0.1),
                "clip_count_by_prob": np.tile([9.0, 1, 0, 0, 0], (3, 12, 1)),
            }
        held_out = {row: {name: rng.random((3, 4)) for name in ("reward", "pass@4")} for row in rows}
        results = Results(train, held_out, np.arange(0, 13, 4), {})
        judged = {verdict.name: verdict for verdict in judge_all(CLAIMS, results)}
        assert set(judged) == {claim.name for claim in CLAIMS}
        assert judged["R1a"].verdict == "holds" and judged["R1b"].verdict == "fails"
        for measure in bandpo.COLUMNS.values():
            assert all(np.isfinite(measure(results, row)).all() for row in rows)
        assert "reward" in {panel.title for panel in bandpo.panels(results)}


def test_no_clipped_token_gives_no_verdict():
    counts = np.zeros((3, 4, 5))
    results = Results({"clip": {"clip_count_by_prob": counts}}, {}, np.arange(2), {})
    assert np.isnan(bandpo.tail_share(results, "clip")).all()
    assert judge(CLAIMS[0], results).verdict == "inconclusive"


def test_band_and_its_mask_take_the_same_steps():
    """Up to the caps of the ratio (10 and 20), Band's gradient is DPPO's (arXiv 2602.04879)."""
    config = dataclasses.replace(SMALL, dual_clip=1e9, upper_max=1e9, ratio_cap=1e9, delta=0.005, temperature=1.0)
    rows = (BAND, bandpo.Row("dppo_kl", "dppo_kl", 0.1), CLIP)
    (states, metrics), (_, start, _) = trained(config, rows)
    assert (metrics["clip_fraction"][:2].mean(axis=-1) > 0.01).all()
    assert apart(*states.params["logits"][:2], start.params["logits"]) < 5e-3


def test_staleness_samples_from_the_past():
    rows = tuple(bandpo.Row(f"s{s}", "no_clip", 0.1, s) for s in (0, 1, OLDEST))
    (states, metrics), _ = trained(SMALL, rows)
    # The first rollout comes from the start in all rows; a lag of 3 samples the first four from it.
    np.testing.assert_array_equal(metrics["share_good"][0, :, 0], metrics["share_good"][2, :, 0])
    np.testing.assert_array_equal(metrics["share_good"][1, :, :2], metrics["share_good"][2, :, :2])
    assert (metrics["ratio_max"][2, :, 1:] > metrics["ratio_max"][0, :, 1:]).all()
    for row in range(3):  # one update ago, newest first
        assert (states.past["logits"][row, :, 0] != states.params["logits"][row]).any()
        assert (states.past["logits"][row, :, 0] != states.past["logits"][row, :, 1]).any()


@pytest.mark.slow  # by default one runs on a mesh above, and harness/test_devices.py compares a supervised update
def test_sharding_does_not_change_an_update():
    """A language model's update on eight devices (data, fsdp, tensor) equals the one on one device."""
    _, model = tiny_lm()
    config = Config(model="tiny", task="products", updates=1, chunk=1, prompts=4, samples=4, block=4, mini_batches=2,
                    passes=1, lr=1e-3, micro_batches=2, kl_coefficient=0.01)  # fmt: skip
    config = dataclasses.replace(config, eval_prompts=2, eval_samples=4)
    plain = bandpo.envs.sorting(3)

    def step_env(key, state, action):  # a reward that an untrained model earns
        state, step = plain.step(key, state, action)
        return state, step._replace(reward=(action.sum() % 5).astype(jnp.float32))

    env = plain._replace(step=step_env)
    task = bandpo.Task(env, env)
    params = jax.jit(model.init)(jax.random.key(0))
    numbers, arms = numbers_of(config, [bandpo.Row("band_kl", "band_kl", 1e-3)])
    numbers = jax.tree.map(lambda x: x[0], stack(numbers))

    def step(mesh):
        start = params if mesh is None else jax.device_put(params, bandpo.named_shardings(model.axes, params, mesh))
        train = make_train(config, task, Policy(model, None, jnp.array([3, 5]), mesh), arms)
        places, first = None, functools.partial(bandpo.first_state, config=config)
        if mesh is not None:
            shapes = jax.eval_shape(first, jax.random.key(1), params)
            places = bandpo.named_shardings(model.axes, params, mesh)
            places = bandpo.state_shardings(shapes, params, places, mesh)
        state = jax.jit(first, out_shardings=places)(jax.random.key(1), start)
        return jax.jit(train.advance)(state, numbers)

    state, metrics = step(None)
    sharded, sharded_metrics = step(make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))
    assert not sharded.params["embed"]["embedding"].sharding.is_fully_replicated
    moved = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), state.params, params)
    assert max(jax.tree.leaves(moved)) > 5e-4
    for name in ("reward", "tokens", "entropy"):
        np.testing.assert_allclose(metrics[name], sharded_metrics[name], rtol=1e-4)
    gaps = jax.tree.map(apart, state.params, sharded.params, params)
    # Adam's first steps are the sign of the gradient, rounding included.
    assert max(jax.tree.leaves(gaps)) < 0.05, gaps


@pytest.mark.slow
def test_learning_and_its_control():
    """Sorting after a start on 60 % wrong labels: 30 updates recover it; with shuffled rewards they destroy it."""
    config = Config(
        model="transformer", task="sorting", width=128, warm_start=300, label_noise=0.6, updates=30, chunk=30,
        prompts=32, samples=16, mini_batches=2, passes=1, lr=2e-4, warmup=5, aggregation="token_mean",
        eval_prompts=64, eval_samples=4, seeds=1,
    )  # fmt: skip
    task, policy = bandpo.prepare(config)
    numbers, arms = numbers_of(config, [bandpo.Row("band_kl", "band_kl", config.lr)])
    numbers = jax.tree.map(lambda x: x[0], stack(numbers))
    params = jax.jit(policy.start)(jax.random.key(0))
    held_out = {}
    for shuffled in (False, True):
        shuffling = dataclasses.replace(config, shuffle_rewards=shuffled)
        train = make_train(shuffling, task, policy._replace(start=lambda key: params), arms)
        state = train.init(jax.random.key(1))
        evaluate = jax.jit(train.evaluate)
        before = float(evaluate(state, numbers)["reward"])
        state, _ = jax.jit(train.advance)(state, numbers)
        held_out[shuffled] = float(evaluate(state, numbers)["reward"])
    assert 0.1 < before < 0.5, before
    assert held_out[False] > before + 0.3, (before, held_out)
    assert held_out[True] < before - 0.05, (before, held_out)
