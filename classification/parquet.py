# SPDX-License-Identifier: Apache-2.0
"""Tables as Apache Parquet, by pyarrow, which is an optional package."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from litv2.features import pyarrow
from litv2.files import atomic_write

__all__ = ["write_parquet"]


def write_parquet(path: Path, rows: Iterable[list]) -> None:
    """Writes rows of text, integers and floats, of which the first has the names of the columns."""
    names, *content = rows
    table = pyarrow().table(dict(zip(names, map(list, zip(*content)))))
    with atomic_write(path) as draft:
        pyarrow().parquet.write_table(table, draft)
