# SPDX-License-Identifier: Apache-2.0
"""Detects the format of a checkpoint file and validates it before torch reads it.

The entries of a torch.save zip archive must be uncompressed, unique and within the file. Its pickles are checked by
:mod:`litv2.weights.pickle_check`, and the storages that they name must exist in the file with the stated size.
"""

from __future__ import annotations

import mmap
import struct
import zipfile
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from ..errors import UserError
from ..files import is_shortage
from .pickle_check import MadeList, PickleCheck

__all__ = ["check_format", "check_pickles"]

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # torch.save wrote it before torch 1.6


def check_format(path: Path) -> str:
    """Returns the format by the content: ``zip`` (current torch.save), ``legacy`` (before torch 1.6) or ``safetensors``.

    Raises:
        UserError: the file is something else, is truncated, or is a zip archive that torch.save does not write.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(64)
    if not start:
        raise UserError("the file is empty")
    if start.startswith(b"PK\x03\x04"):
        _check_zip(path, size)
        return "zip"
    if start[8:9] == b"{":
        (header,) = struct.unpack("<Q", start[:8])
        if header > size - 8:
            raise UserError(f"truncated: a safetensors header of {header} bytes in a file of {size}")
        return "safetensors"
    if start.startswith(b"\x80\x02\x8a\x0a" + LEGACY_MAGIC.to_bytes(10, "little")):
        return "legacy"
    if start.startswith(b"\x80"):
        raise UserError("it is a pickle, but not one written by torch.save")
    if start.lstrip()[:1] == b"<":
        raise UserError(f"it is a web page, not a checkpoint: it begins with {start[:20]!r}")
    if start.startswith(b"version https://git-lfs"):
        raise UserError("it is a Git LFS pointer, not the file itself: run `git lfs pull`")
    raise UserError(f"it begins with {start[:8]!r}, so it is neither a torch.save nor a safetensors file")


def check_pickles(path: Path, kind: str, also: Collection[str] = ()) -> None:
    """Checks every pickle in a file of format ``kind``.

    Args:
        also: names of further allowed globals, "module.name".

    Raises:
        UserError: a pickle is damaged, uses a global that is not allowed, or would create something too large.
    """
    try:
        if kind == "zip":
            with zipfile.ZipFile(path) as archive:
                records = {entry.filename.partition("/")[2]: entry.file_size for entry in archive.infolist()}
                folder = archive.namelist()[0].partition("/")[0]
                with archive.open(f"{folder}/data.pkl") as stream:
                    data = stream.read()
            PickleCheck(also, lambda key, size: _check_record(records, key, size)).follow(data)
        else:
            with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as stream:
                _check_legacy(stream, also)
    except UserError:
        raise
    except Exception as error:  # of pickletools, zipfile, struct and of the stack: a damaged file can raise nearly anything
        if is_shortage(error):
            raise
        raise UserError(f"the pickle is damaged ({type(error).__name__}: {error})") from error


def _check_zip(path: Path, size: int) -> None:
    with open(path, "rb") as file:
        file.seek(max(0, size - 22))
        end = file.read()
    if not end.startswith(b"PK\x05\x06"):
        raise UserError("truncated: the zip archive has no central directory at its end")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except Exception as error:  # BadZipFile, NotImplementedError, struct.error, UnicodeDecodeError ...
        if is_shortage(error):
            raise
        raise UserError(f"the zip archive is damaged: {error}") from error
    names = [entry.filename for entry in entries]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"the zip archive contains {twice[0]!r} more than once")
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.compress_size != entry.file_size:
            raise UserError(f"{entry.filename!r} in the zip archive is compressed or encrypted, which torch.save never does")
        if entry.header_offset + 30 + entry.file_size > size:
            raise UserError(f"{entry.filename!r} in the zip archive extends beyond the end of the file")
    if sum(entry.file_size for entry in entries) > size:
        raise UserError("the entries of the zip archive overlap: their total size exceeds that of the file")
    if len({name.partition("/")[0] for name in names}) != 1:
        raise UserError("the zip archive was not written by torch.save: it contains more than one folder")
    contents = {name.partition("/")[2] for name in names}
    if "constants.pkl" in contents:
        raise UserError("it is a TorchScript program, not a checkpoint")
    if "data.pkl" not in contents:
        raise UserError("the zip archive was not written by torch.save: it contains no data.pkl")


def _check_record(records: dict[str, int], key: str, size: int) -> None:
    if records.get(f"data/{key}", -1) != size:
        raise UserError(f"storage {key!r} should have {size} bytes, but has {records.get(f'data/{key}', 'none')} in the file")


def _check_legacy(stream: mmap.mmap, also: Collection[str]) -> None:
    """Checks five pickles (magic, version, system, content, keys of the storages) and the storages after them."""
    if stream[257:262] == b"ustar":
        raise UserError("it is also a tar archive, which torch would try to unpack")
    sizes: dict[str, int] = {}

    def storage(key: str, size: int) -> None:
        if sizes.setdefault(key, size) != size or sum(sizes.values()) > len(stream):
            raise UserError(f"storage {key!r} should have {size} bytes, more than there are in the file")

    for number in range(5):
        result = (PickleCheck(also, storage) if number == 3 else PickleCheck()).follow(stream)
    if not isinstance(result, MadeList) or result.count != len(sizes):
        raise UserError(f"the pickle uses {len(sizes)} storages, but the file lists others")
    if len(stream) - stream.tell() < sum(sizes.values()):
        raise UserError("truncated: the storages are incomplete")
