"""Minesweeper against a stepper in plain Python, proofs by brute force, and games of jumanji 1.1.2.

golden/boards.npz: `minesweeper_*` are sixteen games of jumanji's Minesweeper, six by six cells with three mines, whose
cells were opened one by one in random order, in every other game the mines last; the board after each step.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rollax.envs import boards, minesweeper, scripted_episode
from rollax.envs.minesweeper import (
    ACT,
    CASCADE,
    CELL,
    CLEARED,
    EXPLODED,
    GUESS,
    HIDDEN,
    INVALID,
    LESSONS,
    LEVELS,
    MINE,
    NO_GAIN,
    NOTHING,
    ONE_NUMBER,
    OPENED,
    PROVEN_MINE,
    PROVEN_SAFE,
    REPEAT,
    TWO_NUMBERS,
    USELESS,
    MinesweeperState,
    board,
    deduce,
    frame,
    lesson,
    progress,
    render,
    start,
)

GOLDEN = dict(np.load(Path(__file__).parents[1] / "golden" / "boards.npz"))
HORIZON = 15
NUM = 120
SHAPE = (6, 6)


@pytest.fixture(scope="module")
def environment():
    return minesweeper()


@pytest.fixture(scope="module")
def played(environment):
    """Half expert, half random play with a few tokens that are no actions: starts, actions, states and steps."""
    return play(environment, NUM)


def play(environment, num, skill=None):
    def one(key):
        reset_key, mix_key, key = jax.random.split(key, 3)
        state, observation = environment.reset(reset_key)
        ability = jax.random.uniform(mix_key) if skill is None else skill
        size = state.mines.size

        def turn(state, key):
            which_key, token_key, key = jax.random.split(key, 3)
            token = jax.random.randint(token_key, (1,), ACT - 2, ACT + size + 2)
            follows = jax.random.uniform(which_key) < ability
            action = jnp.where(follows, environment.expert(key, state), token)
            state, step = environment.step(key, state, action)
            return state, (action, state, step, deduce(state))

        keys = jax.random.split(key, environment.spec.max_turns + 1)
        return state, observation, deduce(state), jax.lax.scan(turn, state, keys)[1]

    found = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), num))
    begun, observation, deduced, (action, state, step, deduction) = jax.tree.map(np.asarray, found)
    return begun, observation, deduced, action, state, step, deduction


def at(tree, *index):
    return jax.tree.map(lambda x: x[index], tree)


def around(cell):
    row, col = divmod(cell, SHAPE[1])
    rows, cols = range(max(row - 1, 0), min(row + 2, SHAPE[0])), range(max(col - 1, 0), min(col + 2, SHAPE[1]))
    return frozenset(r * SHAPE[1] + c for r in rows for c in cols if (r, c) != (row, col))


AROUND = [around(cell) for cell in range(36)]
CLOSE = [
    [b for b in range(36) if b != a and max(abs(a // 6 - b // 6), abs(a % 6 - b % 6)) <= 2] for a in range(36)
]  # up to two cells away


def number(mines, cell):
    return len(AROUND[cell] & mines)


@functools.cache
def rules(mines, shown):
    """What single numbers prove, twice, then what pairs prove: (safe, mines, safe by single numbers), sets of cells."""
    hidden = frozenset(range(36)) - shown
    safe, known = frozenset(), frozenset()
    for _ in range(2):
        new_safe, new_known = set(), set()
        for cell in shown:
            unknown = AROUND[cell] & hidden - safe - known
            lacks = number(mines, cell) - len(AROUND[cell] & known)
            new_safe |= unknown if lacks == 0 else set()
            new_known |= unknown if lacks == len(unknown) else set()
        safe, known = safe | new_safe, known | new_known
    lacks = {cell: number(mines, cell) - len(AROUND[cell] & known) for cell in shown}
    unknown = {cell: AROUND[cell] & hidden - safe - known for cell in shown}
    new_safe, new_known = set(), set()
    for a in shown:
        for b in shown.intersection(CLOSE[a]):
            if lacks[b] - lacks[a] == len(unknown[b] - unknown[a]):
                new_known |= unknown[b] - unknown[a]
                new_safe |= unknown[a] - unknown[b]
    return safe | new_safe, known | new_known, safe


class Game:
    """The rules once more, with sets of cells."""

    def __init__(self, mines, opened):
        self.mines = frozenset(np.flatnonzero(mines).tolist())
        self.shown = frozenset(np.flatnonzero(opened).tolist())
        self.hit = None
        self.turn = self.effective = self.useless = self.longest = 0
        self.deduced = self.cascaded = self.heedless = self.done = self.won = False

    def codes(self):
        return [number(self.mines, x) if x in self.shown else MINE if x == self.hit else HIDDEN for x in range(36)]

    def play(self, cell):
        self.turn += 1
        safe, proven, _ = rules(self.mines, self.shown)
        if not 0 <= cell < 36 or cell in self.shown:
            self.useless += 1
            self.longest = max(self.longest, self.useless)
            self.done = self.turn == HORIZON
            return (USELESS if 0 <= cell < 36 else INVALID), -1.0
        self.useless = 0
        self.deduced |= cell in safe
        if cell in self.mines:
            self.hit, self.done, self.heedless = cell, True, cell in proven
            return EXPLODED, -0.1
        before, queue, reached = len(self.shown), [cell], {cell}
        while queue:
            now = queue.pop()
            if number(self.mines, now) == 0:
                queue += AROUND[now] - reached
                reached |= AROUND[now]
        self.shown |= reached
        self.effective += 1
        gained = len(self.shown) - before
        self.cascaded |= gained > 1
        self.won = len(self.shown) + len(self.mines) == 36
        self.done = self.won or self.turn == HORIZON
        if self.won:
            return CLEARED, 10.0
        return (CASCADE, 2.0) if gained > 1 else (OPENED, 0.5)

    def progress(self):
        recovered = self.effective > 0 and self.useless == 0 and self.longest <= 3
        systematic = self.effective >= max(1, self.turn / 2)
        return [self.effective >= 2, len(self.shown) > 3.6, self.deduced, recovered, self.cascaded, systematic]

    def lesson(self):
        if self.won:
            return [REPEAT, NOTHING]
        safe, _, simple = rules(self.mines, self.shown)
        proof = ONE_NUMBER if simple else TWO_NUMBERS if safe else NOTHING
        if self.heedless:
            return [PROVEN_MINE, proof]
        return [NO_GAIN if self.useless else PROVEN_SAFE if safe else GUESS, proof]


def test_agrees_with_a_stepper_in_plain_python(played):
    begun, first, _, action, state, step, _ = played
    events, lessons = set(), set()
    for i in range(NUM):
        game = Game(begun.mines[i], begun.opened[i])
        assert first.length[i] == 36 and first.ids[i, -1] == 0
        np.testing.assert_array_equal(first.ids[i, :36] - CELL, game.codes())
        for t in range(HORIZON + 1):
            if game.done:
                assert step.observation.length[i, t] == 0 and not step.observation.ids[i, t].any()
                assert step.reward[i, t] == 0
                assert all((a == b).all() for a, b in zip(at(state, i, t - 1), at(state, i, t), strict=True))
            else:
                heard, reward = game.play(int(action[i, t, 0]) - ACT)
                events.add(heard)
                np.testing.assert_allclose(step.reward[i, t], reward, atol=1e-6)
                assert step.observation.length[i, t] == 37
                np.testing.assert_array_equal(step.observation.ids[i, t], [*(CELL + np.asarray(game.codes())), heard])
            ended = game.won or game.hit is not None
            assert step.terminated[i, t] == ended and step.truncated[i, t] == (game.done and not ended)
            assert step.info["won"][i, t] == game.won
            np.testing.assert_array_equal(step.info["progress"][i, t], game.progress())
            np.testing.assert_array_equal(step.info["lesson"][i, t], game.lesson())
            lessons |= set(game.lesson())
    assert events == {INVALID, USELESS, OPENED, CASCADE, CLEARED, EXPLODED}
    assert lessons == set(range(len(LESSONS)))


def test_mines_are_kept_and_something_is_left_to_do(played):
    begun, _, _, _, state, _, _ = played
    assert (begun.mines.sum((-1, -2)) == 3).all()
    assert (state.mines == begun.mines[:, None]).all()
    assert (begun.opened.sum((-1, -2)) >= 1).all() and not (begun.opened & begun.mines).any()
    np.testing.assert_array_equal(state.left, (~state.opened & ~state.mines).sum((-1, -2)))


SMALL = {"num_rows": 5, "num_cols": 5, "num_mines": 1}


@pytest.mark.parametrize(
    "options, lone", [pytest.param({}, 0.01, marks=pytest.mark.slow), pytest.param(SMALL, 0.3)], ids=["paper", "small"]
)
def test_an_episode_begins_with_a_cascade_and_something_left_to_do(options, lone):
    """A blank open cell has open neighbours, as in play; on small boards with few mines that often leaves nothing."""
    reset = jax.jit(jax.vmap(minesweeper(**options).reset))
    state, _ = reset(jax.random.split(jax.random.key(4), 500))
    codes = np.asarray(jax.jit(jax.vmap(board))(state))
    assert (state.left > 0).all() and (codes != MINE).all()
    besides = jax.jit(jax.vmap(lambda x: [boards.neighbor(x, move, 0) for move in boards.KING]))
    for beside in besides(codes):
        assert not ((codes == 0) & (np.asarray(beside) == HIDDEN)).any()
    alone = (codes != HIDDEN).sum((1, 2)) == 1
    assert alone.mean() > lone and (codes[alone] == HIDDEN).any(0).all()


def test_what_is_proven_holds_on_every_board_that_shows_the_same_numbers():
    """All 2**16 sets of mines on 4 x 4 cells, by brute force; the rules may miss proofs, but few."""
    begun, _, deduced, _, state, _, deduction = play(minesweeper(4, 4, 3), 60, 0.8)
    near = [[j for j in range(16) if j != i and max(abs(i // 4 - j // 4), abs(i % 4 - j % 4)) == 1] for i in range(16)]
    layouts = (np.arange(2**16)[:, None] >> np.arange(16) & 1).astype(np.uint8)
    numbers = np.stack([layouts[:, cells].sum(1, dtype=np.uint8) for cells in near], 1)
    found = provable = 0
    for i in range(60):
        for t in range(-1, 3):
            now, told = (at(begun, i), at(deduced, i)) if t < 0 else (at(state, i, t), at(deduction, i, t))
            mines, opened = now.mines.reshape(-1), now.opened.reshape(-1)
            shown = opened & ~mines
            fits = np.ones(2**16, bool)
            for cell in np.flatnonzero(shown):
                fits &= (numbers[:, cell] == mines[near[cell]].sum()) & (layouts[:, cell] == 0)
            share = layouts[fits].mean(0)
            assert (share[told.safe.reshape(-1)] == 0).all() and (share[told.mines.reshape(-1)] == 1).all()
            assert not (told.safe.reshape(-1) & shown).any() and (told.safe | ~told.simple).all()
            found += told.safe.sum()
            provable += (~shown & (share == 0)).sum()
    assert provable > 100 and found / provable > 0.85


def test_the_lesson_never_reads_hidden_mines(played):
    """Two boards that show the same teach the same: the hidden mines may be anywhere else."""
    mines = np.zeros((2, 6, 6), bool)
    mines[:, 0, 0] = True
    mines[0, 4, 4] = mines[1, 5, 5] = True
    opened = np.zeros((6, 6), bool)
    opened[1, 1] = opened[0, 1] = opened[1, 0] = True
    states = jax.vmap(start)(jnp.asarray(mines), jnp.asarray([opened, opened]))
    states = states._replace(turn=states.turn + 1)
    codes, lessons, found = jax.jit(jax.vmap(lambda state: (board(state), lesson(state), deduce(state))))(states)
    for pair in (codes, lessons, *found):
        np.testing.assert_array_equal(pair[0], pair[1])
    assert lessons[0].tolist() == [PROVEN_SAFE, TWO_NUMBERS]


@pytest.mark.slow  # how often it wins; half of the play that agrees with plain Python is its own
@pytest.mark.parametrize("name, reward, least", [("paper", "sparse", 0.9), ("classic", "shaped", 0.75)])
def test_the_expert(name, reward, least):
    environment = minesweeper(**LEVELS[name], reward=reward)

    def episode(key):
        return scripted_episode(key, environment, environment.expert)

    found = jax.jit(jax.vmap(episode))(jax.random.split(jax.random.key(2), 200))
    assert found.state.won.mean() > least
    assert not found.state.heedless.any() and (found.state.longest == 0).all()
    assert (found.state.mines.sum((-1, -2)) == LEVELS[name]["num_mines"]).all()
    if name == "classic":  # the first move is safe
        assert (found.state.effective > 0).all()
    else:
        total = (found.step.reward * found.mask).sum(1)
        np.testing.assert_array_equal(total, 10.0 * found.state.won)


def test_mines_are_uniform_and_so_they_stay_after_a_safe_first_move():
    """4000 boards of 3 x 3 with two mines: the frequency of each pair of cells, by a chi-squared bound."""
    environment = minesweeper(3, 3, 2, first="safe", cascade=False)

    def one(key):
        state, observation = environment.reset(key)
        after, step = environment.step(key, state, jnp.asarray([ACT + 4]))
        return state.mines, after.mines, after.exploded, observation.ids, step.observation.ids

    before, after, exploded, ids, next_ids = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(3), 4000))
    assert not exploded.any() and (ids[:, :9] == CELL + HIDDEN).all()
    assert (after.sum((-1, -2)) == 2).all() and not after[:, 1, 1].any()
    np.testing.assert_array_equal(next_ids[:, 4] - CELL, 2)  # every mine is next to the centre
    moved = (before != after).any((1, 2))
    np.testing.assert_array_equal(moved, before[:, 1, 1])
    for mines, pairs in ((before, 36), (after, 28)):
        codes = np.asarray(mines).reshape(4000, 9) @ (1 << np.arange(9))
        counts = np.unique(codes, return_counts=True)[1]
        assert len(counts) == pairs
        expected = 4000 / pairs
        assert ((counts - expected) ** 2 / expected).sum() < 2 * pairs  # 1 in 5000


def test_agrees_with_jumanji():
    """Single cells, as jumanji opens them: boards, explosion and clearing of every step up to the end."""
    mines, cells, done = GOLDEN["minesweeper_mines"], GOLDEN["minesweeper_cell"], GOLDEN["minesweeper_done"]
    environment = minesweeper(horizon=100, cascade=False)

    def episode(mines, cells):
        def body(state, cell):
            state, step = environment.step(jax.random.key(0), state, (ACT + cell)[None])
            return state, (board(state), step.terminated, state.exploded)

        return jax.lax.scan(body, start(mines, jnp.zeros(SHAPE, bool)), cells.astype(jnp.int32))[1]

    boards_, ended, exploded = jax.jit(jax.vmap(episode))(jnp.asarray(mines), jnp.asarray(cells))
    alive = np.cumsum(done, 1) - done == 0
    np.testing.assert_array_equal(np.asarray(ended)[alive], done[alive])
    assert done.any(1).all() and 0 < np.asarray(exploded).any(1).sum() < 16
    theirs = GOLDEN["minesweeper_board"]
    hidden = np.where(theirs < 0, HIDDEN, theirs)
    shown = np.where(np.asarray(boards_) == MINE, hidden, np.asarray(boards_))  # jumanji shows the number under a mine
    np.testing.assert_array_equal(shown[alive], hidden[alive])


def test_a_cascade_is_what_jumanji_shows_cell_by_cell(played):
    """Opening one by one what a cascade opened, jumanji shows the same numbers; needs jumanji."""
    pytest.importorskip("jumanji")
    from jumanji.environments import Minesweeper
    from jumanji.environments.logic.minesweeper.generator import UniformSamplingGenerator

    begun, first, *_ = played
    theirs = Minesweeper(generator=UniformSamplingGenerator(6, 6, 3))
    state, _ = theirs.reset(jax.random.key(0))
    step = jax.jit(theirs.step)
    for i in range(20):
        state.flat_mine_locations = jnp.asarray(np.flatnonzero(begun.mines[i]), jnp.int32)
        state.board = jnp.full(SHAPE, -1, jnp.int32)
        now = state
        for cell in np.flatnonzero(begun.opened[i]):
            now, _ = step(now, jnp.asarray(divmod(int(cell), 6), jnp.int32))
        codes = first.ids[i, :36].reshape(SHAPE) - CELL
        np.testing.assert_array_equal(np.where(codes == HIDDEN, -1, codes), now.board)


def test_vmap_is_the_loop(environment, played):
    """What was played in one vmap, once more by single resets and steps."""
    begun, first, _, action, state, step, _ = played
    reset, move = jax.jit(environment.reset), jax.jit(environment.step)
    for i, key in enumerate(jax.random.split(jax.random.key(0), NUM)[:3]):
        jax.tree.map(np.testing.assert_array_equal, reset(jax.random.split(key, 3)[0]), at((begun, first), i))
        now = at(begun, i)
        for t in range(4):
            found = move(key, now, action[i, t])
            jax.tree.map(np.testing.assert_array_equal, found, at((state, step), i, t))
            now = at(state, i, t)


@pytest.mark.slow  # the agreement with plain Python is that of compiled steps
def test_jit_is_no_jit():
    environment = minesweeper(3, 3, 2)
    key, action = jax.random.key(5), jnp.asarray([ACT + 5])
    state, _ = jax.jit(environment.reset)(key)
    plain, jitted = (step(key, state, action) for step in (environment.step, jax.jit(environment.step)))
    jax.tree.map(np.testing.assert_array_equal, plain, jitted)


def test_words_and_pictures():
    mines = jnp.zeros(SHAPE, bool).at[0, 0].set(True).at[1, 1].set(True)
    step = jax.jit(minesweeper().step)
    state = start(mines, jnp.zeros(SHAPE, bool))
    state, _ = step(jax.random.key(0), state, jnp.asarray([ACT + 35]))
    assert render(state).splitlines()[:2] == ["# # 1 . . .", "# # 1 . . ."]
    assert LESSONS[PROVEN_SAFE] not in render(state) or bool(deduce(state).safe.any())
    state, _ = step(jax.random.key(0), state, jnp.asarray([ACT]))
    text = render(state)
    assert text.startswith("* #") and "Lost." in text and "2 mines" in text and "after 2 moves" in text
    image = np.asarray(jax.jit(frame)(state))
    assert image.shape == (48, 48, 3) and image.dtype == np.uint8
    tiles = image.reshape(6, 8, 6, 8, 3).swapaxes(1, 2).reshape(36, -1)
    codes = np.asarray(board(state)).reshape(-1)
    same = (tiles[:, None] == tiles).all(-1)
    np.testing.assert_array_equal(same, codes[:, None] == codes)


def test_the_start_teaches_nothing(environment):
    state, _ = jax.jit(environment.reset)(jax.random.key(0))
    assert isinstance(state, MinesweeperState) and lesson(state).tolist() == [NOTHING, NOTHING]
    done = progress(state)
    assert not done[jnp.asarray([0, 2, 3, 4, 5])].any()
    assert len(environment.spec.vocab) == ACT + 36 and environment.spec.vocab[ACT + 7] == "open-2-2"


@pytest.mark.parametrize("shape", [(6, 6), (3, 12), (12, 10)])
def test_bitboards_against_grids(shape):
    """Packing, growing, counting neighbours, adding and subtracting, on boards of one to five words."""
    rng = np.random.default_rng(0)
    grid, other = rng.random(shape) < 0.4, rng.random(shape) < 0.5

    def results(grid, other):
        bits, more = boards.pack(grid), boards.pack(other)
        inside = boards.everything(shape)
        near = boards.count_of(boards.neighbors(bits, shape[1]))
        plus = boards.add(near, [more])
        return {
            "same": boards.unpack(bits, shape),
            "count": bits.count(),
            "any": (bits & ~bits).any(),
            "first": boards.unpack(bits.first(), shape),
            "grown": boards.unpack(boards.grow(bits, shape[1]) & inside, shape),
            "near": boards.unpack_number(near, shape),
            "plus": boards.unpack_number(plus, shape),
            "back": boards.unpack_number(boards.subtract(plus[:4], [more, *[bits ^ bits] * 3]), shape),
            "differ": boards.unpack(boards.differ([bits], [more]) & inside, shape),
            "cells": boards.unpack(boards.from_cells(jnp.asarray([5, 8]), jnp.asarray([True, False]), shape), shape),
            "moved": boards.unpack(bits.ahead(jnp.uint32(2 * (shape[1] + 2) + 2)) & inside, shape),
        }

    found = jax.jit(results)(grid, other)
    near = sum(np.asarray(boards.neighbor(jnp.asarray(grid, jnp.int32), move, 0)) for move in boards.KING)
    moved = np.zeros(shape, bool)
    moved[:-2, :-2] = grid[2:, 2:]
    expected = {
        "same": grid,
        "count": grid.sum(),
        "any": False,
        "first": np.arange(grid.size).reshape(shape) == grid.argmax(),
        "grown": grid | (near > 0),
        "near": near,
        "plus": near + other,
        "back": near,
        "differ": grid != other,
        "cells": np.arange(grid.size).reshape(shape) == 5,
        "moved": moved,
    }
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


BAD = (
    (dict(num_rows=1), "num_rows must be at least 2, num_cols 2 to 12, and cells at most 256, got 1 and 6"),
    (dict(num_cols=13), "got 6 and 13"),
    (dict(num_rows=30, num_cols=12), "got 30 and 12"),
    (dict(num_mines=35), "num_mines must be 1 to 34, got 35"),
    (dict(horizon=0), "horizon must be at least 1, got 0"),
    (dict(reward="dense"), r"reward must be one of \('shaped', 'sparse'\), got 'dense'"),
    (dict(first="open"), r"first must be one of \('opened', 'safe'\), got 'open'"),
)


@pytest.mark.parametrize("options, message", BAD)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        minesweeper(**options)


def test_bad_actions(environment):
    state = start(jnp.zeros(SHAPE, bool).at[0, 0].set(True), jnp.zeros(SHAPE, bool))
    with pytest.raises(ValueError, match=r"action must have the shape \(1,\), got \(\)"):
        environment.step(jax.random.key(0), state, jnp.int32(ACT))
