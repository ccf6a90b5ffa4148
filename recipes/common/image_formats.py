"""Two file formats of official data sets, read without executing anything: Python pickles and MATLAB 5 files."""

from __future__ import annotations

import math
import pickletools
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

# --- pickled data, read without unpickling ---


@dataclass(frozen=True)
class PickledName:
    """A function or class that a pickle refers to; it is never looked up."""

    module: str
    name: str


@dataclass
class PickledArray:
    """A numpy array that a pickle describes; `values` is None until the description is complete."""

    values: np.ndarray | None = None


ARRAY = [PickledName(f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")]
DTYPE = PickledName("numpy", "dtype")
KNOWN_NAMES = [*ARRAY, DTYPE, PickledName("numpy", "ndarray")]
BYTES_DTYPE = object()
# The state of that dtype as numpy writes it: version, byte order, three for structured types, size, alignment, flags.
BYTES_DTYPE_STATE = (3, "|", None, None, None, -1, -1, 0)
MARK = object()
PUSHES = {
    "BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE",
    "BINUNICODE", "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES",
}  # fmt: skip
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
SHORT_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def read_plain_pickle(data: bytes) -> dict:
    """Reads a pickled dict of lists, strings, numbers and arrays of bytes.

    Nothing that it refers to is imported or called: pickletools splits the file into operations, and the few that
    describe data are interpreted here. Python 2's strings become str, decoded as latin-1.

    Raises:
        ValueError: if the pickle is damaged, or holds or does anything else.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    try:
        for opcode, argument, position in pickletools.genops(data):
            if opcode.name == "STOP":
                break
            if not _interpret(opcode.name, argument, stack, memo):
                raise ValueError(f"{opcode.name} {argument!r:.80} at byte {position} is more than data")
        (content,) = stack
    except (LookupError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"its operations make no sense ({type(error).__name__}: {error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not a dict")
    return content


def _interpret(operation: str, argument: Any, stack: list, memo: dict[int, Any]) -> bool:
    """Carries out one operation; returns False for one that is not known to be harmless."""
    if operation == "PROTO":
        return True
    if operation in PUSHES:
        stack.append(argument)
    elif operation in CONSTANTS:
        stack.append(CONSTANTS[operation])
    elif operation == "MARK":
        stack.append(MARK)
    elif operation in ("EMPTY_DICT", "EMPTY_LIST"):
        stack.append({} if operation == "EMPTY_DICT" else [])
    elif operation in ("DICT", "LIST", "TUPLE"):
        items = _since_mark(stack)
        stack.append(_pairs(items) if operation == "DICT" else items if operation == "LIST" else tuple(items))
    elif operation in SHORT_TUPLES:
        count = SHORT_TUPLES[operation]
        items = [stack.pop() for _ in range(count)]
        stack.append(tuple(reversed(items)))
    elif operation in ("APPEND", "APPENDS"):
        items = [stack.pop()] if operation == "APPEND" else _since_mark(stack)
        _of_type(stack[-1], list).extend(items)
    elif operation in ("SETITEM", "SETITEMS"):
        items = [stack.pop(), stack.pop()][::-1] if operation == "SETITEM" else _since_mark(stack)
        _of_type(stack[-1], dict).update(_pairs(items))
    elif operation in ("PUT", "BINPUT", "LONG_BINPUT"):
        memo[argument] = stack[-1]
    elif operation in ("GET", "BINGET", "LONG_BINGET"):
        stack.append(memo[argument])
    elif operation == "GLOBAL":
        name = PickledName(*argument.split(" ", 1))
        stack.append(name)
        return name in KNOWN_NAMES
    elif operation == "REDUCE":
        arguments, function = stack.pop(), stack.pop()
        if function in ARRAY:
            stack.append(PickledArray())
        elif function == DTYPE and arguments[0] in ("u1", "|u1"):
            stack.append(BYTES_DTYPE)
        else:
            return False
    elif operation == "BUILD":
        state = stack.pop()
        if isinstance(stack[-1], PickledArray):
            stack[-1].values = _array(state)
        else:
            return stack[-1] is BYTES_DTYPE and state == BYTES_DTYPE_STATE
    else:
        return False
    return True


def _since_mark(stack: list) -> list:
    start = len(stack) - 1 - stack[::-1].index(MARK)
    items = stack[start + 1 :]
    del stack[start:]
    return items


def _pairs(items: list) -> dict:
    return dict(zip(items[::2], items[1::2], strict=True))


def _of_type(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{type(value).__name__} is no {kind.__name__}")
    return value


def _array(state: tuple) -> np.ndarray:
    """The array described by numpy's state tuple (version, shape, dtype, Fortran order, bytes)."""
    _, shape, dtype, fortran, content = state
    if dtype is not BYTES_DTYPE:
        raise ValueError("it has an array of something other than bytes")
    content = content.encode("latin-1") if isinstance(content, str) else content
    return np.frombuffer(content, np.uint8).reshape(shape, order="F" if fortran else "C")


# --- MATLAB 5 ---

MATLAB_HEADER = 128
MATLAB_MATRIX, MATLAB_COMPRESSED = 14, 15
MATLAB_NUMBERS = {
    1: "<i1", 2: "<u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4", 9: "<f8", 12: "<i8", 13: "<u8"
}  # fmt: skip


def read_matlab(data: bytes) -> dict[str, np.ndarray]:
    """The numeric arrays in a MATLAB 5 file, by name, in the types in which they are stored.

    scipy can read more kinds of files, but may crash the process on a damaged one. Layout: MathWorks, MAT-File Format.

    Raises:
        ValueError: if the file is damaged, of another version, or holds anything but arrays of real numbers.
    """
    if data[124:MATLAB_HEADER] != b"\x00\x01IM":
        raise ValueError("it does not begin as a MATLAB 5 file with little-endian numbers does")
    arrays = {}
    for kind, content in _matlab_elements(memoryview(data)[MATLAB_HEADER:]):
        if kind == MATLAB_COMPRESSED:
            try:
                ((kind, content),) = _matlab_elements(memoryview(zlib.decompress(content)))
            except zlib.error as error:
                raise ValueError(str(error)) from error
        parts = list(_matlab_elements(content)) if kind == MATLAB_MATRIX else []
        if len(parts) != 4 or parts[3][0] not in MATLAB_NUMBERS:
            raise ValueError("it holds something other than arrays of real numbers")
        _, (_, shape), (_, name), (number, values) = parts
        values = np.frombuffer(values, MATLAB_NUMBERS[number])
        sizes = np.frombuffer(shape, "<i4")
        if (sizes < 0).any() or math.prod(sizes.tolist()) != len(values):
            raise ValueError(f"an array has {len(values)} numbers, not {' x '.join(map(str, sizes))}")
        arrays[bytes(name).decode("latin-1")] = values.reshape(sizes, order="F")
    return arrays


def _matlab_elements(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yields the type and content of each element."""
    position = 0
    while position < len(data):
        if len(data) - position < 8:
            raise ValueError("it ends in the middle of an element")
        kind, size = struct.unpack_from("<II", data, position)
        start = position + 8
        if kind >> 16:  # up to four bytes are packed into the second half of the tag
            kind, size, start = kind & 0xFFFF, kind >> 16, position + 4
        end = start + size
        if end > len(data) or (start < position + 8 < end):
            raise ValueError("it ends in the middle of an element")
        yield kind, data[start:end]
        position = end if kind == MATLAB_COMPRESSED else end + -end % 8
