"""Files that appear whole or not at all, and files that several processes share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["atomic_write", "one_process"]


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yields the path of a draft beside ``path``. When the block ends the draft is flushed to the disk and takes the place of
    ``path``; when it raises, the draft is removed and ``path`` stays as it was.
    """
    path = Path(path)
    _remove_drafts_of_the_dead(path)
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield draft
        with open(draft, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    """Makes the names in a folder survive a power cut."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # Windows opens no folder, and needs no such call
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_drafts_of_the_dead(path: Path) -> None:
    """Drafts of processes that were killed while they wrote: each may be as large as the file itself."""
    for draft in path.parent.glob(f"{path.name}.*.tmp"):
        number = draft.name.removeprefix(f"{path.name}.").removesuffix(".tmp")
        if number.isdigit() and not _is_alive(int(number)):
            draft.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    if os.name == "nt":  # there os.kill would end it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's
    return True


@contextmanager
def one_process(path: str | Path) -> Iterator[None]:
    """Other processes that ask for the same path wait until this one leaves the block."""
    from filelock import FileLock  # torch needs and brings it

    path = Path(path)
    with FileLock(path.with_name(f".{path.name}.lock")):
        yield
