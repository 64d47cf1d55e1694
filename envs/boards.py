"""What board games share: neighbours on a grid, pictures of tiles, and bitboards, which make whole-board rules cheap.

A bitboard is a set of cells in a few 32-bit words, as in chess programs: a step of the whole board is a shift, and a
number in each cell is a list of bitboards, a binary digit each. Alphabet: `R` rows, `C` columns, `W` words; cell (r, c)
is bit `r * (C + GAP) + c`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Empty columns on the right of every row: moves of up to two columns cannot enter another row unseen.
GAP = 2
KING = tuple((down, right) for down in (-1, 0, 1) for right in (-1, 0, 1) if down or right)


class Bits(NamedTuple):
    """A set of cells: uint32 `[]` each, lowest bits first. Under vmap every operation runs along the batch."""

    words: tuple[jax.Array, ...]

    def __and__(self, other: "Bits") -> "Bits":
        return Bits(tuple(a & b for a, b in zip(self.words, other.words, strict=True)))

    def __or__(self, other: "Bits") -> "Bits":
        return Bits(tuple(a | b for a, b in zip(self.words, other.words, strict=True)))

    def __xor__(self, other: "Bits") -> "Bits":
        return Bits(tuple(a ^ b for a, b in zip(self.words, other.words, strict=True)))

    def __invert__(self) -> "Bits":
        """All other bits, those of no cell included."""
        return Bits(tuple(~a for a in self.words))

    def where(self, condition: jax.Array) -> "Bits":
        """Itself where the condition, bool `[]`, holds, else empty."""
        return Bits(tuple(jnp.where(condition, a, jnp.uint32(0)) for a in self.words))

    def any(self) -> jax.Array:
        """Whether there is a cell, bool `[]`."""
        found = self.words[0]
        for word in self.words[1:]:
            found = found | word
        return found != 0

    def first(self) -> "Bits":
        """Its first cell, row by row, alone."""
        kept, before = [], jnp.uint32(0)
        for word in self.words:
            kept.append(jnp.where(before == 0, word & -word, jnp.uint32(0)))
            before |= word
        return Bits(tuple(kept))

    def count(self) -> jax.Array:
        """Number of cells, int32 `[]`."""
        return sum(jax.lax.population_count(word).astype(jnp.int32) for word in self.words)

    def ahead(self, steps: int | jax.Array) -> "Bits":
        """The cells from which a cell of the set is `steps` bits ahead; 1 to 31, uint32 if traced."""
        steps = jnp.uint32(steps)
        above = (*self.words[1:], None)
        return Bits(
            tuple(
                a >> steps if b is None else (a >> steps) | (b << (32 - steps))
                for a, b in zip(self.words, above, strict=True)
            )
        )

    def behind(self, steps: int | jax.Array) -> "Bits":
        """The cells that are `steps` bits ahead of a cell of the set; 1 to 31, uint32 if traced."""
        steps = jnp.uint32(steps)
        below = (None, *self.words[:-1])
        return Bits(
            tuple(
                a << steps if b is None else (a << steps) | (b >> (32 - steps))
                for a, b in zip(self.words, below, strict=True)
            )
        )

    def moved(self, offset: int) -> "Bits":
        """The set moved by so many bits, which may be negative."""
        return self if offset == 0 else self.behind(offset) if offset > 0 else self.ahead(-offset)


def neighbor(grid: jax.Array, move: tuple[int, int], beyond: float) -> jax.Array:
    """What lies so many rows down and columns right of each cell, `[R, C]`; `beyond` the edge."""
    down, right = move
    reach = max(abs(down), abs(right))
    padded = jnp.pad(grid, reach, constant_values=beyond)
    return padded[reach + down :, reach + right :][: grid.shape[0], : grid.shape[1]]


def picture(codes: jax.Array, tiles: np.ndarray) -> jax.Array:
    """A board as a picture: codes int32 `[R, C]`, tiles uint8 `[n, S, S, 3]`, RGB uint8 `[S R, S C, 3]`."""
    num_rows, num_cols = codes.shape
    side = tiles.shape[1]
    return jnp.asarray(tiles)[codes].transpose(0, 2, 1, 3, 4).reshape(num_rows * side, num_cols * side, 3)


def draw_tiles(pictures: Sequence[Sequence[str]], colors: dict[str, tuple[int, int, int]]) -> np.ndarray:
    """Tiles from drawings, a letter a pixel: uint8 `[n, S, S, 3]`."""
    return np.asarray([[[colors[letter] for letter in row] for row in rows] for rows in pictures], np.uint8)


def over(top: Sequence[str], below: Sequence[str]) -> list[str]:
    """One drawing on another, which shows where the upper has a dot."""
    return ["".join(a if a != "." else b for a, b in zip(*rows, strict=True)) for rows in zip(top, below, strict=True)]


def offset(move: tuple[int, int], num_cols: int) -> int:
    """Bits that a move (rows down, columns right) takes."""
    return move[0] * (num_cols + GAP) + move[1]


def once(values: Any) -> Any:
    """The same values, computed here: without it XLA would compute a word anew for every word or cell that reads it."""
    return jax.lax.optimization_barrier(values)


def pack(grid: jax.Array) -> Bits:
    """The cells of a bool `[R, C]`."""
    num_rows, num_cols = grid.shape
    rows = jnp.where(grid, jnp.uint32(1) << jnp.arange(num_cols, dtype=jnp.uint32), jnp.uint32(0))
    rows = rows.sum(1, dtype=jnp.uint32)
    words = [jnp.uint32(0)] * num_words(grid.shape)
    for i in range(num_rows):
        word, place = divmod(i * (num_cols + GAP), 32)
        words[word] |= rows[i] << place
        if place + num_cols > 32:
            words[word + 1] |= rows[i] >> (32 - place)
    return once(Bits(tuple(words)))


def unpack(bits: Bits, shape: tuple[int, int]) -> jax.Array:
    """The set as bool `[R, C]`."""
    return unpack_number([bits], shape) > 0


def unpack_number(digits: Sequence[Bits], shape: tuple[int, int]) -> jax.Array:
    """The number in each cell, int32 `[R, C]`, from its binary digits, lowest first."""
    num_rows, num_cols = shape
    words = once([jnp.stack(digit.words) for digit in digits])
    places = jnp.arange(32, dtype=jnp.uint32)
    strips = [((word[:, None] >> places) & 1) << i for i, word in enumerate(words)]
    strip = sum(strips[1:], strips[0]).reshape(-1)[: num_rows * (num_cols + GAP)]
    return strip.reshape(num_rows, num_cols + GAP)[:, :num_cols].astype(jnp.int32)


def from_cells(cells: jax.Array, counts: jax.Array, shape: tuple[int, int]) -> Bits:
    """The set of listed cells.

    Args:
      cells: int32 `[k]`, cells row by row.
      counts: bool `[k]`, which of them count.
    """
    num_cols = shape[1]
    place = (cells // num_cols) * (num_cols + GAP) + cells % num_cols
    bit = jnp.where(counts, jnp.uint32(1) << (place % 32).astype(jnp.uint32), jnp.uint32(0))
    words = []
    for i in range(num_words(shape)):
        inside = jnp.where(place // 32 == i, bit, jnp.uint32(0))
        words.append(jax.lax.reduce_or(inside, (0,)))
    return once(Bits(tuple(words)))


def num_words(shape: tuple[int, int]) -> int:
    """W."""
    return -(-shape[0] * (shape[1] + GAP) // 32)


def grow(bits: Bits, num_cols: int) -> Bits:
    """The set and all cells next to it, diagonally too; may reach into the gap, so cut it with a set of cells."""
    wide = bits | bits.behind(1) | bits.ahead(1)
    return wide | wide.behind(num_cols + GAP) | wide.ahead(num_cols + GAP)


def add(left: Sequence[Bits], right: Sequence[Bits]) -> list[Bits]:
    """Digits of the sum in each cell, one more than the longer of the two has."""
    if len(left) < len(right):
        left, right = right, left
    total, carry = [], None
    for i, a in enumerate(left):
        terms = [a, *right[i : i + 1], *([] if carry is None else [carry])]
        if len(terms) == 1:
            total.append(a)
            carry = None
        elif len(terms) == 2:
            total.append(terms[0] ^ terms[1])
            carry = terms[0] & terms[1]
        else:
            half = terms[0] ^ terms[1]
            total.append(half ^ terms[2])
            carry = (terms[0] & terms[1]) | (half & terms[2])
    return total if carry is None else [*total, carry]


def count_of(sets: Sequence[Bits]) -> list[Bits]:
    """In how many of eight sets each cell is: four digits."""
    a, b, c, d, e, f, g, h = ([one] for one in sets)
    return add(add(add(a, b), add(c, d)), add(add(e, f), add(g, h)))


def subtract(left: Sequence[Bits], right: Sequence[Bits]) -> list[Bits]:
    """Digits of the difference in each cell, modulo two to the number of digits, which is the same for both."""
    total, borrow = [], None
    for a, b in zip(left, right, strict=True):
        half = a ^ b
        total.append(half if borrow is None else half ^ borrow)
        borrow = ~a & b if borrow is None else (~a & b) | (~half & borrow)
    return total


def differ(left: Sequence[Bits], right: Sequence[Bits]) -> Bits:
    """Cells where two numbers of the same many digits differ."""
    digits = [a ^ b for a, b in zip(left, right, strict=True)]
    found = digits[0]
    for digit in digits[1:]:
        found = found | digit
    return found


def neighbors(bits: Bits, num_cols: int) -> list[Bits]:
    """For each of the eight `KING` moves the cells from which it leads into the set."""
    return [bits.moved(-offset(move, num_cols)) for move in KING]


def everything(shape: tuple[int, int]) -> Bits:
    """All cells."""
    num_rows, num_cols = shape
    row = (1 << num_cols) - 1
    board = sum(row << (i * (num_cols + GAP)) for i in range(num_rows))
    return Bits(tuple(jnp.uint32((board >> (32 * i)) & 0xFFFFFFFF) for i in range(num_words(shape))))
