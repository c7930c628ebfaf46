# SPDX-License-Identifier: Apache-2.0
"""The layers that HiLo is compared with are what their papers say, at the published size and cost."""

from __future__ import annotations

import json
import sys
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from helpers import ROOT, max_difference

sys.path.append(str(ROOT / "benchmarks"))
import attention  # noqa: E402
import attention_layers as layers  # noqa: E402
from attention_layers import DIM, HEADS, LAYERS, SIZE  # noqa: E402


def unseen(name: str, dim: int, heads: int, H: int, W: int) -> int:
    """Multiply-adds that ``flops`` counts and torch's counter does not see (each layer's docstring says why)."""
    N = H * W
    return {
        "DAT": 5 * N * dim + 4 * N * dim + 4 * heads * N**2,
        "Performer": N * dim // 2,
        "SRA": 5 * N // 4 * dim,
        "QuadTree": 5 * (N + N // 4) * dim - 2 * N * 4 * 8 * dim,
    }.get(name, 0)


@cache
def published(name: str) -> nn.Module:
    return LAYERS[name].build(DIM, HEADS, SIZE).eval()


def tokens(H: int = 14, W: int = 14, dim: int = 32, batch: int = 2) -> Tensor:
    return torch.randn(batch, H * W, dim)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | float = 0.0) -> Tensor:
    """Plainly: (B, N, C) each, one head after the other."""
    out = []
    for head_q, head_k, head_v in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1)):
        weights = (head_q @ head_k.transpose(1, 2) / head_q.shape[-1] ** 0.5 + bias).softmax(-1)
        out.append(weights @ head_v)
    return torch.cat(out, -1)


def self_attention(layer: nn.Module, x: Tensor, heads: int = 4) -> Tensor:
    """What a layer with the projections ``qkv`` and ``proj`` gives if every token attends to every other."""
    return layer.proj(softmax_attention(*layer.qkv(x).chunk(3, -1), heads))


@pytest.mark.parametrize("name", LAYERS)
def test_published_parameters_and_flops(name):
    entry, layer = LAYERS[name], published(name)
    assert sum(parameter.numel() for parameter in layer.parameters()) / 1e6 == pytest.approx(entry.parameters, abs=0.0051)
    assert layer.flops(*SIZE) / 1e6 == pytest.approx(entry.flops, abs=0.0051)
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        layer(tokens(dim=DIM, batch=3), *SIZE)
    assert counter.get_total_flops() == 2 * 3 * (layer.flops(*SIZE) - unseen(name, DIM, HEADS, *SIZE))


@pytest.mark.parametrize("name", LAYERS)
def test_shapes_gradients_and_batches(name):
    layer = LAYERS[name].build(96, 12, SIZE).eval()
    x = tokens(dim=96, batch=3).requires_grad_()
    y = layer(x, *SIZE)
    assert y.shape == x.shape
    (y * torch.randn_like(y)).sum().backward()
    assert x.grad.abs().amax(dim=(1, 2)).min() > 0
    assert not [key for key, parameter in layer.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert max_difference(layer(x[1:2], *SIZE), y[1:2]) < 1e-5  # of images that have nothing to do with one another


@pytest.mark.parametrize("name", ["MSA", "Cross Window", "Performer", "SRA", "Local Window", "XCA", "QuadTree", "VAN", "HorNet", "HiLo"])
@pytest.mark.parametrize("size", [(14, 28), (8, 10)])
def test_other_sizes(name, size):
    """Not square, and not of whole windows: the formula is still what the counter sees, padding included."""
    layer = LAYERS[name].build(96, 12, size).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        assert layer(tokens(*size, dim=96), *size).shape == (2, size[0] * size[1], 96)
    assert counter.get_total_flops() == 2 * 2 * (layer.flops(*size) - unseen(name, 96, 12, *size))


def test_msa_and_hilo():
    x = tokens()
    msa = layers.MSA(32, 4, qkv_bias=True)
    assert max_difference(msa(x, 14, 14), self_attention(msa, x)) < 1e-5
    assert type(published("HiLo")).__module__ == "hilo"


def test_window_of_the_whole_map_is_msa():
    x, window = tokens(7, 7), layers.Window(32, 4)
    nn.init.zeros_(window.attention.relative_position_bias_table)
    assert max_difference(window(x, 7, 7), self_attention(window.attention, x)) < 1e-5


def window_reference(layer: nn.Module, x: Tensor, H: int, W: int, shift: int) -> Tensor:
    """Each token attends to the tokens of its window, which is cut at the edges of the map, with the bias of their distance."""
    y, x_ = (t.flatten() for t in torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij"))
    window = torch.stack(((y - shift).div(7, rounding_mode="floor"), (x_ - shift).div(7, rounding_mode="floor")))
    same = (window[:, :, None] == window[:, None]).all(0)
    dy, dx = (y[:, None] - y).clamp(-6, 6) + 6, (x_[:, None] - x_).clamp(-6, 6) + 6
    bias = layer.relative_position_bias_table[13 * dy + dx].permute(2, 0, 1).masked_fill(~same, float("-inf"))
    q, k, v = (layers.split_heads(t, 4) for t in layer.qkv(x).chunk(3, -1))
    return layer.proj(layers.merge_heads((q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5 + bias).softmax(-1) @ v))


@pytest.mark.parametrize("shift", [0, 3])
def test_windows(shift):
    x, layer = tokens(14, 21), layers.Window(32, 4, (14, 21), shift=shift)
    nn.init.normal_(layer.attention.relative_position_bias_table)
    assert max_difference(layer(x, 14, 21), window_reference(layer.attention, x, 14, 21, shift)) < 1e-5


def test_shift_is_what_differs_between_local_and_shifted_windows():
    x, shifted, local = tokens(), layers.Window(32, 4, (14, 14), shift=3), layers.Window(32, 4)
    local.attention.load_state_dict(shifted.attention.state_dict())
    assert max_difference(shifted(x, 14, 14), local(x, 14, 14)) > 1e-2
    middle = x.reshape(2, 14, 14, 32)[:, 3:10, 3:10]  # a window that no edge cuts
    assert max_difference(shifted(x, 14, 14).reshape(2, 14, 14, 32)[:, 3:10, 3:10].flatten(1, 2), local(middle.flatten(1, 2), 7, 7)) < 1e-5


def test_cross_window():
    """Heads of the first half see 7 columns, those of the second 7 rows; the depthwise convolution ends at the stripe."""
    x, layer = tokens(14, 21), layers.CrossWindow(32, 4)
    q, k, v = layer.qkv(x).reshape(2, 14, 21, 3, 32).unbind(3)
    out = torch.zeros(2, 14, 21, 32)
    for i, stripes in enumerate(([(slice(None), slice(c, c + 7)) for c in (0, 7, 14)], [(slice(r, r + 7), slice(None)) for r in (0, 7)])):
        half = slice(16 * i, 16 * i + 16)
        for rows, columns in stripes:
            parts = [t[:, rows, columns, half] for t in (q, k, v)]
            y = softmax_attention(*(part.flatten(1, 2) for part in parts), 2).reshape(parts[0].shape)
            out[:, rows, columns, half] = y + layer.lepe[i](parts[2].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    assert max_difference(layer(x, 14, 21), layer.proj(out).flatten(1, 2)) < 1e-5


def test_dat():
    """Without offsets, attention with a bias of the relative position; with offsets of a whole cell, keys are those of the neighbours."""
    x, layer = tokens(6, 8, 24), layers.DAT(24, 6, (6, 8))
    nn.init.normal_(layer.bias)
    y, x_ = (t.flatten() for t in torch.meshgrid(torch.arange(6), torch.arange(8), indexing="ij"))
    bias = layer.bias.flatten(0, 1)[:, y[:, None] - y + 5, x_[:, None] - x_ + 7]  # (heads, N, N)

    def expected(keys: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (layers.split_heads(t, 6) for t in (layer.q(x), layer.k(keys), layer.v(keys)))
        return layer.proj(layers.merge_heads((q @ k.transpose(-2, -1) / 2 + bias).softmax(-1) @ v))

    nn.init.zeros_(layer.offset.weight)
    assert max_difference(layer(x, 6, 8), expected(x, bias)) < 1e-4

    # Every offset is (+1, 0): one column to the right, which leaves the map (zero) at its edge.
    nn.init.zeros_(layer.offset_norm.weight)
    nn.init.constant_(layer.offset_norm.bias, 1.0)
    with torch.no_grad():
        layer.offset.weight[0] = 100.0
    right = F.pad(x.reshape(2, 6, 8, 24), (0, 0, 0, 1))[:, :, 1:].flatten(1, 2)
    shifted = F.pad(layer.bias.flatten(0, 1), (1, 0))[:, y[:, None] - y + 5, x_[:, None] - x_ + 7]
    assert max_difference(layer(x, 6, 8), expected(right, shifted)) < 1e-4


def test_performer_approximates_softmax_attention():
    x = tokens(batch=1)

    def error(features: int) -> float:
        """Relative to the error of looking at every token alike."""
        torch.manual_seed(1)
        layer = layers.Performer(32, 4, features)
        layer.proj = nn.Identity()
        exact = self_attention(layer, x)
        alike = layer.qkv(x)[..., 64:].mean(1, keepdim=True)
        return ((layer(x, 14, 14) - exact).norm() / (alike - exact).norm()).item()

    assert error(32768) < 0.1 and error(32768) < error(128) / 4
    rows = layers.Performer.orthogonal(20, 8)
    gram = rows[:8] @ rows[:8].T
    assert rows.shape == (20, 8) and max_difference(gram, gram.diag().diag()) < 1e-4 and gram.diag().std() > 0


def test_linformer_that_mixes_nothing_is_msa():
    x, layer = tokens(), layers.Linformer(32, 4, tokens=196, rank=196)
    nn.init.eye_(layer.k_mix), nn.init.eye_(layer.v_mix)
    assert max_difference(layer(x, 14, 14), self_attention(layer, x)) < 1e-5
    with torch.no_grad():
        layer.v_mix.copy_(torch.eye(196).roll(1, 1))  # values, and they alone, of the next token
    q, k, v = layer.qkv(x).chunk(3, -1)
    assert max_difference(layer(x, 14, 14), layer.proj(softmax_attention(q, k, v.roll(-1, 1), 4))) < 1e-5


@pytest.mark.parametrize("ratio", [1, 2])
def test_sra(ratio):
    x, layer = tokens(), layers.SRA(32, 4, sr_ratio=ratio)
    reduced = x
    if ratio > 1:
        cells = x.reshape(2, 7, 2, 7, 2, 32).permute(0, 1, 3, 5, 2, 4).flatten(3).flatten(1, 2).flatten(2)  # (B, 49, 32 * 4)
        reduced = layer.norm(F.linear(cells, layer.sr.weight.flatten(1), layer.sr.bias))
    assert max_difference(layer(x, 14, 14), layer.proj(softmax_attention(layer.q(x), *layer.kv(reduced).chunk(2, -1), 4))) < 1e-5


def test_focal():
    """Keys of a window: its own 49 cells, the cells up to 3 beyond it on a map without edges, and the 3 x 3 windows around, pooled."""
    H, W = 14, 21
    x, layer = tokens(H, W), layers.Focal(32, 4, (H, W))
    for bias in (layer.bias_own, layer.bias_ring, layer.bias_pooled):
        nn.init.zeros_(bias)
    nn.init.normal_(layer.pool.weight)
    grid = x.reshape(2, H, W, 32)
    out = torch.zeros_like(grid)
    weight = layer.pool.weight.reshape(7, 7, 1)

    def pool(r: int, c: int) -> Tensor:
        return (grid[:, 7 * r : 7 * r + 7, 7 * c : 7 * c + 7] * weight).sum((1, 2)) + layer.pool.bias

    for r in range(2):
        for c in range(3):
            keys, times = [], []
            for dy in range(-3, 10):
                for dx in range(-3, 10):
                    keys.append(grid[:, (7 * r + dy) % H, (7 * c + dx) % W])
                    middle = (0 <= dy < 7) + (0 <= dx < 7)  # beside the window, the cell in the middle of each side is seen twice
                    times.append(2 if middle == 1 and 3 in (dy, dx) and not (0 <= dy < 7 and 0 <= dx < 7) else 1)
            around = [(r + dy, c + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
            keys += [pool(*place) for place in around if 0 <= place[0] < 2 and 0 <= place[1] < 3]
            times += [1] * (len(keys) - len(times))
            window = (slice(None), slice(7 * r, 7 * r + 7), slice(7 * c, 7 * c + 7))
            q = layer.qkv(grid[window].flatten(1, 2))[..., :32]
            _, k, v = layer.qkv(torch.stack(keys, 1)).chunk(3, -1)
            out[window] = softmax_attention(q, k, v, 4, torch.tensor(times).log()).reshape(2, 7, 7, 32)
    assert sum(times[:169]) == 49 + 132
    assert max_difference(layer(x, H, W), layer.proj(out).flatten(1, 2)) < 1e-5


def test_biases_of_focal():
    """Each pair of a window's cells has the bias of its distance; the two outer levels have theirs at the keys of their own."""
    layer = layers.Focal(32, 4, (14, 14))
    y, x = (t.flatten() for t in torch.meshgrid(torch.arange(7), torch.arange(7), indexing="ij"))
    assert torch.equal(layer.places_own, 13 * (y[:, None] - y + 6) + x[:, None] - x + 6)
    assert layer.places_pooled.shape == (49, 9) and len(layer.places_pooled.unique()) == 81
    with torch.no_grad():
        layer.bias_pooled.fill_(1e4)  # pooled tokens alone are seen
    z = tokens()
    pooled = layer.pool(layers.to_windows(z.reshape(2, 14, 14, 32), 7, 7).transpose(1, 2)).squeeze(-1).reshape(2, 4, 32)
    _, k, v = layer.qkv(pooled).chunk(3, -1)
    assert max_difference(layer(z, 14, 14), layer.proj(softmax_attention(layer.qkv(z)[..., :32], k, v, 4))) < 2e-2  # 1e4 rounds the logits


def test_xca():
    x, layer = tokens(), layers.XCA(32, 4, qkv_bias=True)
    nn.init.uniform_(layer.temperature, 0.5, 2)
    q, k, v = layer.qkv(x).reshape(2, 196, 3, 4, 8).unbind(2)
    q, k = (t / t.norm(dim=1, keepdim=True) for t in (q, k))
    weights = (torch.einsum("bnhi,bnhj->bhij", q, k) * layer.temperature).softmax(-1)
    assert max_difference(layer(x, 14, 14), layer.proj(torch.einsum("bhij,bnhj->bnhi", weights, v).flatten(2))) < 1e-5


@pytest.mark.parametrize("topk", [3, 48])
def test_quadtree(topk):
    """Token by token and head by head; if all cells are among the best, the fine level is plain attention."""
    H, W = 8, 24
    x, layer = tokens(H, W, 16), layers.QuadTree(16, 2, topk)
    q, k, v = layer.qkv(x).chunk(3, -1)

    def pool(t: Tensor) -> Tensor:
        return t.reshape(2, H // 2, 2, W // 2, 2, 16).mean((2, 4)).flatten(1, 2)

    v_map = v.transpose(1, 2).reshape(2, 16, H, W)
    v_coarse = layer.coarse_value(v_map)
    coarse = softmax_attention(pool(q), pool(k), v_coarse.flatten(2).transpose(1, 2), 2) + layer.lepe[0](v_coarse).flatten(2).transpose(
        1, 2
    )
    cell = torch.arange(H * W).reshape(H, W)
    cell = (cell // W // 2 * (W // 2) + cell % W // 2).flatten()  # of each token
    fine = torch.zeros_like(x)
    for b in range(2):
        for head in (slice(0, 8), slice(8, 16)):
            scores = pool(q)[b, :, head] @ pool(k)[b, :, head].T
            for n in range(H * W):
                best = scores[cell[n]].topk(topk).indices
                seen = torch.isin(cell, best)
                assert seen.sum() == 4 * topk
                fine[b, n, head] = ((k[b, seen, head] @ q[b, n, head]) / 8**0.5).softmax(0) @ v[b, seen, head]
    if topk == 48:
        assert max_difference(fine, softmax_attention(q, k, v, 2)) < 1e-5
    fine = fine + layer.lepe[1](v_map).flatten(2).transpose(1, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.0, 1.0]))
    w = torch.tensor([1.0, torch.e]) / (1 + torch.e)
    assert max_difference(layer(x, H, W), layer.proj(w[0] * coarse[:, cell] + w[1] * fine)) < 1e-5


def test_van():
    """The gate of a token comes from the cells up to 2 + 9 away, and only from every third beyond 2."""
    x, layer = tokens(27, 27, 8, 1).requires_grad_(), layers.VAN(8)
    hidden = F.gelu(layer.proj_in(x)).transpose(1, 2).reshape(1, 8, 27, 27)
    gate = F.linear(layer.far(layer.near(hidden)).flatten(2).transpose(1, 2), layer.pointwise.weight, layer.pointwise.bias)
    y = layer(x, 27, 27)
    assert max_difference(y, x + layer.proj_out(hidden.flatten(2).transpose(1, 2) * gate)) < 1e-5
    (gradient,) = torch.autograd.grad(y[0, 13 * 27 + 13].sum(), x)
    reached = gradient.abs().sum(-1).reshape(27, 27).nonzero()
    assert reached.amin(0).tolist() == [2, 2] and reached.amax(0).tolist() == [24, 24]


def test_hornet():
    x, layer = tokens(dim=32), layers.HorNet(32)
    assert layer.widths == [4, 8, 16, 32]
    y = layer.proj_in(x)
    gates = layer.gates(y[..., 4:].transpose(1, 2).reshape(2, 60, 14, 14)).flatten(2).transpose(1, 2) / 3
    y = y[..., :4] * gates[..., :4]
    for i, (start, end) in enumerate(((4, 12), (12, 28), (28, 60))):
        y = layer.widen[i](y) * gates[..., start:end]
    assert max_difference(layer(x, 14, 14), layer.proj_out(y)) < 1e-5


def test_figures_of_other_layers_are_not_printed():
    cost = dict(parameters_M=2.36, MFLOPs=521.43)
    attention.check({"MSA": cost, "SRA": dict(parameters_M=4.74, MFLOPs=417.0)})  # within 1 %
    with pytest.raises(ValueError, match=r"SRA: parameters_M 2.36, published 4.72; SRA: MFLOPs 521.43, published 419.56$"):
        attention.check({"MSA": cost, "SRA": cost})


@pytest.mark.parametrize(
    "over, flags, columns",
    [
        ("resolution", "--sides 14 21 --layers HiLo MSA Focal --limit 0.05", "layer side tokens GFLOPs"),
        ("window", "--sides 6 --windows 1 2 4", "window alpha HiFi_heads LoFi_heads parameters_M MFLOPs"),
        ("alpha", "--sides 6 --alphas 0 0.5 --training", "window alpha HiFi_heads LoFi_heads parameters_M MFLOPs"),
        ("case", "--sides 16", "layer parameters_M MFLOPs"),
    ],
)
def test_experiments(over, flags, columns, tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", f"attention.py --over {over} --batch-size 1 --dim 96 --heads 12 --rounds 2 --modes eager {flags}".split()
    )
    monkeypatch.chdir(tmp_path)
    with torch._inductor.config.patch(freezing=False), torch._dynamo.config.patch(recompile_limit=8):  # which the command sets
        attention.main()
    assert (tmp_path / f"output/benchmarks/attention_{over}.png").stat().st_size > 10_000
    rows = json.loads((tmp_path / f"output/benchmarks/attention_{over}.json").read_text())["rows"]
    assert list(rows[0])[: len(columns.split())] == columns.split()
    if over == "resolution":
        assert [(row["layer"], row["side"]) for row in rows] == [(name, side) for side in (14, 21) for name in ("HiLo", "MSA", "Focal")]
        assert [row["GFLOPs"] for row in rows if row["layer"] == "MSA"] == [0.015, 0.054]
        assert [row["eager_ms"] is None for row in rows] == [False] * 4 + [True, False]  # 0.054 is beyond the limit
    if over == "window":
        assert [row["LoFi_heads"] for row in rows] == [12, 10, 10]
    if over == "alpha":
        assert [row["published_top1"] for row in rows] == [81.16, 81.88]
    if over == "case":
        parts = {row["layer"]: {part: row[f"{part}_ms"] for part in attention.PARTS} for row in rows}
        assert all(parts["HiLo, alpha 0.5"][part] > 0 for part in attention.PARTS)
        assert parts["Hi-Fi alone"]["global_attention"] == 0 == parts["Lo-Fi alone"]["window_attention"]
        assert parts["window attention"]["window_attention"] > 0 == parts["window attention"]["global_attention"]
