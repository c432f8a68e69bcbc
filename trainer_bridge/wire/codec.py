"""Typed, bounded MessagePack: the fields of a header, and records, which are a header followed by raw arrays.

Invariants:
- A header is a flat array `[PROTOCOL, kind, fields...]` of at most MAX_HEADER bytes, so it decodes into a few
  MiB at most. It holds no maps, no extension types and no pickle.
- Arrays are raw little-endian bytes behind the header, which gives their dtypes and shapes. Their size is checked
  before any memory is taken for them.
- Reading raises TransportError and nothing else, whatever the bytes. Writing enforces the same limits as reading.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import msgpack
import numpy as np

from ...errors import TransportError
from .limits import MAX_FIGURE_TEXT, MAX_HEADER, MAX_ITEMS, MAX_NDIM, MAX_TEXT

PROTOCOL = 3
DTYPES = ("bool", "uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float16", "float32",
          "float64")
_LITTLE = {name: np.dtype(name).newbyteorder("<") for name in DTYPES}
_NAMES = {dtype: name for name, dtype in _LITTLE.items()}
"""`dtype.name` takes a microsecond; a record has a dozen arrays."""
Buffer = bytes | bytearray | memoryview

_LENGTH = struct.Struct("<I")
T = TypeVar("T")


def refuse(where: str, problem: str) -> TransportError:
    """The error for bytes that are not a well-formed message."""
    return TransportError(f"malformed message: {where}: {problem}")


def clip(text: str, size: int = MAX_TEXT) -> str:
    """The beginning of a text, cut to `size` bytes of UTF-8."""
    return text.encode("utf-8", "replace")[:size].decode("utf-8", "ignore")


def _of_type(value: Any, kind: type[T], expected: str, where: str) -> T:
    if type(value) is not kind:
        raise refuse(where, f"expected {expected}, got {_show(value)}")
    return value


class Field(Protocol[T]):
    """One value of a header: how it is written and how it is checked when read."""

    def pack(self, value: T, where: str) -> Any: ...

    def unpack(self, value: Any, where: str) -> T: ...


class _Checked(Generic[T]):
    """A field that travels as the value itself. Writing and reading make the same check."""

    def unpack(self, value: Any, where: str) -> T:
        raise NotImplementedError

    def pack(self, value: Any, where: str) -> Any:
        return self.unpack(value, where)


@dataclass(frozen=True)
class Int(_Checked[int]):
    """An integer in lo..hi."""

    lo: int = 0
    hi: int = 2**63 - 1

    def unpack(self, value: Any, where: str) -> int:
        if type(value) is not int or not self.lo <= value <= self.hi:
            raise refuse(where, f"expected an integer in {self.lo}..{self.hi}, got {_show(value)}")
        return value

    def pack(self, value: Any, where: str) -> int:
        return self.unpack(int(value) if isinstance(value, np.integer) else value, where)


@dataclass(frozen=True)
class Float(_Checked[float]):
    """A double, bit for bit."""

    def unpack(self, value: Any, where: str) -> float:
        return _of_type(value, float, "a float", where)

    def pack(self, value: Any, where: str) -> float:
        if not isinstance(value, int | float | np.integer | np.floating):
            raise refuse(where, f"expected a number, got {_show(value)}")
        return float(value)


@dataclass(frozen=True)
class Flag(_Checked[bool]):
    """True or false."""

    def unpack(self, value: Any, where: str) -> bool:
        return _of_type(value, bool, "true or false", where)

    def pack(self, value: Any, where: str) -> bool:
        return self.unpack(bool(value) if isinstance(value, np.bool_) else value, where)


@dataclass(frozen=True)
class Text(_Checked[str]):
    """UTF-8 text of at most `size` bytes."""

    size: int
    empty: bool = True

    def unpack(self, value: Any, where: str) -> str:
        text = _of_type(value, str, "text", where)
        try:
            length = len(text.encode())
        except UnicodeEncodeError:
            raise refuse(where, "text that is not valid Unicode") from None
        if length > self.size or (not text and not self.empty):
            raise refuse(where, f"text of {length} bytes, expected {0 if self.empty else 1}..{self.size}")
        return text


@dataclass(frozen=True)
class Choice(_Checked[str]):
    """One of a few words."""

    names: tuple[str, ...]

    def unpack(self, value: Any, where: str) -> str:
        if type(value) is not str or value not in self.names:
            raise refuse(where, f"expected one of {', '.join(self.names)}, got {_show(value)}")
        return value


@dataclass(frozen=True)
class Number(_Checked[float | int | str]):
    """A metric: an integer of 64 bits, a double or a short text."""

    def unpack(self, value: Any, where: str) -> float | int | str:
        if type(value) is float:
            return value
        if type(value) is int:
            return Int(-(2**63), 2**63 - 1).unpack(value, where)
        return Text(MAX_FIGURE_TEXT).unpack(value, where)

    def pack(self, value: Any, where: str) -> float | int | str:
        return self.unpack(value.item() if isinstance(value, np.generic) else value, where)


@dataclass(frozen=True)
class Row:
    """A tuple with one field per place."""

    fields: tuple[Field[Any], ...]

    def pack(self, value: Sequence[Any], where: str) -> list[Any]:
        if len(value) != len(self.fields):
            raise refuse(where, f"expected {len(self.fields)} values, got {len(value)}")
        return [f.pack(v, where) for f, v in zip(self.fields, value, strict=True)]

    def unpack(self, value: Any, where: str) -> tuple[Any, ...]:
        if type(value) is not list or len(value) != len(self.fields):
            raise refuse(where, f"expected {len(self.fields)} values, got {_show(value)}")
        return tuple(f.unpack(v, where) for f, v in zip(self.fields, value, strict=True))


@dataclass(frozen=True)
class Many:
    """A tuple of at most `most` equal fields."""

    field: Field[Any]
    most: int

    def pack(self, value: Sequence[Any], where: str) -> list[Any]:
        if len(value) > self.most:
            raise refuse(where, f"{len(value)} items, at most {self.most} fit")
        return [self.field.pack(v, where) for v in value]

    def unpack(self, value: Any, where: str) -> tuple[Any, ...]:
        if type(value) is not list or len(value) > self.most:
            raise refuse(where, f"expected at most {self.most} items, got {_show(value)}")
        return tuple(self.field.unpack(v, where) for v in value)


@dataclass(frozen=True)
class Optional:
    """None, or another field's value."""

    field: Field[Any]

    def pack(self, value: Any, where: str) -> Any:
        return None if value is None else self.field.pack(value, where)

    def unpack(self, value: Any, where: str) -> Any:
        return None if value is None else self.field.unpack(value, where)


_SPEC = Row((Choice(DTYPES), Many(Int(0, 2**40), MAX_NDIM)))


def write_header(kind: int, fields: Sequence[Any]) -> bytes:
    """A header of packed fields."""
    header: bytes = msgpack.packb([PROTOCOL, kind, *fields], use_bin_type=True)
    if len(header) > MAX_HEADER:
        raise refuse(f"kind {kind}", f"a header of {len(header)} bytes, at most {MAX_HEADER} fit")
    return header


def read_header(data: Buffer) -> tuple[int, list[Any]]:
    """Kind and raw fields of a header; the fields are still to be checked one by one."""
    if len(data) > MAX_HEADER:
        raise refuse("header", f"{len(data)} bytes, at most {MAX_HEADER} are read")
    try:
        header = msgpack.unpackb(
            data, raw=False, use_list=True, strict_map_key=True, max_str_len=MAX_HEADER, max_bin_len=MAX_HEADER,
            max_array_len=MAX_ITEMS, max_map_len=0, max_ext_len=0)
    except (ValueError, TypeError, OverflowError, msgpack.UnpackException) as error:
        raise refuse("header", f"not MessagePack within limits ({type(error).__name__})") from None
    if type(header) is not list or len(header) < 2 or type(header[0]) is not int or type(header[1]) is not int:
        raise refuse("header", "no protocol version and kind in front")
    if header[0] != PROTOCOL:
        raise TransportError(f"the peer speaks protocol {header[0]}, this side {PROTOCOL}; "
                             "install the same blockroll version at both ends")
    return header[1], header[2:]


def write_record(kind: int, fields: Sequence[Any], arrays: Sequence[np.ndarray | None]) -> bytes:
    """A self-contained record: header length, header `[fields, [dtype, shape] or nil per array]`, raw array bytes."""
    specs: list[Any] = []
    bodies: list[bytes] = []
    for array in arrays:
        if array is None:
            specs.append(None)
            continue
        array = np.asarray(array)
        name = _NAMES.get(array.dtype) or array.dtype.name
        if name not in _LITTLE or array.ndim > MAX_NDIM:
            raise refuse(f"record {kind}", f"an array of dtype {array.dtype} and {array.ndim} axes cannot travel")
        specs.append([name, list(array.shape)])
        bodies.append(array.astype(_LITTLE[name], copy=False).tobytes())
    header = write_header(kind, [list(fields), specs])
    return b"".join([_LENGTH.pack(len(header)), header, *bodies])


def read_record(data: Buffer, kind: int, arrays: int, limit: int) -> tuple[list[Any], list[np.ndarray | None]]:
    """Raw fields and checked arrays (writable copies) of a record of at most `limit` bytes."""
    where = f"record {kind}"
    view = memoryview(data).cast("B")
    if not _LENGTH.size <= len(view) <= limit:
        raise refuse(where, f"{len(view)} bytes, expected {_LENGTH.size}..{limit}")
    start = _LENGTH.size + _LENGTH.unpack_from(view)[0]
    if start > len(view):
        raise refuse(where, "truncated header")
    found, content = read_header(view[_LENGTH.size:start])
    if found != kind or len(content) != 2 or type(content[0]) is not list or type(content[1]) is not list:
        raise refuse(where, f"not a record of this kind (kind {found})")
    fields, specs = content
    if len(specs) != arrays:
        raise refuse(where, f"{len(specs)} arrays, expected {arrays}")
    found_arrays: list[np.ndarray | None] = []
    for spec in specs:
        if spec is None:
            found_arrays.append(None)
            continue
        dtype, shape = _SPEC.unpack(spec, where)
        size = math.prod(shape) * _LITTLE[dtype].itemsize
        if size > len(view) - start:
            raise refuse(where, f"an array of {size} bytes where {len(view) - start} are left")
        body = view[start:start + size]
        if dtype == "bool" and size and np.frombuffer(body, np.uint8).max() > 1:
            raise refuse(where, "a truth value that is neither 0 nor 1")
        try:
            array = np.frombuffer(body, _LITTLE[dtype]).reshape(shape)
        except ValueError:
            raise refuse(where, f"shape {shape} is impossible") from None
        found_arrays.append(array.astype(dtype))
        start += size
    if start != len(view):
        raise refuse(where, f"{len(view) - start} bytes too many")
    return fields, found_arrays


def _show(value: Any) -> str:
    return f"{type(value).__name__} {value!r:.40}" if isinstance(value, int | float | bool) else type(value).__name__
