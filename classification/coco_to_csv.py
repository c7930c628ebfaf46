# SPDX-License-Identifier: Apache-2.0
"""Writes the table of a multi-label data set from COCO annotations: which categories have an object in each image. From this folder:

    python coco_to_csv.py DIR/annotations/instances_train2017.json --images DIR/train2017 --out DIR/train.csv
    python coco_to_csv.py DIR/annotations/instances_val2017.json --images DIR/val2017 --out DIR/val.csv

The table has a column for each category, so that those of training and validation fit each other. ``DATA.DATASET csv`` reads it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # litv2 of this checkout, installed or not

from data.table import IMAGE, LABELS
from litv2.coco import read_annotations
from litv2.errors import UserError, listed, run_program
from report import write_csv


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("annotations", type=Path, metavar="JSON", help="COCO's file of instances")
    parser.add_argument("--images", required=True, type=Path, metavar="DIR", help="folder of its images")
    parser.add_argument("--out", required=True, type=Path, metavar="CSV", help="the table, in a folder above the images")
    parser.add_argument("--supercategories", action="store_true", help="COCO's 12 groups, such as animal, instead of its 80 categories")
    args = parser.parse_args(argv)

    folder, root = args.images.resolve(), args.out.parent.resolve()
    if not folder.is_relative_to(root):
        raise UserError(f"--images {args.images} must lie below {root}, the folder of --out: the table's paths start there")
    content, prefix = read_annotations(args.annotations), folder.relative_to(root)
    try:
        names = {category["id"]: category["supercategory" if args.supercategories else "name"] for category in content["categories"]}
        images = {image["id"]: image["file_name"] for image in content["images"]}
        found: dict = {number: set() for number in images}
        for annotation in content["annotations"]:
            found[annotation["image_id"]].add(names[annotation["category_id"]])
        columns = sorted(set(names.values()))
        rows = [[(prefix / images[number]).as_posix(), *(int(name in found[number]) for name in columns)] for number in images]
    except (KeyError, TypeError) as error:
        raise UserError(f"{args.annotations} is not a COCO file of instances: {type(error).__name__} {error}") from error
    if reserved := {IMAGE, LABELS}.intersection(columns):
        raise UserError(f"{args.annotations} has a category {listed(reserved)}, which is the name of a column of the table")
    write_csv(args.out, [[IMAGE, *columns], *rows])
    print(f"{args.out}: {len(images)} images, {len(columns)} classes, {sum(map(len, found.values())) / max(len(images), 1):.2f} per image")


if __name__ == "__main__":
    sys.exit(run_program(main))
