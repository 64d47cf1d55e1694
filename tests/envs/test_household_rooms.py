"""The house of several rooms against a stepper in plain Python, its expert, its tasks and its transcript."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rollax.envs import alfworld_household, rooms_world, scripted_episode
from rollax.envs.household_rooms import (
    CLEANING,
    COOLING,
    DESK,
    ENTER,
    EXAMINE,
    FITS,
    FRIDGE,
    HEATING,
    IS_AT,
    KIND,
    KINDS,
    LESSON,
    LESSONS,
    LONGEST_SOLUTION,
    MICROWAVE,
    NOT_AT,
    NUM_LESSONS,
    NUM_RECEPTACLES,
    OBJECT,
    OBJECTS,
    OPENS,
    PAD,
    PLACE,
    RECEPTACLE,
    RECEPTACLES,
    ROOM_OF,
    ROOMS,
    SINK,
    TWO,
    VOCAB,
    VOCAB_SIZE,
    lesson,
    progress,
)

HORIZON = 24
NAMES = [name for name, _ in OBJECTS]
PLACES = [name for name, _, _ in RECEPTACLES]


@pytest.fixture(scope="module")
def world():
    return rooms_world(jax.random.key(7))


@pytest.fixture(scope="module")
def played(world):
    """Random play that often makes sense, each episode with a random lesson, and the world as an argument."""

    @jax.jit
    def play(keys, world):
        environment = alfworld_household(world=world, horizon=HORIZON)

        def act(key, state):
            kind_key, token_key, key = jax.random.split(key, 3)
            kind = jax.random.choice(kind_key, 4, p=jnp.asarray([0.05, 0.4, 0.15, 0.4]))
            token = jax.random.randint(token_key, (2,), jnp.asarray([0, ENTER]), VOCAB_SIZE + 2)
            return jnp.select(
                [kind == 0, kind == 1, kind == 2],
                [token[:1], token[1:], environment.demonstrate(key, state)],
                environment.expert(key, state),
            )

        def one(key):
            return scripted_episode(key, environment, act, lesson=jax.random.randint(key, (2,), 0, NUM_LESSONS))

        return jax.vmap(one)(keys)

    return jax.tree.map(np.asarray, play(jax.random.split(jax.random.key(0), 1000), world))


def stepper(task, actions):
    """The rules once more, in words: yields (said, terminated, truncated, progress, lesson)."""
    goal, target, kind = NAMES[int(task.goal)], PLACES[int(task.target)], int(task.kind)
    things = [[NAMES[t], PLACES[p], set()] for t, p in zip(task.types, task.places, strict=True)]
    where = dict(zip(PLACES, (ROOMS[room] for room in ROOM_OF), strict=True))
    shut = {name for name, opens in zip(PLACES, OPENS, strict=True) if opens}
    can_open = frozenset(shut)
    treatment = {CLEANING: "clean", HEATING: "hot", COOLING: "cold"}.get(kind)
    room, at, hand = ROOMS[0], None, None
    parts, won, seen, missed = [False] * 4, False, None, None

    def contents():
        return [thing for thing in things if thing[1] == at]

    def wanted(thing):
        return thing[0] == goal

    for turn, token in enumerate(actions):
        said, lists = "nothing", False
        words = VOCAB[token] if token < len(VOCAB) else "?"
        verb, _, rest = words.partition(" ")
        if token < ENTER or token >= len(VOCAB):
            pass
        elif verb == "enter":
            room, at, said = rest.removeprefix("the "), None, "entered"
        elif verb == "go":
            if where[place := rest.removeprefix("to ")] == room:
                at, lists = place, place not in shut
                said = "see" if lists else "closed"
        elif verb == "take":
            there = [thing for thing in contents() if thing[0] == rest] if at and at not in shut else []
            if there and hand is None:
                hand, said = there[0], "took"
                hand[1] = "hand"
        elif words == "open it":
            if at in shut:
                shut.discard(at)
                said, lists = "opened", True
        elif words == "close it":
            if at in can_open - shut:
                shut.add(at)
                said = "shut"
        elif words == "put it down":
            if hand and at and at not in shut:
                hand[1], hand, said = at, None, "put"
        elif words == "use desk lamp":
            if at == PLACES[DESK]:
                said = "lit"
                parts[3] |= kind == EXAMINE and hand is not None and wanted(hand)
        else:
            station, state, ends, answer = {
                "clean it": (SINK, "clean", None, "cleaned"),
                "heat it": (MICROWAVE, "hot", "cold", "heated"),
                "cool it": (FRIDGE, "cold", "hot", "cooled"),
            }[words]
            if hand and at == PLACES[station]:
                hand[2].add(state)
                hand[2].discard(ends)
                said = answer
        if lists:
            if any(map(wanted, contents())):
                parts[0], seen = True, seen or at
            elif seen is None:
                missed = at
        parts[1] |= hand is not None and wanted(hand)
        good = [thing for thing in things if wanted(thing) and (treatment is None or treatment in thing[2])]
        there = [thing for thing in good if thing[1] == target]
        if kind in (PLACE, EXAMINE):
            parts[2] |= hand is not None and wanted(hand) and at == target
        else:
            parts[2] |= bool(there) if kind == TWO else bool(good)
        if kind != EXAMINE:
            parts[3] |= len(there) >= (2 if kind == TWO else 1)
        won = parts[3]
        if won:
            to_do = "nothing learned"
        elif not parts[0]:
            to_do = "open what is closed and look inside" if at in shut else "nothing learned"
        elif not parts[1]:
            to_do = "take it where you see it"
        elif kind == EXAMINE:
            to_do = "look at it under the desk lamp"
        elif treatment and not good:
            to_do = {"clean": "clean it in the sink basin", "hot": "heat it in the microwave"}.get(
                treatment, "cool it in the fridge"
            )
        else:
            to_do = "bring the second one too" if kind == TWO and parts[2] else "put it where it belongs"
        about = f"it is in or on the {seen}" if seen else f"it is not in or on the {missed}"
        about = about if seen or missed else "nothing learned"
        listing = [said, *(thing[0] for thing in contents())] if lists else [said]
        yield listing, won, not won and turn + 1 == HORIZON, list(parts), [about, to_do]
        if won:
            return


def test_agrees_with_a_stepper_in_plain_python(played):
    seen, ends = set(), {"won": 0, "late": 0}
    for i in range(600):
        state, step = jax.tree.map(lambda x, i=i: x[i], (played.state, played.step))
        told = list(stepper(state.task, played.action[i, :, 0].tolist()))
        for t, (said, terminated, truncated, parts, learned) in enumerate(told):
            ids, length = step.observation.ids[t], step.observation.length[t]
            assert [VOCAB[token] for token in ids[:length]] == said
            assert np.all(ids[length:] == PAD) and played.mask[i, t]
            assert (step.terminated[t], step.truncated[t]) == (terminated, truncated)
            assert step.reward[t] == (10.0 if terminated else 0.0) and step.info["won"][t] == terminated
            assert step.info["progress"][t].tolist() == parts
            assert [LESSONS[code] for code in step.info["lesson"][t]] == learned
            token = int(played.action[i, t, 0])
            assert step.info["valid"][t] == (ENTER <= token < VOCAB_SIZE) and state.actions[t] == token
            np.testing.assert_array_equal(state.observations[t], ids)
            seen |= {said[0], *learned}
        over = slice(len(told), None)
        assert not np.any(played.mask[i, over]) and not np.any(step.reward[over])
        assert not np.any(step.observation.length[over]) and int(state.turn) == len(told)
        ends["won" if terminated else "late"] += 1
    assert min(ends.values()) > 100, ends
    # Every answer and every lesson occurs, so that nothing above holds for lack of a case.
    assert {"entered", "see", "closed", "opened", "shut", "took", "put", "cleaned", "heated", "cooled", "lit"} < seen
    assert set(LESSONS[IS_AT + 2 * NUM_RECEPTACLES :]) < seen and len(seen & set(LESSONS)) > 40


def test_first_observation_and_tasks(played, world):
    state, first = played.state, jax.tree.map(lambda x: x[:, 0], played.observation)
    task = state.task
    np.testing.assert_array_equal(first.length, 5)
    ids = [KIND + task.kind, OBJECT + task.goal, RECEPTACLE + task.target, *(LESSON + state.shown).T]
    np.testing.assert_array_equal(first.ids[:, :5], np.stack(ids, axis=1))
    for mine, table in zip(task, world.tasks, strict=True):
        np.testing.assert_array_equal(mine, np.asarray(table)[state.number])
    tasks = jax.tree.map(np.asarray, world.tasks)
    assert set(tasks.kind) == set(range(6)) and np.bincount(tasks.kind).min() > 20
    assert np.all(FITS[tasks.kind, tasks.goal]) and np.all(tasks.target[tasks.kind == EXAMINE] == DESK)
    wanted = tasks.types == tasks.goal[:, None]
    np.testing.assert_array_equal(wanted.sum(axis=1), np.where(tasks.kind == TWO, 2, 1))
    assert not np.any(wanted & (tasks.places == tasks.target[:, None]))
    at_home = (tasks.places == np.asarray(world.home)[tasks.types])[~wanted]
    assert abs(at_home.mean() - (0.85 + 0.15 / 20)) < 0.03  # 1,700 objects that are not wanted
    assert tasks.places.min() >= 0 and tasks.places.max() < NUM_RECEPTACLES


def test_lessons_about_places_are_true(played):
    state, code = played.state, played.step.info["lesson"][..., 0]
    places, types = state.task.places, state.task.types
    wanted = types == state.task.goal[:, None]
    stated, denied = (code >= IS_AT) & (code < NOT_AT), code >= NOT_AT
    is_there = np.stack([(places[:, None] == code[..., None] - base) & wanted[:, None] for base in (IS_AT, NOT_AT)])
    is_there = is_there.any(axis=-1)
    assert stated.sum() > 1000 and denied.sum() > 1000
    assert np.all(is_there[0][stated]) and not np.any(is_there[1][denied])
    assert np.all(np.diff(played.step.info["progress"].astype(int), axis=1) >= 0)
    for function in (progress, lesson):
        np.testing.assert_array_equal(jax.vmap(function)(state), played.step.info[function.__name__][:, -1])


def test_objects_are_conserved(played):
    state = played.state
    held = state.held
    in_hand = state.places == -1
    np.testing.assert_array_equal(in_hand.sum(axis=1), held >= 0)
    assert np.all(in_hand[np.arange(held.size), held][held >= 0])
    assert not np.any(state.hot & state.cold) and state.hot.any() and state.cold.any() and state.clean.any()
    room = ROOM_OF[np.maximum(state.at, 0)]
    assert np.all(room[state.at >= 0] == state.room[state.at >= 0])


@pytest.mark.parametrize("num_rooms", [2, 3, 4])
def test_the_expert_solves_every_task(num_rooms):
    @jax.jit
    def run(world, task):
        environment = alfworld_household(world=world, horizon=LONGEST_SOLUTION)
        return jax.vmap(lambda t: scripted_episode(jax.random.key(0), environment, environment.expert, task_id=t))(task)

    world = rooms_world(jax.random.key(num_rooms), num_rooms)
    episode = jax.tree.map(np.asarray, run(world, jnp.arange(256)))
    assert np.all(episode.state.won) and np.all(episode.step.reward.sum(axis=1) == 10)
    assert np.all(episode.step.info["progress"][:, -1])
    np.testing.assert_array_equal(episode.state.number, np.arange(256))
    assert ROOM_OF[episode.state.task.places].max() == num_rooms - 1 and episode.state.room.max() <= num_rooms - 1


@pytest.fixture(scope="module")
def success():
    @jax.jit
    def rate(key, num_rooms, told, noise):
        environment = alfworld_household(num_rooms, noise=noise)

        def one(key):
            facts, _ = environment.reset(jax.random.split(key, 3)[0])  # of the episode: the same key
            shown = jnp.where(told, jnp.stack([IS_AT + facts.task.places[0], 0]), 0)
            return scripted_episode(key, environment, environment.demonstrate, lesson=shown).state

        state = jax.vmap(one)(jax.random.split(key, 1000))
        return state.won.mean(), state.turn.mean()

    return lambda *arguments: tuple(float(x) for x in rate(jax.random.key(0), *arguments))


@pytest.mark.slow
def test_demonstrator_is_helped_by_a_lesson(success):
    # Measured over 4,096 episodes: in four rooms .44 without and .97 with the right place, in two rooms .76 and .99.
    (plain, turns), (told, fewer) = success(4, False, 0.3), success(4, True, 0.3)
    assert abs(plain - 0.44) < 0.04 and abs(told - 0.97) < 0.02 and fewer < turns - 5
    easy, _ = success(2, False, 0.3)
    assert abs(easy - 0.76) < 0.04
    assert success(2, False, 0.0)[0] > 0.995  # without slips, two rooms can be searched in time


@pytest.mark.slow  # by default it solves every task from its start
def test_the_expert_recovers_from_any_position(world):
    environment = alfworld_household(world=world, horizon=60)

    @jax.jit
    @jax.vmap
    def run(key):
        def act(key, state):
            wild = jax.random.randint(key, (1,), ENTER, VOCAB_SIZE)
            return jnp.where(state.turn < 30, wild, environment.expert(key, state))

        return scripted_episode(key, environment, act).state

    state = run(jax.random.split(jax.random.key(3), 500))
    assert np.all(state.won)
    assert np.mean(np.asarray(state.turn) > 30) > 0.9


def test_a_state_that_is_done_is_frozen(world):
    environment = alfworld_household(world=world)

    @jax.jit
    def run(key):
        end = scripted_episode(key, environment, environment.expert, task_id=3).state
        return end, environment.step(key, end, jnp.asarray([ENTER + 1]))

    end, (after, step) = run(jax.random.key(0))
    assert bool(end.done) and bool(end.won)
    assert all(bool(jnp.array_equal(a, b)) for a, b in zip(*map(jax.tree.leaves, (end, after)), strict=True))
    assert float(step.reward) == 0 and bool(step.terminated) and int(step.observation.length) == 0


def test_kinds_levels_and_open_doors():
    environment = alfworld_household(2, kinds=("heat & place",), num_objects=3, open_doors=True, deviation=0.0)

    @jax.jit
    @jax.vmap
    def run(key):
        return scripted_episode(key, environment, environment.expert)

    episode = jax.tree.map(np.asarray, run(jax.random.split(jax.random.key(0), 100)))
    assert np.all(episode.state.task.kind == HEATING) and np.all(episode.state.won) and np.all(episode.state.turn <= 9)
    assert not np.any([VOCAB[i] == "open it" for i in episode.state.actions.ravel()])
    assert episode.state.task.places.shape == (100, 3) and ROOM_OF[episode.state.task.places].max() == 1
    assert environment.spec.max_observation == 5 and environment.spec.max_turns == 30


def test_vmap_changes_nothing():
    # That jit changes nothing is the agreement with plain Python above.
    def one(key, num_rooms):
        environment = alfworld_household(num_rooms)
        state, first = environment.reset(key)
        return first, environment.step(key, state, environment.demonstrate(key, state))

    keys, rooms = jax.random.split(jax.random.key(5), 3), jnp.asarray([2, 3, 4])
    batch, single = jax.jit(jax.vmap(one))(keys, rooms), jax.jit(one)
    for i in range(3):
        for a, b in zip(jax.tree.leaves(batch), jax.tree.leaves(single(keys[i], rooms[i])), strict=True):
            np.testing.assert_array_equal(a[i], b)


def test_a_transcript_reads_like_alfworld(world):
    assert len(set(VOCAB)) == len(VOCAB) == VOCAB_SIZE and len(LESSONS) == NUM_LESSONS and len(KINDS) == 6
    environment = alfworld_household(world=world)
    start, _ = environment.reset(jax.random.key(0), task_id=0, lesson=jnp.asarray([IS_AT + FRIDGE, 0]))
    apple, egg = NAMES.index("apple"), NAMES.index("egg")
    places = jnp.asarray([FRIDGE, FRIDGE, *[PLACES.index("bed 1")] * 6])
    task = start.task._replace(
        kind=jnp.int32(HEATING),
        goal=jnp.int32(apple),
        target=jnp.int32(PLACES.index("side table 1")),
        types=jnp.asarray([apple, egg, *[NAMES.index("book")] * 6]),
        places=places,
    )
    state = start._replace(task=task, places=places)
    step, expert = jax.jit(environment.step), jax.jit(environment.expert)
    wanders = ["enter the bedroom", "go to bed 1", "go to fridge 1", "use desk lamp", "enter the kitchen"]
    for words in wanders:
        state, _ = step(jax.random.key(0), state, jnp.asarray([VOCAB.index(words)]))
    while not bool(state.done):
        state, _ = step(jax.random.key(0), state, expert(jax.random.key(0), state))
    kitchen = (
        "You are in the kitchen. Looking quickly around you, you see a countertop 1, a dining table 1, a cabinet 1, "
        "a cabinet 2, a drawer 1, a fridge 1, a microwave 1, and a sink basin 1."
    )
    assert environment.render(state).splitlines() == [
        kitchen,
        "Your task is to: put a hot apple in/on the side table 1.",
        "Lesson: it is in or on the fridge 1.",
        "> enter the bedroom",
        "You are in the bedroom. Looking quickly around you, you see a bed 1, a desk 1, a drawer 2, and a shelf 1.",
        "> go to bed 1",
        "You arrive at the bed 1. On the bed 1, you see a book, a book, a book, a book, a book, and a book.",
        "> go to fridge 1",
        "Nothing happens.",
        "> use desk lamp",
        "Nothing happens.",
        "> enter the kitchen",
        kitchen,
        "> go to fridge 1",
        "You arrive at the fridge 1. The fridge 1 is closed.",
        "> open it",
        "You open the fridge 1. In it, you see an apple, and an egg.",
        "> take apple",
        "You pick up the apple from the fridge 1.",
        "> go to microwave 1",
        "You arrive at the microwave 1. The microwave 1 is closed.",
        "> heat it",
        "You heat the apple using the microwave 1.",
        "> enter the living room",
        "You are in the living room. Looking quickly around you, you see a sofa 1, a coffee table 1, a side table 1, "
        "and a safe 1.",
        "> go to side table 1",
        "You arrive at the side table 1. On the side table 1, you see nothing.",
        "> put it down",
        "You put the apple in/on the side table 1.",
        "You won!",
    ]
    assert environment.render(start).count("\n") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_rooms": 1}, "num_rooms must be 2 to 4, got 1"),
        ({"kinds": ("juggle",)}, "kinds must be some of .*, got .*juggle"),
        ({"kinds": ()}, "kinds must be some of"),
        ({"num_objects": 1}, "num_objects must be at least 2, got 1"),
        ({"horizon": 15}, "horizon must be at least 16, got 15"),
        ({"noise": 1.5}, r"noise must be in \[0, 1\], got 1.5"),
        ({"deviation": -0.5}, r"deviation must be in \[0, 1\], got -0.5"),
        ({"obeys": 2}, r"obeys must be in \[0, 1\], got 2"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        alfworld_household(**arguments)


def test_bad_calls(world):
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="task_id must be None without a fixed world, got 3"):
        alfworld_household().reset(key, task_id=3)
    environment = alfworld_household(world=world)
    with pytest.raises(ValueError, match="task_id must be 0 to 255, got 256"):
        environment.reset(key, task_id=256)
    with pytest.raises(ValueError, match=r"lesson must have the shape \(2,\), got \(1,\)"):
        environment.reset(key, lesson=jnp.zeros(1, jnp.int32))
    with pytest.raises(ValueError, match=r"action must have the shape \(1,\), got \(2,\)"):
        environment.step(key, environment.reset(key)[0], jnp.zeros(2, jnp.int32))
    with pytest.raises(ValueError, match="num_rooms"):
        rooms_world(key, 5)
