# SPDX-License-Identifier: Apache-2.0
"""Files of features: what a model makes of images before its head, with the images' paths and classes."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from .errors import MissingPackage, UserError, printable
from .files import atomic_write, is_shortage

__all__ = ["Features", "fingerprint", "pyarrow", "read_features", "write_features"]


@dataclass(frozen=True)
class Features:
    """Features of N images.

    Attributes:
        features: (N, D), float32.
        images: their paths, (N,).
        classes: their classes, (N,), "" where there is none.
        model: the ``fingerprint`` of what computed them.
    """

    features: np.ndarray
    images: np.ndarray
    classes: np.ndarray
    model: str


def fingerprint(model: nn.Module, preprocessing: object) -> str:
    """Returns a text that differs for other weights or another preprocessing, whose ``str`` counts."""
    digest = hashlib.sha256(str(preprocessing).encode())
    for name, value in model.state_dict().items():
        digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def write_features(path: Path, content: Features) -> None:
    """Writes the features by the path's suffix: .npz, whose arrays are the attributes, or .parquet, with the columns image, class and
    features.

    Raises:
        MissingPackage: Parquet needs pyarrow.
        OSError: the file cannot be written.
    """
    with atomic_write(path) as draft:
        if path.suffix == ".parquet":
            _write_parquet(draft, content)
        else:
            with open(draft, "wb") as file:
                np.savez(file, **vars(content))


def pyarrow() -> Any:
    """Returns the package, with its module parquet; raises MissingPackage without it."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise MissingPackage(f"{error}; Parquet needs pyarrow: pip install pyarrow") from error
    return pyarrow


def _write_parquet(path: Path, content: Features) -> None:
    arrow = pyarrow()
    rows = arrow.FixedSizeListArray.from_arrays(arrow.array(content.features.reshape(-1)), content.features.shape[1])
    names = {name: list(map(printable, values.tolist())) for name, values in (("image", content.images), ("class", content.classes))}
    columns = {**names, "features": rows}  # Parquet holds text only, which names of files need not be
    arrow.parquet.write_table(arrow.table(columns, metadata={"model": content.model}), path)


def read_features(path: Path) -> Features:
    """Reads a .npz file of ``write_features``, which nobody needs to trust: it can neither run code nor take more memory than its size.

    Raises:
        UserError: it is another file, or a damaged one.
        OSError: it cannot be opened.
    """
    try:
        with open(path, "rb") as file:
            if any(member.compress_type != zipfile.ZIP_STORED for member in zipfile.ZipFile(file).infolist()):
                raise UserError("it is compressed")
            file.seek(0)
            with np.load(file, allow_pickle=False) as arrays:
                found = {name: np.asarray(arrays[name]) for name in Features.__annotations__}  # of a damaged array, it may return the bytes
    except Exception as error:  # damaged files raise all kinds of exceptions
        if isinstance(error, OSError) and (error.filename is not None or is_shortage(error)):
            raise
        raise UserError(f"{path} cannot be read as features, which `python -m litv2 embed` writes as .npz: {error}") from error
    content = Features(found["features"], found["images"], found["classes"], str(found["model"]))
    count = content.features.shape[:1]
    if content.features.ndim != 2 or content.features.dtype != np.float32 or not content.features.size:
        what = f"{content.features.dtype} of shape {content.features.shape}"
        raise UserError(f"{path}: the features must be float32 of shape (images, channels), got {what}")
    for name in ("images", "classes"):
        array = getattr(content, name)
        if array.shape != count or array.dtype.kind != "U":
            raise UserError(f"{path}: expected {count[0]} texts as {name}, got {array.dtype} of shape {array.shape}")
    if not np.isfinite(content.features).all():
        raise UserError(f"{path}: the features of {(~np.isfinite(content.features)).any(axis=1).sum()} images are infinite or no numbers")
    return content
