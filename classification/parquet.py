# SPDX-License-Identifier: Apache-2.0
"""Tables as Apache Parquet, by pyarrow, which is an optional package."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from litv2.errors import MissingPackage
from litv2.files import atomic_write

__all__ = ["pyarrow", "write_parquet"]


def pyarrow() -> Any:
    """Returns the module. Raises MissingPackage if it is not installed."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise MissingPackage(f"{error}; TEST.PREDICTIONS=parquet needs pyarrow: pip install pyarrow") from error
    return pyarrow


def write_parquet(path: Path, rows: Iterable[list]) -> None:
    """Writes rows of text, integers and floats, of which the first has the names of the columns."""
    names, *content = rows
    table = pyarrow().table(dict(zip(names, map(list, zip(*content)))))
    with atomic_write(path) as draft:
        pyarrow().parquet.write_table(table, draft)
