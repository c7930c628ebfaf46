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
    parser.add_argument("extension", nargs="*", metavar="EXTENSION", help=f"of {' and '.join(EXTENSIONS)}; both if none is named")
    parser.add_argument("--force", action="store_true", help="compile again what is there already")


def run(args: argparse.Namespace) -> None:
    for word in args.extension:
        if word not in EXTENSIONS:
            raise UserError(f"there is no extension {word!r}; there are {' and '.join(EXTENSIONS)}")
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
            print(f"where it fits, {in_place} takes precedence: it was built in place")


def _compile(name: str, library: Path) -> None:
    """By the setup.py of the package, in a process and a folder of their own."""
    folder = folder_of(name)
    with tempfile.TemporaryDirectory(prefix="litv2-build-") as work:
        print(f"compiling {name}: a minute, more or less", file=sys.stderr, flush=True)
        command = [sys.executable, str(folder / "setup.py"), "build_ext", "--build-lib", f"{work}/lib", "--build-temp", f"{work}/temp"]
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}  # the packages' folder may be another user's
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        if done.returncode != 0:
            print(done.stdout, file=sys.stderr)
            raise UserError(f"{name} was not built: the compiler's messages stand above")
        print(done.stdout.splitlines()[-1], file=sys.stderr)
        (built,) = Path(work).glob(f"lib/**/_C{SUFFIX}")
        with atomic_write(library) as draft:
            shutil.copy(built, draft)
