# SPDX-License-Identifier: Apache-2.0
"""The classifiers of the zoo as timm models. ``import litv2`` registers them (see hook.py); timm is needed only here.

    model = timm.create_model("litv2_small", pretrained=True, num_classes=10)
    backbone = timm.create_model("litv2_small", features_only=True, out_indices=(1, 2, 3), drop_path_rate=0.2)

The release's files hold a pickled configuration, which timm's own loader rejects. Weights that timm would read from a file or a URL
are therefore read by :mod:`litv2.weights` and passed to timm, which adapts them to ``in_chans`` and ``num_classes``. Any format
supported there can be loaded:

    timm.create_model("litv2_small", pretrained=True, pretrained_cfg_overlay=dict(file="best.pth"))

``checkpoint_path=`` is read by timm alone, which loads safetensors and our own files (their ``model``, not the moving average) but not
the release's. Old versions of timm, such as 1.0.15, run the code in such a file.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    register_notrace_module,
    resolve_pretrained_cfg,
)
from torch import Tensor, nn

from hilo import HiLo
from mm_modules.DCN import DeformConv2dPack

from ..factory import VARIANTS
from ..layers import DropPath, PatchEmbed
from ..weights.download import fetch
from ..weights.reading import read_checkpoint
from ..weights.releases import ZOO, Release
from ..weights.state_dict import find_weights

__all__: list[str] = []  # timm adds each model's name

for module in (PatchEmbed, HiLo, DropPath, DeformConv2dPack):  # they branch on sizes, which torch.fx cannot trace
    register_notrace_module(module)


def _default_cfg(entry: Release) -> dict:
    cropped = entry.image_size == (224, 224)  # images of 384 pixels are evaluated without cropping
    return dict(
        url=entry.url,
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        min_input_size=(3, 32, 32),
        crop_pct=224 / 256 if cropped else 1.0,
        crop_mode="center" if cropped else "squash",
        interpolation="bicubic",
        num_classes=1000,
        classifier="head",
        first_conv="patch_embed.proj",
        license="apache-2.0",
        origin_url="https://github.com/ziplab/LITv2",
        paper_name="Fast Vision Transformers with HiLo Attention",
        paper_ids="arXiv:2205.13213",
        **_sizes(entry.image_size),
    )


def _sizes(img_size: int | tuple[int, int]) -> dict:
    """Returns the configuration entries that depend on the image size (in pixels; one number for a square)."""
    size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if len(size) != 2 or not all(isinstance(side, int) and side >= 32 for side in size):
        raise ValueError(f"LITv2: {img_size=} must be one side or (height, width) in pixels, each at least 32")
    H, W = size
    return dict(input_size=(3, H, W), pool_size=(-(-H // 4) // 8, -(-W // 4) // 8))  # patches are padded, mergings floor


def _fitting(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Checks that only the head differs: timm does not load strictly if the number of classes is different."""
    wrong = sorted(key for key in weights.keys() ^ model.state_dict().keys() if not key.startswith("head."))
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"the weights do not fit this model; is it another variant? Keys in one only: {', '.join(wrong[:5])}{more}")
    return weights


def _create(
    entry: Release,
    pretrained: bool = False,
    pretrained_cfg: str | dict | None = None,
    pretrained_cfg_overlay: dict | None = None,
    img_size: int | tuple[int, int] | None = None,
    out_indices: int | tuple[int, ...] = (0, 1, 2, 3),
    feature_cls: str = "getter",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    cache_dir: str | None = None,
    **kwargs,
) -> nn.Module:
    """Creates a model for ``timm.create_model``. Keyword arguments are timm's and those of :class:`litv2.LITv2`.

    All models accept any image size; ``img_size`` sets the one that timm's data pipeline produces.
    """
    if feature_cls not in ("getter", "hook"):
        raise ValueError(f"LITv2: {feature_cls=} must be 'getter' or 'hook': timm's other wrappers miss the maps before token merging")
    overlay = dict(pretrained_cfg_overlay or {})
    if img_size is not None:
        overlay.update(_sizes(img_size))
    cfg = resolve_pretrained_cfg(entry.name, pretrained_cfg, overlay)
    source = cfg.file or cfg.url
    if pretrained and source and not cfg.state_dict and not cfg.source:  # a source is another location that timm supports
        if cache_dir is not None:
            raise ValueError(f"LITv2: {cache_dir=} is not supported; files are kept in torch.hub's folder (torch.hub.set_dir, $TORCH_HOME)")
        overlay["state_dict"] = find_weights(read_checkpoint(fetch(str(source))))
    model = build_model_with_cfg(
        partial(VARIANTS[entry.variant], **{"alpha": entry.alpha, "local_ws": entry.window}),
        entry.name,
        pretrained,
        pretrained_cfg=pretrained_cfg,  # type: ignore[arg-type]  # timm also accepts its tag
        pretrained_cfg_overlay=overlay,
        pretrained_filter_fn=_fitting,
        feature_cfg=dict(out_indices=out_indices, feature_cls=feature_cls),
        cache_dir=cache_dir,
        **kwargs,
    )
    for part in model.modules():
        if hasattr(part, "pretrained_cfg"):
            cast("dict", part.pretrained_cfg).pop("state_dict", None)  # the weights are in the model now
    return model.to(device=device, dtype=dtype)


def _entry_point(entry: Release) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **kwargs) -> nn.Module:
        return _create(entry, pretrained, **kwargs)

    create.__name__ = create.__qualname__ = entry.name
    return create


_CLASSIFIERS = [entry for entry in ZOO.values() if entry.task == "classification"]
default_cfgs = generate_default_cfgs({entry.name: _default_cfg(entry) for entry in _CLASSIFIERS})  # register_model reads it
for entry in _CLASSIFIERS:
    globals()[entry.name] = register_model(_entry_point(entry))
