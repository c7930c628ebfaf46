"""A head for other classes, with what the old one knows of those that the two share."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from litv2.errors import UserError, listed


def keep_shared_classes(weights: dict[str, Tensor], theirs: object, model: nn.Module, ours: Sequence[str]) -> str | None:
    """Rearranges the head in ``weights`` for the classes ``ours``: one that is among ``theirs`` by its name keeps its row of weight and
    bias, the others have the model's own, which are new.

    Args:
        theirs: the names in the checkpoint of the weights; None if it has none.

    Returns:
        A line that says how many are kept; None if nothing was changed: there are no names, they are the same, or the heads do not match.

    Raises:
        UserError: the checkpoint's names are not those of its head.
    """
    own = model.state_dict()
    keys = [key for key in ("head.weight", "head.bias") if key in weights and weights[key].shape[1:] == own[key].shape[1:]]
    if len(keys) < 2 or theirs in (None, list(ours)):
        return None
    if not isinstance(theirs, list) or len(theirs) != len(weights[keys[0]]) or not all(isinstance(name, str) for name in theirs):
        raise UserError(f"the checkpoint's class names do not fit its head, which has {len(weights[keys[0]])} outputs")
    rows = {i: theirs.index(name) for i, name in enumerate(ours) if name in theirs}
    for key in keys:
        head = own[key].clone()
        head[list(rows)] = weights[key][list(rows.values())].to(head)
        weights[key] = head
    new = [name for i, name in enumerate(ours) if i not in rows]
    return f"{len(rows)} of {len(ours)} classes keep their rows of the head" + (f"; new: {listed(new)}" if new else "")
