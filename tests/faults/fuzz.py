# SPDX-License-Identifier: Apache-2.0
"""Fuzzes every reader of untrusted files: python -m tests.faults.fuzz --inputs N [--seed S] [--only READER] [--json FILE] [--keep DIR]

Valid files are damaged (``fuzz_mutation.py``) and given to the library's functions (``fuzz_readers.py``), each reader in a process of its
own. An input is a function of the seed, the reader and its number. Counted per reader:

* crashes: the process ended;
* hangs: an input took more than a second of processor time;
* other errors: something else than ``UserError`` with a line of printable text was raised, a program was started, a file outside the
  folder of the run was written, a connection was made, text was run as code, or the memory exceeded its bound, which is twice the size
  of the file and the constant of the reader. More than that cannot be had (RLIMIT_AS), and its resident part is measured.
"""

from __future__ import annotations

import argparse
import collections
import json
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import typing
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from random import Random
from types import CodeType
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[2] / "classification")]

from litv2.errors import LONGEST_MESSAGE, UserError  # noqa: E402
from litv2.files import atomic_write  # noqa: E402
from tests.faults.fuzz_readers import READERS, Reader  # noqa: E402

__all__ = ["fuzz", "main", "table"]

SECONDS = 1.0  # of processor time for an input
WAIT = 300.0  # seconds for an input, on a busy machine
STARTS = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "os.spawn", "subprocess.Popen", "pty.spawn", "ctypes.dlopen")
CONNECTS = ("socket.connect", "socket.getaddrinfo", "socket.sendto", "socket.bind")
CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.chmod", "os.link", "os.symlink", "os.truncate", "shutil.rmtree")
COUNTS = ("next", "accepted", "refused", "errors", "slowest_ms", "peak_mib")  # of a worker, in shared memory


class Forbidden(BaseException):
    """A reader did what no file may make it do; not an Exception, which readers catch."""


class Guard:
    """An audit hook, which cannot be removed, and is on only while a reader works."""

    def __init__(self, folder: Path, program: bool) -> None:
        self.folder, self.program, self.active, self.seen = str(folder), program, False, ""
        sys.addaudithook(self)

    def __call__(self, event: str, details: tuple) -> None:
        if self.active and (what := self._why_not(event, details)):
            self.seen = what
            raise Forbidden(what)

    def _why_not(self, event: str, details: tuple) -> str | None:
        if event in STARTS or event in CONNECTS:
            return f"{event} {details}"
        if event in CHANGES and not str(details[0]).startswith(self.folder):
            return f"{event} {details}"
        if event == "open":
            path, mode, flags = details
            writes = any(letter in (mode or "") for letter in "wax+") or (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes and isinstance(path, (str, bytes)) and not os.fsdecode(path).startswith(self.folder) and path != os.devnull:
                return f"writes {path}"
        if event == "exec" and not self.program and isinstance(details[0], CodeType) and details[0].co_filename == "<string>":
            caller = traceback.extract_stack(limit=3)[0]
            if caller.filename not in (typing.__file__, collections.__file__):  # the classes of a module that is imported on demand
                return f"runs the code of {details[0].co_names} ({Path(caller.filename).name}:{caller.lineno})"
        return None


def fuzz(name: str, seed: int, inputs: int, keep: Path | None = None) -> dict[str, Any]:
    """Gives ``inputs`` damaged files to a reader; returns its row of the table, with the first findings."""
    row: dict[str, Any] = dict(reader=name, inputs=inputs, bound_mib=READERS[name].mebibytes, crashes=0, hangs=0, findings=[])
    context = multiprocessing.get_context("spawn")
    counts = context.RawArray("d", len(COUNTS))
    counts[0] = -1  # until a process is ready
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        report = Path(folder) / "findings.jsonl"
        starts = 0
        while counts[0] < inputs:
            starts += 1
            work = Path(folder) / str(starts)
            work.mkdir()
            worker = context.Process(target=_work, args=(name, seed, inputs, work, report, keep, counts))
            worker.start()
            _wait(worker, counts)
            if worker.exitcode == 0:
                continue
            number = int(counts[0])
            if number < 0:
                raise RuntimeError(f"{name}: the reader does not take the valid files")
            hung = worker.exitcode in (-signal.SIGPROF, -signal.SIGKILL)
            row["hangs" if hung else "crashes"] += 1
            what = "more than a second" if hung else f"the process ended: {worker.exitcode}"
            _note(report, number, what, keep, name, work / READERS[name].file)
            counts[0] += 1
        lines = report.read_text().splitlines() if report.exists() else []
        row["findings"] = [json.loads(line) for line in lines]
    row |= {count: int(value) for count, value in zip(COUNTS[1:4], counts[1:4])}
    return row | dict(slowest_ms=round(counts[4], 1), peak_mib=round(counts[5], 1))


def _wait(worker: Any, counts: Any) -> None:
    """Until the worker ends; it is killed where an input takes too long."""
    last, since = -1.0, time.monotonic()
    while worker.is_alive():
        worker.join(1.0)
        if counts[0] != last:
            last, since = counts[0], time.monotonic()
        elif time.monotonic() - since > WAIT:
            worker.kill()


def _note(report: Path, number: int, what: str, keep: Path | None, name: str, file: Path) -> None:
    with open(report, "a") as target:
        target.write(json.dumps(dict(number=number, what=what)) + "\n")
    if keep is not None and file.exists():
        keep.mkdir(parents=True, exist_ok=True)
        (keep / f"{name.replace(' ', '-').replace(',', '').replace(':', '')}-{number}{file.suffix}").write_bytes(file.read_bytes())


def _work(name: str, seed: int, inputs: int, folder: Path, report: Path, keep: Path | None, counts: Any) -> None:
    """The process of a reader, from the input ``counts[0]`` on."""
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # a pool of processes otherwise
    import gc
    import logging
    import warnings

    import torch
    from PIL import Image

    Image.init()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    reader: Reader = READERS[name]
    os.chdir(folder)
    seeds, mutation, read = reader.prepare(folder)
    file = folder / reader.file
    for data in seeds:  # what is imported on demand, for good files and for bad ones, is there from here on
        for part in (data[: len(data) // 2], data[::-1]):
            file.write_bytes(part)
            with suppress(UserError):
                read(file)
        file.write_bytes(data)
        read(file)
    os.dup2(1, 2)  # runtimes of graphs complain there
    guard = Guard(folder, reader.program)
    largest = 2 * (1 << 21) + (reader.mebibytes << 20)
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + largest + (64 << 20),) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    gc.collect()
    gc.freeze()  # a collection, which mmengine asks for, looks at what is new alone
    for number in range(max(0, int(counts[0])), inputs):
        counts[0] = number
        random = Random(f"{seed} {name} {number}")
        try:
            data = mutation(random, seeds)
        except Exception:  # the structure that was to be changed is not there
            data = random.choice(seeds)
        file.write_bytes(data)
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of the memory
        before, start = _status("VmRSS"), time.process_time()
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # ends the process
        guard.active, guard.seen = True, ""
        what, error = "accepted", None
        try:
            read(file)
        except UserError as caught:
            what, error = "refused", caught
        except BaseException as caught:
            what, error = "errors", caught
        guard.active = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        taken, peak = 1e3 * (time.process_time() - start), (_status("VmHWM") - before) / 2**20
        problem = guard.seen or _problem(what, error, taken)
        if not problem and peak > 2 * len(data) / 2**20 + reader.mebibytes:
            problem = f"{peak:.0f} MiB for a file of {len(data)} bytes"
        if problem:
            what = "errors"
            _note(report, number, problem, keep, name, file)
        counts[COUNTS.index(what)] += 1
        counts[4], counts[5] = max(counts[4], taken), max(counts[5], peak)
        del error
    counts[0] = inputs
    os._exit(0)


def _status(field: str) -> int:
    """A field of this process's memory, in bytes."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(field + ":"))
    return int(line.split()[1]) << 10


def _problem(what: str, error: BaseException | None, taken: float) -> str:
    if taken > 1e3 * SECONDS:
        return f"{taken:.0f} ms"
    if error is None:
        return ""
    for each in _chain(error):
        if isinstance(each, MemoryError) or "allocate memory" in str(each) or "bad alloc" in str(each):
            return f"asks for more memory than its bound: {each!r}"
    if what == "errors":
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {str(error)[:200]} ({Path(place.filename).name}:{place.lineno})"
    text = str(error)
    if not text or len(text) > LONGEST_MESSAGE or not all(map(str.isprintable, text.split("\n  "))):  # a report has indented lines
        return f"the message is not a line of printable text: {text[:300]!r} ... of {len(text)} characters"
    return ""


def _chain(error: BaseException | None) -> Iterable[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def table(rows: list[dict[str, Any]]) -> str:
    keys = ("reader", "inputs", "accepted", "refused", "crashes", "hangs", "errors", "slowest_ms", "peak_mib", "bound_mib")
    heads = [*keys[:6], "other errors", "slowest ms", "peak MiB", "bound MiB"]
    total = {key: sum(row[key] for row in rows) for key in keys[1:7]} | {key: max(row[key] for row in rows) for key in keys[7:]}
    lines = [heads, *([f"{row[key]:,}" if key != "reader" else row[key] for key in keys] for row in [*rows, dict(reader="all", **total)])]
    widths = [max(len(line[i]) for line in lines) for i in range(len(keys))]
    return "\n".join("| " + " | ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) + " |" for line in lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.fuzz", description="Fuzzes the readers of untrusted files.")
    parser.add_argument("--inputs", type=int, default=10_000, metavar="N", help="of all readers together; each takes its share")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument("--only", nargs="+", choices=READERS, metavar="READER", help=f"all inputs to these: {', '.join(READERS)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes the table and the findings there")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keeps the inputs of findings there")
    args = parser.parse_args(arguments)
    names = args.only or list(READERS)
    shares = sum(READERS[name].share for name in names)
    rows = []
    for name in names:
        rows.append(fuzz(name, args.seed, max(1, args.inputs * READERS[name].share // shares), args.keep))
        for finding in rows[-1]["findings"][:5]:
            print(f"{name}, input {finding['number']}: {finding['what']}", file=sys.stderr, flush=True)
        if args.json:
            with atomic_write(args.json) as draft:
                draft.write_text(json.dumps(dict(seed=args.seed, rows=rows), indent=1) + "\n")
    print(table(rows))
    return int(any(row["crashes"] + row["hangs"] + row["errors"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
