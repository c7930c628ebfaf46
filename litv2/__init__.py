"""LITv2, "Fast Vision Transformers with HiLo Attention" (NeurIPS 2022): one model for every task."""

from .fused import fuse
from .lazy_timm import register_with_timm
from .model import LITv2, litv2_base, litv2_medium, litv2_small
from .optimize import optimize
from .zoo import create_model

__all__ = ["LITv2", "create_model", "fuse", "litv2_base", "litv2_medium", "litv2_small", "optimize"]

register_with_timm()
