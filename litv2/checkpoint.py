"""Weights from files nobody vouches for: read without running their code, loaded strictly, with a readable report."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor, nn

__all__ = ["find_weights", "load_weights", "read_checkpoint"]

# The release pickled its yacs configuration; it is read as the plain dictionary that it is.
_STAND_INS = [(OrderedDict, "yacs.config.CfgNode")]
_PREFIXES = ("module.", "_orig_mod.", "backbone.")


def read_checkpoint(path: str | Path) -> dict:
    """The content of a checkpoint file, on the CPU: tensors and builtins only, no code of the file is run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, is no checkpoint or holds other objects.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with torch.serialization.safe_globals(_STAND_INS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in any of torch's layers: zip, pickle, storage
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} cannot be read as a checkpoint (damaged, or not plain tensors): {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a dictionary")
    return content


def find_weights(checkpoint: dict) -> dict[str, Tensor]:
    """The model's state dict in any known format: ours (the EMA weights if there are), the release's, or a bare one.

    Prefixes that wrappers leave (DDP, compile, a detector's ``backbone.``) are removed; of a detector's file only the
    backbone is kept.
    """
    for key in ("ema", "model", "state_dict"):
        if isinstance(checkpoint.get(key), dict):
            checkpoint = checkpoint[key]
            break
    weights = {key: value for key, value in checkpoint.items() if isinstance(value, Tensor)}
    if not weights:
        raise ValueError(f"no weights found; the checkpoint's entries are {sorted(map(str, checkpoint))[:20]}")
    for prefix in _PREFIXES:
        if any(key.startswith(prefix) for key in weights):
            weights = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    return weights


def load_weights(model: nn.Module, weights: dict[str, Tensor], allow_new_head: bool = False) -> list[str]:
    """Loads strictly, or raises and leaves the model as it was.

    Args:
        allow_new_head: for fine-tuning: a classifier whose class count differs keeps its fresh initialisation.

    Returns:
        Lines that say what was not taken from the file; empty when everything was.

    Raises:
        ValueError: keys missing, unexpected or of another shape; the message lists them.
    """
    notes = []
    own = model.state_dict()
    weights = dict(weights)
    if allow_new_head and "head.weight" in weights and "head.weight" in own:
        theirs, ours = weights["head.weight"].shape[0], own["head.weight"].shape[0]
        if theirs != ours:
            for key in ("head.weight", "head.bias"):
                weights[key] = own[key]
            notes.append(f"the head is newly initialised: the file has {theirs} classes, this model {ours}")
    missing = sorted(own.keys() - weights.keys())
    unexpected = sorted(weights.keys() - own.keys())
    shapes = [
        f"{key} {tuple(weights[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own.keys() & weights.keys()
        if weights[key].shape != own[key].shape
    ]
    if missing or unexpected or shapes:
        parts = (("missing", missing), ("unexpected", unexpected), ("of another shape", sorted(shapes)))
        report = "".join(f"\n  {what} ({len(keys)}): {', '.join(keys)}" for what, keys in parts if keys)
        raise ValueError(f"the weights do not fit this {type(model).__name__}; is it another variant?{report}")
    model.load_state_dict(weights, strict=True)
    return notes
