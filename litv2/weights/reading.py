"""Checkpoint files nobody vouches for, read without running their code."""

from __future__ import annotations

import json
from collections import Counter, OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import MissingPackage, UserError
from .formats import check_format, check_pickles
from .pickle_check import CONFIG_NODE

__all__ = ["read_checkpoint"]


def read_checkpoint(path: str | Path, also: Sequence = ()) -> dict:
    """The content of a checkpoint file, on the CPU: tensors and builtins only, no code of the file is run.

    Files of torch.save, old and new, and of safetensors are told apart by their content. The release's pickled configuration is
    a plain dictionary. What the file claims is checked before torch reads it (:mod:`litv2.weights.formats`).

    Args:
        also: other classes that the file may hold, as for ``torch.serialization.safe_globals``.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: the file is damaged, is no checkpoint or holds other objects.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        kind = check_format(path)
        if kind == "safetensors":
            return _read_safetensors(path)
        check_pickles(path, kind, {_global_name(entry) for entry in also})
        # A Counter stands in for the configuration's class: it takes entries and attributes, and one of its own has none of these.
        with torch.serialization.safe_globals([(Counter, CONFIG_NODE), *also]):
            content = torch.load(path, map_location="cpu", weights_only=True)
        content = _made_plain(content)
    except ImportError:
        raise
    except Exception as error:  # a damaged file fails in any of torch's layers: zip, pickle, storage
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} cannot be read as a checkpoint (damaged, or not plain tensors): {reason}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, expected a dictionary")
    return content


def _global_name(entry) -> str:
    return entry[1] if isinstance(entry, tuple) else f"{entry.__module__}.{entry.__qualname__}"


def _read_safetensors(path: Path) -> dict:
    """{"model": weights, ...}: the metadata that ``python -m litv2 convert`` writes, and that of others, are further entries."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise MissingPackage(f"{path}: reading it needs the package safetensors: pip install safetensors") from error
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
        return text  # of other programs: metadata is text, whatever it says


def _made_plain(content):
    """Exchanges the stand-ins of configurations for dictionaries, in place, and checks every tensor.

    Nothing is copied twice and nothing recurses, however the file's objects share and contain each other.
    """
    root, twins = [content], {}
    pending, seen = [root], set()

    def plain(value):
        if type(value) is not Counter or not vars(value):
            return value
        if id(value) not in twins:
            twins[id(value)] = (dict(value), value)  # the original is kept, so that its id stays its own
        return twins[id(value)][0]

    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise UserError(f"a tensor of the shape {tuple(value.shape)} is expanded from fewer values in the file")
        elif isinstance(value, OrderedDict):
            for name in set(vars(value)) - {"_metadata"}:  # any other would hide a method
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
