"""Random numbers as pure functions of (seed, purpose, index), drawn with a counter-based generator.

Example k of a run is a pure function of (seed, k): no generator keeps state between examples, and no rank,
worker or batch enters a key. A resumed run, any number of processes and any accumulation therefore see the
same draws, and two runs with one seed are compared on the same images and noise.

The generator is Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) as in
NumPy. Uniforms are taken from its raw output, which NumPy keeps fixed; normals and permutations use
numpy.random.Generator, whose stream NumPy may change between releases (NEP 19).
"""

from enum import IntEnum

import numpy as np

from gnunet.errors import ConfigError


class StreamKey(IntEnum):
    """What a stream is for: the second half of its key. Numbers never change their meaning."""

    ROW = 1  # index: epoch
    EXAMPLE = 2  # index: example; its noise level, flip and label drop
    NOISE = 3  # index: example
    SAMPLE_NOISE = 4  # index: sampled image
    SAMPLE_STEPS = 5  # index: sampled image; the noise that stochastic samplers add in each step
    SAMPLE_LABEL = 6  # index: sampled image
    VALIDATION = 7  # index: example of the validation set
    HOLDOUT = 8  # index: 0
    DROPOUT = 9  # index: first example of a micro-batch


class Stream:
    """The streams of one (seed, purpose), one stream for each index.

    The index is the highest word of Philox's 256-bit counter, so each stream has 2**192 blocks to itself:
    streams never overlap, however many numbers are drawn. Moving to an index reuses one generator, which is
    several times faster than making a new one.

    Args:
        seed: 0 to 2**64 - 1.
        purpose: what the numbers are for.

    Raises:
        ConfigError: the seed is out of range.
    """

    def __init__(self, seed: int, purpose: StreamKey):
        if not 0 <= seed < 2**64:
            raise ConfigError(f"seed: {seed} given; valid: 0 to 2**64 - 1")
        self._bits = np.random.Philox(key=np.array([seed, purpose], np.uint64))
        self._generator = np.random.Generator(self._bits)
        self._start = self._bits.state  # the state of an unused generator

    def at(self, index: int) -> np.random.Generator:
        """The generator at the start of stream `index` (0 to 2**64 - 1); valid until the next call."""
        self._start["state"]["counter"][3] = index
        self._bits.state = self._start
        return self._generator

    def raw(self, index: int, count: int) -> np.ndarray:
        """The first `count` uint64 of stream `index`."""
        self.at(index)
        return self._bits.random_raw(count)


def generator(seed: int, purpose: StreamKey, index: int) -> np.random.Generator:
    """A new generator at the start of one stream; `Stream` is faster for many indices."""
    return Stream(seed, purpose).at(index)
