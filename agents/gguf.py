"""Reads GGUF files (the format of llama.cpp, version 2 and 3) with NumPy alone: metadata, tensor table, block formats.

Tensors stay in the mapped file until `dequantise` is asked for one of them. Little-endian files only.
"""

import struct
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

BLOCK = 32  # values of a quantised block, along a row
SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
STRING, ARRAY = 8, 9
# type code -> (name, values a block, bytes a block)
KINDS = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", BLOCK, 18),
    3: ("Q4_1", BLOCK, 20),
    6: ("Q5_0", BLOCK, 22),
    7: ("Q5_1", BLOCK, 24),
    8: ("Q8_0", BLOCK, 34),
    30: ("BF16", 1, 2),
}
PLAIN = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}


class Tensor(NamedTuple):
    """Where one tensor lies: `shape` in row-major order, `kind` the name of its format, bytes `[begin, end)`."""

    shape: tuple[int, ...]
    kind: str
    begin: int
    end: int


class GGUF(NamedTuple):
    """An open file: `metadata` by key (numbers in NumPy arrays, strings in lists) and `tensors` by name."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]
    data: np.ndarray


class Cursor:
    """A read position in bytes that refuses to pass the end."""

    def __init__(self, buffer):
        self.buffer, self.at = buffer, 0

    def take(self, size: int):
        begin, self.at = self.at, self.at + size
        if self.at > len(self.buffer):
            raise EOFError
        return self.buffer[begin : self.at]

    def number(self, code: str):
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def string(self) -> str:
        return bytes(self.take(self.number("<Q"))).decode("utf-8", errors="replace")

    def value(self, kind: int):
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            element, count = self.number("<I"), self.number("<Q")
            if element in SCALARS:
                dtype = np.dtype(SCALARS[element])
                return np.frombuffer(self.take(dtype.itemsize * count), dtype)
            return [self.value(element) for _ in range(count)]
        if kind not in SCALARS:
            raise ValueError(f"unknown metadata type {kind}")
        dtype = np.dtype(SCALARS[kind])
        return np.frombuffer(self.take(dtype.itemsize), dtype)[0].item()


def read_gguf(path: str | Path) -> GGUF:
    """Opens a file and reads everything but the tensors.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not a GGUF file, another version, a block format that is not supported, or a truncated file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such GGUF file")
    data = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)
    cursor = Cursor(memoryview(data))
    try:
        magic = bytes(cursor.take(4))
        if magic != b"GGUF":
            raise ValueError(f"{path}: not a GGUF file, it starts with {magic!r}")
        version = cursor.number("<I")
        if version not in (2, 3):
            raise ValueError(f"{path}: GGUF version 2 or 3 expected, got {version}")
        num_tensors, num_entries = cursor.number("<Q"), cursor.number("<Q")
        metadata = {}
        for _ in range(num_entries):
            key = cursor.string()
            metadata[key] = cursor.value(cursor.number("<I"))
        table = []
        for _ in range(num_tensors):
            name = cursor.string()
            dims = [cursor.number("<Q") for _ in range(cursor.number("<I"))]
            table.append((name, tuple(reversed(dims)), cursor.number("<I"), cursor.number("<Q")))
    except EOFError:
        raise ValueError(f"{path}: truncated GGUF file, its header does not end within {data.size} bytes") from None
    alignment = metadata.get("general.alignment", 32)
    start = -(-cursor.at // alignment) * alignment
    tensors = {}
    for name, shape, code, offset in table:
        if code not in KINDS:
            known = ", ".join(kind for kind, _, _ in KINDS.values())
            raise ValueError(f"{path}: tensor {name} has GGUF type {code}, supported are {known}")
        kind, values, size = KINDS[code]
        count = int(np.prod(shape, dtype=np.int64))
        if shape and shape[-1] % values:
            raise ValueError(f"{path}: rows of tensor {name} {shape} are not whole {kind} blocks of {values}")
        begin = start + offset
        tensors[name] = Tensor(shape, kind, begin, begin + count // values * size)
        if tensors[name].end > data.size:
            raise ValueError(
                f"{path}: truncated GGUF file, tensor {name} ends at byte {tensors[name].end} of {data.size}"
            )
    return GGUF(path, metadata, tensors, data)


def half(blocks: np.ndarray, at: int) -> np.ndarray:
    """The float16 at byte `at` of each block, as float32 `[blocks, 1]`."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def nibbles(packed: np.ndarray) -> np.ndarray:
    """`[blocks, 16]` bytes to `[blocks, 32]` numbers 0..15: the low nibbles of all bytes, then the high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=1)


def fifth_bits(packed: np.ndarray) -> np.ndarray:
    """`[blocks, 4]` bytes to the bit of each of the 32 values, times 16."""
    return np.unpackbits(packed, axis=1, bitorder="little") << 4


def dequantise(file: GGUF, name: str) -> np.ndarray:
    """One tensor as an array of `file.tensors[name].shape`: float32, or as stored for F32, F16 and BF16."""
    tensor = file.tensors[name]
    raw = file.data[tensor.begin : tensor.end]
    if tensor.kind in PLAIN:
        return np.asarray(raw).view(PLAIN[tensor.kind]).reshape(tensor.shape)
    size = next(size for kind, _, size in KINDS.values() if kind == tensor.kind)
    blocks = np.asarray(raw).reshape(-1, size)
    scale = half(blocks, 0)
    if tensor.kind == "Q8_0":
        values = scale * blocks[:, 2:].view(np.int8)
    elif tensor.kind == "Q4_0":
        values = scale * (nibbles(blocks[:, 2:]).astype(np.float32) - 8)
    elif tensor.kind == "Q4_1":
        values = scale * nibbles(blocks[:, 4:]) + half(blocks, 2)
    elif tensor.kind == "Q5_0":
        values = scale * ((nibbles(blocks[:, 6:]) | fifth_bits(blocks[:, 2:6])).astype(np.float32) - 16)
    else:  # Q5_1
        values = scale * (nibbles(blocks[:, 8:]) | fifth_bits(blocks[:, 4:8])) + half(blocks, 2)
    return values.astype(np.float32, copy=False).reshape(tensor.shape)
