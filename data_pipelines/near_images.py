"""Images that look alike: a perceptual hash of 64 bits, and a search by Hamming distance.

The hash is pHash (Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010): the low
frequencies of a 32 x 32 gray picture, each above or below their median. Its cosines are whole numbers here, so that
every machine finds the same bits.
"""

from __future__ import annotations

import functools
from array import array

import numpy as np
import numpy.typing as npt
from PIL import Image

HASH_BITS = 64
_SIDE, _KEPT = 32, 8
_SCALE = 1 << 12


@functools.cache
def _cosines() -> npt.NDArray[np.int64]:
    """The first rows of the DCT-II of 32 points, int64 [8, 32], times `_SCALE`."""
    frequency, point = np.arange(_KEPT)[:, None], np.arange(_SIDE)[None, :]
    waves: npt.NDArray[np.float64] = np.cos(np.pi * (2 * point + 1) * frequency / (2 * _SIDE))
    return np.rint(_SCALE * waves).astype(np.int64)


def perceptual_hash(image: Image.Image) -> int:
    """64 bits of an image of any size; the same picture, scaled or compressed again, differs in few of them."""
    gray = image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX)
    pixels = np.asarray(gray, dtype=np.int64)
    low = _cosines() @ pixels @ _cosines().T
    values = low.reshape(-1)
    # The mean brightness, the first value, has no say in the median.
    median = np.sort(values[1:])[(HASH_BITS - 1) // 2]
    return int.from_bytes(np.packbits(values > median).tobytes(), "big")


class NearHashes:
    """Hashes seen so far, searched by distance.

    Two hashes that differ in at most `distance` bits are equal in one of `distance + 1` bands of bits, so only hashes
    that share a band are compared (Manku et al., "Detecting Near-Duplicates for Web Crawling", 2007).
    """

    def __init__(self, distance: int) -> None:
        self._distance = distance
        edges = [HASH_BITS * band // (distance + 1) for band in range(distance + 2)]
        self._bands = [(start, (1 << (end - start)) - 1) for start, end in zip(edges, edges[1:], strict=False)]
        self._seen: list[dict[int, array[int]]] = [{} for _ in self._bands]

    def add(self, value: int) -> bool:
        """Whether a hash within the distance is there already; if not, this one is added."""
        buckets = [(value >> start) & mask for start, mask in self._bands]
        for bucket, seen in zip(buckets, self._seen, strict=True):
            there = seen.get(bucket)
            if there is None:
                continue
            differing = np.bitwise_count(np.frombuffer(there, dtype=np.uint64) ^ np.uint64(value))
            if int(differing.min()) <= self._distance:
                return True
        for bucket, seen in zip(buckets, self._seen, strict=True):
            seen.setdefault(bucket, array("Q")).append(value)
        return False
