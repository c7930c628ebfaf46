"""The state of a run on disk: written whole or not at all, plain tensors and builtins only, resumed bit for bit."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import distributed
from litv2.errors import UserError
from litv2.files import atomic_write
from litv2.weights.reading import read_checkpoint

LATEST, PREVIOUS, BEST = "latest.pth", "previous.pth", "best.pth"


def save(path: Path, state: dict, previous: Path | None = None) -> None:
    """Writes the file as a whole: a reader finds the old one or the new one. ``previous`` is where the old one goes."""
    with atomic_write(path) as draft:
        with open(draft, "wb") as file:  # given a path, torch.save would write the draft's name into the file
            torch.save(state, file)
        if previous is not None and path.exists():
            os.replace(path, previous)


def save_latest(folder: Path, state: dict) -> None:
    """As ``save``, and keeps the one before as previous.pth, in case the disk damages the newest."""
    save(folder / LATEST, state, previous=folder / PREVIOUS)


def find_latest(folder: Path, log: Callable[[str], None]) -> tuple[Path, dict] | None:
    """The newest readable checkpoint of a run and its content; a damaged one is reported and passed over.

    Raises:
        UserError: there are checkpoints, but none of them can be read.
    """
    damaged = []
    for path in (folder / LATEST, folder / PREVIOUS):
        if path.is_file():
            try:
                return path, read_checkpoint(path)
            except UserError as error:
                damaged.append(str(error))
                log(f"damaged checkpoint, using the one before: {error}")
    if damaged:
        raise UserError(f"no checkpoint in {folder} can be read; remove them to start again:\n" + "\n".join(damaged))
    return None


def random_state() -> dict:
    """State of every random number generator of this process, as builtins and tensors."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, internal, gauss_next = random.getstate()
    state = dict(
        python=[version, list(internal), gauss_next],
        numpy=[kind, np.asarray(keys).tolist(), int(position), int(has_gauss), float(gauss)],
        torch=torch.get_rng_state(),
    )
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(states: list[dict], log: Callable[[str], None]) -> None:
    """``states`` of all ranks, as gathered. With another number of processes the generators start afresh, which is said."""
    if len(states) != distributed.world_size():
        log(f"the checkpoint has random states of {len(states)} processes, this run {distributed.world_size()}: not restored")
        return
    state = states[distributed.rank()]
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
