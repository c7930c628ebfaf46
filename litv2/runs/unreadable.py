# SPDX-License-Identifier: Apache-2.0
"""Images that cannot be read: a run reports and skips them, up to a limit."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ..errors import UserError, listed

__all__ = ["BadFiles"]


class BadFiles:
    """Collects the unreadable files of this process; more than the limit, which is the setting ``key``, stop the run."""

    def __init__(self, limit: int, log: Callable[[str], None], key: str = "DATA.MAX_BAD_FILES"):
        self.limit, self.log, self.key = limit, log, key
        self.reports: dict[str, None] = {}  # an ordered set

    def add(self, reports: Iterable[str]) -> None:
        """Raises UserError if there are too many."""
        for report in reports:
            if report not in self.reports:
                self.reports[report] = None
                self.log(f"unreadable image, skipped: {report}")
        if len(self.reports) > self.limit:
            raise UserError(f"{len(self.reports)} unreadable images, more than {self.key}={self.limit}: {listed(self.reports)}")
