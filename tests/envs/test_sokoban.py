"""Sokoban against a stepper in plain Python, its solver, and trajectories of jumanji 1.1.2.

golden/boards.npz: `sokoban_*` are eight episodes of jumanji's Sokoban (its toy and simple levels, dense reward) under
random moves, the second one solved by hand; the grids are its `fixed_grid` and `variable_grid` after each step.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rollax.envs import SokobanLevel, scripted_episode, sokoban, sokoban_from_text, sokoban_level, solve_sokoban
from rollax.envs.sokoban import (
    ACT,
    APPROACH,
    BLOCKED,
    BOX,
    CELL,
    CORNER,
    FIRST_BOX,
    GOES,
    INVALID,
    LESSONS,
    LEVELS,
    LOOK,
    MOVED,
    MOVES,
    NOTHING,
    OTHER_BOXES,
    PUSH,
    PUSHED,
    REPEAT,
    SOLVED,
    SYMBOLS,
    TARGET,
    VOCAB,
    WALL,
    SokobanState,
    dead_end,
    distances,
    frame,
    lesson,
    progress,
    render,
    start,
)

GOLDEN = dict(np.load(Path(__file__).parents[1] / "golden" / "boards.npz"))
HORIZON = 30
NUM = 300


@pytest.fixture(scope="module")
def environment():
    return sokoban()


@pytest.fixture(scope="module")
def played(environment):
    """Half expert, half random play with a few tokens that are no actions: starts, actions, states and steps."""

    def one(key):
        reset_key, mix_key, key = jax.random.split(key, 3)
        state, observation = environment.reset(reset_key)
        skill = jax.random.uniform(mix_key)

        def turn(state, key):
            which_key, token_key, key = jax.random.split(key, 3)
            token = jax.random.randint(token_key, (1,), ACT - 1, ACT + 5)
            follows = jax.random.uniform(which_key) < skill
            action = jnp.where(follows, environment.expert(key, state), token)
            state, step = environment.step(key, state, action)
            return state, (action, state, step)

        return state, observation, jax.lax.scan(turn, state, jax.random.split(key, HORIZON + 2))[1]

    begun, observation, (action, state, step) = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), NUM))
    return jax.tree.map(np.asarray, (begun, observation, action, state, step))


def at(tree, *index):
    return jax.tree.map(lambda x: x[index], tree)


class Game:
    """The rules once more, with sets of (row, column)."""

    def __init__(self, cells, agent):
        def where(mask):
            return {tuple(map(int, x)) for x in np.argwhere(mask)}

        self.walls = where(cells == WALL)
        self.targets = where((cells != WALL) & (cells % 2 == 1))
        self.boxes = where((cells == BOX) | (cells == BOX + TARGET))
        self.shape = cells.shape
        self.agent = divmod(int(agent), cells.shape[1])
        self.turn = self.effective = 0
        self.reached = self.pushed = self.done = self.won = False

    def codes(self):
        rows, cols = self.shape

        def code(x):
            return WALL if x in self.walls else (x in self.targets) + 2 * (x in self.boxes) + 4 * (x == self.agent)

        return [code((row, col)) for row in range(rows) for col in range(cols)]

    def next_to(self, cell):
        return [(cell[0] + down, cell[1] + right) for down, right in MOVES]

    def stuck(self):
        for box in self.boxes - self.targets:
            up, right, down, left = (cell in self.walls for cell in self.next_to(box))
            if (up or down) and (left or right):
                return True
        return False

    def play(self, token):
        home = len(self.boxes & self.targets)
        heard = INVALID
        if ACT <= token < ACT + 4:
            ahead = self.next_to(self.agent)[token - ACT]
            beyond = self.next_to(ahead)[token - ACT]
            heard = BLOCKED
            if ahead in self.boxes and beyond not in self.walls | self.boxes:
                self.boxes = (self.boxes - {ahead}) | {beyond}
                self.pushed, heard = True, PUSHED
            if ahead not in self.walls | self.boxes:
                self.agent, heard = ahead, heard if heard == PUSHED else MOVED
                self.effective += 1
                self.reached |= any(cell in self.boxes for cell in self.next_to(ahead))
        self.turn += 1
        reward = -0.1 + len(self.boxes & self.targets) - home
        if self.boxes <= self.targets:
            self.won, heard, reward = True, SOLVED, reward + 10
        self.done = self.won or self.turn == HORIZON
        return heard, reward

    def progress(self):
        return [
            self.effective >= 2,
            self.reached,
            self.pushed,
            not self.stuck(),
            bool(self.boxes & self.targets),
            self.effective >= max(1, self.turn / 2),
        ]

    def priority(self):
        if self.won:
            return REPEAT
        if self.stuck():
            return CORNER
        if self.effective < self.turn / 2:
            return LOOK
        if not self.pushed:
            return PUSH if self.reached else APPROACH
        return OTHER_BOXES if self.boxes & self.targets else FIRST_BOX


def test_agrees_with_a_stepper_in_plain_python(played):
    begun, first, action, state, step = played
    kinds = set()
    for i in range(NUM):
        game = Game(begun.cells[i], begun.agent[i])
        assert first.length[i] == 36 and first.ids[i, -1] == 0
        np.testing.assert_array_equal(first.ids[i, :36] - CELL, game.codes())
        for t in range(HORIZON + 2):
            frozen = game.done
            if frozen:
                assert step.observation.length[i, t] == 0 and not step.observation.ids[i, t].any()
                assert step.reward[i, t] == 0
                before, after = at(state, i, t - 1), at(state, i, t)
                assert all((a == b).all() for a, b in zip(before, after, strict=True))
            else:
                heard, reward = game.play(int(action[i, t, 0]))
                kinds |= {heard, LESSONS[game.priority()]}
                np.testing.assert_allclose(step.reward[i, t], reward, atol=1e-5)
                assert step.observation.length[i, t] == 37
                np.testing.assert_array_equal(step.observation.ids[i, t], [*(CELL + np.asarray(game.codes())), heard])
            assert step.terminated[i, t] == game.won and step.truncated[i, t] == (game.done and not game.won)
            assert step.info["won"][i, t] == game.won
            np.testing.assert_array_equal(step.info["progress"][i, t], game.progress())
            assert step.info["lesson"][i, t, 0] == game.priority()
    assert {BLOCKED, MOVED, PUSHED, SOLVED, INVALID} <= kinds and len(kinds) == 12  # every event, every priority


def test_boxes_and_walls_are_kept(played):
    begun, _, _, state, _ = played
    np.testing.assert_array_equal(state.home + state.away, 2)
    boxes = ((state.cells == BOX) | (state.cells == BOX + TARGET)).sum((-1, -2))
    np.testing.assert_array_equal(boxes, 2)
    np.testing.assert_array_equal(state.home, (state.cells == BOX + TARGET).sum((-1, -2)))
    assert ((state.cells == WALL) == (begun.cells == WALL)[:, None]).all()


def test_the_push_that_the_lesson_names_begins_a_solution(played):
    """Where no other push was made, the rest of the known solution solves the board from there, whatever was walked."""
    begun, _, _, state, step = played
    for i in range(60):
        t = int(np.argmax(~state.on_script[i])) if not state.on_script[i].all() else HORIZON
        now = at(state, i, t - 1) if t else at(begun, i)
        cells, left = now.cells.copy().reshape(-1), int(now.remaining)
        pushes = [int(x) for x in now.pushes[:left][::-1]]
        for push in pushes:
            stand, (down, right) = push // 4, MOVES[push % 4]
            offset = down * 6 + right
            assert cells[stand] <= TARGET and cells[stand + offset] in (BOX, BOX + TARGET)
            assert cells[stand + 2 * offset] <= TARGET
            cells[stand + offset] -= BOX
            cells[stand + 2 * offset] += BOX
        assert not (cells == BOX).any()
        if t and pushes and not now.won:
            assert step.info["lesson"][i, t - 1, 1] == GOES + pushes[0] % 4
        elif t:
            assert step.info["lesson"][i, t - 1, 1] == NOTHING


@pytest.mark.slow  # solutions of drawn levels are followed, and the solver tried, by default
@pytest.mark.parametrize("name", ["easy", "paper"])
def test_every_level_is_solved_by_its_own_solution_and_by_the_solver(name):
    level, horizon = LEVELS[name], LEVELS[name]["max_solution"]
    environment = sokoban(**level, horizon=horizon)
    keys = jax.random.split(jax.random.key(1), 100)
    states = jax.jit(jax.vmap(lambda key: environment.reset(key)[0]))(keys)
    assert (states.away > 0).all() and (states.home + states.away == level["num_boxes"]).all()
    assert np.mean(states.away == level["num_boxes"]) > 0.7

    def episode(key):
        return scripted_episode(key, environment, environment.expert)

    found = jax.jit(jax.vmap(episode))(keys)
    assert found.state.won.all()
    assert (np.asarray(found.step.info["progress"])[:, -1, :][:, [2, 3, 4, 5]]).all()
    for i in range(40):
        moves = solve_sokoban(states.cells[i], int(states.agent[i]))
        game = Game(np.asarray(states.cells[i]), states.agent[i])
        for move in moves:
            game.play(ACT + move)
        assert game.won


@pytest.mark.slow  # five drawn levels of the usual size are solved by default
def test_the_hard_level_keeps_its_word():
    level = jax.jit(lambda keys: jax.vmap(lambda key: sokoban_level(key, **LEVELS["hard"]))(keys))
    drawn = level(jax.random.split(jax.random.key(0), 50))
    assert drawn.cells.shape == (50, 10, 10) and drawn.pushes.shape == (50, 24)
    edge = np.ones((10, 10), bool)
    edge[1:-1, 1:-1] = False
    assert (np.asarray(drawn.cells)[:, edge] == WALL).all()
    environment = sokoban(levels=drawn, horizon=90)
    states = jax.vmap(start)(drawn)
    expert, step = jax.jit(jax.vmap(environment.expert)), jax.jit(jax.vmap(environment.step))
    keys = jax.random.split(jax.random.key(0), 50)
    for _ in range(90):
        states, _ = step(keys, states, expert(keys, states))
    assert states.won.all() and states.turn.max() > 60


def test_traced_numbers_bound_the_solution():
    def pushes_and_moves(pushes, moves, share):
        level = sokoban_level(jax.random.key(3), pushes=pushes, max_solution=moves, wall_share=share)
        return level.num_pushes, (level.cells == WALL).sum()

    pushes, walls = jax.jit(jax.vmap(pushes_and_moves))(
        jnp.asarray([1, 3, 8, 8]), jnp.asarray([21, 21, 2, 21]), jnp.asarray([0.0, 0.0, 0.0, 1.0])
    )
    assert pushes[0] == 1 and 1 <= pushes[1] <= 3 and 1 <= pushes[2] <= 2
    assert walls.tolist() == [20, 20, 20, 36 - 4]  # all but the room for a first pull and the other target


def test_agrees_with_jumanji():
    """Cells, player and reward of every step; jumanji ends where all four boxes are home, and so do we."""
    fixed, begun = GOLDEN["sokoban_fixed"], GOLDEN["sokoban_start"]
    cells = np.where(fixed == 1, WALL, (fixed == 2) * TARGET + (begun == 4) * BOX).astype(np.uint8)
    agent = np.argmax((begun == 3).reshape(8, -1), -1)
    ours = jax.vmap(start)(
        SokobanLevel(
            jnp.asarray(cells), jnp.asarray(agent, jnp.int32), jnp.zeros((8, 1), jnp.int16), jnp.zeros(8, jnp.int32)
        )
    )
    environment = sokoban(
        levels=SokobanLevel(cells, agent, np.zeros((8, 1), np.int16), np.zeros(8, np.int32)), horizon=1000
    )

    def episode(state, actions):
        def body(state, action):
            state, step = environment.step(jax.random.key(0), state, (ACT + action)[None])
            return state, (state, step.reward, step.terminated)

        return jax.lax.scan(body, state, actions)[1]

    states, reward, ended = jax.jit(jax.vmap(episode))(ours, jnp.asarray(GOLDEN["sokoban_action"], jnp.int32))
    done = GOLDEN["sokoban_done"]
    assert done.any(1).tolist() == [False, True, False, False, False, False, False, False]
    alive = np.cumsum(done, 1) - done == 0  # up to the end
    grid = np.where((np.asarray(states.cells) != WALL) & (np.asarray(states.cells) & BOX > 0), 4, 0)
    grid = grid.reshape(8, -1, 100)
    np.put_along_axis(grid, np.asarray(states.agent)[..., None], 3, -1)
    np.testing.assert_array_equal(grid.reshape(GOLDEN["sokoban_grid"].shape)[alive], GOLDEN["sokoban_grid"][alive])
    np.testing.assert_allclose(np.asarray(reward)[alive], GOLDEN["sokoban_reward"][alive], atol=1e-5)
    np.testing.assert_array_equal(np.asarray(ended)[alive], done[alive])


def test_jumanji_itself():
    """The same levels in an installed jumanji, move by move."""
    pytest.importorskip("jumanji")
    from jumanji.environments import Sokoban
    from jumanji.environments.routing.sokoban.generator import SimpleSolveGenerator

    theirs = Sokoban(generator=SimpleSolveGenerator(), time_limit=200)
    state, _ = theirs.reset(jax.random.key(0))
    lines = ["".join("#."[code - 1] if code else " " for code in row) for row in np.asarray(state.fixed_grid)]
    text = [
        "".join("@$"[v - 3] if v else symbol for v, symbol in zip(row, line, strict=True))
        for row, line in zip(np.asarray(state.variable_grid), lines, strict=True)
    ]
    ours = start(sokoban_from_text("\n".join(text)))
    environment = sokoban(levels=jax.tree.map(lambda x: x[None], sokoban_from_text("\n".join(text))), horizon=200)
    step, their_step = jax.jit(environment.step), jax.jit(theirs.step)
    for action in np.random.default_rng(1).integers(0, 4, 100):
        ours, result = step(jax.random.key(0), ours, jnp.asarray([ACT + action]))
        state, told = their_step(state, jnp.asarray(action, jnp.int32))
        np.testing.assert_allclose(result.reward, told.reward, atol=1e-6)
        assert divmod(int(ours.agent), 10) == tuple(map(int, state.agent_location))
        np.testing.assert_array_equal(np.asarray(ours.cells) % 6 >= BOX, np.asarray(state.variable_grid) == 4)


BOARD = "######\n#@ . #\n# $  #\n#  $.#\n#    #\n######"


def test_a_level_from_a_drawing_with_its_solution():
    level = sokoban_from_text(BOARD)
    assert render(start(level)).splitlines()[:6] == BOARD.split("\n") and int(level.num_pushes) == 0
    moves = solve_sokoban(level.cells, int(level.agent))
    known = sokoban_from_text(BOARD, moves, max_pushes=9)
    environment = sokoban(levels=jax.tree.map(lambda x: x[None], known))
    state, _ = environment.reset(jax.random.key(0), level=0)
    expert, step = jax.jit(environment.expert), jax.jit(environment.step)
    for _ in moves:
        state, _ = step(jax.random.key(0), state, expert(jax.random.key(0), state))
    assert bool(state.won) and "Won." in render(state) and LESSONS[REPEAT] in render(state)
    assert "3 moves" not in render(state) and f"after {len(moves)} moves" in render(state)


def test_the_solver_finds_the_fewest_pushes_and_knows_what_cannot_be_solved():
    level = sokoban_from_text("#######\n#@ $ .#\n#######")
    assert solve_sokoban(level.cells, int(level.agent)) == [1, 1, 1]
    solved = sokoban_from_text("####\n#@*#\n####")
    assert solve_sokoban(solved.cells, int(solved.agent)) == []
    for text in ("#####\n#@  #\n#  $#\n#. ##\n#####", "######\n#@$#.#\n######"):
        stuck = sokoban_from_text(text)
        assert solve_sokoban(stuck.cells, int(stuck.agent)) is None
    level = sokoban_from_text(BOARD)
    with pytest.raises(RuntimeError, match="max_positions=1"):
        solve_sokoban(level.cells, int(level.agent), max_positions=1)


def test_dead_ends_are_corners_and_never_solved():
    for text, dead in ((BOARD, False), ("#####\n#$ @#\n#  .#\n#####", True), ("#####\n#* @#\n#####", False)):
        level = sokoban_from_text(text)
        assert bool(dead_end(level.cells)) == dead
        assert not dead or solve_sokoban(level.cells, int(level.agent)) is None


def test_distances():
    free = jnp.asarray([[1, 1, 1, 0], [0, 0, 1, 0], [1, 1, 1, 0], [0, 0, 0, 1]], bool)
    far = np.asarray(distances(free, jnp.int32(0)))
    assert far[0].tolist()[:3] == [0, 1, 2] and far[1, 2] == 3 and far[2].tolist()[:3] == [6, 5, 4]
    assert far[3, 3] == far[0, 3] == 2**14


def test_sparse_rewards_and_a_bank():
    levels = jax.jit(lambda keys: jax.vmap(sokoban_level)(keys))(jax.random.split(jax.random.key(0), 5))
    environment = sokoban(levels=levels, reward="sparse")
    episode = jax.jit(
        jax.vmap(lambda i: scripted_episode(jax.random.key(0), environment, environment.expert, level=i))
    )(jnp.arange(5))
    total = (episode.step.reward * episode.mask).sum(1)
    np.testing.assert_array_equal(total, 10.0)
    begun = jax.jit(jax.vmap(lambda key: environment.reset(key)[0]))(jax.random.split(jax.random.key(1), 64))
    drawn = {np.asarray(x).tobytes() for x in begun.cells}
    assert drawn == {np.asarray(x).tobytes() for x in levels.cells}


def test_vmap_is_the_loop(environment, played):
    """What was played in one vmap, once more by single resets and steps."""
    begun, first, action, state, step = played
    reset, move = jax.jit(environment.reset), jax.jit(environment.step)
    for i, key in enumerate(jax.random.split(jax.random.key(0), NUM)[:3]):
        jax.tree.map(np.testing.assert_array_equal, reset(jax.random.split(key, 3)[0]), at((begun, first), i))
        now = at(begun, i)
        for t in range(4):
            found = move(key, now, action[i, t])
            jax.tree.map(np.testing.assert_array_equal, found, at((state, step), i, t))
            now = at(state, i, t)


@pytest.mark.slow  # the agreement with plain Python is that of compiled steps
def test_jit_is_no_jit(environment):
    key, action = jax.random.key(5), jnp.asarray([ACT + 2])
    state, _ = jax.jit(environment.reset)(key)
    plain, jitted = (step(key, state, action) for step in (environment.step, jax.jit(environment.step)))
    jax.tree.map(np.testing.assert_array_equal, plain, jitted)


def test_pictures():
    level = sokoban_from_text("#####\n#@$.#\n# *+#\n#####".replace("+", " "))
    state = start(level)
    image = np.asarray(jax.jit(frame)(state))
    assert image.shape == (32, 40, 3) and image.dtype == np.uint8
    tiles = image.reshape(4, 8, 5, 8, 3).swapaxes(1, 2).reshape(20, -1)
    codes = [SYMBOLS.index(symbol) for symbol in "######@$.## * ######"]
    for i in range(20):
        assert [bool((tiles[i] == tiles[j]).all()) for j in range(20)] == [codes[i] == codes[j] for j in range(20)]


def test_the_start_teaches_nothing(environment):
    state, _ = jax.jit(environment.reset)(jax.random.key(0))
    assert lesson(state).tolist() == [NOTHING, NOTHING]
    done = progress(state)
    assert done.tolist()[:3] == [False] * 3 and not bool(done[5])
    assert len(VOCAB) == ACT + 4 and isinstance(state, SokobanState)


BAD = (
    (dict(num_rows=4), "num_rows and num_cols must be at least 5, with at most 8192 cells, got 4 and 6"),
    (dict(num_rows=200, num_cols=200), "at most 8192 cells, got 200 and 200"),
    (dict(num_boxes=14), "num_boxes must be 1 to 13, got 14"),
    (dict(max_pushes=0), "max_pushes must be at least 1, got 0"),
    (dict(horizon=0), "horizon must be at least 1, got 0"),
    (dict(reward="dense"), r"reward must be one of \('shaped', 'sparse'\), got 'dense'"),
    (dict(levels=sokoban_from_text(BOARD)), r"levels must have cells \[M, R, C\], got the shape \(6, 6\)"),
)


@pytest.mark.parametrize("options, message", BAD)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        sokoban(**options)


def test_bad_calls(environment):
    state = start(sokoban_from_text(BOARD))
    with pytest.raises(ValueError, match=r"action must have the shape \(1,\), got \(2,\)"):
        environment.step(jax.random.key(0), state, jnp.asarray([ACT, ACT]))
    with pytest.raises(ValueError, match="levels must be given to sokoban, got level=3"):
        environment.reset(jax.random.key(0), level=3)
    banked = sokoban(levels=jax.tree.map(lambda x: x[None], sokoban_from_text(BOARD)))
    with pytest.raises(ValueError, match="level must be 0 to 0, got 99"):
        banked.reset(jax.random.key(0), level=99)
    for text, options, message in (
        ("#x#", {}, r"text must be of the symbols ' \.\$\*@\+#', got \['x'\]"),
        ("#@@$.#", {}, "text must have one player, got 2"),
        ("#@.#", {}, "text must have 1 to 1 boxes, as many as targets, got 0"),
        ("#@$$.#", {}, "text must have 1 to 1 boxes, as many as targets, got 2"),
        ("#@$ .#", {"solution": [1]}, r"solution must bring every box onto a target, got \[1\]"),
        ("#@$#. #", {"solution": [1, 1]}, r"solution must be of moves that change the board, got \[1, 1\]"),
        ("@$.", {"solution": [3, 1]}, r"solution must be of moves that change the board, got \[3, 1\]"),
        ("#@$ .#", {"solution": [1, 1], "max_pushes": 1}, "max_pushes must be at least 2, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            sokoban_from_text(text, **options)
