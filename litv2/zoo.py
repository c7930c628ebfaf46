"""The model zoo: every file of the public release as data, and models by name with their weights.

    model = create_model("litv2_small", pretrained=True)           # the published weights, downloaded once
    model = create_model("litv2_base", pretrained="best.pth", num_classes=37)

``python -m litv2 list`` prints the table. Figures are those that the paper and the release report.
"""

from __future__ import annotations

import difflib
import warnings
from dataclasses import dataclass
from pathlib import Path

from .checkpoint import find_weights, infer_arguments, load_weights, read_checkpoint
from .download import fetch
from .model import LITv2, litv2_base, litv2_medium, litv2_small

__all__ = ["ZOO", "Entry", "create_model", "load_model", "lookup"]

RELEASES = "https://github.com/ziplab/LITv2/releases/download"
COSTS = {  # parameters in M and multiply-adds in G, as the paper's tables and the release print them
    "litv2_small": ("27.844", "3.734"),
    "litv2_medium": ("48.830", "7.479"),
    "litv2_base": ("86.521", "13.194"),
    "litv2_base_384": ("86.521", "39.709"),
    "litv2_small_alpha00": (None, "3.965"),
    "litv2_small_alpha02": (None, "3.881"),
    "litv2_small_alpha04": (None, "3.815"),
    "litv2_small_alpha05": (None, "3.769"),
    "litv2_small_alpha07": (None, "3.742"),
    "litv2_small_alpha09": (None, "3.734"),
    "litv2_small_alpha10": (None, "3.70"),
    "retinanet_litv2_s_fpn_1x_coco": ("38.01", "242.39"),
    "retinanet_litv2_s_fpn_1x_coco_ws_4": ("38", "230"),
    "retinanet_litv2_m_fpn_1x_coco": ("59", "348"),
    "retinanet_litv2_m_fpn_1x_coco_ws_4": ("59", "312"),
    "retinanet_litv2_b_fpn_1x_coco": ("97", "481"),
    "retinanet_litv2_b_fpn_1x_coco_ws_4": ("97", "430"),
    "mask_rcnn_litv2_s_fpn_1x_coco": ("47", "261"),
    "mask_rcnn_litv2_s_fpn_1x_coco_ws_4": ("47", "249"),
    "mask_rcnn_litv2_m_fpn_1x_coco": ("68", "367"),
    "mask_rcnn_litv2_m_fpn_1x_coco_ws_4": ("68", "315"),
    "mask_rcnn_litv2_b_fpn_1x_coco": ("106", "500"),
    "mask_rcnn_litv2_b_fpn_1x_coco_ws_4": ("106", "449"),
    "litv2_s_fpn_r50_512x512_80k_ade20k": ("31.45", "41.29"),
    "litv2_m_fpn_r50_512x512_80k_ade20k": ("52", "63"),
    "litv2_b_fpn_r50_512x512_80k_ade20k": ("90", "93"),
}
VARIANTS = {"small": litv2_small, "medium": litv2_medium, "base": litv2_base}


@dataclass(frozen=True)
class Entry:
    """One published file.

    ``task`` is classification, detection or segmentation; ``window`` is ``local_ws`` of the model; ``figures`` has the published
    accuracies in percent by metric; ``parameters`` in M and ``gflops``, multiply-adds in G, are as they were printed (detectors at
    800 x 1280); ``image_size`` is (height, width) of the recipe in pixels; ``config`` is the stem of the configuration in detection/
    or segmentation/, None for a classifier.
    """

    name: str
    file: str
    url: str
    task: str
    variant: str
    alpha: float
    window: tuple[int, int, int, int]
    figures: dict[str, float]
    parameters: str | None
    gflops: str
    image_size: tuple[int, int]
    config: str | None = None


def _entries() -> list[Entry]:
    def add(name, file, task, variant, figures, size, tag="v1.0", alpha=0.9, window=(0, 0, 2, 1)) -> None:
        config = None if task == "classification" else name
        entries.append(Entry(name, file, f"{RELEASES}/{tag}/{file}", task, variant, alpha, window, figures, *COSTS[name], size, config))

    entries: list[Entry] = []
    for variant, top1 in (("small", 82.0), ("medium", 83.3), ("base", 83.6)):
        add(f"litv2_{variant}", f"litv2_{variant[0]}.pth", "classification", variant, {"top-1": top1}, (224, 224))
    add("litv2_base_384", "litv2_b_384.pth", "classification", "base", {"top-1": 84.7}, (384, 384))
    for text, top1 in (("0", 81.16), ("0.2", 81.89), ("0.4", 81.81), ("0.5", 81.88), ("0.7", 81.94), ("0.9", 82.03), ("1", 81.89)):
        alpha = float(text)
        name = f"litv2_small_alpha{round(10 * alpha):02d}"  # no dots: in timm's names they begin the tag of the weights
        add(name, f"alpha_{text}.pth", "classification", "small", {"top-1": top1}, (224, 224), tag="v1.1", alpha=alpha)

    detectors = {  # (box AP[, mask AP]) with the windows of the classifier, then with 4 x 4 in stage 3
        "retinanet": {"small": ((44.0,), (43.7,)), "medium": ((46.0,), (45.8,)), "base": ((46.7,), (46.3,))},
        "mask_rcnn": {"small": ((44.9, 40.8), (44.7, 40.7)), "medium": ((46.8, 42.3), (46.5, 42.0)), "base": ((47.3, 42.6), (46.8, 42.3))},
    }
    for detector, variants in detectors.items():
        for suffix, window, column in (("", (0, 0, 2, 1), 0), ("_ws_4", (0, 0, 4, 1), 1)):
            for variant, columns in variants.items():
                name = f"{detector}_litv2_{variant[0]}_fpn_1x_coco{suffix}"
                figures = dict(zip(("box AP", "mask AP"), columns[column]))
                add(name, f"{name}.pth", "detection", variant, figures, (800, 1333), window=window)
    for variant, miou in (("small", 44.3), ("medium", 45.7), ("base", 47.2)):
        name = f"litv2_{variant[0]}_fpn_r50_512x512_80k_ade20k"
        add(name, f"{name}.pth", "segmentation", variant, {"mIoU": miou}, (512, 512))
    return entries


ZOO: dict[str, Entry] = {entry.name: entry for entry in _entries()}


def lookup(name: str, task: str | None = None) -> Entry:
    """The entry of a name.

    Raises:
        ValueError: there is none (of this task); the message lists the names that are close.
    """
    names = [entry.name for entry in ZOO.values() if task in (None, entry.task)]
    if name not in names:
        close = difflib.get_close_matches(name, names, n=4, cutoff=0.5) or names[:4]
        kind = f"{task} model" if task else "model"
        raise ValueError(f"there is no {kind} {name!r}; close to it: {', '.join(close)} (python -m litv2 list shows all)")
    return ZOO[name]


def create_model(name: str, pretrained: bool | str | Path | None = None, **kwargs) -> LITv2:
    """A classifier of the zoo by its name.

    Args:
        pretrained: None or False for random weights, True for the published ones, or where to take them from: another name, a path or
            a URL, of any format that :func:`litv2.checkpoint.find_weights` knows.
        kwargs: arguments of :class:`litv2.LITv2` that differ from the published model's. With another ``num_classes`` than the
            file's the head keeps its initialisation, which is warned about; with 0 the file's head is left out.

    Raises:
        ValueError: an unknown name, or weights that do not fit.
        OSError: the weights cannot be found or downloaded.
    """
    entry = lookup(name, task="classification")
    model = VARIANTS[entry.variant](**{"alpha": entry.alpha, "local_ws": entry.window, **kwargs})
    if pretrained is None or pretrained is False:
        return model
    source = entry.name if pretrained is True else pretrained
    weights = find_weights(read_checkpoint(fetch(source)))
    unused = {"head.weight", "head.bias"} if model.num_classes == 0 else ()
    try:
        notes = load_weights(model, weights, new_heads=("head",), may_have=unused)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    for note in notes:
        if "newly" in note:
            warnings.warn(f"{source}: {note}", stacklevel=2)
    return model


def load_model(source: str | Path, name: str | None = None) -> tuple[LITv2, dict]:
    """The classifier in a file, of the architecture and the classes that the file has, and the content of the checkpoint.

    Args:
        source: a path, a URL or a name of the zoo.
        name: the model's name in the zoo; None for what the weights' shapes and the checkpoint's configuration say.

    Raises:
        ValueError: no weights of a classifier, or weights of another model.
        OSError: the weights cannot be found or downloaded.
    """
    content = read_checkpoint(fetch(source))
    weights = find_weights(content)
    classes = len(weights["head.weight"]) if "head.weight" in weights else 0
    if not classes:
        raise ValueError(f"{source} has no classifier: detectors and segmenters are used through their configurations")
    model = create_model(name, num_classes=classes) if name else LITv2(**infer_arguments(weights, content.get("config")))
    try:
        load_weights(model, weights)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    return model, content
