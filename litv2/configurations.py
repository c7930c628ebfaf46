# SPDX-License-Identifier: Apache-2.0
"""The configurations of detection/ and segmentation/, found without OpenMMLab's packages."""

from __future__ import annotations

from pathlib import Path

from .errors import UserError

__all__ = ["config_of"]

ROOT = Path(__file__).resolve().parents[1]


def config_of(checkpoint: str) -> str:
    """Returns the configuration named in a checkpoint's path: ``.../NAME.pth`` or ``.../NAME/epoch_12.pth``.

    Raises:
        UserError: none is.
    """
    configs = [path for task in ("detection", "segmentation") for path in (ROOT / task / "configs/litv2").glob("*.py")]
    named = [path for path in configs if path.stem in checkpoint]
    if not named:
        raise UserError(f"{checkpoint} contains no configuration's name; pass the configuration with --config")
    return str(max(named, key=lambda path: len(path.stem)))
