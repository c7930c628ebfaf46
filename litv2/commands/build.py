# SPDX-License-Identifier: Apache-2.0
"""python -m litv2 build: compiles the extensions into the user's cache folder, from a checkout or an installed wheel."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from mm_modules.build import compiler_tag, folder_of, why_not
from mm_modules.extension import SUFFIX, cached_library

from ..errors import UserError
from ..files import atomic_write, one_process

EXTENSIONS = {"dcn": "mm_modules.DCN._C", "native": "litv2.ops._C"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("extension", nargs="*", metavar="EXTENSION", help=f"{' or '.join(EXTENSIONS)}; default: both")
    parser.add_argument("--force", action="store_true", help="recompile even if already built")


def run(args: argparse.Namespace) -> None:
    for word in args.extension:
        if word not in EXTENSIONS:
            raise UserError(f"unknown extension {word!r}; expected {' or '.join(EXTENSIONS)}")
    if (problem := why_not()) is not None:
        raise UserError(problem)
    for word in args.extension or EXTENSIONS:
        name = EXTENSIONS[word]
        library = cached_library(name, compiler_tag(name))
        library.parent.mkdir(parents=True, exist_ok=True)
        with one_process(library):  # a second process waits, and finds the library
            if args.force or not library.is_file():
                _compile(name, library)
        print(library)
        in_place = folder_of(name) / f"_C{SUFFIX}"
        if in_place.is_file():
            print(f"the in-place build {in_place} takes precedence where it can be used")


def _compile(name: str, library: Path) -> None:
    """Runs the package's setup.py in a separate process and a temporary folder."""
    folder = folder_of(name)
    with tempfile.TemporaryDirectory(prefix="litv2-build-") as work:
        print(f"compiling {name}, which takes about a minute", file=sys.stderr, flush=True)
        command = [sys.executable, str(folder / "setup.py"), "build_ext", "--build-lib", f"{work}/lib", "--build-temp", f"{work}/temp"]
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}  # the package folder may belong to another user
        environment.pop("LD_PRELOAD", None)  # of tests/sanitizers.py, for this process, which loads what it has built
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        if done.returncode != 0:
            print(done.stdout, file=sys.stderr)
            raise UserError(f"{name} could not be built; see the compiler's messages above")
        print(done.stdout.splitlines()[-1], file=sys.stderr)
        (built,) = Path(work).glob(f"lib/**/_C{SUFFIX}")
        with atomic_write(library) as draft:
            shutil.copy(built, draft)
