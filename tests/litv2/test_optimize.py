# SPDX-License-Identifier: Apache-2.0
"""Every form gives the model's numbers, what does not is refused, and the choice is told."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from helpers import TINY, fill, max_difference, normal, tiny_model
from litv2 import LITv2, optimize
from litv2.inference import fastest
from litv2.inference.fastest import FORMS, Optimized, make_form
from litv2.ops import native

optimizer = fastest
needs_native = pytest.mark.skipif(native.problem is not None, reason=f"the native operators: {native.problem}")
QUICK = ("native", "fused")


@pytest.fixture(autouse=True)
def one_round(monkeypatch):
    """Nothing here depends on what is faster."""
    monkeypatch.setattr(optimizer, "ROUNDS", 1)


class Pyramid(LITv2):
    """A backbone: a tuple of maps."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.forward_pyramid(x)


class ListPyramid(LITv2):
    def forward(self, x: Tensor) -> list[Tensor]:
        return list(self.forward_pyramid(x)[1:3])


def exact(model: LITv2, x: Tensor) -> list[Tensor]:
    """The plain model's results, in float64."""
    with torch.no_grad():
        return tensors(copy.deepcopy(model).eval().double()(x.double()))


def tensors(result) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def error(results: list[Tensor], expected: list[Tensor]) -> float:
    assert len(results) == len(expected)
    return max(max_difference(a, b) / b.abs().max().item() for a, b in zip(results, expected))


@needs_native
@pytest.mark.parametrize("form", QUICK)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("build", [LITv2, Pyramid, ListPyramid])
def test_same_numbers(build, dtype, form):
    model = fill(build(**TINY, drop_rate=0.3, attn_drop_rate=0.2, drop_path_rate=0.4)).train()
    before = copy.deepcopy(model.state_dict())
    x = normal(0, 2, 3, 64, 64)
    lines = []
    fast = optimize(model, x, dtype, [form], lines.append)
    assert (fast.form, fast.dtype, fast.compute_dtype) == (form, dtype, torch.float32 if form == "native" else dtype)
    assert fast.seconds.keys() == fast.errors.keys() == {"plain", form} and all(s > 0 for s in fast.seconds.values())
    plain = copy.deepcopy(model).eval().to(dtype)
    for shape in ((2, 3, 64, 64), (1, 3, 65, 111), (3, 3, 33, 40)):
        x = normal(1, *shape).to(dtype)
        results, expected = fast(x), exact(model, x)
        assert type(results) is {LITv2: Tensor, Pyramid: tuple, ListPyramid: list}[build] and all(
            r.dtype == dtype and not r.requires_grad for r in tensors(results)
        )
        with torch.no_grad():
            allowed = 1e-4 if dtype == torch.float32 else 3 * error(tensors(plain(x)), expected)
        assert error(tensors(results), expected) <= allowed
    # The model is as it was, and on its own.
    assert model.training and all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    after = fast(x)
    with torch.no_grad():
        model.load_state_dict(before)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        for parameter in model.parameters():
            parameter.zero_()
    assert all(torch.equal(a, b) for a, b in zip(tensors(after), tensors(fast(x))))


@needs_native
def test_report():
    lines = []
    fast = optimize(tiny_model(), normal(0, 1, 3, 64, 64), forms=QUICK, report=lines.append)
    assert [line.split(":")[0] for line in lines] == ["plain", *QUICK]
    chosen = [line for line in lines if line.endswith("<- chosen")]
    assert len(chosen) == 1 and chosen[0].startswith(f"{fast.form}:") and fast.form in QUICK
    assert fast.seconds[fast.form] == min(fast.seconds[form] for form in QUICK)
    assert fast.seconds.keys() == fast.errors.keys() == {"plain", *QUICK}
    for line, form in zip(lines, fast.seconds):
        assert f"{1e3 * fast.seconds[form]:.1f} ms" in line and FORMS.get(form, "as it is") in line
    assert f"form={fast.form}" in repr(fast)


@needs_native
def test_silent_in_lower_precision(capsys):
    lines = []
    model = tiny_model().bfloat16()
    fast = optimize(model, normal(0, 1, 3, 64, 64), forms=QUICK, report=lines.append)  # the model's dtype
    assert fast.dtype == torch.bfloat16 and next(model.parameters()).dtype == torch.bfloat16
    assert ["in float32" in line for line in lines] == [False, True, False]
    optimize(model, normal(0, 1, 3, 64, 64), forms=["fused"], report=None)
    assert capsys.readouterr().out == ""


@needs_native
def test_bfloat16_products():
    """As good as bfloat16 can be; where the processor has no such products the form is left out, which is said."""
    model, x, lines = fill(tiny_model()).eval(), normal(0, 2, 3, 64, 80).bfloat16(), []
    with torch.no_grad():
        errors = [
            error([run(x)], exact(model, x))
            for run in (make_form(model, "native-bfloat16", torch.bfloat16), copy.deepcopy(model).bfloat16())
        ]
    assert 1e-4 < errors[0] < 2 * errors[1]
    fast = optimize(model, x, torch.bfloat16, ["native-bfloat16", "native"], lines.append)
    if not torch.ops.litv2.native_bfloat16_kernels():
        assert fast.form == "native" and lines[0].startswith("native-bfloat16: left out, it needs bfloat16 images")
    assert optimize(model, x.float(), forms=["native-bfloat16", "native"], report=None).form == "native"


@needs_native
@pytest.mark.parametrize("dtype", [torch.int8, "int8"])
def test_int8_products(dtype):
    """Rounded to bytes, on images and results of the model's dtype; where the processor has no such products that is an error."""
    model, x, lines = fill(tiny_model()).eval(), normal(0, 2, 3, 64, 80), []
    if not torch.ops.litv2.native_int8_kernels():
        with pytest.raises(ValueError, match=".*instructions for int8 products"):
            optimize(model, x, dtype)
        return
    fast = optimize(model, x, dtype, report=lines.append)
    assert fast.form == "native-int8" and fast.seconds.keys() == {"plain", "native-int8"} and len(lines) == 2
    assert fast(x).dtype == torch.float32 and 1e-4 < fast.errors["native-int8"] < 0.1
    assert fast.errors["native-int8"] == pytest.approx(error([fast(x)], exact(model, x)), rel=1e-3)
    with pytest.raises(RuntimeError, match="the native-int8 form is not accurate enough"):
        optimize(model, x, torch.float32, ["native-int8"])


def test_without_the_native_operators(monkeypatch):
    monkeypatch.setattr(native, "problem", "not built")
    x, lines = normal(0, 1, 3, 64, 64), []
    fast = optimize(tiny_model(), x, forms=QUICK, report=lines.append)
    assert fast.form == "fused" and lines[0] == "native: left out, not built" and len(lines) == 3
    with pytest.raises(ValueError, match="none of these forms is available: .*not built"):
        optimize(tiny_model(), x, forms=["native"])


@pytest.mark.parametrize(
    "model, forms, kind, words",
    [
        (nn.Linear(3, 3), None, TypeError, "expected a LITv2, got Linear"),
        (nn.Sequential(nn.Identity()), ["fused"], TypeError, "for a detector or segmenter, optimize its backbone"),
        (None, ["fused", "quick"], ValueError, r"unknown forms \['quick'\]; choose from native, native-bfloat16, native-int8, "),
        (None, "fused", ValueError, "unknown forms"),
        (None, [], ValueError, "forms is empty"),
    ],
)
def test_bad_arguments(model, forms, kind, words):
    with pytest.raises(kind, match=words):
        optimize(model or tiny_model(), normal(0, 1, 3, 64, 64), forms=forms)


class Wrong(nn.Module):
    """A form whose results' number ``which`` is off: by a factor, or not a number."""

    def __init__(self, model: nn.Module, which: int, factor: float):
        super().__init__()
        self.model, self.which, self.factor = model, which, factor

    def forward(self, x: Tensor):
        results = tensors(self.model(x))
        results[self.which] = results[self.which] * self.factor
        return results[0] if len(results) == 1 else tuple(results)


@pytest.mark.parametrize("factor", [1.001, 0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("build, which", [(LITv2, 0), (Pyramid, 0), (Pyramid, 3)])
@pytest.mark.parametrize("form", [pytest.param("native", marks=needs_native), "fused"])
def test_a_wrong_form_is_refused(monkeypatch, form, build, which, factor):
    maker = {"native": "in_one_call", "fused": "fuse"}[form]
    right = getattr(optimizer, maker)
    monkeypatch.setattr(optimizer, maker, lambda *arguments: Wrong(right(*arguments), which, factor))
    with pytest.raises(RuntimeError, match=f"the {form} form is not accurate enough: .* more than 1.0e-04"):
        optimize(fill(build(**TINY)), normal(0, 1, 3, 64, 64), forms=[form], report=None)


@needs_native
def test_a_wrong_form_among_others_is_left_out(monkeypatch):
    right, lines = optimizer.fuse, []
    monkeypatch.setattr(optimizer, "fuse", lambda model: Wrong(right(model), 0, 1.001))
    fast = optimize(tiny_model(), normal(0, 1, 3, 64, 64), forms=QUICK, report=lines.append)
    assert fast.form == "native" and fast.errors["fused"] > 1e-4 and "fused" not in fast.seconds
    assert lines[0].startswith("fused: left out, ") and len(lines) == 3


@needs_native
@pytest.mark.parametrize("order", [QUICK, QUICK[::-1]])
def test_the_fastest_is_chosen(monkeypatch, order):
    def times(candidates: dict[str, Optimized], example: Tensor) -> dict[str, float]:
        return {form: 1.0 + order.index(form) if form in order else 0.5 for form in candidates}

    monkeypatch.setattr(optimizer, "_times", times)
    assert optimize(tiny_model(), normal(0, 1, 3, 64, 64), forms=QUICK, report=None).form == order[0]


@pytest.mark.extra
def test_compiled():
    model = fill(Pyramid(num_classes=0, embed_dim=16, depths=(1,), num_heads=(2,), local_ws=(2,), alpha=0.5))
    fast = optimize(model, normal(0, 1, 3, 32, 32), forms=["compiled"], report=None)
    assert fast.form == "compiled" and fast.errors.keys() == {"plain", "compiled"}
    for shape in ((1, 3, 32, 32), (2, 3, 36, 41)):
        x = normal(1, *shape)
        assert error(tensors(fast(x)), exact(model, x)) < 1e-4


@pytest.mark.extra
@needs_native
def test_backbone():
    backbone = pytest.importorskip("litv2.mm_backbone", exc_type=ImportError).LITv2Backbone
    arguments = {key: value for key, value in TINY.items() if key != "num_classes"}
    model = fill(backbone(**arguments, out_indices=(1, 3), out_norms=(3,), frozen_stages=2))
    for form in QUICK:
        fast = optimize(model, normal(0, 1, 3, 64, 96), forms=[form], report=None)
        x = normal(1, 2, 3, 70, 50)
        assert isinstance(fast(x), tuple) and error(tensors(fast(x)), exact(model, x)) < 1e-4
