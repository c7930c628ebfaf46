# SPDX-License-Identifier: Apache-2.0
"""Groups of images that are the same picture: equal pixels, or perceptual hashes that differ in few bits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

__all__ = ["DISTANCE", "LARGEST_DISTANCE", "Group", "find_groups", "near_pairs"]

# Bits of 256 in which copies may differ. Of 1500 photographs of ImageNet, unrelated ones differ in 72 or more. Copies at half the size or
# saved again as JPEG of quality 10 differ in up to 16, those without 2 % at each edge in 30 (median).
DISTANCE = 30
LARGEST_DISTANCE = 47  # beyond, the search takes long and finds pictures that are merely alike
AT_ONCE = 1 << 22  # candidates that are compared together


@dataclass(frozen=True)
class Group:
    """Images of one picture.

    Attributes:
        members: their numbers, sorted.
        bits: by how many bits the hash of each differs from that of the first. Since likeness is passed on from member to member, these
            may be more than the distance that was asked for.
        exact: all pixels are equal.
    """

    members: list[int]
    bits: list[int]
    exact: bool


def find_groups(pixels: Sequence[bytes], bits: Sequence[np.ndarray | None], distance: int = DISTANCE) -> list[Group]:
    """Groups of two images or more; those with equal pixels first.

    Args:
        pixels: a digest of each image's pixels.
        bits: the perceptual hash of each, (32,) uint8, or None for one that is only compared by its pixels.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    numbers = {digest: i for i, digest in enumerate(dict.fromkeys(pixels))}
    picture = np.array([numbers[digest] for digest in pixels], dtype=int)  # of each image; those of the same picture are joined below
    hashed = np.array([i for i, known in enumerate(bits) if known is not None], dtype=int)
    if len(hashed):
        distinct, first, same = np.unique(
            np.stack([known for known in bits if known is not None]), axis=0, return_index=True, return_inverse=True
        )  # thousands of equal hashes, of a camera that stands still, would be millions of pairs
        near = ((first[i], first[j]) for i, j in near_pairs(distinct, distance))
        for i, j in chain([(first[same], np.arange(len(hashed)))], near):
            a, b = picture[hashed[i]], picture[hashed[j]]
            if (a != b).any():
                links = coo_matrix((np.ones(len(a), dtype=bool), (a, b)), shape=(len(numbers),) * 2)
                picture = connected_components(links, directed=False)[1][picture]
    groups: dict[int, list[int]] = {}
    for member in np.flatnonzero(np.bincount(picture)[picture] > 1).tolist() if len(picture) else ():
        groups.setdefault(picture[member], []).append(member)
    found = [
        Group(members, [_differing(bits[members[0]], bits[member]) for member in members], len({pixels[i] for i in members}) == 1)
        for members in groups.values()
    ]
    return sorted(found, key=lambda group: (not group.exact, group.members))


def _differing(a: np.ndarray | None, b: np.ndarray | None) -> int:
    return 0 if a is None or b is None else int(np.bitwise_count(a ^ b).sum())  # only equal pixels group images without a hash


def near_pairs(hashes: np.ndarray, distance: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields all pairs i < j of hashes (N, 32) uint8 that differ in at most ``distance`` bits, in parts; a pair may come again.

    Multi-index hashing (Norouzi, Punjani and Fleet, arXiv 1307.2982): of 16 bands of 16 bits, at least one of such a pair differs in at
    most distance // 16 bits. So each hash is looked up by the bands that are that near, and only what is found there is compared.
    """
    bands, words = hashes.view(np.uint16), hashes.view(np.uint64)  # (N, 16), (N, 4)
    every = np.arange(1 << 16, dtype=np.uint16)
    masks = every[np.bitwise_count(every) <= distance // bands.shape[1]]
    for band in bands.T:
        order = np.argsort(band, kind="stable")
        edges = np.searchsorted(band[order], np.arange((1 << 16) + 1))  # where each value begins in that order
        for mask in masks:
            wanted = (band ^ mask).astype(int)
            for i, j in _candidates(edges[wanted], edges[wanted + 1], order):
                near = np.bitwise_count(words[i] ^ words[j]).sum(axis=1) <= distance
                if near.any():
                    yield i[near], j[near]


def _candidates(start: np.ndarray, stop: np.ndarray, order: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of i and j = order[k] for k from start[i] to stop[i], those with i < j, in parts that fit into memory."""
    count = stop - start
    ends = np.cumsum(count)
    first = 0
    while first < len(ends):
        before = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + AT_ONCE, "right")))
        part = slice(first, last)
        i = np.repeat(np.arange(first, last), count[part])
        skipped = ends[part] - count[part] - before  # candidates in this part of those before i
        j = order[np.arange(len(i)) + np.repeat(start[part] - skipped, count[part])]
        yield i[i < j], j[i < j]
        first = last
