"""The order of samples: pure functions of a seed, the same on every rank, machine and library version."""

import numpy as np
from numpy.typing import NDArray

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_ROUNDS = 8


class Permutation:
    """A random-looking bijection on range(size) that needs no memory: `permutation(i)` is where i goes.

    A balanced Feistel network (Luby and Rackoff, "How to construct pseudorandom permutations from pseudorandom
    functions", 1988) permutes the smallest 2^(2b) >= size; values that fall outside range(size) are permuted again
    until they fall inside ("cycle walking": Black and Rogaway, "Ciphers with arbitrary finite domains", 2002), less
    than four times on average. The round function is the mixer of SplitMix64 (Steele, Lea and Flood, "Fast splittable
    pseudorandom number generators", 2014) over the half and a round key.
    """

    def __init__(self, size: int, seed: int) -> None:
        if size < 1:
            raise ValueError(f"A permutation needs at least one element, not {size}.")
        self.size = size
        self._half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        self._keys = [_mix((_mix(seed & _WORD) + _GOLDEN * turn) & _WORD) for turn in range(1, _ROUNDS + 1)]

    def __call__(self, i: int) -> int:
        if not 0 <= i < self.size:
            raise IndexError(f"{i} is not in range({self.size}).")
        half = (1 << self._half_bits) - 1
        while True:
            left, right = i >> self._half_bits, i & half
            for key in self._keys:
                left, right = right, left ^ (_mix(right ^ key) & half)
            i = left << self._half_bits | right
            if i < self.size:
                return i


def sample_index(seed: int, sample: int, size: int) -> int:
    """Which of `size` items sample number `sample` of a run is.

    Every epoch of `size` samples visits each item once, in an order of its own.
    """
    epoch, place = divmod(sample, size)
    return Permutation(size, _mix(seed & _WORD) + epoch)(place)


def shuffled(size: int, seed: int) -> NDArray[np.int64]:
    """range(size) in a random order, int64 [size], all at once: sorted by one random word for each number."""
    # NumPy promises the words of a bit generator for all its versions, but not the result of `permutation`.
    words = np.random.PCG64(seed & _WORD).random_raw(size)
    return np.argsort(words, kind="stable")


def random_words(seed: int, stream: NDArray[np.int64], place: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Word number `place` of each of many streams, which are numbered too; the two are broadcast against each other."""
    golden = np.uint64(_GOLDEN)
    start = _mix_all(np.uint64(_mix(seed & _WORD)) + golden * stream.astype(np.uint64))
    return _mix_all(start + golden * place.astype(np.uint64))


def _mix_all(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """`_mix` of each word."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _mix(word: int) -> int:
    """The finaliser of SplitMix64 on a 64-bit word."""
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
    return word ^ (word >> 31)
