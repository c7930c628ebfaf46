# SPDX-License-Identifier: Apache-2.0
"""Knowledge distillation: the model also learns what a trained one, the teacher, answers to the same images.

The loss is (1 - WEIGHT) x that of the labels + WEIGHT x T^2 x KL(teacher || student), of the softmax at temperature T (Hinton et al. 2015,
https://arxiv.org/abs/1503.02531), + FEATURES x the mean squared error between the pooled features of the teacher and a linear projection
of the student's. The keys are those of DISTILL in the configuration.

timm.task has this as well, but gives a teacher of other classes a new head without a word, runs the teacher within the student's autocast,
and a second time for its features.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import cast

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from yacs.config import CfgNode

import distributed
from heads import names_in
from litv2 import LITv2
from litv2.classes import task_in
from litv2.errors import UserError, listed
from litv2.factory import load_model
from litv2.preprocess import normalisation
from litv2.weights.download import fetch
from litv2.weights.reading import read_checkpoint
from litv2.weights.releases import ZOO
from litv2.weights.state_dict import find_weights, load_weights
from precision import Precision, choose_precision

Normalisation = tuple[Sequence[float], Sequence[float]]  # mean and standard deviation per channel


class Teacher:
    """A trained classifier, which keeps its weights, its evaluation mode and its own precision.

    It is no module, so that it is in no optimizer, checkpoint or DDP. Calling it maps the student's images (B, C, H, W) to float32 logits
    (B, classes) and pooled features (B, channels), or None unless ``features`` are wanted.

    Args:
        model: a LITv2 or a model of timm.
        normalise: what the model expects; the student's images have that of
            ``litv2.preprocess.normalisation``.
    """

    def __init__(self, model: nn.Module, precision: Precision, normalise: Normalisation, features: bool):
        self.model = model.to(precision.device).eval()
        self.precision, self.features = precision, features
        (mean, std), (own_mean, own_std) = (
            torch.tensor(pair, device=precision.device)[..., None, None] for pair in (normalisation(len(normalise[0])), normalise)
        )
        self.scale, self.shift = std / own_std, (mean - own_mean) / own_std

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        images = images * self.scale + self.shift
        with self.precision.context():
            if not self.features:
                return self.model(images).float(), None
            maps = self.model.forward_features(images)  # type: ignore[operator]
            logits, pooled = (self.model.forward_head(maps, pre_logits=before) for before in (False, True))  # type: ignore[operator]
        return logits.float(), pooled.float()


class WithProjection(nn.Module):
    """A LITv2 and the projection of its features to the teacher's: images -> logits and projected features."""

    def __init__(self, model: LITv2, projection: nn.Linear):
        super().__init__()
        self.model, self.projection = model, projection

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        pooled = self.model.forward_head(self.model.forward_features(images), pre_logits=True)
        return self.model.head(pooled), self.projection(pooled)


class Distillation:
    """The loss with a teacher.

    Attributes:
        projection: of the student's features, trained along; None if features are not compared.
    """

    def __init__(
        self, teacher: Teacher, temperature: float, weight: float, features: float = 0.0, projection: nn.Linear | None = None,
        multi_label: bool = False,
    ):  # fmt: skip
        self.teacher, self.temperature, self.weight, self.features = teacher, temperature, weight, features
        self.projection, self.multi_label = projection, multi_label

    def student(self, model: LITv2) -> nn.Module:
        """Returns what is to be trained: the model, with the projection, if there is one."""
        return model if self.projection is None else WithProjection(model, self.projection)

    def __call__(self, label_loss: Tensor, images: Tensor, logits: Tensor, features: Tensor | None) -> Tensor:
        """Adds the teacher's part to the loss of the labels, a scalar; the rest is what the student made of the images."""
        answers, pooled = self.teacher(images)
        divergence = F.kl_div(self._softened(logits), self._softened(answers), reduction="none", log_target=True).sum(dim=-1).mean()
        loss = (1 - self.weight) * label_loss + self.weight * self.temperature**2 * divergence
        if features is not None and pooled is not None:
            loss = loss + self.features * F.mse_loss(features.float(), pooled)
        return loss

    def _softened(self, logits: Tensor) -> Tensor:
        """Log-probabilities of the classes (B, classes), or with several labels per image of yes and no for each (B, classes, 2)."""
        logits = logits.float() / self.temperature
        return F.log_softmax(torch.stack([logits, torch.zeros_like(logits)], dim=-1) if self.multi_label else logits, dim=-1)


def plain_model(model: nn.Module) -> nn.Module:
    """Returns the model that is evaluated and saved, without what training wraps around it."""
    model = distributed.unwrap(model)
    return model.model if isinstance(model, WithProjection) else model


def build_distillation(
    config: CfgNode, model: LITv2, class_names: Sequence[str], device: torch.device, log: Callable[[str], object]
) -> Distillation | None:
    """Returns the distillation into ``model`` that the configuration asks for; None without DISTILL.TEACHER.

    Raises:
        UserError: the teacher is unknown, has other classes or cannot take the images; its weights are missing or do not fit.
        OSError: its weights cannot be downloaded.
    """
    settings = config.DISTILL
    if not settings.TEACHER:
        return None
    what = f"DISTILL.TEACHER={settings.TEACHER}"
    network, normalise, content = _load(settings.TEACHER, settings.TEACHER_FILE, config.MODEL.LIT.IN_CHANS, log)
    names, task = names_in(content), task_in(content)
    if task != config.MODEL.TASK:
        raise UserError(f"{what} is a classifier of MODEL.TASK {task}; a teacher needs that of the student, {config.MODEL.TASK}")
    precision, choice = choose_precision(settings.AMP, device)
    teacher = Teacher(network, precision, normalise, features=settings.FEATURES > 0)
    side = config.DATA.IMG_SIZE
    try:
        logits, pooled = teacher(torch.zeros(1, config.MODEL.LIT.IN_CHANS, side, side, device=device))
    except Exception as error:  # each network has its own words, and types, for images that it cannot take
        reason = str(error).partition("\n")[0]
        raise UserError(f"{what} cannot take images of {config.MODEL.LIT.IN_CHANS} x {side} x {side} (DATA.IMG_SIZE): {reason}") from error
    if logits.shape[1:] != (len(class_names),):
        raise UserError(f"{what} has {logits.shape[1]} classes, but the data has {len(class_names)}; a teacher needs the same classes")
    if names and list(names) != list(class_names):
        raise UserError(f"{what} has other classes ({listed(names, 5)}) than the data ({listed(class_names, 5)}), or in another order")
    projection = None
    if pooled is not None:
        if pooled.dim() != 2:
            raise UserError(f"{what} does not pool its features (their shape is {tuple(pooled.shape)}); set DISTILL.FEATURES 0")
        projection = nn.Linear(model.num_features, pooled.shape[1]).to(device)
    log(f"teacher {settings.TEACHER}: {sum(p.numel() for p in network.parameters()) / 1e6:.3f} M parameters; {choice}")
    multi_label = config.MODEL.TASK == "multi"
    return Distillation(teacher, settings.TEMPERATURE, settings.WEIGHT, settings.FEATURES, projection, multi_label)


def _load(name: str, file: str, in_chans: int, log: Callable[[str], object]) -> tuple[nn.Module, Normalisation, dict]:
    """Returns the model, the normalisation of its images, and the content of its file."""
    if name in ZOO or Path(name).is_file() or "://" in name:
        loaded = load_model(file or name, name if file else None)
        for note in loaded.notes:
            if "image size" not in note:  # here it is DATA.IMG_SIZE
                log(note)
        return loaded.model, normalisation(in_chans), loaded.content
    if not timm.is_model(name):
        known = [*(release.name for release in ZOO.values() if release.task == "classification"), *timm.list_models()]
        similar = listed(difflib.get_close_matches(name, known, cutoff=0.5)) or "none"
        raise UserError(f"DISTILL.TEACHER={name} is neither a file nor a model of ours or of timm; similar names: {similar}")
    model, content = _of_timm(name, file, in_chans)
    settings = cast(dict, model.pretrained_cfg)
    mean, std = settings["mean"], settings["std"]
    if in_chans == 1:  # as timm sums the weights of the colours
        mean, std = (fmean(mean),), (fmean(std),)
    return model, (mean, std), content


def _of_timm(name: str, file: str, in_chans: int) -> tuple[nn.Module, dict]:
    """Returns the model with its pretrained weights, or those of the file, and the content of the file."""
    if not file:
        try:
            return timm.create_model(name, pretrained=True, in_chans=in_chans), {}
        except Exception as error:  # of timm, the Hugging Face hub or its transport: each has types of its own
            reason = str(error).partition("\n")[0]
            raise UserError(f"the pretrained weights of DISTILL.TEACHER={name} cannot be had ({reason}); "
                            "set DISTILL.TEACHER_FILE to a file of them") from error  # fmt: skip
    content = read_checkpoint(fetch(file))
    weights = find_weights(content)
    head = timm.get_pretrained_cfg_value(name, "classifier")
    classes = weights.get(f"{head[0] if isinstance(head, tuple) else head}.bias")
    model = timm.create_model(name, in_chans=in_chans, num_classes=None if classes is None else len(classes))
    try:
        load_weights(model, weights)
    except UserError as error:
        raise UserError(f"DISTILL.TEACHER_FILE={file}: {error}") from error
    return model, content
