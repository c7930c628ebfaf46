# SPDX-License-Identifier: Apache-2.0
"""Training and inference in bfloat16 where torch emulates it: as exact as torch's own, as small in memory."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from helpers import assert_as_precise, fill, max_difference, normal, tiny_model
from litv2.layers import Block
from litv2.ops import OPERATORS, use
from litv2.ops.block_forward.bfloat16 import LinearInFloat32
from mm_modules import torch_state

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    monkeypatch.setattr(torch_state, "bfloat16_is_emulated", lambda: True)


def autocast(enabled: bool = True) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(7, 24), (2, 3, 5, 24), (0, 24)])
@pytest.mark.parametrize("mixed", [False, True])
def test_products(mixed, shape, with_bias):
    """Float32 products of rounded factors; not further from the truth than torch's bfloat16."""
    case = [normal(0, *shape), 0.3 * normal(1, 40, 24)] + [normal(2, 40)] * with_bias
    case = [(t if mixed else t.bfloat16()).requires_grad_() for t in case]
    gradient = normal(3, *shape[:-1], 40).bfloat16()
    results = []
    for products in (LinearInFloat32, contextlib.nullcontext):
        with autocast(mixed), products():
            y = F.linear(*case)
        results.append((y, *torch.autograd.grad(y, case, gradient)))
    assert "_Linear" in results[0][0].grad_fn.name() and "_Linear" not in results[1][0].grad_fn.name()

    rounded = [t.detach().bfloat16().double().requires_grad_() for t in case]
    y = F.linear(*rounded)
    exact = y, *torch.autograd.grad(y, rounded, gradient.double())
    for ours, theirs, true in zip(*results, exact):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert torch.equal(ours, true.to(ours.dtype)) or max_difference(ours, true) <= max_difference(theirs, true)


def test_activations_are_kept_in_bfloat16():
    block, x = fill(Block(24, 2, 2, 0.5)), normal(0, 2, 6, 4, 24)
    parameters = {p.data_ptr() for p in block.parameters()}

    def kept() -> int:
        tensors = {}
        with saved_tensors_hooks(lambda t: tensors.setdefault(t.data_ptr(), t), lambda t: t), autocast():
            block(x)
        return sum(t.untyped_storage().nbytes() for key, t in tensors.items() if key not in parameters)

    ours = kept()
    with use(block="torch", depthwise_gelu="torch"):
        assert ours <= kept()


@pytest.mark.extra
def test_gradients_of_a_model():
    """Under autocast no more than twice as far from float32's as with torch's operators."""
    model, x, targets = fill(tiny_model()).train(), normal(0, 2, 3, 64, 96), torch.tensor([3, 7])

    def gradients(mixed: bool = True) -> list[Tensor]:
        with autocast(mixed):
            loss = F.cross_entropy(model(x), targets)
        return [loss, *torch.autograd.grad(loss, list(model.parameters()))]

    def error(results: list[Tensor]) -> float:
        return sum((a.double() - b).square().sum() for a, b in zip(results, exact)).sqrt().item()

    exact, ours = gradients(mixed=False), gradients()
    model.set_grad_checkpointing()
    assert all(map(torch.equal, gradients(), ours))
    model.set_grad_checkpointing(False)
    with use(block="torch", depthwise_gelu="torch"):
        assert 0 < error(ours) < 2 * error(gradients())


@torch.no_grad()
def test_inference():
    model, x = fill(tiny_model()).eval(), normal(0, 2, 3, 64, 96)
    exact = model(x)
    model.bfloat16()
    ours = model(x.bfloat16())
    with use(block="torch", depthwise_gelu="torch"):
        theirs = model(x.bfloat16())
    assert ours.dtype == theirs.dtype == torch.bfloat16 and not torch.equal(ours, theirs)
    assert max_difference(ours, exact) < 2 * max_difference(theirs, exact)


def test_other_dtypes_are_left_alone():
    x, weight = normal(0, 3, 24), normal(1, 8, 24)
    with LinearInFloat32():
        assert torch.equal(F.linear(x, weight), x @ weight.t())  # a layer that somebody keeps in float32
        with pytest.raises(RuntimeError, match="dtype"):
            F.linear(x.bfloat16(), weight)
    with autocast(), LinearInFloat32():
        assert F.linear(x.double(), weight.double()).dtype == torch.float64
        with autocast(False):
            assert F.linear(x, weight).dtype == torch.float32


def test_when_it_serves(monkeypatch):
    """In bfloat16, by autocast or not, where the processor has no instructions for it; not for transforms, which get torch's operators."""
    block, x = Block(24, 2, 2, 0.5), normal(0, 2, 6, 4, 24)

    def serves(x: Tensor) -> bool:
        return OPERATORS["block"].choose(block, x).name == "bfloat16-emulation"

    assert serves(x.bfloat16()) and not serves(x) and not serves(x.half())
    with autocast():
        assert serves(x)
    with torch.autocast("cpu", torch.float16):
        assert not serves(x)
    torch.func.grad(lambda x: x.float().sum() if not serves(x) else pytest.fail("served a transform"))(x.bfloat16())
    monkeypatch.setattr(torch_state, "bfloat16_is_emulated", lambda: False)
    assert not serves(x.bfloat16())


def test_second_derivatives():
    x, weight = normal(0, 3, 24).bfloat16(), normal(1, 8, 24).bfloat16().requires_grad_()
    seconds = []
    for products in (LinearInFloat32, contextlib.nullcontext):
        with products():
            loss = F.linear(x, weight).float().square().sum()
            (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
        seconds += torch.autograd.grad(gradient.float().sum(), weight)
    wide = weight.detach().float().requires_grad_()
    (expected,) = torch.autograd.grad(torch.autograd.grad((x.float() @ wide.t()).square().sum(), wide, create_graph=True)[0].sum(), wide)
    assert_as_precise(*seconds, expected)


@pytest.mark.parametrize("mixed", [pytest.param(False, marks=pytest.mark.extra), True])
def test_compiled(mixed):
    block, x = fill(Block(24, 2, 2, 0.5)), normal(0, 2, 6, 4, 24)
    exact = block(x)
    if not mixed:
        block, x = block.bfloat16(), x.bfloat16()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    with autocast(mixed), use(block="torch", depthwise_gelu="torch"):
        plain = block(x)
    with autocast(mixed):
        assert_as_precise(compiled(x), plain, exact)
