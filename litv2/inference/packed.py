# SPDX-License-Identifier: Apache-2.0
"""LITv2 for inference on the CPU, built from native operators that keep their weights packed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import Block, DepthwiseConv, PatchEmbed
from ..model import LITv2, check_images
from ..ops.folding import inference_copy, is_plain
from ..ops.packing import feed_forward_arguments, hilo_arguments, packed, patch_embed_arguments, token_merging_arguments

__all__ = ["PackedBlocks", "PackedClassifier", "PackedOperator", "PackedPatchEmbed", "in_one_call", "packed_blocks", "packed_model"]


class PackedOperator(nn.Module):
    """A native operator with its arguments; tensors among them are non-persistent buffers."""

    def __init__(self, name: str, **arguments):
        super().__init__()
        self.name = name
        for key, value in arguments.items():
            if isinstance(value, Tensor):
                # packing has made new tensors of the others
                self.register_buffer(key, value.detach().clone() if isinstance(value, nn.Parameter) else value, persistent=False)
        schema = getattr(torch.ops.litv2, name).default._schema
        # in its order, made once: each call from Python finds the caches full of the model's maps
        self.arguments = tuple(self._buffers.get(key, arguments[key]) for key in [argument.name for argument in schema.arguments[1:]])

    def forward(self, x: Tensor) -> Tensor:
        return getattr(torch.ops.litv2, self.name).default(x, *self.arguments)

    def extra_repr(self) -> str:
        return self.name


class PackedBlocks(nn.Module):
    """The blocks of a stage in one call. (B, H, W, dim) -> (B, H, W, dim)."""

    def __init__(self, parts: Sequence[PackedOperator]):
        super().__init__()
        self.parts = nn.ModuleList(parts)
        arguments = [argument for part in parts for argument in part.arguments]
        self.tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
        self.eps = [argument for argument in arguments if isinstance(argument, float)]
        numbers = [argument for argument in parts[0].arguments if isinstance(argument, int)]
        self.heads = numbers or (0, 0, 1)  # of Hi-Fi, of Lo-Fi, and the window size

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.litv2.native_blocks.default(x, self.tensors, self.eps, *self.heads)


class PackedPatchEmbed(PackedOperator):
    """Image (B, in_chans, H, W) -> tokens (B, ceil(H / patch), ceil(W / patch), dim)."""

    def __init__(self, embed: PatchEmbed):
        super().__init__("native_patch_embed", **patch_embed_arguments(embed))
        self.patch = embed.patch_size

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.padded(x))

    def padded(self, x: Tensor) -> Tensor:
        """Image -> image of whole patches."""
        H, W = x.shape[2:]
        if H % self.patch or W % self.patch:
            x = F.pad(x, (0, -W % self.patch, 0, -H % self.patch))
        return x


class TorchAttention(nn.Module):
    """The attention of a block, x + attn(norm(x)), where it is none that the native operator knows. (B, H, W, dim) -> (B, H, W, dim)."""

    def __init__(self, attn: nn.Module, norm: nn.Module):
        super().__init__()
        self.attn, self.norm = attn, norm

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[1:3]
        return x + self.attn(self.norm(x).flatten(1, 2), H, W).unflatten(1, (H, W))


class PackedClassifier(nn.Module):
    """A classifier in one call. Images (B, in_chans, H, W) -> logits (B, num_classes).

    Args:
        model: a classifier whose parts are packed, but for the last norm and the head.
    """

    def __init__(self, model: LITv2):
        super().__init__()
        self.model = model
        self.smallest = model.feature_info[-1]["reduction"]
        embed: Any = model.patch_embed
        self.patch, *arguments = embed.arguments
        self.stages: list[int] = []
        stages: list[Any] = list(model.stages)
        for stage in stages:
            blocks = stage.blocks[0]
            arguments += [*blocks.tensors, *blocks.eps]
            *weights, channels = (0,) if stage.downsample is None else stage.downsample.arguments
            arguments += weights
            self.stages += [sum(part.name == "native_feed_forward" for part in blocks.parts), *blocks.heads, channels]
        norm, head = model.norm, model.head
        arguments += [norm.weight.detach(), norm.bias.detach(), norm.eps, *packed(head.weight.detach(), head.bias)]
        self.tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
        self.eps = [argument for argument in arguments if isinstance(argument, float)]

    def forward(self, x: Tensor) -> Tensor:
        check_images(x, self.model.in_chans, self.smallest)
        x = self.model.patch_embed.padded(x)
        return torch.ops.litv2.native_classifier.default(x, self.patch, self.tensors, self.eps, self.stages, self.model.num_classes)


def packed_blocks(blocks: Iterable[Block], products: torch.dtype = torch.float32) -> nn.Sequential:
    """(B, H, W, dim) -> (B, H, W, dim)."""
    parts: list[nn.Module] = []
    attentions = set()
    for block in blocks:
        attn = block.attn
        if not isinstance(block.mlp.dwconv, DepthwiseConv):  # no native operator has such a feed-forward network
            parts.append(block)
            continue
        if attn is None:
            attentions.add(())
        elif is_plain(attn):
            parts.append(PackedOperator("native_hilo", **hilo_arguments(attn, block.norm1, products)))
            attentions.add((attn.h_heads, attn.l_heads, attn.window))
        else:
            parts.append(TorchAttention(attn, block.norm1))
            attentions.add(attn)
        parts.append(PackedOperator("native_feed_forward", **feed_forward_arguments(block.mlp, block.norm2, products)))
    alike = len(attentions) == 1 and all(isinstance(part, PackedOperator) for part in parts)
    return nn.Sequential(PackedBlocks(parts)) if alike else nn.Sequential(*parts)


@torch.no_grad()
def packed_model(model: LITv2, products: torch.dtype = torch.float32) -> LITv2:
    """Returns a copy of the model (classifier or backbone) for inference on the CPU in float32, built from native operators.

    With ``products=torch.bfloat16`` the factors of the products with weights are rounded to bfloat16 and accumulated in float32. With
    ``torch.int8`` the weights are rounded to 127 steps of the largest of each output channel, and each token to 255 steps of its range;
    sums are exact. GELU between the products has an error of up to 5e-5 then. Everything else stays in float32: the patch embedding,
    the offsets of token merging, the products in attention, the classifier, all of an attention that ``is_plain`` does not
    accept, and blocks whose feed-forward network has no convolution.
    """
    model = inference_copy(model)
    model.patch_embed = PackedPatchEmbed(model.patch_embed)
    for stage in model.layers:
        stage.blocks = packed_blocks(stage.blocks, products)
        if stage.downsample is not None:
            stage.downsample = PackedOperator("native_token_merging", **token_merging_arguments(stage.downsample, products))
    return model


def in_one_call(model: LITv2) -> nn.Module:
    """Returns a packed classifier as one operator; of a backbone, or with parts that the operator does not know, the model itself."""
    known = type(model) is LITv2 and type(model.head) is nn.Linear and type(model.norm) is nn.LayerNorm and model.global_pool == "avg"
    alike = all([type(part) for part in stage.blocks] == [PackedBlocks] for stage in model.stages)
    return PackedClassifier(model).eval() if known and alike else model
