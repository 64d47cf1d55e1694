"""A house of several rooms with receptacles that open, and the six kinds of task of ALFWorld (arXiv 2010.03768).

The long-horizon household: find things by walking and opening, carry one at a time, clean, heat, cool, look at them
under the lamp, put them away. Where things are kept is a world's hidden fact; recipes and rooms are common knowledge.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rollax.envs.environment import Environment, Step, Tokens, TokenSpec
from rollax.envs.hidden_clusters import NO_LESSON, check_share, check_task, follow, shown_lesson

KINDS = ("pick & place", "examine in light", "clean & place", "heat & place", "cool & place", "pick two & place")
PLACE, EXAMINE, CLEANING, HEATING, COOLING, TWO = range(len(KINDS))
ROOMS = ("kitchen", "bedroom", "living room", "bathroom")
# Name, room, whether it opens.
RECEPTACLES = (
    ("countertop 1", 0, False),
    ("dining table 1", 0, False),
    ("cabinet 1", 0, True),
    ("cabinet 2", 0, True),
    ("drawer 1", 0, True),
    ("fridge 1", 0, True),
    ("microwave 1", 0, True),
    ("sink basin 1", 0, False),
    ("bed 1", 1, False),
    ("desk 1", 1, False),
    ("drawer 2", 1, True),
    ("shelf 1", 1, False),
    ("sofa 1", 2, False),
    ("coffee table 1", 2, False),
    ("side table 1", 2, False),
    ("safe 1", 2, True),
    ("toilet 1", 3, False),
    ("bathtub 1", 3, False),
    ("cabinet 3", 3, True),
    ("shelf 2", 3, False),
)
FRIDGE, MICROWAVE, SINK, DESK = 5, 6, 7, 9  # the lamp is on the desk
# Name, and the kinds of task beside pick & place and pick two & place that it is fit for.
OBJECTS = (
    ("apple", (CLEANING, HEATING, COOLING)),
    ("bread", (HEATING, COOLING)),
    ("egg", (CLEANING, HEATING, COOLING)),
    ("lettuce", (CLEANING, COOLING)),
    ("potato", (CLEANING, HEATING, COOLING)),
    ("tomato", (CLEANING, HEATING, COOLING)),
    ("mug", (CLEANING, HEATING, COOLING)),
    ("plate", (CLEANING, HEATING, COOLING)),
    ("pan", (CLEANING, COOLING)),
    ("knife", (CLEANING,)),
    ("cloth", (CLEANING,)),
    ("soap bar", (CLEANING,)),
    ("book", (EXAMINE,)),
    ("pencil", (EXAMINE,)),
    ("credit card", (EXAMINE,)),
    ("cell phone", (EXAMINE,)),
)
NUM_RECEPTACLES, NUM_TYPES, NUM_TASKS, NUM_SUBTASKS = len(RECEPTACLES), len(OBJECTS), 256, 4
LONGEST_SOLUTION = 16  # two objects, for each: enter, go, open, take, enter, go, open, put
SUCCESS_REWARD = 10.0
# `demonstrate` errs this often: in four rooms it solves about two tasks in five, and with the place told nearly all.
NOISE = 0.3
ROOM_OF = np.asarray([room for _, room, _ in RECEPTACLES], np.int32)
OPENS = np.asarray([opens for _, _, opens in RECEPTACLES])
FITS = np.asarray([[kind in (PLACE, TWO, *kinds) for _, kinds in OBJECTS] for kind in range(len(KINDS))])
# Where an object is treated, by kind: under the lamp, in the sink, the microwave, the fridge.
STATION = np.asarray([-1, DESK, SINK, MICROWAVE, FRIDGE, -1], np.int32)
# Lesson codes: 0 says nothing; where the wanted thing is or is not; what is to be done next.
IS_AT = 1
NOT_AT = IS_AT + NUM_RECEPTACLES
OPEN_IT, TAKE_IT, LIGHT_IT, CLEAN_IT, HEAT_IT, COOL_IT, SECOND_TOO, PUT_IT = range(
    NOT_AT + NUM_RECEPTACLES, NOT_AT + NUM_RECEPTACLES + 8
)
LESSONS = (
    "nothing learned",
    *(f"it is in or on the {name}" for name, _, _ in RECEPTACLES),
    *(f"it is not in or on the {name}" for name, _, _ in RECEPTACLES),
    "open what is closed and look inside",
    "take it where you see it",
    "look at it under the desk lamp",
    "clean it in the sink basin",
    "heat it in the microwave",
    "cool it in the fridge",
    "bring the second one too",
    "put it where it belongs",
)
NUM_LESSONS = len(LESSONS)
# The order of the vocabulary: <pad>, kinds, objects, receptacles, lessons, answers, actions.
PAD = 0
KIND = 1
OBJECT = KIND + len(KINDS)
RECEPTACLE = OBJECT + NUM_TYPES
LESSON = RECEPTACLE + NUM_RECEPTACLES
ENTERED, SEE, SHUT, OPENED, CLOSED, TOOK, PUT_DOWN, CLEANED, HEATED, COOLED, LIT, NOTHING = range(
    LESSON + NUM_LESSONS, LESSON + NUM_LESSONS + 12
)
ENTER = NOTHING + 1
GOTO = ENTER + len(ROOMS)
TAKE = GOTO + NUM_RECEPTACLES
OPEN, CLOSE, PUT, CLEAN, HEAT, COOL, LAMP = range(TAKE + NUM_TYPES, TAKE + NUM_TYPES + 7)
VOCAB_SIZE = LAMP + 1
VOCAB = (
    "<pad>",
    *KINDS,
    *(name for name, _ in OBJECTS),
    *(name for name, _, _ in RECEPTACLES),
    *(f"[{lesson}]" for lesson in LESSONS),
    *("entered", "see", "closed", "opened", "shut", "took", "put", "cleaned", "heated", "cooled", "lit", "nothing"),
    *(f"enter the {room}" for room in ROOMS),
    *(f"go to {name}" for name, _, _ in RECEPTACLES),
    *(f"take {name}" for name, _ in OBJECTS),
    *("open it", "close it", "put it down", "clean it", "heat it", "cool it", "use desk lamp"),
)


class RoomsTask(NamedTuple):
    """A task and where everything is at its start. Alphabet: `M` objects.

    Attributes:
      kind: int32 `[]`, of `KINDS`.
      goal: int32 `[]`, the wanted type of object.
      target: int32 `[]`, the receptacle where it goes, the desk where it is to be looked at.
      types: int32 `[M]`, of the objects; the first (in pick two the first two) is wanted, the others are not.
      places: int32 `[M]`, the receptacle of each, never the target for a wanted one.
    """

    kind: jax.Array
    goal: jax.Array
    target: jax.Array
    types: jax.Array
    places: jax.Array


class RoomsWorld(NamedTuple):
    """A fixed house with its 256 tasks.

    Attributes:
      home: int32 `[16]`, the receptacle where objects of a type are usually kept.
      tasks: a `RoomsTask` of arrays `[256, ...]`.
      num_rooms: int32 `[]`.
    """

    home: jax.Array
    tasks: RoomsTask
    num_rooms: jax.Array


class RoomsState(NamedTuple):
    """One episode; every field freezes when it is done. Alphabet: `M` objects, `H` turns.

    Attributes:
      number: int32 `[]`, the number of the task, -1 in a world of its own.
      task: what is wanted, and where everything was.
      shown: int32 `[2]`, the lesson codes that the first observation showed.
      room, at: int32 `[]`, where the agent is; at -1 stands for the middle of the room.
      held: int32 `[]`, the object in hand, -1 if none.
      places: int32 `[M]`, where the objects are, -1 in hand.
      clean, hot, cold: bool `[M]`.
      is_open: bool `[20]`, whether one can see and reach inside.
      looked: bool `[20]`, receptacles whose contents were seen.
      seen_at, missing_at: int32 `[]`, where a wanted object was first seen, and where it was last sought in vain; -1.
      done_parts: bool `[4]`, the subtasks.
      done, won: bool `[]`.
      turn: int32 `[]`.
      actions: int32 `[H]`, tokens so far, PAD behind.
      observations: int32 `[H, 1 + M]`, the answers so far, PAD behind.
    """

    number: jax.Array
    task: RoomsTask
    shown: jax.Array
    room: jax.Array
    at: jax.Array
    held: jax.Array
    places: jax.Array
    clean: jax.Array
    hot: jax.Array
    cold: jax.Array
    is_open: jax.Array
    looked: jax.Array
    seen_at: jax.Array
    missing_at: jax.Array
    done_parts: jax.Array
    done: jax.Array
    won: jax.Array
    turn: jax.Array
    actions: jax.Array
    observations: jax.Array


def alfworld_household(
    num_rooms: int | jax.Array = 4,
    *,
    kinds: tuple[str, ...] = KINDS,
    num_objects: int = 8,
    world: RoomsWorld | None = None,
    horizon: int = 30,
    open_doors: bool = False,
    deviation: float | jax.Array = 0.15,
    noise: float | jax.Array = NOISE,
    obeys: float | jax.Array = 0.75,
) -> Environment:
    """The six kinds of task in a house of two to four rooms; an action is one token.

    The first observation is `[kind, object, target, lesson, lesson]`; an answer is a token and, where the agent looks
    into a receptacle, the types of the objects in it. One enters a room and goes to its receptacles; some are closed at
    first and show and take nothing until opened. One thing at a time is carried. It is cleaned at the sink, heated at
    the microwave, cooled at the fridge, and looked at where the desk lamp is. What cannot be done is answered by
    "nothing". Nothing is ever lost, so a task can always still be solved.

    Args:
      num_rooms: 2 to 4 of kitchen, bedroom, living room, bathroom; may be traced. With a world, its own number holds.
      kinds: those that are drawn. With a world, its own tasks hold.
      num_objects: M, at least 2. With a world, its own number holds.
      world: a fixed house with 256 tasks, which may be traced; None for a house of its own in each episode.
      horizon: H, turns after which an episode is cut, at least 16, the longest solution.
      open_doors: whether everything is open from the start: the easier level.
      deviation: probability that an object of a house of its own is not where its type is kept; may be traced.
      noise: probability that `demonstrate` takes a random action; may be traced.
      obeys: probability that it follows a lesson about a place; may be traced.

    Returns:
      The environment. `reset(key, task_id=None, lesson=None)`: the task (random if None; only with a world) and the two
      lesson codes that are shown (none if None). Reward 10 and the end as soon as the task is done. Info: `progress`
      bool `[4]`, `lesson` int32 `[2]`, `won` bool `[]`, `valid` bool `[]` (the token was an action). The expert knows
      where everything is; `demonstrate` knows the recipes and searches, guided by the shown lesson.

    Raises:
      ValueError: an argument out of range, an unknown kind, a task without a world or out of range, a lesson that is
        not `[2]` or an action that is not `[1]`.
    """
    if world is not None:
        num_rooms, num_objects = world.num_rooms, world.tasks.types.shape[-1]
    _check_house(num_rooms, kinds, num_objects)
    for name, value in (("deviation", deviation), ("noise", noise), ("obeys", obeys)):
        check_share(name, value)
    if horizon < LONGEST_SOLUTION:
        raise ValueError(f"horizon must be at least {LONGEST_SOLUTION}, got {horizon}")
    width = 1 + max(num_objects, 4)
    spec = TokenSpec(VOCAB, width, max_action=1, max_turns=horizon, stop_ids=(), pad_id=PAD)
    exists = jnp.asarray(ROOM_OF) < num_rooms

    def reset(key, task_id=None, lesson=None):
        home_key, task_key = jax.random.split(key)
        if task_id is not None:
            check_task(task_id, NUM_TASKS, world)
        if world is None:
            task_id = jnp.int32(-1)
            home = _draw_home(home_key, exists)
            task = _draw_task(task_key, home, exists, kinds, num_objects, deviation)
        else:
            if task_id is None:
                task_id = jax.random.randint(task_key, (), 0, NUM_TASKS, jnp.int32)
            task = jax.tree.map(lambda x: x[task_id], world.tasks)
        no, never = jnp.zeros((), bool), jnp.int32(-1)
        state = RoomsState(
            number=jnp.asarray(task_id, jnp.int32),
            task=task,
            shown=shown_lesson(lesson),
            room=jnp.int32(0),
            at=never,
            held=never,
            places=task.places,
            clean=jnp.zeros(num_objects, bool),
            hot=jnp.zeros(num_objects, bool),
            cold=jnp.zeros(num_objects, bool),
            is_open=~jnp.asarray(OPENS) | open_doors,
            looked=jnp.zeros(NUM_RECEPTACLES, bool),
            seen_at=never,
            missing_at=never,
            done_parts=jnp.zeros(NUM_SUBTASKS, bool),
            done=no,
            won=no,
            turn=jnp.int32(0),
            actions=jnp.full(horizon, PAD, jnp.int32),
            observations=jnp.full((horizon, width), PAD, jnp.int32),
        )
        ids = jnp.stack([KIND + task.kind, OBJECT + task.goal, RECEPTACLE + task.target])
        ids = jnp.concatenate([ids, LESSON + state.shown]).astype(jnp.int32)
        return state, Tokens(jnp.pad(ids, (0, width - 5), constant_values=PAD), jnp.int32(5))

    def step(key, state, action):
        del key
        if jnp.shape(action) != (1,):
            raise ValueError(f"action must have the shape (1,), got {jnp.shape(action)}")
        token = jnp.asarray(action, jnp.int32)[0]
        after, answer, lists = _act(state, token, num_rooms)
        after = _notice(after, lists)
        here = _here(after) & lists
        # Row k marks the k-th object in sight: without a sort, which is slow under vmap.
        chosen = here & (jnp.cumsum(here) - 1 == jnp.arange(num_objects)[:, None])
        listed = jnp.where(chosen.any(axis=-1), OBJECT + jnp.sum(chosen * after.task.types, axis=-1), PAD)
        ids = jnp.pad(jnp.append(answer, listed), (0, width - 1 - num_objects), constant_values=PAD).astype(jnp.int32)
        won = after.done_parts[-1]
        after = after._replace(
            won=won,
            done=won | (state.turn + 1 >= horizon),
            turn=state.turn + 1,
            actions=state.actions.at[state.turn].set(token, mode="drop"),
            observations=state.observations.at[state.turn].set(ids, mode="drop"),
        )
        frozen = state.done
        after = jax.tree.map(lambda a, b: jnp.where(frozen, a, b), state, after)
        observation = Tokens(
            jnp.where(frozen, PAD, ids), jnp.where(frozen, 0, 1 + here.sum(dtype=jnp.int32)).astype(jnp.int32)
        )
        info = {
            "progress": progress(after),
            "lesson": lesson(after),
            "won": after.won,
            "valid": (token >= ENTER) & (token < VOCAB_SIZE),
        }
        reward = jnp.where(after.won & ~frozen, jnp.float32(SUCCESS_REWARD), 0.0)
        return after, Step(observation, reward, after.won, after.done & ~after.won, info)

    def expert(key, state):
        del key
        missing = (state.task.types == state.task.goal) & ~_delivered(state)
        return _next_action(state, state.places[jnp.argmax(missing)])

    def demonstrate(key, state):
        search_key, slip_key, random_key = jax.random.split(key, 3)
        actions = jnp.arange(ENTER, VOCAB_SIZE)
        possible = ~((actions >= ENTER) & (actions < GOTO)) | (actions < ENTER + num_rooms)
        possible &= ~((actions >= GOTO) & (actions < TAKE)) | jnp.pad(exists, (GOTO - ENTER, VOCAB_SIZE - TAKE))
        slip = ENTER + _uniform(random_key, possible)
        # Where the wanted thing may be: where it was seen, else where nothing has been seen yet, first in this room.
        unseen = exists & ~state.looked
        unseen = jnp.where(unseen.any(), unseen, exists)
        in_room = unseen & (jnp.asarray(ROOM_OF) == state.room)
        stated = state.shown - IS_AT
        is_place = (stated >= 0) & (stated < NUM_RECEPTACLES)
        refuted = is_place & state.looked[jnp.clip(stated, 0, NUM_RECEPTACLES - 1)]
        told = jnp.where(refuted, NO_LESSON, state.shown)
        guess = follow(search_key, told, IS_AT, jnp.where(in_room.any(), in_room, unseen), obeys)
        missing = (state.task.types == state.task.goal) & ~_delivered(state)
        known = missing & (state.places >= 0) & state.looked[state.places]
        shut = (state.at >= 0) & ~state.is_open[state.at]
        place = jnp.where(known.any(), state.places[jnp.argmax(known)], jnp.where(shut, state.at, guess))
        slips = jax.random.bernoulli(slip_key, noise)
        return jnp.where(slips, slip[None], _next_action(state, place)).astype(jnp.int32)

    return Environment(reset, step, spec, render=render, expert=expert, demonstrate=demonstrate)


def rooms_world(
    key: jax.Array,
    num_rooms: int | jax.Array = 4,
    *,
    kinds: tuple[str, ...] = KINDS,
    num_objects: int = 8,
    deviation: float | jax.Array = 0.15,
) -> RoomsWorld:
    """Draws a fixed house and its tasks, in which every object has its place.

    Args:
      num_rooms: 2 to 4; may be traced.
      kinds: of `KINDS`, those that are drawn.
      num_objects: M, at least 2.
      deviation: probability that an object is not where its type is kept; may be traced.

    Raises:
      ValueError: an argument out of range, or an unknown kind.
    """
    _check_house(num_rooms, kinds, num_objects)
    check_share("deviation", deviation)
    home_key, task_key = jax.random.split(key)
    exists = jnp.asarray(ROOM_OF) < num_rooms
    home = _draw_home(home_key, exists)
    tasks = jax.vmap(lambda key: _draw_task(key, home, exists, kinds, num_objects, deviation))(
        jax.random.split(task_key, NUM_TASKS)
    )
    return RoomsWorld(home, tasks, jnp.int32(num_rooms))


def progress(state: RoomsState) -> jax.Array:
    """The subtasks done, bool `[4]`, by kind of task.

    Saw a wanted object; took it; brought it to the target (pick & place) or the lamp (examine), treated it (clean,
    heat, cool) or put the first where it goes (pick two); did the task.
    """
    return state.done_parts


def lesson(state: RoomsState) -> jax.Array:
    """What the episode truly taught, codes int32 `[2]` of `LESSONS`: about the place, and what is to be done next.

    The place where the wanted thing was found, else the last place that does not have it; nothing is left to do in a
    task that is done.
    """
    place = jnp.select(
        [state.seen_at >= 0, state.missing_at >= 0], [IS_AT + state.seen_at, NOT_AT + state.missing_at], NO_LESSON
    )
    found, taken, third, done = state.done_parts
    kind = state.task.kind
    shut = (state.at >= 0) & ~state.is_open[state.at]
    treat = jnp.asarray([NO_LESSON, LIGHT_IT, CLEAN_IT, HEAT_IT, COOL_IT, NO_LESSON], jnp.int32)[kind]
    treated = jnp.any(_treated(state) & (state.task.types == state.task.goal)) & (kind != EXAMINE)
    to_do = jnp.select(
        [done, ~found & ~shut, ~found, ~taken, (treat != NO_LESSON) & ~treated, (kind == TWO) & third],
        [NO_LESSON, NO_LESSON, OPEN_IT, TAKE_IT, treat, SECOND_TOO],
        PUT_IT,
    )
    return jnp.stack([place, to_do]).astype(jnp.int32)


def render(state: RoomsState) -> str:
    """The episode so far in the manner of ALFWorld, on the host."""
    task = state.task
    names = [name for name, _ in OBJECTS]
    places = [name for name, _, _ in RECEPTACLES]
    thing, target = names[int(task.goal)], places[int(task.target)]
    wish = (
        f"put {_a(thing)} in/on the {target}",
        f"look at {_a(thing)} under the desk lamp",
        f"put a clean {thing} in/on the {target}",
        f"put a hot {thing} in/on the {target}",
        f"put a cool {thing} in/on the {target}",
        f"find two {thing} and put them in/on the {target}",
    )[int(task.kind)]
    lines = [_look_around(0), f"Your task is to: {wish}."]
    lines += [f"Lesson: {LESSONS[code]}." for code in np.asarray(state.shown) if code != NO_LESSON]
    room, at, held = 0, None, None
    for action, ids in zip(state.actions[: int(state.turn)].tolist(), np.asarray(state.observations), strict=False):
        answer, listed = ids[0], [names[i - OBJECT] for i in ids[1:] if i != PAD]
        room = action - ENTER if answer == ENTERED else room
        at = places[action - GOTO] if answer in (SEE, SHUT) else at
        held = names[action - TAKE] if answer == TOOK else held
        said = {
            ENTERED: _look_around(room),
            SEE: f"You arrive at the {at}. {_in_or_on(at)}, you see {_several(listed)}.",
            SHUT: f"You arrive at the {at}. The {at} is closed.",
            OPENED: f"You open the {at}. In it, you see {_several(listed)}.",
            CLOSED: f"You close the {at}.",
            TOOK: f"You pick up the {held} from the {at}.",
            PUT_DOWN: f"You put the {held} in/on the {at}.",
            CLEANED: f"You clean the {held} using the {at}.",
            HEATED: f"You heat the {held} using the {at}.",
            COOLED: f"You cool the {held} using the {at}.",
            LIT: "You turn on the desk lamp.",
            NOTHING: "Nothing happens.",
        }[int(answer)]
        lines.append(f"> {VOCAB[action] if action < VOCAB_SIZE else '?'}\n{said}")
    if bool(state.done):
        lines.append("You won!" if bool(state.won) else "You ran out of time.")
    return "\n".join(lines)


def _check_house(num_rooms, kinds, num_objects):
    if not isinstance(num_rooms, jax.core.Tracer) and not 2 <= int(num_rooms) <= len(ROOMS):
        raise ValueError(f"num_rooms must be 2 to {len(ROOMS)}, got {num_rooms}")
    if not kinds or not set(kinds) <= set(KINDS):
        raise ValueError(f"kinds must be some of {KINDS}, got {kinds}")
    if num_objects < 2:
        raise ValueError(f"num_objects must be at least 2, got {num_objects}")


def _uniform(key, possible, shape=()):
    """Indices of true entries, int32: the n-th of them for a uniform n, which takes one draw each."""
    rank = jax.random.randint(key, shape, 0, possible.sum())
    return jnp.argmax(jnp.cumsum(possible) == rank[..., None] + 1, axis=-1).astype(jnp.int32)


def _draw_home(key, exists):
    return _uniform(key, exists, (NUM_TYPES,))


def _draw_task(key, home, exists, kinds, num_objects, deviation):
    kind_key, goal_key, target_key, type_key, stray_key, place_key, wanted_key = jax.random.split(key, 7)
    kind = _uniform(kind_key, np.asarray([kind in kinds for kind in KINDS]))
    goal = _uniform(goal_key, jnp.asarray(FITS)[kind])
    places = jnp.arange(NUM_RECEPTACLES)
    target = jnp.where(kind == EXAMINE, DESK, _uniform(target_key, exists & (places != home[goal])))
    index = jnp.arange(num_objects)
    wanted = (index == 0) | ((index == 1) & (kind == TWO))
    others = (goal + jax.random.randint(type_key, (num_objects,), 1, NUM_TYPES, jnp.int32)) % NUM_TYPES
    types = jnp.where(wanted, goal, others)
    stray = jax.random.bernoulli(stray_key, deviation, (num_objects,))
    place = jnp.where(stray, _uniform(place_key, exists, (num_objects,)), home[types])
    # A wanted object that would already be where it goes lies somewhere else.
    elsewhere = _uniform(wanted_key, exists & (places != target), (num_objects,))
    place = jnp.where(wanted & (place == target), elsewhere, place)
    return RoomsTask(kind, goal, target.astype(jnp.int32), types, place)


def _here(state):
    """The objects that the agent sees, bool `[M]`."""
    return (state.at >= 0) & state.is_open[state.at] & (state.places == state.at)


def _treated(state):
    """The objects on which the task's treatment was done, bool `[M]`; all where it asks for none."""
    none = jnp.ones(state.places.shape, bool)
    return jnp.stack([none, none, state.clean, state.hot, state.cold, none])[state.task.kind]


def _delivered(state):
    """The wanted objects that are where and as they should be, bool `[M]`."""
    right = (state.task.types == state.task.goal) & (state.places == state.task.target) & _treated(state)
    return right & (state.task.kind != EXAMINE)


def _act(state, token, num_rooms):
    """The house after an action, the answer, and whether the answer lists what the agent sees."""
    at, held = state.at, state.held
    somewhere, holds = at >= 0, held >= 0
    reach = somewhere & state.is_open[at]
    enters = (token >= ENTER) & (token < ENTER + num_rooms)
    place = jnp.clip(token - GOTO, 0, NUM_RECEPTACLES - 1)
    goes = (token >= GOTO) & (token < TAKE) & (jnp.asarray(ROOM_OF)[place] == state.room)
    wanted = _here(state) & (state.task.types == token - TAKE)
    takes = (token >= TAKE) & (token < OPEN) & ~holds & wanted.any()
    opens = (token == OPEN) & somewhere & ~state.is_open[at]
    closes = (token == CLOSE) & reach & jnp.asarray(OPENS)[at]
    puts = (token == PUT) & reach & holds
    cleans = (token == CLEAN) & holds & (at == SINK)
    heats = (token == HEAT) & holds & (at == MICROWAVE)
    cools = (token == COOL) & holds & (at == FRIDGE)
    lights = (token == LAMP) & (at == DESK)

    in_hand = jnp.arange(state.places.shape[0]) == held
    new_at = jnp.where(goes, place, jnp.where(enters, -1, at))
    new_held = jnp.where(takes, jnp.argmax(wanted), jnp.where(puts, -1, held)).astype(jnp.int32)
    taken = jnp.arange(state.places.shape[0]) == jnp.where(takes, new_held, -1)
    places = jnp.where(taken, -1, jnp.where(puts & in_hand, at, state.places))
    this = jnp.arange(NUM_RECEPTACLES) == at
    after = state._replace(
        room=jnp.where(enters, token - ENTER, state.room),
        at=new_at,
        held=new_held,
        places=places,
        clean=state.clean | (cleans & in_hand),
        hot=(state.hot | (heats & in_hand)) & ~(cools & in_hand),
        cold=(state.cold | (cools & in_hand)) & ~(heats & in_hand),
        is_open=(state.is_open | (opens & this)) & ~(closes & this),
    )
    sees = goes & after.is_open[new_at]
    answer = jnp.select(
        [enters, sees, goes, opens, closes, takes, puts, cleans, heats, cools, lights],
        [ENTERED, SEE, SHUT, OPENED, CLOSED, TOOK, PUT_DOWN, CLEANED, HEATED, COOLED, LIT],
        NOTHING,
    )
    looks = lights & holds & (state.task.types[held] == state.task.goal) & (state.task.kind == EXAMINE)
    after = after._replace(done_parts=state.done_parts | jnp.asarray([False, False, False, True]) & looks)
    return after, answer, sees | opens


def _notice(state, lists):
    """What has been seen, and the subtasks that are done."""
    task = state.task
    wanted = task.types == task.goal
    here = jnp.any(_here(state) & wanted) & lists
    looked = state.looked | ((jnp.arange(NUM_RECEPTACLES) == state.at) & lists)
    holds = (state.held >= 0) & wanted[state.held]
    count = _delivered(state).sum()
    carried = holds & (state.at == task.target)
    treated = jnp.any(_treated(state) & wanted)
    third = jnp.stack([carried, carried, treated, treated, treated, count >= 1])[task.kind]
    fourth = count >= jnp.where(task.kind == TWO, 2, 1)
    return state._replace(
        looked=looked,
        seen_at=jnp.where(here & (state.seen_at < 0), state.at, state.seen_at),
        missing_at=jnp.where(lists & ~here & (state.seen_at < 0), state.at, state.missing_at),
        done_parts=state.done_parts | jnp.stack([here, holds, third, fourth]),
    )


def _next_action(state, place):
    """The action of one who looks for the wanted thing at `place` and knows what to do with it, `[1]`."""
    task = state.task
    holds = state.held >= 0
    useful = holds & (task.types[state.held] == task.goal)
    treats = useful & ~_treated(state)[state.held]
    station = jnp.asarray(STATION)[task.kind]
    # Something else in hand goes back where the agent is, or to the first receptacle of the room.
    aside = jnp.where(state.at >= 0, state.at, jnp.argmax(jnp.asarray(ROOM_OF) == state.room))
    goal = jnp.where(~holds, place, jnp.where(~useful, aside, jnp.where(treats, station, task.target)))
    treat = jnp.asarray([PUT, LAMP, CLEAN, HEAT, COOL, PUT], jnp.int32)[task.kind]
    shuts_out = ~state.is_open[goal] & ~treats & (~useful | (task.kind != EXAMINE))
    room = jnp.asarray(ROOM_OF)[goal]
    return jnp.select(
        [room != state.room, state.at != goal, shuts_out, ~holds, treats | (useful & (task.kind == EXAMINE))],
        [ENTER + room, GOTO + goal, OPEN, TAKE + task.goal, treat],
        PUT,
    ).astype(jnp.int32)[None]


def _look_around(room):
    seen = [name for name, where, _ in RECEPTACLES if where == room]
    return f"You are in the {ROOMS[room]}. Looking quickly around you, you see {_several(seen)}."


def _in_or_on(place):
    opens = {name for name, _, opens in RECEPTACLES if opens}
    return f"The {place} is open. In it" if place in opens else f"On the {place}"


def _several(names):
    if not names:
        return "nothing"
    return ", ".join(map(_a, names[:-1])) + (", and " if names[1:] else "") + _a(names[-1])


def _a(name):
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"
