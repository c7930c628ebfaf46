# SPDX-License-Identifier: Apache-2.0
"""The only place that knows the keys of the public release's configurations, which the release inherited from Swin Transformer."""

from __future__ import annotations

from ..errors import UserError

__all__ = ["move_pretrained", "take_old_keys"]

# Keys without a meaning for LITv2, the only value that is accepted, and the reason or the replacement.
WITHOUT_MEANING = {
    "pretrain_img_size": (224, "any image size is accepted"),
    "window_size": (7, "HiLo's windows are set by local_ws"),
    "ape": (False, "there is no position embedding"),
    "patch_norm": (True, "the patches are always normalised"),
    "qk_scale": (None, "attention is always scaled by head_dim ** -0.5"),
}


def take_old_keys(arguments: dict, local_ws: tuple[int, ...]) -> tuple[dict, list[str]]:
    """Removes the release's keys from a backbone's ``arguments``.

    Args:
        local_ws: the backbone's windows, with which ``has_msa`` must agree.

    Returns:
        The current arguments that replace them (``with_cp`` and ``init_cfg``, if any), and a line for the log about each key.

    Raises:
        UserError: the value of a key asks for something that LITv2 does not support.
    """
    today: dict = {}
    notes = []
    for key, (value, reason) in WITHOUT_MEANING.items():
        if key in arguments:
            given = arguments.pop(key)
            if given != value:
                raise UserError(f"LITv2: {key}={given!r} is not supported: {reason}; remove the key")
            notes.append(f"LITv2: {key}={given!r} has no effect and can be removed: {reason}")
    if "has_msa" in arguments:
        has_msa = arguments.pop("has_msa")
        if [bool(attention) for attention in has_msa] != [window > 0 for window in local_ws]:
            raise UserError(
                f"LITv2: has_msa={has_msa} does not agree with local_ws={local_ws}, where 0 means a stage without attention; "
                "set local_ws and remove has_msa"
            )
        notes.append(f"LITv2: has_msa={has_msa} can be removed: local_ws={local_ws} implies it")
    if "use_checkpoint" in arguments:
        today["with_cp"] = arguments.pop("use_checkpoint")
        notes.append(f"LITv2: use_checkpoint is now with_cp: with_cp={today['with_cp']}")
    if (source := arguments.pop("pretrained", None)) is not None:
        today["init_cfg"] = dict(type="Pretrained", checkpoint=source)
        notes.append(f"LITv2: pretrained is now init_cfg: init_cfg={today['init_cfg']}")
    return today, notes


def move_pretrained(model: dict) -> None:
    """Moves a model's ``pretrained`` to its backbone, as OpenMMLab's libraries used to do; current mmdet no longer knows the key."""
    backbone = model.get("backbone", {})
    if backbone.get("type") == "LITv2" and "pretrained" in model:
        source = model.pop("pretrained")
        if source is not None:
            backbone["pretrained"] = source
