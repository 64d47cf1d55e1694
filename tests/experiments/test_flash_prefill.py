"""The FlashPrefill studies: their pieces are what they say, parts run, claims compute, bad values get one line."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rollax import envs
from rollax.envs.tokens import decode
from rollax.experiments import flash_prefill, flash_prefill_rl
from rollax.experiments.flash_prefill import (
    CLAIMS,
    PLANTED_ROWS,
    STUDY,
    Config,
    at_alpha,
    at_density,
    measure_recall,
    needle_rows,
    recall_model,
)
from rollax.experiments.harness import study
from rollax.experiments.harness.claims import judge, judge_all
from rollax.experiments.harness.loop import Results
from rollax.experiments.sparse_rules import (
    NETWORK_RULES,
    RULES,
    at_share,
    attend,
    attend_row_by_row,
    chosen_share,
    kept_blocks,
    selection_cost,
    sorts_of_selection,
)
from rollax.experiments.sparse_tasks import (
    FILLER,
    HEADS,
    KEYS,
    MEMORY,
    QUESTION,
    VALUES,
    attention_mass,
    planted_head,
    planted_targets,
    recall_sequence,
)
from rollax.kernels.flash_prefill import (
    PackedPrefillConfig,
    dense_attention,
    dense_mask,
    density,
    flash_prefill_packed,
)
from rollax.tests.support import compiled

SMALL_RECALL = ("--part", "recall", "--seeds", "2", "--length", "256", "--block", "8", "--width", "16", "--steps", "2",
                "--sequences", "1", "--needles", "1", "16", "--crossed", "16", "--questions", "16", "--crowd", "32",
                "--apart", "8", "--alpha", "0.1", "0.5")  # fmt: skip


@pytest.mark.slow  # a minute each, as in the slow run of test_reproduce.py
@pytest.mark.parametrize(
    ("run", "argv", "label", "claimed"),
    [
        (STUDY, STUDY.smoke, "planted", {"1a", "2b", "2f", "3b", "4", "5b", "6a", "9b"}),
        (STUDY, SMALL_RECALL, "recall", {"7a", "7b", "8a", "8b", "9d"}),
        (flash_prefill_rl.STUDY, flash_prefill_rl.STUDY.smoke, "sorting", {"10a", "10c", "10e", "11a"}),
    ],
)
def test_a_study_end_to_end(tmp_path, run, argv, label, claimed):
    study.main(run, [*argv, "--runs", str(tmp_path), "--name", "run"])
    folder = tmp_path / run.name / "run"
    found = json.loads((folder / "results.json").read_text())[label]
    verdicts = {claim["name"]: claim["verdict"] for claim in found["claims"]}
    assert claimed <= set(verdicts)
    if label == "planted":
        assert verdicts["3a"] == verdicts["3b"] == "holds"
        assert next(claim["effect"] for claim in found["claims"] if claim["name"] == "1a") < 1e-5
    assert (folder / f"curves_{label}.png").read_bytes().startswith(b"\x89PNG")
    for values in found["rows"].values():
        assert all(0 <= x <= 1 for x in values["density"])


# --- Planted heads --------------------------------------------------------------------------------------------------


def test_planted_heads_attend_where_they_were_told_to():
    """Attention beyond the sought blocks is small, and a map of mean keys tells the blocks apart."""
    n, block = 32, 16
    key = jax.random.key(3)
    head_of = compiled(partial(planted_head, length=n * block, block=block, width=32))
    draw = lambda: jax.random.fold_in(jax.random.split(key, 3)[0], 0)  # noqa: E731
    seen = compiled(lambda q, k: (*attention_mass(q, k, block=block, every=4), planted_targets(draw(), n)))
    for kind, head in enumerate(HEADS[:3]):
        q, k, v = head_of(key, kind)
        assert (q.shape, k.shape, v.shape) == ((512, 2, 32), (512, 1, 32), (512, 1, 32))
        mass, rows, targets = seen(q, k)
        np.testing.assert_allclose(mass.sum(-1), 1, rtol=1e-5)
        inside = (mass * targets[kind][rows // block]).sum(-1)[:, rows >= 2 * block]
        assert inside.mean() > 0.75, head
    assert not planted_targets(key, n)[-1].any()  # the diffuse head


@pytest.mark.parametrize("apart", [0, 1])
def test_heads_of_a_group_share_their_targets_or_not(apart):
    q, k, _ = planted_head(jax.random.key(3), HEADS.index("blocks"), apart, length=512, block=16, width=32)
    mass, _ = attention_mass(q, k, block=16, every=4)
    sought = mass > 0.1
    agree = (sought[0] & sought[1]).sum() / (sought[0] | sought[1]).sum()
    assert agree < 0.4 if apart else agree > 0.6


def test_vertical_anchors_and_slashes():
    vertical, slash, *_ = planted_targets(jax.random.key(0), 64)
    columns = np.flatnonzero(np.asarray(vertical).any(axis=0))
    assert len(columns) == 2
    assert columns.max() < 4  # the head is the same in short prompts
    i, j = np.nonzero(np.asarray(slash))
    assert set(i - j) == {0, 3, 9}


def test_a_seed_gives_the_same_heads_in_every_row():
    """Rows differ in their pattern alone, so that they are compared at equal seeds."""
    head_of = compiled(partial(planted_head, length=256, block=16, width=16))
    heads = [head_of(jax.random.key(0), kind) for kind in (0, 1)]
    np.testing.assert_array_equal(heads[0][2], heads[1][2])
    assert np.abs(heads[0][0] - heads[1][0]).max() > 1


# --- Rules ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [pytest.param("v2", marks=pytest.mark.slow), "v2 corrected"])
def test_packed_rule_is_the_public_operator(name):
    """Lists of packed tiles, repeated over their heads, and v1's attention give V2's output, corrected or not."""
    cfg = PackedPrefillConfig(alpha=0.3, block_size=16, tile_rows=32, sink_blocks=1, window_blocks=2, last_full_tiles=0)

    def both_ways(name):
        q, k, v = planted_head(jax.random.key(1), 2, length=256, block=16, width=16)
        mask = kept_blocks(RULES[name], q, k, 0.3, block=16)
        out = attend(q, k, v, mask, block=16, corrected=RULES[name].corrected)
        return out, density(mask), flash_prefill_packed(q, k, v, cfg, correction=RULES[name].corrected)

    out, share, (expected, stats) = compiled(both_ways, static_argnums=0)(name)
    np.testing.assert_allclose(out, expected, atol=2e-5)
    np.testing.assert_allclose(share, stats.density, rtol=1e-6)
    assert stats.density < 0.9


def test_reading_row_by_row_in_chunks_is_the_public_operator():
    """One tile a position, whole or chunk by chunk; nothing that comes later changes what a position reads."""
    q, k, v = compiled(lambda: planted_head(jax.random.key(1), 2, 1, length=256, block=16, width=16))()
    cfg = PackedPrefillConfig(alpha=0.3, block_size=16, tile_rows=2, sink_blocks=1, window_blocks=2, last_full_tiles=0)
    read = compiled(lambda q, k, v, alpha: attend_row_by_row(q, k, v, alpha, block=16, sink=1))
    packed = partial(flash_prefill_packed, cfg=cfg, correction=False, implementation="reference")
    out, share = read(q, k, v, 0.3)
    expected, stats = compiled(packed)(q, k, v)
    np.testing.assert_allclose(out, expected, atol=2e-5)
    np.testing.assert_allclose(share, stats.density, rtol=1e-5)
    later = np.where(np.arange(256) < 100, 1, 3).astype(np.float32)[:, None, None]
    np.testing.assert_allclose(read(*(x * later for x in (q, k, v)), 0.3)[0][:100], out[:100], atol=2e-5)
    np.testing.assert_allclose(read(q, k, v, 0.0)[0], compiled(dense_attention)(q, k, v)[0], atol=2e-5)


def test_rules_keep_what_their_numbers_say():
    settings = (("max", 1.0), ("top-k", 0.3), ("top-p", 1.0), ("window", 4))

    def kept():
        q, k, _ = planted_head(jax.random.key(1), 1, length=512, block=16, width=16)
        masks = {name: kept_blocks(RULES[name], q, k, number, block=16) for name, number in settings}
        return masks, {name: density(mask) for name, mask in masks.items()}

    masks, shares = compiled(kept)()
    assert shares["max"] < shares["top-k"] < shares["top-p"]
    assert shares["top-p"] > 0.95
    np.testing.assert_array_equal(
        masks["window"][0, 20], (np.arange(32) == 0) | ((np.arange(32) > 16) & (np.arange(32) <= 20))
    )


def test_correlation_is_that_of_the_visible_blocks():
    score, mass = jax.random.uniform(jax.random.key(0), (2, 2, 6, 6))
    score, mass = score.at[0, 3, :4].set(0.5), mass + score  # a tile without spread does not count
    tiles = [(h, t) for h in range(2) for t in range(1, 6) if (h, t) != (0, 3)]
    expected = np.mean([np.corrcoef(score[h, t, : t + 1], mass[h, t, : t + 1])[0, 1] for h, t in tiles])
    np.testing.assert_allclose(flash_prefill.correlation(score, mass, dense_mask(6)), expected, rtol=1e-5)


def test_what_is_read_in_any_case_is_not_chosen():
    dense = np.tril(np.ones((6, 6), bool))
    forced = dense & ((np.arange(6) == 0) | (np.arange(6) > np.arange(6)[:, None] - 2))
    assert chosen_share(jnp.asarray(dense), 1) == 1
    assert chosen_share(jnp.asarray(forced), 1) == 0
    one_more = forced.copy()
    one_more[5, 2] = True
    np.testing.assert_allclose(chosen_share(jnp.asarray(one_more), 1), 1 / (dense & ~forced).sum())


def test_the_threshold_sorts_nothing():
    small = dict(block=16, width=16, length=256)
    sorts = {name: sorts_of_selection(RULES[name], **small) for name in ("max", "top-k", "top-p")}
    assert sorts["max"] == 0 < min(sorts["top-k"], sorts["top-p"])


def test_selection_costs_what_its_products_cost_and_little_more():
    """The products of queries and mean keys alone are (n + 1) / n units below the diagonal and 2 on the whole map."""
    causal, whole = selection_cost(block=64, width=64, length=64 * 16)
    assert 17 / 16 < causal < 1.4  # keys become float32 for their means: .06 where tiles see eight blocks
    assert 2 < whole < 2.5
    assert selection_cost(block=128, width=128, length=128 * 16)[0] < causal  # the rest does not grow with the width


# --- Recall ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("needle", "noise", "apart"), [(1, 0.0, 0), (3, 0.0, 1), (6, 0.5, 0), (40, 0.0, 0)])
def test_recall_sequences_can_be_answered(needle, noise, apart):
    """Every question has its memory, in needles of the right width at multiples of it, and no memory is a lie."""
    length, questions = 512, 14
    draw = jax.jit(recall_sequence, static_argnames="length")
    tokens, answers, asked = map(
        np.asarray, draw(jax.random.key(needle), needle, questions, noise, apart, length=length)
    )
    half = length // 2
    assert asked.sum() == questions
    assert not asked[:half].any()
    assert (asked.reshape(-1, 16).sum(1).max() == 1) == bool(apart)
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


@pytest.mark.parametrize(
    "names", [("v2 causal", "max, half blocks"), pytest.param(("v2 corrected",), marks=pytest.mark.slow)]
)
def test_a_network_that_reads_all_blocks_answers_as_a_dense_one(monkeypatch, names):
    """At alpha 0 each kind of attention that a rule swaps in is dense attention."""
    rules = {name: NETWORK_RULES[name] for name in names}
    monkeypatch.setattr(flash_prefill, "NETWORK_RULES", rules)
    config = dataclasses.replace(Config(part="recall"), length=128, block=8, width=16, sequences=1, alpha=(0.0,))
    params = recall_model(config).init(jax.random.key(0))
    measure = jax.jit(lambda key, numbers: measure_recall(key, params, numbers, config))
    found = measure(jax.random.key(1), needle_rows(dataclasses.replace(config, questions=32, needles=(4,)))["needle 4"])
    for name in rules:
        np.testing.assert_allclose(found[f"accuracy/{name}"][0], found["accuracy/dense"][0], atol=1e-6)
        np.testing.assert_allclose(found[f"density/{name}"], 1, rtol=1e-6)


# --- Claims ---------------------------------------------------------------------------------------------------------


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
    row = made_up(lambda rule: [0.2, 0.4, 0.7], lambda rule: [0.5, 0.7, 0.9])
    results = Results({"one": row}, {}, np.arange(2), {})
    np.testing.assert_allclose(at_density(results, ["one"], "max", 0.3), [0.6, 0.601, 0.602])
    np.testing.assert_allclose(at_density(results, ["one"], "max", 0.85)[0], 0.95)  # towards dense attention
    assert np.isnan(at_density(results, ["one"], "max", 0.1)).all()
    np.testing.assert_allclose(at_alpha(results, "one", "recall"), [0.7, 0.701, 0.702])
    assert np.isnan(at_alpha(results, "one", "recall", "max", 0.3)).all()


def test_tables_say_where_every_setting_stands():
    row = made_up(lambda rule: [0.2, 0.4, 0.7], lambda rule: [0.5, 0.7, 0.9], "accuracy")
    found = STUDY.tables(Results({"one": row, "two": row}, {}, np.arange(2), {}))
    assert list(found) == ["relative L2 error of the output @ density", "accuracy @ density"]
    head, (dense, first, *lines) = found["accuracy @ density"]
    assert head == ["rule", "setting", "one", "two"]
    assert dense == ["dense", "", *["1.000 ± 0.000 @ 1.00"] * 2]
    assert first == ["max", "alpha 0.5", *["0.501 ± 0.002 @ 0.20"] * 2]
    assert lines[-1][:3] == ["window", "window 0.02", "0.901 ± 0.002 @ 0.70"]


def test_a_network_that_has_not_learnt_gives_no_verdict():
    row = made_up(lambda rule: [0.2, 0.4, 0.7], lambda rule: [0.1, 0.1, 0.1], "accuracy")
    claim = next(claim for claim in CLAIMS if claim.name == "6b")
    for dense, verdict in ((1.0, "holds"), (0.1, "inconclusive")):
        rows = dict.fromkeys(claim.needs, row | {"accuracy/dense": np.full((3, 1, 1), dense)})
        assert judge(claim, Results(rows, {}, np.arange(2), {})).verdict == verdict


def test_a_curve_is_not_read_across_a_wide_gap():
    x, y = np.array([[1.0, 0.1, 0.3]]), np.array([[3.0, 1.0, 2.0]])
    np.testing.assert_allclose(at_share(x, y, 0.2), 1.5)
    np.testing.assert_allclose([at_share(x, y, share)[0] for share in (0.1, 0.3)], [1.0, 2.0])
    assert np.isnan([at_share(x, y, share)[0] for share in (0.05, 0.6, 1.1)]).all()


def test_claims_of_made_up_results():
    better = {"max": 0.3, "top-p": 0.29, "top-k": 0.1, "window": -0.3}
    row = made_up(lambda rule: [0.14, 0.4, 0.7], lambda rule: np.array([0.5, 0.7, 0.9]) + 0.1 * better.get(rule, 0.0))
    constants = {"alpha 0 to dense": 1e-6, "sorts": 0.0, "cost of selection": 1.05, "cost of the whole map": 2.0}
    row |= {name: np.full((3, 1), value) for name, value in constants.items()}
    row["chosen by length"] = np.tile(np.array([0.8, 0.4, 0.2, 0.1]), (3, 1, 1))
    results = Results(dict.fromkeys(PLANTED_ROWS, row), {}, np.arange(2), {})
    verdicts = {v.name: v for v in judge_all(CLAIMS, results)}
    said = {name: v.verdict for name, v in verdicts.items()}
    assert {said[name] for name in ("1a", "1b", "2d", "2f", "2g", "3a", "3b", "4", "5a", "5b", "6a", "6c")} == {"holds"}
    assert {said[name] for name in ("2a", "2b", "2c", "3c")} == {"fails"}
    assert verdicts["4"].effect == pytest.approx(8)
    assert verdicts["2c"].effect == pytest.approx(0.06)
    risen = row | {"density/max": np.tile(np.array([0.2, 0.5, 0.4]), (3, 1, 1))}
    results = Results(dict.fromkeys(HEADS, risen), {}, np.arange(2), {})
    assert judge(next(claim for claim in CLAIMS if claim.name == "1b"), results).verdict == "fails"


def made_up_rl(gained):
    """Three seeds, two evaluations; the ratio doubles with alpha, correction halves it, the arms end .02, .1 below."""
    alphas, zero = np.array([0.1, 0.5, 1.0]), np.zeros((3, 2, 3))
    measured = {"measured at": zero + alphas}
    for name in flash_prefill_rl.PREFILLS:
        ratio = alphas * (0.5 if name == "v2 corrected" else 1) + 1e-3 * np.arange(3)[:, None, None]
        measured |= {f"density/{name}": zero + 1 - 0.5 * alphas, f"log ratio/{name}": zero + ratio}
        measured[f"outside/{name}"] = zero + 0.1 * ratio
    ends = {"dense": gained, "alpha 0.1": gained - 0.02, "alpha 0.5": gained - 0.05, "alpha 1": gained - 0.1}
    jitter = 1e-3 * np.arange(3)[:, None]
    held_out = {row: measured | {"reward": np.array([[0.2, 0.2 + end]]) + jitter * [0, 1]} for row, end in ends.items()}
    return Results({row: {} for row in ends}, held_out, np.arange(2), {})


def test_claims_on_the_ratio_and_on_learning():
    said = {v.name: v for v in judge_all(flash_prefill_rl.CLAIMS, made_up_rl(0.4))}
    assert {said[name].verdict for name in ("10a", "10b", "10c", "10e", "10g", "11a", "11b")} == {"holds"}
    assert said["10f"].verdict == "fails"
    assert said["10c"].effect == pytest.approx(0.25)
    assert said["11a"].effect == pytest.approx(0.02 / 0.401, rel=1e-3)
    nothing_learnt = {v.name: v.verdict for v in judge_all(flash_prefill_rl.CLAIMS, made_up_rl(0.03))}
    assert nothing_learnt["11a"] == nothing_learnt["11b"] == "inconclusive"
    share = flash_prefill_rl.at_density(made_up_rl(0.4), "v1", 0.85)
    np.testing.assert_allclose(share, 0.3 + 1e-3 * np.arange(3))


def test_every_claim_has_rows_that_the_defaults_run():
    rows = {*PLANTED_ROWS, *needle_rows(flash_prefill.configs_of([])["recall"])}
    assert all(set(claim.needs) <= rows for claim in CLAIMS)
    rows = set(flash_prefill_rl.sampler_rows(flash_prefill_rl.Config()))
    assert all(set(claim.needs) <= rows for claim in flash_prefill_rl.CLAIMS)


# --- RL -------------------------------------------------------------------------------------------------------------


def test_few_shot_prompts_read_as_text():
    """Solved questions, each right, then the question; shorter prompts are padded at the right."""
    env = flash_prefill_rl.few_shot(envs.sorting(4), 5)
    lengths = set()
    reset = jax.jit(env.reset)
    for seed in range(6):
        state, observation = reset(jax.random.key(seed))
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


@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=pytest.mark.slow if x in ("v2", "v2 corrected") else ()) for x in flash_prefill_rl.PREFILLS],
)
def test_prefills_of_the_sampler(name):
    """At alpha 0 each is dense; above, one list for two heads or a list each; padding changes nothing."""
    config = flash_prefill_rl.Config(block=8)
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (3 * jax.random.normal(key, (1, 64, heads, 16)) for key, heads in zip(keys, (2, 1, 1), strict=True))
    length = jnp.array([50])
    dense = dense_attention(q[0], k[0], v[0], length=50)[0]
    densities = []

    @jax.jit
    def prefill(alpha, q, k, v):
        return flash_prefill_rl.prefill_of(name, alpha, config, densities)(q, k, v, length)[0, :50]

    for alpha in (0.0, 0.5):
        out = prefill(alpha, q, k, v)
        np.testing.assert_allclose(out, prefill(alpha, *(x.at[:, 50:].set(7) for x in (q, k, v))), atol=1e-5)
        assert (jnp.abs(out - dense[:50]).max() > 0.05) == (alpha > 0)
        if alpha == 0:
            np.testing.assert_allclose(out, dense[:50], atol=2e-5)
    assert len(densities) == 1  # one layer, one trace


@pytest.mark.slow  # half a minute of compiling
def test_on_one_policy_the_ratio_shows_the_prefill_alone(monkeypatch):
    """1 at alpha 0 whatever the parameters, and not where blocks are left out."""
    monkeypatch.setattr(flash_prefill_rl, "PREFILLS", ("v1", "v2 causal"))
    small = dict(width=16, shots=5, steps=0, prompts=2, samples=2, eval_prompts=2, ratio_prompts=8)
    train = flash_prefill_rl.make_train(flash_prefill_rl.Config(measured=(0.0, 1.0), **small))
    state = jax.jit(train.init)(jax.random.key(0))
    state = state._replace(params=jax.tree.map(lambda x: 4 * x, state.params))  # sharp attention
    seen = jax.jit(train.evaluate)(state, flash_prefill_rl.Sampler(0.0, 1e-3, 0.2))
    for name in ("v1", "v2 causal"):
        dense, sparse = seen[f"log ratio/{name}"]
        assert dense < 1e-4
        assert sparse > 1e-2
        np.testing.assert_allclose(seen[f"density/{name}"][0], 1, rtol=1e-6)
        assert seen[f"density/{name}"][1] < 0.8


# --- The command line -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--alpha", "2"], "alpha: expected values in [0, 1], got 2"),
        (["--part", "video"], "part: expected planted, recall or all, got 'video'"),
        (["--top-p", "-0.5"], "top_p: expected values in [0, 1], got -0.5"),
        (["--block", "12"], "block: expected a power of two, at least 2, got 12"),
        (["--part", "recall", "--length", "100"], "length: expected an even multiple of block=16, 16 times or more"),
        (["--part", "recall", "--needles", "0"], "needles: expected values of at least 1, got 0"),
        (["--part", "recall", "--needles", "600"], "needles: expected values in [1, 512], got 600"),
        (["--part", "recall", "--apart", "33"], "apart: expected a value in [1, 32], got 33"),
        (["--seeds", "0"], "seeds: expected at least 1, got 0"),
        (["--noise", "1.5"], "noise: expected a value in [0, 1], got 1.5"),
        (["rl", "--task", "chess"], "task: expected one of sorting, arithmetic, countdown, got 'chess'"),
        (["rl", "--prefill", "v3"], "prefill: expected one of v1, v2, v2 corrected, v2 causal, got 'v3'"),
        (["rl", "--mini-batches", "3"], "mini_batches: expected a divisor of prompts=16, got 3"),
        (["rl", "--chunk", "7"], "chunk: expected a divisor of updates=60, got 7"),
        (["rl", "--measured", "1.5"], "measured: expected values in [0, 1], got 1.5"),
    ],
)
def test_a_bad_value_gets_one_line(tmp_path, capsys, argv, words):
    run, argv = (flash_prefill_rl.STUDY, argv[1:]) if argv[0] == "rl" else (STUDY, argv)
    with pytest.raises(SystemExit) as stop:
        study.main(run, ["--runs", str(tmp_path), *argv])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert words in said
    assert not any(tmp_path.iterdir())


def test_both_studies_are_found_and_their_helpers_are_none():
    names = study.study_names()
    assert {"flash_prefill", "flash_prefill_rl"} <= set(names)
    assert not {"sparse_rules", "sparse_tasks"} & set(names)
