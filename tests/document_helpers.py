# SPDX-License-Identifier: Apache-2.0
"""The documents of the repository, every tracked ``*.md`` file, as tests read them: their blocks of code, commands, links and tables."""

from __future__ import annotations

import re
import shlex
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from helpers import ROOT

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Command:
    """A line of a bash block and the folder that it is run from: the document's own, or where ``cd`` leads."""

    document: str
    folder: Path
    line: str

    def __str__(self) -> str:
        return f"{self.document}: {self.line}"

    def matches(self, document: str, pattern: str) -> bool:
        """It is of the document (``*``: of any), and the pattern is that of the whole line."""
        return document in ("*", self.document) and re.fullmatch(pattern, self.line) is not None

    @property
    def words(self) -> list[str]:
        """As a shell passes them on, patterns of file names replaced by the files."""
        words = []
        for word in shlex.split(self.line):
            words += sorted(str(path.relative_to(self.folder)) for path in self.folder.glob(word)) if "*" in word else [word]
        return words


def project_files(pattern: str) -> list[str]:
    """Paths from the root of the project's files, those of a new one before it is committed too."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", pattern]
    paths = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [path for path in sorted(paths) if (ROOT / path).is_file()]


@cache
def documents() -> dict[str, str]:
    """Text by path from the root."""
    return {path: (ROOT / path).read_text(encoding="utf-8") for path in project_files("*.md")}


def blocks(document: str, language: str) -> list[str]:
    return [content for kind, content in FENCE.findall(documents()[document]) if kind == language]


def prose(document: str) -> str:
    """The text without its blocks of code."""
    return FENCE.sub("", documents()[document])


def commands() -> list[Command]:
    return [command for document in documents() for block in blocks(document, "bash") for command in _commands(document, block)]


def documented(document: str, pattern: str) -> list[Command]:
    """The commands that match, for the test that runs them. ``docs/test_commands.py`` reads the calls of this function in the sources of
    the tests: both arguments are plain text there, or the name of a text in the same file."""
    return [command for command in commands() if command.matches(document, pattern)]


def _commands(document: str, block: str) -> list[Command]:
    folder, found = (ROOT / document).parent, []
    for line in block.replace("\\\n", " ").splitlines():
        line = re.split(r"\s\s+#|^#", line)[0].strip()
        move, where, rest = re.fullmatch(r"(cd (\S+)(?: && (?=\S))?)?(.*)", line).groups()
        place = (folder / where).resolve() if move else folder
        if rest:
            found.append(Command(document, place, rest))
        else:
            folder = place
    return found


def tables(document: str) -> list[list[dict[str, str]]]:
    """Of each table its rows: cell by heading, without backquotes."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", prose(document), re.M):
        heading, _, *rows = [[cell.strip().replace("`", "") for cell in line.strip().strip("|").split("|")] for line in block.splitlines()]
        found.append([dict(zip(heading, row, strict=True)) for row in rows])
    return found


def table(document: str, *headings: str) -> list[dict[str, str]]:
    """The one table that has these headings."""
    (found,) = (rows for rows in tables(document) if set(headings) <= set(rows[0]))
    return found


def links(document: str) -> list[str]:
    """Targets of links and pictures."""
    text = prose(document)
    return re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'\b(?:src|srcset|href)="([^"]+)"', text)


def anchors(document: str) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(document), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
