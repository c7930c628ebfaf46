# SPDX-License-Identifier: Apache-2.0
"""What can go wrong on the machine during a training, in one line: memory or file handles that run out, processes that die or hang."""

from __future__ import annotations

import errno
import functools
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import queues, util
from types import TracebackType
from typing import Any

import torch.distributed as dist

from ..errors import UserError
from ..files import is_lack_of_handles

__all__ = ["in_one_line", "start_worker"]

MEMORY = (
    *("can't allocate", "cannot allocate", "not enough memory", "out of memory"),
    *("bad_alloc", "could not create a primitive", "can't start new thread", "failed to map segment"),  # of C++, oneDNN, Python, ld.so
)
WORKER = r"DataLoader worker \(pid\(?s?\)? ([\d, ]+)\) (is killed by signal: [^.]*|exited unexpectedly)"
OFTEN = "often memory or file handles ran out; fewer workers need less"
CONNECTIONS = ("gloo", "pair closure")
PATIENCE = 5.0  # seconds in which processes find out who is still there


@contextmanager
def in_one_line() -> Iterator[None]:
    """Within this block, an error that is the machine's becomes a UserError of one line. Others are bugs, and pass unchanged.

    If processes have lost each other, the line names those that do not answer. The process group is then gone.
    """
    try:
        yield
    except Exception as error:
        if (line := _line(error)) is None:
            raise
        sys.unraisablehook = functools.partial(_without_loaders, sys.unraisablehook)
        raise UserError(line) from error


def _without_loaders(usual: Callable[[Any], object], args: Any) -> None:
    """Loaders that are half made when the machine fails show another traceback where they are collected."""
    if "DataLoaderIter" not in getattr(args.object, "__qualname__", ""):
        usual(args)


def _line(error: Exception) -> str | None:
    text = str(error)
    if killed := next(filter(None, (re.search(WORKER, str(cause)) for cause in _causes(error))), None):  # torch tells of it at any time
        return f"the data-loading worker {killed[1]} {killed[2]}: {OFTEN}"
    if "Too many open files" in text or any(map(is_lack_of_handles, _causes(error))):
        _raise_limit_of_files()  # what is cleaned up at the end needs some, too
        return "Too many open files: raise the limit with ulimit -n, or use fewer workers"
    if cause := next(filter(_is_of_memory, _causes(error)), None):
        return f"memory ran out ({_brief(str(cause)) or type(cause).__name__}); a smaller batch or fewer workers need less"
    if isinstance(error, ConnectionError | EOFError) and _is_between_processes(error):  # before torch has heard of it
        return f"a data-loading worker was killed or has exited ({_brief(text) or 'it sends nothing'}): {OFTEN}"
    if isinstance(error, UserError | OSError) and text.startswith("Caught "):  # in a data-loading worker: its traceback is the message
        return text.strip().splitlines()[-1].partition(": ")[2]
    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and any(word in text for word in CONNECTIONS)):
        return _lost_processes(_brief(text))
    return None


def start_worker(also: Callable[[int], object] | None, worker: int) -> None:
    """With ``also`` bound, the ``worker_init_fn`` of a loader.

    A batch that a worker cannot send, for lack of file handles, would be lost without an error, and the trainer would wait for it for ever.
    So the worker ends, which the trainer reports. If the trainer ends, its workers do so without a traceback.
    """
    sys.excepthook = _unless_connection_lost
    queues.Queue._on_queue_feeder_error = staticmethod(lambda error, batch: os._exit(1))  # type: ignore[attr-defined]
    util.Finalize(None, _raise_limit_of_files, exitpriority=1)  # what Python cleans up when the process ends needs one, too
    if also is not None:
        also(worker)


def _unless_connection_lost(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Of a worker's thread that hands over batches: whoever asked it for one has ended."""
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)


def _raise_limit_of_files() -> None:
    with suppress(ImportError, OSError, ValueError):  # not on Windows
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yields the error and those that it comes of."""
    while error is not None:
        yield error
        error = error.__context__


def _is_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, RuntimeError | ImportError) and any(words in str(error).lower() for words in MEMORY)


def _is_between_processes(error: BaseException) -> bool:
    """Whether it was raised by Python's multiprocessing, not by a server or a file."""
    return any(frame.f_globals.get("__name__") == "multiprocessing.connection" for frame, _ in traceback.walk_tb(error.__traceback__))


def _brief(text: str) -> str:
    """The first line, without the place in the source and gloo's advice."""
    return re.sub(r"^(\[[^]]*\] )?(.*?)(\. This is typically .*)?$", r"\2", text.strip().partition("\n")[0])


def _lost_processes(reason: str) -> str:
    if not dist.is_initialized():
        return f"the processes do not find each other: {reason}"
    size, absent = dist.get_world_size(), _absent_ranks()
    if not absent:
        return f"the processes have lost each other ({reason}); the same command goes on from the last checkpoint"
    who = ", ".join(map(str, absent))
    return f"rank {who} of {size} has ended or hangs ({reason}); the same command goes on from the last checkpoint"


def _absent_ranks() -> list[int]:
    """Ends the process group, so that those that wait for this process hear of it, and returns the ranks that do not answer."""
    rank, size, store = dist.get_rank(), dist.get_world_size(), dist.distributed_c10d._get_default_store()
    present = {rank}
    answered = False

    def ask() -> None:
        nonlocal answered
        with suppress(RuntimeError):  # the store has gone
            dist.destroy_process_group()
            store.set(f"lost/{rank}", "here")
            answered = store.check([f"lost/{rank}"])  # unlike set it waits for an answer
            while len(present) < size:
                present.update(other for other in range(size) if other not in present and store.check([f"lost/{other}"]))
                time.sleep(0.05)

    asking = threading.Thread(target=ask, daemon=True)  # a store in a process that hangs would hold up this one
    asking.start()
    asking.join(PATIENCE)
    if not answered:  # the store is rank 0's, or the launcher's
        return [] if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else [0]
    return [other for other in range(size) if other not in present]
