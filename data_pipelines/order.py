"""Which sample comes when: a pure function of (shard sizes, seed, epoch, position).

The shards are permuted and their samples laid end to end as one line. The line is cut into C segments; each of C
streams walks one of them, and position i of the epoch belongs to stream i mod C, so that consecutive positions lie far
apart on the line whatever the number of shards. Inside a stream, blocks of samples are shuffled by a keyed bijection
that is computed for single positions: nothing is materialised, and a seek costs as much as a step.

The idea of canonical streams is Mosaic Streaming's (`num_canonical_nodes`); the bijection is a Feistel network with
cycle walking (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). Random bits are Philox's raw output,
whose stream numpy promises not to change, and splitmix64 (Steele, Lea and Flood, 2014).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
_Words = npt.NDArray[np.uint64]

DEFAULT_STREAMS = 720
# With shards of some thousand samples a stream then has one or two of them open, which is what a cache must hold, and
# the streams' blocks together still shuffle 2.9 million samples.
DEFAULT_BLOCK = 4_096
# A segment holds at least this many samples, so that there is something to shuffle within each stream.
_MIN_SEGMENT = 64
_ROUNDS = 6
# 2**64 over the golden ratio, odd.
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
# Places in a stream times its blocks must stay below this.
_MOST = (1 << 63) - 1


def splitmix64(words: _Words) -> _Words:
    """Scramble 64-bit words: uint64 of any shape in, the same shape out. A bijection."""
    x = words + np.uint64(_GOLDEN)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def shuffle_within(index: IntArray, length: IntArray, key: _Words) -> IntArray:
    """Keyed permutation of 0..length-1, evaluated at `index`: three arrays of one shape in, int64 out.

    For each fixed (length, key) the map is a bijection. `length` must be in 1..2**62.
    """
    # Both halves of the Feistel network have the same width; the domain is then at most four times the length.
    widths = np.maximum(1, (np.frexp((np.maximum(length, 2) - 1).astype(np.float64))[1] + 1) // 2).astype(np.uint64)
    mask = (np.uint64(1) << widths) - np.uint64(1)
    bound = length.astype(np.uint64)
    value = index.astype(np.uint64)
    outside = np.ones(value.shape, dtype=bool)
    while outside.any():
        width, low, keys = widths[outside], mask[outside], key[outside]
        left, right = value[outside] >> width, value[outside] & low
        for turn in range(_ROUNDS):
            round_key = keys + np.uint64(turn * 0xD1342543DE82EF95 & _MASK)
            left, right = right, left ^ (splitmix64(right ^ splitmix64(round_key)) & low)
        value[outside] = (left << width) | right
        outside = value >= bound
    return value.astype(np.int64)


def stream_count(num_samples: int, num_streams: int = DEFAULT_STREAMS) -> int:
    """Streams that `num_samples` are cut into: a function of the data alone, never of the world."""
    return max(1, min(num_streams, num_samples // _MIN_SEGMENT))


class Order:
    """The order of one epoch over samples 0..N-1, numbered in shard order.

    Args:
        shard_sizes: samples in each shard.
        seed: any integer; equal seeds give equal orders.
        epoch: 0, 1, 2...; each epoch has an order of its own.
        num_streams: most streams; fewer are used where N is small, so that it is a function of the data alone.
        shuffle_block: samples shuffled together within a stream.

    Memory is O(shards + streams), whatever N is. Raises ValueError for sizes that are negative, for settings that are
    not positive, and for blocks so small that 64 bits do not number what is in them.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int] | IntArray,
        seed: int,
        epoch: int,
        num_streams: int = DEFAULT_STREAMS,
        shuffle_block: int = DEFAULT_BLOCK,
    ) -> None:
        sizes = np.asarray(shard_sizes, dtype=np.int64).reshape(-1)
        if (sizes < 0).any():
            raise ValueError("shard sizes must not be negative")
        if num_streams < 1 or shuffle_block < 1 or epoch < 0:
            raise ValueError("num_streams and shuffle_block must be at least 1, epoch at least 0")
        self.num_samples = int(sizes.sum())
        self.num_streams = stream_count(self.num_samples, num_streams)
        self._block = shuffle_block
        bits = np.random.Philox(key=np.array([seed & _MASK, epoch & _MASK], dtype=np.uint64))

        permuted = np.argsort(bits.random_raw(len(sizes)), kind="stable")
        self._shard_at: IntArray = permuted
        self._line_sizes: IntArray = sizes[permuted]
        self._line_ends: IntArray = np.cumsum(self._line_sizes)
        # Adding this to a place on the line gives the sample id, shard by shard.
        self._line_to_id: IntArray = (np.cumsum(sizes) - sizes)[permuted] - (self._line_ends - self._line_sizes)

        # Stream s walks the segment at the golden ratio's s-th place, turned and jittered afresh each epoch: any run of
        # streams, and so any batch, is spread evenly over the line, and not over neighbouring shards.
        turned, *jitter = bits.random_raw(self.num_streams + 1).tolist()
        width = (1 << 64) // int(np.sqrt(self.num_streams) + 1)
        ideal = [(stream * _GOLDEN + turned + (word * width >> 64)) & _MASK for stream, word in enumerate(jitter)]
        place_of_stream = np.argsort(np.argsort(np.array(ideal, dtype=np.uint64), kind="stable"), kind="stable")
        short, longer = divmod(self.num_samples, self.num_streams)
        if (short + 1) * (-(-(short + 1) // shuffle_block) + 1) > _MOST:
            raise ValueError(f"shuffle_block {shuffle_block} is too small for streams of {short + 1} samples")
        self._lengths: IntArray = short + (np.arange(self.num_streams) < longer).astype(np.int64)
        in_place = np.empty(self.num_streams, dtype=np.int64)
        in_place[place_of_stream] = self._lengths
        self._starts: IntArray = (np.cumsum(in_place) - in_place)[place_of_stream]
        self._key = np.uint64(bits.random_raw())

    def num_batches(self, size: int) -> int:
        """Batches of `size` samples in the epoch: ceil(N / size); the last one may be short."""
        if size < 1:
            raise ValueError("a batch has at least one sample")
        return -(-self.num_samples // size)

    def global_batch(self, step: int, size: int) -> IntArray:
        """Sample ids of batch `step` of this epoch: int64 [size], shorter for the last one.

        Raises IndexError for a step outside 0..num_batches-1.
        """
        if not 0 <= step < self.num_batches(size):
            raise IndexError(f"step {step} of an epoch of {self.num_batches(size)} batches")
        return self.at(np.arange(step * size, min((step + 1) * size, self.num_samples), dtype=np.int64))

    def at(self, positions: npt.ArrayLike) -> IntArray:
        """Sample ids at positions 0..N-1 of the epoch: int64, the shape of `positions`."""
        wanted = np.asarray(positions, dtype=np.int64)
        if wanted.size == 0:
            return wanted
        if wanted.min() < 0 or wanted.max() >= self.num_samples:
            raise IndexError(f"positions must lie in 0..{self.num_samples - 1}")
        turn, stream = np.divmod(wanted.reshape(-1), self.num_streams)
        block, block_start, block_length = self._block_at(turn, stream)
        key = splitmix64(splitmix64(stream.astype(np.uint64) ^ self._key) + block.astype(np.uint64))
        place = self._starts[stream] + block_start + shuffle_within(turn - block_start, block_length, key)
        shard = np.searchsorted(self._line_ends, place, side="right")
        return (place + self._line_to_id[shard]).reshape(wanted.shape)

    def _block_at(self, turn: IntArray, stream: IntArray) -> tuple[IntArray, IntArray, IntArray]:
        """Number, start and length, within its stream, of the block that holds the stream's sample `turn`."""
        length = self._lengths[stream]
        # Blocks of nearly equal length: a short last one would hardly be shuffled.
        num_blocks = -(-length // self._block)
        block = ((turn + 1) * num_blocks - 1) // length
        start = block * length // num_blocks
        return block, start, (block + 1) * length // num_blocks - start

    def open_shards(self, position: int) -> IntArray:
        """Shards that the streams are in the middle of at this position: int64, ascending, by number.

        Every sample of the streams' present blocks lies in these shards, so they are what a cache has to hold. Raises
        IndexError for a position outside 0..N-1.
        """
        if not 0 <= position < self.num_samples:
            raise IndexError(f"position {position} of an epoch of {self.num_samples} samples")
        stream = np.arange(self.num_streams, dtype=np.int64)
        turn = np.minimum(position // self.num_streams, self._lengths - 1)
        _, start, length = self._block_at(turn, stream)
        first = np.searchsorted(self._line_ends, self._starts + start, side="right")
        last = np.searchsorted(self._line_ends, self._starts + start + length - 1, side="right")
        places = np.unique(np.concatenate([np.arange(a, b + 1) for a, b in zip(first, last, strict=True)]))
        # The line holds permuted shards; ends of equal place belong to empty ones, which nobody opens.
        opened: IntArray = np.sort(self._shard_at[places[self._line_sizes[places] > 0]])
        return opened
