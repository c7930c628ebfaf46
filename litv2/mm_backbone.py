"""Registers the backbone: the name that stands in users' configurations. It lives in :mod:`litv2.openmmlab.backbone`."""

from .openmmlab.backbone import LITv2Backbone

__all__ = ["LITv2Backbone"]
