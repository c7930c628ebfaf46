"""Counts the multiply-adds of a detector or segmenter, as in the published tables and in full."""

from __future__ import annotations

from typing import Any

import torch
from mmcv.cnn import get_model_complexity_info
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hilo import HiLo
from mm_modules.DCN import DeformConv2dPack

__all__ = ["CountedForward", "count_flops"]


def count_flops(model: nn.Module, height: int, width: int) -> dict[str, int]:
    """Counts the multiply-adds for one image of height x width.

    Returns:
        ``published``: the count of the release: mmcv's counter (convolutions, linear layers, norms, ReLU, pooling; a two-stage
        detector with 1000 proposals, 100 of them with masks) plus what mmcv's misses: HiLo's products of queries, keys and
        values, its pooling, and the offset convolutions.
        ``full``: in addition the deformable convolutions themselves, counted like plain ones, which the release leaves out.
        ``products``: only HiLo's products, included in both. (They are missing from the release's number for Mask R-CNN with
        LITv2-M and 4 x 4 windows.)
    """
    extra = dict(products=0, unseen=0, deformable=0)

    def count_hilo(hilo: Any, args: tuple, output: Tensor) -> None:
        _, H, W = args
        s = hilo.window_size
        Hp, Wp = -(-H // s) * s, -(-W // s) * s
        linear = Hp * Wp * sum(layer.weight.numel() for name, layer in hilo.named_children() if isinstance(layer, nn.Linear))
        if s > 1 and hilo.l_heads:
            linear -= hilo.l_kv.weight.numel() * (Hp * Wp - Hp * Wp // s**2)  # keys and values of pooled cells only
            extra["unseen"] += Hp * Wp * hilo.dim
        extra["products"] += hilo.flops(H, W) - linear

    def count_deformable(conv: Any, args: tuple, output: Tensor) -> None:
        cells = output.shape[2] * output.shape[3]
        extra["deformable"] += cells * (conv.weight.numel() + conv.bias.numel())
        extra["unseen"] += cells * (conv.conv_offset.weight.numel() + conv.conv_offset.bias.numel())

    counters = {HiLo: count_hilo, DeformConv2dPack: count_deformable}
    hooks = [module.register_forward_hook(counters[type(module)]) for module in model.modules() if type(module) in counters]
    try:
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):  # only shapes are computed, which takes no time
            seen, _ = get_model_complexity_info(CountedForward(model), (3, height, width), print_per_layer_stat=False, as_strings=False)
    finally:
        for hook in hooks:
            hook.remove()
    published = int(seen) + extra["unseen"] + extra["products"]
    return dict(published=published, full=published + extra["deformable"], products=extra["products"])


class CountedForward(nn.Module):
    """The forward pass to count; for a two-stage detector with 1000 boxes and 100 masks, regardless of the image."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> None:
        if not hasattr(self.model, "roi_head"):
            self.model._forward(image)
            return
        self.model.rpn_head(self.model.extract_feat(image))
        heads = self.model.roi_head
        for head, extractor, boxes in (
            (heads.bbox_head, heads.bbox_roi_extractor, 1000),
            (heads.mask_head, heads.mask_roi_extractor, 100),
        ):
            head(image.new_empty(boxes, extractor.out_channels, *extractor.roi_layers[0].output_size))
