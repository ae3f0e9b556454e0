"""Header of a GGUF file: metadata and tensor table, checked against the size of the file.

The `gguf` package takes ten seconds or more where a vocabulary is large, and reports a truncated
file by errors of numpy.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from rtpurbo.errors import RTPurboError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}
_DTYPES = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
}


@dataclass(frozen=True)
class GgufTensor:
    """Entry of the tensor table.

    Attributes:
        shape: as torch has it, the fastest dimension last.
        start: first byte of the data in the file.
        size: of the data, in bytes.
    """

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int
    size: int


@dataclass(frozen=True)
class GgufHeader:
    """Contents of a GGUF file without the weights.

    Attributes:
        metadata: numbers, strings and arrays of numbers; of an array of strings its length.
        tensors: by name.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]

    def hyperparameter(self, key: str) -> Any:
        """The value that metadata has for `key` of the file's architecture, or None."""
        return self.metadata.get(f"{self.metadata['general.architecture']}.{key}")

    def read_float32(self, name: str) -> np.ndarray:
        """The values of a tensor that is stored as float32."""
        tensor = self.tensors[name]
        count = tensor.size // 4
        return np.fromfile(self.path, "<f4", count, offset=tensor.start).reshape(tensor.shape)

    def decoded_dtype(self) -> torch.dtype:
        """Dtype of the decoded weights.

        Files of unquantised weights keep theirs. Quantised weights are kept in bfloat16: what it
        rounds off is a small part of what the quantisation has, and float32 takes twice the space.
        """
        # Norms and biases are float32 in files of every type.
        kinds = {tensor.kind for tensor in self.tensors.values() if len(tensor.shape) > 1}
        dtypes = {_DTYPES.get(kind, torch.bfloat16) for kind in kinds}
        for dtype in (torch.bfloat16, torch.float16):
            if dtype in dtypes:
                return dtype
        return torch.float32


def read_gguf_header(path: Path) -> GgufHeader:
    """Reads the header and checks that the file holds all of its tensors.

    Raises:
        RTPurboError: the file is no GGUF file, is corrupt or truncated, is one part of several, or
            uses a version or a quantisation that is not known.
    """
    try:
        with path.open("rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                raise RTPurboError(
                    f"{path} is not a GGUF file (it does not begin with 'GGUF'); download it again."
                )
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Parser(path, data).header()
    except OSError as error:
        raise RTPurboError(f"{path} cannot be read ({error.strerror}); check the file.") from error
    except (struct.error, ValueError, KeyError, OverflowError, MemoryError) as error:
        raise RTPurboError(f"{path} is corrupt or truncated; download it again.") from error


class _Parser:
    """Reads one value after the other; past the end of the data, struct.error is raised."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data, self._position = path, data, len(_MAGIC)

    def header(self) -> GgufHeader:
        version, tensor_count, value_count = self._unpack("IQQ")
        if version not in _VERSIONS:
            raise RTPurboError(
                f"{self._path} is of GGUF version {version}, and only versions 2 and 3 "
                "(little-endian) can be read; convert it again with a current llama.cpp."
            )
        metadata = {self._string(): self._value() for _ in range(value_count)}
        if not isinstance(metadata["general.architecture"], str):
            raise ValueError("architecture")
        parts = metadata.get("split.count", 0)
        if isinstance(parts, int) and parts > 1:
            raise RTPurboError(
                f"{self._path} is one of {parts} parts of a model; join them first with "
                "`llama-gguf-split --merge`."
            )
        table = [self._tensor_entry() for _ in range(tensor_count)]
        alignment = int(metadata.get("general.alignment", _DEFAULT_ALIGNMENT))
        data_start = -(-self._position // alignment) * alignment if alignment > 0 else -1
        tensors = {
            name: self._tensor(name, shape, kind, data_start + offset)
            for name, shape, kind, offset in table
        }
        if data_start < 0 or not tensors:
            raise ValueError("no tensors")
        return GgufHeader(self._path, metadata, tensors)

    def _tensor(self, name: str, shape: tuple[int, ...], kind: int, start: int) -> GgufTensor:
        try:
            known = GGMLQuantizationType(kind)
            values, size = GGML_QUANT_SIZES[known]
        except (ValueError, KeyError) as error:
            raise RTPurboError(
                f"the tensor {name} of {self._path} has a quantisation (type {kind}) that the "
                "installed gguf package does not know; upgrade it, or take another file."
            ) from error
        tensor = GgufTensor(name, shape, known, start, prod(shape) // values * size)
        if start + tensor.size > len(self._data):
            raise RTPurboError(
                f"{self._path} is truncated: it has {len(self._data):,} bytes, and the tensor "
                f"{name} ends at byte {start + tensor.size:,}; download it again."
            )
        return tensor

    def _tensor_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        (dimensions,) = self._unpack("I")
        shape = self._unpack(f"{dimensions}Q")
        kind, offset = self._unpack("IQ")
        return name, tuple(reversed(shape)), kind, offset

    def _value(self) -> Any:
        (kind,) = self._unpack("I")
        if kind == GGUFValueType.STRING:
            return self._string()
        if kind != GGUFValueType.ARRAY:
            return self._unpack(_SCALARS[GGUFValueType(kind)])[0]
        kind, count = self._unpack("IQ")
        if kind != GGUFValueType.STRING:
            return list(self._unpack(f"{count}{_SCALARS[GGUFValueType(kind)]}"))
        for _ in range(count):
            self._skip_string()
        return count

    def _string(self) -> str:
        start = self._position + 8
        self._skip_string()
        return self._data[start : self._position].decode("utf-8")

    def _skip_string(self) -> None:
        (length,) = self._unpack("Q")
        self._position += length
        if self._position > len(self._data):
            raise struct.error("a string goes beyond the end")

    def _unpack(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from("<" + layout, self._data, self._position)
        self._position += struct.calcsize("<" + layout)
        return values
