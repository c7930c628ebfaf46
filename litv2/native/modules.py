"""A block of LITv2 for inference on the CPU, of two native operators: x + HiLo(norm(x)), then x + MLP(norm(x))."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hilo import HiLo

from ..layers import Block, DeformableTokenMerging, Mlp, PatchEmbed


def packed(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weight (N, K) -> (panels, K, panel), the layout that the products read (csrc/kernels.h), and the bias as long as the panels."""
    panel = torch.ops.litv2.native_panel()
    N, K = weight.shape
    bias = weight.new_zeros(N) if bias is None else bias
    rest = -N % panel
    weight = F.pad(weight, (0, 0, 0, rest)).view((N + rest) // panel, panel, K)
    return weight.transpose(1, 2).contiguous(), F.pad(bias, (0, rest))


class NativeFeedForward(nn.Module):
    """x + mlp(norm(x)): (B, H, W, dim) -> (B, H, W, dim), float32."""

    def __init__(self, mlp: Mlp, norm: nn.LayerNorm):
        super().__init__()
        self.eps = norm.eps
        rest = -mlp.fc1.out_features % torch.ops.litv2.native_panel()  # hidden channels up to a whole panel, all zero
        conv = mlp.dwconv.dwconv
        fc1, fc1_bias = packed(F.pad(mlp.fc1.weight, (0, 0, 0, rest)), F.pad(mlp.fc1.bias, (0, rest)))
        fc2, fc2_bias = packed(F.pad(mlp.fc2.weight, (0, rest)), mlp.fc2.bias)
        depthwise = F.pad(conv.weight.flatten(1).t(), (0, rest)).contiguous()  # (9, hidden)
        tensors = dict(norm_weight=norm.weight, norm_bias=norm.bias, fc1=fc1, fc1_bias=fc1_bias)
        tensors |= dict(depthwise=depthwise, depthwise_bias=F.pad(conv.bias, (0, rest)), fc2=fc2, fc2_bias=fc2_bias)
        _keep(self, **tensors)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.litv2.native_feed_forward(
            *(x, self.norm_weight, self.norm_bias, self.eps, self.fc1, self.fc1_bias),
            *(self.depthwise, self.depthwise_bias, self.fc2, self.fc2_bias),
        )


class NativeHiLo(nn.Module):
    """x + attn(norm(x)): (B, H, W, dim) -> (B, H, W, dim), float32."""

    def __init__(self, attn: HiLo, norm: nn.LayerNorm):
        super().__init__()
        self.eps = norm.eps
        self.geometry = (attn.h_heads, attn.l_heads, attn.window_size)
        parts = []  # of the product of all tokens: (weight, bias) each
        if attn.h_heads:
            parts += list(zip(*(_split(attn.h_qkv, 3, attn.scale))))
        kv = None
        if attn.l_heads:
            parts += list(zip(*_split(attn.l_q, 1, attn.scale)))
            if attn.window_size == 1:
                parts += list(zip(*_split(attn.l_kv, 1)))
            else:
                kv = attn.l_kv
        weights, biases = zip(*parts)
        tensors = dict(norm_weight=norm.weight, norm_bias=norm.bias)
        none = torch.zeros(0), torch.zeros(0)
        tensors["proj"], tensors["proj_bias"] = packed(torch.cat(weights), torch.cat(biases))
        tensors["kv"], tensors["kv_bias"] = packed(kv.weight, kv.bias) if kv is not None else none
        for name, heads in (("h_proj", attn.h_heads), ("l_proj", attn.l_heads)):
            linear = getattr(attn, name) if heads else None
            tensors[name], tensors[f"{name}_bias"] = packed(linear.weight, linear.bias) if heads else none
        _keep(self, **tensors)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.litv2.native_hilo(
            *(x, self.norm_weight, self.norm_bias, self.eps, self.proj, self.proj_bias, self.kv, self.kv_bias),
            *(self.h_proj, self.h_proj_bias, self.l_proj, self.l_proj_bias, *self.geometry),
        )


def _split(linear: nn.Linear, parts: int, scale: float = 1.0) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and biases of a projection's parts, the first (queries) with the factor on the logits."""
    bias = linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias
    weights, biases = list(linear.weight.chunk(parts)), list(bias.chunk(parts))
    weights[0], biases[0] = weights[0] * scale, biases[0] * scale
    return weights, biases


class NativePatchEmbed(nn.Module):
    """Image (B, in_chans, H, W) -> tokens (B, ceil(H / patch), ceil(W / patch), dim), float32."""

    def __init__(self, embed: PatchEmbed):
        super().__init__()
        self.patch_size, self.eps = embed.patch_size, embed.norm.eps
        weight, bias = packed(embed.proj.weight.flatten(1), embed.proj.bias)
        _keep(self, weight=weight, bias=bias, norm_weight=embed.norm.weight, norm_bias=embed.norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        p, (H, W) = self.patch_size, x.shape[2:]
        if H % p or W % p:
            x = F.pad(x, (0, -W % p, 0, -H % p))
        return torch.ops.litv2.native_patch_embed(x, p, self.weight, self.bias, self.norm_weight, self.norm_bias, self.eps)


class NativeTokenMerging(nn.Module):
    """(B, H, W, dim) -> (B, H // 2, W // 2, out_dim), float32."""

    def __init__(self, merging: DeformableTokenMerging):
        super().__init__()
        conv, norm = merging.dconv, merging.norm_layer
        self.out_channels = norm.num_features
        factor = norm.weight * (norm.running_var + norm.eps).rsqrt()
        weight, bias = packed(
            (conv.weight * factor.view(-1, 1, 1, 1)).permute(0, 2, 3, 1).flatten(1), (conv.bias - norm.running_mean) * factor + norm.bias
        )
        offset = conv.conv_offset.weight.permute(0, 2, 3, 1).flatten(2)  # (8, row, column and channel)
        top, offset_bias = packed(offset[:, 0], conv.conv_offset.bias)
        _keep(self, offset_top=top, offset_bottom=packed(offset[:, 1], None)[0], offset_bias=offset_bias, weight=weight, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.litv2.native_token_merging(
            x, self.offset_top, self.offset_bottom, self.offset_bias, self.weight, self.bias, self.out_channels
        )


def _keep(module: nn.Module, **tensors: Tensor) -> None:
    """As buffers that are not saved: the plain model's parameters are."""
    for name, tensor in tensors.items():
        module.register_buffer(name, tensor.detach(), persistent=False)


class NativeBlock(nn.Sequential):
    """A ``Block`` of these two, or of the feed-forward network alone."""

    def __init__(self, block: Block):
        attention = [] if block.attn is None else [NativeHiLo(block.attn, block.norm1)]
        super().__init__(*attention, NativeFeedForward(block.mlp, block.norm2))
