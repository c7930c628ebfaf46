# SPDX-License-Identifier: Apache-2.0
"""LITv2, "Fast Vision Transformers with HiLo Attention" (NeurIPS 2022): one model for every task."""

from mm_modules import __version__
from mm_modules.dispatch import check_forced_names

from .compilation import COMPILE_OPTIONS
from .factory import create_model
from .inference.fastest import optimize
from .inference.fused import fuse
from .model import LITv2, litv2_base, litv2_medium, litv2_small
from .timm_bridge.hook import register_with_timm

__all__ = ["COMPILE_OPTIONS", "LITv2", "__version__", "create_model", "fuse", "litv2_base", "litv2_medium", "litv2_small", "optimize"]

check_forced_names()  # by now all operators have been imported
register_with_timm()
