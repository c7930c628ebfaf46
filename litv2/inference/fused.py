# SPDX-License-Identifier: Apache-2.0
"""The inference form of LITv2: the same outputs from fewer operations. Exports and ``torch.compile`` start from it.

These are folded, each exactly up to rounding:

* the batch norm of each token merging into its deformable convolution;
* the scale and shift of ``norm1`` into HiLo's projections, those of ``norm2`` into ``fc1``;
* HiLo's projections of the same tokens into one: Hi-Fi's q, k, v and Lo-Fi's q, and with a window of 1 Lo-Fi's k, v too;
* the projections of what both branches return into one, whose weight is block-diagonal;
* the scale of the attention logits into the weights of the queries.

Norms whose output is used as it is (in the patch embedding, before the head, in a pyramid) are kept. So is attention other than the paper's
HiLo (``is_plain``), with its norm.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hilo import HiLo

from .. import ops
from ..layers import Block, DeformableTokenMerging
from ..model import LITv2
from ..ops.folding import inference_copy, is_plain, merging_weights, token_projections, weight_and_bias

__all__ = ["FusedBlock", "FusedBlocks", "FusedHiLo", "fuse"]


@torch.no_grad()
def fuse(model: LITv2) -> LITv2:
    """Returns a copy of the model (classifier or backbone) for inference: evaluation mode, no gradients, outputs within 1e-4.

    The parameters of the copy differ, so save, load and train the original model.

    Raises:
        TypeError: the model is not a LITv2.
        ValueError: the model is already fused.
    """
    if not isinstance(model, LITv2):
        raise TypeError(f"fuse: expected a LITv2, got {type(model).__name__}; for a detector or segmenter, fuse its backbone")
    model = inference_copy(model)
    if model.patch_embed.proj.weight.is_cuda:
        # As their inputs are: what they are computed with would convert the weights in each call.
        for conv in (model.patch_embed.proj, *(stage.downsample.dconv for stage in model.layers if stage.downsample is not None)):
            conv.to(memory_format=torch.channels_last)
    for stage in model.layers:
        if any(isinstance(part, FusedBlocks) for part in stage.blocks):
            raise ValueError("fuse: the model is already fused")
        stage.blocks = nn.ModuleList([FusedBlocks(stage.blocks)])
        if stage.downsample is not None:
            _fuse_merging(stage.downsample)
    return model


def _fuse_merging(merging: DeformableTokenMerging) -> None:
    merging.dconv.weight, merging.dconv.bias = merging_weights(merging)
    merging.norm_layer = nn.Identity()


def _after_norm(linear: nn.Linear, norm: nn.LayerNorm) -> tuple[Tensor, Tensor, Tensor]:
    """Returns W, b, t such that ``linear(norm(x)) = W n + b + t``, where n is x normalised without scale and shift."""
    weight, bias = weight_and_bias(linear)
    return weight * norm.weight, bias, weight @ norm.bias


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight, linear.bias = (nn.Parameter(tensor.contiguous(), requires_grad=False) for tensor in (weight, bias))
    return linear


class FusedBlocks(nn.Sequential):
    """The blocks of a stage. The norm that a block begins with is that of the sum that the block before it ends with, and computed there.

    (B, H, W, dim) -> (B, H, W, dim).
    """

    def __init__(self, blocks: Iterable[Block]):
        super().__init__(*map(FusedBlock, blocks))

    def forward(self, x: Tensor) -> Tensor:
        norms = [*(block.eps1 for block in self), None]  # those before each block
        normed = None if norms[0] is None else F.layer_norm(x, x.shape[-1:], eps=norms[0])
        for block, eps in zip(self, norms[1:]):
            x, normed = block(x, normed, eps)
        return x


class FusedBlock(nn.Module):
    """A block with its norms folded into the linear layers after them.

    (B, H, W, dim), and the same normalised with ``eps1`` unless that is None, -> (B, H, W, dim), and with an ``eps`` the same normalised.
    """

    def __init__(self, block: Block):
        super().__init__()
        self.attn = block.attn
        self.eps1: float | None = None
        if block.attn is not None and is_plain(block.attn):
            self.attn, self.eps1 = FusedHiLo(block.attn, block.norm1), block.norm1.eps
        elif block.attn is not None:
            self.norm1 = block.norm1
        weight, bias, shift = _after_norm(block.mlp.fc1, block.norm2)
        self.eps2, self.fc1 = block.norm2.eps, _linear(weight, bias + shift)
        self.dwconv, self.fc2 = block.mlp.dwconv, block.mlp.fc2

    def forward(self, x: Tensor, normed: Tensor | None, eps: float | None) -> tuple[Tensor, Tensor | None]:
        if isinstance(self.attn, FusedHiLo):
            y, proj = self.attn(normed), self.attn.proj
            x, normed = ops.linear_add_norm(y, proj.weight, proj.bias, x, self.eps2)
            hidden = self.fc1(normed)
        else:
            if self.attn is not None:
                x = x + ops.attention(self.norm1(x), self.attn)
            hidden = ops.norm_linear(x, self.fc1.weight, self.fc1.bias, self.eps2)
        last = self.dwconv(hidden), self.fc2.weight, self.fc2.bias, x
        return (ops.linear_add(*last), None) if eps is None else ops.linear_add_norm(*last, eps)


class FusedHiLo(nn.Module):
    """HiLo but for ``proj``, its last product, with the LayerNorm before it folded in: tokens normalised without scale and shift
    (B, H, W, dim) -> (B, H, W, dim).

    HiLo zero-pads its map *after* the norm's shift, which is folded into the projections here. To match it in the padded
    cells, Hi-Fi's projections are padded with their biases, and ``pooled_linear`` knows the shift of Lo-Fi's keys and values.
    """

    def __init__(self, attn: HiLo, norm: nn.LayerNorm):
        super().__init__()
        self.window_size, self.h_heads, self.l_heads = attn.window_size, attn.h_heads, attn.l_heads
        parts = token_projections(attn, lambda linear: _after_norm(linear, norm))  # the projections to merge, as (weight, bias, shift)
        if attn.h_heads:
            self.register_buffer("h_bias", parts[0][1])
        if attn.l_heads and self.window_size > 1:
            weight, bias, shift = _after_norm(attn.l_kv, norm)
            self.l_kv = _linear(weight, bias + shift)
            self.register_buffer("l_shift", shift)
        weights, biases, shifts = zip(*parts)
        self.sizes = [len(bias) for bias in biases]
        self.tokens = _linear(torch.cat(weights), torch.cat(biases) + torch.cat(shifts))
        # One product costs less than two small ones and joining them.
        branches = [proj for proj, heads in (("h_proj", attn.h_heads), ("l_proj", attn.l_heads)) if heads]
        weights, biases = zip(*(weight_and_bias(getattr(attn, proj)) for proj in branches))
        self.proj = _linear(torch.block_diag(*weights), torch.cat(biases))

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.tokens(x).split(self.sizes, dim=-1))
        if not self.l_heads:
            return ops.window_attention(*parts, self.h_bias, self.window_size, self.h_heads, 1.0)
        if self.window_size > 1:
            parts.append(ops.pooled_linear(x, self.window_size, self.l_kv.weight, self.l_kv.bias, self.l_shift))
        if not self.h_heads:
            return ops.pooled_attention(*parts, self.l_heads, 1.0)
        qkv, q, kv = parts
        return ops.hilo_attention(qkv, self.h_bias, q, kv, self.window_size, self.h_heads, self.l_heads, 1.0)
