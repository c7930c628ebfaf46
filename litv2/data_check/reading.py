# SPDX-License-Identifier: Apache-2.0
"""Reads each image of a listing once, in worker processes: its size and mode, its fingerprints, and if wanted a model's input."""

from __future__ import annotations

import hashlib
import io
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import MissingPackage
from ..files import is_shortage
from ..preprocess import FORMATS, decode
from ..runs.failures import in_one_line, start_worker
from .listing import Entry

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["HASH_SIDE", "Reading", "fingerprints", "read_images"]

HASH_SIDE = 16  # a perceptual hash has 16 x 16 bits: with 8 x 8, one in 100,000 pairs of photographs differs by no more than copies do
BATCH = 32
FLAT = 8  # grey levels of 255: the structure of a picture that varies less is noise
ORIENTATION = 0x0112  # of EXIF


@dataclass(frozen=True, slots=True)
class Reading:
    """What is known of an image. ``problem`` says why it cannot be read; then only ``entry`` is known.

    Attributes:
        mode: Pillow's, of the file: RGB, L, P, CMYK ...
        turned: whether EXIF asks viewers to turn or mirror it; training does not.
        pixels: a digest of the decoded pixels.
        bits: the perceptual hash, 32 bytes; None for a picture of almost one colour, which has no structure to compare.
    """

    entry: Entry
    problem: str | None = None
    width: int = 0
    height: int = 0
    mode: str = ""
    turned: bool = False
    pixels: bytes = b""
    bits: np.ndarray | None = None


def fingerprints(image: Image.Image) -> tuple[bytes, np.ndarray | None]:
    """Returns the digest of the pixels and the perceptual hash (32,) uint8 of an RGB image, as in ``Reading``.

    The hash is pHash: signs of the low frequencies of the discrete cosine transform, against their median.
    """
    from imagehash import phash
    from PIL import Image

    digest = hashlib.blake2b(repr(image.size).encode() + image.tobytes(), digest_size=16).digest()
    grey = np.asarray(image.convert("L").resize((HASH_SIDE, HASH_SIDE), Image.Resampling.BOX))
    return digest, None if np.ptp(grey) < FLAT else np.packbits(phash(image, HASH_SIDE).hash)


class _Files(Dataset):
    def __init__(self, entries: list[Entry], transform: Callable | None):
        self.entries, self.transform = entries, transform

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> tuple[Reading, Tensor | None]:
        from PIL import Image

        entry = self.entries[index]
        try:
            content = entry.path.read_bytes()
            image = decode(io.BytesIO(content), "RGB")
            with Image.open(io.BytesIO(content), formats=FORMATS) as file:  # only its header
                mode, turned = file.mode, _is_turned(file)
        except Exception as error:  # for damaged files, decoders raise anything: OSError, SyntaxError, struct.error ...
            if is_shortage(error):
                raise
            return Reading(entry, getattr(error, "strerror", None) or str(error) or type(error).__name__), None
        found = Reading(entry, None, *image.size, mode, turned, *fingerprints(image))
        return found, None if self.transform is None else self.transform(image)


def _is_turned(file: Image.Image) -> bool:
    try:
        return file.getexif().get(ORIENTATION, 1) != 1
    except Exception:  # of a damaged part, which nobody else reads
        return False


def _collate(samples: list[tuple[Reading, Tensor | None]]) -> tuple[list[Reading], Tensor | None]:
    tensors = [tensor for _, tensor in samples if tensor is not None]
    return [reading for reading, _ in samples], torch.stack(tensors) if tensors else None


def read_images(entries: list[Entry], workers: int, transform: Callable | None = None) -> Iterator[tuple[list[Reading], Tensor | None]]:
    """Yields batches in the order of the entries: their readings, and the ``transform`` (B, C, H, W) of the images that can be read.

    On a terminal a bar shows the progress.

    Raises:
        MissingPackage: imagehash is not installed.
        UserError: memory or file handles run out, or a worker dies.
    """
    try:
        import imagehash  # noqa: F401 # once here, with a clear error, before the workers
        from tqdm import tqdm
    except ImportError as error:
        raise MissingPackage(f"{error}; checking data needs: pip install 'litv2[check]'") from error
    loader = DataLoader(
        _Files(entries, transform), BATCH, num_workers=workers, collate_fn=_collate, worker_init_fn=partial(start_worker, None)
    )
    with in_one_line(), tqdm(total=len(entries), unit="image", dynamic_ncols=True, leave=False, disable=not sys.stderr.isatty()) as bar:
        for readings, images in loader:
            yield readings, images
            bar.update(len(readings))
