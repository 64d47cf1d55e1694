"""RetroAgent: lessons and their numbers, episodes of scripts and of the base model, arms that do what they say."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rollax import envs
from rollax.agents import score
from rollax.envs.hidden_clusters import IS_FIRST, IS_SECOND, NO_LESSON, NOT_FIRST, NOT_SECOND
from rollax.envs.scripts import scripted_episode
from rollax.experiments import retroagent, retroagent_base
from rollax.experiments.harness.loop import Results

LEVEL = (4, 3)
SMALL = retroagent.Config(
    num_first=4, num_second=3, tasks=4, group=4, width=16, heads=2, layers=1, updates=2, chunk=2, eval_samples=1,
    base_steps=80, base_batch=8, base_lr=1e-2,
)  # fmt: skip


def start(key, config):
    """Parameters of a base model that knows nothing."""
    model = retroagent_base.small_model(config, envs.household(*LEVEL))
    heads = retroagent_base.heads_init(key, config.width, retroagent_base.NUM_LESSONS)
    return {"policy": model.init(key), "heads": heads}


@pytest.fixture(scope="module")
def fresh():
    return jax.jit(functools.partial(start, config=SMALL))(jax.random.key(0))


@pytest.mark.parametrize(
    "trained", [False, pytest.param(True, marks=pytest.mark.slow)], ids=lambda x: "trained" if x else "fresh"
)
def test_a_base_model_is_kept(tmp_path, monkeypatch, trained, fresh):
    monkeypatch.setattr(retroagent_base, "CACHE", tmp_path)
    if not trained:
        monkeypatch.setattr(retroagent_base, "pretrain", lambda key, config: fresh)
    params = retroagent_base.base_model(SMALL)
    again = retroagent_base.base_model(SMALL)  # read, not trained
    assert all(map(np.array_equal, jax.tree.leaves(params), jax.tree.leaves(again)))
    assert len(list(retroagent_base.CACHE.glob("*.npz"))) == 1
    moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), params, fresh)
    assert (max(jax.tree.leaves(moved)) > 0) == trained
    monkeypatch.setattr(retroagent_base, "pretrain", lambda key, config: {"key": jax.random.key_data(key)})
    changed = retroagent_base.base_model(dataclasses.replace(SMALL, base_seed=1))  # another one, and its seed's own
    np.testing.assert_array_equal(changed["key"], jax.random.key_data(jax.random.key(1)))


def test_every_lesson_of_a_level_has_a_number_and_comes_back():
    first = [NO_LESSON, *range(IS_FIRST, IS_FIRST + 4), *range(NOT_FIRST, NOT_FIRST + 4)]
    second = [NO_LESSON, *range(IS_SECOND, IS_SECOND + 3), *range(NOT_SECOND, NOT_SECOND + 3)]
    lessons = np.array([[a, b] for a in first for b in second])
    numbers = np.asarray(retroagent_base.lesson_number(lessons, *LEVEL))
    assert sorted(numbers) == list(range((1 + 2 * 4) * (1 + 2 * 3)))
    np.testing.assert_array_equal(retroagent_base.numbered_lesson(jnp.asarray(numbers), *LEVEL), lessons)


def test_invented_statements_come_at_their_rate_and_stay_in_their_slots():
    truth = jnp.tile(jnp.asarray([[IS_FIRST + 2, NO_LESSON]]), (4000, 1))
    told = np.asarray(retroagent_base.hallucinate(jax.random.key(0), truth, 0.3, *LEVEL))
    np.testing.assert_array_equal(retroagent_base.hallucinate(jax.random.key(0), truth, 0.0, *LEVEL), truth)
    changed = (told != np.asarray(truth)).mean(axis=0)
    assert changed[1] == pytest.approx(0.3, abs=0.03)  # silence is never invented
    assert changed[0] == pytest.approx(0.3 * 7 / 8, abs=0.03)  # an eighth of the inventions happen to be true
    assert (told[:, 0] >= IS_FIRST).all() and (told[:, 0] < IS_SECOND).all()


def test_scripted_episodes_are_scored_like_any_others():
    """The expert wins in four turns; a model's log-prob of an episode is that of its tokens fed one by one."""
    env = envs.household(*LEVEL)
    model = retroagent_base.small_model(SMALL, env)
    params = jax.jit(model.init)(jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), 3)
    play = jax.vmap(lambda key: scripted_episode(key, env, env.expert))
    trajectory = jax.jit(lambda keys: retroagent_base.with_positions(play(keys), env.spec))(keys)
    assert (trajectory.reward.sum(axis=1) == 10).all()
    assert (trajectory.mask.sum(axis=1) == 4).all()
    log_prob, _ = jax.jit(functools.partial(score, model, env=env))(params, trajectory=trajectory)
    apply = jax.jit(model.apply)
    for row in range(3):
        real = np.asarray(trajectory.positions[row]) >= 0
        np.testing.assert_array_equal(np.asarray(trajectory.positions[row])[real], np.arange(real.sum()))
        tokens = trajectory.tokens[row][real][None]
        logits, _ = apply(params, tokens, jnp.arange(tokens.shape[1])[None])
        plain = jnp.take_along_axis(jax.nn.log_softmax(logits[0, :-1]), tokens[0, 1:, None], axis=1)[:, 0]
        own = np.asarray(trajectory.mask[row])[real][1:]
        np.testing.assert_allclose(np.asarray(log_prob[row])[np.asarray(trajectory.mask[row])], plain[own], atol=1e-5)


# What is packed differs in length in the shop alone.
@pytest.mark.parametrize("bench", [pytest.param("household", marks=pytest.mark.slow), "shop"])
def test_episodes_read_without_their_padding_have_the_log_probs_that_they_were_sampled_with(bench):
    make, _, answer = retroagent_base.BENCHES[bench]
    env = make(*LEVEL)
    model = retroagent_base.small_model(SMALL, env)
    params = {"policy": jax.jit(model.init)(jax.random.key(0))}

    def told(params, key):
        started = jax.vmap(lambda k: scripted_episode(k, env, env.demonstrate))(jax.random.split(key, 16))
        trajectory = retroagent_base.with_positions(started, env.spec)
        episodes = retroagent_base.pack(trajectory, env.spec, answer)
        return trajectory, episodes, retroagent_base.read(model, params, episodes)

    trajectory, episodes, said = jax.jit(told)(params, jax.random.key(1))
    per_turn = lambda x: x.reshape(16, env.spec.max_turns, -1)[..., -1]  # noqa: E731
    active = per_turn(trajectory.mask)
    assert active[:, 0].all() and (bench == "shop" or not active.all())
    for want, got in zip(
        jax.jit(functools.partial(score, model, env=env))(params["policy"], trajectory=trajectory), said, strict=False
    ):
        np.testing.assert_allclose(np.asarray(got)[active], np.asarray(per_turn(want))[active], atol=1e-5)
    for row in range(16):
        ids = np.asarray(trajectory.tokens[row])[np.asarray(trajectory.positions[row]) >= 0]
        end = int(episodes.action[row].max()) + 1
        np.testing.assert_array_equal(episodes.tokens[row, :end], ids[:end])
        assert (episodes.positions[row, end:] == -1).all()


def test_arms_of_one_program_do_what_they_say(fresh):
    """All of them start alike; the plain arm shows no lesson, a full group shows one as soon as there are any."""
    tossing = jax.tree.map(jnp.zeros_like, fresh["heads"]["outcome"])  # else it may be right everywhere, and not learn
    train = retroagent.make_train(SMALL, fresh | {"heads": fresh["heads"] | {"outcome": tossing}})
    arms = {name: retroagent.ARMS[name] for name in ("grpo", "capability", "ucb, full", "dual, trained")}
    stacked = jax.tree.map(lambda *x: jnp.asarray(x), *arms.values())
    state = jax.jit(train.init)(jax.random.key(0))
    after, told = jax.jit(jax.vmap(train.advance, in_axes=(None, 0)))(state, stacked)
    told = {name: np.asarray(x) for name, x in told.items()}
    assert {x.shape for x in told.values()} == {(4, 2)}
    assert (told["intrinsic reward"][1] > 0).any()
    np.testing.assert_array_equal(told["success"][:, 0], told["success"][0, 0])  # one start, one stream of keys
    assert (told["reflections right"][:3] == 1).all()  # told the outcome
    assert (told["lessons"] > 0).all()
    policies = [jax.tree.map(lambda x, i=i: x[i], after.params["policy"]) for i in range(4)]
    apart = lambda a, b: max(jax.tree.leaves(jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), a, b)))  # noqa: E731
    assert apart(policies[0], state.params["policy"]) > 0
    assert apart(policies[0], policies[1]) > 0  # the intrinsic reward reaches the policy
    moved = {
        name: np.abs(np.asarray(head["kernel"] - state.params["heads"][name]["kernel"])).max(axis=(1, 2))
        for name, head in after.params["heads"].items()
    }
    assert moved["outcome"][3] > 0 and not moved["outcome"][:3].any()  # only a trained reflection moves its head
    assert not moved["first"].any()
    for arm in range(4):
        assert (np.asarray(after.baseline[arm]) >= 0).all()
    evaluated = jax.jit(jax.vmap(train.evaluate, in_axes=(0, 0)))(after, stacked)
    for name in ("memory off", "memory on", "elsewhere", "elsewhere, told"):
        assert ((np.asarray(evaluated[name]) >= 0) & (np.asarray(evaluated[name]) <= 1)).all()


def test_wrong_lessons_are_wrong_of_both_facts_and_not_all_by_the_same():
    world = envs.household_world(jax.random.key(0), *LEVEL)
    lesson = np.asarray(retroagent_base.wrong_lessons(jax.random.key(1), world, *LEVEL))
    for said, base, fact, size in zip(lesson.T, (IS_FIRST, IS_SECOND), world.facts[1:3], LEVEL, strict=True):
        off = (said - base - np.asarray(fact)[world.name]) % size
        assert (said >= base).all() and (said < base + size).all()
        assert set(off) == set(range(1, size))


@pytest.mark.slow  # read as they are scored above, scored as they were sampled in agents/test_generation.py
def test_played_episodes_are_read_with_the_log_probs_that_they_were_sampled_with():
    world = envs.household_world(jax.random.key(0), *LEVEL)
    env = envs.household(world=world)
    model = retroagent_base.small_model(SMALL, env)
    params = {"policy": jax.jit(model.init)(jax.random.key(0))}
    lesson = jnp.full((8, 2), NO_LESSON)

    @jax.jit
    def run(params):
        played = retroagent_base.play_tasks(jax.random.key(1), model, params["policy"], env, jnp.arange(8), lesson)
        return played, retroagent_base.read(model, params, retroagent_base.pack(played, env.spec, 1))

    played, said = run(params)
    active = np.asarray(played.info["active"])
    sampled = np.asarray(played.full_log_prob).reshape(8, env.spec.max_turns, -1)[..., -1]
    np.testing.assert_allclose(np.asarray(said.log_prob)[active], sampled[active], atol=1e-5)


@pytest.mark.slow  # each environment's own tests have its expert win, and its pictures
def test_the_expert_wins_an_episode_of_every_world():
    episodes = {e.title: e for e in retroagent_base.expert_episodes(jax.random.key(0))}
    assert len(episodes) == 5
    for title, episode in episodes.items():
        if "sokoban" in title or "minesweeper" in title:
            assert episode.frames.dtype == np.uint8 and episode.frames.ndim == 4 and len(episode.frames) > 2
            assert (episode.frames[1:] != episode.frames[:-1]).any(axis=(1, 2, 3)).all()
        else:
            assert episode.frames[0].endswith(("Won.", "You won!")), title
        assert episode.reward > 5, title


@pytest.mark.slow
def test_lessons_are_of_the_task_or_its_like_and_a_poisoned_memory_is_wrong():
    train = retroagent.make_train(SMALL, jax.jit(retroagent_base.pretrain, static_argnums=1)(jax.random.key(0), SMALL))
    state = jax.jit(train.init)(jax.random.key(0))
    clean, bad = (retroagent.ARMS["similarity, half"]._replace(poison=p) for p in (0, 1))
    advance = jax.jit(train.advance)
    lessons = [advance(state, jax.tree.map(jnp.asarray, n))[1]["lessons"] for n in (clean, bad)]
    assert (np.asarray(lessons[1]) >= retroagent.TASKS).all() and (np.asarray(lessons[0]) < retroagent.TASKS).all()


def test_measures():
    held_out = {"memory off": np.array([[0.0, 0.05, 0.2], [0.0, 0.0, 0.0]])}
    results = Results({}, {"a": held_out}, np.array([0, 10, 20]), {})
    np.testing.assert_array_equal(retroagent.steps_to(0.1)(results, "a"), [20, np.nan])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--bench", "office"], "bench: expected one of household, shop, got 'office'"),
        (["--group", "5"], "group: expected an even number of at least 2"),
        (["--num-first", "17"], "num_first: expected 2 to 16, got 17"),
        (["--arms", "sarsa"], "arms: expected some of"),
        (["--gamma", "1.5"], "gamma: expected 0 to 1, got 1.5"),
    ],
)
def test_bad_options_get_one_line(argv, words, capsys):
    with pytest.raises(SystemExit) as stop:
        retroagent.configs_of(argv)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and words in said and said.count("\n") == 1
