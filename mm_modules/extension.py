# SPDX-License-Identifier: Apache-2.0
"""Finds and loads the compiled extensions: ``problem = load("mm_modules.DCN._C")``.

An extension is a library ``_C`` that registers torch operators when it is loaded. It is either in the folder of its package (an
in-place build by the ``setup.py`` there) or in the user's cache folder, where ``python -m litv2 build`` puts it. A library works with
one version of torch, Python, platform and sources. Its path in the cache encodes all of them; the library itself contains those of
torch and the sources. Loading needs no compiler; ``mm_modules/build.py`` compiles.
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

SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")  # contains Python's version, its ABI and, on most systems, the platform


@cache
def load(name: str) -> str | None:
    """Loads an extension, once per process.

    Args:
        name: name of its module, such as ``litv2.ops._C``.

    Returns:
        None if its operators are now registered, otherwise the reason and the command that fixes it. An unusable library also
        causes a warning; a library that was never built does not.
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
    problem = f"unusable: {reasons[0]}; {_advice(name)} recompiles it"
    text = f"{name} is {problem}. Until then, slower operators compute the same results."
    warnings.warn_explicit(text, UserWarning, filename=name, lineno=0)  # a one-line warning without a source line
    return problem


def cached_library(name: str, compiler: str) -> Path:
    """Returns the cache path of the library that ``compiler`` (name and version) builds from the current sources."""
    return _cache_of_torch() / f"{_stem(name)}-{compiler}" / f"_C{SUFFIX}"


def cache_folder() -> Path:
    """Returns the user's cache folder."""
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
    """Returns the matching libraries in the cache, from any compiler, newest first."""
    try:
        return sorted(_cache_of_torch().glob(f"{_stem(name)}-*/_C{SUFFIX}"), key=lambda path: path.stat().st_mtime, reverse=True)
    except (OSError, RuntimeError):  # an unreadable folder, or a user without a home directory
        return []


def _why_not(name: str, library: Path) -> str | None:
    """Returns how the library differs from this environment, or None. A mismatched one might crash or compute outdated results."""
    content = library.read_bytes()
    found = re.search(identity(r"(\d[\d.]*)", "([0-9a-f]+)").encode(), content)
    here = re.split(r"[^\d.]", torch.__version__)[0].rstrip(".")  # without suffixes such as +cu130 or .dev20261126
    if found and found[1].decode() != here:
        return f"is for torch {found[1].decode()}, not {here}"
    if sources_digest(name) and (found is None or found[2].decode() != sources_digest(name)):
        return "was compiled from different sources"
    return None


def _import(name: str, library: Path) -> str | None:
    """Imports the library as the module ``name``. Returns the reason if it cannot be loaded."""
    spec = importlib.util.spec_from_file_location(name, library)
    assert spec is not None and spec.loader is not None
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        return f"cannot be loaded; it is for another torch, Python or processor ({str(error).splitlines()[0]})"
    sys.modules[name] = module
    return None


def _advice(name: str) -> str:
    if folder_of("litv2._C").is_dir():
        return "`python -m litv2 build`"
    return f"`cd {'/'.join(name.split('.')[:-1])} && python setup.py build_ext --inplace`"
