"""The FlashPrefill study: its pieces are what they say, its parts run, its claims compute, bad values get one line."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rollax import envs
from rollax.envs.tokens import decode
from rollax.experiments import flash_prefill as study_file
from rollax.experiments.flash_prefill import (
    CLAIMS,
    FILLER,
    HEADS,
    KEYS,
    MEMORY,
    QUESTION,
    RULES,
    STUDY,
    VALUES,
    Config,
    at_alpha,
    at_density,
    attend,
    attention_mass,
    few_shot,
    kept_blocks,
    planted_head,
    planted_targets,
    recall_sequence,
    selection_cost,
)
from rollax.experiments.harness import study
from rollax.experiments.harness.claims import judge, judge_all
from rollax.experiments.harness.loop import Results
from rollax.kernels.flash_prefill import PackedPrefillConfig, density, flash_prefill_packed


@pytest.mark.slow  # a minute each; test_reproduce.py runs the first part
@pytest.mark.parametrize("part", ["planted", "recall", "rl"])
def test_a_part_end_to_end(tmp_path, part):
    argv = [*STUDY.smoke[2:], "--part", part, "--runs", str(tmp_path), "--name", "run"]
    argv += ["--alpha", "0.1", "0.5"] if part != "planted" else []
    study.main(STUDY, argv)
    folder = tmp_path / "flash_prefill" / "run"
    found = json.loads((folder / "results.json").read_text())[part]
    names = {claim["name"] for claim in found["claims"]}
    expected = {"planted": {"1a", "2b", "3b", "4", "5b", "6a"}, "recall": {"8a", "8b"}, "rl": {"9a", "9b", "9c", "9d"}}
    assert expected[part] <= names
    verdicts = {claim["name"]: claim["verdict"] for claim in found["claims"]}
    assert part != "planted" or (verdicts["1a"], verdicts["1b"], verdicts["3a"]) == ("holds",) * 3
    assert (folder / f"curves_{part}.png").read_bytes().startswith(b"\x89PNG")
    for values in found["rows"].values():
        assert all(0 <= x <= 1 for x in values["density"])


def test_planted_heads_attend_where_they_were_told_to():
    """Attention beyond the sought blocks is small, and a map of mean keys tells the blocks apart."""
    n, block = 32, 16
    key = jax.random.key(3)
    for kind, head in enumerate(HEADS[:3]):
        q, k, v = planted_head(key, kind, length=n * block, block=block, width=32)
        assert (q.shape, k.shape, v.shape) == ((512, 2, 32), (512, 1, 32), (512, 1, 32))
        mass, rows = attention_mass(q, k, block=block, every=4)
        np.testing.assert_allclose(mass.sum(-1), 1, rtol=1e-5)
        targets = planted_targets(jax.random.split(key, 3)[0], n)[kind][rows // block]
        inside = (mass * targets).sum(-1)[:, rows >= 2 * block]
        assert inside.mean() > 0.75, head
    assert not planted_targets(key, n)[-1].any()  # the diffuse head


def test_vertical_anchors_and_slashes():
    vertical, slash, *_ = planted_targets(jax.random.key(0), 64)
    columns = np.flatnonzero(np.asarray(vertical).any(axis=0))
    assert len(columns) == 2
    assert columns.max() < 4  # the head is the same in short prompts
    i, j = np.nonzero(np.asarray(slash))
    assert set(i - j) == {0, 3, 9}


def test_packed_rule_is_the_public_operator():
    """Lists of packed tiles, repeated over their heads, and v1's attention give V2's output, corrected or not."""
    q, k, v = planted_head(jax.random.key(1), 2, length=256, block=16, width=16)
    cfg = PackedPrefillConfig(alpha=0.3, block_size=16, tile_rows=32, sink_blocks=1, window_blocks=2, last_full_tiles=0)
    for name in ("v2", "v2 corrected"):
        mask = kept_blocks(RULES[name], q, k, 0.3, block=16)
        out = attend(q, k, v, mask, block=16, corrected=RULES[name].corrected)
        expected, stats = flash_prefill_packed(q, k, v, cfg, correction=RULES[name].corrected)
        np.testing.assert_allclose(out, expected, atol=2e-5)
        np.testing.assert_allclose(density(mask), stats.density, rtol=1e-6)
        assert stats.density < 0.9


def test_rules_keep_what_their_numbers_say():
    q, k, _ = planted_head(jax.random.key(1), 1, length=512, block=16, width=16)
    shares = {name: float(density(kept_blocks(RULES[name], q, k, number, block=16)))
              for name, number in (("max", 1.0), ("top-k", 0.3), ("top-p", 1.0), ("window", 4))}  # fmt: skip
    assert shares["max"] < shares["top-k"] < shares["top-p"]
    assert shares["top-p"] > 0.95
    mask = kept_blocks(RULES["window"], q, k, 4, block=16)[0]
    np.testing.assert_array_equal(mask[20], (np.arange(32) == 0) | ((np.arange(32) > 16) & (np.arange(32) <= 20)))


@pytest.mark.parametrize(("needle", "noise"), [(1, 0.0), (3, 0.0), (6, 0.5), (40, 0.0)])
def test_recall_sequences_can_be_answered(needle, noise):
    """Every question has its memory, in needles of the right width at multiples of it, and no memory is a lie."""
    length, questions = 256, 20
    draw = jax.jit(recall_sequence, static_argnames="length")
    tokens, answers, asked = map(np.asarray, draw(jax.random.key(needle), needle, questions, noise, length=length))
    half = length // 2
    assert asked.sum() == questions
    assert not asked[:half].any()
    assert (tokens[half:][~asked[half:]] >= FILLER).all()
    assert (tokens[half:] < MEMORY).all()
    value_of, places = {}, {}
    for place, token in enumerate(tokens[:half]):
        if token >= MEMORY:
            key, value = divmod(int(token) - MEMORY, VALUES)
            assert value_of.setdefault(key, value) == value
            places.setdefault(key, []).append(place)
    if not noise:
        assert len(places) == min(KEYS, half // needle)
        for at in places.values():
            assert at[0] % needle == 0
            assert at == list(range(at[0], at[0] + needle))
        for place in np.flatnonzero(asked):
            assert value_of[int(tokens[place]) - QUESTION] == answers[place]
    else:
        kept = sum(map(len, places.values())) / (needle * min(KEYS, half // needle))
        assert 0.3 < kept < 0.7


def test_few_shot_prompts_read_as_text():
    """Solved questions, each right, then the question; shorter prompts are padded at the right."""
    env = few_shot(envs.sorting(4), 5)
    lengths = set()
    for seed in range(6):
        state, observation = env.reset(jax.random.key(seed))
        assert observation.ids.shape == (env.spec.max_observation,)
        *shots, question = decode(observation.ids, observation.length, env.spec.vocab).split("<stop>")
        assert 3 <= len(shots) <= 5
        for shot in shots:
            asked, _, answer = shot.partition("=")
            assert "".join(sorted(asked)) == answer
        assert question == "".join(map(str, state.digits)) + "="
        lengths.add(int(observation.length))
        _, step = env.step(jax.random.key(0), state, env.expert(jax.random.key(0), state))
        assert step.reward == 1
        assert step.observation.ids.shape == observation.ids.shape
    assert len(lengths) > 1


def test_the_threshold_sorts_nothing():
    sorts = {name: selection_cost(RULES[name], block=16, width=16, length=256)[0] for name in ("max", "top-k", "top-p")}
    assert sorts["max"] == 0 < min(sorts["top-k"], sorts["top-p"])


def made_up(density_of, metric_of, metric="recall"):
    """Results of one update and three seeds in which a rule's settings have given densities and qualities."""
    row = {f"{name}/dense": np.ones((3, 1, 1)) for name in ("density", metric)}
    row["error/dense"] = np.zeros((3, 1, 1))
    for rule in RULES:
        row[f"setting/{rule}"] = np.tile(np.array([0.5, 0.1, 0.02]), (3, 1, 1))
        row[f"density/{rule}"] = np.tile(density_of(rule), (3, 1, 1))
        row[f"{metric}/{rule}"] = np.tile(metric_of(rule), (3, 1, 1)) + 1e-3 * np.arange(3)[:, None, None]
        row[f"error/{rule}"] = np.tile([0.3, 0.2, 0.1], (3, 1, 1)) * (0.5 if rule == "v2 corrected" else 1)
    return row


def test_curves_are_read_at_equal_density():
    row = made_up(lambda rule: [0.2, 0.4, 0.6], lambda rule: [0.5, 0.7, 0.9])
    results = Results({"one": row}, {}, np.arange(2), {})
    np.testing.assert_allclose(at_density(results, ["one"], "max", 0.3), [0.6, 0.601, 0.602])
    np.testing.assert_allclose(at_density(results, ["one"], "max", 0.8)[0], 0.95)  # towards dense attention
    assert np.isnan(at_density(results, ["one"], "max", 0.1)).all()
    np.testing.assert_allclose(at_alpha(results, "one", "recall"), [0.7, 0.701, 0.702])
    assert np.isnan(at_alpha(results, "one", "recall", "max", 0.3)).all()


def test_claims_of_made_up_results():
    better = {"max": 0.3, "top-p": 0.29, "top-k": 0.1, "window": -0.3}
    row = made_up(lambda rule: [0.2, 0.4, 0.6], lambda rule: np.array([0.5, 0.7, 0.9]) + 0.1 * better.get(rule, 0.0))
    row["alpha 0 to dense"] = np.full((3, 1), 1e-6)
    row["sorts/max"] = np.zeros((3, 1))
    row["cost of selection"] = np.full((3, 1), 2.0)
    row["density by length"] = np.tile(np.array([0.8, 0.4, 0.2, 0.1]), (3, 1, 1))
    results = Results(dict.fromkeys(HEADS, row), {}, np.arange(2), {})
    verdicts = {v.name: v for v in judge_all(CLAIMS, results)}
    said = {name: v.verdict for name, v in verdicts.items()}
    assert said["1a"] == said["1b"] == said["2c"] == said["3a"] == said["4"] == said["5a"] == said["5b"] == "holds"
    assert said["2b"] == said["3b"] == "fails"
    assert said["6a"] == said["6c"] == "holds"
    assert verdicts["4"].effect == pytest.approx(8)
    assert verdicts["2b"].effect == pytest.approx(0.06)
    risen = row | {"density/max": np.tile(np.array([0.2, 0.5, 0.4]), (3, 1, 1))}
    results = Results(dict.fromkeys(HEADS, risen), {}, np.arange(2), {})
    assert judge(next(claim for claim in CLAIMS if claim.name == "1b"), results).verdict == "fails"


def test_every_claim_has_rows_that_the_defaults_run():
    configs = study_file.configs_of([])
    rows = {*HEADS, *study_file.needle_rows(configs["recall"]), *study_file.sampler_rows(configs["rl"])}
    for claim in CLAIMS:
        assert set(claim.needs) <= rows, claim.name


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--alpha", "2"], "alpha: expected values in [0, 1], got 2"),
        (["--part", "video"], "part: expected planted, recall, rl or all, got 'video'"),
        (["--top-p", "-0.5"], "top_p: expected values in [0, 1], got -0.5"),
        (["--block", "12"], "block: expected a power of two, at least 2, got 12"),
        (["--part", "recall", "--length", "100"], "length: expected a multiple of block=16, 16 times or more, got 100"),
        (["--part", "recall", "--needles", "0"], "needles: expected values of at least 1, got 0"),
        (["--part", "rl", "--task", "chess"], "task: expected one of sorting, arithmetic, countdown, got 'chess'"),
        (["--part", "rl", "--mini-batches", "3"], "mini_batches: expected a divisor of prompts=16, got 3"),
        (["--part", "rl", "--chunk", "7"], "chunk: expected a divisor of updates=45, got 7"),
        (["--seeds", "0"], "seeds: expected at least 1, got 0"),
        (["--noise", "1.5"], "noise: expected a share in [0, 1], got 1.5"),
    ],
)
def test_a_bad_value_gets_one_line(tmp_path, capsys, argv, words):
    with pytest.raises(SystemExit) as stop:
        study.main(STUDY, ["--runs", str(tmp_path), *argv])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert words in said
    assert not any(tmp_path.iterdir())


def test_a_seed_gives_the_same_heads_in_every_row():
    """Rows differ in their pattern alone, so that they are compared at equal seeds."""
    config = dataclasses.replace(Config(part="planted"), length=256, block=16)
    heads = [planted_head(jax.random.key(0), kind, length=config.length, block=16, width=16) for kind in (0, 1)]
    np.testing.assert_array_equal(heads[0][2], heads[1][2])
    assert jnp.abs(heads[0][0] - heads[1][0]).max() > 1
