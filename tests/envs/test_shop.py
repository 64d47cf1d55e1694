"""Shop against a stepper in plain Python, its tables, expert and demonstrator."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rollax.envs import draw_lesson, scripted_episode, shop, shop_world
from rollax.envs.hidden_clusters import IS_FIRST, IS_SECOND, LEVELS, NO_LESSON, NOT_FIRST, NOT_SECOND, NUM_LESSONS
from rollax.envs.shop import (
    BUY,
    CAP,
    CATEGORIES,
    CATEGORY,
    COLOUR,
    FILTER,
    LESSON,
    LESSONS,
    MATERIAL,
    NEXT,
    OPEN,
    PAD,
    PRICE,
    SEARCH,
    VOCAB,
    VOCAB_SIZE,
    lesson,
    progress,
    score,
)

HORIZON = 8  # longer than usual, so that random play gets further


@pytest.fixture(scope="module")
def world():
    return shop_world(jax.random.key(7))


@pytest.fixture(scope="module")
def played(world):
    """Random play that often makes sense, each episode with a random lesson, and the world as an argument."""

    @jax.jit
    def play(keys, world):
        environment = shop(world=world, horizon=HORIZON)

        def act(key, state):
            kind_key, token_key, key = jax.random.split(key, 3)
            token = jax.random.randint(token_key, (3,), 0, jnp.asarray([VOCAB_SIZE + 2, 6, 2]))
            # Anything at all; the next page, an item on it or a purchase, right or not; or what makes sense.
            choices = [token[0], NEXT, OPEN + token[1], BUY]
            kind = jax.random.choice(kind_key, 6, p=jnp.asarray([0.05, 0.1, 0.15, 0.15, 0.2, 0.35]))
            other = jnp.select([kind == i for i in range(4)], choices, 0)[None]
            sensible = jnp.where(kind == 4, environment.demonstrate(key, state), environment.expert(key, state))
            return jnp.where(kind < 4, other, sensible)

        def one(key):
            return scripted_episode(key, environment, act, lesson=draw_lesson(key, 12, 5))

        return jax.vmap(one)(keys)

    return jax.tree.map(np.asarray, play(jax.random.split(jax.random.key(0), 3000), world))


def stepper(state, actions, words=12, filters=5):
    """The rules once more, in words: yields (said, reward, terminated, truncated, progress, lesson, won, score)."""
    colour, material, cap = (int(x) for x in state.goal)
    right_word, right_filter = int(state.word), int(state.filter)
    everything = [(int(i) // 16, int(i) // 4 % 4, int(i) % 4) for i in state.catalogue]
    listed, page, opened, bought = None, 0, None, None
    word_lesson, filter_lesson = NO_LESSON, NO_LESSON
    searched = narrowed = viewed = over = False

    def met(item):
        return [item[0] == colour, item[1] == material, item[2] <= cap]

    for turn, token in enumerate(actions):
        said, reward = None, 0.0
        if not over:
            said, shows = ["nothing"], False
            if SEARCH <= token < SEARCH + words:
                page, opened = 0, None
                if token - SEARCH == right_word:
                    listed, shows, searched = everything, True, True
                    word_lesson = IS_FIRST + right_word
                else:
                    listed, said = None, ["no-results"]
                    word_lesson = word_lesson if searched else NOT_FIRST + token - SEARCH
            elif FILTER <= token < FILTER + filters and listed:
                page, opened = 0, None
                if token - FILTER == right_filter:
                    listed, shows, narrowed = [item for item in everything if all(met(item)[:2])], True, True
                    filter_lesson = IS_SECOND + right_filter
                else:
                    listed, said = None, ["no-results"]
                    filter_lesson = filter_lesson if narrowed else NOT_SECOND + token - FILTER
            elif token == NEXT and listed and len(listed) > 4 * page + 4:
                page, opened, shows = page + 1, None, True
            elif OPEN <= token < OPEN + 4 and listed and 4 * page + token - OPEN < len(listed):
                opened, said = listed[4 * page + token - OPEN], ["item"]
                viewed |= all(met(opened))
            elif token == BUY and opened:
                bought, said = opened, ["bought"]
                reward = 10.0 if all(met(bought)) else 0.0
            if shows:
                said = ["results"]
                for item in listed[4 * page : 4 * page + 4]:
                    said += [VOCAB[base + value] for base, value in zip((COLOUR, MATERIAL, PRICE), item, strict=True)]
            terminated = bought is not None
            truncated = not terminated and turn + 1 == HORIZON
            over = terminated or truncated
        won = bought is not None and all(met(bought))
        share = sum(met(bought)) / 3 if bought else 0.0
        subtasks = [searched, narrowed, viewed, won]
        yield said, reward, terminated, truncated, subtasks, [word_lesson, filter_lesson], won, share


def test_agrees_with_a_stepper_in_plain_python(played):
    ends = {"won": 0, "wrong item": 0, "late": 0, "second page": 0}
    for i in range(1000):
        state, step = jax.tree.map(lambda x, i=i: x[i], (played.state, played.step))
        alive = True
        for t, told in enumerate(stepper(state, played.action[i, :, 0].tolist())):
            said, reward, terminated, truncated, subtasks, learned, won, share = told
            assert played.mask[i, t] == alive
            ids, length = step.observation.ids[t], step.observation.length[t]
            assert [VOCAB[token] for token in ids[:length]] == (said if alive else [])
            assert np.all(ids[length:] == PAD)
            if alive:
                assert state.actions[t] == played.action[i, t, 0]
                np.testing.assert_array_equal(state.observations[t], ids)
            assert (step.reward[t], step.terminated[t], step.truncated[t]) == (reward, terminated, truncated)
            assert step.info["progress"][t].tolist() == subtasks and step.info["lesson"][t].tolist() == learned
            assert step.info["won"][t] == won and abs(step.info["score"][t] - share) < 1e-6
            word = VOCAB[token] if (token := int(played.action[i, t, 0])) < len(VOCAB) else "?"
            valid = word.startswith(("search-", "filter-", "open-")) or word in ("next", "buy")
            assert step.info["valid"][t] == valid
            ends["second page"] += alive and word == "next" and said[0] == "results"
            alive &= not (terminated or truncated)
        ends["won"] += won
        ends["wrong item"] += terminated and not won
        ends["late"] += truncated
    assert min(ends.values()) > 30, ends


def test_first_observation_and_the_tables_of_the_world(played, world):
    state, first = played.state, jax.tree.map(lambda x: x[:, 0], played.observation)
    np.testing.assert_array_equal(first.length, 6)
    wanted = (state.goal + np.asarray([COLOUR, MATERIAL, CAP])).T
    np.testing.assert_array_equal(
        first.ids[:, :6], np.stack([CATEGORY + state.name, *wanted, *(LESSON + state.shown).T], axis=1)
    )
    np.testing.assert_array_equal(state.name, world.name[state.task])
    np.testing.assert_array_equal(state.goal, world.goal[state.task])
    np.testing.assert_array_equal(state.word, world.facts.first[state.name])
    np.testing.assert_array_equal(state.filter, world.facts.second[state.name])
    np.testing.assert_array_equal(state.catalogue, world.catalogue[world.facts.cluster[state.name]])
    assert set(state.task) == set(range(256))
    np.testing.assert_array_equal(np.sort(world.catalogue, axis=1), np.broadcast_to(np.arange(64), (8, 64)))
    assert len({tuple(row) for row in np.asarray(world.catalogue).tolist()}) == 8
    np.testing.assert_array_equal(np.bincount(world.name), 4)


def test_lessons_are_true_and_progress_never_falls(played):
    state, info = played.state, played.step.info
    said, truth = info["lesson"], (state.word[:, None], state.filter[:, None])
    for slot, (is_base, not_base, end) in enumerate(
        [(IS_FIRST, NOT_FIRST, IS_SECOND), (IS_SECOND, NOT_SECOND, NUM_LESSONS)]
    ):
        code = said[..., slot]
        stated, denied = (code >= is_base) & (code < not_base), (code >= not_base) & (code < end)
        assert stated.any() and denied.any() and np.all(code[~stated & ~denied] == NO_LESSON)
        assert np.all((code - is_base == truth[slot])[stated]) and np.all((code - not_base != truth[slot])[denied])
    done = info["progress"].astype(int)
    assert np.all(np.diff(done, axis=1) >= 0) and np.all(done[info["won"]][:, [0, 2, 3]] == 1)
    for function in (progress, lesson, score):
        np.testing.assert_array_equal(jax.vmap(function)(state), info[function.__name__][:, -1])


@jax.jit
def expert_episodes(world, keys, task):
    """Of any world: one program for all levels."""
    environment = shop(world=world)
    return jax.vmap(lambda key, task: scripted_episode(key, environment, environment.expert, task_id=task))(keys, task)


@pytest.mark.parametrize("level", LEVELS.values())
def test_the_expert_always_wins_within_four_turns(level):
    task = jnp.arange(256)
    episode = expert_episodes(shop_world(jax.random.key(1), *level), jax.random.split(jax.random.key(0), 256), task)
    assert np.all(episode.state.won) and np.all(episode.state.turn <= 4) and np.mean(episode.state.turn == 4) > 0.7
    np.testing.assert_array_equal(episode.step.reward.sum(axis=1), 10)
    np.testing.assert_array_equal(episode.state.task, task)
    np.testing.assert_array_equal(score_all(episode.state), 1)


score_all = jax.jit(jax.vmap(score))


def test_a_state_that_is_done_is_frozen(world):
    environment = shop(world=world)

    @jax.jit
    def run(key):
        end = scripted_episode(key, environment, environment.expert, task_id=3).state
        return end, environment.step(key, end, jnp.asarray([SEARCH]))

    end, (after, step) = run(jax.random.key(0))
    assert bool(end.done) and bool(end.won)
    assert all(bool(jnp.array_equal(a, b)) for a, b in zip(end, after, strict=True))
    assert float(step.reward) == 0 and bool(step.terminated) and int(step.observation.length) == 0


@pytest.mark.slow
def test_demonstrator_needs_the_right_lesson():
    @jax.jit
    def rate(key, kind):
        environment = shop()

        def one(key):
            facts, _ = environment.reset(jax.random.split(key, 3)[0])  # of the episode: the same key
            right = jnp.stack([IS_FIRST + facts.word, IS_SECOND + facts.filter])
            wrong = jnp.stack([IS_FIRST + (facts.word + 1) % 12, IS_SECOND + (facts.filter + 1) % 5])
            shown = jnp.stack([jnp.zeros(2, jnp.int32), right, wrong])[kind]
            return scripted_episode(key, environment, environment.demonstrate, lesson=shown).state.won

        return 100 * jax.vmap(one)(jax.random.split(key, 4_000)).mean()

    # Measured over 40,000 episodes each: 2.1 % without a lesson, 23.6 % with the right one, 0.7 % with a wrong one.
    without, right, wrong = (float(rate(jax.random.key(1), kind)) for kind in range(3))
    assert abs(without - 2.1) < 0.7 and abs(right - 23.6) < 2 and abs(wrong - 0.7) < 0.45


def test_vmap_changes_nothing(world):
    def one(key, level):
        told = []
        for environment in (shop(world=world), shop(level[0], level[1])):
            state, first = environment.reset(key)
            told.append((first, environment.step(key, state, environment.demonstrate(key, state))))
        return told

    keys, levels = jax.random.split(jax.random.key(5), 3), jnp.asarray(list(LEVELS.values()))
    batch, single = jax.jit(jax.vmap(one))(keys, levels), jax.jit(one)
    for i in range(3):
        for a, b in zip(jax.tree.leaves(batch), jax.tree.leaves(single(keys[i], levels[i])), strict=True):
            np.testing.assert_array_equal(a[i], b)


@pytest.mark.slow  # the agreement with plain Python is that of compiled steps
def test_jit_changes_nothing(world):
    environment, key = shop(world=world), jax.random.key(5)
    state, _ = jax.jit(environment.reset)(key)
    action = jnp.asarray([SEARCH + state.word])
    plain, compiled = (step(key, state, action) for step in (environment.step, jax.jit(environment.step)))
    jax.tree.map(np.testing.assert_array_equal, plain, compiled)


def test_vocabulary_and_a_readable_episode(world):
    assert len(set(VOCAB)) == len(VOCAB) == VOCAB_SIZE and VOCAB[BUY] == "buy" and VOCAB[OPEN + 3] == "open-4"
    assert len(LESSONS) == NUM_LESSONS and len(CATEGORIES) == 64 and VOCAB[CAP] == "at-most-$10"
    environment = shop(world=world)

    @jax.jit
    @jax.vmap
    def run(task):
        shown = jnp.asarray([0, IS_SECOND])
        return scripted_episode(jax.random.key(0), environment, environment.expert, task_id=task, lesson=shown).state

    states = run(jnp.arange(64))
    task = int(jnp.argmax(states.turn == 4))  # the first without a match on the first page
    state = jax.tree.map(lambda x: x[task], states)
    text = environment.render(state).splitlines()
    assert text[0].startswith("Task: buy a ") and CATEGORIES[task] in text[0] and text[1] == "Lesson: filter by brand."
    word, chosen = VOCAB[SEARCH + int(state.word)], VOCAB[FILTER + int(state.filter)]
    assert text[2:4] == [f"> {word.replace('-', ' ')}", "results"] and text[4].startswith("  1. ")
    assert text[8:10] == [f"> {chosen.replace('-', ' ')}", "results"]
    assert [line.split("$")[1] for line in text[10:14]] != [] and {line[5:].split(" $")[0] for line in text[10:14]} == {
        text[0].split("buy a ")[1].split(f" {CATEGORIES[task]}")[0]
    }
    assert text[14].startswith("> open ") and text[15:] == ["item", "> buy", "bought", "Won."]
    assert "Lost" not in environment.render(environment.reset(jax.random.key(0))[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_words": 17}, "num_words must be 2 to 16, got 17"),
        ({"num_filters": 1}, "num_filters must be 2 to 8, got 1"),
        ({"horizon": 3}, "horizon must be at least 4, got 3"),
        ({"noise": 1.5}, r"noise must be in \[0, 1\], got 1.5"),
        ({"obeys": -0.1}, r"obeys must be in \[0, 1\], got -0.1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        shop(**arguments)


def test_bad_calls(world):
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="task_id must be None without a fixed world, got 3"):
        shop().reset(key, task_id=3)
    environment = shop(world=world)
    with pytest.raises(ValueError, match="task_id must be 0 to 255, got -1"):
        environment.reset(key, task_id=-1)
    with pytest.raises(ValueError, match=r"lesson must have the shape \(2,\), got \(3,\)"):
        environment.reset(key, lesson=jnp.zeros(3, jnp.int32))
    with pytest.raises(ValueError, match=r"action must have the shape \(1,\), got \(2,\)"):
        environment.step(key, environment.reset(key)[0], jnp.zeros(2, jnp.int32))
    with pytest.raises(ValueError, match="num_words"):
        shop_world(key, 1)
