# SPDX-License-Identifier: Apache-2.0
"""The model zoo: every file of the public release as data, with the figures of the paper and the release.

``python -m litv2 list`` prints the table.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError

__all__ = ["ZOO", "Release", "lookup", "release_of"]

DOWNLOADS = "https://github.com/ziplab/LITv2/releases/download"


@dataclass(frozen=True)
class Release:
    """One published file.

    ``task`` is classification, detection or segmentation; ``figures`` maps metrics to the published accuracies in percent;
    ``parameters`` (in M) and ``gflops`` (multiply-adds in G, detectors at 800 x 1280) are given as printed; ``image_size`` is the
    (height, width) of the recipe in pixels; ``path`` is the release's tag and the file's name, "" for v1.0/NAME.pth; ``window`` is
    the model's ``local_ws``.
    """

    name: str
    task: str
    variant: str
    figures: dict[str, float]
    parameters: str | None
    gflops: str
    image_size: tuple[int, int]
    path: str = ""
    alpha: float = 0.9
    window: tuple[int, int, int, int] = (0, 0, 2, 1)

    @property
    def file(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def url(self) -> str:
        return f"{DOWNLOADS}/{self.path or f'v1.0/{self.name}.pth'}"

    @property
    def config(self) -> str | None:
        """Stem of the configuration in detection/ or segmentation/, None for a classifier."""
        return None if self.task == "classification" else self.name


COCO, ADE20K = (800, 1333), (512, 512)  # image sizes
WS_4 = (0, 0, 4, 1)  # windows of 4 x 4 in stage 3: ws_4 in the file names
_RELEASES = [  # names have no dots: in timm's names a dot starts the tag of the weights
    Release("litv2_small", "classification", "small", {"top-1": 82.0}, "27.844", "3.734", (224, 224), "v1.0/litv2_s.pth"),
    Release("litv2_medium", "classification", "medium", {"top-1": 83.3}, "48.830", "7.479", (224, 224), "v1.0/litv2_m.pth"),
    Release("litv2_base", "classification", "base", {"top-1": 83.6}, "86.521", "13.194", (224, 224), "v1.0/litv2_b.pth"),
    Release("litv2_base_384", "classification", "base", {"top-1": 84.7}, "86.521", "39.709", (384, 384), "v1.0/litv2_b_384.pth"),
    Release("litv2_small_alpha00", "classification", "small", {"top-1": 81.16}, None, "3.965", (224, 224), "v1.1/alpha_0.pth", alpha=0.0),
    Release("litv2_small_alpha02", "classification", "small", {"top-1": 81.89}, None, "3.881", (224, 224), "v1.1/alpha_0.2.pth", alpha=0.2),
    Release("litv2_small_alpha04", "classification", "small", {"top-1": 81.81}, None, "3.815", (224, 224), "v1.1/alpha_0.4.pth", alpha=0.4),
    Release("litv2_small_alpha05", "classification", "small", {"top-1": 81.88}, None, "3.769", (224, 224), "v1.1/alpha_0.5.pth", alpha=0.5),
    Release("litv2_small_alpha07", "classification", "small", {"top-1": 81.94}, None, "3.742", (224, 224), "v1.1/alpha_0.7.pth", alpha=0.7),
    Release("litv2_small_alpha09", "classification", "small", {"top-1": 82.03}, None, "3.734", (224, 224), "v1.1/alpha_0.9.pth"),
    Release("litv2_small_alpha10", "classification", "small", {"top-1": 81.89}, None, "3.70", (224, 224), "v1.1/alpha_1.pth", alpha=1.0),
    Release("retinanet_litv2_s_fpn_1x_coco", "detection", "small", {"box AP": 44.0}, "38.01", "242.39", COCO),
    Release("retinanet_litv2_m_fpn_1x_coco", "detection", "medium", {"box AP": 46.0}, "59", "348", COCO),
    Release("retinanet_litv2_b_fpn_1x_coco", "detection", "base", {"box AP": 46.7}, "97", "481", COCO),
    Release("retinanet_litv2_s_fpn_1x_coco_ws_4", "detection", "small", {"box AP": 43.7}, "38", "230", COCO, window=WS_4),
    Release("retinanet_litv2_m_fpn_1x_coco_ws_4", "detection", "medium", {"box AP": 45.8}, "59", "312", COCO, window=WS_4),
    Release("retinanet_litv2_b_fpn_1x_coco_ws_4", "detection", "base", {"box AP": 46.3}, "97", "430", COCO, window=WS_4),
    Release("mask_rcnn_litv2_s_fpn_1x_coco", "detection", "small", {"box AP": 44.9, "mask AP": 40.8}, "47", "261", COCO),
    Release("mask_rcnn_litv2_m_fpn_1x_coco", "detection", "medium", {"box AP": 46.8, "mask AP": 42.3}, "68", "367", COCO),
    Release("mask_rcnn_litv2_b_fpn_1x_coco", "detection", "base", {"box AP": 47.3, "mask AP": 42.6}, "106", "500", COCO),
    Release("mask_rcnn_litv2_s_fpn_1x_coco_ws_4", "detection", "small", {"box AP": 44.7, "mask AP": 40.7}, "47", "249", COCO, window=WS_4),
    Release("mask_rcnn_litv2_m_fpn_1x_coco_ws_4", "detection", "medium", {"box AP": 46.5, "mask AP": 42.0}, "68", "315", COCO, window=WS_4),
    Release("mask_rcnn_litv2_b_fpn_1x_coco_ws_4", "detection", "base", {"box AP": 46.8, "mask AP": 42.3}, "106", "449", COCO, window=WS_4),
    Release("litv2_s_fpn_r50_512x512_80k_ade20k", "segmentation", "small", {"mIoU": 44.3}, "31.45", "41.29", ADE20K),
    Release("litv2_m_fpn_r50_512x512_80k_ade20k", "segmentation", "medium", {"mIoU": 45.7}, "52", "63", ADE20K),
    Release("litv2_b_fpn_r50_512x512_80k_ade20k", "segmentation", "base", {"mIoU": 47.2}, "90", "93", ADE20K),
]  # fmt: skip
ZOO: dict[str, Release] = {release.name: release for release in _RELEASES}


def lookup(name: str, task: str | None = None) -> Release:
    """Returns the release of this name.

    Raises:
        UserError: there is none (for this task); the message lists similar names.
    """
    names = [release.name for release in ZOO.values() if task in (None, release.task)]
    if name not in names:
        close = difflib.get_close_matches(name, names, n=4, cutoff=0.5) or names[:4]
        kind = f"{task} model" if task else "model"
        raise UserError(f"there is no {kind} {name!r}; similar names: {', '.join(close)} (python -m litv2 list shows all)")
    return ZOO[name]


def release_of(source: str | Path) -> Release | None:
    """Returns the release with this name or file name, or None; only the last part of a path or URL counts."""
    file = str(source).replace("\\", "/").rpartition("/")[2]
    return ZOO.get(str(source)) or next((release for release in ZOO.values() if release.file == file), None)
