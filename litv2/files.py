# SPDX-License-Identifier: Apache-2.0
"""Atomic writes, and files that several processes share."""

from __future__ import annotations

import errno
import glob
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import UserError

__all__ = ["append_whole", "atomic_write", "free_stem", "is_lack_of_handles", "is_shortage", "one_process", "remove_drafts"]


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yields the path of a temporary file beside ``path``. When the block ends, that file is flushed to the disk and replaces
    ``path``; if the block raises, it is removed and ``path`` is left unchanged.

    Raises:
        OSError: the file cannot be written; it names ``path``.
    """
    path = Path(path)
    remove_drafts(path.parent, glob.escape(path.name))
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield draft
        with open(draft, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(draft, path)
    except UserError:  # it says what went wrong, whatever error of the system it comes of
        raise
    except Exception as error:
        if (failure := _failed_write(error, draft)) is None:
            raise
        raise OSError(failure.errno, failure.strerror, str(path)) from error
    finally:
        with suppress(OSError):  # in a folder that is gone or may not be written
            draft.unlink()
    flush_folder(path.parent)


def append_whole(path: str | Path, text: str) -> None:
    """Appends the text to the file; if it does not fit on the disk, nothing of it. Raises OSError, which names the file."""
    try:
        with open(path, "ab", buffering=0) as file:
            size = file.tell()
            try:
                if file.write(data := text.encode()) < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                with suppress(OSError):
                    file.truncate(size)
                raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _failed_write(error: BaseException | None, draft: Path) -> OSError | None:
    """The system's error that an error comes of, if it is that of a write to the draft; torch.save raises its own on top."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None and error.filename in (None, str(draft)):
            return error
        error = error.__context__
    return None


def free_stem(stem: str, used: set[str]) -> str:
    """Returns a name not used yet, and notes it as used, since files from several folders may share a name."""
    free, number = stem, 2
    while free in used:
        free, number = f"{stem}-{number}", number + 1
    used.add(free)
    return free


def is_lack_of_handles(error: BaseException) -> bool:
    """Whether a file could not be opened because too many are open: that says nothing of the file itself."""
    return isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)


def is_shortage(error: BaseException) -> bool:
    """Whether the machine lacks memory or file handles: that says nothing of the file which was to be read."""
    if isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error):  # torch has no class of its own for it
        return True
    return isinstance(error, MemoryError) or is_lack_of_handles(error) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)


def flush_folder(folder: Path) -> None:
    """Flushes the directory entries of a folder, so that they survive a power cut."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # Windows cannot open a folder, and does not need to
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_drafts(folder: str | Path, name: str = "*") -> None:
    """Removes the drafts of processes that were killed while writing a file of this name: each may be as large as the file itself."""
    for draft in Path(folder).glob(f"{name}.*.tmp"):
        number = draft.name.removesuffix(".tmp").rpartition(".")[2]
        if number.isdigit() and not _is_alive(int(number)):
            draft.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    if os.name == "nt":  # os.kill would end the process there
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it belongs to another user
    return True


@contextmanager
def one_process(path: str | Path) -> Iterator[None]:
    """Locks ``path`` for this process: others that ask for it wait until the block ends."""
    from filelock import FileLock  # installed with torch, which needs it

    path = Path(path)
    with FileLock(path.with_name(f".{path.name}.lock")):
        yield
