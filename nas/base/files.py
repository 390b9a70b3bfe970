"""Files read with distrust and written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nas.contracts import UserError

MOST = 64 * 2**20
"""Bytes of a JSON file that is still read."""


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The JSON object in the file. Raises UserError, naming the file and the remedy, where there is none or it is damaged."""
    try:
        if path.stat().st_size > MOST:
            raise UserError(f"{path} has more than {MOST >> 20} MiB, which no such file has; {remedy}")
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; {remedy}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({first_line(error)}); {remedy}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds a {type(found).__name__}, not a JSON object; {remedy}")
    return found


def finite(value: Any) -> Any:
    """The same with None for what is no finite number, which JSON does not know."""
    if isinstance(value, Mapping):
        return {name: finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, data: Any, indent: int = 2) -> None:
    """Whole or not at all: a crash leaves the old file."""
    write_text(path, json.dumps(data, indent=indent) + "\n")


def write_text(path: Path, text: str) -> None:
    """Whole or not at all: a crash leaves the old file."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


@contextmanager
def written(path: Path) -> Iterator[None]:
    """What a library cannot write becomes an OSError that names the file."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        found = re.search(r"os error (\d+)", str(error))
        if found is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(path)) from error


def file_digest(path: Path) -> str:
    """SHA-256 of the file's bytes, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensors_digest(path: Path) -> str:
    """16 hexadecimal digits that identify the tensors of a safetensors file: their names, types, shapes and bytes, whatever their order
    and the file's metadata, which safetensors writes in an order of its own.

    Raises UserError where the file is none.
    """
    found = hashlib.sha256()
    try:
        with path.open("rb") as file:
            header, start = _header(file.read(8), path, file.read)
            for name in sorted(header):
                entry = header[name]
                first, stop = entry["data_offsets"]
                found.update(json.dumps([name, entry["dtype"], entry["shape"]]).encode())
                file.seek(start + first)
                left = stop - first
                while left:
                    part = file.read(min(left, 2**20))
                    if not part:
                        raise UserError(f"{path} ends within the tensor {name}")
                    found.update(part)
                    left -= len(part)
    except (KeyError, TypeError, ValueError, struct.error) as error:
        raise UserError(f"{path} is no safetensors file ({first_line(error)})") from error
    return found.hexdigest()[:16]


def _header(size: bytes, path: Path, read: Any) -> tuple[Mapping[str, Any], int]:
    """What stands before the tensors: a length of 8 bytes, then so many bytes of JSON."""
    (length,) = struct.unpack("<Q", size)
    if length > min(MOST, path.stat().st_size):
        raise ValueError("its header is longer than the file")
    header = json.loads(read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


def add_file(found: Any, path: Path) -> None:
    """Adds a file to what is hashed, a piece at a time, since files of gigabytes are many."""
    with path.open("rb") as file:
        hashlib.file_digest(file, lambda: found)


def room(path: Path | None, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """An array of this shape, in an .npy file where a path is given, so that memory holds a part of it alone."""
    if path is None:
        return np.empty(shape, np.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    made = np.lib.format.open_memmap(path, "w+", np.float32, shape)
    if hasattr(os, "posix_fallocate"):  # or a full disk would end the process where it is written to, without a word
        with written(path), path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return made


@contextmanager
def partial_of(path: Path) -> Iterator[Path]:
    """Another name, to write under until all is there; nothing is left under it, nor under those of processes that were killed."""
    for left in filter(_abandoned, path.parent.glob(f"{path.stem}.*.partial")):
        _remove(left)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        yield partial
    finally:
        _remove(partial)


def check_new(folder: Path) -> None:
    """Raises UserError for a folder that holds something, and for a file."""
    if folder.exists() and (not folder.is_dir() or any(not _left_over(one, folder) for one in folder.iterdir())):
        raise UserError(f"{folder} is not empty; give --to a new or empty folder")


def _left_over(path: Path, folder: Path) -> bool:
    """Whether it is another name of the folder, which somebody did not come to the end of."""
    return path.name.startswith(f".{folder.name}.") and path.suffix == ".partial" and _abandoned(path)


def _abandoned(partial: Path) -> bool:
    """Whether the process that wrote under this name is gone; one of this one's number was another, as in a container."""
    process = partial.name.split(".")[-2]
    return not (process.isdigit() and int(process) != os.getpid() and is_alive(int(process)))


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Another name, to write under until all is there, which then is the folder's; nothing is left of what fails. Raises UserError as `check_new`."""
    check_new(folder)
    # An empty folder may be where something is mounted, or where nothing may be made beside it.
    there = folder.exists()
    beside = folder if there else folder.parent
    if beside.is_dir():
        for left in [one for one in beside.iterdir() if _left_over(one, folder)]:
            shutil.rmtree(left, ignore_errors=True)
    partial = beside / f".{folder.name}.{os.getpid()}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if there:
            for part in sorted(partial.iterdir()):
                part.rename(folder / part.name)
        else:
            os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def is_alive(process: int) -> bool:
    """Whether a process of this machine has this number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        pass
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
