"""Finds and loads the compiled extensions: ``problem = load("mm_modules.DCN._C")``.

An extension is a library ``_C`` that registers torch operators when it is loaded. It lies beside its package (a build in place, by the
``setup.py`` there) or in the user's cache folder, where ``python -m litv2 build`` puts it. A library fits one torch, one Python, one
platform and one state of the sources. The path in the cache says all of them; the library itself says torch and the sources.
Loading needs no compiler; ``mm_modules/build.py`` compiles.
"""

from __future__ import annotations

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

from .build import folder_of, identity, sources_digest

__all__ = ["SUFFIX", "cache_folder", "cached_library", "load"]

SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")  # names Python's version, its ABI and, on most systems, the platform


@cache
def load(name: str) -> str | None:
    """Loads an extension, once per process.

    Args:
        name: of its module, such as ``litv2.ops._C``.

    Returns:
        None if its operators are registered now, otherwise the reason why not and the command that helps. Where there is a library
        that cannot be used, a warning says so, too; where none was built there is nothing to warn of.
    """
    folder = folder_of(name)
    reasons = []
    for library in [*(folder / f"_C{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES), *_cached(name)]:
        if library.is_file():
            reason = _why_not(name, library) or _import(name, library)
            if reason is None:
                return None
            reasons.append(f"{library.name} {reason}")
    reasons += [f"{path.name} is for another Python or platform" for path in sorted(folder.glob("_C.*")) if path.suffix in (".so", ".pyd")]
    if not reasons:
        return f"not built; {_advice(name)} compiles it"
    problem = f"unusable: {reasons[0]}; {_advice(name)} compiles it anew"
    text = f"{name} is {problem}. Until then slower operators compute the same."
    warnings.warn_explicit(text, UserWarning, filename=name, lineno=0)  # as one line: there is no line of a source to show
    return problem


def cached_library(name: str, compiler: str) -> Path:
    """Where the cache holds the library that ``compiler`` (its name and version) makes of the present sources."""
    return _cache_of_torch() / f"{_stem(name)}-{compiler}" / f"_C{SUFFIX}"


def cache_folder() -> Path:
    """The user's folder for what can be made again."""
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local") / "litv2/cache"
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg) / "litv2"
    return Path.home() / ("Library/Caches/litv2" if sys.platform == "darwin" else ".cache/litv2")


def _cache_of_torch() -> Path:
    toolkit = f"cuda{torch.version.cuda}" if torch.version.cuda else f"hip{torch.version.hip}" if torch.version.hip else "cpu"
    tag = re.sub(r"[^\w.+-]", "-", f"torch-{torch.__version__}-{toolkit}-{sysconfig.get_platform()}")
    return cache_folder() / "extensions" / tag


def _stem(name: str) -> str:
    return f"{name.rpartition('.')[0]}-{sources_digest(name)}"


def _cached(name: str) -> list[Path]:
    """The libraries in the cache that fit, whatever compiler made them, the newest first."""
    try:
        return sorted(_cache_of_torch().glob(f"{_stem(name)}-*/_C{SUFFIX}"), key=lambda path: path.stat().st_mtime, reverse=True)
    except (OSError, RuntimeError):  # a folder that may not be read, or a user without a home
        return []


def _why_not(name: str, library: Path) -> str | None:
    """What the library was built for, if that is not what is here. Loaded, it might crash, or compute what the sources once said."""
    content = library.read_bytes()
    found = re.search(identity(r"(\d[\d.]*)", "([0-9a-f]+)").encode(), content)
    here = re.split(r"[^\d.]", torch.__version__)[0].rstrip(".")  # without +cu130, .dev20261126 and the like
    if found and found[1].decode() != here:
        return f"is for torch {found[1].decode()}, not {here}"
    if sources_digest(name) and (found is None or found[2].decode() != sources_digest(name)):
        return "was compiled from other sources"
    return None


def _import(name: str, library: Path) -> str | None:
    """Makes the library the module ``name``. Returns the reason if it cannot be loaded."""
    spec = importlib.util.spec_from_file_location(name, library)
    assert spec is not None and spec.loader is not None
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        return f"cannot be loaded, it is for another torch, Python or processor ({str(error).splitlines()[0]})"
    sys.modules[name] = module
    return None


def _advice(name: str) -> str:
    if folder_of("litv2._C").is_dir():
        return "`python -m litv2 build`"
    return f"`cd {'/'.join(name.split('.')[:-1])} && python setup.py build_ext --inplace`"
