# SPDX-License-Identifier: Apache-2.0
"""The two networks of a LITv2 that can be exported: the classifier and the feature pyramid."""

from __future__ import annotations

from torch import Tensor, nn

from ..inference.fused import fuse
from ..model import LITv2
from .settings import Network

__all__ = ["classifier", "pyramid"]


def classifier(model: LITv2) -> Network:
    """Images -> ``logits`` (B, classes), or the pooled ``features`` of a model without a classifier."""
    output = "logits" if model.num_classes else "features"
    return Network(fuse(model), model, (output,), model.in_chans, _smallest(model), (output,) if model.num_classes else ())


def pyramid(backbone: LITv2) -> Network:
    """Images -> one map (B, C, H / s, W / s) per stride s, ``stride4`` to ``stride32``; a detector's backbone returns its own maps."""
    indices = getattr(backbone, "out_indices", range(len(backbone.layers)))
    outputs = tuple(f"stride{backbone.feature_info[i]['reduction']}" for i in indices)
    fused = fuse(backbone)
    if hasattr(backbone, "out_indices"):
        return Network(fused, backbone, outputs, backbone.in_chans, _smallest(backbone))
    return Network(_Pyramid(fused), _Pyramid(backbone), outputs, backbone.in_chans, _smallest(backbone))


class _Pyramid(nn.Module):
    def __init__(self, model: LITv2):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.model.forward_pyramid(x)


def _smallest(model: LITv2) -> int:
    return model.feature_info[-1]["reduction"]
