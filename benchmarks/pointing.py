# SPDX-License-Identifier: Apache-2.0
"""The pointing game (arXiv 1608.00507): whether the maximum of a class activation map lies on what the map is of.

    python benchmarks/pointing.py ANNOTATIONS.json FOLDER --checkpoint FILE                  # a classifier
    python benchmarks/pointing.py ANNOTATIONS.json FOLDER --checkpoint FILE --config FILE    # a detector

Annotations are COCO's, FOLDER holds their images. A detector's maps are of each annotated box, by the score of its class there; a hit is a
maximum inside the box. A classifier's map is of the class that it predicts, which need not be annotated: a hit is a maximum inside any
annotated box, so that the figure says whether it looks at objects, whatever it calls them. Crowds are left out, and so is what the model
does not see.

Of several maxima, the share inside counts. So a map that is 0 everywhere, because nothing speaks for the class or a detector has no box
there, counts as a random position; "empty" is the share of such maps.

Beside the maps stand the centre of the image and a random position, whose chance is the share of the image that the boxes cover. Figures
are means over boxes (of a detector) or images with 95 % intervals, by bootstrap over images; "over_centre" and "over_random" are those of
paired differences. A map of a score that depends on one place of the network's map is local whatever the network has learned: compare a
detector with the same one without training.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from harness import parser, publish, say
from litv2.errors import UserError, run_program
from litv2.explain.activation import METHODS, cam
from litv2.explain.loading import load_subject
from litv2.explain.subjects import Subject, View
from litv2.preprocess import read_image

WAYS = [*METHODS, "centre", "random"]
Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels of the picture


def main() -> None:
    flags = parser(__doc__, "pointing", threads=False)
    flags.add_argument("annotations", type=Path)
    flags.add_argument("folder", type=Path)
    flags.add_argument("--checkpoint", required=True, metavar="FILE")
    flags.add_argument("--config", metavar="FILE")
    flags.add_argument("--limit", type=int, metavar="N", help="only the first N images")
    args = flags.parse_args()
    subject = load_subject(args.checkpoint, config=args.config)
    if subject.task == "segmentation":
        raise UserError("the pointing game is for classifiers and detectors, not for segmenters")
    outcomes = []  # of each image: (targets, WAYS and METHODS)
    for name, boxes in annotated(args.annotations)[: args.limit]:
        view = subject.view(read_image(args.folder / name))
        found = [points(subject, view, target) for target in targets(subject, boxes)]
        if found:
            outcomes.append(np.array(found))
        say(f"{name}: {len(found)} targets")
    if not outcomes:
        raise UserError(f"{args.annotations}: none of the annotated boxes can be pointed at by this model")
    title = f"pointing game, {sum(map(len, outcomes))} targets in {len(outcomes)} images"
    publish(rows(outcomes), args.out, title, checkpoint=args.checkpoint)


def annotated(path: Path) -> list[tuple[str, list[tuple[str, Box]]]]:
    """Returns the file name of each image and its boxes with their classes."""
    content = json.loads(path.read_text())
    classes = {category["id"]: category["name"] for category in content["categories"]}
    boxes = defaultdict(list)
    for entry in content["annotations"]:
        if not entry.get("iscrowd"):
            x, y, width, height = entry["bbox"]
            boxes[entry["image_id"]].append((classes[entry["category_id"]], (x, y, x + width, y + height)))
    return [(image["file_name"], boxes[image["id"]]) for image in content["images"]]


def targets(subject: Subject, boxes: list[tuple[str, Box]]) -> list[tuple[int | None, list[Box]]]:
    """What is pointed at: of a detector each box with the number of its class, of a classifier all boxes at once."""
    if subject.task == "classification":
        return [(None, [box for _, box in boxes])] if boxes else []
    return [(subject.names.index(name), [box]) for name, box in boxes if name in subject.names]


def points(subject: Subject, view: View, target: tuple[int | None, list[Box]]) -> list[float]:
    """Hits of each way of pointing, then of each method whether its map is empty."""
    label, boxes = target
    inside = mask(view, boxes)
    if label is None:
        model, score, _ = subject.scored(view)
    else:
        from litv2.explain.dense import score_of_box

        model, score = subject.boxes(view), score_of_box(torch.tensor(in_tensor(view, boxes[0]), device=view.tensor.device), label)
    H, W = view.size
    maps = [cam(model, view.tensor, score, method)[0, :H, :W].numpy() for method in METHODS]
    hits = [inside[values == values.max()].mean() for values in maps]
    return [*hits, float(inside[H // 2, W // 2]), inside.mean(), *(float(values.max() == 0) for values in maps)]


def mask(view: View, boxes: list[Box]) -> np.ndarray:
    """(H, W): whether the middle of each pixel of the tensor lies in one of the boxes."""
    y, x = np.mgrid[: view.size[0], : view.size[1]] + 0.5
    inside = np.zeros(view.size, dtype=bool)
    for box in boxes:
        left, top, right, bottom = in_tensor(view, box)
        inside |= (left <= x) & (x < right) & (top <= y) & (y < bottom)
    return inside


def in_tensor(view: View, box: Box) -> Box:
    (left, top, right, bottom), (H, W) = view.box, view.size
    (x0, x1), (y0, y1) = ([(x - left) * W / (right - left) for x in box[::2]], [(y - top) * H / (bottom - top) for y in box[1::2]])
    return x0, y0, x1, y1


def rows(outcomes: list[np.ndarray]) -> list[dict]:
    count, total = np.array([len(each) for each in outcomes]), np.stack([each.sum(0) for each in outcomes])
    chosen = np.random.default_rng(0).integers(0, len(outcomes), (10_000, len(outcomes)))
    resampled = dict(zip(WAYS, (total[chosen].sum(1) / count[chosen].sum(1)[:, None]).T))
    mean = total.sum(0) / count.sum()
    empty = dict(zip(METHODS, mean[len(WAYS) :]))
    return [
        dict(
            points_at=way,
            hits=f"{mean[i]:.1%}",
            interval=interval(resampled[way]),
            over_centre=interval(resampled[way] - resampled["centre"]) if way in METHODS else None,
            over_random=interval(resampled[way] - resampled["random"]) if way in METHODS else None,
            empty=f"{empty[way]:.1%}" if way in METHODS else None,
        )
        for i, way in enumerate(WAYS)
    ]


def interval(values: np.ndarray) -> str:
    low, high = np.quantile(values, (0.025, 0.975))
    return f"{low:.1%} to {high:.1%}"


if __name__ == "__main__":
    raise SystemExit(run_program(main))
