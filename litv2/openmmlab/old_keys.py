"""Keys of the public release's configurations, which it had from Swin Transformer: the one place that knows them."""

from __future__ import annotations

from ..errors import UserError

__all__ = ["move_pretrained", "take_old_keys"]

# Keys without a meaning for LITv2, the one value at which they are accepted, and what does their work, if anything does.
WITHOUT_MEANING = {
    "pretrain_img_size": (224, "any size is taken as it is"),
    "window_size": (7, "HiLo's windows are local_ws"),
    "ape": (False, "there is no position embedding"),
    "patch_norm": (True, "the patches are always normalised"),
    "qk_scale": (None, "the scale is that of the heads' dimension"),
}


def take_old_keys(arguments: dict, local_ws: tuple[int, ...]) -> tuple[dict, list[str]]:
    """Removes the release's keys from a backbone's ``arguments``.

    Args:
        local_ws: the backbone's windows, with which ``has_msa`` must agree.

    Returns:
        The arguments that they stand for today (``with_cp`` and ``init_cfg``, if any), and a line for the log about each key.

    Raises:
        UserError: a key whose value asks for something that LITv2 is not.
    """
    today: dict = {}
    notes = []
    for key, (value, reason) in WITHOUT_MEANING.items():
        if key in arguments:
            given = arguments.pop(key)
            if given != value:
                raise UserError(f"LITv2: {key}={given!r} is not supported: {reason}. Leave the key out")
            notes.append(f"LITv2: {key}={given!r} has no meaning here and can be left out: {reason}")
    if "has_msa" in arguments:
        has_msa = arguments.pop("has_msa")
        if [bool(attention) for attention in has_msa] != [window > 0 for window in local_ws]:
            raise UserError(
                f"LITv2: has_msa={has_msa} does not agree with local_ws={local_ws}: a stage without attention has the window 0. "
                "Set local_ws, and leave has_msa out"
            )
        notes.append(f"LITv2: has_msa={has_msa} can be left out: local_ws={local_ws} says it")
    if "use_checkpoint" in arguments:
        today["with_cp"] = arguments.pop("use_checkpoint")
        notes.append(f"LITv2: use_checkpoint is called with_cp here: with_cp={today['with_cp']}")
    if (source := arguments.pop("pretrained", None)) is not None:
        today["init_cfg"] = dict(type="Pretrained", checkpoint=source)
        notes.append(f"LITv2: pretrained is called init_cfg here: init_cfg={today['init_cfg']}")
    return today, notes


def move_pretrained(model: dict) -> None:
    """Hands a model's ``pretrained`` to its backbone, as OpenMMLab's libraries did then; mmdet of today does not know the key."""
    backbone = model.get("backbone", {})
    if backbone.get("type") == "LITv2" and "pretrained" in model:
        source = model.pop("pretrained")
        if source is not None:
            backbone["pretrained"] = source
