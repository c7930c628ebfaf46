"""Optimizer and learning-rate schedule of the recipe (the paper's appendix; numbers in ``configs``)."""

from __future__ import annotations

import torch
from timm.scheduler import CosineLRScheduler
from torch import nn
from yacs.config import CfgNode


def build_optimizer(config: CfgNode, model: nn.Module, total_batch: int) -> torch.optim.AdamW:
    """AdamW over parameter groups: with decay, without (1-D tensors), and DTM's offset convolutions at a lower rate.

    With TRAIN.LAYER_DECAY below 1 there is such a set of groups per layer, and ``lr_scale`` tells timm's scheduler its
    factor. ``total_batch`` is the number of images per optimizer step, over all processes.
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
    device = next(model.parameters()).device.type
    return torch.optim.AdamW(ordered, lr=lr, betas=tuple(train.OPTIMIZER.BETAS), eps=train.OPTIMIZER.EPS, fused=device in ("cpu", "cuda"))


def scaled_lr(lr: float, total_batch: int) -> float:
    return lr * total_batch / 512


def layer_of(name: str, model: nn.Module) -> int:
    """Depth of a parameter: 0 for the patch embedding, then one per block and per token merging, the head last."""
    depth = 1
    for i, stage in enumerate(model.layers):
        for j in range(len(stage.blocks)):
            if name.startswith(f"layers.{i}.blocks.{j}."):
                return depth
            depth += 1
        if name.startswith(f"layers.{i}.downsample."):
            return depth
        depth += 1
    return 0 if name.startswith("patch_embed.") else depth - 1


def build_scheduler(config: CfgNode, optimizer: torch.optim.Optimizer, steps_per_epoch: int, total_batch: int) -> CosineLRScheduler:
    """Linear warm-up, then cosine to an absolute floor, counted in optimizer steps.

    The rate in force at step t is the schedule's value at t - 1 (at 0 for the first step), as the released weights were
    trained: call ``step_update(t)`` after step t, counting from 0. The offset group's base rate equals the floor in the
    default recipe, so that it stays constant after the warm-up.
    """
    train = config.TRAIN
    return CosineLRScheduler(
        optimizer,
        t_initial=train.EPOCHS * steps_per_epoch,
        lr_min=scaled_lr(train.MIN_LR, total_batch),
        warmup_lr_init=scaled_lr(train.WARMUP_LR, total_batch),
        warmup_t=train.WARMUP_EPOCHS * steps_per_epoch,
        cycle_limit=1,
        t_in_epochs=False,
    )
