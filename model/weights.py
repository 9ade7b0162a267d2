"""Read and write weight files one tensor at a time, so that memory never holds a second copy of a model.

Both formats reduce to a table of file and offset per tensor. Reads use plain file I/O and not a memory map, whose
touched pages would count as memory of the process until the map is closed.
"""

import contextlib
import json
import math
import re
import shutil
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, Self

import torch

from .atomic import replace_file, temporary_path
from .errors import UserError, quoted
from .file_kinds import looks_like

SAFETENSORS_NAME = "consolidated.safetensors"
PTH_NAME = "consolidated.00.pth"

# Names from https://github.com/huggingface/safetensors#format. The reference writer orders tensors by decreasing
# alignment, which is the reverse of this order, then by name; we do the same, so that both write identical bytes.
SAFETENSORS_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}
_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
_DTYPE_RANKS = {dtype: rank for rank, dtype in enumerate(SAFETENSORS_DTYPES.values())}
_COMPUTE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MAX_HEADER_BYTES = 1 << 24  # Mistral's largest model has 200 kB; parsing needs about 20 bytes per byte
_MAX_DIMENSIONS = 8
_COMPARED_NUMBERS = 1 << 15  # of each tensor
_MAX_NAME = 256  # characters


@dataclass(frozen=True)
class TensorLocation:
    """Where a contiguous tensor is stored."""

    file: Path
    offset: int  # bytes from the start of the file
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def end(self) -> int:
        """The offset after the tensor's last byte."""
        return self.offset + math.prod(self.shape) * self.dtype.itemsize


class TensorSource(Protocol):
    """Named tensors that are computed one at a time, when they are read."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]

    def read(self, name: str) -> torch.Tensor:
        """Return a complete tensor on the CPU."""


class WeightsReader:
    """Named tensors on disk. Keeps no file open, so threads and processes may share it.

    Attributes:
        source: folder or file that was opened, for error messages.
        locations: where each tensor is stored.
        shapes: shape of each tensor.
        dtypes: dtype of each tensor.
        size_bytes: total size of all files.
    """

    def __init__(self, source: Path, locations: dict[str, TensorLocation]) -> None:
        self.source = source
        self.locations = locations
        self.shapes = {name: location.shape for name, location in locations.items()}
        self.dtypes = {name: location.dtype for name, location in locations.items()}
        self.size_bytes = sum(file.stat().st_size for file in {location.file for location in locations.values()})

    @property
    def files(self) -> str:
        """The names of the files, for messages."""
        names = sorted({location.file.name for location in self.locations.values()})
        return names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}"

    def stored_name(self, name: str) -> str:
        """Return the name that a tensor has in its file."""
        return name

    def read_finite(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """Read a tensor, see `read`, that a model will compute with.

        Raises:
            UserError: a value is NaN or infinite. The check takes a tenth of the time of reading.
        """
        tensor = self.read(name, rows)
        if tensor.dtype in _COMPUTE_DTYPES and tensor.numel():
            lowest, highest = torch.aminmax(tensor)  # NaN if any value is
            if not (math.isfinite(lowest) and math.isfinite(highest)):
                where = f"{self.locations[name].file}: `{self.stored_name(name)}`"
                raise UserError(
                    f"{where} contains NaN or infinite values: the file is corrupt, or the training that wrote it "
                    "diverged. Use other weights."
                )
        return tensor

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """Read a tensor, or some of its rows, into newly allocated CPU memory.

        Args:
            name: one of `shapes`.
            rows: range of the first dimension; only these rows are read from disk.

        Returns:
            The tensor, [rows, ...], in its stored dtype.

        Raises:
            KeyError: the tensor does not exist.
            UserError: the file was truncated since it was opened.
        """
        location = self.locations[name]
        shape, offset = location.shape, location.offset
        if rows is not None:
            start, stop, step = rows.indices(shape[0])
            if step != 1:
                raise ValueError(f"Rows must be contiguous, got step {step}.")
            offset += start * math.prod(shape[1:]) * location.dtype.itemsize
            shape = (max(stop - start, 0), *shape[1:])
        tensor = torch.empty(shape, dtype=location.dtype)
        buffer = _as_bytes(tensor)
        with open(location.file, "rb") as file:
            file.seek(offset)
            if file.readinto(buffer) != buffer.nbytes:
                raise UserError(f"{location.file} ends inside `{name}`: the file was changed while it was being read.")
        return tensor


def open_weights(path: Path) -> WeightsReader:
    """Open the weights of a Mistral model: a folder in Mistral's layout, or a single .safetensors or .pth file.

    Checks all headers and reads no tensor.

    Raises:
        UserError: there are no weights, several sets of weights, or a corrupt file.
    """
    if path.is_dir():
        return _open_folder(path)
    if path.suffix in (".pth", ".pt", ".bin"):
        return _open_pth(path)
    return open_safetensors(path)


def open_safetensors(path: Path) -> WeightsReader:
    """Open a safetensors file, such as an adapter's lora.safetensors.

    Raises:
        UserError: the file does not exist, is not a safetensors file, or is truncated.
    """
    return WeightsReader(path, _safetensors_locations(path))


def _open_folder(folder: Path) -> WeightsReader:
    files = weight_files(folder, Path(SAFETENSORS_NAME).stem, PTH_NAME)
    if not files:
        present = ", ".join(sorted(file.name for file in folder.iterdir())[:10]) or "nothing"
        raise UserError(
            f"{folder} contains no weights in Mistral's layout: expected {SAFETENSORS_NAME}, {PTH_NAME} or "
            f"consolidated-00001-of-0000N.safetensors, found {present}. (In the Hugging Face layout, "
            "model*.safetensors with a config.json are supported, pytorch_model*.bin are not.)"
        )
    return open_weights(files[0]) if len(files) == 1 else WeightsReader(folder, joint_locations(files))


def weight_files(folder: Path, stem: str, *others: str) -> list[Path]:
    """Return the files of a folder's weights: one file, or all shards. An empty list if there are none.

    Args:
        folder: to look in.
        stem: weights are {stem}.safetensors, or shards {stem}-00001-of-0000N.safetensors.
        others: names of further single files.

    Raises:
        UserError: there are several sets of weights, shards are missing, or the index names other files.
    """
    single = [folder / name for name in (f"{stem}.safetensors", *others) if (folder / name).is_file()]
    shards = safetensors_shards(folder, stem)
    sets = [file.name for file in single] + ([f"{len(shards)} shards {shards[0].name} ..."] if shards else [])
    if len(sets) > 1:
        raise UserError(f"{folder} contains {' and '.join(sets)}: keep only the weights to load.")
    files = single or shards
    index = folder / f"{stem}.safetensors.index.json"
    if files and index.is_file() and (named := _indexed_files(index)) != {file.name for file in files}:
        present = {file.name for file in files}
        listed = ", ".join(sorted(named - present) or sorted(present - named))
        finding = f"names {listed}, not in the folder" if named - present else f"does not name {listed}"
        raise UserError(
            f"{index} {finding}: the index or the weights are out of date. Keep only the weights to load, with their "
            "index or without one."
        )
    return files


def _indexed_files(index: Path) -> set[str]:
    """Return the names of the files to which an index assigns tensors."""
    try:
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index} cannot be read as an index of weights; delete it or download it again.") from error


def require_same_weights(folder: Path, first: WeightsReader, second: WeightsReader) -> None:
    """Compare the beginning of each tensor of two sets of weights in one folder.

    Raises:
        UserError: they are not the same weights, so one of them is out of date.
    """
    for name in sorted(first.shapes.keys() | second.shapes.keys()):
        if not all(name in weights.shapes for weights in (first, second)) or not _begin_alike(first, second, name):
            raise UserError(
                f"{folder} contains two different sets of weights: {name} is not the same in {first.files} and "
                f"{second.files}. Keep only the weights to load."
            )


def _begin_alike(first: WeightsReader, second: WeightsReader, name: str) -> bool:
    shape = first.shapes[name]
    if second.shapes[name] != shape:
        return False
    rows = slice(0, max(1, _COMPARED_NUMBERS // max(1, math.prod(shape[1:]))))
    ours, theirs = first.read(name, rows), second.read(name, rows)
    return ours.equal(theirs) if ours.dtype == theirs.dtype else ours.float().equal(theirs.float())


def safetensors_shards(folder: Path, stem: str) -> list[Path]:
    """Return the files {stem}-00001-of-0000N.safetensors of a folder in order, or an empty list if there are none.

    Raises:
        UserError: some of the N files are missing.
    """
    pattern = re.compile(rf"{stem}-(\d{{5}})-of-(\d{{5}})\.safetensors")
    matches = [match for file in sorted(folder.iterdir()) if (match := pattern.fullmatch(file.name))]
    if not matches:
        return []
    total = int(matches[0][2])
    expected = [f"{stem}-{index:05d}-of-{total:05d}.safetensors" for index in range(1, total + 1)]
    present = [match[0] for match in matches]
    if present != expected:
        wrong = ", ".join(sorted(set(expected) ^ set(present)))
        raise UserError(f"{folder} should contain {total} shards of the weights; missing or unexpected: {wrong}.")
    return [folder / name for name in present]


def joint_locations(files: Iterable[Path]) -> dict[str, TensorLocation]:
    """Locate the tensors of several safetensors files.

    Raises:
        UserError: a file is corrupt, or two files contain a tensor of the same name.
    """
    locations: dict[str, TensorLocation] = {}
    for file in files:
        found = _safetensors_locations(file)
        if duplicates := sorted(found.keys() & locations.keys()):
            raise UserError(f"`{duplicates[0]}` is in both {locations[duplicates[0]].file} and {file}.")
        locations |= found
    return locations


def _safetensors_locations(path: Path) -> dict[str, TensorLocation]:
    """Read and check the header: a little-endian u64 length, then that many bytes of JSON.

    Tensors must fill the file from the header to its end, without gaps or overlaps.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist or is not a file.")
    size = path.stat().st_size
    with open(path, "rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= header_bytes <= _MAX_HEADER_BYTES:
            file.seek(0)
            kind = f" (it looks like {kind})" if (kind := looks_like(file.read(512))) else ""
            raise _corrupt(path, f"has {size} bytes and does not begin with a safetensors header{kind}")
        if 8 + header_bytes > size:
            raise _corrupt(path, f"has {size} bytes but its header alone should have {8 + header_bytes}")
        try:
            header = json.loads(file.read(header_bytes), object_pairs_hook=_unique_names)
            header.pop("__metadata__", None)
            if not all(map(_is_name, header)):
                raise ValueError("an invalid tensor name")
            locations = {name: _location(path, 8 + header_bytes, entry) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise _corrupt(path, f"has a header that cannot be read ({quoted(error)})") from error
    end = 8 + header_bytes
    for name, location in sorted(locations.items(), key=lambda item: (item[1].offset, item[1].end)):
        if location.offset != end:
            raise _corrupt(path, f"has a header that puts {quoted(name)} at byte {location.offset} instead of {end}")
        end = location.end
    if end != size:
        raise _corrupt(path, f"has {size} bytes but its header declares {end}")
    return locations


def _is_name(name: object) -> bool:
    return isinstance(name, str) and 0 < len(name) <= _MAX_NAME and name.isprintable()


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(unique := dict(pairs)) < len(pairs):
        raise ValueError("a duplicate name")
    return unique


def _location(path: Path, data_start: int, entry: dict[str, Any]) -> TensorLocation:
    shape, (begin, end) = entry["shape"], entry["data_offsets"]
    dtype = SAFETENSORS_DTYPES[entry["dtype"]]
    if len(shape) > _MAX_DIMENSIONS or not all(type(n) is int and 0 <= n < 2**63 for n in (begin, end, *shape)):
        raise ValueError(f"shape {quoted(shape)} at {quoted(entry['data_offsets'])}")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{end - begin} bytes for shape {shape} of {entry['dtype']}")
    return TensorLocation(path, data_start + begin, tuple(shape), dtype)


def _corrupt(path: Path, finding: str) -> UserError:
    return UserError(f"{path} {finding}: it is corrupt, truncated or in another format. Copy or download it again.")


def _open_pth(path: Path) -> WeightsReader:
    """Open a file written by `torch.save`: an uncompressed zip, so each tensor can be read directly at its offset."""
    if not path.is_file():
        raise UserError(f"{path} does not exist or is not a file.")
    _check_archive(path)
    try:
        # "meta" loads only the table; each storage then has its offset in the file.
        tensors = torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:  # anything the unpickler raises on corrupt or forbidden content
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{path} cannot be read as a table of tensors: {quoted(reason)}") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise UserError(f"{path} must contain a flat dict of tensors (a state dict), found {type(tensors).__name__}.")
    return WeightsReader(path, {name: _pth_location(path, name, tensor) for name, tensor in tensors.items()})


def _check_archive(path: Path) -> None:
    """Raise UserError unless the file is a zip as torch.save writes it; nothing is unpacked."""
    size = path.stat().st_size
    if not zipfile.is_zipfile(path):  # its table of contents is at the end, so this also detects truncation
        raise _corrupt(path, f"has {size} bytes and was not written by torch.save (not a zip archive)")
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as error:
        raise _corrupt(path, f"has {size} bytes and an unreadable table of contents") from error
    if any(member.compress_type != zipfile.ZIP_STORED or member.file_size > size for member in members):
        raise _corrupt(path, "is a compressed zip archive, which torch.save does not write")
    if any(member.filename.endswith("/data.pkl") and member.file_size > _MAX_HEADER_BYTES for member in members):
        raise _corrupt(path, f"has a table of contents of more than {_MAX_HEADER_BYTES:,} bytes")


def _pth_location(path: Path, name: Any, tensor: torch.Tensor) -> TensorLocation:
    if not _is_name(name) or tensor.layout is not torch.strided or tensor.dtype not in _DTYPE_NAMES:
        raise UserError(f"{path}: {quoted(name)} is not a plain, named tensor ({tensor.layout}, {tensor.dtype}).")
    if not tensor.is_contiguous():
        raise UserError(f"{path}: `{name}` was saved transposed; save it again after .contiguous().")
    storage = tensor.untyped_storage()._checkpoint_offset  # None if the table lists no such storage
    offset = (storage or 0) + int(tensor.storage_offset()) * tensor.dtype.itemsize
    location = TensorLocation(path, offset, tuple(tensor.shape), tensor.dtype)
    if storage is None or location.end > path.stat().st_size:
        raise _corrupt(path, f"ends before byte {location.end}, the end of {quoted(name)} according to its table")
    return location


def require_space(path: Path, size: int) -> None:
    """Raise UserError if the disk has less than `size` bytes free for a file or folder to create."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(f"{path} needs {size / 1e9:.1f} GB, but its disk has {free / 1e9:.1f} GB free.")


class SafetensorsWriter:
    """Write a safetensors file one tensor at a time; the file appears under its name only when it is complete.

        with SafetensorsWriter(path, {"norm.weight": ((64,), torch.bfloat16)}) as writer:
            writer.write("norm.weight", tensor)

    Tensors may be written in any order. On any exception, the partial file is removed and an existing one kept.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Compute the layout of the file.

        Args:
            path: file to write, in an existing folder.
            tensors: shape and dtype of every tensor that will be written.
            metadata: additional entries of the header; transformers requires {"format": "pt"}.
        """
        self._path = path
        self._temporary = temporary_path(path)
        self._tensors = {name: (tuple(shape), dtype) for name, (shape, dtype) in tensors.items()}
        self._missing = set(tensors)
        self._header, self._offsets, self._size = _layout(self._tensors, metadata)
        self._file: BinaryIO

    def __enter__(self) -> Self:
        require_space(self._path, self._size)
        self._file = open(self._temporary, "wb")
        self._file.write(self._header)
        return self

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one of the declared tensors, from any device.

        Raises:
            ValueError: the tensor is not declared, already written, or of another shape or dtype.
        """
        if name not in self._missing:
            raise ValueError(f"`{name}` is not declared or already written.")
        if (found := (tuple(tensor.shape), tensor.dtype)) != self._tensors[name]:
            raise ValueError(f"`{name}` is {found}, declared as {self._tensors[name]}.")
        self._file.seek(self._offsets[name])
        self._file.write(_as_bytes(tensor.detach().cpu().contiguous()))
        self._missing.remove(name)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                if self._missing:
                    raise ValueError(f"Declared but not written: {', '.join(sorted(self._missing))}.")
                self._file.flush()
                replace_file(self._temporary, self._path)
        finally:
            with contextlib.suppress(OSError):  # disk full; a complete file was already flushed above
                self._file.close()
            self._temporary.unlink(missing_ok=True)


def _layout(
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]], metadata: Mapping[str, str] | None
) -> tuple[bytes, dict[str, int], int]:
    """Return the header, the offset of each tensor in the file, and the size of the file."""
    entries: dict[str, dict[str, Any]] = {}
    end = 0
    for name in sorted(tensors, key=lambda name: (-_DTYPE_RANKS[tensors[name][1]], name)):
        shape, dtype = tensors[name]
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": shape, "data_offsets": (begin, end)}
    content = {"__metadata__": dict(metadata)} | entries if metadata else entries
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    header = len(text).to_bytes(8, "little") + text
    offsets = {name: len(header) + entry["data_offsets"][0] for name, entry in entries.items()}
    return header, offsets, len(header) + end


def _as_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
