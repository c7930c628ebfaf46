# SPDX-License-Identifier: Apache-2.0
"""The inference form of LITv2: the same outputs from fewer operations. Exports and ``torch.compile`` start from it.

These are folded, each exactly up to rounding:

* the batch norm of each token merging into its deformable convolution;
* the scale and shift of ``norm1`` into HiLo's projections, those of ``norm2`` into ``fc1``;
* HiLo's projections of the same tokens into one: Hi-Fi's q, k, v and Lo-Fi's q, and with a window of 1 Lo-Fi's k, v too;
* the scale of the attention logits into the weights of the queries.

Norms whose output is used as it is (in the patch embedding, before the head, in a pyramid) are kept. So is attention other than the paper's
HiLo (``is_plain``), with its norm.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hilo import HiLo
from mm_modules.torch_state import is_exporting

from ..layers import Block, DeformableTokenMerging
from ..model import LITv2
from ..ops import pooled_attention, whole_windows, window_attention
from ..ops.folding import inference_copy, is_plain, merging_weights, token_projections, weight_and_bias

__all__ = ["FusedHiLo", "fuse"]


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
        for block in stage.blocks:
            _fuse_block(block)
        if stage.downsample is not None:
            _fuse_merging(stage.downsample)
    return model


def _fuse_block(block: Block) -> None:
    if isinstance(block.attn, FusedHiLo) or not block.norm2.elementwise_affine:
        raise ValueError("fuse: the model is already fused")
    if block.attn is not None and is_plain(block.attn):
        block.attn = FusedHiLo(block.attn, block.norm1)
        block.norm1 = _without_affine(block.norm1)
    weight, bias, shift = _after_norm(block.mlp.fc1, block.norm2)
    block.mlp.fc1 = _linear(weight, bias + shift)
    block.norm2 = _without_affine(block.norm2)


def _fuse_merging(merging: DeformableTokenMerging) -> None:
    merging.dconv.weight, merging.dconv.bias = merging_weights(merging)
    merging.norm_layer = nn.Identity()


def _after_norm(linear: nn.Linear, norm: nn.LayerNorm) -> tuple[Tensor, Tensor, Tensor]:
    """Returns W, b, t such that ``linear(norm(x)) = W n + b + t``, where n is x normalised without scale and shift."""
    weight, bias = weight_and_bias(linear)
    return weight * norm.weight, bias, weight @ norm.bias


def _without_affine(norm: nn.LayerNorm) -> nn.LayerNorm:
    return nn.LayerNorm(norm.normalized_shape, norm.eps, elementwise_affine=False)


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight, linear.bias = (nn.Parameter(tensor.contiguous(), requires_grad=False) for tensor in (weight, bias))
    return linear


class FusedHiLo(nn.Module):
    """HiLo with the LayerNorm before it folded in: normalised tokens without scale and shift (B, H * W, dim) -> (B, H * W, dim).

    HiLo zero-pads its map *after* the norm's shift, which is folded into the projections here. To match it in the padded
    cells, Hi-Fi's projections are padded with their biases, and the shift of Lo-Fi's keys and values is weighted by the
    share of each pooled cell that lies inside the map.
    """

    def __init__(self, attn: HiLo, norm: nn.LayerNorm):
        super().__init__()
        self.window_size, self.h_heads, self.l_heads = attn.window_size, attn.h_heads, attn.l_heads
        parts = token_projections(attn, lambda linear: _after_norm(linear, norm))  # the projections to merge, as (weight, bias, shift)
        if attn.h_heads:
            self.register_buffer("h_bias", parts[0][1])
            self.h_proj = attn.h_proj
        if attn.l_heads:
            if self.window_size > 1:
                weight, bias, shift = _after_norm(attn.l_kv, norm)
                self.l_kv = _linear(weight, bias + shift)
                self.register_buffer("l_shift", shift)
            self.l_proj = attn.l_proj
        weights, biases, shifts = zip(*parts)
        self.sizes = [len(bias) for bias in biases]
        self.proj = _linear(torch.cat(weights), torch.cat(biases) + torch.cat(shifts))

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        x = x.unflatten(1, (H, W))  # (B, H, W, dim)
        parts = list(self.proj(x).split(self.sizes, dim=-1))
        qkv = parts.pop(0) if self.h_heads else None
        lofi = self._lofi(parts.pop(0), parts.pop(0) if parts else self._pooled_kv(x)) if self.l_heads else None
        if qkv is None:
            y = self.l_proj(lofi)
        elif lofi is None:
            y = self.h_proj(self._hifi(qkv))
        elif _is_compiling_for_cuda(x):
            # One product costs less than two small ones and joining them. Where weights are frozen these two lines are constants.
            weight = torch.block_diag(self.h_proj.weight, self.l_proj.weight)
            bias = torch.cat((self.h_proj.bias, self.l_proj.bias))
            y = F.linear(self._hifi(qkv, lofi), weight, bias)
        else:
            y = torch.cat((self.h_proj(self._hifi(qkv)), self.l_proj(lofi)), dim=-1)
        return y.flatten(1, 2)

    def _hifi(self, qkv: Tensor, beside: Tensor | None = None) -> Tensor:
        """(B, H, W, 3 * h_dim) -> (B, H, W, h_dim), not projected, and joined with what stands beside it."""
        return window_attention(qkv, self.h_bias, self.window_size, self.h_heads, 1.0, beside)

    def _lofi(self, q: Tensor, kv: Tensor) -> Tensor:
        """Queries (B, H, W, l_dim), keys and values of the pooled map (B, nh, nw, 2 * l_dim) -> (B, H, W, l_dim), not projected."""
        return pooled_attention(q, kv, self.l_heads, 1.0)

    def _pooled_kv(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> keys and values (B, nh, nw, 2 * l_dim) of the s x s average-pooled map."""
        s, (H, W) = self.window_size, x.shape[1:3]
        nh, nw, padded = whole_windows(H, W, s)
        if not padded:
            return self.l_kv(_pool(x, s))
        x = F.pad(x, (0, 0, 0, nw * s - W, 0, nh * s - H))
        rows = (H - s * torch.arange(nh, device=x.device)).clamp(max=s) / s
        cols = (W - s * torch.arange(nw, device=x.device)).clamp(max=s) / s
        outside = (1 - rows.view(nh, 1, 1) * cols.view(nw, 1)).to(x.dtype)
        return self.l_kv(_pool(x, s)) - self.l_shift * outside


def _is_compiling_for_cuda(x: Tensor) -> bool:
    return x.device.type == "cuda" and torch.compiler.is_compiling() and not is_exporting()


def _pool(x: Tensor, s: int) -> Tensor:
    """(B, s * h, s * w, C) -> (B, h, w, C)."""
    return F.avg_pool2d(x.permute(0, 3, 1, 2), s).permute(0, 2, 3, 1)
