# SPDX-License-Identifier: Apache-2.0
"""Images as a classifier sees them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import TINY, tiny_model
from litv2 import LITv2
from litv2.errors import UserError
from litv2.explain.loading import load_subject
from litv2.preprocess import MEAN, STD


@pytest.fixture
def checkpoint(tmp_path):
    """Returns a function that writes a tiny classifier's checkpoint for images of a size."""

    def write(size: int, crop: bool = True, in_chans: int = 3):
        config = dict(MODEL=dict(LIT=dict(NUM_HEADS=list(TINY["num_heads"]))), DATA=dict(IMG_SIZE=size), TEST=dict(CROP=crop))
        torch.save(dict(model=LITv2(**TINY, in_chans=in_chans).state_dict(), config=config), tmp_path / "tiny.pth")
        return tmp_path / "tiny.pth"

    return write


@pytest.mark.parametrize("crop", [True, False])
@pytest.mark.parametrize("size", [(250, 140), (101, 200), (90, 90), (33, 47)])
def test_positions_in_the_image_and_in_the_tensor(checkpoint, size, crop):
    """Of an image whose red is the column and whose green is the row, the tensor shows which position it took each pixel from."""
    width, height = size
    columns, rows = np.meshgrid(np.arange(width, dtype=np.uint8), np.arange(height, dtype=np.uint8))
    picture = Image.fromarray(np.stack((columns, rows, rows * 0), axis=-1))
    view = load_subject(checkpoint(96, crop)).view(picture)
    shown = (view.tensor[0] * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)) * 255 + 0.5  # middles of pixels
    left, top, right, bottom = view.box
    for x in range(int(left) + 3, int(right) - 3, 7):
        for y in range(int(top) + 3, int(bottom) - 3, 7):
            u, v = view.to_tensor(x + 0.5, y + 0.5)
            red, green = shown[:2, min(int(v), 95), min(int(u), 95)].tolist()
            step = max(right - left, bottom - top) / 96  # of the position within a pixel of the tensor
            assert abs(red - (x + 0.5)) <= 0.6 + step and abs(green - (y + 0.5)) <= 0.6 + step
    assert view.seen.size == (round(right) - round(left), round(bottom) - round(top))
    assert view.tensor.shape == (1, 3, 96, 96) and view.size == (96, 96)


def test_position_that_is_not_seen(checkpoint):
    view = load_subject(checkpoint(64)).view(Image.new("RGB", (200, 100)))
    for x, y in ((20, 50), (180, 50), (100, 99.5), (-1, 50), (float("nan"), 50)):
        with pytest.raises(UserError, match="does not see position .* it sees columns 56 to 144 and rows 5 to 93 of 200 x 100 pixels"):
            view.to_tensor(x, y)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "I;16"])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_images_of_any_mode(checkpoint, mode, in_chans):
    view = load_subject(checkpoint(64, in_chans=in_chans)).view(Image.new(mode, (70, 90)))
    assert view.tensor.shape == (1, in_chans, 64, 64) and view.picture.mode == "RGB"


def test_wrong_sizes_and_devices(checkpoint):
    path = checkpoint(64)
    with pytest.raises(UserError, match="an image size of 16 pixels is too small: this model needs at least 32"):
        load_subject(path, img_size=16)
    with pytest.raises(UserError, match="--device nowhere"):
        load_subject(path, device="nowhere")
    assert load_subject(path, img_size=96).view(Image.new("RGB", (70, 90))).tensor.shape == (1, 3, 96, 96)
    assert isinstance(load_subject(path).network, type(tiny_model()))
