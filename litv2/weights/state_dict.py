# SPDX-License-Identifier: Apache-2.0
"""Finds the weights in a checkpoint of any known format and loads them strictly, with a readable report."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, nn

from ..errors import UserError, listed

__all__ = ["find_weights", "load_weights"]

_EMA = ("ema", "state_dict_ema", "model_ema")  # ours, current timm's and old timm's
_PLAIN = ("model", "state_dict")
_PREFIXES = ("module.", "_orig_mod.", "backbone.")  # from DDP and averaged models, from torch.compile, from a backbone in a detector
_DEEPEST_WRAPPING = 10
LISTED = 8  # keys of each kind in an error; another variant differs in hundreds of keys


def find_weights(checkpoint: dict, which: str | None = None, backbone_only: bool = True) -> dict[str, Tensor]:
    """Returns the model's state dict from a checkpoint of this repository, the release, timm or mmengine, or from a bare state dict.

    Prefixes from wrappers (DDP, compile, a detector's ``backbone.``) are removed, in any order; from a detector's checkpoint only
    the backbone is kept.

    Args:
        which: "ema" for the moving average, "model" for the plain weights, None for the moving average if there is one.
        backbone_only: False keeps a detector's neck and heads, and the prefix ``backbone.`` of its backbone.

    Raises:
        UserError: there are no weights, or not the requested ones.
    """
    if which not in (None, "ema", "model"):
        raise UserError(f"{which=} must be 'ema', 'model' or None")
    entries = {key for key in (*_EMA, *_PLAIN, "ema_state_dict") if isinstance(checkpoint.get(key), dict)}
    average = [key for key in _EMA if key in entries]
    plain = [key for key in _PLAIN if key in entries]
    if {"state_dict", "ema_state_dict"} <= entries:
        # mmengine's EMAHook swaps the two when it saves, so that state_dict is the average.
        average, plain = ["state_dict"], ["ema_state_dict"]
    if which == "ema" and not average:
        raise UserError(f"the checkpoint has no moving average; its entries are {_names(checkpoint)}")
    chosen = plain if which == "model" else average or plain
    if chosen:
        checkpoint = checkpoint[chosen[0]]
    elif which == "model" and average:
        raise UserError(f"the checkpoint has only the moving average; its entries are {_names(checkpoint)}")
    weights = {key: value for key, value in checkpoint.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if not weights:
        raise UserError(f"no weights found; the checkpoint's entries are {_names(checkpoint)}")
    prefixes = _PREFIXES if backbone_only else _PREFIXES[:-1]
    for _ in range(_DEEPEST_WRAPPING):
        prefix = next((prefix for prefix in prefixes if any(key.startswith(prefix) for key in weights)), None)
        if prefix is None:
            break
        weights = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    else:
        raise UserError(f"the keys of the weights have more than {_DEEPEST_WRAPPING} wrapper prefixes")
    if numbers := [key for key, value in weights.items() if key.endswith((".weight", ".bias")) and not value.dim()]:
        raise UserError(f"{numbers[0]} is a single number in the checkpoint, which no layer has")
    return weights


def _names(checkpoint: dict) -> list[str]:
    return sorted(str(key)[:50] for key in checkpoint)[:20]


def load_weights(
    model: nn.Module,
    weights: dict[str, Tensor],
    new_heads: Collection[str] = (),
    may_miss: Collection[str] = (),
    may_have: Collection[str] = (),
) -> list[str]:
    """Loads weights strictly, or raises and leaves the model unchanged.

    Args:
        new_heads: modules that keep their initialisation if their shapes in the file differ, for fine-tuning on other classes.
        may_miss: keys of the model that may be missing from the file; they keep their initialisation.
        may_have: keys of the file that may be missing from the model; they are ignored.

    Returns:
        Lines that describe what was not loaded from the file; empty if everything was.

    Raises:
        UserError: keys are missing, unexpected or have a different shape; the message lists the first ones.
    """
    notes = []
    own = model.state_dict()
    weights = dict(weights)
    for head in new_heads:
        keys = [f"{head}.weight", f"{head}.bias"]
        if any(key in own and key in weights and own[key].shape != weights[key].shape for key in keys):
            theirs, ours = (len(state[keys[0]]) for state in (weights, own))
            weights.update({key: own[key] for key in keys})
            notes.append(f"{head} is newly initialised: it has {theirs} outputs in the file, but {ours} in this model")
    new = sorted((own.keys() - weights.keys()) & set(may_miss))
    unused = sorted((weights.keys() - own.keys()) & set(may_have))
    if new:
        notes.append(f"newly initialised because not in the file: {', '.join(new)}")
    if unused:
        notes.append(f"unused keys of the file: {', '.join(unused)}")
    weights = {key: value for key, value in weights.items() if key not in unused} | {key: own[key] for key in new}
    missing = sorted(own.keys() - weights.keys())
    unexpected = sorted(weights.keys() - own.keys())
    shapes = [
        f"{key} {tuple(weights[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own.keys() & weights.keys()
        if weights[key].shape != own[key].shape
    ]
    if missing or unexpected or shapes:
        parts = (("missing", missing), ("unexpected", unexpected), ("with a different shape", sorted(shapes)))
        report = "".join(f"\n  {what} ({len(keys)}): {listed(keys, LISTED)}" for what, keys in parts if keys)
        raise UserError(f"the weights do not fit this {type(model).__name__}; is it another variant?{report}")
    model.load_state_dict(weights, strict=True)
    return notes
