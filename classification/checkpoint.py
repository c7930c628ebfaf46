# SPDX-License-Identifier: Apache-2.0
"""The state of a run on disk: written atomically, from plain tensors and builtins only, resumed bit for bit."""

from __future__ import annotations

import os
import random
import traceback
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
    """Writes the file atomically, so that a reader finds the old one or the new one; the old one is kept as ``previous``, if given."""
    with atomic_write(path) as draft:
        with open(draft, "wb") as file:  # given a path, torch.save would store the draft's name in the file
            try:
                torch.save(state, file)
            except BaseException as error:  # an interrupt or a killed worker may come between any two of its steps
                traceback.clear_frames(error.__traceback__)  # torch's writer, when deleted, aborts the process if its file is closed
                raise
        if previous is not None and path.exists():
            os.replace(path, previous)


def save_latest(folder: Path, state: dict) -> None:
    """Saves latest.pth and keeps the one before as previous.pth, in case the latest is damaged."""
    save(folder / LATEST, state, previous=folder / PREVIOUS)


def find_latest(folder: Path, log: Callable[[str], None]) -> tuple[Path, dict] | None:
    """Returns the newest readable checkpoint of a run and its content; a damaged one is logged and skipped.

    Raises:
        UserError: there are checkpoints, but none can be read.
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
        raise UserError(f"no checkpoint in {folder} can be read; remove them to start over:\n" + "\n".join(damaged))
    return None


def random_state() -> dict:
    """Returns the state of all random number generators of this process, as builtins and tensors."""
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
    """Restores this rank's state from the ``states`` of all ranks; with another number of processes it only logs that it cannot."""
    if len(states) != distributed.world_size():
        log(f"random states not restored: the checkpoint has those of {len(states)} processes, this run has {distributed.world_size()}")
        return
    set_random_state(states[distributed.rank()])


def set_random_state(state: dict) -> None:
    """Sets all random number generators of this process to what ``random_state`` returned."""
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
