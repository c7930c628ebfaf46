# SPDX-License-Identifier: Apache-2.0
"""YAML as configurations have it: small, and of plain values."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import yaml

from .errors import UserError

__all__ = ["parse"]

LARGEST = 1 << 18  # characters
LONGEST_NUMBER = 100  # characters
DEEPEST = 50  # brackets within each other: the time that PyYAML takes for them is quadratic
MOST_NODES = 20_000  # values, counted as often as aliases repeat them: a few lines of aliases of aliases would fill all memory


def parse(text: str) -> Any:
    """Returns the value of a YAML document.

    Raises:
        UserError: it is not valid YAML, or larger or deeper than a configuration needs.
    """
    if len(text) > LARGEST:
        raise UserError(f"it has {len(text)} characters, more than {LARGEST}")
    if max(accumulate((letter in "[{") - (letter in "]}") for letter in text), default=0) > DEEPEST:
        raise UserError(f"it is nested too deeply: more than {DEEPEST} brackets within each other")
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        _count(root)
        return None if root is None else loader.construct_document(root)
    except RecursionError as error:
        raise UserError("it is nested too deeply") from error
    except UserError:
        raise
    except Exception as error:  # yaml's errors have several lines; a date that does not exist is a ValueError
        raise UserError(" ".join(str(error).split())) from error


def _count(root: yaml.Node | None) -> None:
    pending, count = [root], 0
    while pending:
        node, count = pending.pop(), count + 1
        if count > MOST_NODES:
            raise UserError(f"it has more than {MOST_NODES} values, counted as often as aliases repeat them")
        if isinstance(node, yaml.ScalarNode) and node.tag.endswith((":int", ":float")) and len(node.value) > LONGEST_NUMBER:
            raise UserError(f"a number has {len(node.value)} digits")
        if isinstance(node, yaml.CollectionNode):
            for item in node.value:
                pending += item if isinstance(item, tuple) else [item]
