# SPDX-License-Identifier: Apache-2.0
"""Registers the backbone of :mod:`litv2.openmmlab.backbone`; configurations import it under this name."""

from .openmmlab.backbone import LITv2Backbone

__all__ = ["LITv2Backbone"]
