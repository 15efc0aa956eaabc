"""A GGUF file's header, read with bounds: its metadata and where its tensors are (ggml's docs/gguf.md, versions 2, 3).

The gguf package reads the same; it takes seconds for a vocabulary, an array of numpy arrays a token.
"""

import math
import mmap
import os
import struct
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from taskgraph.errors import WeightsError
from taskgraph.record import shown

_SCALARS: dict[int, tuple[str, str]] = {
    0: ("<B", "u1"), 1: ("<b", "i1"), 2: ("<H", "<u2"), 3: ("<h", "<i2"), 4: ("<I", "<u4"), 5: ("<i", "<i4"),
    6: ("<f", "<f4"), 7: ("<B", "u1"), 10: ("<Q", "<u8"), 11: ("<q", "<i8"), 12: ("<d", "<f8"),
}  # fmt: skip
"""Kind of a value -> its struct code and numpy type."""
_BOOL, _STRING, _ARRAY = 7, 8, 9
_VERSIONS = (2, 3)
_MOST_DIMENSIONS = 4


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor is in its file: `shape` is outermost first; `kind` is ggml's number of the type."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """Metadata by key, tensors by name, and the bytes before the tensors' data."""

    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]
    header_bytes: int


class _Cursor:
    """Reads from `data` in order; WeightsError, which names the file, when it ends too early."""

    def __init__(self, data: Any, file: str) -> None:
        self.data, self.file, self.at = data, file, 0

    def wrong(self, reason: str) -> WeightsError:
        return WeightsError(f"{self.file} is damaged or not a GGUF file: {reason}; fetch it again.")

    def room(self, nbytes: int, what: str) -> None:
        """Check that so many bytes are left."""
        if nbytes > len(self.data) - self.at:
            raise WeightsError(
                f"{self.file} is truncated or damaged: {shown(what)} needs {nbytes} bytes at {self.at} of "
                f"{len(self.data)}; fetch it again."
            )

    def scalar(self, code: str, what: str) -> Any:
        size = struct.calcsize(code)
        self.room(size, what)
        (value,) = struct.unpack_from(code, self.data, self.at)
        self.at += size
        return value

    def text(self, what: str) -> str:
        length = self.scalar("<Q", what)
        self.room(length, what)
        raw = self.data[self.at : self.at + length]
        self.at += length
        try:
            return bytes(raw).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.wrong(f"{shown(what)} is not UTF-8") from error

    def value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self.text(key)
        if kind == _ARRAY:
            return self.array(key)
        if kind not in _SCALARS:
            raise self.wrong(f"the value of {shown(key)} has type {kind}, which does not exist")
        found = self.scalar(_SCALARS[kind][0], key)
        return bool(found) if kind == _BOOL else found

    def array(self, key: str) -> list[Any]:
        kind, count = self.scalar("<I", key), self.scalar("<Q", key)
        if kind == _STRING:
            self.room(8 * count, key)
            return self.texts(count, key)
        if kind == _ARRAY:
            raise WeightsError(f"{self.file}: {shown(key)} is an array of arrays, which no known key is.")
        if kind not in _SCALARS:
            raise self.wrong(f"the array {shown(key)} has type {kind}, which does not exist")
        dtype = np.dtype(_SCALARS[kind][1])
        self.room(dtype.itemsize * count, key)
        found = np.frombuffer(self.data, dtype, count, self.at)
        self.at += dtype.itemsize * count
        values: list[Any] = (found.astype(bool) if kind == _BOOL else found).tolist()
        return values

    def texts(self, count: int, key: str) -> list[str]:
        """`count` strings: the loop of a vocabulary, so without a call each."""
        data, at, end, length_of = self.data, self.at, len(self.data), struct.Struct("<Q").unpack_from
        found: list[str] = []
        try:
            for _ in range(count):
                (length,) = length_of(data, at)
                at += 8
                if length > end - at:
                    raise self.wrong(f"entry {len(found)} of {shown(key)} has {length} bytes, and {end - at} are left")
                found.append(str(data[at : at + length], "utf-8"))
                at += length
        except struct.error as error:
            raise self.wrong(f"{shown(key)} has {count} entries, and {len(found)} are there") from error
        except UnicodeDecodeError as error:
            raise self.wrong(f"entry {len(found)} of {shown(key)} is not UTF-8") from error
        self.at = at
        return found


def read_header(data: Any, file: str) -> GgufHeader:
    """The header of the GGUF file whose bytes are `data`; WeightsError names `file` and what is wrong with it."""
    cursor = _Cursor(data, file)
    if bytes(data[:4]) != b"GGUF":
        raise WeightsError(f"{file} is not a GGUF file: it begins with {shown(bytes(data[:4]))}; check the path.")
    cursor.at = 4
    version = cursor.scalar("<I", "the version")
    if version not in _VERSIONS:
        big = " (a big-endian file)" if version & 0xFFFF == 0 and version else ""
        raise WeightsError(f"{file}: GGUF version {version}{big} is not supported; versions 2 and 3 are.")
    tensor_count, key_count = cursor.scalar("<Q", "the tensor count"), cursor.scalar("<Q", "the key count")
    metadata: dict[str, Any] = {}
    cursor.room(13 * key_count, f"a header of {key_count} keys")
    for number in range(key_count):
        key = cursor.text(f"key {number}")
        if key in metadata:
            raise cursor.wrong(f"the key {shown(key)} stands in it twice")
        metadata[key] = cursor.value(cursor.scalar("<I", key), key)
    cursor.room(24 * tensor_count, f"a list of {tensor_count} tensors")
    found = [_tensor(cursor, number) for number in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or isinstance(alignment, bool) or alignment < 1 or alignment & (alignment - 1):
        raise cursor.wrong(f"general.alignment is {shown(alignment)}; it must be a power of two")
    start = -(-cursor.at // alignment) * alignment
    return GgufHeader(metadata, _placed(cursor, found, start, alignment), cursor.at)


def _tensor(cursor: _Cursor, number: int) -> StoredTensor:
    name = cursor.text(f"the name of tensor {number}")
    dimensions = cursor.scalar("<I", name)
    if not 1 <= dimensions <= _MOST_DIMENSIONS:
        raise cursor.wrong(f"tensor {shown(name)} has {dimensions} dimensions; 1 to {_MOST_DIMENSIONS} are possible")
    shape = tuple(cursor.scalar("<Q", name) for _ in range(dimensions))[::-1]
    kind, offset = cursor.scalar("<I", name), cursor.scalar("<Q", name)
    return StoredTensor(name, shape, kind, offset, _nbytes(cursor, name, shape, kind))


def _nbytes(cursor: _Cursor, name: str, shape: tuple[int, ...], kind: int) -> int:
    sizes = block_sizes()
    if kind not in sizes:
        raise WeightsError(
            f"{cursor.file}: tensor {shown(name)} has GGUF type {kind}, which this version does not know; "
            "use a file of another quantisation."
        )
    block, size = sizes[kind]
    if 0 in shape or shape[-1] % block:
        raise cursor.wrong(f"tensor {shown(name)} is {shape}, and its type stores {block} values of a row together")
    return math.prod(shape) // block * size


def _placed(cursor: _Cursor, found: list[StoredTensor], start: int, alignment: int) -> dict[str, StoredTensor]:
    """The tensors with offsets in the file, which follow each other without overlap as ggml demands."""
    tensors: dict[str, StoredTensor] = {}
    expected = 0
    for t in found:
        if t.name in tensors:
            raise cursor.wrong(f"tensor {shown(t.name)} stands in it twice")
        if t.offset != expected:
            raise cursor.wrong(f"tensor {shown(t.name)} is said to be at {t.offset}, and belongs to {expected}")
        if start + t.offset + t.nbytes > len(cursor.data):
            raise WeightsError(
                f"{cursor.file} is truncated: tensor {shown(t.name)} ends at {start + t.offset + t.nbytes}, and the "
                f"file at {len(cursor.data)}; fetch it again."
            )
        tensors[t.name] = StoredTensor(t.name, t.shape, t.kind, start + t.offset, t.nbytes)
        expected += -(-t.nbytes // alignment) * alignment
    return tensors


_BLOCK_SIZES: dict[int, tuple[int, int]] = {}


def block_sizes() -> dict[int, tuple[int, int]]:
    """ggml's number of a type -> (values, bytes) of a block."""
    if not _BLOCK_SIZES:
        from gguf.constants import GGML_QUANT_SIZES

        _BLOCK_SIZES.update({int(kind): (int(n), int(size)) for kind, (n, size) in GGML_QUANT_SIZES.items()})
    return _BLOCK_SIZES


class MappedGguf(AbstractContextManager["MappedGguf"]):
    """A GGUF file, mapped into memory until `close`; `info` says what file that is, whatever its path is later."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise WeightsError(f"no GGUF file at {str(path)!r}; check the path.")
        try:
            with path.open("rb") as file:
                self.info = os.fstat(file.fileno())
                self._map: mmap.mmap | bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:  # an empty file cannot be mapped
            self._map = b""
        except OSError as error:
            raise WeightsError(f"{path} cannot be read ({shown(error)}); check its permissions.") from error
        self.path = path
        try:
            self.header = read_header(self._map, str(path))
        except BaseException:
            self.close()
            raise

    def raw(self, tensor: StoredTensor) -> npt.NDArray[np.uint8]:
        """The stored bytes of a tensor."""
        return np.frombuffer(self._map, np.uint8, tensor.nbytes, tensor.offset)

    def head(self) -> bytes:
        """The bytes of the header."""
        return bytes(self._map[: self.header.header_bytes])

    def close(self) -> None:
        """Unmap the file, unless arrays of it still live."""
        if isinstance(self._map, mmap.mmap):
            try:
                self._map.close()
            except BufferError:  # an array still shows its bytes; they go with it
                return

    def __exit__(self, *_: object) -> None:
        self.close()
