# SPDX-License-Identifier: Apache-2.0
"""Optimizer groups, learning rates and twenty training steps against the golden numbers."""

from __future__ import annotations

import math

import pytest
import torch
from timm.loss import LabelSmoothingCrossEntropy
from torch import nn

from config import load_config
from helpers import ROOT, generator, golden, normal, tiny_model
from optim import build_optimizer, build_scheduler, layer_of


def config(*overrides):
    return load_config(ROOT / "classification/configs/litv2-small.yaml", list(overrides))


def test_golden_schedule():
    case = golden()["schedule"]
    recipe = config()
    optimizer = build_optimizer(recipe, tiny_model(), case["total_batch"])
    assert [len(group["params"]) for group in optimizer.param_groups] == case["group_sizes"]
    assert [group["weight_decay"] for group in optimizer.param_groups] == case["weight_decay"]
    scheduler = build_scheduler(recipe, optimizer, case["iterations_per_epoch"], case["total_batch"])
    for update, *rates in case["rows"]:
        scheduler.step_update(update)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(rates, rel=1e-9), update


def test_golden_training():
    """Twenty steps: losses, gradient norms, rates in force, parameters at the end."""
    case = golden()["training"]
    batch = case["batch"]

    def unscaled(lr):
        return lr * 512 / batch

    recipe = config(
        *(
            "TRAIN.BASE_LR",
            unscaled(case["base_lr"]),
            "TRAIN.WARMUP_LR",
            unscaled(case["warmup_lr"]),
            "TRAIN.MIN_LR",
            unscaled(case["min_lr"]),
        ),
        *("TRAIN.EPOCHS", case["epochs"], "TRAIN.WARMUP_EPOCHS", case["warmup_epochs"]),
    )
    model = tiny_model().train()
    optimizer = build_optimizer(recipe, model, batch)
    scheduler = build_scheduler(recipe, optimizer, case["iterations_per_epoch"], batch)
    loss_fn = LabelSmoothingCrossEntropy(0.1)
    for step in range(case["steps"]):
        images = normal(600 + step % 5, batch, 3, 64, 64)
        targets = torch.from_numpy(generator(700 + step % 5).integers(0, 10, batch))
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(case["lr_used"][step], rel=1e-6)
        loss = loss_fn(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), case["clip"])
        optimizer.step()
        scheduler.step_update(step)
        assert loss.item() == pytest.approx(case["losses"][step], abs=2e-3), step
        assert norm.item() == pytest.approx(case["grad_norm"][step], rel=1e-2), step
    for name, parameter in model.named_parameters():
        # The gradient of a bias before batch norm is rounding noise, which Adam turns into steps of full length.
        tolerance = 1e-2 if name.endswith("dconv.bias") else 1e-3
        assert parameter.norm().item() == pytest.approx(case["param_norm_after"][name], rel=tolerance), name


def test_layer_decay():
    model = tiny_model()
    depth = {name: layer_of(name, model) for name, _ in model.named_parameters()}
    assert depth["patch_embed.proj.weight"] == 0 and depth["head.weight"] == depth["norm.bias"] == max(depth.values()) == 9
    order = [
        "layers.0.blocks.0.norm2.bias",
        "layers.0.downsample.dconv.weight",
        "layers.1.blocks.0.norm2.bias",
        "layers.1.downsample.dconv.bias",
    ]
    assert [depth[name] for name in order] == [1, 2, 3, 4]
    optimizer = build_optimizer(config("TRAIN.LAYER_DECAY", 0.5), model, 512)
    build_scheduler(config("TRAIN.LAYER_DECAY", 0.5), optimizer, 10, 512).step_update(200)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    plain = build_optimizer(config(), model, 512)
    build_scheduler(config(), plain, 10, 512).step_update(200)
    full = {id(p): group["lr"] for group in plain.param_groups for p in group["params"]}
    assert len(rates) == len(full)
    for name, parameter in model.named_parameters():
        assert rates[id(parameter)] == pytest.approx(full[id(parameter)] * 0.5 ** (9 - depth[name])), name


def test_tables_of_relative_positions_do_not_decay():
    model = tiny_model(attention="relative-msa")
    decays = {id(p): group["weight_decay"] for group in build_optimizer(config(), model, 512).param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert decays[id(parameter)] == (0.0 if parameter.ndim == 1 or "relative_position" in name else 0.05), name


def test_sgd_whose_first_step_is_skipped(monkeypatch):
    """The fused SGD of torch does not then initialise its momentum, which would be whatever the memory held: here NaN."""
    model = tiny_model()
    optimizer = build_optimizer(config("TRAIN.OPTIMIZER.NAME", "sgd"), model, 512)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    assert optimizer.param_groups[0]["fused"]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    monkeypatch.setattr(torch, "empty_like", lambda tensor: torch.full_like(tensor, math.nan))
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before))
    plain = tiny_model()
    expected = torch.optim.SGD(
        [{**group, "params": [dict(plain.named_parameters())[name] for name in names_of(group, model)], "fused": None}
         for group in optimizer.param_groups], lr=0.1, momentum=0.9, nesterov=True,
    )  # fmt: skip
    for parameter in plain.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.found_inf = torch.zeros(())
    optimizer.step()
    expected.step()
    for a, b in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def names_of(group: dict, model: nn.Module) -> list[str]:
    members = set(map(id, group["params"]))
    return [name for name, parameter in model.named_parameters() if id(parameter) in members]
