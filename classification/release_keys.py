# SPDX-License-Identifier: Apache-2.0
"""Differences between the public release's YAML files and flags and this trainer's, so that the release's load unchanged.

An obsolete key is accepted, with a note, at the value that describes what this trainer does anyway, and is an error at any other. All
other keys have the same names here; :func:`translate` handles the few whose values are written differently.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from yacs.config import CfgNode

from litv2.errors import UserError
from litv2.plain_yaml import parse

__all__ = ["OBSOLETE", "explain", "translate"]

# key: (values that are accepted, why it has no effect)
OBSOLETE: dict[str, tuple[list, str]] = {
    "MODEL.TYPE": (["lit", "litv2"], "this trainer has only one model type"),
    "MODEL.LIT.WINDOW_SIZE": ([7], "HiLo's windows are set by MODEL.LIT.LOCAL_WS"),
    "MODEL.LIT.QK_SCALE": ([None], "attention is always scaled by head_dim ** -0.5"),
    "MODEL.LIT.APE": ([False], "LITv2 has no absolute position embedding"),
    "MODEL.LIT.PATCH_NORM": ([True], "the patch embedding is always normalised"),
    "MODEL.LIT.HAS_MSA": ([], "the stages with attention are those whose window in MODEL.LIT.LOCAL_WS is not 0"),
    "TRAIN.START_EPOCH": ([0], "a resumed run takes its epoch from the checkpoint"),
    "LOCAL_RANK": ([0], "torchrun tells every process its rank"),
}
_AMP = {"": None, "O0": "off", "O1": "on", "O2": "on"}


def translate(key: str, value: Any) -> tuple[str, Any] | None:
    """Returns the key and value with the same meaning here; None if the release's have no effect.

    Raises:
        UserError: the AMP_OPT_LEVEL is invalid.
    """
    if key == "AMP_OPT_LEVEL":
        if not isinstance(value, str) or value not in _AMP:
            raise UserError(f"AMP_OPT_LEVEL must be O0, O1 or O2, got {value!r}; this trainer calls it AMP")
        return ("AMP", _AMP[value]) if _AMP[value] else None
    if key == "TRAIN.ACCUMULATION_STEPS" and _plain(value) == 0:
        return key, 1  # the release's value for no accumulation
    if key == "AUG.CUTMIX_MINMAX" and _plain(value) is None:
        return key, []
    if key == "TRAIN.OPTIMIZER.NAME":
        return key, str(value).lower()
    return key, value


def explain(key: str, value: Any, config: CfgNode) -> str:
    """Returns the line that explains why an obsolete key has no effect.

    Raises:
        UserError: the value asks for something that this trainer does not do.
    """
    accepted, reason = OBSOLETE[key]
    if key == "MODEL.LIT.HAS_MSA":
        accepted = [[int(window > 0) for window in config.MODEL.LIT.LOCAL_WS]]
    if _plain(value) not in accepted:
        expected = " or ".join(map(str, accepted))
        raise UserError(f"{key}={value} from the release is not supported, only {expected}: {reason}")
    return f"{key}={value} from the release has no effect: {reason}"


def _plain(value: Any) -> Any:
    """Parses a value like the release: text from --opts as Python or YAML."""
    if value == "None":
        return None
    with suppress(UserError):  # what is not YAML is no accepted value either
        return parse(value) if isinstance(value, str) else value
    return value
