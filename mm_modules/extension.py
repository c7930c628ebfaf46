"""Finds and loads the compiled extensions: ``problem = load("mm_modules.DCN._C")``.

An extension is a library ``_C`` that registers torch operators when it is loaded. It lies beside its package (a build in place, by the
``setup.py`` there) or in the user's cache folder, where ``python -m litv2 build`` puts it. A library fits one torch, one Python, one
platform and one state of the sources: all of them are in its path in the cache, so that no other is ever loaded from there.
Loading needs no compiler; ``mm_modules.build`` compiles.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import os
import re
import sys
import sysconfig
import warnings
from functools import cache
from pathlib import Path

import torch

__all__ = ["cache_folder", "cached_library", "load", "sources"]

ROOT = Path(__file__).resolve().parents[1]  # of the importable packages, in a checkout or in site-packages
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")  # names Python's version, its ABI and, on most systems, the platform


@cache
def load(name: str) -> str | None:
    """Loads an extension, once per process.

    Args:
        name: of its module, such as ``litv2.ops._C``.

    Returns:
        None if its operators are registered now, otherwise the reason why not and the command that helps. Where there is a library
        that cannot be loaded, a warning says so, too; where none was built there is nothing to warn of.
    """
    folder = _package(name)
    errors = []
    for library in [*(folder / f"_C{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES), *_cached(name)]:
        if library.is_file():
            error = _import(name, library)
            if error is None:
                return None
            errors.append(error)
    others = [path.name for path in sorted(folder.glob("_C.*")) if path.suffix in (".so", ".pyd")]
    if not errors and not others:
        return f"not built; {_advice(name)} compiles it"
    reason = errors[0] if errors else f"{others[0]} is for another Python or platform"
    problem = f"built for another torch, Python or processor ({reason}); {_advice(name)} compiles it for this one"
    text = f"{name} is {problem}. Until then slower operators compute the same."
    warnings.warn_explicit(text, UserWarning, filename=name, lineno=0)  # as one line: there is no line of a source to show
    return problem


def cached_library(name: str, compiler: str) -> Path:
    """Where the cache holds the library that ``compiler`` (its name and version) makes of the present sources."""
    folder, pattern = _cache_key(name)
    return cache_folder() / "extensions" / folder / f"{pattern}-{compiler}" / f"_C{SUFFIX}"


def cache_folder() -> Path:
    """The user's folder for what can be made again."""
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local") / "litv2/cache"
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg) / "litv2"
    return Path.home() / ("Library/Caches/litv2" if sys.platform == "darwin" else ".cache/litv2")


def sources(name: str) -> list[Path]:
    """The C++ and CUDA files of an extension, and the arithmetic of deformable samples that both extensions share."""
    return sorted({*(_package(name) / "csrc").glob("*.*"), ROOT / "mm_modules/DCN/csrc/sample.h"})


def _package(name: str) -> Path:
    return ROOT.joinpath(*name.split(".")[:-1])


def _cache_key(name: str) -> tuple[str, str]:
    """torch and the platform; the package and its sources. What Python it is for is in the name of the library."""
    toolkit = f"cuda{torch.version.cuda}" if torch.version.cuda else f"hip{torch.version.hip}" if torch.version.hip else "cpu"
    torch_tag = re.sub(r"[^\w.+-]", "-", f"torch-{torch.__version__}-{toolkit}-{sysconfig.get_platform()}")
    digest = hashlib.sha256()
    for path in [*sources(name), ROOT / "mm_modules/build.py"]:  # the latter has the compiler's flags
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return torch_tag, f"{name.rpartition('.')[0]}-{digest.hexdigest()[:12]}"


def _cached(name: str) -> list[Path]:
    """The libraries in the cache that fit, whatever compiler made them, the newest first."""
    try:
        folder, pattern = _cache_key(name)
        found = (cache_folder() / "extensions" / folder).glob(f"{pattern}-*/_C{SUFFIX}")
        return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)
    except (OSError, RuntimeError):  # no sources, or no home: then nothing was built there
        return []


def _import(name: str, library: Path) -> str | None:
    """Makes the library the module ``name``. Returns the error, None if there was none."""
    # Another version's library may well load, and crash later: ask the file first. Its module's documentation has this text.
    marker, version = b"built for torch ", re.match(r"\d+\.\d+\.\d+", torch.__version__)[0]
    content = library.read_bytes()
    if marker in content and marker + version.encode() + b"." not in content:
        at = content.index(marker) + len(marker)
        return f"it is for torch {content[at : content.index(0, at) - 1].decode()}, not {version}"
    spec = importlib.util.spec_from_file_location(name, library)
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        return str(error).splitlines()[0]
    sys.modules[name] = module
    return None


def _advice(name: str) -> str:
    if (ROOT / "litv2/__main__.py").is_file():
        return "`python -m litv2 build`"
    return f"`cd {'/'.join(name.split('.')[:-1])} && python setup.py build_ext --inplace`"
