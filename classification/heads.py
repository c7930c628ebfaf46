# SPDX-License-Identifier: Apache-2.0
"""A head for other classes, with what the old one knows of those that the two share."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from litv2.errors import UserError, listed


def names_in(checkpoint: dict) -> list[str] | None:
    """Returns the class names of a checkpoint, None if it has none.

    Raises:
        UserError: they are no list of names.
    """
    names = checkpoint.get("class_names")
    if names is None:
        return None
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise UserError("the checkpoint's class_names are no list of names")
    return list(names) or None


def keep_shared_classes(weights: dict[str, Tensor], theirs: list[str] | None, model: nn.Module, ours: Sequence[str]) -> str | None:
    """Rearranges the head in ``weights`` for the classes ``ours``: one that is among ``theirs`` by its name keeps its row of weight and
    bias, the others have the model's own, which are new.

    Args:
        theirs: the names in the checkpoint of the weights; None if it has none.

    Returns:
        A line that says how many are kept; None if nothing was changed: there are no names, they are the same, or the heads do not match.

    Raises:
        UserError: the checkpoint has another number of names than its head of outputs.
    """
    own = model.state_dict()
    keys = [key for key in ("head.weight", "head.bias") if key in weights and weights[key].shape[1:] == own[key].shape[1:]]
    if len(keys) < 2 or theirs is None or theirs == list(ours):
        return None
    outputs = len(weights["head.weight"])
    if len(theirs) != outputs:
        raise UserError(f"the checkpoint has {len(theirs)} class names, but its head has {outputs} outputs")
    position = {name: i for i, name in enumerate(theirs)}
    rows = {i: position[name] for i, name in enumerate(ours) if name in position}
    for key in keys:
        head = own[key].clone()
        head[list(rows)] = weights[key][list(rows.values())].to(head)
        weights[key] = head
    new = [name for name in ours if name not in position]
    return f"{len(rows)} of {len(ours)} classes keep their rows of the head" + (f"; new: {listed(new)}" if new else "")
