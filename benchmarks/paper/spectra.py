# SPDX-License-Identifier: Apache-2.0
"""Figure 5: the spectra of Hi-Fi and Lo-Fi, as ``litv2 explain --what spectrum`` draws them."""

from __future__ import annotations

from pathlib import Path

from litv2.errors import UserError
from litv2.image_list import image_list
from litv2.preprocess import read_image

from .measuring import Result, Setting


def figure5(setting: Setting) -> Result:
    """A row per branch of each block: the share of the energy above half of the Nyquist frequency, with a 95 % interval over the images.

    Raises:
        UserError: there are no images, or the checkpoint cannot be explained.
    """
    if not setting.images:
        raise UserError("figure5 is drawn of images: add --images DIR, a folder of those that the checkpoint is for, or some images")
    from litv2.explain import spectrum
    from litv2.explain.drawing import draw_spectrum
    from litv2.explain.frequencies import mean_with_interval
    from litv2.explain.loading import load_subject

    paths = image_list(setting.images)
    subject = load_subject(setting.checkpoint, device=setting.device)
    spectra = spectrum(subject.model, (subject.view(read_image(path)).tensor for path in paths))
    rows = []
    for part in spectra:
        share = dict(zip(("share_%", "from_%", "to_%"), (round(100 * value, 2) for value in mean_with_interval(part.high))))
        rows.append(dict(block=part.block, branch={"hifi": "Hi-Fi", "lofi": "Lo-Fi"}[part.branch], images=len(paths), **share))

    def draw(rows: list[dict], path: Path) -> None:
        draw_spectrum(spectra).savefig(path)

    return rows, draw
