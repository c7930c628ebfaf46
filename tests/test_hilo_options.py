# SPDX-License-Identifier: Apache-2.0
"""HiLo's options, all together against a slow reference, and one by one against the properties that they promise."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from helpers import max_difference
from hilo import HiLo, HiLo2d, HiLoWeights
from hilo_reference import Slow, slow_hilo

SIDES = st.integers(1, 3) | st.tuples(st.integers(1, 3), st.integers(1, 3))
LAYOUTS = ["tokens", "map", "contiguous", "channels-last"]  # the last two are HiLo2d's


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def filled(layer: nn.Module, seed: int = 0) -> Any:
    """Large parameters, so that no term is lost in the tolerance."""
    with torch.no_grad():
        for i, parameter in enumerate(layer.parameters()):
            parameter.copy_(0.5 * numbers(seed + i, *parameter.shape))
    return layer


@st.composite
def cases(draw) -> tuple[dict, dict, torch.dtype, str]:
    """Arguments of HiLo, of ``slow_hilo``, and how to call the layer."""
    layout, dtype = draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from([torch.float32, torch.bfloat16]))
    heads = draw(st.integers(1, 3))
    dim = heads * draw(st.integers(1, 4))
    built = dict(dim=dim, num_heads=heads, qkv_bias=draw(st.booleans()), qk_scale=draw(st.sampled_from([None, 0.7])))
    built |= dict(window_size=draw(SIDES), alpha=draw(st.sampled_from([0.0, 0.34, 0.67, 1.0])), pool_size=draw(st.none() | SIDES))
    built |= dict(mask_padding=draw(st.booleans()))
    B, H, W, seed = draw(st.integers(1, 2)), draw(st.integers(1, 7)), draw(st.integers(1, 7)), draw(st.integers(0, 2**32))
    E = draw(st.integers(0, 2)) if layout == "tokens" else 0
    called: dict[str, Any] = dict(x=numbers(seed, B, E + H * W, dim), H=H, W=W, extra_tokens=E)
    if draw(st.booleans()):
        called["pos"] = numbers(seed + 1, draw(st.sampled_from([1, B])), E + H * W, dim)
    rows, columns = H, W
    if draw(st.booleans()):
        if HiLo(**built).h_heads == 0:
            rows, columns = draw(st.integers(1, 7)), draw(st.integers(1, 7))
        called["context"] = numbers(seed + 2, B, rows, columns, dim)
        if draw(st.booleans()):
            called["context_pos"] = numbers(seed + 3, draw(st.sampled_from([1, B])), rows, columns, dim)
    if draw(st.booleans()):
        share = draw(st.sampled_from([0.1, 0.5, 0.9]))
        uniform = torch.rand(draw(st.sampled_from([1, B])), rows, columns, generator=torch.Generator().manual_seed(seed))
        called["mask"] = uniform < share
    return built, called, dtype, layout


def poisoned(called: dict) -> dict:
    """With NaN at the invalid cells of what is attended to: it must not matter."""
    if (mask := called.get("mask")) is None:
        return called
    if (context := called.get("context")) is not None:
        return called | dict(context=context.masked_fill(~mask[..., None], torch.nan))
    cells = torch.cat((mask.new_ones(len(mask), called["extra_tokens"]), mask.flatten(1)), dim=1)
    return called | dict(x=called["x"].masked_fill(~cells[..., None], torch.nan))


def call(layer: HiLo, called: dict, dtype: torch.dtype, layout: str, **kwargs: Any) -> Any:
    """Calls the layer, which is HiLo2d for maps (B, C, H, W); its output as tokens."""
    H, W = called["H"], called["W"]
    called = {name: value.to(dtype) if isinstance(value, Tensor) and name != "mask" else value for name, value in called.items()} | kwargs
    if layout == "tokens":
        return layer(**called)
    called = {name: value for name, value in called.items() if name not in ("H", "W", "extra_tokens")}
    for name in {"x", "pos", "context", "context_pos"} & called.keys():
        y = called[name] if called[name].dim() == 4 else called[name].unflatten(1, (H, W))
        y = y if layout == "map" else y.permute(0, 3, 1, 2)
        called[name] = y.contiguous() if layout == "contiguous" else y
    out = layer(**called)
    tokens = [out[0] if isinstance(out, tuple) else out, *(out[1:] if isinstance(out, tuple) else ())]
    assert tokens[0].shape == called["x"].shape
    tokens[0] = (tokens[0] if layout == "map" else tokens[0].permute(0, 2, 3, 1)).flatten(1, 2)
    return tuple(tokens) if isinstance(out, tuple) else tokens[0]


def compare(ours: Tensor | None, slow: Tensor, plain: Tensor | None = None) -> None:
    """Where the reference means something. Everything else is finite, too."""
    if ours is None:
        assert slow.numel() == 0
        return
    assert ours.shape == slow.shape and ours.isfinite().all()
    means = slow.isfinite()
    if plain is None:
        torch.testing.assert_close(ours[means].double(), slow[means], atol=2e-5, rtol=2e-5)
    elif means.any():
        error, allowed = ((result[means].double() - slow[means]).norm() for result in (ours, plain))
        assert error <= 2 * allowed + 2**-8 * slow[means].norm()  # and a rounding of the result: `allowed` may be 0 by luck


@pytest.mark.extra
@settings(max_examples=1000, derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(cases())
@torch.no_grad()
def test_every_combination(case):
    built, called, dtype, layout = case
    layer = filled((HiLo2d if layout.startswith("c") else HiLo)(**built)).to(dtype)
    called = {name: value.to(dtype).double() if isinstance(value, Tensor) and name != "mask" else value for name, value in called.items()}
    slow = slow_hilo(copy.deepcopy(layer).double(), **called)
    plain = slow_hilo(layer, **called) if dtype == torch.bfloat16 else Slow(None, None, None)
    called = poisoned(called)
    out, weights = call(layer, called, dtype, layout, need_weights=True)
    assert isinstance(weights, HiLoWeights) and out.dtype == dtype
    for ours, exact, low in zip((out, *weights), slow, plain):
        compare(ours, exact, low)
    for rows in weights:
        assert rows is None or (rows.sum(dim=-1) - 1).abs().max() < (1e-5 if dtype == torch.float32 else 0.05)
    compare(call(layer, called, dtype, layout), slow.out, plain.out)


# A layer with both branches, and each option with a call that uses it. 7 x 9 is no multiple of any window or pooled cell.
B, H, W, DIM, HEADS = 2, 7, 9, 12, 3


def options(dtype: torch.dtype = torch.float32) -> dict[str, tuple[dict, dict[str, Any]]]:
    """For each option: arguments of the layer and, after x as a map, of its call."""
    mask = torch.ones(B, H, W, dtype=torch.bool)
    mask[0, 5:], mask[1, :, 6:], mask[1, 2, 2] = False, False, False
    context, pos, context_pos = (numbers(seed, batch, H, W, DIM).to(dtype) for seed, batch in ((1, B), (2, 1), (3, B)))
    return {
        "plain": ({}, {}),
        "rectangular windows": (dict(window_size=(2, 3)), {}),
        "pool": (dict(pool_size=(3, 4)), {}),
        "mask_padding": (dict(mask_padding=True), {}),
        "pos": ({}, dict(pos=pos)),
        "mask": ({}, dict(mask=mask)),
        "context": ({}, dict(context=context)),
        "context of another size": (dict(alpha=1.0), dict(context=torch.cat((context, context), dim=1)[:, :11, :4].contiguous())),
        "need_weights": ({}, dict(need_weights=True)),
        "all": (
            dict(window_size=(2, 3), pool_size=(3, 4), mask_padding=True),
            dict(context=context, pos=pos, context_pos=context_pos, mask=mask, need_weights=True),
        ),
    }


OPTIONS = list(options())


def layer_for(option: str, kind: type[HiLo] = HiLo, **kwargs: Any) -> HiLo:
    return filled(kind(DIM, HEADS, qkv_bias=True, **({"alpha": 0.34} | options()[option][0] | kwargs)))


def first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("option", OPTIONS)
def test_maps_equal_tokens_to_the_bit(option):
    tokens, maps = layer_for(option), layer_for(option, HiLo2d)
    kwargs, x = options()[option][1], numbers(0, B, H, W, DIM).float()
    expected = first(tokens(x.flatten(1, 2), H, W, **kwargs)).unflatten(1, (H, W))
    assert torch.equal(first(tokens(x, **kwargs)), expected) and torch.equal(first(tokens(x, H, W, **kwargs)), expected)
    kwargs = {name: y.permute(0, 3, 1, 2) if isinstance(y, Tensor) and y.dim() == 4 else y for name, y in kwargs.items()}
    for memory_format in (torch.contiguous_format, torch.channels_last):
        out = first(maps(x.permute(0, 3, 1, 2).contiguous(memory_format=memory_format), **kwargs))
        assert torch.equal(out.permute(0, 2, 3, 1), expected)
        assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("placed", [False, True])
@pytest.mark.parametrize("size", [(7, 9), (14, 14)])
def test_attention_to_itself_as_a_context(size, placed):
    """To the bit for the tensor itself, and within rounding for a copy, whose keys and values are another product."""
    x, pos = (numbers(seed, B, *size, DIM).float() for seed in (0, 1))
    layer, itself = layer_for("plain"), dict(pos=pos) if placed else {}
    as_context = itself | dict(context_pos=pos) if placed else {}
    assert torch.equal(layer(x, context=x, **as_context), layer(x, **itself))
    assert max_difference(layer(x, context=x.clone(), **as_context), layer(x, **itself)) < 1e-4
    layer, x, pos = layer_for("plain", HiLo2d), x.permute(0, 3, 1, 2), pos.permute(0, 3, 1, 2)
    itself, as_context = (dict.fromkeys(names, pos) if placed else {} for names in (["pos"], ["pos", "context_pos"]))
    assert torch.equal(layer(x, context=x, **as_context), layer(x, **itself))


@pytest.mark.parametrize("placed", [False, True])
def test_extra_tokens_with_itself_as_a_context(placed):
    E, layer = 2, layer_for("plain").double()
    x, pos = (numbers(seed, B, E + H * W, DIM) for seed in (0, 1))
    as_context = dict(context=x[:, E:].unflatten(1, (H, W)), context_pos=pos[:, E:].unflatten(1, (H, W)) if placed else None)
    itself = dict(H=H, W=W, extra_tokens=E, pos=pos if placed else None)
    assert max_difference(layer(x, **itself, **as_context), layer(x, **itself)) < 1e-12


def test_masked_padding_is_a_mask_of_the_padded_map():
    x, mask = numbers(0, B, 8, 12, DIM), torch.zeros(B, 8, 12, dtype=torch.bool)
    mask[:, :H, :W] = True
    for option, padding in (("mask_padding", False), ("mask_padding", True), ("all", True)):
        layer = layer_for(option).double()
        small, layer.mask_padding = layer(x[:, :H, :W]), padding
        assert max_difference(layer(x, mask=mask)[:, :H, :W], small) < 1e-12


def test_a_mask_crops():
    """With masked padding, a map of which only a corner is valid is that corner, whatever is beside it."""
    layer, x, mask = layer_for("mask_padding").double(), numbers(0, B, 11, 10, DIM), torch.zeros(1, 11, 10, dtype=torch.bool)
    mask[:, :H, :W] = True
    x[:, H:], x[:, :, W:] = torch.nan, torch.inf
    assert max_difference(layer(x, mask=mask)[:, :H, :W], layer(x[:, :H, :W])) < 1e-12


def test_a_mask_of_valid_cells_changes_nothing():
    layer, x = layer_for("plain").double(), numbers(0, B, H, W, DIM)
    assert max_difference(layer(x, mask=torch.ones(1, H, W, dtype=torch.bool)), layer(x)) < 1e-12


@pytest.mark.parametrize("window, pool, step", [(2, None, (2, 2)), ((2, 3), (1, 2), (2, 6)), (3, (2, 4), (6, 12))])
def test_shifts_by_whole_windows_and_pooled_cells(window, pool, step):
    layer = filled(HiLo(DIM, HEADS, window_size=window, pool_size=pool)).double()
    x = numbers(0, B, 12, 12, DIM)
    assert max_difference(layer(x.roll(step, (1, 2))), layer(x).roll(step, (1, 2))) < 1e-12
    assert max_difference(layer(x.roll((1, 1), (1, 2))), layer(x).roll((1, 1), (1, 2))) > 1e-3


def test_sequences_are_maps_of_one_row():
    layer, x = layer_for("plain", window_size=(1, 4)).double(), numbers(0, B, 10, DIM)
    out = layer(x, 1, 10)
    assert max_difference(out, slow_hilo(layer, x, 1, 10).out) < 1e-12
    assert max_difference(layer(x.flip(0), 1, 10).flip(0), out) < 1e-12


@pytest.mark.parametrize("context", [False, True])
def test_invalid_cells_are_read_by_nobody(context):
    """NaN there reaches no valid output and no gradient, and changes nothing to the bit."""
    layer, mask = layer_for("plain"), options()["mask"][1]["mask"]
    results = []
    for poison in (0.0, torch.nan, torch.inf):
        x, seen = (numbers(seed, B, H, W, DIM).float() for seed in (0, 1))
        (seen if context else x)[~mask] = poison
        x, seen = x.requires_grad_(), seen.requires_grad_()
        out = layer(x, mask=mask, context=seen if context else None)
        assert out.isfinite().all()
        out = out if context else out[mask]
        results.append((out, *torch.autograd.grad(out.square().sum(), [x, *[seen] * context, *layer.parameters()])))
        assert all(result.isfinite().all() for result in results[-1])
    for others in results[1:]:
        assert all(map(torch.equal, results[0], others))


@pytest.mark.parametrize("option", OPTIONS)
def test_weights_come_with_the_same_output(option):
    layer, kwargs = layer_for(option).double(), options(torch.float64)[option][1] | dict(need_weights=True)
    x = numbers(0, B, H, W, DIM)
    out, weights = layer(x, **kwargs)
    assert max_difference(out, first(layer(x, **kwargs | dict(need_weights=False)))) < 1e-12
    assert all(rows is None or (rows.sum(dim=-1) - 1).abs().max() < 1e-12 for rows in weights)



@pytest.mark.parametrize("pool", [1, 3, (2, 9)])
def test_weights_reproduce_the_output(pool):
    layer, x, E = layer_for("plain", window_size=(2, 3), pool_size=pool).double(), numbers(0, B, 2 + 6 * 9, DIM), 2
    out, weights = layer(x, 6, 9, extra_tokens=E, need_weights=True)
    cells = x[:, E:].unflatten(1, (3, 2, 3, 3)).transpose(2, 3)  # (B, 3, 3, 2, 3, dim), the windows
    v = layer.h_qkv(cells)[..., 2 * layer.h_dim :].reshape(B, 9, 6, layer.h_heads, -1)
    hifi = torch.einsum("bwhnm,bwmhd->bwnhd", weights.hifi, v).reshape(B, 3, 3, 2, 3, -1).transpose(2, 3).reshape(B, 54, -1)
    assert max_difference(out[:, E:, : layer.h_dim], layer.h_proj(hifi)) < 1e-12
    (ph, pw), cells = layer.pool, x[:, E:].unflatten(1, (6, 9))
    pooled = cells.unflatten(2, (-1, pw)).unflatten(1, (-1, ph)).mean((2, 4)).flatten(1, 2)
    v = layer.l_kv(torch.cat((x[:, :E], pooled), dim=1))[..., layer.l_dim :].unflatten(-1, (layer.l_heads, -1))
    lofi = torch.einsum("bhnm,bmhd->bnhd", weights.lofi, v).flatten(2)
    assert max_difference(out[..., layer.h_dim :], layer.l_proj(lofi)) < 1e-12


@pytest.mark.parametrize("option", OPTIONS)
def test_gradients(option):
    layer, kwargs = layer_for(option).double(), options(torch.float64)[option][1]
    kwargs = {name: value[:1, :3, :4] if isinstance(value, Tensor) else value for name, value in kwargs.items()}
    names = [name for name, value in kwargs.items() if isinstance(value, Tensor) and name != "mask"]
    inputs = [numbers(0, 1, 3, 4, DIM), *(kwargs[name].clone() for name in names)]
    parameters = dict(layer.named_parameters())

    def call(*tensors: Tensor) -> list[Tensor]:
        moved = dict(zip(parameters, tensors[len(inputs) :]))
        given = kwargs | dict(zip(names, tensors[1 : len(inputs)]))
        out = torch.func.functional_call(layer, moved, tensors[0], given)
        return [y for y in (out[0], *out[1]) if y is not None] if isinstance(out, tuple) else [out]

    tensors = [y.detach().requires_grad_() for y in (*inputs, *parameters.values())]
    torch.autograd.gradcheck(lambda *t: tuple(call(*t)), tensors, fast_mode=True)


def test_dropout_leaves_the_weights_alone():
    """They are those before dropout, and in eval mode nothing is dropped."""
    x = numbers(0, B, H, W, DIM).float()
    layer, plain = layer_for("plain", attn_drop=0.5), layer_for("plain")
    (out, weights), (expected, expected_weights) = layer(x, need_weights=True), plain(x, need_weights=True)
    assert all(map(torch.equal, weights, expected_weights)) and max_difference(out, expected) > 0.1
    assert torch.equal(layer.eval()(x, need_weights=True)[0], expected) and torch.equal(layer(x), plain(x))
