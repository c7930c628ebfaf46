# SPDX-License-Identifier: Apache-2.0
"""The classifier with what it has for own data: each set of settings is a task of its own, with the files that the settings name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from litv2 import LITv2

from .tasks import Classification, Task

PRETRAINED = "MODEL.PRETRAINED={data}/other.pth"
SETTINGS = {
    "weights": ("TRAIN.CLASS_WEIGHTS=auto",),
    "sampling": ("DATA.SAMPLING=balanced",),
    "freezing": (PRETRAINED, "TRAIN.FREEZE=2"),
    "unfreezing": (PRETRAINED, "TRAIN.FREEZE=head", "TRAIN.UNFREEZE_EVERY=1"),
    "other-classes": (PRETRAINED,),
    "multi-label": ("DATA.DATASET=csv", "MODEL.TASK=multi", "TRAIN.MULTI_LABEL_LOSS=asymmetric"),
    # Nothing is better than the first mAP, of images that have all classes.
    "patience": ("DATA.DATASET=csv", "MODEL.TASK=multi", "DATA.VAL_SPLIT=full", "TRAIN.EPOCHS=9", "TRAIN.PATIENCE=2"),
    "teacher": ("DISTILL.TEACHER={data}/teacher.pth", "DISTILL.FEATURES=1.0"),
}


class OwnData(Classification):
    counts = {"a": 31, "b": 9}

    def __init__(self, name: str, data: Path):
        super().__init__(data)
        self.name = name
        self.settings = tuple(setting.format(data=data) for setting in SETTINGS[name])
        images = sorted(data.rglob("*.png"))
        for split in ("train", "val", "full"):
            folder = "val" if split == "full" else split
            rows = [
                f"{image.relative_to(data).as_posix()},{'a|b' if split == 'full' or i % 3 == 0 else image.parent.name}"
                for i, image in enumerate(images) if image.is_relative_to(data / folder)
            ]  # fmt: skip
            (data / f"{split}.csv").write_text("\n".join(["image,labels", *rows]) + "\n")
        torch.manual_seed(0)
        for file, width, classes in (("other", 16, ["c", "a"]), ("teacher", 32, ["a", "b"])):
            model = LITv2(num_classes=2, embed_dim=width, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), patch_size=2)
            torch.save(dict(model=model.state_dict(), class_names=classes), data / f"{file}.pth")

    def arguments(self, out: Path, processes: int, workers: int, more: tuple[str, ...] = ()) -> list[str]:
        return super().arguments(out, processes, workers, (*self.settings, *more))


OWN_DATA: dict[str, Callable[[Path], Task]] = {name: partial(OwnData, name) for name in SETTINGS}
