"""Random numbers as pure functions of (seed, purpose, index), drawn with a counter-based generator.

No generator keeps state between examples, and no rank, worker or batch enters a key: a resumed run, any number of
processes and any accumulation see the same draws. The generator is NumPy's Philox4x64-10 (Salmon et al., 2011).
Uniforms are taken from its raw output, which NumPy keeps fixed; normals and permutations use
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
    MASK = 10  # index: example; the part of an image that its condition leaves out
    FIXED_MASK = 11  # index: example of the validation set, or condition to sample from
    LATENT = 12  # index: example; where in its autoencoder's distribution its latents are
    FIXED_LATENT = 13  # index: example of the validation set
    AUGMENT = 14  # index: example; its transforms


class Stream:
    """The streams of one (seed, purpose), one stream for each index; ConfigError unless 0 <= seed < 2**64.

    The index is the highest word of Philox's 256-bit counter, so each stream has 2**192 blocks to itself, and
    streams never overlap. Moving to an index reuses one generator: several times faster than making a new one.
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
