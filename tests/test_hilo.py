"""HiLo against the golden numbers, a slow version written from the paper, and what its docstring promises."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export

from helpers import ROOT, fill, golden, golden_arrays, max_difference
from hilo import HiLo


def slow_hilo(layer: HiLo, x: Tensor, H: int, W: int) -> Tensor:
    """One window and one head at a time, softmax written out: section 3 of the paper, zero padding as in SPEC."""
    s, d = layer.window_size, layer.head_dim
    Hp, Wp = -(-H // s) * s, -(-W // s) * s
    B, _, C = x.shape
    grid = x.new_zeros(B, Hp, Wp, C)
    grid[:, :H, :W] = x.view(B, H, W, C)
    out = []
    if layer.h_heads:
        q, k, v = layer.h_qkv(grid).view(B, Hp, Wp, 3, layer.h_heads, d).unbind(3)
        y = torch.zeros_like(q)
        for top in range(0, Hp, s):
            for left in range(0, Wp, s):
                window = (slice(None), slice(top, top + s), slice(left, left + s))
                for head in range(layer.h_heads):
                    a, b, c = (t[window][..., head, :].reshape(B, s * s, d) for t in (q, k, v))
                    y[window][..., head, :] = ((a @ b.mT * layer.scale).softmax(-1) @ c).view(B, s, s, d)
        out.append(layer.h_proj(y.flatten(3)))
    if layer.l_heads:
        pooled = grid.view(B, Hp // s, s, Wp // s, s, C).mean(dim=(2, 4)).flatten(1, 2)
        q = layer.l_q(grid).view(B, Hp * Wp, layer.l_heads, d)
        k, v = layer.l_kv(pooled).view(B, -1, 2, layer.l_heads, d).unbind(2)
        heads = [(q[:, :, h] @ k[:, :, h].mT * layer.scale).softmax(-1) @ v[:, :, h] for h in range(layer.l_heads)]
        out.append(layer.l_proj(torch.cat(heads, -1)).view(B, Hp, Wp, -1))
    return torch.cat(out, -1)[:, :H, :W].reshape(B, H * W, C)


@pytest.mark.parametrize("i", range(len(golden()["hilo"])))
def test_golden(i):
    case, arrays = golden()["hilo"][i], golden_arrays()
    H, W = case["H"], case["W"]
    layer = fill(HiLo(case["dim"], case["num_heads"], case["qkv_bias"], window_size=case["window_size"], alpha=case["alpha"]))
    assert {name: list(p.shape) for name, p in layer.named_parameters()} == case["params"]
    assert layer.flops(H, W) == case["flops"] and type(layer.flops(H, W)) is int
    x = arrays[f"hilo{i}_x"].clone().requires_grad_()
    y = layer(x, H, W)
    assert max_difference(y, arrays[f"hilo{i}_y"]) <= 1e-5
    y.backward(arrays[f"hilo{i}_gy"])
    assert max_difference(x.grad, arrays[f"hilo{i}_gx"]) <= 1e-5
    for name, parameter in layer.named_parameters():
        assert parameter.grad.norm().item() == pytest.approx(case["grad_norm"][name], rel=1e-4, abs=1e-4), name


@pytest.mark.parametrize("H, W", [(6, 6), (7, 5), (1, 9), (3, 10)])
@pytest.mark.parametrize("window, alpha", [(1, 0.3), (2, 0.0), (2, 0.5), (2, 1.0), (3, 0.25), (4, 0.75)])
def test_slow_reference(H, W, window, alpha):
    layer = HiLo(24, 4, qkv_bias=True, qk_scale=0.7, window_size=window, alpha=alpha).double()
    x = torch.randn(2, H * W, 24, dtype=torch.float64)
    assert max_difference(layer(x, H, W), slow_hilo(layer, x, H, W)) < 1e-12


@pytest.mark.parametrize("batch", [0, 1])
def test_batch_sizes(batch):
    assert HiLo(24, 4)(torch.randn(batch, 35, 24), 7, 5).shape == (batch, 35, 24)


def test_readme_numbers():
    layer = HiLo(dim=384, num_heads=12, window_size=2, alpha=0.5)
    assert layer(torch.randn(64, 196, 384), 14, 14).shape == (64, 196, 384)
    assert layer.flops(14, 14) == 83467776


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_low_precision(dtype, autocast):
    """The error against float32 is at most twice that of the slow version in the same precision."""
    layer = fill(HiLo(48, 6, qkv_bias=True))
    x = torch.randn(2, 63, 48)
    exact = layer(x, 7, 9)
    if autocast:
        with torch.autocast("cpu", dtype):
            ours, plain = layer(x, 7, 9), slow_hilo(layer, x, 7, 9)
        ours.float().sum().backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())
    else:
        layer = layer.to(dtype)
        ours, plain = layer(x.to(dtype), 7, 9), slow_hilo(layer, x.to(dtype), 7, 9)
    assert ours.dtype == dtype
    assert max_difference(ours, exact) <= 2 * max_difference(plain, exact)


def test_dropout_works_and_stops_in_eval():
    x = torch.randn(2, 16, 24)
    for name in ("attn_drop", "proj_drop"):
        layer = HiLo(24, 4, **{name: 0.5})
        assert not torch.equal(layer(x, 4, 4), layer(x, 4, 4)), name
        layer.eval()
        assert torch.equal(layer(x, 4, 4), layer(x, 4, 4)), name
    layer = HiLo(24, 4, proj_drop=0.5)
    dropped = (layer(torch.randn(8, 64, 24), 8, 8) == 0).float().mean().item()
    assert 0.45 < dropped < 0.55


class OnMap(nn.Module):
    """HiLo on a map (B, H, W, C), whose sizes an exporter can leave open."""

    def __init__(self, layer: HiLo):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1, 2), x.shape[1], x.shape[2])


@pytest.mark.parametrize("window, alpha", [(1, 0.5), (2, 0.0), (2, 0.5), (2, 1.0), (4, 0.5)])
def test_export_with_dynamic_sizes(window, alpha):
    layer = HiLo(24, 4, window_size=window, alpha=alpha).eval()
    sizes = {0: Dim("b"), 1: Dim("h", min=6, max=512), 2: Dim("w", min=6, max=512)}
    on_map = export(OnMap(layer), (torch.randn(2, 7, 9, 24),), dynamic_shapes=(sizes,)).module()
    dynamic = Dim.DYNAMIC
    bare = export(layer, (torch.randn(2, 63, 24), 7, 9), dynamic_shapes=({0: dynamic, 1: dynamic}, dynamic, dynamic)).module()
    for B, H, W in ((3, 8, 8), (1, 7, 12), (5, 13, 6)):
        x = torch.randn(B, H, W, 24)
        expected = layer(x.flatten(1, 2), H, W)
        assert max_difference(on_map(x), expected) < 1e-6
        assert max_difference(bare(x.flatten(1, 2), H, W), expected) < 1e-6


def test_compile_without_graph_break():
    layer = HiLo(24, 4)
    compiled = torch.compile(layer, fullgraph=True, backend="eager", dynamic=True)
    for B, H, W in ((2, 7, 9), (3, 8, 8), (2, 6, 11)):
        x, y = (torch.randn(B, H * W, 24, requires_grad=True) for _ in range(2))
        y.data.copy_(x.data)
        a, b = layer(x, H, W), compiled(y, H, W)
        assert max_difference(a, b) < 1e-6
        a.sum().backward(), b.sum().backward()
        assert max_difference(x.grad, y.grad) < 1e-5


@pytest.mark.parametrize(
    "kwargs, word",
    [
        (dict(dim=30, num_heads=4), "dim=30"),
        (dict(dim=32, num_heads=0), "num_heads=0"),
        (dict(dim=32, alpha=1.2), "alpha=1.2"),
        (dict(dim=32, alpha=-0.1), "alpha=-0.1"),
        (dict(dim=32, alpha=float("nan")), "alpha=nan"),
        (dict(dim=32, window_size=0), "window_size=0"),
        (dict(dim=32, window_size=1.5), "window_size=1.5"),
    ],
)
def test_bad_arguments(kwargs, word):
    with pytest.raises(ValueError, match=word):
        HiLo(**kwargs)


@pytest.mark.parametrize("shape, words", [((2, 4, 4, 32), "shape"), ((2, 15, 32), "15 tokens.* 4 . 4 = 16"), ((2, 16, 31), "31.*dim=32")])
def test_bad_input(shape, words):
    with pytest.raises(ValueError, match=words):
        HiLo(32)(torch.randn(shape), 4, 4)


def test_the_file_stands_alone(tmp_path):
    """Copied elsewhere it imports and runs, with torch as its only dependency, and stays under 200 lines."""
    source = (ROOT / "hilo.py").read_text()
    assert len(source.splitlines()) < 200
    (tmp_path / "hilo.py").write_text(source)
    code = "import sys, torch; old = set(sys.modules); from hilo import HiLo; new = {m.split('.')[0] for m in set(sys.modules) - old}; "
    code += "assert new <= {'hilo', 'torch'}, new; print(HiLo(32)(torch.randn(1, 6, 32), 2, 3).shape)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "torch.Size([1, 6, 32])", done.stderr
