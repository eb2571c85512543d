"""A GGUF file as it is: what its metadata say, and its tensors, checked against the file's size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockstep.errors import ConfigError, UnsupportedModelError, WeightsError

_MAGIC = b"GGUF"


@dataclass(frozen=True)
class GgufFile:
    """metadata: key to value, arrays as lists.
    tensors: name to gguf's ReaderTensor, whose bytes stay in the file until read.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Any]

    @property
    def architecture(self) -> str:
        return str(self.get("general.architecture", "not named"))

    def get(self, key: str, default: Any = None) -> Any:
        """A value by its whole key."""
        return self.metadata.get(key, default)

    def need(self, key: str) -> Any:
        """A value that the conversion can't do without. Raises UnsupportedModelError."""
        value = self.metadata.get(key)
        if value is None:
            raise UnsupportedModelError(
                f"{self.path} lacks {key}: it is no complete language model; download another file"
            )
        return value


def read_gguf(path: Path) -> GgufFile:
    """Read a file's metadata and where its tensors lie. Raises WeightsError for a file that is
    damaged or no GGUF file.
    """
    if not path.is_file():
        raise ConfigError(f"{path} does not exist: give a GGUF file")
    with path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise WeightsError(f"{path} is no GGUF file: its first four bytes are not GGUF")
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError as error:
        if error.name != "gguf":
            raise
        raise ConfigError("GGUF files need the package gguf: pip install lockstep-rl[gguf]") from None
    try:
        reader = GGUFReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
    except (
        ValueError,
        IndexError,
        KeyError,
        TypeError,
        OverflowError,
        MemoryError,
    ) as error:  # what its parser trips over
        reason = " ".join(str(error).split()) or type(error).__name__
        raise WeightsError(f"{path} is damaged or cut off ({reason}): download it again") from None
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    end = max((int(tensor.data_offset + tensor.n_bytes) for tensor in reader.tensors), default=0)
    if not tensors or end > path.stat().st_size:
        raise WeightsError(f"{path} has {path.stat().st_size} bytes, its tensors end at {end}: download it again")
    return GgufFile(path, metadata, tensors)


def weights(file: GgufFile, name: str) -> Any:
    """One tensor in fp32, dequantized, as a NumPy array in row-major (Hugging Face) order."""
    from gguf import dequantize

    tensor = file.tensors[name]
    try:
        return dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError:
        kind = tensor.tensor_type.name
        raise UnsupportedModelError(f"{file.path}: {name} is quantized as {kind}, which gguf can't undo") from None
