# SPDX-License-Identifier: Apache-2.0
"""LITv2 in mmdet and mmseg: the backbone, and the commands of detection/ and segmentation/.

Importing this package without OpenMMLab's raises :class:`litv2.errors.MissingPackage`, an ImportError.
"""

from __future__ import annotations

from importlib.util import find_spec

from ..errors import MissingPackage

__all__ = ["missing_package"]


def missing_package(name: str) -> MissingPackage:
    """Returns the error for a missing OpenMMLab package; it names the command that installs them all."""
    return MissingPackage(f"detection and segmentation need OpenMMLab's packages, but {name} is not installed; run `make mm`")


for _name in ("mmengine", "mmcv"):
    if find_spec(_name) is None:
        raise missing_package(_name)
