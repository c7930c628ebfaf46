# SPDX-License-Identifier: Apache-2.0
"""Input pipeline: sources of images -> decoded, augmented samples -> batches."""

from .loader import build_loaders
from .mixup import build_mixup

__all__ = ["build_loaders", "build_mixup"]
