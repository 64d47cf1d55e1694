"""Minesweeper as a token environment: open every cell without a mine, one cell a turn.

Board, horizon, rewards and subtasks of RetroAgent's bench (arXiv 2603.08561); numbers as in jumanji's Minesweeper,
which opens single cells. Alphabet: `R` rows, `C` columns.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rollax.envs import boards
from rollax.envs.boards import KING, Bits, neighbor
from rollax.envs.environment import Environment, Step, Tokens, TokenSpec

NUM_SUBTASKS = 6
REWARDS = ("shaped", "sparse")
OPENINGS = ("opened", "safe")
USELESS_REWARD, CELL_REWARD, CASCADE_REWARD, CLEARED_REWARD, MINE_REWARD = -1.0, 0.5, 2.0, 10.0, -0.1
# The order of the vocabulary: <pad>, cells (numbers 0 to 8, hidden, mine), what a move did, an action for each cell.
PAD = 0
CELL = 1
HIDDEN, MINE = 9, 10  # codes of cells beside the numbers
INVALID, USELESS, OPENED, CASCADE, CLEARED, EXPLODED = range(CELL + 11, CELL + 17)
ACT = EXPLODED + 1
SYMBOLS = ".12345678#*"
LESSONS = (
    "nothing learned",
    "this was cleared: do the same again",
    "the numbers proved that there was a mine: open no such cell",
    "cells that are open or off the board give nothing: open hidden cells",
    "the numbers prove a hidden cell safe: open such a cell first",
    "no hidden cell is proven safe: open the one that is least likely a mine",
    "a number with all its mines known leaves its other neighbours safe",
    "two numbers near each other share their mines and leave the rest safe",
)
NOTHING, REPEAT, PROVEN_MINE, NO_GAIN, PROVEN_SAFE, GUESS, ONE_NUMBER, TWO_NUMBERS = range(8)
# Levels of difficulty: keywords of `minesweeper`. "paper" is the board of the paper, "classic" that of the game.
LEVELS = {
    "easy": {"num_rows": 5, "num_cols": 5, "num_mines": 2, "horizon": 10},
    "paper": {"num_rows": 6, "num_cols": 6, "num_mines": 3, "horizon": 15},
    "medium": {"num_rows": 7, "num_cols": 7, "num_mines": 6, "horizon": 30},
    "classic": {"num_rows": 9, "num_cols": 9, "num_mines": 10, "horizon": 60, "first": "safe"},
}
MAX_COLUMNS = 12  # a move of two rows and two columns stays below the 32 bits of a word
MAX_CELLS = 256
_WORDS = (
    "<pad>",
    *map(str, range(9)),
    *("hidden", "mine"),
    *("invalid", "useless", "opened", "cascade", "cleared", "exploded"),
)
# Differences between two cells whose neighbourhoods meet, one of each pair of opposites.
_PAIRS = tuple((down, right) for down in range(3) for right in range(-2, 3) if (down, right) > (0, 0))


class MinesweeperState(NamedTuple):
    """One episode; every field freezes when it is done.

    Attributes:
      mines: bool `[R, C]`.
      opened: bool `[R, C]`, with the mine that was opened, if any.
      spare: int32 `[]`, the cell that takes the mine of a first move onto one.
      left: int32 `[]`, hidden cells without a mine.
      turn, effective: int32 `[]`, moves so far and those that opened something without a mine.
      useless: int32 `[]`, how many of the last moves in a row opened nothing.
      longest: int32 `[]`, the most of them in a row so far.
      deduced: bool `[]`, a move opened a cell that the numbers proved safe.
      cascaded: bool `[]`, a move opened several cells.
      exploded, heedless: bool `[]`, a mine was opened; one that the numbers proved.
      done, won: bool `[]`.
    """

    mines: jax.Array
    opened: jax.Array
    spare: jax.Array
    left: jax.Array
    turn: jax.Array
    effective: jax.Array
    useless: jax.Array
    longest: jax.Array
    deduced: jax.Array
    cascaded: jax.Array
    exploded: jax.Array
    heedless: jax.Array
    done: jax.Array
    won: jax.Array


class Deduction(NamedTuple):
    """What the numbers prove about hidden cells, bool `[R, C]`: safe, a mine, and safe by single numbers alone."""

    safe: jax.Array
    mines: jax.Array
    simple: jax.Array


def minesweeper(
    num_rows: int = 6,
    num_cols: int = 6,
    num_mines: int = 3,
    *,
    horizon: int = 15,
    reward: str = "shaped",
    first: str = "opened",
    cascade: bool = True,
) -> Environment:
    """Open every cell that has no mine; opening a mine ends the episode.

    The first observation is the board, row by row, a token a cell; every later one is the board and what the move did:
    invalid (no action), useless (open already), opened (one cell), cascade (several), cleared, exploded. An action is
    the token of one cell. `LEVELS` holds levels of difficulty: `minesweeper(**LEVELS["classic"])`.

    Args:
      num_rows, num_cols: at least 2 each, at most 12 columns and at most 256 cells.
      num_mines: at least 1, and at most all cells but two.
      horizon: moves after which an episode is cut.
      reward: "shaped" for -1 where nothing changed, +0.5 for a cell, +2 for a cascade, +10 for the cleared board and
        -0.1 for a mine, the last that applies; "sparse" for the +10 alone.
      first: "opened": at reset a random cell without a mine is opened, or, where its cascade would clear the board,
        the first cell next to a mine; "safe": all are hidden, and the first move meets no mine: one that is there goes
        to another cell, so that the mines are uniform over all others.
      cascade: a cell without mines around opens its neighbours, and so on; off, a move opens one cell.

    Returns:
      The environment. Terminated when cleared or exploded, truncated at the horizon. Info: `progress` bool `[6]`,
      `lesson` int32 `[2]`, `won` bool `[]`. The expert opens what `deduce` proves safe, else the cell that is least
      likely a mine by the numbers around it.

    Raises:
      ValueError: sizes out of range, a horizon below one, an unknown reward or first move, or an action not `[1]`.
    """
    size = num_rows * num_cols
    if num_rows < 2 or not 2 <= num_cols <= MAX_COLUMNS or size > MAX_CELLS:
        raise ValueError(
            f"num_rows must be at least 2, num_cols 2 to {MAX_COLUMNS}, and cells at most {MAX_CELLS}, "
            f"got {num_rows} and {num_cols}"
        )
    if not 1 <= num_mines <= size - 2:
        raise ValueError(f"num_mines must be 1 to {size - 2}, got {num_mines}")
    if horizon < 1:
        raise ValueError(f"horizon must be at least 1, got {horizon}")
    if reward not in REWARDS:
        raise ValueError(f"reward must be one of {REWARDS}, got {reward!r}")
    if first not in OPENINGS:
        raise ValueError(f"first must be one of {OPENINGS}, got {first!r}")
    shape = num_rows, num_cols
    actions = tuple(f"open-{row + 1}-{col + 1}" for row in range(num_rows) for col in range(num_cols))
    spec = TokenSpec((*_WORDS, *actions), size + 1, max_action=1, max_turns=horizon, stop_ids=(), pad_id=PAD)

    def observe(mines, opened, heard, length):
        ids = jnp.append(CELL + unpack_codes(mines, opened, shape).reshape(-1), heard)
        return Tokens(jnp.where(length > 0, ids, PAD), jnp.asarray(length, jnp.int32))

    def reset(key):
        cells, last = _draw_cells(key, size, num_mines + 1)
        other = jnp.arange(num_mines + 1) != last
        spare = jnp.where(other, 0, cells).sum(dtype=jnp.int32)
        mines = boards.from_cells(cells, other, shape)
        opened = boards.from_cells(cells, ~other, shape)
        if first == "safe":
            opened = opened ^ opened
        elif cascade:
            opened = _open(opened, mines, shape)
            clears = opened.count() == size - num_mines
            numbered = boards.grow(mines, num_cols) & boards.everything(shape) & ~mines
            opened = opened.where(~clears) | numbered.first().where(clears)
        state = start(boards.unpack(mines, shape), boards.unpack(opened, shape))
        return state._replace(spare=spare), observe(mines, opened, PAD, size)

    def step(key, state, action):
        del key
        if jnp.shape(action) != (1,):
            raise ValueError(f"action must have the shape (1,), got {jnp.shape(action)}")
        cell = jnp.asarray(action, jnp.int32)[0] - ACT
        valid = (cell >= 0) & (cell < size)
        cell = jnp.where(valid, cell, 0)
        mines, opened = boards.pack(state.mines), boards.pack(state.opened)
        click = boards.from_cells(cell[None], valid[None], shape) & ~opened
        opens = click.any()
        moved_mines = state.mines
        if first == "safe":
            at_mine = opens & (state.left == size - num_mines) & (click & mines).any()
            spare = boards.from_cells(state.spare[None], at_mine[None], shape)
            mines = (mines ^ click.where(at_mine)) | spare
            index = jnp.arange(size).reshape(shape)
            moved_mines = jnp.where(at_mine, (state.mines & (index != cell)) | (index == state.spare), state.mines)
        safe, proven, _ = _deduce(mines, opened, shape)
        explodes = (click & mines).any()
        found = click & ~mines
        if cascade:
            found = _open(found, mines, shape) & ~opened
        gained = found.count()
        opened = opened | found | (click & mines)
        left = state.left - gained
        won = (gained > 0) & (left == 0)
        heard = jnp.select(
            [~valid, ~opens, explodes, won, gained > 1], [INVALID, USELESS, EXPLODED, CLEARED, CASCADE], OPENED
        )
        value = jnp.where(won, CLEARED_REWARD, 0.0)
        if reward == "shaped":
            conditions = [~opens, explodes, won, gained > 1]
            value = jnp.select(conditions, [USELESS_REWARD, MINE_REWARD, CLEARED_REWARD, CASCADE_REWARD], CELL_REWARD)
        useless = jnp.where(opens, 0, state.useless + 1)
        turn = state.turn + 1
        new = MinesweeperState(
            mines=moved_mines,
            opened=boards.unpack(opened, shape),
            spare=state.spare,
            left=left,
            turn=turn,
            effective=state.effective + (gained > 0),
            useless=useless,
            longest=jnp.maximum(state.longest, useless),
            deduced=state.deduced | (click & safe).any(),
            cascaded=state.cascaded | (gained > 1),
            exploded=explodes,
            heedless=(click & proven).any(),
            done=won | explodes | (turn >= horizon),
            won=won,
        )
        frozen = state.done
        new = jax.tree.map(lambda old, new: jnp.where(frozen, old, new), state, new)
        observation = observe(mines, opened, heard, jnp.where(frozen, 0, size + 1))
        value = jnp.where(frozen, 0.0, value).astype(jnp.float32)
        info = {"progress": progress(new), "lesson": lesson(new), "won": new.won}
        ended = new.won | new.exploded
        return new, Step(observation, value, ended, new.done & ~ended, info)

    return Environment(reset, step, spec, render=render, expert=expert)


def start(mines: jax.Array, opened: jax.Array) -> MinesweeperState:
    """The state of a game on given mines with some cells open, bool `[R, C]` each, of which none has a mine."""
    zero, no = jnp.int32(0), jnp.zeros((), bool)
    return MinesweeperState(
        mines=mines,
        opened=opened,
        spare=zero,
        left=(~mines & ~opened).sum(dtype=jnp.int32),
        turn=zero,
        effective=zero,
        useless=zero,
        longest=zero,
        deduced=no,
        cascaded=no,
        exploded=no,
        heedless=no,
        done=no,
        won=no,
    )


def board(state: MinesweeperState) -> jax.Array:
    """What the player sees, int32 `[R, C]`: the number of an open cell, HIDDEN, or MINE where one was opened."""
    return unpack_codes(boards.pack(state.mines), boards.pack(state.opened), state.mines.shape)


def progress(state: MinesweeperState) -> jax.Array:
    """The subtasks done, bool `[6]`, as RetroAgent lists them.

    At least two moves opened something; more than a tenth of the board is open; a move opened a cell that the numbers
    proved safe; every move that opened nothing was followed by one that did within three tries (and some move did); a
    move opened several cells; at least half of the moves, and one, opened something.
    """
    revealed = 10 * (state.opened & ~state.mines).sum() > state.mines.size
    recovered = (state.effective > 0) & (state.useless == 0) & (state.longest <= 3)
    systematic = (state.effective > 0) & (2 * state.effective >= state.turn)
    return jnp.stack([state.effective >= 2, revealed, state.deduced, recovered, state.cascaded, systematic])


def lesson(state: MinesweeperState) -> jax.Array:
    """What the episode truly taught, codes int32 `[2]` of `LESSONS`: the next priority, and what proves a cell safe.

    A mine that was opened counts as hidden here: the priority is that of the board before. At the start of an episode
    nothing was learned.
    """
    shape = state.mines.shape
    mines = boards.pack(state.mines)
    safe, _, simple = _deduce(mines, boards.pack(state.opened & ~state.mines), shape)
    priority = jnp.select(
        [state.turn == 0, state.won, state.heedless, state.useless > 0, safe.any()],
        [NOTHING, REPEAT, PROVEN_MINE, NO_GAIN, PROVEN_SAFE],
        GUESS,
    )
    proof = jnp.select([(state.turn == 0) | state.won, simple.any(), safe.any()], [NOTHING, ONE_NUMBER, TWO_NUMBERS], 0)
    return jnp.stack([priority, proof]).astype(jnp.int32)


def deduce(state: MinesweeperState) -> Deduction:
    """What the visible numbers prove, by single numbers and by pairs of numbers up to two cells apart.

    A number whose mines are all known leaves its other hidden neighbours safe; one with as many unknown neighbours as
    unknown mines has a mine in each. Of two numbers A and B: if B lacks as many more mines than A as it has unknown
    neighbours of its own, then those are mines and A's own are safe. Twice the rules of single numbers, then the pairs:
    sound, though not all that could be proved. The number of mines on the board is not used.
    """
    shape = state.mines.shape
    shown = boards.pack(state.opened & ~state.mines)
    return Deduction(*(boards.unpack(found, shape) for found in _deduce(boards.pack(state.mines), shown, shape)))


def expert(key: jax.Array, state: MinesweeperState) -> jax.Array:
    """A cell that is proven safe, else the one least likely a mine, as a token `[1]`; ties by chance.

    How likely is judged by the numbers around a cell, the largest share of unknown mines among unknown neighbours, and
    elsewhere by the share of unknown mines in all unknown cells.
    """
    shape = state.mines.shape
    proven = deduce(state)
    shown = state.opened & ~state.mines
    unknown = ~state.opened & ~proven.mines
    numbers = _around(state.mines)
    share = (numbers - _around(proven.mines)) / jnp.maximum(_around(unknown), 1)
    share = jnp.where(shown, share, -1.0)
    near = jnp.stack([neighbor(share, move, -1.0) for move in KING]).max(0)
    elsewhere = (state.mines.sum() - proven.mines.sum()) / jnp.maximum(unknown.sum(), 1)
    risk = jnp.where(near >= 0, near, elsewhere)
    risk = jnp.where(proven.safe, -1.0, jnp.where(unknown, risk, 2.0)) + jnp.where(state.opened, 2.0, 0.0)
    noise = jax.random.uniform(key, shape)  # one for the ties
    best = jnp.where(risk <= risk.min() + 1e-6, noise, -1.0)
    return (ACT + jnp.argmax(best)).astype(jnp.int32)[None]


def render(state: MinesweeperState) -> str:
    """The board in `SYMBOLS` and how the episode stands, on the host."""
    lines = [" ".join(SYMBOLS[code] for code in row) for row in np.asarray(board(state))]
    mines = int(state.mines.sum())
    lines.append(f"{mines} mines, {int(state.left)} safe cells hidden after {int(state.turn)} moves")
    lines += [f"Lesson: {LESSONS[code]}." for code in np.asarray(lesson(state)) if code != NOTHING]
    if bool(state.done):
        lines.append("Won." if bool(state.won) else "Lost.")
    return "\n".join(lines)


def frame(state: MinesweeperState) -> jax.Array:
    """The board as a picture of tiles, RGB uint8 `[8 R, 8 C, 3]`; jit- and vmap-able."""
    return boards.picture(board(state), _TILES)


def unpack_codes(mines: Bits, opened: Bits, shape: tuple[int, int]) -> jax.Array:
    """Codes of cells, int32 `[R, C]`, from the bitboards of mines and open cells."""
    shown, hit = opened & ~mines, opened & mines
    ones, twos, fours, eights = (digit & shown for digit in boards.count_of(boards.neighbors(mines, shape[1])))
    # HIDDEN is 1 + 8, MINE is 2 + 8.
    return boards.unpack_number([ones | ~opened, twos | hit, fours, eights | hit | ~opened], shape)


def _draw_cells(key, size, amount):
    """A random set of that many cells, int32 `[amount]` (Floyd's algorithm), and the index of a random one of them."""
    # 24 bits times at most 256 fit in uint32; the bias is below 2**-16.
    bits = jax.random.bits(key, (amount + 1,), jnp.uint32) >> 8

    def below(i, limit):
        return ((bits[i] * jnp.uint32(limit)) >> 24).astype(jnp.int32)

    cells = []
    for i in range(amount):
        last = size - amount + i
        drawn = below(i, last + 1)
        taken = jnp.zeros((), bool)
        for cell in cells:
            taken |= cell == drawn
        cells.append(jnp.where(taken, last, drawn))
    return jnp.stack(cells), below(amount, amount)


def _open(cells, mines, shape):
    """What opens with these cells: from every open cell without mines around, its neighbours."""
    inside = boards.everything(shape)
    blank = inside & ~boards.grow(mines, shape[1])

    def spread(carry):
        found, _ = carry
        new = found | (boards.grow(found & blank, shape[1]) & inside)
        return new, (new ^ found).any()

    return jax.lax.while_loop(lambda carry: carry[1], spread, (cells, (cells & blank).any()))[0]


def _deduce(mines, shown, shape):
    """(safe, mines, safe by single numbers alone) as bitboards, from the numbers of the cells that are shown."""
    num_cols = shape[1]
    hidden = boards.everything(shape) & ~shown
    empty = hidden ^ hidden
    numbers = boards.once(boards.count_of(boards.neighbors(mines, num_cols)))

    def lacking(known):
        """Mines that each number lacks."""
        return boards.subtract(numbers, boards.count_of(boards.neighbors(known, num_cols)))

    def singles(safe, known):
        unknown = hidden & ~safe & ~known
        lacks = lacking(known)
        around = boards.neighbors(unknown, num_cols)
        full = shown & ~boards.differ(lacks, boards.count_of(around))
        none = shown & ~boards.differ(lacks, [empty] * 4)
        full, none = boards.once((full, none))
        return safe | (boards.grow(none, num_cols) & unknown), known | (boards.grow(full, num_cols) & unknown)

    # Twice, since a mine that is known by one number makes a neighbour of another safe.
    safe, known = jax.lax.fori_loop(0, 2, lambda _, found: singles(*found), (empty, empty))
    unknown = hidden & ~safe & ~known
    lacks, around = boards.once((lacking(known), boards.neighbors(unknown, num_cols)))

    def pair(found, table):
        """All pairs of a cell and the one `steps` ahead, in both roles."""
        steps, here, there = table  # here: the moves whose cell is next to the first alone; there: to the second alone
        own = boards.count_of([cells.where(at) for cells, at in zip(around, here, strict=True)])
        others = boards.count_of([cells.where(at) for cells, at in zip(around, there, strict=True)])
        second = [digit.ahead(steps) for digit in lacks]
        others = [digit.ahead(steps) for digit in others]
        both = shown & shown.ahead(steps)
        # The first lacks as many more as it has of its own, or the second.
        first_more = both & ~boards.differ(boards.add(second, own)[:4], lacks)
        second_more = both & ~boards.differ(boards.add(lacks, others)[:4], second)
        first_more, second_more = boards.once((first_more, second_more))
        safe, known = found
        known = known | spread(first_more, here) | spread(second_more.behind(steps), there)
        safe = safe | spread(second_more, here) | spread(first_more.behind(steps), there)
        return (safe, known), None

    def spread(cells, moves):
        found = empty
        for move, counts in zip(KING, moves, strict=True):
            found = found | cells.moved(boards.offset(move, num_cols)).where(counts)
        return found

    (pair_safe, pair_known), _ = jax.lax.scan(pair, (empty, empty), _pair_tables(num_cols))
    return safe | (pair_safe & unknown), known | (pair_known & unknown), safe


def _pair_tables(num_cols: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """For each of `_PAIRS`: uint32 steps, and for each move of `KING` whether it leads next to one of the two alone."""
    near = {(0, 0), *KING}

    def alone(down, right):
        return [(move[0] - down, move[1] - right) not in near for move in KING]

    steps = [boards.offset(pair, num_cols) for pair in _PAIRS]
    here = [alone(*pair) for pair in _PAIRS]
    there = [alone(-down, -right) for down, right in _PAIRS]
    return jnp.asarray(steps, jnp.uint32), jnp.asarray(here), jnp.asarray(there)


def _around(grid):
    """Sum over the eight neighbours of each cell, int32 `[R, C]`."""
    return sum(neighbor(grid.astype(jnp.int32), move, 0) for move in KING)


def _tiles() -> np.ndarray:
    """Pictures of the eleven codes, uint8 `[11, 8, 8, 3]`."""
    colors = {
        "g": (214, 214, 210), "e": (186, 186, 182), "h": (128, 136, 148), "l": (168, 176, 188), "d": (92, 98, 110),
        "k": (24, 24, 24), "r": (214, 72, 60), "1": (40, 70, 200), "2": (30, 120, 50), "3": (200, 40, 40),
        "4": (30, 30, 120), "5": (120, 30, 30), "6": (20, 120, 130), "7": (20, 20, 20), "8": (110, 110, 110),
    }  # fmt: skip
    # Three by five pixels each, row by row.
    digits = {1: "010110010010111", 2: "111001111100111", 3: "111001111001111", 4: "101101111001001",
              5: "111100111001111", 6: "111100111101111", 7: "111001001010010", 8: "111101111101111"}  # fmt: skip
    blank = ["eeeeeeee", *["eggggggg"] * 7]
    hidden = ["llllllld", *["lhhhhhhd"] * 6, "dddddddd"]
    mine = ["eeeeeeee", "errrrrrr", "errkkrrr", "erkkkkrr", "erkkkkrr", "errkkrrr", "errrrrrr", "errrrrrr"]
    numbers = []
    for number, pixels in digits.items():
        rows = [pixels[i : i + 3].replace("0", ".").replace("1", str(number)) for i in range(0, 15, 3)]
        numbers.append(boards.over(["." * 8, "." * 8, *(f"...{row}.." for row in rows), "." * 8], blank))
    return boards.draw_tiles([blank, *numbers, hidden, mine], colors)


_TILES = _tiles()
