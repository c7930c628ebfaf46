# SPDX-License-Identifier: Apache-2.0
"""Attention of a position: rows of the layers' weights, and the rollout against products of whole matrices."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers import normal, tiny_model
from litv2 import LITv2, fuse
from litv2.errors import UserError
from litv2.explain import attention
from litv2.explain.positions import strongest
from mm_modules.DCN import deform_conv2d


def inputs_of(modules: list[nn.Module], run) -> list[tuple]:
    """The arguments that each module is called with."""
    seen: dict[nn.Module, tuple] = {}
    handles = [module.register_forward_pre_hook(lambda module, args: seen.setdefault(module, args) and None) for module in modules]
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return [seen[module] for module in modules]


def with_offsets(model: LITv2) -> LITv2:
    """Offsets of about a token."""
    for stage in model.stages[:-1]:
        nn.init.normal_(stage.downsample.dconv.conv_offset.bias, std=0.7)
    return model.eval()


@pytest.mark.parametrize("options", [{}, dict(alpha=0.0), dict(alpha=1.0), dict(local_ws=(0, 0, 3, 2), alpha=0.5)], ids=str)
@pytest.mark.parametrize(("images", "H", "W"), [(1, 64, 64), (5, 75, 98)])
def test_weights_reproduce_the_output_of_the_layer(options, images, H, W):
    """Of each head at the cell: they sum to 1, and weights @ v, projected, is what the layer gives."""
    model, x = with_offsets(tiny_model(**options)), normal(0, images, 3, H, W)
    found = attention(model, x, (50.5, 40.0))
    layers = [block.attn for stage in model.stages[2:] for block in stage.blocks]
    for part, hilo, (tokens, h, w) in zip(found.blocks, layers, inputs_of(layers, lambda: model(x)), strict=True):
        row, column = min(int(40.0 / part.stride), h - 1), min(int(50.5 / part.stride), w - 1)
        assert part.cells.tolist() == [[row, column]] * images
        with torch.no_grad():
            expected = hilo(tokens, h, w)[:, row * w + column]
            pieces = []
            if hilo.h_heads:
                (sh, sw), top, left = hilo.window, row // hilo.window[0] * hilo.window[0], column // hilo.window[1] * hilo.window[1]
                image = F.pad(tokens.unflatten(1, (h, w)), (0, 0, 0, sw, 0, sh))
                v = hilo.h_qkv(image[:, top : top + sh, left : left + sw]).flatten(1, 2).chunk(3, dim=-1)[2]
                pieces.append(hilo.h_proj(weighted(part.hifi, v)))
            if hilo.l_heads:
                p = hilo.pool[0]
                image = F.pad(tokens.unflatten(1, (h, w)), (0, 0, 0, -w % p, 0, -h % p))
                pooled = image.unflatten(2, (-1, p)).unflatten(1, (-1, p)).mean((2, 4))
                pieces.append(hilo.l_proj(weighted(part.lofi, hilo.l_kv(pooled).flatten(1, 2).chunk(2, dim=-1)[1])))
        torch.testing.assert_close(torch.cat(pieces, dim=-1), expected, atol=1e-5, rtol=1e-5)
        assert (part.hifi is None, part.lofi is None) == (not hilo.h_heads, not hilo.l_heads)
        for weights in (part.hifi, part.lofi):
            assert weights is None or (weights.sum((2, 3)) - 1).abs().max() < 1e-5


def weighted(weights: Tensor, v: Tensor) -> Tensor:
    """(B, heads, h, w), (B, h * w, heads * d) -> (B, heads * d)."""
    return torch.einsum("bhm,bmhd->bhd", weights.flatten(2), v.unflatten(-1, (weights.shape[1], -1))).flatten(1)


@pytest.mark.parametrize(("options", "H", "W"), [({}, 64, 64), (dict(alpha=0.5, local_ws=(0, 2, 3, 1)), 75, 98)])
def test_rollout_is_the_product_of_the_layers_matrices(options, H, W):
    model, x = with_offsets(tiny_model(**options)), normal(1, 2, 3, H, W)
    found = attention(model, x)
    layers = [block.attn for stage in model.stages for block in stage.blocks if block.attn]
    mergings = [stage.downsample.dconv for stage in model.stages[:-1]]
    seen = dict(zip([*layers, *mergings], inputs_of([*layers, *mergings], lambda: model(x))))
    for image in range(2):
        _, h, w = seen[layers[-1]]
        column, row = (found.at[image] // 32).long().tolist()
        total = torch.eye(h * w)[[row * w + column]]
        for stage in reversed(model.stages):
            for block in reversed(stage.blocks):
                if block.attn:
                    tokens, h, w = seen[block.attn]
                    total = total @ (matrix_of_attention(block.attn, tokens[image : image + 1], h, w) + torch.eye(h * w)) / 2
            if stage is not model.stages[0]:
                conv = model.stages[model.stages.index(stage) - 1].downsample.dconv
                total = total @ matrix_of_merging(conv, seen[conv][0][image : image + 1])
        expected = (total / total.sum()).view(-(-H // 4), -(-W // 4))
        torch.testing.assert_close(found.rollout[image], expected, atol=1e-6, rtol=1e-4)


def matrix_of_attention(hilo: nn.Module, tokens: Tensor, H: int, W: int) -> Tensor:
    """(H * W, H * W): average over heads of the weight of each token for each other, cell by cell."""
    with torch.no_grad():
        weights = hilo(tokens, H, W, need_weights=True)[1]
    matrix = torch.zeros(H * W, H * W)
    s, p = hilo.window[0], hilo.pool[0]
    columns, pooled_columns = -(-W // s), -(-W // p)
    for i in range(H * W):
        for j in range(H * W):
            (y, x), (v, u) = divmod(i, W), divmod(j, W)
            if hilo.h_heads and (y // s, x // s) == (v // s, u // s):
                window = weights.hifi[0, y // s * columns + x // s]
                matrix[i, j] += window[:, y % s * s + x % s, v % s * s + u % s].sum()
            if hilo.l_heads:
                matrix[i, j] += weights.lofi[0, :, i, v // p * pooled_columns + u // p].sum() / p**2
    return matrix / hilo.num_heads


def matrix_of_merging(conv: nn.Module, x: Tensor) -> Tensor:
    """(h * w, H * W): a deformable convolution with weights of one quarter, of images that are one token each."""
    with torch.no_grad():
        offset, (H, W) = conv.predict_offset(x), x.shape[2:]
        tokens = torch.eye(H * W).view(H * W, 1, H, W)
        quarters = torch.full((1, 1, 2, 2), 0.25)
        return deform_conv2d(tokens, offset.expand(H * W, -1, -1, -1).contiguous(), quarters, None, 2).flatten(1).T


def test_strongest_position_adds_most_to_the_predicted_class():
    model, x = with_offsets(tiny_model()), normal(2, 4, 3, 96, 128)
    with torch.no_grad():
        predicted, tokens = model(x).argmax(-1), model.forward_features(x)
        for image, (px, py) in enumerate(strongest(model, x).tolist()):
            each = {(h, w): model.head(tokens[image, h, w])[predicted[image]].item() for h in range(3) for w in range(4)}
            assert ((py - 16) / 32, (px - 16) / 32) == max(each, key=each.get)
        model.reset_classifier(0)
        lengths = model._run_stages(x)[-1].norm(dim=-1)
        assert all(lengths[i, int(py // 32), int(px // 32)] == lengths[i].max() for i, (px, py) in enumerate(strongest(model, x).tolist()))


def test_nothing_is_left_behind():
    """Training flags differ from module to module; statistics and hooks are as before, also after an error."""
    model = tiny_model().train()
    model.stages[1].eval()
    flags, state = [m.training for m in model.modules()], {k: v.clone() for k, v in model.state_dict().items()}
    attention(model, normal(3, 2, 3, 64, 64))
    for at in ((64.0, 3.0), (3.0, -1.0), (float("nan"), 3.0), (1.0, 2.0, 3.0)):
        with pytest.raises(UserError, match="position"):
            attention(model, normal(3, 2, 3, 64, 64), at)
    with pytest.raises(UserError, match="expected images of shape"):
        attention(model, normal(3, 2, 3, 16, 64))
    assert [m.training for m in model.modules()] == flags
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_which_models():
    x = normal(4, 1, 3, 64, 64)
    inside = nn.ModuleDict(dict(backbone=tiny_model(), head=nn.Linear(2, 2)))
    torch.testing.assert_close(attention(inside, x).rollout, attention(tiny_model(), x).rollout)
    others = [
        (nn.Linear(2, 2), "a Linear has none"),
        (nn.ModuleList([tiny_model(), tiny_model()]), "2 of them"),
        (fuse(tiny_model()), "of HiLo alone, and this model has FusedBlocks"),
    ]
    for model, message in others:
        with pytest.raises(UserError, match=message):
            attention(model, x)
