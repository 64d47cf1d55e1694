"""Household: find an object, take it, use the right appliance on it, put it away, in five turns.

The main bench of RetroAgent (arXiv 2603.08561) in the manner of ALFWorld: where an object lies and which appliance it
needs are hidden facts that its name shares with its cluster, so that what one episode taught helps in the next.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rollax.envs.environment import Environment, Step, Tokens, TokenSpec
from rollax.envs.hidden_clusters import (
    IS_FIRST,
    IS_SECOND,
    MAX_FIRST,
    MAX_SECOND,
    NO_LESSON,
    NOT_FIRST,
    NOT_SECOND,
    NUM_LESSONS,
    NUM_NAMES,
    HiddenFacts,
    check_level,
    check_share,
    check_task,
    draw_facts,
    follow,
    shown_lesson,
)

OBJECT_WORDS = (
    "apple bread egg lettuce potato tomato carrot onion mug cup plate bowl pan pot kettle ladle "
    "knife fork spoon spatula napkin towel cloth sponge soap brush bottle jar vase candle lamp bulb "
    "book pen pencil notebook letter newspaper box card key watch ring coin wallet phone laptop remote "
    "pillow blanket sheet shirt sock hat glove scarf shoe belt basket ball toy statue clock radio"
)
LOCATION_WORDS = "shelf drawer cabinet table desk counter sofa bed dresser closet bench chest rack hallway porch cellar"
NAMES = tuple(OBJECT_WORDS.split())
LOCATIONS = tuple(LOCATION_WORDS.split())
APPLIANCES = ("microwave", "fridge", "sink", "stove", "toaster", "washer", "dryer", "iron")
GOALS = ("safe", "bin", "tray")
NUM_GOALS, NUM_TASKS, NUM_SUBTASKS = 3, 256, 4
SUCCESS_REWARD = 10.0
# The order of the vocabulary: <pad>, names, goals, lessons, observations, actions.
PAD = 0
NAME = 1
GOAL = NAME + NUM_NAMES
LESSON = GOAL + NUM_GOALS
EMPTY, SEE, HOLD, NOTHING, OK, BROKEN, END = range(LESSON + NUM_LESSONS, LESSON + NUM_LESSONS + 7)
GOTO = END + 1
TAKE = GOTO + MAX_FIRST
USE = TAKE + 1
PUT = USE + MAX_SECOND
VOCAB_SIZE = PUT + NUM_GOALS
# `demonstrate` errs this often. With it a base model that imitates it succeeds as often as that of the paper's bench.
NOISE = 0.37
LESSONS = (
    "nothing learned",
    *(f"it is at the {place}" for place in LOCATIONS),
    *(f"it is not at the {place}" for place in LOCATIONS),
    *(f"it needs the {appliance}" for appliance in APPLIANCES),
    *(f"the {appliance} breaks it" for appliance in APPLIANCES),
)
VOCAB = (
    "<pad>",
    *NAMES,
    *(f"into-{goal}" for goal in GOALS),
    *(f"[{lesson}]" for lesson in LESSONS),
    *("empty", "see", "hold", "nothing", "ok", "broken", "end"),
    *(f"goto-{place}" for place in LOCATIONS),
    "take",
    *(f"use-{appliance}" for appliance in APPLIANCES),
    *(f"put-{goal}" for goal in GOALS),
)


class HouseholdWorld(NamedTuple):
    """A fixed world with its 256 tasks.

    Attributes:
      facts: place (first) and appliance (second) of every name.
      name: int32 `[256]`, four tasks to each name.
      goal: int32 `[256]`. The first 192 tasks are all pairs of name and goal, the last 64 repeat one pair a name.
    """

    facts: HiddenFacts
    name: jax.Array
    goal: jax.Array


class HouseholdState(NamedTuple):
    """One episode; every field freezes when it is done. Alphabet: `H` turns.

    Attributes:
      task: int32 `[]`, the number of the task, -1 in a world of its own.
      name, goal: int32 `[]`, what to bring where: the task tokens say so.
      place, appliance: int32 `[]`, the hidden facts.
      shown: int32 `[2]`, the lesson codes that the first observation showed.
      at: int32 `[]`, where the agent is, -1 at the door.
      empty: int32 `[]`, the last place visited in vain, -1 if none.
      used: int32 `[]`, the appliance last used on the object, -1 if none.
      found, taken, ready, placed: bool `[]`, the four subtasks.
      done, won: bool `[]`.
      turn: int32 `[]`.
      actions, observations: int32 `[H]`, tokens so far, PAD behind.
    """

    task: jax.Array
    name: jax.Array
    goal: jax.Array
    place: jax.Array
    appliance: jax.Array
    shown: jax.Array
    at: jax.Array
    empty: jax.Array
    used: jax.Array
    found: jax.Array
    taken: jax.Array
    ready: jax.Array
    placed: jax.Array
    done: jax.Array
    won: jax.Array
    turn: jax.Array
    actions: jax.Array
    observations: jax.Array


def household(
    num_locations: int | jax.Array = 12,
    num_appliances: int | jax.Array = 5,
    *,
    world: HouseholdWorld | None = None,
    horizon: int = 5,
    noise: float | jax.Array = NOISE,
    obeys: float | jax.Array = 0.75,
) -> Environment:
    """Bring an object to its goal: go to its place, take it, use its appliance, put it; four turns at least.

    The first observation is `[name, goal, lesson, lesson]`, every later one a single token. An action is one token:
    goto, take, use or put; anything else is answered by "nothing". Using a wrong appliance on the object in hand breaks
    it, and any put ends the episode. The vocabulary is the same at every level.

    Args:
      num_locations, num_appliances: the level, (8, 4), (12, 5) or (16, 8) in the paper's bench; may be traced. With a
        world, its own numbers hold.
      world: a fixed world of 256 tasks, which may be traced; None for a world of its own in each episode, as a base
        model is trained on: no fact can be known.
      horizon: turns after which an episode is cut, at least 4.
      noise: probability that `demonstrate` takes a random action; may be traced.
      obeys: probability that it follows a lesson; may be traced.

    Returns:
      The environment. `reset(key, task_id=None, lesson=None)`: the task (random if None; only with a world) and the two
      lesson codes that are shown (none if None). Reward 10 for the right object, made ready, in the right place. Info:
      `progress` bool `[4]`, `lesson` int32 `[2]`, `won` bool `[]`, `valid` bool `[]` (the token was an action). The
      expert knows the facts; `demonstrate` knows the grammar and the shown lesson, but no fact.

    Raises:
      ValueError: a level, a horizon or a probability out of range; a task without a world or out of range; a lesson
        that is not `[2]` or an action that is not `[1]`.
    """
    if world is not None:
        num_locations, num_appliances = world.facts.num_first, world.facts.num_second
    check_level(num_locations, num_appliances, ("num_locations", "num_appliances"))
    check_share("noise", noise)
    check_share("obeys", obeys)
    if horizon < NUM_SUBTASKS:
        raise ValueError(f"horizon must be at least {NUM_SUBTASKS}, got {horizon}")
    spec = TokenSpec(VOCAB, max_observation=4, max_action=1, max_turns=horizon, stop_ids=(), pad_id=PAD)

    def reset(key, task_id=None, lesson=None):
        keys = jax.random.split(key, 4)
        if task_id is not None:
            check_task(task_id, NUM_TASKS, world)
        if world is None:
            task_id = jnp.int32(-1)
            sizes = (NUM_NAMES, NUM_GOALS, num_locations, num_appliances)
            name, goal, place, appliance = (
                jax.random.randint(key, (), 0, size, jnp.int32) for key, size in zip(keys, sizes, strict=True)
            )
        else:
            if task_id is None:
                task_id = jax.random.randint(keys[0], (), 0, NUM_TASKS, jnp.int32)
            name, goal = world.name[task_id], world.goal[task_id]
            place, appliance = world.facts.first[name], world.facts.second[name]
        no, never = jnp.zeros((), bool), jnp.int32(-1)
        state = HouseholdState(
            task=jnp.asarray(task_id, jnp.int32),
            name=name,
            goal=goal,
            place=place,
            appliance=appliance,
            shown=shown_lesson(lesson),
            at=never,
            empty=never,
            used=never,
            found=no,
            taken=no,
            ready=no,
            placed=no,
            done=no,
            won=no,
            turn=jnp.int32(0),
            actions=jnp.full(horizon, PAD, jnp.int32),
            observations=jnp.full(horizon, PAD, jnp.int32),
        )
        task = jnp.stack([NAME + name, GOAL + goal])
        return state, Tokens(jnp.concatenate([task, LESSON + state.shown]).astype(jnp.int32), jnp.int32(4))

    def step(key, state, action):
        del key
        if jnp.shape(action) != (1,):
            raise ValueError(f"action must have the shape (1,), got {jnp.shape(action)}")
        token = jnp.asarray(action, jnp.int32)[0]
        goes = (token >= GOTO) & (token < GOTO + num_locations)
        takes = token == TAKE
        uses = (token >= USE) & (token < USE + num_appliances) & state.taken
        puts = (token >= PUT) & (token < PUT + NUM_GOALS)

        at = jnp.where(goes, token - GOTO, state.at)
        is_here = (at == state.place) & ~state.taken
        takes_it = takes & is_here
        right = token - USE == state.appliance
        breaks = uses & ~right
        placed = puts & state.taken & (token - PUT == state.goal)
        won = placed & state.ready
        heard = jnp.select(
            [goes & is_here, goes, takes_it, breaks, uses, puts], [SEE, EMPTY, HOLD, BROKEN, OK, END], NOTHING
        )
        new = state._replace(
            at=at,
            empty=jnp.where(goes & (at != state.place), at, state.empty),
            used=jnp.where(uses, token - USE, state.used),
            found=state.found | (at == state.place),
            taken=state.taken | takes_it,
            ready=state.ready | (uses & right),
            placed=placed,
            done=breaks | puts | (state.turn + 1 >= horizon),
            won=won,
            turn=state.turn + 1,
            actions=state.actions.at[state.turn].set(token, mode="drop"),
            observations=state.observations.at[state.turn].set(heard, mode="drop"),
        )
        frozen = state.done
        new = jax.tree.map(lambda a, b: jnp.where(frozen, a, b), state, new)
        ids = jnp.full(4, PAD, jnp.int32).at[0].set(jnp.where(frozen, PAD, heard))
        ended = jnp.isin(new.observations[new.turn - 1], jnp.asarray([BROKEN, END]))
        info = {
            "progress": progress(new),
            "lesson": lesson(new),
            "won": new.won,
            "valid": (token >= GOTO) & (token < VOCAB_SIZE),
        }
        reward = jnp.where(new.won & ~frozen, jnp.float32(SUCCESS_REWARD), 0.0)
        observation = Tokens(ids, jnp.where(frozen, 0, 1).astype(jnp.int32))
        return new, Step(observation, reward, new.done & ended, new.done & ~ended, info)

    def expert(key, state):
        del key
        return _next_action(state, state.place, state.appliance)

    def demonstrate(key, state):
        place_key, appliance_key, slip_key, random_key = jax.random.split(key, 4)
        place = follow(place_key, state.shown, IS_FIRST, jnp.arange(MAX_FIRST) < num_locations, obeys)
        appliance = follow(appliance_key, state.shown, IS_SECOND, jnp.arange(MAX_SECOND) < num_appliances, obeys)
        kinds = jnp.asarray([num_locations, 1, num_appliances, NUM_GOALS], jnp.int32)
        index = jax.random.randint(random_key, (), 0, kinds.sum(), jnp.int32)
        kind = jnp.searchsorted(jnp.cumsum(kinds), index, side="right")
        slip = jnp.asarray([GOTO, TAKE, USE, PUT], jnp.int32)[kind] + index - (jnp.cumsum(kinds) - kinds)[kind]
        slips = jax.random.bernoulli(slip_key, noise)
        return jnp.where(slips, slip[None], _next_action(state, place, appliance)).astype(jnp.int32)

    return Environment(reset, step, spec, render=render, expert=expert, demonstrate=demonstrate)


def household_world(
    key: jax.Array,
    num_locations: int | jax.Array = 12,
    num_appliances: int | jax.Array = 5,
    *,
    deviation: float | jax.Array = 0.15,
) -> HouseholdWorld:
    """Draws a fixed world and its tasks.

    Args:
      num_locations: 2 to 16; may be traced.
      num_appliances: 2 to 8; may be traced.
      deviation: probability that a name does not share the facts of its cluster; may be traced.

    Raises:
      ValueError: concrete numbers out of range.
    """
    check_level(num_locations, num_appliances, ("num_locations", "num_appliances"))
    facts_key, goal_key = jax.random.split(key)
    task = jnp.arange(NUM_TASKS, dtype=jnp.int32)
    name = task % NUM_NAMES
    shift = jax.random.randint(goal_key, (NUM_NAMES,), 0, NUM_GOALS, jnp.int32)
    goal = (task // NUM_NAMES + shift[name]) % NUM_GOALS
    return HouseholdWorld(draw_facts(facts_key, num_locations, num_appliances, deviation), name, goal)


def progress(state: HouseholdState) -> jax.Array:
    """The subtasks done, bool `[4]`: was at the object's place, took it, used its appliance, put it where it goes."""
    return jnp.stack([state.found, state.taken, state.ready, state.placed])


def lesson(state: HouseholdState) -> jax.Array:
    """What the episode truly taught, codes int32 `[2]` of `LESSONS`: about the place, and about the appliance.

    The place where it is, else the last where it is not; the appliance it needs, else the one that broke it.
    """
    place = jnp.select([state.found, state.empty >= 0], [IS_FIRST + state.place, NOT_FIRST + state.empty], NO_LESSON)
    appliance = jnp.select(
        [state.ready, state.used >= 0], [IS_SECOND + state.appliance, NOT_SECOND + state.used], NO_LESSON
    )
    return jnp.stack([place, appliance]).astype(jnp.int32)


def render(state: HouseholdState) -> str:
    """The episode so far in words, on the host."""
    lines = [f"Task: get the {NAMES[int(state.name)]} ready and put it into the {GOALS[int(state.goal)]}."]
    lines += [f"Lesson: {LESSONS[code]}." for code in np.asarray(state.shown) if code != NO_LESSON]
    lines += [
        f"> {VOCAB[int(action)].replace('-', ' ')}\n{VOCAB[int(heard)]}"
        for action, heard in zip(state.actions[: int(state.turn)], state.observations, strict=False)
    ]
    if bool(state.done):
        lines.append("Won." if bool(state.won) else "Lost.")
    return "\n".join(lines)


def _next_action(state, place, appliance):
    """The action of one who believes in that place and that appliance, `[1]`."""
    sees = (state.at == state.place) & ~state.taken  # what the last observations told
    return jnp.select(
        [sees, ~state.taken, ~state.ready], [TAKE, GOTO + place, USE + appliance], PUT + state.goal
    ).astype(jnp.int32)[None]
