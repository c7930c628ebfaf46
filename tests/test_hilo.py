# SPDX-License-Identifier: Apache-2.0
"""HiLo against the golden numbers, a slow reference, and what its docstring promises. test_hilo_options.py has the options."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export

from helpers import ROOT, fill, golden, golden_arrays, max_difference
from hilo import HiLo, HiLo2d
from hilo_reference import slow_hilo


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
    assert max_difference(layer(x, H, W), slow_hilo(layer, x, H, W).out) < 1e-12


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
            ours, plain = layer(x, 7, 9), slow_hilo(layer, x, 7, 9).out
        ours.float().sum().backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())
    else:
        layer = layer.to(dtype)
        ours, plain = layer(x.to(dtype), 7, 9), slow_hilo(layer, x.to(dtype), 7, 9).out
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
    "kwargs, words",
    [
        (dict(dim=30, num_heads=4), "dim=30 .* multiple of num_heads=4"),
        (dict(dim=32, num_heads=0), "num_heads=0"),
        (dict(dim=32, num_heads="8"), "num_heads='8'"),
        (dict(dim=32, num_heads=4.0), "num_heads=4.0"),
        (dict(dim=32, num_heads=10**400), "num_heads=10000"),
        (dict(dim=32, alpha=1.2), "alpha=1.2 .* in .0, 1."),
        (dict(dim=32, alpha=-0.1), "alpha=-0.1"),
        (dict(dim=32, alpha=float("nan")), "alpha=nan"),
        (dict(dim=32, alpha=True), "alpha=True"),
        (dict(dim=32, alpha="0.5"), "alpha='0.5'"),
        (dict(dim=32, attn_drop=2), "attn_drop=2"),
        (dict(dim=32, proj_drop=-1), "proj_drop=-1"),
        (dict(dim=32, qk_scale=0), "qk_scale=0 must be None or a positive number"),
        (dict(dim=32, qk_scale=True), "qk_scale=True"),
        (dict(dim=32, qkv_bias=2), "qkv_bias=2 must be True or False; write window_size=2"),
        (dict(dim=32, window_size=0), "window_size=0"),
        (dict(dim=32, window_size=1.5), "window_size=1.5"),
        (dict(dim=32, window_size=True), "window_size=True"),
        (dict(dim=32, window_size=None), "window_size=None"),
        (dict(dim=32, window_size=float("inf")), "window_size=inf"),
        (dict(dim=32, window_size="22"), "window_size='22'"),
        (dict(dim=32, window_size=(2, 0)), r"window_size=\(2, 0\)"),
        (dict(dim=32, window_size=[2, 3, 4]), r"window_size=\[2, 3, 4\] .* two for rows and columns"),
        (dict(dim=32, pool_size=-1), "pool_size=-1"),
    ],
)
def test_bad_arguments(kwargs, words):
    with pytest.raises(ValueError, match=f"^HiLo: .*{words}"):
        HiLo(**kwargs)


def test_window_and_alpha_in_the_places_of_other_arguments():
    with pytest.raises(ValueError, match="qkv_bias=2 .* window_size=2"):
        HiLo(32, 8, 2, 0.9)


MAP, TOKENS, MASK = (2, 4, 6, 32), (2, 24, 32), torch.ones(2, 4, 6, dtype=torch.bool)


@pytest.mark.parametrize(
    "shape, kwargs, words",
    [
        ((2, 15, 32), dict(H=4, W=4), "x has 15 tokens, expected H . W with H=4 and W=4"),
        ((2, 15, 32), dict(), "x has 15 tokens, expected H . W with H=None and W=None or a map"),
        ((2, 24, 31), dict(H=4, W=6), r"x has shape \(2, 24, 31\), expected .* dim=32"),
        ((24, 32), dict(H=4, W=6), r"x has shape \(24, 32\)"),
        (MAP, dict(H=6, W=4), "x is a map of 4 x 6 cells, expected 6 x 4"),
        (MAP, dict(pos=(1, 5, 6, 32)), "pos is a map of 5 x 6 cells, expected 4 x 6"),
        (MAP, dict(pos=(1, 30, 32)), "pos has 30 tokens, expected H . W with H=4 and W=6"),
        (TOKENS, dict(H=4, W=6, pos=(24, 2, 32)), "pos has a batch of 24, expected 1 or 2"),
        (MAP, dict(context=(3, 4, 6, 32)), "context has a batch of 3, expected 2"),
        (MAP, dict(context=(2, 24, 32)), "context has 24 tokens, .* or a map .B, H, W, dim.$"),
        (MAP, dict(context=(2, 8, 6, 32)), r"context is \(2, 8, 6, 32\), expected the H and W of x \(2, 4, 6, 32\),.* .alpha=1.$"),
        (MAP, dict(context=(2, 4, 6, 16)), "context has shape .* dim=32"),
        (MAP, dict(context=MAP, context_pos=(2, 4, 5, 32)), "context_pos is a map of 4 x 5 cells, expected 4 x 6"),
        (MAP, dict(context_pos=MAP), "context_pos .* there is none"),
        (MAP, dict(mask=MASK[:, :3]), r"mask is \(2, 3, 6\) of torch.bool, expected \(2, 4, 6\) of torch.bool"),
        (MAP, dict(mask=MASK[0]), r"mask is \(4, 6\)"),
        (MAP, dict(mask=MASK.repeat(2, 1, 1)), r"mask is \(4, 4, 6\)"),
        (MAP, dict(mask=MASK.float()), "mask is .* of torch.float32, expected .* of torch.bool"),
        (MAP, dict(extra_tokens=1), r"x has shape .*, expected \(B, 1 \+ H . W, dim\) with dim=32"),
        (TOKENS, dict(H=4, W=6, extra_tokens=1), "x has 24 tokens, expected 1 . H . W with H=4 and W=6$"),
        (TOKENS, dict(H=5, W=5, extra_tokens=-1), "extra_tokens=-1 must be an integer of at least 0"),
        (TOKENS, dict(H=4, W=6, extra_tokens=0.0), "extra_tokens=0.0"),
    ],
)
def test_bad_input(shape, kwargs, words):
    kwargs = {name: torch.randn(value) if isinstance(value, tuple) else value for name, value in kwargs.items()}
    with pytest.raises(ValueError, match=f"^HiLo: {words}"):
        HiLo(32)(torch.randn(shape), **kwargs)


@pytest.mark.parametrize("name", ["x", "context", "pos", "context_pos"])
@pytest.mark.parametrize("shape", [(2, 4, 6, 32), (2, 24, 32)])
def test_maps_of_other_layouts(name, shape):
    maps = dict(x=torch.randn(2, 32, 4, 6), context=torch.randn(2, 32, 4, 6)) | {name: torch.randn(shape)}
    with pytest.raises(ValueError, match=f"^HiLo2d: {name} must have shape .B, 32, H, W., got .*; HiLo takes .B, H, W, dim."):
        HiLo2d(32)(**maps)


def test_the_file_stands_alone(tmp_path):
    """Copied elsewhere it imports and runs, with torch as its only dependency, and has at most 300 lines."""
    source = (ROOT / "hilo.py").read_text()
    assert len(source.splitlines()) <= 300
    (tmp_path / "hilo.py").write_text(source)
    code = "import sys, torch; old = set(sys.modules); from hilo import HiLo; new = {m.split('.')[0] for m in set(sys.modules) - old}; "
    code += "assert new <= {'hilo', 'torch'}, new; print(HiLo(32)(torch.randn(1, 6, 32), 2, 3).shape)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "torch.Size([1, 6, 32])", done.stderr
