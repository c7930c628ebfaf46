# SPDX-License-Identifier: Apache-2.0
"""LITv2 as the backbone of OpenMMLab's detectors and segmenters.

Importing this file registers it under the name LITv2 in mmengine's root registry, where mmdet, mmseg and OpenMMLab's other
libraries find it. In a configuration:

    custom_imports = dict(imports=["litv2.mm_backbone"], allow_failed_imports=False)
    model = dict(backbone=dict(_delete_=True, type="LITv2", drop_path_rate=0.2, out_norms=(1, 2, 3)))
"""

from __future__ import annotations

import inspect

from mmengine.logging import print_log
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..errors import UserError, listed
from ..layers import channels_first
from ..model import LITv2
from ..weights.download import fetch
from ..weights.reading import read_checkpoint
from ..weights.state_dict import find_weights, load_weights
from .old_keys import take_old_keys

__all__ = ["LITv2Backbone"]

MODEL_DEFAULTS = {name: p.default for name, p in inspect.signature(LITv2).parameters.items() if name not in ("num_classes", "global_pool")}


@MODELS.register_module(name="LITv2")
class LITv2Backbone(LITv2, BaseModule):
    """LITv2 as a feature pyramid: image (B, in_chans, H, W) -> maps (B, C, H / s, W / s) at strides s = 4, 8, 16, 32.

    The maps are taken after each stage, before token merging, and are views in the channels-last memory format, which
    convolutions read without a copy.

    Args:
        out_indices: the stages, 0 to 3, whose maps are returned.
        out_norms: the returned stages whose maps are first normalised by a LayerNorm ``norm{i}``: (1, 2, 3) in the published
            detectors, (0, 1, 2, 3) in the segmenters.
        frozen_stages: -1 to train everything, 0 to freeze the patch embedding, n to also freeze the first n stages with their
            token mergings and norms. Frozen layers get no gradients and stay in evaluation mode.
        norm_eval: keep all batch norms in evaluation mode.
        with_cp: gradient checkpointing: recompute blocks in the backward pass to save memory.
        init_cfg: ``dict(type="Pretrained", checkpoint=SOURCE)`` to load the weights of a classifier, detector or segmenter, from the
            release or from this repository. SOURCE is a path, a URL or a zoo name (:mod:`litv2.weights.releases`). The file is read
            without running its code, and its weights must fit: only the ``out_norms`` may be missing and only the classifier's
            ``norm`` and ``head`` may be unused.
        model: arguments of :class:`litv2.LITv2` except ``num_classes``, with the defaults of LITv2-S. Keys from the public release's
            configurations are translated (:mod:`litv2.openmmlab.old_keys`); any other key is an error.

    Raises:
        UserError: the arguments are unknown or inconsistent, or the weights do not fit the model.
        FileNotFoundError: there is no checkpoint at the path.
    """

    def __init__(
        self,
        out_indices: tuple[int, ...] = (0, 1, 2, 3),
        out_norms: tuple[int, ...] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        init_cfg: dict | None = None,
        **model,
    ):
        today, notes = take_old_keys(model, tuple(model.get("local_ws", MODEL_DEFAULTS["local_ws"])))
        for note in notes:
            print_log(note, logger="current")
        with_cp, init_cfg = today.get("with_cp", with_cp), today.get("init_cfg", init_cfg)
        if unknown := sorted(model.keys() - MODEL_DEFAULTS.keys()):
            raise UserError(f"LITv2: unknown arguments {listed(unknown)}; the model takes {listed(MODEL_DEFAULTS, len(MODEL_DEFAULTS))}")
        try:
            super().__init__(num_classes=0, **model)
        except ValueError as error:  # the values come from a configuration
            raise UserError(str(error)) from error
        del self.norm, self.head_drop, self.head
        stages = len(self.layers)
        if not out_indices or list(out_indices) != sorted(set(out_indices) & set(range(stages))):
            raise UserError(f"LITv2: {out_indices=} must be some of the stages 0 to {stages - 1}, each once, in order")
        if not set(out_norms) <= set(out_indices):
            raise UserError(f"LITv2: {out_norms=} must be a subset of {out_indices=}, the maps that are returned")
        if not -1 <= frozen_stages <= stages:
            raise UserError(f"LITv2: {frozen_stages=} must be -1 (none), 0 (the patch embedding) or a number of stages up to {stages}")
        if init_cfg is not None and (init_cfg.get("type") != "Pretrained" or init_cfg.keys() != {"type", "checkpoint"}):
            raise UserError(f"LITv2: {init_cfg=} must be None or dict(type='Pretrained', checkpoint=PATH_URL_OR_NAME)")

        self.out_indices = tuple(out_indices)
        self.out_norms = tuple(out_norms)
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.init_cfg = init_cfg
        for i in out_norms:
            self.add_module(f"norm{i}", nn.LayerNorm(self.feature_info[i]["num_chs"]))
        self.set_grad_checkpointing(with_cp)
        for module in self._frozen():
            module.requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        maps = []
        for i, tokens in enumerate(self._run_stages(x, last=self.out_indices[-1])):
            if i in self.out_norms:
                tokens = self.get_submodule(f"norm{i}")(tokens)
            if i in self.out_indices:
                maps.append(channels_first(tokens))
        return tuple(maps)

    def train(self, mode: bool = True) -> LITv2Backbone:
        super().train(mode)
        for module in self._frozen():
            module.eval()
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def init_weights(self) -> None:
        """Loads the weights of ``init_cfg``, if there is one; mmengine calls this before training."""
        self._is_init = True
        if self.init_cfg is None:
            return
        source = self.init_cfg["checkpoint"]
        out_norms = {key for key in self.state_dict() if key.split(".")[0] in {f"norm{i}" for i in self.out_norms}}
        weights = find_weights(read_checkpoint(fetch(source)))
        left_over = {key for key in weights if key.startswith(("norm.", "head."))}
        try:
            notes = load_weights(self, weights, may_miss=out_norms, may_have=left_over)
        except UserError as error:
            raise UserError(f"{source}: {error}") from error
        print_log("\n  ".join([f"backbone weights from {source}", *notes]), logger="current")

    def _frozen(self) -> list[nn.Module]:
        if self.frozen_stages < 0:
            return []
        norms = [self.get_submodule(f"norm{i}") for i in self.out_norms if i < self.frozen_stages]
        return [self.patch_embed, *self.layers[: self.frozen_stages], *norms]
