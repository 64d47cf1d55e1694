"""Shop: find a product with two wanted attributes under a price cap, and buy it, in five turns.

The second bench of RetroAgent (arXiv 2603.08561) in the manner of WebShop: which search word lists a category and which
filter narrows its list are hidden facts that a category shares with its cluster; all else can be read from the page.
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
    NUM_CLUSTERS,
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

CATEGORY_WORDS = (
    "lamp chair desk shelf rug curtain mirror clock vase frame basket bin hook rack stool bench "
    "shirt dress coat sock hat glove scarf belt shoe boot sandal bag wallet purse watch ring "
    "mug plate bowl pan knife fork kettle toaster blender grill cooler flask tent rope torch compass "
    "ball bat racket helmet mat glider puzzle doll kite drum flute guitar brush easel canvas pen"
)
SEARCH_WORDS = "home garden office sport beauty travel music baby pet craft auto party health school gift vintage"
FILTER_WORDS = "brand size style season rating seller origin series"
CATEGORIES = tuple(CATEGORY_WORDS.split())
WORDS, FILTERS = tuple(SEARCH_WORDS.split()), tuple(FILTER_WORDS.split())
COLOURS, MATERIALS, PRICES = ("red", "blue", "green", "black"), ("cotton", "leather", "steel", "wood"), (10, 20, 30, 40)
NUM_VALUES, NUM_ITEMS, PAGE = 4, 64, 4
NUM_TASKS, NUM_SUBTASKS = 256, 4
SUCCESS_REWARD = 10.0
# The order of the vocabulary: <pad>, categories, values of items, price caps, lessons, statuses, actions.
PAD = 0
CATEGORY = 1
COLOUR = CATEGORY + NUM_NAMES
MATERIAL = COLOUR + NUM_VALUES
PRICE = MATERIAL + NUM_VALUES
CAP = PRICE + NUM_VALUES
LESSON = CAP + NUM_VALUES
RESULTS, NO_RESULTS, ITEM, NOTHING, BOUGHT = range(LESSON + NUM_LESSONS, LESSON + NUM_LESSONS + 5)
SEARCH = BOUGHT + 1
NEXT = SEARCH + MAX_FIRST
FILTER = NEXT + 1
OPEN = FILTER + MAX_SECOND
BUY = OPEN + PAGE
VOCAB_SIZE = BUY + 1
MAX_OBSERVATION = 1 + 3 * PAGE
# `demonstrate` errs this often, as in the household.
NOISE = 0.37
LESSONS = (
    "nothing learned",
    *(f"search for {word}" for word in WORDS),
    *(f"do not search for {word}" for word in WORDS),
    *(f"filter by {name}" for name in FILTERS),
    *(f"do not filter by {name}" for name in FILTERS),
)
VOCAB = (
    "<pad>",
    *CATEGORIES,
    *COLOURS,
    *MATERIALS,
    *(f"${price}" for price in PRICES),
    *(f"at-most-${price}" for price in PRICES),
    *(f"[{lesson}]" for lesson in LESSONS),
    *("results", "no-results", "item", "nothing", "bought"),
    *(f"search-{word}" for word in WORDS),
    "next",
    *(f"filter-{name}" for name in FILTERS),
    *(f"open-{k + 1}" for k in range(PAGE)),
    "buy",
)


class ShopWorld(NamedTuple):
    """A fixed world with its 256 tasks.

    Attributes:
      facts: search word (first) and filter (second) of every category.
      catalogue: int32 `[8, 64]`, each cluster's items in the order in which its lists show them. Item
        `16 * colour + 4 * material + price` exists once in each.
      name: int32 `[256]`, the category, four tasks to each.
      goal: int32 `[256, 3]`, wanted colour, material and highest price, 0 to 3 each.
    """

    facts: HiddenFacts
    catalogue: jax.Array
    name: jax.Array
    goal: jax.Array


class ShopState(NamedTuple):
    """One episode; every field freezes when it is done. Alphabet: `H` turns.

    Attributes:
      task: int32 `[]`, the number of the task, -1 in a world of its own.
      name: int32 `[]`, the category.
      goal: int32 `[3]`, wanted colour, material and highest price.
      word, filter: int32 `[]`, the hidden facts.
      catalogue: int32 `[64]`, items in the order of the list.
      shown: int32 `[2]`, the lesson codes that the first observation showed.
      listed, filtered: bool `[]`, a list is on the screen, and it is narrowed to the wanted colour and material.
      page: int32 `[]`.
      opened: int32 `[]`, the item on the screen, -1 if none.
      bought: int32 `[]`, the item, -1 if none.
      wrong_word, wrong_filter: int32 `[]`, the last that found nothing, -1 if none.
      searched, narrowed, viewed: bool `[]`, the subtasks before the purchase.
      done, won: bool `[]`.
      turn: int32 `[]`.
      actions: int32 `[H]`, tokens so far, PAD behind.
      observations: int32 `[H, 13]`, the answers so far, PAD behind.
    """

    task: jax.Array
    name: jax.Array
    goal: jax.Array
    word: jax.Array
    filter: jax.Array
    catalogue: jax.Array
    shown: jax.Array
    listed: jax.Array
    filtered: jax.Array
    page: jax.Array
    opened: jax.Array
    bought: jax.Array
    wrong_word: jax.Array
    wrong_filter: jax.Array
    searched: jax.Array
    narrowed: jax.Array
    viewed: jax.Array
    done: jax.Array
    won: jax.Array
    turn: jax.Array
    actions: jax.Array
    observations: jax.Array


def shop(
    num_words: int | jax.Array = 12,
    num_filters: int | jax.Array = 5,
    *,
    world: ShopWorld | None = None,
    horizon: int = 5,
    noise: float | jax.Array = NOISE,
    obeys: float | jax.Array = 0.75,
) -> Environment:
    """Buy what was asked for: search by the category's word, filter, open a match, buy: four turns, if not by luck.

    The first observation is `[category, colour, material, cap, lesson, lesson]`. A list shows a page of four items as
    `[results, (colour, material, price) * 4]`; every other answer is a single token. An action is one token. Only the
    right word lists the category's 64 items and only the right filter narrows them to those of the wanted colour and
    material; a wrong one leaves no results, and one has to search again. `next` turns the page, `open` shows an item,
    `buy` buys it and ends the episode. What makes no sense is answered by "nothing".

    Args:
      num_words, num_filters: the level, as `household`; may be traced. With a world, its own numbers hold.
      world: a fixed world of 256 tasks, which may be traced; None for a world of its own in each episode.
      horizon: turns after which an episode is cut, at least 4.
      noise: probability that `demonstrate` takes a random action; may be traced.
      obeys: probability that it follows a lesson; may be traced.

    Returns:
      The environment. `reset(key, task_id=None, lesson=None)` as `household`. Reward 10 for an item that matches
      exactly: colour, material, and a price within the cap. Info: `progress` bool `[4]`, `lesson` int32 `[2]`, `won`
      bool `[]`, `valid` bool `[]` (the token was an action), `score` float32 `[]` (the share of the three conditions
      that the bought item meets; 0 before). The expert knows the facts; `demonstrate` reads pages and the shown lesson.

    Raises:
      ValueError: as `household`.
    """
    if world is not None:
        num_words, num_filters = world.facts.num_first, world.facts.num_second
    check_level(num_words, num_filters, ("num_words", "num_filters"))
    check_share("noise", noise)
    check_share("obeys", obeys)
    if horizon < NUM_SUBTASKS:
        raise ValueError(f"horizon must be at least {NUM_SUBTASKS}, got {horizon}")
    spec = TokenSpec(VOCAB, MAX_OBSERVATION, max_action=1, max_turns=horizon, stop_ids=(), pad_id=PAD)

    def reset(key, task_id=None, lesson=None):
        task_key, goal_key, word_key, filter_key, order_key = jax.random.split(key, 5)
        if task_id is not None:
            check_task(task_id, NUM_TASKS, world)
        if world is None:
            task_id = jnp.int32(-1)
            name = jax.random.randint(task_key, (), 0, NUM_NAMES, jnp.int32)
            goal = jax.random.randint(goal_key, (3,), 0, NUM_VALUES, jnp.int32)
            word = jax.random.randint(word_key, (), 0, num_words, jnp.int32)
            right_filter = jax.random.randint(filter_key, (), 0, num_filters, jnp.int32)
            catalogue = _draw_catalogue(order_key)
        else:
            if task_id is None:
                task_id = jax.random.randint(task_key, (), 0, NUM_TASKS, jnp.int32)
            name, goal = world.name[task_id], world.goal[task_id]
            word, right_filter = world.facts.first[name], world.facts.second[name]
            catalogue = world.catalogue[world.facts.cluster[name]]
        no, never = jnp.zeros((), bool), jnp.int32(-1)
        state = ShopState(
            task=jnp.asarray(task_id, jnp.int32),
            name=name,
            goal=goal,
            word=word,
            filter=right_filter,
            catalogue=catalogue,
            shown=shown_lesson(lesson),
            listed=no,
            filtered=no,
            page=jnp.int32(0),
            opened=never,
            bought=never,
            wrong_word=never,
            wrong_filter=never,
            searched=no,
            narrowed=no,
            viewed=no,
            done=no,
            won=no,
            turn=jnp.int32(0),
            actions=jnp.full(horizon, PAD, jnp.int32),
            observations=jnp.full((horizon, MAX_OBSERVATION), PAD, jnp.int32),
        )
        task = jnp.concatenate([CATEGORY + name[None], jnp.asarray([COLOUR, MATERIAL, CAP]) + goal])
        ids = jnp.concatenate([task, LESSON + state.shown]).astype(jnp.int32)
        return state, Tokens(jnp.pad(ids, (0, MAX_OBSERVATION - 6), constant_values=PAD), jnp.int32(6))

    def step(key, state, action):
        del key
        if jnp.shape(action) != (1,):
            raise ValueError(f"action must have the shape (1,), got {jnp.shape(action)}")
        token = jnp.asarray(action, jnp.int32)[0]
        searches = (token >= SEARCH) & (token < SEARCH + num_words)
        finds = searches & (token - SEARCH == state.word)
        filters = (token >= FILTER) & (token < FILTER + num_filters) & state.listed
        narrows = filters & (token - FILTER == state.filter)
        turns = (token == NEXT) & ((state.page + 1) * PAGE < _kept(state).sum())
        on_page = _page(state)
        slot = jnp.clip(token - OPEN, 0, PAGE - 1)
        opens = (token >= OPEN) & (token < OPEN + PAGE) & (on_page[slot] >= 0)
        buys = (token == BUY) & (state.opened >= 0)

        fails = (searches & ~finds) | (filters & ~narrows)
        shows = finds | narrows | turns
        opened = jnp.where(opens, on_page[slot], jnp.where(shows | fails, -1, state.opened))
        won = buys & _matches(state.opened, state.goal)
        after = state._replace(
            listed=(state.listed | finds) & ~fails,
            filtered=((state.filtered & ~finds) | narrows) & ~fails,
            page=jnp.where(turns, state.page + 1, jnp.where(finds | narrows | fails, 0, state.page)),
            opened=opened,
            bought=jnp.where(buys, state.opened, state.bought),
            wrong_word=jnp.where(searches & ~finds, token - SEARCH, state.wrong_word),
            wrong_filter=jnp.where(filters & ~narrows, token - FILTER, state.wrong_filter),
            searched=state.searched | finds,
            narrowed=state.narrowed | narrows,
            viewed=state.viewed | (opens & _matches(opened, state.goal)),
            done=buys | (state.turn + 1 >= horizon),
            won=won,
            turn=state.turn + 1,
            actions=state.actions.at[state.turn].set(token, mode="drop"),
        )
        status = jnp.select([shows, fails, opens, buys], [RESULTS, NO_RESULTS, ITEM, BOUGHT], NOTHING)
        items = jnp.where(shows, _page(after), -1)
        there = jnp.repeat(items >= 0, 3)
        ids = jnp.concatenate([status[None], jnp.where(there, _item_tokens(items).ravel(), PAD)]).astype(jnp.int32)
        after = after._replace(observations=state.observations.at[state.turn].set(ids, mode="drop"))
        frozen = state.done
        after = jax.tree.map(lambda a, b: jnp.where(frozen, a, b), state, after)
        observation = Tokens(
            jnp.where(frozen, PAD, ids), jnp.where(frozen, 0, 1 + there.sum(dtype=jnp.int32)).astype(jnp.int32)
        )
        info = {
            "progress": progress(after),
            "lesson": lesson(after),
            "won": after.won,
            "valid": (token >= SEARCH) & (token < VOCAB_SIZE),
            "score": score(after),
        }
        reward = jnp.where(after.won & ~frozen, jnp.float32(SUCCESS_REWARD), 0.0)
        ended = after.bought >= 0
        return after, Step(observation, reward, after.done & ended, after.done & ~ended, info)

    def expert(key, state):
        del key
        return _next_action(state, state.word, state.filter)

    def demonstrate(key, state):
        word_key, filter_key, slip_key, random_key = jax.random.split(key, 4)
        word = follow(word_key, state.shown, IS_FIRST, jnp.arange(MAX_FIRST) < num_words, obeys)
        wanted_filter = follow(filter_key, state.shown, IS_SECOND, jnp.arange(MAX_SECOND) < num_filters, obeys)
        actions = jnp.arange(SEARCH, VOCAB_SIZE)
        possible = (actions < SEARCH + num_words) | (actions == NEXT) | (actions >= OPEN)
        possible |= (actions >= FILTER) & (actions < FILTER + num_filters)
        slip = SEARCH + jax.random.categorical(random_key, jnp.where(possible, 0.0, -jnp.inf))
        slips = jax.random.bernoulli(slip_key, noise)
        return jnp.where(slips, slip[None], _next_action(state, word, wanted_filter)).astype(jnp.int32)

    return Environment(reset, step, spec, render=render, expert=expert, demonstrate=demonstrate)


def shop_world(
    key: jax.Array,
    num_words: int | jax.Array = 12,
    num_filters: int | jax.Array = 5,
    *,
    deviation: float | jax.Array = 0.15,
) -> ShopWorld:
    """Draws a fixed world and its tasks.

    Args:
      num_words: 2 to 16; may be traced.
      num_filters: 2 to 8; may be traced.
      deviation: probability that a category does not share the facts of its cluster; may be traced.

    Raises:
      ValueError: concrete numbers out of range.
    """
    check_level(num_words, num_filters, ("num_words", "num_filters"))
    facts_key, order_key, goal_key = jax.random.split(key, 3)
    return ShopWorld(
        facts=draw_facts(facts_key, num_words, num_filters, deviation),
        catalogue=jax.vmap(_draw_catalogue)(jax.random.split(order_key, NUM_CLUSTERS)),
        name=jnp.arange(NUM_TASKS, dtype=jnp.int32) % NUM_NAMES,
        goal=jax.random.randint(goal_key, (NUM_TASKS, 3), 0, NUM_VALUES, jnp.int32),
    )


def progress(state: ShopState) -> jax.Array:
    """The subtasks done, bool `[4]`: searched by the right word, used the right filter, opened a match, bought it."""
    return jnp.stack([state.searched, state.narrowed, state.viewed, state.won])


def lesson(state: ShopState) -> jax.Array:
    """What the episode truly taught, codes int32 `[2]` of `LESSONS`: about the word, and about the filter.

    The one that works, else the last that did not.
    """
    word = jnp.select(
        [state.searched, state.wrong_word >= 0], [IS_FIRST + state.word, NOT_FIRST + state.wrong_word], NO_LESSON
    )
    about_filter = jnp.select(
        [state.narrowed, state.wrong_filter >= 0],
        [IS_SECOND + state.filter, NOT_SECOND + state.wrong_filter],
        NO_LESSON,
    )
    return jnp.stack([word, about_filter]).astype(jnp.int32)


def score(state: ShopState) -> jax.Array:
    """The share of colour, material and price cap that the bought item meets, float32 `[]`; 0 if nothing is bought."""
    share = _conditions(state.bought, state.goal).mean(dtype=jnp.float32)
    return jnp.where(state.bought >= 0, share, 0.0)


def render(state: ShopState) -> str:
    """The episode so far in words, on the host."""
    colour, material, cap = (int(x) for x in state.goal)
    wish = f"{COLOURS[colour]} {MATERIALS[material]} {CATEGORIES[int(state.name)]} for at most ${PRICES[cap]}"
    lines = [f"Task: buy a {wish}."]
    lines += [f"Lesson: {LESSONS[code]}." for code in np.asarray(state.shown) if code != NO_LESSON]
    for action, answer in zip(state.actions[: int(state.turn)], np.asarray(state.observations), strict=False):
        words = [VOCAB[int(i)] for i in answer if i != PAD]
        lines.append(f"> {VOCAB[int(action)].replace('-', ' ')}\n{words[0].replace('-', ' ')}")
        lines += [f"  {k // 3 + 1}. {' '.join(words[k + 1 : k + 4])}" for k in range(0, len(words) - 1, 3)]
    if bool(state.done):
        lines.append("Won." if bool(state.won) else f"Lost, score {float(score(state)):.2f}.")
    return "\n".join(lines)


def _draw_catalogue(key):
    return jnp.argsort(jax.random.bits(key, (NUM_ITEMS,))).astype(jnp.int32)


def _values(item):
    """Colour, material and price of items `[...]`, `[..., 3]`."""
    return jnp.stack([item // 16, item // 4 % 4, item % 4], axis=-1)


def _item_tokens(items):
    return jnp.asarray([COLOUR, MATERIAL, PRICE], jnp.int32) + _values(jnp.maximum(items, 0))


def _conditions(item, goal):
    """Whether colour, material and price are as wished, bool `[..., 3]`."""
    values = _values(item)
    return jnp.concatenate([values[..., :2] == goal[:2], values[..., 2:] <= goal[2:]], axis=-1)


def _matches(item, goal):
    return (item >= 0) & _conditions(item, goal).all(axis=-1)


def _kept(state):
    """The items of the list, bool `[64]` in the order of the catalogue; none without a list."""
    right = _conditions(state.catalogue, state.goal)[:, :2].all(axis=-1)
    return state.listed & (right | ~state.filtered)


def _page(state):
    """The items on the screen, int32 `[4]`, -1 for none."""
    kept = _kept(state)
    place = state.page * PAGE + jnp.arange(PAGE)
    is_there = kept & (jnp.cumsum(kept) - 1 == place[:, None])
    return jnp.where(is_there.any(axis=-1), jnp.sum(is_there * state.catalogue, axis=-1, dtype=jnp.int32), -1)


def _next_action(state, word, wanted_filter):
    """The action of one who believes in that word and that filter, and reads the page, `[1]`."""
    fits = _matches(_page(state), state.goal)
    return jnp.select(
        [_matches(state.opened, state.goal), fits.any(), ~state.listed, ~state.filtered],
        [BUY, OPEN + jnp.argmax(fits), SEARCH + word, FILTER + wanted_filter],
        NEXT,
    ).astype(jnp.int32)[None]
