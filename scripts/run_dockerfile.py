#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Runs the steps of the Dockerfile without Docker, in a folder that takes the place of its WORKDIR.

    scripts/run_dockerfile.py FOLDER [NAME=VALUE of an ARG ...]

COPY copies the files that git tracks. RUN runs in a shell with the ARG and ENV values; commands for the system of an image (apt-get,
useradd, --mount) are skipped, so the host must have a compiler and python3. All stages share the folder. A failed step ends the run.
"""

from __future__ import annotations

import os
import re
import shutil
import string
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SYSTEM = ("apt-get ", "useradd ", "rm -rf /var/lib/apt/lists")


def instructions(text: str) -> list[tuple[str, str]]:
    """Returns pairs (instruction, arguments), with continued lines joined and comments removed."""
    lines = re.sub(r"^\s*#.*\n", "", text, flags=re.M)
    joined = re.sub(r"\\\n\s*", "", lines)
    return [(word.upper(), rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line.strip())]


def shell_command(words: str) -> str:
    """Returns a RUN command without the parts that only work in an image; empty if nothing is left."""
    words = re.sub(r"--mount=\S+\s+", "", words)
    return " && ".join(part for part in (part.strip() for part in words.split("&&")) if not part.startswith(SYSTEM))


def copy(sources: list[str], folder: Path) -> None:
    known = subprocess.run(["git", "ls-files", "-z", "--", *sources], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, known.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)


def main(folder: Path, given: dict[str, str]) -> None:
    variables: dict[str, str] = {}
    workdir = None
    for word, rest in instructions((ROOT / "Dockerfile").read_text()):
        print(f"{word} {rest}", flush=True)
        if word == "ARG":
            name, _, default = rest.partition("=")
            variables[name] = given.get(name, string.Template(default).safe_substitute(variables) if default else variables.get(name, ""))
        elif word == "ENV":
            for name, value in re.findall(r"(\w+)=(\S+)", rest):
                if workdir is not None:  # the only absolute path in the file
                    value = value.replace(workdir, str(folder))
                variables[name] = string.Template(value).safe_substitute({**os.environ, **variables})
        elif word == "WORKDIR":
            workdir = rest
            folder.mkdir(parents=True, exist_ok=True)
        elif word == "COPY" and "--from=" not in rest:
            *sources, _ = rest.split()
            copy(sources, folder)
        elif word == "RUN" and (command := shell_command(rest)):
            cwd = folder if workdir is not None else None
            subprocess.run(["sh", "-ec", command], cwd=cwd, env={**os.environ, **variables}, check=True)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    try:
        main(Path(sys.argv[1]).resolve(), dict(word.split("=", 1) for word in sys.argv[2:]))
    except subprocess.CalledProcessError as error:
        sys.exit(f"a step failed with status {error.returncode}")
