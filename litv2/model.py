"""LITv2 (arXiv 2205.13213): one class that is classifier, detection backbone and segmentation backbone."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .layers import Block, DeformableTokenMerging, DepthwiseConv, PatchEmbed, channels_first

__all__ = ["LITv2", "litv2_small", "litv2_medium", "litv2_base"]


class Stage(nn.Module):
    """Blocks at one resolution, then the merging to the next (the last stage has none)."""

    def __init__(self, blocks: list[Block], downsample: DeformableTokenMerging | None):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """The blocks alone, (B, H, W, C) -> (B, H, W, C): dense tasks read the map before it is merged."""
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x


class LITv2(nn.Module):
    """Vision transformer of four stages with HiLo attention in the later ones.

    Args:
        in_chans: channels of the image.
        num_classes: outputs of the classifier; 0 for none, ``forward`` then returns the pooled features.
        patch_size: side of a patch in pixels.
        embed_dim: channels of stage 1; each stage doubles them.
        depths: blocks per stage.
        num_heads: attention heads per stage.
        mlp_ratio: hidden channels of the feed-forward network over the stage's channels.
        qkv_bias: bias of the query, key and value projections.
        local_ws: HiLo's window per stage; 0 for blocks without attention, 1 for plain self-attention.
        alpha: share of HiLo's heads that are Lo-Fi.
        drop_rate: dropout of the projections, the feed-forward networks and the head's input.
        attn_drop_rate: dropout of attention weights.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0 at the first.

    Shape:
        (B, in_chans, H, W) -> (B, num_classes), for any H and W of at least 32 with the default patch size.

    Raises:
        ValueError: arguments that do not fit together, or an image that is not 4-D, has other channels or is too small.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        patch_size: int = 4,
        embed_dim: int = 96,
        depths: tuple[int, ...] = (2, 2, 6, 2),
        num_heads: tuple[int, ...] = (3, 6, 12, 24),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        local_ws: tuple[int, ...] = (0, 0, 2, 1),
        alpha: float = 0.9,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        if not len(depths) == len(num_heads) == len(local_ws):
            raise ValueError(f"LITv2: one entry per stage is needed in {depths=}, {num_heads=} and {local_ws=}")
        for name, rate in (("drop_rate", drop_rate), ("attn_drop_rate", attn_drop_rate), ("drop_path_rate", drop_path_rate)):
            if not 0 <= rate < 1:
                raise ValueError(f"LITv2: {name}={rate} must lie in [0, 1)")

        self.in_chans = in_chans
        self.num_classes = num_classes
        self.num_features = embed_dim * 2 ** (len(depths) - 1)
        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size)

        blocks_in_all = sum(depths)
        drop_paths = (drop_path_rate * i / max(1, blocks_in_all - 1) for i in range(blocks_in_all))
        self.layers = nn.ModuleList()
        self.feature_info: list[dict] = []  # timm's: channels, stride and module of each map of the pyramid
        for i, depth in enumerate(depths):
            dim = embed_dim * 2**i
            blocks = [
                Block(dim, num_heads[i], local_ws[i], alpha, mlp_ratio, qkv_bias, drop_rate, attn_drop_rate, next(drop_paths))
                for _ in range(depth)
            ]
            last = i == len(depths) - 1
            self.layers.append(Stage(blocks, None if last else DeformableTokenMerging(dim, 2 * dim)))
            self.feature_info.append(dict(num_chs=dim, reduction=patch_size * 2**i, module=f"layers.{i}"))

        self.norm = nn.LayerNorm(self.num_features)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        self.apply(_init_weights)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Image (B, in_chans, H, W) -> normalised tokens (B, H / 32, W / 32, num_features)."""
        return self.norm(self._stages(x)[-1])

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, h, w, num_features) -> logits (B, num_classes), or with ``pre_logits`` the mean (B, num_features)."""
        x = self.head_drop(features.mean(dim=(1, 2)))
        return x if pre_logits else self.head(x)

    def forward_pyramid(self, x: Tensor) -> tuple[Tensor, ...]:
        """Image -> one map (B, C, H, W) per stage, not normalised, taken before its merging; strides 4, 8, 16, 32.

        The maps are views in the channels-last memory format.
        """
        return tuple(channels_first(tokens) for tokens in self._stages(x))

    def _stages(self, x: Tensor, last: int | None = None) -> list[Tensor]:
        """Image -> tokens (B, H, W, C) after the blocks of each stage, up to stage ``last``; None for all."""
        if x.dim() != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f"LITv2: expected images of the shape (B, {self.in_chans}, H, W), not {tuple(x.shape)}")
        smallest = self.feature_info[-1]["reduction"]
        if min(x.shape[2:]) < smallest:
            raise ValueError(f"LITv2: images of {x.shape[2]} x {x.shape[3]} pixels; each side must be at least {smallest}")
        maps = []
        x = self.patch_embed(x)
        last = len(self.layers) - 1 if last is None else last
        for i, stage in enumerate(self.layers[: last + 1]):
            maps.append(stage(x))
            if i < last:
                x = stage.downsample(maps[-1])
        return maps

    def reset_classifier(self, num_classes: int) -> None:
        """Replaces the head by a new one for ``num_classes`` classes, on the same device and in the same dtype; 0 removes it."""
        self.num_classes = num_classes
        old = self.norm.weight
        self.head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        self.head.to(device=old.device, dtype=old.dtype).apply(_init_weights)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that get no weight decay: biases and norms, in the recipe of the paper all 1-D tensors."""
        return {name for name, parameter in self.named_parameters() if parameter.ndim <= 1}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations: less memory, same numbers."""
        for stage in self.layers:
            stage.grad_checkpointing = enable

    def flops(self, H: int = 224, W: int = 224) -> int:
        """Multiply-adds of one H x W image as the public release counts them, which gives the published GFLOPs exactly.

        It differs from a plain count: DTM's offset convolution is counted with 12 output channels (it has 8), the mean
        over positions as C4 at 1/16 of the patches (it is 1/64), the final LayerNorm, GELU, softmax, average pooling and
        bilinear interpolation not at all, and a LayerNorm as one operation per value.
        """
        patch = self.patch_embed.patch_size
        h, w = patches = -(-H // patch), -(-W // patch)
        total = self.patch_embed.flops(h, w)
        for stage in self.layers:
            total += sum(block.flops(h, w) for block in stage.blocks)
            if stage.downsample is not None:
                total += stage.downsample.flops(h, w)
                h, w = h // 2, w // 2
        return total + self.num_features * patches[0] * patches[1] // 16 + self.num_features * self.num_classes


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, DepthwiseConv):
        nn.init.normal_(module.dwconv.weight, std=(2 / 9) ** 0.5)  # fan-out of a 3 x 3 depthwise kernel
        nn.init.zeros_(module.dwconv.bias)


def litv2_small(**kwargs) -> LITv2:
    """LITv2-S: 27.8 M parameters, 3.7 GFLOPs, 82.0 % top-1 on ImageNet-1K. Keyword arguments are LITv2's."""
    return LITv2(**{**dict(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)), **kwargs})


def litv2_medium(**kwargs) -> LITv2:
    """LITv2-M: 48.8 M parameters, 7.5 GFLOPs, 83.3 % top-1 on ImageNet-1K. Keyword arguments are LITv2's."""
    return LITv2(**{**dict(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24)), **kwargs})


def litv2_base(**kwargs) -> LITv2:
    """LITv2-B: 86.5 M parameters, 13.2 GFLOPs, 83.6 % top-1 on ImageNet-1K (84.7 % at 384). Keyword arguments are LITv2's."""
    return LITv2(**{**dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)), **kwargs})
