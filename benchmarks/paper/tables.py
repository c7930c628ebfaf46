# SPDX-License-Identifier: Apache-2.0
"""The paper's tables and figures by name, and the page that collects them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from litv2.files import atomic_write

from . import classifiers, dense, layers, spectra
from .measuring import Result, Setting


@dataclass(frozen=True)
class Table:
    """What makes it, its title, what is to be said below it, and on what its measured columns are measured."""

    make: Callable[[Setting], Result]
    title: str
    note: str = ""
    measured: str = ""

    def text(self, setting: Setting) -> str:
        """The paragraph below it."""
        if not (self.measured and setting.measure):
            return self.note
        measured = f"Measured in float32, {self.measured.format(batch=setting.batch_size)}"
        return f"{self.note} {measured}. Timed rounds: {setting.rounds}; times are their medians, p10 and p90 percentiles."


MEMORY = "batch size {batch}; MiB are what a training step, or a forward pass, allocates beyond weights, images and optimizer state"
OTHERS = (
    "Of the paper's accuracies, images/s and memory, those of LITv2-S alone are at hand, which the release repeats (one RTX 3090, batches "
    "of 64); the other cells are empty for that."
)
DENSE = (
    "Accuracies are published; those of weights and data at hand are measured by {task}/tools/test.py CONFIG FILE. Multiply-adds are the "
    "release's count, without the deformable convolutions."
)
FRAMES = "one random image at a time, from image to result, with random weights"
TABLES = {
    "main": Table(
        classifiers.main_table,
        "LITv2: parameters (M), multiply-adds of one image (G), top-1 (%)",
        "Accuracies are published; those of weights and images at hand are measured by classification/main.py --resume FILE --eval. "
        "The release's figures are of an RTX 3090 and batches of 64, and its memory includes the weights.",
        MEMORY,
    ),
    "attention": Table(
        classifiers.attention_table,
        "LITv2-S with other attention (table 4)",
        "SRA's 3.920 G are printed as 4.0. A formula that counts the reducing convolution at the ratio of 1 too, in the last stage, where "
        "PVT and the printed 32 M have none, would give 3.977, and 3.992 for T-MSA; no public source says that this was done. Softmax, "
        "norms and biases, which counters treat differently, are much less than the missing 0.03 G. W-MSA has no shift here, which would "
        f"cost no multiply-adds. {OTHERS}",
        MEMORY,
    ),
    "lit": Table(
        classifiers.lit_table,
        "From LIT to LITv2 (table 5), and LIT's sizes",
        "bare_M is without the classifier and the tables of relative positions: LIT-S, M and B have the printed digits so, but LIT-S + "
        "ConvFFN, which the same paper prints as 28, has not. LIT's repository prints 27, 48 and 86 too, its trainer logs the number of "
        f"all parameters, and no public source says what was left out. {OTHERS}",
        MEMORY,
    ),
    "figure2": Table(
        layers.figure2, f"Multiply-adds (G) of a layer of {layers.WIDTH} channels and {layers.HEADS} heads by side of the image (figure 2)"
    ),
    "figure3": Table(
        layers.figure3,
        "One attention layer of 768 channels and 12 heads against resolution (figure 3)",
        "T-MSA is Local Window and SRA in turns. Calls of more than 300 G multiply-adds are not measured.",
        "one map at a time; inference is a forward pass, training is forward and backward; MiB are what a call allocates beyond its input "
        "and weights",
    ),
    "alpha": Table(
        classifiers.alpha_table,
        "LITv2-S over the share of Lo-Fi heads (figure 4)",
        "Accuracies are published, parameters are not. At alpha = 1 the printed 3.70 is the count without the products of stage 3's "
        "attention.",
        MEMORY,
    ),
    "figure5": Table(
        spectra.figure5,
        "Energy of the outputs of Hi-Fi and Lo-Fi above half of the Nyquist frequency (figure 5)",
        "In %, with the ends of a 95 % interval over the images. layers.2.blocks.0 is block 1 of stage 3. Blocks without windows have no "
        "Hi-Fi heads; the picture is of the others.",
    ),
    "windows": Table(
        dense.windows_table,
        "Detectors with windows of 2 x 2 and of 4 x 4 in stage 3, at 1280 x 800",
        DENSE.format(task="detection"),
        FRAMES,
    ),
    "layers": Table(
        layers.layers_table,
        "One attention layer of 768 channels and 12 heads, 14 x 14 tokens",
        "Published are images/s with batches of 64 on a Core i9-10900X and an RTX 3090.",
        "batch size {batch}; MiB are what a forward pass allocates beyond input and weights",
    ),
    "detection": Table(dense.detection_table, "Detectors on COCO, at 1280 x 800", DENSE.format(task="detection"), FRAMES),
    "segmentation": Table(dense.segmentation_table, "Segmenters on ADE20K, at 512 x 512", DENSE.format(task="segmentation"), FRAMES),
}
PAGE = """# The paper's tables and figures

Columns that start with paper, published, release or RTX3090 are published; all others are counted or measured here. Parameters are in M,
multiply-adds of one image in G or M, accuracies in %."""


def write_page(out: Path, left_out: dict[str, str]) -> Path:
    """Writes OUT.md: each table that this run or an earlier one wrote as OUT-NAME.md, and why others were left out."""
    written = [out.with_name(f"{out.name}-{name}.md") for name in TABLES]
    parts = [PAGE, *(path.read_text().strip() for path in written if path.exists())]
    for reason in dict.fromkeys(left_out.values()):
        parts.append(f"Left out: {', '.join(name for name in left_out if left_out[name] == reason)}. The reason: {reason}")
    page = out.with_name(f"{out.name}.md")
    with atomic_write(page) as draft:
        draft.write_text("\n\n".join(parts) + "\n")
    return page
