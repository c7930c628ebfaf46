# SPDX-License-Identifier: Apache-2.0
"""Reads untrusted checkpoint files without running their code."""

from __future__ import annotations

import json
from collections import Counter, OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import MissingPackage, UserError
from ..files import is_shortage
from .formats import check_format, check_pickles
from .pickle_check import CONFIG_NODE

__all__ = ["read_checkpoint"]


def read_checkpoint(path: str | Path, also: Sequence = ()) -> dict:
    """Returns the content of a checkpoint file on the CPU: tensors and builtins only, without running code from the file.

    The formats (torch.save, old and new, and safetensors) are distinguished by the content. The pickled configuration in the release's
    files becomes a plain dictionary. The file is validated before torch reads it (:mod:`litv2.weights.formats`).

    Args:
        also: further classes that the file may contain, as for ``torch.serialization.safe_globals``.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: the file is damaged, is not a checkpoint or contains other objects.
        OSError, MemoryError, RuntimeError: too many files are open, or memory is refused.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        kind = check_format(path)
        if kind == "safetensors":
            return _read_safetensors(path)
        check_pickles(path, kind, {_global_name(entry) for entry in also})
        # A Counter stands in for the configuration's class: it accepts entries and attributes, and genuine Counters have no attributes.
        with torch.serialization.safe_globals([(Counter, CONFIG_NODE), *also]):
            content = torch.load(path, map_location="cpu", weights_only=True)
        content = _made_plain(content)
    except ImportError:
        raise
    except Exception as error:  # a damaged file can fail in any of torch's layers: zip, pickle, storage
        if is_shortage(error):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} cannot be read as a checkpoint (damaged, or not plain tensors): {reason}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} contains a {type(content).__name__}, expected a dictionary")
    return content


def _global_name(entry) -> str:
    return entry[1] if isinstance(entry, tuple) else f"{entry.__module__}.{entry.__qualname__}"


def _read_safetensors(path: Path) -> dict:
    """Returns {"model": weights, ...}, with the metadata of the file (such as ``python -m litv2 convert`` writes) as further entries."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise MissingPackage(f"reading {path} needs the package safetensors: pip install safetensors") from error
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            content = {key: _decoded(value) for key, value in (file.metadata() or {}).items()}
            return {**content, "model": {name: file.get_tensor(name) for name in names}}
    except SafetensorError as error:
        raise UserError(str(error)) from error


def _decoded(text: str):
    try:
        return json.loads(text)
    except ValueError:
        return text  # metadata of other programs is any text


def _made_plain(content):
    """Replaces the stand-ins of configurations by dictionaries, in place, and checks every tensor.

    Nothing is copied twice and nothing recurses, no matter how the objects in the file share and contain each other.
    """
    root, twins = [content], {}
    pending, seen = [root], set()

    def plain(value):
        if type(value) is not Counter or not vars(value):
            return value
        if id(value) not in twins:
            twins[id(value)] = (dict(value), value)  # keeping the original alive keeps its id unique
        return twins[id(value)][0]

    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise UserError(f"a tensor of shape {tuple(value.shape)} is expanded from fewer values in the file")
        elif isinstance(value, OrderedDict):
            for name in set(vars(value)) - {"_metadata"}:  # any other attribute would hide a method
                del vars(value)[name]
        if isinstance(value, dict):
            for key, item in value.items():
                value[key] = plain(item)
            pending += value.values()
        elif isinstance(value, list):
            value[:] = map(plain, value)
            pending += value
        elif isinstance(value, tuple):
            pending += value
    return root[0]
