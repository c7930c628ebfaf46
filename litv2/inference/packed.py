"""LITv2 for inference on the CPU, built from native operators that keep their weights packed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import Block, PatchEmbed
from ..model import LITv2
from ..ops.folding import inference_copy, is_plain
from ..ops.packing import feed_forward_arguments, hilo_arguments, patch_embed_arguments, token_merging_arguments

__all__ = ["PackedOperator", "PackedPatchEmbed", "packed_block", "packed_model"]


class PackedOperator(nn.Module):
    """A native operator with its arguments; tensors among them are non-persistent buffers."""

    def __init__(self, name: str, **arguments):
        super().__init__()
        self.name = name
        self.numbers = {key: value for key, value in arguments.items() if not isinstance(value, Tensor)}
        for key, value in arguments.items():
            if key not in self.numbers:
                self.register_buffer(key, value.detach().clone(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return getattr(torch.ops.litv2, self.name)(x, **self.numbers, **self._buffers)  # in a hundredth of the time of named_buffers()

    def extra_repr(self) -> str:
        return self.name


class PackedPatchEmbed(PackedOperator):
    """Image (B, in_chans, H, W) -> tokens (B, ceil(H / patch), ceil(W / patch), dim)."""

    def __init__(self, embed: PatchEmbed):
        super().__init__("native_patch_embed", **patch_embed_arguments(embed))

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[2:]
        patch = self.numbers["patch"]
        if H % patch or W % patch:
            x = F.pad(x, (0, -W % patch, 0, -H % patch))
        return super().forward(x)


class TorchAttention(nn.Module):
    """The attention of a block, x + attn(norm(x)), where it is none that the native operator knows. (B, H, W, dim) -> (B, H, W, dim)."""

    def __init__(self, attn: nn.Module, norm: nn.Module):
        super().__init__()
        self.attn, self.norm = attn, norm

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[1:3]
        return x + self.attn(self.norm(x).flatten(1, 2), H, W).unflatten(1, (H, W))


def packed_block(block: Block, products: torch.dtype = torch.float32) -> nn.Sequential:
    """(B, H, W, dim) -> (B, H, W, dim)."""
    parts: list[nn.Module] = []
    if block.attn is not None and is_plain(block.attn):
        parts.append(PackedOperator("native_hilo", **hilo_arguments(block.attn, block.norm1, products)))
    elif block.attn is not None:
        parts.append(TorchAttention(block.attn, block.norm1))
    return nn.Sequential(*parts, PackedOperator("native_feed_forward", **feed_forward_arguments(block.mlp, block.norm2, products)))


@torch.no_grad()
def packed_model(model: LITv2, products: torch.dtype = torch.float32) -> LITv2:
    """Returns a copy of the model (classifier or backbone) for inference on the CPU in float32, built from native operators.

    With ``products=torch.bfloat16`` the factors of the products with weights are rounded to bfloat16 and accumulated in float32. With
    ``torch.int8`` the weights are rounded to 127 steps of the largest of each output channel, and each token to 255 steps of its range;
    sums are exact. GELU between the products has an error of up to 5e-5 then. Everything else stays in float32: the patch embedding,
    the offsets of token merging, the products in attention, the classifier, and all of an attention that ``is_plain`` does not accept.
    """
    model = inference_copy(model)
    model.patch_embed = PackedPatchEmbed(model.patch_embed)
    for stage in model.layers:
        stage.blocks = nn.ModuleList(packed_block(block, products) for block in stage.blocks)
        if stage.downsample is not None:
            stage.downsample = PackedOperator("native_token_merging", **token_merging_arguments(stage.downsample, products))
    return model
