"""Sokoban as a token environment: push every box onto a target, one move a turn, on boards made by reverse play.

Board, horizon and subtasks of RetroAgent's bench (arXiv 2603.08561); rewards and moves of gym-sokoban and of jumanji's
Sokoban. Alphabet: `R` rows, `C` columns, `P` pushes of the known solution, `M` levels.
"""

import heapq
from collections import deque
from collections.abc import Sequence
from itertools import count
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rollax.envs.boards import draw_tiles, neighbor, over, picture
from rollax.envs.environment import Environment, Step, Tokens, TokenSpec

NUM_SUBTASKS = 6
REWARDS = ("shaped", "sparse")
MOVE_REWARD, BOX_REWARD, SOLVED_REWARD = -0.1, 1.0, 10.0
# A cell is TARGET and BOX as bits, or WALL; the player, who is kept apart, would be PLAYER on top of the first two.
FLOOR, TARGET, BOX, PLAYER, WALL = 0, 1, 2, 4, 6
# Up, right, down, left, as in jumanji; the way back of direction d is d ^ 2.
MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))
SYMBOLS = " .$*@+#"
# The order of the vocabulary: <pad>, cells, what a move did, actions.
PAD = 0
CELL = 1
BLOCKED, MOVED, PUSHED, SOLVED, INVALID = range(CELL + 7, CELL + 12)
ACT = INVALID + 1
NUM_ACTIONS = 4
VOCAB = (
    "<pad>",
    *("floor", "target", "box", "box-on-target", "player", "player-on-target", "wall"),
    *("blocked", "moved", "pushed", "solved", "invalid"),
    *("up", "right", "down", "left"),
)
LESSONS = (
    "nothing learned",
    "this was solved: do the same again",
    "a box off its target stuck in a corner: look where a box can still go before pushing it",
    "most moves changed nothing: look for walls before moving",
    "walk to a box before anything else",
    "push a box: none was moved",
    "bring a first box onto a target",
    "a box is on a target: leave it there and bring the others",
    *(f"the first push of the known solution that was not made goes {name}" for name in VOCAB[ACT:]),
)
NOTHING, REPEAT, CORNER, LOOK, APPROACH, PUSH, FIRST_BOX, OTHER_BOXES, GOES = range(9)
# Levels of difficulty: keywords of `sokoban` and `sokoban_level`. "paper" is the board of the paper.
LEVELS = {
    "easy": {"num_rows": 6, "num_cols": 6, "num_boxes": 1, "max_pushes": 4, "max_solution": 12},
    "paper": {"num_rows": 6, "num_cols": 6, "num_boxes": 2, "max_pushes": 8, "max_solution": 21},
    "medium": {"num_rows": 8, "num_cols": 8, "num_boxes": 3, "max_pushes": 16, "max_solution": 50},
    "hard": {"num_rows": 10, "num_cols": 10, "num_boxes": 4, "max_pushes": 24, "max_solution": 90},
}
HORIZONS = {"easy": 15, "paper": 30, "medium": 70, "hard": 120}
MAX_CELLS = 2**13  # 4 * cell + direction is int16
_FAR = 2**14  # no path
_FRESH = 3.0  # nats by which a box that is still on a target is likelier to be pulled than another


class SokobanLevel(NamedTuple):
    """A board and its known solution; with a leading axis M, a bank of levels.

    Attributes:
      cells: uint8 `[R, C]`, codes of `SYMBOLS` without the player.
      agent: int32 `[]`, the player's cell, row by row.
      pushes: int16 `[P]`, the solution from its end: `4 * cell + direction`, the cell where the player stands.
      num_pushes: int32 `[]`, how many of them count; 0 where no solution is known.
    """

    cells: jax.Array
    agent: jax.Array
    pushes: jax.Array
    num_pushes: jax.Array


class SokobanState(NamedTuple):
    """One episode; every field freezes when it is done.

    Attributes:
      cells, agent, pushes: as in `SokobanLevel`.
      remaining: int32 `[]`, the pushes of the known solution that are still to be made, `pushes[remaining - 1]` first.
      on_script: bool `[]`, no other push was made: the known solution still solves the board.
      home, away: int32 `[]`, boxes on targets and off them.
      turn, effective: int32 `[]`, moves so far and those that changed the board.
      reached, pushed: bool `[]`, a move led next to a box; a move pushed one.
      done, won: bool `[]`.
    """

    cells: jax.Array
    agent: jax.Array
    pushes: jax.Array
    remaining: jax.Array
    on_script: jax.Array
    home: jax.Array
    away: jax.Array
    turn: jax.Array
    effective: jax.Array
    reached: jax.Array
    pushed: jax.Array
    done: jax.Array
    won: jax.Array


def sokoban(
    num_rows: int = 6,
    num_cols: int = 6,
    num_boxes: int = 2,
    *,
    max_pushes: int = 8,
    pushes: int | jax.Array | None = None,
    max_solution: int | jax.Array = 21,
    wall_share: float | jax.Array = 0.15,
    horizon: int = 30,
    reward: str = "shaped",
    levels: SokobanLevel | None = None,
) -> Environment:
    """Push every box onto a target.

    The first observation is the board, row by row, a token a cell; every later one is the board and what the move did:
    blocked, moved, pushed, solved, or invalid where the token was no action. An action is one token. `LEVELS` holds
    levels of difficulty: `sokoban(**LEVELS["hard"], horizon=HORIZONS["hard"])`.

    Args:
      num_rows, num_cols, num_boxes, max_pushes, pushes, max_solution, wall_share: of `sokoban_level`, which makes a new
        board for each episode. With `levels` they have no effect.
      horizon: moves after which an episode is cut.
      reward: "shaped" for -0.1 a move, +1 for a box onto a target, -1 for one off it and +10 for the solved board;
        "sparse" for the +10 alone.
      levels: a bank (`sokoban_level` under vmap, `sokoban_from_text`) to draw from instead. Under auto-reset every
        environment makes a board in every step, so a bank is what makes steps fast.

    Returns:
      The environment. `reset(key, level=None)`: the number of the level in the bank (random if None). Terminated when
      solved, truncated at the horizon. Info: `progress` bool `[6]`, `lesson` int32 `[2]`, `won` bool `[]`. The expert
      follows the known solution; after a push that is not part of it, or where none is known, it moves at random
      (`solve_sokoban` finds solutions on the host).

    Raises:
      ValueError: sizes out of range, a horizon below one, an unknown reward, a level without a bank or not in it,
        levels that are not `[M, R, C]`, or an action that is not `[1]`.
    """
    if levels is None:
        _check_sizes(num_rows, num_cols, num_boxes, max_pushes)
    elif jnp.ndim(levels.cells) != 3:
        raise ValueError(f"levels must have cells [M, R, C], got the shape {jnp.shape(levels.cells)}")
    else:
        num_rows, num_cols = levels.cells.shape[1:]
    if horizon < 1:
        raise ValueError(f"horizon must be at least 1, got {horizon}")
    if reward not in REWARDS:
        raise ValueError(f"reward must be one of {REWARDS}, got {reward!r}")
    size = num_rows * num_cols
    spec = TokenSpec(VOCAB, max_observation=size + 1, max_action=1, max_turns=horizon, stop_ids=(), pad_id=PAD)

    def observe(state, heard, length):
        at_agent = jnp.arange(size) == state.agent
        ids = CELL + state.cells.reshape(size).astype(jnp.int32) + jnp.where(at_agent, PLAYER, 0)
        ids = jnp.append(ids, heard)
        return Tokens(jnp.where(length > 0, ids, PAD).astype(jnp.int32), jnp.asarray(length, jnp.int32))

    def reset(key, level=None):
        if levels is not None:
            num_levels = levels.cells.shape[0]
            if level is None:
                level = jax.random.randint(key, (), 0, num_levels, jnp.int32)
            elif not isinstance(level, jax.core.Tracer) and not 0 <= int(level) < num_levels:
                raise ValueError(f"level must be 0 to {num_levels - 1}, got {level}")
            drawn = jax.tree.map(lambda x: jnp.asarray(x)[level], levels)
        elif level is None:
            drawn = sokoban_level(key, num_rows, num_cols, num_boxes, max_pushes, pushes, max_solution, wall_share)
        else:
            raise ValueError(f"level needs a bank: levels must be given to sokoban, got level={level}")
        state = start(drawn)
        return state, observe(state, PAD, size)

    def step(key, state, action):
        del key
        if jnp.shape(action) != (1,):
            raise ValueError(f"action must have the shape (1,), got {jnp.shape(action)}")
        token = jnp.asarray(action, jnp.int32)[0]
        valid = (token >= ACT) & (token < ACT + NUM_ACTIONS)
        new, moves, pushes_box = _move(state, jnp.where(valid, token - ACT, 0), valid)
        heard = jnp.select([~valid, new.won, pushes_box, moves], [INVALID, SOLVED, PUSHED, MOVED], BLOCKED)
        new = new._replace(done=new.won | (new.turn >= horizon))
        value = SOLVED_REWARD * new.won
        if reward == "shaped":
            value += MOVE_REWARD + BOX_REWARD * (new.home - state.home)
        frozen = state.done
        new = jax.tree.map(lambda old, new: jnp.where(frozen, old, new), state, new)
        observation = observe(new, heard, jnp.where(frozen, 0, size + 1))
        value = jnp.where(frozen, 0.0, value).astype(jnp.float32)
        info = {"progress": progress(new), "lesson": lesson(new), "won": new.won}
        return new, Step(observation, value, new.won, new.done & ~new.won, info)

    return Environment(reset, step, spec, render=render, expert=expert)


def start(level: SokobanLevel) -> SokobanState:
    """The state at the start of a level (one, without the axis M)."""
    zero, no = jnp.int32(0), jnp.zeros((), bool)
    return SokobanState(
        cells=level.cells,
        agent=level.agent,
        pushes=level.pushes,
        remaining=level.num_pushes,
        on_script=level.num_pushes > 0,
        home=(level.cells == TARGET + BOX).sum(dtype=jnp.int32),
        away=(level.cells == BOX).sum(dtype=jnp.int32),
        turn=zero,
        effective=zero,
        reached=no,
        pushed=no,
        done=no,
        won=no,
    )


def progress(state: SokobanState) -> jax.Array:
    """The subtasks done, bool `[6]`, as RetroAgent lists them.

    At least two moves changed the board; a move led next to a box; a box was pushed; no box is in a dead end; a box is
    on a target; at least half of the moves, and one, changed the board.
    """
    systematic = (state.effective > 0) & (2 * state.effective >= state.turn)
    return jnp.stack(
        [state.effective >= 2, state.reached, state.pushed, ~dead_end(state.cells), state.home > 0, systematic]
    )


def lesson(state: SokobanState) -> jax.Array:
    """What the episode truly taught, codes int32 `[2]` of `LESSONS`: the next priority, and a push of the solution.

    The push is the first of the known solution that was not made (nothing where all were, or none is known). At the
    start of an episode nothing was learned.
    """
    priority = jnp.select(
        [
            state.turn == 0,
            state.won,
            dead_end(state.cells),
            2 * state.effective < state.turn,
            ~state.reached & ~state.pushed,
            ~state.pushed,
            state.home == 0,
        ],
        [NOTHING, REPEAT, CORNER, LOOK, APPROACH, PUSH, FIRST_BOX],
        OTHER_BOXES,
    )
    direction = state.pushes[jnp.maximum(state.remaining - 1, 0)] % 4
    known = (state.turn > 0) & ~state.won & (state.remaining > 0)
    return jnp.stack([priority, jnp.where(known, GOES + direction, NOTHING)]).astype(jnp.int32)


def dead_end(cells: jax.Array) -> jax.Array:
    """Whether a box off its target has two orthogonal walls and can never move: bool `[]` for cells `[R, C]`."""
    up, right, down, left = (neighbor(cells == WALL, move, True) for move in MOVES)
    return ((cells == BOX) & (up | down) & (left | right)).any()


def expert(key: jax.Array, state: SokobanState) -> jax.Array:
    """The next move of the known solution, a token `[1]`; a random move where there is none any more."""
    stand, direction = jnp.divmod(_next_push(state), 4)
    far = distances(state.cells <= TARGET, stand)
    ahead = jnp.stack([neighbor(far, move, _FAR).reshape(-1)[state.agent] for move in MOVES])
    scripted = jnp.where(state.agent == stand, direction, jnp.argmin(ahead))
    guess = jax.random.randint(key, (), 0, NUM_ACTIONS, jnp.int32)
    return (ACT + jnp.where(state.on_script & (state.remaining > 0), scripted, guess)).astype(jnp.int32)[None]


def distances(free: jax.Array, source: jax.Array) -> jax.Array:
    """Steps from a cell to every other, int32 `[R, C]`; 2**14 where no way leads.

    Args:
      free: bool `[R, C]`, where one may go.
      source: int32 `[]`, the cell, row by row, free or not.
    """
    at_source = (jnp.arange(free.size) == source).reshape(free.shape)

    def spread(carry):
        far, _ = carry
        nearest = jnp.stack([neighbor(far, move, _FAR) for move in MOVES]).min(0)
        new = jnp.where(free, jnp.minimum(far, nearest + 1), far)
        return new, (new != far).any()

    begin = jnp.where(at_source, 0, _FAR).astype(jnp.int32)
    return jax.lax.while_loop(lambda carry: carry[1], spread, (begin, jnp.asarray(True)))[0]


class _Play(NamedTuple):
    """A position of the reverse play, and the way there."""

    boxes: jax.Array  # bool [R, C]
    agent: jax.Array
    used: jax.Array  # moves so far
    pulls: jax.Array  # pulls so far


def sokoban_level(
    key: jax.Array,
    num_rows: int = 6,
    num_cols: int = 6,
    num_boxes: int = 2,
    max_pushes: int = 8,
    pushes: int | jax.Array | None = None,
    max_solution: int | jax.Array = 21,
    wall_share: float | jax.Array = 0.15,
) -> SokobanLevel:
    """Makes a board with a known solution: from the solved board, boxes are pulled away one cell at a time.

    The board has walls around it and random ones inside; one target has room for a first pull. Every pull is drawn
    among those that the player can walk to, boxes that still stand on a target more often. Of the positions on the way
    the one with the most boxes off their targets is taken, the latest of such; then the player walks to a random
    cell within reach. So the start is never solved, and the way back solves it. Meant for jit and vmap: nothing is
    rejected and drawn again.

    Args:
      num_rows, num_cols: with the walls around, at least 5; at most 8192 cells.
      num_boxes: at least 1, and at most the inner cells less 3.
      max_pushes: P, at least 1.
      pushes: pulls to make, at most P (default); may be traced.
      max_solution: moves that the solution may take at most, at least 1; may be traced.
      wall_share: probability of a wall on an inner cell that nothing needs; may be traced.

    Raises:
      ValueError: sizes out of range.
    """
    _check_sizes(num_rows, num_cols, num_boxes, max_pushes)
    shape = num_rows, num_cols
    room_key, wall_key, target_key, pull_key, walk_key = jax.random.split(key, 5)
    inner = np.zeros(shape, bool)
    inner[1:-1, 1:-1] = True
    rooms = _rooms(inner)
    room = jnp.asarray(rooms)[jax.random.randint(room_key, (), 0, len(rooms))]
    needed = (jnp.arange(inner.size)[:, None] == room).any(1).reshape(shape)
    # The other targets, by the largest of random numbers.
    score = jnp.where(inner & ~needed, jax.random.uniform(target_key, shape), -1.0).reshape(-1)
    _, others = jax.lax.top_k(score, num_boxes - 1)
    targets = (jnp.arange(inner.size)[:, None] == jnp.append(others, room[0])).any(1).reshape(shape)
    walls = ~inner | ((jax.random.uniform(wall_key, shape) < wall_share) & ~needed & ~targets)
    limit = max_pushes if pushes is None else pushes

    def pull(carry, step):
        now, best = carry
        index, key = step
        free = ~walls & ~now.boxes
        far = distances(free, now.agent)
        cost = jnp.stack([neighbor(far, move, _FAR) + 1 for move in MOVES])
        room_behind = jnp.stack([neighbor(free, (2 * down, 2 * right), False) for down, right in MOVES])
        possible = now.boxes & room_behind & (now.used + cost <= max_solution) & (index < limit)
        weight = jnp.where(possible, _FRESH * targets, -jnp.inf)
        chosen = jnp.argmax((weight + jax.random.gumbel(key, weight.shape)).reshape(-1))
        way, box = jnp.divmod(chosen, inner.size)
        offset = jnp.asarray(MOVES)[way] @ jnp.asarray([num_cols, 1])
        cell = jnp.arange(inner.size).reshape(shape)
        after = _Play(
            boxes=(now.boxes & (cell != box)) | (cell == box + offset),
            agent=box + 2 * offset,
            used=now.used + cost.reshape(-1)[chosen],
            pulls=now.pulls + 1,
        )
        goes_on = possible.any()
        now = jax.tree.map(lambda new, old: jnp.where(goes_on, new, old), after, now)
        better = (now.boxes & ~targets).sum() >= (best.boxes & ~targets).sum()
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), now, best)
        # Forward, the player stands where the pull took it and pushes the other way.
        return (now, best), (4 * now.agent + (way ^ 2)).astype(jnp.int16)

    begin = _Play(targets, room[1], jnp.int32(0), jnp.int32(0))
    steps = jnp.arange(max_pushes), jax.random.split(pull_key, max_pushes)
    (_, best), solution = jax.lax.scan(pull, (begin, begin), steps)
    far = distances(~walls & ~best.boxes, best.agent).reshape(-1)
    within = (far < _FAR) & (best.used + far <= max_solution)
    agent = jax.random.categorical(walk_key, jnp.where(within, 0.0, -jnp.inf)).astype(jnp.int32)
    cells = jnp.where(walls, WALL, TARGET * targets + BOX * best.boxes).astype(jnp.uint8)
    return SokobanLevel(cells, agent, solution, best.pulls)


def sokoban_from_text(text: str, solution: Sequence[int] = (), max_pushes: int | None = None) -> SokobanLevel:
    """A level from its drawing, on the host.

    Args:
      text: lines of `SYMBOLS`: floor " ", target ".", box "$", box on target "*", player "@", player on target "+",
        wall "#". Short lines are filled with floor.
      solution: directions 0 to 3 that solve it (of `solve_sokoban`), for the expert; empty where none is known.
      max_pushes: P, at least the pushes of the solution (default: as many, and one at least).

    Raises:
      ValueError: an unknown symbol, not one player, no box, more boxes than targets, a solution that does not solve or
        has a move that changes nothing, or more pushes than P.
    """
    lines = text.strip("\n").split("\n")
    width = max(map(len, lines))
    drawn = "".join(line.ljust(width) for line in lines)
    if set(drawn) - set(SYMBOLS):
        raise ValueError(f"text must be of the symbols {SYMBOLS!r}, got {sorted(set(drawn) - set(SYMBOLS))}")
    codes = np.asarray([SYMBOLS.index(symbol) for symbol in drawn])
    (agents,) = np.nonzero((codes == PLAYER) | (codes == PLAYER + TARGET))
    cells = np.where(np.isin(np.arange(codes.size), agents), codes & TARGET, codes).astype(np.uint8)
    boxes = {int(i) for i in np.flatnonzero((cells == BOX) | (cells == TARGET + BOX))}
    targets = int(((cells == TARGET) | (cells == TARGET + BOX)).sum())
    if len(agents) != 1:
        raise ValueError(f"text must have one player, got {len(agents)}")
    if not 1 <= len(boxes) <= targets:
        raise ValueError(f"text must have 1 to {targets} boxes, as many as targets, got {len(boxes)}")
    cells, agent = cells.reshape(len(lines), width), int(agents[0])
    pushes, at = [], agent

    def is_free(row, col):
        inside = 0 <= row < len(lines) and 0 <= col < width
        return inside and cells[row, col] != WALL and row * width + col not in boxes

    for direction in solution:
        (row, col), (down, right) = divmod(at, width), MOVES[direction]
        ahead = at + down * width + right
        steps = 2 if ahead in boxes else 1
        if not is_free(row + steps * down, col + steps * right):
            raise ValueError(f"solution must be of moves that change the board, got {list(solution)}")
        beyond = 2 * ahead - at
        if ahead in boxes:
            boxes = (boxes - {ahead}) | {beyond}
            pushes.append(4 * at + direction)
        at = ahead
    if len(solution) and not all(cells.flat[box] & TARGET and cells.flat[box] != WALL for box in boxes):
        raise ValueError(f"solution must bring every box onto a target, got {list(solution)}")
    max_pushes = max(len(pushes), 1) if max_pushes is None else max_pushes
    if len(pushes) > max_pushes or max_pushes < 1:
        raise ValueError(f"max_pushes must be at least {max(len(pushes), 1)}, got {max_pushes}")
    kept = np.zeros(max_pushes, np.int16)
    kept[: len(pushes)] = pushes[::-1]
    return SokobanLevel(jnp.asarray(cells), jnp.int32(agent), jnp.asarray(kept), jnp.int32(len(pushes)))


def solve_sokoban(cells: np.ndarray, agent: int, max_positions: int = 200_000) -> list[int] | None:
    """A solution with the fewest pushes, on the host: A* over pushes, with the distances of lone boxes as a bound.

    Args:
      cells: `[R, C]`, as in `SokobanLevel`, closed by walls around the player.
      agent: the player's cell, row by row.
      max_positions: positions to look at before giving up.

    Returns:
      Directions 0 to 3, empty where it is solved already, None where there is no solution.

    Raises:
      RuntimeError: given up.
    """
    cells = np.asarray(cells)
    offsets = [down * cells.shape[1] + right for down, right in MOVES]
    floor = {int(i) for i in np.flatnonzero(cells != WALL)}
    targets = {int(i) for i in np.flatnonzero((cells == TARGET) | (cells == TARGET + BOX))}
    boxes = frozenset(int(i) for i in np.flatnonzero((cells == BOX) | (cells == TARGET + BOX)))
    # Pushes that a lone box needs to its nearest target, by pulling it from there; where it has none it is lost.
    needs, queue = dict.fromkeys(targets, 0), deque(targets)
    while queue:
        box = queue.popleft()
        for offset in offsets:
            if box + offset in floor and box + 2 * offset in floor and box + offset not in needs:
                needs[box + offset] = needs[box] + 1
                queue.append(box + offset)
    if not boxes <= needs.keys():
        return None

    def walk(boxes, agent):
        """How to come to every cell within reach: {cell: (the cell before, direction)}."""
        came, queue = {agent: None}, deque([agent])
        while queue:
            at = queue.popleft()
            for direction, offset in enumerate(offsets):
                if at + offset in floor and at + offset not in boxes and at + offset not in came:
                    came[at + offset] = at, direction
                    queue.append(at + offset)
        return came

    def moves_to(boxes, agent, cell):
        came, moves = walk(boxes, agent), []
        while came[cell] is not None:
            cell, direction = came[cell]
            moves.append(direction)
        return moves[::-1]

    seen, order = set(), count()
    heap = [(sum(needs[box] for box in boxes), next(order), boxes, int(agent), ())]
    while heap:
        _, _, now, at, trail = heapq.heappop(heap)
        came = walk(now, at)
        position = now, min(came)
        if position in seen:
            continue
        seen.add(position)
        if now <= targets:
            moves, at = [], int(agent)
            for stand, direction in trail:
                moves += [*moves_to(boxes, at, stand), direction]
                at = stand + offsets[direction]
                boxes = (boxes - {at}) | {at + offsets[direction]} if at in boxes else boxes
            return moves
        if len(seen) > max_positions:
            raise RuntimeError(f"no solution found within max_positions={max_positions}")
        for box in now:
            for direction, offset in enumerate(offsets):
                if box - offset in came and box + offset in needs and box + offset not in now:
                    after = (now - {box}) | {box + offset}
                    bound = len(trail) + 1 + sum(needs[other] for other in after)
                    heapq.heappush(heap, (bound, next(order), after, box, (*trail, (box - offset, direction))))
    return None


def render(state: SokobanState) -> str:
    """The board in `SYMBOLS` and how the episode stands, on the host."""
    codes = np.asarray(state.cells).copy()
    codes.flat[int(state.agent)] |= PLAYER
    lines = ["".join(SYMBOLS[code] for code in row) for row in codes]
    home = int(state.home)
    lines.append(f"{home} of {home + int(state.away)} boxes on targets after {int(state.turn)} moves")
    lines += [f"Lesson: {LESSONS[code]}." for code in np.asarray(lesson(state)) if code != NOTHING]
    if bool(state.done):
        lines.append("Won." if bool(state.won) else "Lost.")
    return "\n".join(lines)


def frame(state: SokobanState) -> jax.Array:
    """The board as a picture of tiles, RGB uint8 `[8 R, 8 C, 3]`; jit- and vmap-able."""
    at_agent = (jnp.arange(state.cells.size) == state.agent).reshape(state.cells.shape)
    return picture(state.cells.astype(jnp.int32) + jnp.where(at_agent, PLAYER, 0), _TILES)


def _tiles() -> np.ndarray:
    """Pictures of the seven codes, uint8 `[7, 8, 8, 3]`: letters are colours, lower case shows what lies beneath."""
    colors = {
        "g": (222, 214, 202), "t": (196, 60, 60), "W": (84, 92, 104), "w": (112, 122, 136),
        "B": (150, 98, 48), "b": (196, 140, 76), "P": (44, 92, 168), "p": (238, 196, 160),
    }  # fmt: skip
    floor = ["gggggggg"] * 8
    target = ["gggggggg", "gggggggg", "ggtggtgg", "gggttggg", "gggttggg", "ggtggtgg", "gggggggg", "gggggggg"]
    box = ["........", ".BBBBBB.", ".BbbbbB.", ".BbBBbB.", ".BbBBbB.", ".BbbbbB.", ".BBBBBB.", "........"]
    done = ["........", ".tttttt.", ".tbbbbt.", ".tbBBbt.", ".tbBBbt.", ".tbbbbt.", ".tttttt.", "........"]
    player = ["........", "..pppp..", "..pppp..", "..PPPP..", ".PPPPPP.", "..PPPP..", "..P..P..", "........"]
    wall = ["WWWWWWWw", "WWWWWWWw", "WWWWWWWw", "wwwwwwww", "WWWwWWWW", "WWWwWWWW", "WWWwWWWW", "wwwwwwww"]

    pictures = [floor, target, over(box, floor), over(done, floor), over(player, floor), over(player, target), wall]
    return draw_tiles(pictures, colors)


def _move(state, direction, valid):
    """(state after one turn, whether the player moved, whether a box did); without `valid` nothing moves."""
    moves = jnp.asarray(MOVES, jnp.int32)
    down, right = moves[direction, 0], moves[direction, 1]
    ahead, cell = _look(state.cells, state.agent, down, right)
    beyond, next_cell = _look(state.cells, state.agent, 2 * down, 2 * right)
    pushes_box = valid & _is_box(cell) & (next_cell <= TARGET)
    moves_agent = (valid & (cell <= TARGET)) | pushes_box

    # BOX leaves the one cell and enters the other.
    flat = state.cells.reshape(-1)
    index = jnp.arange(flat.shape[0])
    toggled = pushes_box & ((index == ahead) | (index == beyond))
    cells = (flat ^ jnp.where(toggled, BOX, 0).astype(flat.dtype)).reshape(state.cells.shape)
    gained = jnp.where(pushes_box, (next_cell & TARGET) - (cell & TARGET), 0)
    agent = jnp.where(moves_agent, ahead, state.agent)
    near = jnp.stack([_is_box(_look(cells, agent, *step)[1]) for step in MOVES]).any()
    scripted = _next_push(state) == 4 * state.agent + direction
    follows = pushes_box & scripted & (state.remaining > 0) & state.on_script
    new = state._replace(
        cells=cells,
        agent=agent,
        remaining=state.remaining - follows,
        on_script=state.on_script & (follows | ~pushes_box),
        home=state.home + gained,
        away=state.away - gained,
        turn=state.turn + 1,
        effective=state.effective + moves_agent,
        reached=state.reached | (moves_agent & near),
        pushed=state.pushed | pushes_box,
        won=state.away == gained,
    )
    return new, moves_agent, pushes_box


def _look(cells, agent, down, right):
    """Index and code, int32, of the cell so far from the player; beyond the edge there are walls."""
    num_rows, num_cols = cells.shape
    row, col = agent // num_cols + down, agent % num_cols + right
    inside = (row >= 0) & (row < num_rows) & (col >= 0) & (col < num_cols)
    index = row * num_cols + col
    return index, jnp.where(inside, cells.reshape(-1)[index].astype(jnp.int32), WALL)


def _next_push(state):
    """`4 * cell + direction` of the first push of the known solution that was not made; meaningless if none is left."""
    return state.pushes[jnp.maximum(state.remaining - 1, 0)].astype(jnp.int32)


def _is_box(cells):
    return (cells == BOX) | (cells == TARGET + BOX)


def _rooms(inner: np.ndarray) -> np.ndarray:
    """Cells (target, player, free) in a line, int32 `[n, 3]`: all places for a first pull."""
    padded = np.pad(inner, 1)
    lines = [
        [at, at + move, at + 2 * move]
        for move in np.asarray(MOVES)
        for at in np.argwhere(inner)
        if padded[tuple(at + 2 * move + 1)]
    ]
    return (np.asarray(lines) @ np.asarray([inner.shape[1], 1])).astype(np.int32)


def _check_sizes(num_rows, num_cols, num_boxes, max_pushes):
    if min(num_rows, num_cols) < 5 or num_rows * num_cols > MAX_CELLS:
        raise ValueError(
            f"num_rows and num_cols must be at least 5, with at most {MAX_CELLS} cells, got {num_rows} and {num_cols}"
        )
    most = (num_rows - 2) * (num_cols - 2) - 3
    if not 1 <= num_boxes <= most:
        raise ValueError(f"num_boxes must be 1 to {most}, got {num_boxes}")
    if max_pushes < 1:
        raise ValueError(f"max_pushes must be at least 1, got {max_pushes}")


_TILES = _tiles()
