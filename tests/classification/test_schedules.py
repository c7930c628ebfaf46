# SPDX-License-Identifier: Apache-2.0
"""timm's optimizers and schedules behind the configuration's names; AdamW and cosine are in test_optim.py."""

from __future__ import annotations

import pytest
import torch
from timm.optim import list_optimizers

from config import load_config
from helpers import ROOT, normal, tiny_model
from litv2.errors import UserError
from optim import SCHEDULES, build_optimizer, build_scheduler, optimizer_names

BASE, WARM, FLOOR = 5e-4, 5e-7, 5e-6  # the recipe's rates, at a batch of 512


def config(*overrides):
    return load_config(ROOT / "classification/configs/litv2-small.yaml", list(overrides))


def rates(*overrides, steps: int = 10, updates: tuple[int, ...]) -> list[list[float]]:
    """The learning rates of the groups after these updates."""
    settings = config(*overrides)
    optimizer = build_optimizer(settings, tiny_model(), 512)
    scheduler = build_scheduler(settings, optimizer, steps, 512)
    rows = []
    for update in updates:
        scheduler.step_update(update)
        rows.append([group["lr"] for group in optimizer.param_groups])
    return rows


def test_linear():
    """Warm-up over 20 epochs of 10 steps, then on the straight line from the base rate at step 0 to the floor at step 3000."""
    start, warm, middle, end = rates("TRAIN.LR_SCHEDULER.NAME", "linear", updates=(0, 100, 1500, 3000))
    assert start[0] == pytest.approx(WARM) and warm[0] == pytest.approx((WARM + BASE) / 2)
    assert middle == pytest.approx([(BASE + FLOOR) / 2] * 2 + [(0.01 * BASE + FLOOR) / 2])
    assert end == pytest.approx([FLOOR] * 3) and pytest.approx(0.01 * BASE) == FLOOR, "the end of the release's schedule"


def test_step():
    rows = rates("TRAIN.LR_SCHEDULER.NAME", "step", updates=(299, 300, 599, 600))
    assert [row[0] for row in rows] == pytest.approx([BASE, BASE / 10, BASE / 10, BASE / 100])
    half = ("TRAIN.LR_SCHEDULER.NAME", "step", "TRAIN.LR_SCHEDULER.DECAY_EPOCHS", 50, "TRAIN.LR_SCHEDULER.DECAY_RATE", 0.5)
    assert rates(*half, updates=(1000,))[0][0] == pytest.approx(BASE / 4)


def test_multistep():
    overrides = ("TRAIN.LR_SCHEDULER.NAME", "multistep", "TRAIN.LR_SCHEDULER.DECAY_MILESTONES", [60, 80])
    assert [row[0] for row in rates(*overrides, updates=(590, 610, 810))] == pytest.approx([BASE, BASE / 10, BASE / 100])


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule(name, tmp_path):
    """Warms up, never exceeds the base rate, and has a state that a checkpoint can hold."""
    rows = rates("TRAIN.LR_SCHEDULER.NAME", name, updates=tuple(range(0, 3000, 50)))
    assert rows[0][0] == pytest.approx(WARM) and all(0 < row[0] <= BASE * (1 + 1e-9) for row in rows)
    settings = config("TRAIN.LR_SCHEDULER.NAME", name)
    scheduler = build_scheduler(settings, build_optimizer(settings, tiny_model(), 512), 10, 512)
    torch.save(scheduler.state_dict(), tmp_path / "state.pth")
    assert torch.load(tmp_path / "state.pth", weights_only=True) == scheduler.state_dict()


def steps(optimizer, model, count: int = 3) -> list[torch.Tensor]:
    images = normal(1, 2, 3, 32, 32)
    for _ in range(count):
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_sgd_is_torchs_with_nesterovs_momentum():
    model, other = tiny_model(), tiny_model()
    ours = build_optimizer(config("TRAIN.OPTIMIZER.NAME", "sgd", "TRAIN.OPTIMIZER.MOMENTUM", 0.8), model, 512)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [
        dict(params=[other.get_parameter(names[id(p)]) for p in group["params"]], lr=group["lr"], weight_decay=group["weight_decay"])
        for group in ours.param_groups
    ]
    theirs = torch.optim.SGD(groups, lr=BASE, momentum=0.8, nesterov=True)
    assert [group["weight_decay"] for group in ours.param_groups] == [0.05, 0.0, 0.05]
    assert [group["lr"] for group in ours.param_groups] == pytest.approx([BASE, BASE, 0.01 * BASE])
    for a, b in zip(steps(ours, model), steps(theirs, other)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["momentum", "lamb", "lion", "nadamw", "adafactor", "muon", "rmsproptf", "lookahead_adamw"])
def test_other_optimizers(name, tmp_path):
    """They move every weight, and go on from a saved state as if nothing had happened."""
    model = tiny_model()
    optimizer = build_optimizer(config("TRAIN.OPTIMIZER.NAME", name), model, 512)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    after = steps(optimizer, model, 1)
    assert all(not torch.equal(a, b) for (n, p), a, b in zip(model.named_parameters(), before, after) if p.grad.abs().max() > 1e-6)
    torch.save(dict(model=model.state_dict(), optimizer=optimizer.state_dict()), tmp_path / "state.pth")
    state = torch.load(tmp_path / "state.pth", weights_only=True)
    again = tiny_model()
    again.load_state_dict(state["model"])
    resumed = build_optimizer(config("TRAIN.OPTIMIZER.NAME", name), again, 512)
    resumed.load_state_dict(state["optimizer"])
    for a, b in zip(steps(optimizer, model, 2), steps(resumed, again, 2)):
        assert torch.equal(a, b)


def test_all_of_timms_are_known():
    assert set(list_optimizers()) - set(optimizer_names()) == {"adahessian"}, "which needs gradients of gradients"


@pytest.mark.parametrize(
    "overrides, words",
    [
        (("TRAIN.OPTIMIZER.NAME", "admw"), "TRAIN.OPTIMIZER.NAME='admw' is unknown; similar names: adamw"),
        (("TRAIN.OPTIMIZER.NAME", "adahessian"), "'adahessian' is unknown"),
        (("TRAIN.LR_SCHEDULER.NAME", "linaer"), "'linaer' is unknown; similar names: linear"),
        (("TRAIN.LR_SCHEDULER.NAME", "plateau"), "'plateau' is unknown"),
        (("TRAIN.LR_SCHEDULER.DECAY_EPOCHS", 0), "DECAY_EPOCHS must be above 0"),
        (("TRAIN.OPTIMIZER.NAME", "adan"), "adan takes 3 betas"),
        (("TRAIN.LR_SCHEDULER.NAME", "wsd", "TRAIN.LR_SCHEDULER.DECAY_EPOCHS", 290), "NAME=wsd: .* requires 0 < decay_epochs"),
    ],
)
def test_refused(overrides, words):
    with pytest.raises(UserError, match=words):
        rates(*overrides, updates=(0,))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there bitsandbytes may work")
def test_optimizers_that_need_a_gpu():
    with pytest.raises(UserError, match="NAME=bnbadamw8bit: CUDA required"):
        build_optimizer(config("TRAIN.OPTIMIZER.NAME", "bnbadamw8bit"), tiny_model(), 512)
