# SPDX-License-Identifier: Apache-2.0
"""LITv2 (arXiv 2205.13213): one class for the classifier and the backbone of detectors and segmenters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attentions import attention_layer
from .layers import Block, DeformableTokenMerging, DepthwiseConv, PatchEmbed, channels_first

__all__ = ["LITv2", "litv2_small", "litv2_medium", "litv2_base"]



class Stage(nn.Module):
    """Blocks at one resolution and the token merging after them (None in the last stage)."""

    def __init__(self, blocks: list[Block], downsample: DeformableTokenMerging | None):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Runs the blocks only, (B, H, W, C) -> (B, H, W, C): dense tasks use the map before token merging."""
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x


class LITv2(nn.Module):
    """Four-stage vision transformer with HiLo attention in the later stages.

    The methods follow the interface of timm's models, so that timm's tools (features_only, layer decay, ...) work with this class.

    Args:
        in_chans: channels of the image.
        num_classes: outputs of the classifier; with 0 there is none and ``forward`` returns the pooled features.
        patch_size: side of a patch in pixels.
        embed_dim: channels of stage 1; each stage doubles them.
        depths: blocks per stage.
        num_heads: attention heads per stage.
        mlp_ratio: hidden channels of the feed-forward network relative to the stage's channels.
        qkv_bias: whether the query, key and value projections have a bias.
        local_ws: HiLo's window size per stage; 0 for blocks without attention, 1 for plain self-attention.
        alpha: share of HiLo's heads that are Lo-Fi.
        drop_rate: dropout rate of the projections, the feed-forward networks and the head's input.
        attn_drop_rate: dropout rate of the attention weights.
        drop_path_rate: stochastic depth rate of the last block; it rises linearly from 0 at the first.
        global_pool: "avg" to average over positions before the head, "" to apply the head at each position.
        attention: "hilo", or another in its place in the stages whose window is not 0 (:mod:`litv2.attentions`): "msa", "sra", "w-msa",
            "t-msa" of the paper's table 4, or "relative-msa", that of LIT, with relative positions of images of 224 x 224 pixels.
        conv_ffn: whether the feed-forward networks have a depthwise convolution, which LIT's have not.

    Shape:
        (B, in_chans, H, W) -> (B, num_classes), for any H and W of at least 32 with the default patch size;
        (B, H / 32, W / 32, num_classes) without pooling.

    Raises:
        ValueError: the arguments are inconsistent, or the input is not 4-D, has the wrong number of channels or is too small.
    """

    output_fmt = "NHWC"  # timm's name for the layout that forward_features returns

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
        global_pool: str = "avg",
        attention: str = "hilo",
        conv_ffn: bool = True,
    ):
        super().__init__()
        if not len(depths) == len(num_heads) == len(local_ws):
            raise ValueError(f"LITv2: {depths=}, {num_heads=} and {local_ws=} must have one entry per stage")
        for name, rate in (("drop_rate", drop_rate), ("attn_drop_rate", attn_drop_rate), ("drop_path_rate", drop_path_rate)):
            if not 0 <= rate < 1:
                raise ValueError(f"LITv2: {name}={rate} must lie in [0, 1)")

        self.in_chans = in_chans
        self.num_classes = num_classes
        self.global_pool = _known_pool(global_pool)
        self.num_features = self.head_hidden_size = embed_dim * 2 ** (len(depths) - 1)
        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size)

        blocks_in_all = sum(depths)
        drop_paths = (drop_path_rate * i / max(1, blocks_in_all - 1) for i in range(blocks_in_all))
        self.layers = nn.ModuleList()
        self.feature_info: list[dict] = []  # for timm: channels, stride and module of each map of the pyramid
        for i, depth in enumerate(depths):
            dim = embed_dim * 2**i
            stride, stages_after = patch_size * 2**i, len(depths) - 1 - i
            blocks = [
                Block(
                    dim, num_heads[i], local_ws[i], alpha, mlp_ratio, qkv_bias, drop_rate, attn_drop_rate, next(drop_paths),
                    attention=attention_layer(attention, block, stages_after, stride), conv_ffn=conv_ffn,
                )  # fmt: skip
                for block in range(depth)
            ]
            self.layers.append(Stage(blocks, DeformableTokenMerging(dim, 2 * dim) if stages_after else None))
            self.feature_info.append(dict(num_chs=dim, reduction=stride, module=f"layers.{i}"))

        self.norm: nn.Module = nn.LayerNorm(self.num_features)
        self.head_drop = nn.Dropout(drop_rate)
        self.head: nn.Module = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        self.apply(_init_weights)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Image (B, in_chans, H, W) -> normalised tokens (B, H / 32, W / 32, num_features)."""
        return self.norm(self._run_stages(x)[-1])

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, h, w, num_features) -> logits (B, num_classes), or with ``pre_logits`` the pooled input of the head."""
        x = self.head_drop(features.mean(dim=(1, 2)) if self.global_pool else features)
        return x if pre_logits else self.head(x)

    def forward_pyramid(self, x: Tensor) -> tuple[Tensor, ...]:
        """Image -> one map (B, C, H, W) per stage, before its token merging and not normalised; strides 4, 8, 16, 32.

        The maps are views in the channels-last memory format.
        """
        return tuple(channels_first(level) for level in self._run_stages(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Image -> (output of ``forward_features``, maps of the selected stages), or the maps only.

        Args:
            indices: stages to return, negative ones counted from the end; an integer n for the last n; None for all.
            norm: normalise the map of the last stage; the model has no norm for the others.
            stop_early: skip the stages after the last selected one; the first output is then that stage's tokens.
            output_fmt: "NCHW" for maps (B, C, H, W), views in the channels-last memory format; "NHWC" for (B, H, W, C).
            intermediates_only: return only the list of maps.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"LITv2: {output_fmt=} must be 'NCHW' or 'NHWC'")
        wanted = self._wanted_stages(indices)
        maps = self._run_stages(x, last=max(wanted) if stop_early else None)
        tokens = maps[-1]
        if len(maps) == len(self.layers) and (norm or not intermediates_only):
            tokens = self.norm(tokens)
            if norm:
                maps[-1] = tokens
        maps = [channels_first(level) if output_fmt == "NCHW" else level for i, level in enumerate(maps) if i in wanted]
        return maps if intermediates_only else (tokens, maps)

    def prune_intermediate_layers(self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True) -> list[int]:
        """Removes the layers that the maps of these stages do not need and returns the numbers of the stages."""
        wanted = self._wanted_stages(indices)
        cut = max(wanted) < len(self.layers) - 1
        self.layers = self.layers[: max(wanted) + 1]
        self.stages[-1].downsample = None
        self.num_features = self.head_hidden_size = self.feature_info[max(wanted)]["num_chs"]
        if prune_norm or cut:
            self.norm = nn.Identity()
        if prune_head or cut:
            self.reset_classifier(0, "")
        return wanted

    @property
    def stages(self) -> list[Stage]:
        """The stages in order; ``layers`` is their name in checkpoints."""
        return cast("list[Stage]", list(self.layers))

    def _wanted_stages(self, indices: int | Sequence[int] | None) -> list[int]:
        """Converts timm's ``indices`` to stage numbers counted from 0."""
        n = len(self.layers)
        chosen = range(-n, 0) if indices is None else range(-indices, 0) if isinstance(indices, int) else indices
        if not chosen or not all(-n <= i < n for i in chosen):
            raise ValueError(f"LITv2: {indices=} must be some of the stages 0 to {n - 1}, or a number of last stages, 1 to {n}")
        return [i % n for i in chosen]

    def _run_stages(self, x: Tensor, last: int | None = None) -> list[Tensor]:
        """Image -> tokens (B, H, W, C) after the blocks of each stage, up to stage ``last``; None for all."""
        last = len(self.layers) - 1 if last is None else last
        check_images(x, self.in_chans, self.feature_info[last]["reduction"])
        maps = []
        x = self.patch_embed(x)
        for i, stage in enumerate(self.stages[: last + 1]):
            maps.append(stage(x))
            if i < last and stage.downsample is not None:
                x = stage.downsample(maps[-1])
        return maps

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the head with a new one for ``num_classes`` classes on the same device and in the same dtype; 0 removes it.

        ``global_pool`` sets the pooling before it: "avg", or "" for none; None keeps the current one.
        """
        if global_pool is not None:
            self.global_pool = _known_pool(global_pool)
        self.num_classes = num_classes
        like = self.patch_embed.proj.weight
        self.head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        self.head.to(device=like.device, dtype=like.dtype).train(self.training).apply(_init_weights)

    def group_matcher(self, coarse: bool = False) -> dict:
        """Returns timm's patterns that group parameters from the image to the head, by block, or with ``coarse`` by stage.

        A token merging belongs to the block before it and the final norm to the last block, which timm marks with 99999.
        """
        blocks = [(r"^layers\.(\d+)\.blocks\.(\d+)", None), (r"^layers\.(\d+)\.downsample", (99999,)), (r"^norm", (99999,))]
        return dict(stem=r"^patch_embed", blocks=r"^layers\.(\d+)" if coarse else blocks)

    def no_weight_decay(self) -> set[str]:
        """Returns the names of the parameters without weight decay: biases and norms, that is, all 1-D tensors, and LIT's tables."""
        tables = "relative_position_bias_table"
        return {name for name, parameter in self.named_parameters() if parameter.ndim <= 1 or name.endswith(tables)}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Enables gradient checkpointing: blocks are recomputed in the backward pass, which saves memory."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    def flops(self, H: int = 224, W: int = 224) -> int:
        """Returns the multiply-adds for one H x W image, counted as in the public release; this gives the published GFLOPs exactly.

        The count differs from a plain one: DTM's offset convolution counts with 12 output channels (it has 8), the mean over
        positions as C4 at 1/16 of the patches (it is 1/64), a LayerNorm as one operation per value, and the final LayerNorm,
        GELU, softmax, average pooling and bilinear interpolation not at all.
        """
        patch = self.patch_embed.patch_size
        h, w = patches = -(-H // patch), -(-W // patch)
        total = self.patch_embed.flops(h, w)
        for stage in self.stages:
            total += sum(cast("Block", block).flops(h, w) for block in stage.blocks)
            if stage.downsample is not None:
                total += stage.downsample.flops(h, w)
                h, w = h // 2, w // 2
        return total + self.num_features * patches[0] * patches[1] // 16 + self.num_features * self.num_classes


@torch.fx.wrap  # a single node in a traced graph, where sizes are unknown
def check_images(x: Tensor, in_chans: int, smallest: int) -> None:
    """Raises ValueError if these are no images of so many channels, or a side has fewer pixels than ``smallest``."""
    if x.dim() != 4 or x.shape[1] != in_chans:
        raise ValueError(f"LITv2: expected images of shape (B, {in_chans}, H, W), got {tuple(x.shape)}")
    if min(x.shape[2:]) < smallest:
        raise ValueError(f"LITv2: images of {x.shape[2]} x {x.shape[3]} pixels are too small; each side must be at least {smallest}")


def _known_pool(global_pool: str) -> str:
    if global_pool not in ("avg", ""):
        raise ValueError(f"LITv2: {global_pool=} must be 'avg', or '' for none")
    return global_pool


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, DepthwiseConv):
        nn.init.normal_(module.dwconv.weight, std=(2 / 9) ** 0.5)  # fan-out of a 3 x 3 depthwise kernel
        if module.dwconv.bias is not None:
            nn.init.zeros_(module.dwconv.bias)


def litv2_small(**kwargs) -> LITv2:
    """LITv2-S: 27.8 M parameters, 3.7 GFLOPs, 82.0 % top-1 on ImageNet-1K. Keyword arguments go to :class:`LITv2`."""
    return LITv2(**{**dict(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)), **kwargs})


def litv2_medium(**kwargs) -> LITv2:
    """LITv2-M: 48.8 M parameters, 7.5 GFLOPs, 83.3 % top-1 on ImageNet-1K. Keyword arguments go to :class:`LITv2`."""
    return LITv2(**{**dict(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24)), **kwargs})


def litv2_base(**kwargs) -> LITv2:
    """LITv2-B: 86.5 M parameters, 13.2 GFLOPs, 83.6 % top-1 on ImageNet-1K (84.7 % at 384). Keyword arguments go to :class:`LITv2`."""
    return LITv2(**{**dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)), **kwargs})
