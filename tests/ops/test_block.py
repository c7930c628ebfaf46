# SPDX-License-Identifier: Apache-2.0
"""The operator ``block``: which backend computes it, and that nobody who looks inside or changes a part gets another result."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, export
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import fill, max_difference, normal, tiny_model
from litv2.layers import Block
from litv2.ops import OPERATORS, use
from native_helpers import close, in_float64

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def calls(monkeypatch):
    """The blocks that the native backend has computed."""
    seen, backends = [], OPERATORS["block"].backends
    native = backends["native"]
    watched = dataclasses.replace(native, run=lambda block, x: (seen.append(block), native.run(block, x))[1])
    monkeypatch.setitem(backends, "native", watched)
    return seen


X = (2, 16, 16, 16)  # MIN_TOKENS
SMALL = (2, 16, 15, 16)


def plain_block(window: int = 2, **kwargs) -> Block:
    return fill(Block(16, 2, window, 0.5, **kwargs)).eval()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_fast_path_is_taken(calls, mode):
    block = plain_block(drop=0.1, attn_drop=0.1, drop_path=0.1)
    x = normal(0, *X)
    with mode():
        assert close(block(x), in_float64(block, x)) and calls == [block]
        block.register_forward_hook(lambda *_: None)  # its own
        block(x)
        assert len(calls) == 2
        plain_block(window=0)(x)
        assert len(calls) == 3
        block(normal(0, *SMALL))
        assert len(calls) == 3


@torch.no_grad()
def test_fast_path_sees_new_weights(calls):
    block = plain_block()
    x = normal(0, *X)
    before = block(x)
    block.mlp.fc2.weight.data.mul_(2)
    block.attn.l_kv.weight.data[3] = 0.5
    block.norm1.bias = nn.Parameter(torch.ones(16))
    after = block(x)
    assert len(calls) == 2 and max_difference(before, after) > 0.1 and close(after, in_float64(block, x))


class ScaledLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Subclass(Tensor):
    pass


def a_hook(block: Block) -> None:
    block.attn.l_kv.register_forward_hook(lambda module, inputs, output: 2 * output)


def a_pre_hook(block: Block) -> None:
    block.mlp.dwconv.register_forward_pre_hook(lambda module, inputs: 2 * inputs[0])


def another_layer(block: Block) -> None:
    block.mlp.fc1 = fill(ScaledLinear(16, 64))


def another_forward(block: Block) -> None:
    block.mlp.fc1.forward = lambda x: F.linear(x, 2 * block.mlp.fc1.weight)


def no_norm(block: Block) -> None:
    block.norm2 = nn.Identity()


def norm_without_affine(block: Block) -> None:
    block.norm1 = nn.LayerNorm(16, elementwise_affine=False)


def norm_without_bias(block: Block) -> None:
    block.norm1 = nn.LayerNorm(16, bias=False)


def parametrized(block: Block) -> None:
    nn.utils.parametrizations.weight_norm(block.attn.l_q)


def dropout_alone(block: Block) -> None:
    """Dropout at inference, for uncertainty."""
    block.mlp.drop.train()


def weights_of_a_subclass(block: Block) -> None:
    block.mlp.fc1.weight = nn.Parameter(block.mlp.fc1.weight.detach().as_subclass(Subclass))


@pytest.mark.parametrize(
    "change",
    [
        a_hook,
        a_pre_hook,
        another_layer,
        another_forward,
        no_norm,
        norm_without_affine,
        norm_without_bias,
        parametrized,
        dropout_alone,
        weights_of_a_subclass,
    ],
)
@torch.no_grad()
def test_no_fast_path_for_a_changed_block(calls, change):
    block = plain_block(drop=0.5)
    change(block)
    x = normal(0, *X)
    torch.manual_seed(1)
    ours = block(x)
    assert not calls
    if change is dropout_alone:
        assert not torch.equal(ours, block(x))
    else:
        assert close(ours, block.double()(x.double()))


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def test_no_fast_path_for_who_looks_inside(calls):
    block = plain_block()
    x = normal(0, *X)
    assert block(x).requires_grad
    block.train()
    with torch.no_grad():
        block(x)
        block.eval()
        with torch.autocast("cpu", torch.bfloat16):
            block(x)
        with Seen() as seen:
            block(x)
        assert not any("litv2" in name for name in seen.names) and "aten::convolution" in seen.names
        removed = nn.modules.module.register_module_forward_hook(lambda *_: None)  # of all modules
        block(x)
        removed.remove()
        block(x.as_subclass(Subclass))
        torch.jit.trace(block, x, check_trace=False)
        block.bfloat16()(x.bfloat16())
    assert not calls


@torch.no_grad()
def test_traced_graphs_serve_every_size(calls):
    """No branch on the number of tokens is in an exported program, without gradients either."""
    block = plain_block()
    program = export(block, (normal(0, *X),), dynamic_shapes=({0: Dim("b"), 1: Dim.AUTO, 2: Dim.AUTO},))
    assert "litv2" not in str(program.graph)
    for shape in ((1, 5, 7, 16), (5, 30, 21, 16)):
        x = normal(0, *shape)
        assert close(program.module()(x), in_float64(block, x))
    assert not calls


def test_reasons():
    """Those that are given are the first of those that hold, in the words of the log."""
    block, x = plain_block(), normal(0, *X)
    explain = OPERATORS["block"].explain
    assert explain(block, x)["native"].startswith("gradients are enabled") and explain(block, x)["torch"] is None
    with torch.no_grad():
        assert explain(block, x)["native"] is None
        assert explain(block, normal(0, *SMALL))["native"] == "packing the weights pays off from 512 tokens, got 480"
        assert explain(block.bfloat16(), x.bfloat16())["native"] == "it supports float32 without autocast only"
        block = plain_block()
        a_hook(block)
        assert explain(block, x)["native"] == "a Linear has hooks"
        another_layer(block := plain_block())
        assert explain(block, x)["native"] == "a ScaledLinear is not a module that it supports"
        block.train()
        assert explain(block, x)["native"] == "the block is in training mode"


@torch.no_grad()
def test_forced(calls):
    block, small = plain_block(), normal(0, *SMALL)
    exact = in_float64(block, small)
    with use(block="torch"):
        block(normal(0, *X))
        assert not calls
    with use(block="native"):
        assert close(block(small), exact) and calls  # too few tokens to choose it, but it can
        with torch.enable_grad(), pytest.raises(RuntimeError, match="block: the backend 'native' is forced .*, but gradients are enabled"):
            block(small)


@pytest.mark.extra
@torch.no_grad()
def test_in_a_compiled_graph():
    """One graph holds the native operators, serves another size, and follows the weights, which it packs anew."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph.code)
        return graph.forward

    model, x = tiny_model().eval(), normal(0, 2, 3, 256, 256)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    assert max_difference(compiled(x), model(x)) < 1e-5 and "native_feed_forward" in graphs[0] and "native_hilo" in graphs[0]
    other = normal(1, 2, 3, 288, 262)
    assert max_difference(compiled(other), model(other)) < 1e-5
    before = compiled(x)
    for parameter in model.parameters():
        parameter.mul_(0.9)
    assert max_difference(compiled(x), model(x)) < 1e-5 < max_difference(compiled(x), before)
    with torch.enable_grad():
        compiled(x)
    assert "native_feed_forward" not in graphs[-1]
