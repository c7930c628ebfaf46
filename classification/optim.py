# SPDX-License-Identifier: Apache-2.0
"""timm's optimizers and learning-rate schedules for the recipe's parameter groups (see the paper's appendix; values in ``configs``)."""

from __future__ import annotations

from typing import Any, cast

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim import SGD, Optimizer
from yacs.config import CfgNode

from litv2 import LITv2
from litv2.errors import MissingPackage, UserError

# Without timm's "plateau", which needs the result of each epoch, and "none", which is "constant" without warm-up.
SCHEDULES = ("cosine", "linear", "step", "multistep", "poly", "tanh", "wsd", "rsqrt", "constant")
LOOKAHEAD = "lookahead_"  # prefix of any optimizer's name: timm wraps it
_FUSED = ("adam", "adamw", "momentum", "nesterov", "sgd")  # torch's own, which update all parameters of a group in one pass


def optimizer_names() -> list[str]:
    """Returns timm's optimizers, except those that need second derivatives."""
    return [name for name in map(str, list_optimizers()) if not get_optimizer_info(name).second_order]


def build_optimizer(config: CfgNode, model: LITv2, total_batch: int, beside: nn.Module | None = None) -> Optimizer:
    """Builds a timm optimizer with parameter groups: with weight decay, without (1-D tensors), and DTM's offset convolutions.

    The offset convolutions get a lower learning rate. With TRAIN.LAYER_DECAY below 1 there is such a set of groups per layer, whose
    ``lr_scale`` is read by timm's scheduler. ``total_batch`` is the number of images per optimizer step over all processes. ``beside`` is
    trained along, as a second head.

    Raises:
        UserError: the optimizer does not work on this machine or with these settings.
    """
    train = config.TRAIN
    lr = scaled_lr(train.BASE_LR, total_batch)
    parameters = [*model.named_parameters(), *(() if beside is None else beside.named_parameters(prefix="head.beside"))]
    head, without = layer_of("head", model), model.no_weight_decay()
    groups: dict[tuple, dict] = {}
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        kind = "no_decay" if parameter.ndim <= 1 or name in without else "offset" if "conv_offset" in name else "decay"
        scale = train.LAYER_DECAY ** (head - layer_of(name, model))
        if (kind, scale) not in groups:
            groups[kind, scale] = dict(
                params=[],
                lr=lr * (config.MODEL.OFFSET_LR_MULTI if kind == "offset" else 1.0),
                weight_decay=0.0 if kind == "no_decay" else train.WEIGHT_DECAY,
                lr_scale=scale,
            )
        groups[kind, scale]["params"].append(parameter)
    order = ("decay", "no_decay", "offset")
    ordered = [groups[key] for key in sorted(groups, key=lambda key: (key[1], order.index(key[0])))]
    return _create(train.OPTIMIZER, ordered, lr, fused=next(model.parameters()).device.type in ("cpu", "cuda"))


def _create(settings: CfgNode, groups: list[dict], lr: float, fused: bool) -> Optimizer:
    name, betas = settings.NAME, tuple(settings.BETAS)
    info = get_optimizer_info(name.removeprefix(LOOKAHEAD))
    if info.has_betas and len(betas) != info.num_betas:
        raise UserError(f"TRAIN.OPTIMIZER.BETAS={list(betas)}: {name} takes {info.num_betas} betas")
    options: dict[str, Any] = dict(fused=True) if fused and name in _FUSED else {}
    try:
        optimizer = create_optimizer_v2(groups, name, lr=lr, momentum=settings.MOMENTUM, eps=settings.EPS, betas=betas, **options)
    except ImportError as error:
        raise MissingPackage(f"TRAIN.OPTIMIZER.NAME={name}: {error}") from error
    except AssertionError as error:  # timm's error if apex or bitsandbytes have no GPU
        raise UserError(f"TRAIN.OPTIMIZER.NAME={name}: {error}") from error
    if options and isinstance(optimizer, SGD) and settings.MOMENTUM:
        # The fused SGD leaves its momentum uninitialised if its first step is skipped; zeros give the same first step.
        for parameter in (parameter for group in groups for parameter in group["params"]):
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def scaled_lr(lr: float, total_batch: int) -> float:
    return lr * total_batch / 512


def layer_of(name: str, model: LITv2) -> int:
    """Returns the depth of a parameter: 0 for the patch embedding, then one per block and per token merging, the head last."""
    depth = 1
    for i, stage in enumerate(model.layers):
        for j in range(len(cast(nn.ModuleList, stage.blocks))):
            if name.startswith(f"layers.{i}.blocks.{j}."):
                return depth
            depth += 1
        if name.startswith(f"layers.{i}.downsample."):
            return depth
        depth += 1
    return 0 if name.startswith("patch_embed.") else depth - 1


def build_scheduler(config: CfgNode, optimizer: Optimizer, steps_per_epoch: int, total_batch: int) -> Scheduler:
    """Builds a schedule in optimizer steps: linear warm-up, then a timm schedule down to an absolute floor.

    The learning rate of step t is the schedule's value at t - 1 (at 0 for the first step), as in the training of the released weights:
    call ``step_update(t)`` after step t, counting from 0. In the default recipe the base rate of the offset group equals the floor, so
    with cosine it stays constant after the warm-up.

    "linear" is timm's "poly" with exponent 1. It ends at MIN_LR, while the release's ends at 0.01 of each group's own rate; with the
    default rates the two differ only for the offset group.

    Raises:
        UserError: the schedule does not fit the number of epochs.
    """
    train, schedule = config.TRAIN, config.TRAIN.LR_SCHEDULER
    linear = schedule.NAME == "linear"
    try:
        scheduler, _ = create_scheduler_v2(
            optimizer,
            "poly" if linear else schedule.NAME,
            num_epochs=train.EPOCHS,
            decay_epochs=schedule.DECAY_EPOCHS,
            decay_milestones=schedule.DECAY_MILESTONES,
            decay_rate=1.0 if linear else schedule.DECAY_RATE,
            min_lr=scaled_lr(train.MIN_LR, total_batch),
            warmup_lr=scaled_lr(train.WARMUP_LR, total_batch),
            warmup_epochs=train.WARMUP_EPOCHS,
            step_on_epochs=False,
            updates_per_epoch=steps_per_epoch,
        )
    except ValueError as error:
        raise UserError(f"TRAIN.LR_SCHEDULER.NAME={schedule.NAME}: {error}") from error
    return scheduler
