import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gnunet.data.example_rng import ExampleRNG, row_order, split_rows
from gnunet.errors import ConfigError, DataError
from gnunet.random_streams import Stream, StreamKey, generator


@given(st.integers(0, 2**64 - 1), st.sampled_from(StreamKey), st.integers(0, 2**64 - 1))
@settings(max_examples=50, deadline=None)
def test_stream_restarts_at_every_index(seed, purpose, index):
    stream = Stream(seed, purpose)
    stream.at(7).standard_normal(5, dtype=np.float32)  # leaves half a word and a part-used block behind
    again = stream.at(index).standard_normal(9, dtype=np.float32)
    np.testing.assert_array_equal(again, generator(seed, purpose, index).standard_normal(9, dtype=np.float32))


def test_streams_never_change():
    # Other numbers here mean that a run resumed from an older checkpoint sees other examples.
    assert Stream(5, StreamKey.EXAMPLE).raw(3, 2).tolist() == [9963805479923663375, 424213220758705450]
    np.testing.assert_array_equal(
        Stream(5, StreamKey.EXAMPLE).raw(3, 8),
        np.random.Philox(key=[5, StreamKey.EXAMPLE], counter=[0, 0, 0, 3]).random_raw(8),
    )


def test_streams_never_overlap():
    # Index i is counter i * 2**192 and up: even 10**6 blocks end far below the next index's first.
    bits = np.random.Philox(key=[0, 1], counter=[0, 0, 0, 3])
    bits.advance(10**6)
    assert bits.state["state"]["counter"].tolist() == [10**6, 0, 0, 3]
    streams = list(itertools.product((0, 1), StreamKey, (0, 1, 2, 2**63)))
    numbers = {number for seed, key, index in streams for number in Stream(seed, key).raw(index, 100).tolist()}
    assert len(numbers) == len(streams) * 100


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seed_out_of_range(seed):
    with pytest.raises(ConfigError, match="seed: "):
        generator(seed, StreamKey.NOISE, 0)


@given(st.integers(0, 2**64 - 1), st.integers(1, 40), st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_each_epoch_visits_each_row_once(seed, num_rows, epoch):
    indices = range(epoch * num_rows, (epoch + 1) * num_rows)
    rows = ExampleRNG(seed, num_rows).examples(indices).rows
    assert sorted(rows) == list(range(num_rows))
    np.testing.assert_array_equal(rows, row_order(seed, epoch, num_rows))
    assert not np.array_equal(row_order(seed, epoch, 50), row_order(seed, epoch + 1, 50))


def test_examples_do_not_depend_on_the_list_they_are_in():
    indices = [40, 3, 3, 99, 0, 41]
    together = ExampleRNG(1, 10).examples(indices)
    alone = [ExampleRNG(1, 10).examples([k]) for k in indices]
    for field in range(len(together)):
        np.testing.assert_array_equal(together[field], np.concatenate([a[field] for a in alone]))


def test_frequencies():
    draws = ExampleRNG(3, 100).examples(range(20_000))
    assert abs(draws.flip.mean() - 0.5) < 0.015
    assert abs((draws.drop < 0.1).mean() - 0.1) < 0.01
    assert abs(draws.u.mean() - 0.5) < 0.01
    assert abs(np.histogram(draws.u, 10, (0, 1))[0] - 2000).max() < 250
    assert np.abs(np.corrcoef([draws.flip, draws.drop, draws.u]) - np.eye(3)).max() < 0.04
    assert draws.drop.min() >= 0 and draws.drop.max() < 1


@pytest.mark.parametrize("word", [0, 2**64 - 1])
def test_u_is_strictly_between_0_and_1(word, monkeypatch):
    monkeypatch.setattr(Stream, "raw", lambda self, index, count: np.full(count, word, np.uint64))
    assert 0 < ExampleRNG(0, 1).examples([0]).u[0] < 1


def test_noise_is_standard_normal_and_uncorrelated():
    noise = np.empty((20, 32, 32, 4), np.float32)
    ExampleRNG(0, 9).fill_noise(range(20), noise)
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    assert np.abs(np.corrcoef(noise.reshape(20, -1)) - np.eye(20)).max() < 5 / 64


def test_split_rows():
    train, validation = split_rows(100, 10)
    assert sorted([*train, *validation]) == list(range(100))
    assert len(validation) == 10
    assert (np.diff(train) > 0).all() and (np.diff(validation) > 0).all()
    np.testing.assert_array_equal(split_rows(100, 10)[1], validation)
    assert len(split_rows(100, 0)[1]) == 0
    with pytest.raises(DataError, match="data.validation_images.*0 to 99"):
        split_rows(100, 100)


def test_a_row_of_each_class_is_never_held_out():
    labels = np.array([0] * 97 + [1, 2, 3])
    for held_out in (0, 10, 50, 96):
        train, validation = split_rows(100, held_out, labels)
        assert sorted([*train, *validation]) == list(range(100)) and len(validation) == held_out
        assert set(labels[train]) == {0, 1, 2, 3}
    with pytest.raises(DataError, match="data.validation_images.*0 to 96.*4 classes"):
        split_rows(100, 97, labels)
    frequent = np.arange(100) % 2
    for rows, expected in zip(split_rows(100, 10, frequent), split_rows(100, 10), strict=True):
        np.testing.assert_array_equal(rows, expected)
