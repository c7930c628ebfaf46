# SPDX-License-Identifier: Apache-2.0
"""Runs the commands that documents show: from the folder that the document says, with a test's own files for FILE and DIR, and with flags
that make the work small appended: a parser takes the last."""

from __future__ import annotations

import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from document_helpers import Command

INTERPRETER = {
    "python": [sys.executable],
    "pip": [sys.executable, "-m", "pip"],
    ".venv/bin/python": [sys.executable],
    ".venv/bin/ruff": [sys.executable, "-m", "ruff"],
}


def substituted(command: Command, files: Mapping[str, object] | None = None) -> list[str]:
    """The words of a command, with ``files`` in the place of their names, alone or after the ``=`` of a flag."""
    words = []
    for word in command.words:
        name, equals, value = word.rpartition("=")
        words.append(f"{name}{equals}{(files or {}).get(value, value)}")
    return words


def run(
    command: Command,
    *more: object,
    files: Mapping[str, object] | None = None,
    folder: Path | None = None,
    timeout: int = 300,
    **environment: str,
):
    """In a process of its own, which must succeed; returns it. ``more`` is appended."""
    program, *words = substituted(command, files)
    line = [*INTERPRETER.get(program, [program]), *words, *map(str, more)]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # of torchrun
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **environment}
    done = subprocess.run(line, cwd=folder or command.folder, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"{line}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def run_here(patch: pytest.MonkeyPatch, command: Command, *more: object, files: Mapping[str, object] | None = None) -> None:
    """``python SCRIPT ...`` or ``python -m MODULE ...`` in this process, which has imported already what others need; it must succeed."""
    python, *words = *substituted(command, files), *map(str, more)
    assert python == "python"
    patch.chdir(command.folder)
    if words[0] == "-m":
        patch.setattr(sys, "argv", words[1:])
        start, name = runpy.run_module, words[1]
    else:
        patch.setattr(sys, "argv", words)
        patch.syspath_prepend(str((command.folder / words[0]).parent))  # as the interpreter does for a script
        start, name = runpy.run_path, words[0]
    with pytest.raises(SystemExit) as ended:
        start(name, run_name="__main__")
    assert not ended.value.code, f"{words} ended with the status {ended.value.code}"


def free_port() -> str:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


def put_download(home: Path, name: str, content: dict) -> None:
    """A file where the download of that name would be, with TORCH_HOME=home."""
    (home / "hub/checkpoints").mkdir(parents=True, exist_ok=True)
    torch.save(content, home / "hub/checkpoints" / name)
