"""Weights from files nobody vouches for: read without running their code, loaded strictly, with a readable report."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

__all__ = ["fetch", "find_weights", "load_weights", "read_checkpoint"]

# The release pickled its yacs configuration; it is read as the plain dictionary that it is.
_STAND_INS = [(OrderedDict, "yacs.config.CfgNode")]
_PREFIXES = ("module.", "_orig_mod.", "backbone.")


def fetch(source: str | Path) -> Path:
    """The local file of a path or of a URL; a URL is downloaded once, into torch.hub's cache.

    Raises:
        OSError: the download failed; the message says where to put the file by hand.
    """
    if not str(source).startswith(("http://", "https://")):
        return Path(source)
    path = Path(torch.hub.get_dir()) / "checkpoints" / str(source).rsplit("/", 1)[-1]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(str(source), str(path))
        except OSError as error:  # urllib's errors are OSErrors
            raise OSError(f"{source} cannot be downloaded ({error}); fetch it by other means and put it at {path}") from error
    return path


def read_checkpoint(path: str | Path, also: Sequence = ()) -> dict:
    """The content of a checkpoint file, on the CPU: tensors and builtins only, no code of the file is run.

    Args:
        also: other classes that the file may hold, as for ``torch.serialization.safe_globals``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, is no checkpoint or holds other objects.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with torch.serialization.safe_globals([*_STAND_INS, *also]):
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


def load_weights(
    model: nn.Module,
    weights: dict[str, Tensor],
    new_heads: Collection[str] = (),
    may_miss: Collection[str] = (),
    may_have: Collection[str] = (),
) -> list[str]:
    """Loads strictly, or raises and leaves the model as it was.

    Args:
        new_heads: for fine-tuning: modules that keep their initialisation where the file's are of another shape, that is,
            for other classes.
        may_miss: keys of the model that the file need not have; they keep their initialisation.
        may_have: keys of the file that the model need not have; they are left out.

    Returns:
        Lines that say what was not taken from the file; empty when everything was.

    Raises:
        ValueError: keys missing, unexpected or of another shape; the message lists them.
    """
    notes = []
    own = model.state_dict()
    weights = dict(weights)
    for head in new_heads:
        keys = [f"{head}.weight", f"{head}.bias"]
        if any(key in own and key in weights and own[key].shape != weights[key].shape for key in keys):
            theirs, ours = (len(state[keys[0]]) for state in (weights, own))
            weights.update({key: own[key] for key in keys})
            notes.append(f"{head} is newly initialised, for other classes: it has {theirs} outputs in the file, {ours} in this model")
    new = sorted((own.keys() - weights.keys()) & set(may_miss))
    unused = sorted((weights.keys() - own.keys()) & set(may_have))
    if new:
        notes.append(f"newly initialised, not in the file: {', '.join(new)}")
    if unused:
        notes.append(f"in the file, not used: {', '.join(unused)}")
    weights = {key: value for key, value in weights.items() if key not in unused} | {key: own[key] for key in new}
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
