"""LITv2 in mmdet and mmseg: the backbone, and the commands of detection/ and segmentation/.

Nothing here can be imported without OpenMMLab's packages: the import raises :class:`litv2.errors.MissingPackage`, an ImportError.
"""

from __future__ import annotations

from importlib.util import find_spec

from ..errors import MissingPackage

__all__ = ["missing_package"]


def missing_package(name: str) -> MissingPackage:
    """The error to raise where one of OpenMMLab's packages is absent: it says what installs them."""
    return MissingPackage(f"detection and segmentation need OpenMMLab's packages, and {name} is not installed; run `make mm`")


for _name in ("mmengine", "mmcv"):
    if find_spec(_name) is None:
        raise missing_package(_name)
