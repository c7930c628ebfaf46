"""timm's optimizers and learning-rate schedules over the recipe's parameter groups (the paper's appendix; numbers in ``configs``)."""

from __future__ import annotations

from typing import Any, cast

from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim import Optimizer
from yacs.config import CfgNode

from litv2 import LITv2
from litv2.errors import MissingPackage, UserError

# timm's "plateau" needs the result of each epoch, where the others are functions of the step, and "none" is "constant" without warm-up.
SCHEDULES = ("cosine", "linear", "step", "multistep", "poly", "tanh", "wsd", "rsqrt", "constant")
LOOKAHEAD = "lookahead_"  # before the name of any optimizer: timm wraps it
_FUSED = ("adam", "adamw", "momentum", "nesterov", "sgd")  # torch's own, which update all parameters of a group in one pass


def optimizer_names() -> list[str]:
    """timm's, except those that need gradients of gradients."""
    return [name for name in map(str, list_optimizers()) if not get_optimizer_info(name).second_order]


def build_optimizer(config: CfgNode, model: LITv2, total_batch: int) -> Optimizer:
    """An optimizer of timm over parameter groups: with decay, without (1-D tensors), and DTM's offset convolutions at a lower rate.

    With TRAIN.LAYER_DECAY below 1 there is such a set of groups per layer, and ``lr_scale`` tells timm's scheduler its
    factor. ``total_batch`` is the number of images per optimizer step, over all processes.

    Raises:
        UserError: an optimizer that does not work here or with these settings.
    """
    train = config.TRAIN
    lr = scaled_lr(train.BASE_LR, total_batch)
    no_decay = model.no_weight_decay()
    head = layer_of("head", model)
    groups: dict[tuple, dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        kind = "no_decay" if name in no_decay else "offset" if "conv_offset" in name else "decay"
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
        raise UserError(f"TRAIN.OPTIMIZER.BETAS={list(betas)}: {name} takes {info.num_betas} of them")
    options: dict[str, Any] = dict(fused=True) if fused and name in _FUSED else {}
    try:
        return create_optimizer_v2(groups, name, lr=lr, momentum=settings.MOMENTUM, eps=settings.EPS, betas=betas, **options)
    except ImportError as error:
        raise MissingPackage(f"TRAIN.OPTIMIZER.NAME={name}: {error}") from error
    except AssertionError as error:  # timm's way to say that apex and bitsandbytes need a GPU
        raise UserError(f"TRAIN.OPTIMIZER.NAME={name}: {error}") from error


def scaled_lr(lr: float, total_batch: int) -> float:
    return lr * total_batch / 512


def layer_of(name: str, model: LITv2) -> int:
    """Depth of a parameter: 0 for the patch embedding, then one per block and per token merging, the head last."""
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
    """Linear warm-up, then a schedule of timm down to an absolute floor, counted in optimizer steps.

    The rate in force at step t is the schedule's value at t - 1 (at 0 for the first step), as the released weights were
    trained: call ``step_update(t)`` after step t, counting from 0. With cosine the offset group's base rate equals the floor in the
    default recipe, so that it stays constant after the warm-up.

    "linear" is timm's "poly" with the power 1: it ends at MIN_LR, where the release's ends at 0.01 of each group's own rate. With the
    default rates that is the same but for the offset group.

    Raises:
        UserError: a schedule that does not fit the number of epochs.
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
