# SPDX-License-Identifier: Apache-2.0
"""Loads what is to be explained, whatever its task."""

from __future__ import annotations

from pathlib import Path

from ..configurations import config_of
from ..errors import UserError
from .subjects import Classifier, Subject

__all__ = ["load_subject"]


def load_subject(
    checkpoint: str | Path, name: str | None = None, config: str | None = None, img_size: int | None = None, device: str = "cpu"
) -> Subject:
    """Loads a classifier from its file, or a detector or segmenter from its file and configuration.

    Args:
        checkpoint: a path, a URL or a zoo name.
        name: the classifier's name in the zoo; None to infer the model.
        config: the configuration of a detector or segmenter.
        img_size: side of a classifier's images in pixels; None for the checkpoint's.

    Raises:
        UserError: the file, the name, the configuration, the size or the device does not fit.
        OSError: the weights cannot be found or downloaded.
    """
    if config is None and name is None:
        config = _named_configuration(str(checkpoint))
    if config is not None and (name, img_size) != (None, None):
        raise UserError("a detector or segmenter is prepared as its configuration says; leave out the model's name and the image size")
    if config is None:
        subject: Subject = Classifier(checkpoint, name, img_size)
    else:
        from .dense import load_dense

        subject = load_dense(checkpoint, config)
    subject.to(device)
    return subject


def _named_configuration(checkpoint: str) -> str | None:
    """Returns the configuration of a detector or segmenter that is named in a checkpoint's path, or None."""
    try:
        return config_of(checkpoint)
    except UserError:
        return None
