import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch
from torch.utils.data import dataloader

from gnunet.data import TrainingDataset, TrainingLoader
from gnunet.data.loader import MicroBatchSampler
from gnunet.errors import ConfigError, DataError, TrainingError
from tests.tables import make_table


@pytest.fixture
def examples(table):
    return TrainingDataset(table, np.arange(23), seed=11, flip=True, label_dropout=0.2, class_conditional=True)


def load(examples, *, batch_size=16, world_size=1, **keys):
    """All ranks' micro-batches, as {example index: its bytes}."""
    defaults = {"first": 0, "last": 48, "micro_batch_size": batch_size // world_size}
    keys = {**defaults, "batch_size": batch_size, "world_size": world_size, **keys}
    seen = {}
    for rank in range(world_size):
        for batch in TrainingLoader(examples, rank=rank, **keys):
            for i, index in enumerate(batch["index"].tolist()):
                assert index not in seen
                seen[index] = {name: tensor[i].numpy().tobytes() for name, tensor in batch.items()}
    return seen


@pytest.mark.parametrize(
    "keys",
    [
        {"batch_size": 8}, {"micro_batch_size": 4}, {"world_size": 2}, {"world_size": 4},
        {"world_size": 2, "micro_batch_size": 2}, {"world_size": 4, "micro_batch_size": 4, "num_workers": 2},
        {"num_workers": 2}, {"num_workers": 1, "micro_batch_size": 1},
    ],
    ids=str,
)  # fmt: skip
def test_bytes_depend_on_the_index_alone(examples, keys):
    assert load(examples, **keys) == load(examples)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resuming_continues_the_same_examples(examples, num_workers):
    whole = load(examples)
    rest = load(examples, first=32, num_workers=num_workers)
    assert rest == {index: whole[index] for index in range(32, 48)}


def test_indices_of_each_rank_and_micro_batch():
    sizes = {"first": 8, "last": 17, "batch_size": 8, "micro_batch_size": 2, "world_size": 2}
    one, other = (MicroBatchSampler(**sizes, rank=rank) for rank in range(2))
    assert list(one) == [[8, 9], [12, 13], [16, 17], [20, 21]] and len(one) == 4
    assert list(other) == [[10, 11], [14, 15], [18, 19], [22, 23]]


def test_batch_size_that_does_not_divide_where_training_starts():
    with pytest.raises(ConfigError, match="image 3"):
        MicroBatchSampler(first=3, last=10, batch_size=2, micro_batch_size=2, rank=0, world_size=1)


@pytest.mark.parametrize("channels", [1, 3])
def test_batches_from_workers_keep_types_and_strides(table, channels):
    table = make_table(table.images[..., :channels])
    examples = TrainingDataset(table, np.arange(23), seed=0, flip=True)
    sizes = {"first": 0, "last": 6, "batch_size": 6, "micro_batch_size": 6}
    here, there = (next(iter(TrainingLoader(examples, **sizes, num_workers=n))) for n in (0, 1))
    assert type(there) is dict and set(here) == set(there)
    for name, tensor in here.items():
        assert torch.equal(there[name], tensor)
        assert (there[name].dtype, there[name].stride()) == (tensor.dtype, tensor.stride())


@pytest.fixture
def hard_loader(examples, monkeypatch):
    """`hard_loader(fault)`: a loader with two workers, in which `fault` is called for the examples from 32 on."""

    def make(fault):
        def getitems(self, indices, original=TrainingDataset.__getitems__):
            if indices[0] >= 32:
                fault()
            return original(self, indices)

        monkeypatch.setattr(TrainingDataset, "__getitems__", getitems)
        return TrainingLoader(examples, first=0, last=64, batch_size=16, micro_batch_size=16, num_workers=2)

    return make


def fail(error):
    raise error


FAULTS = {
    "killed": (lambda: os.kill(os.getpid(), signal.SIGKILL), "worker"),
    "bus error": (lambda: os.kill(os.getpid(), signal.SIGBUS), "worker"),
    "KeyError": (lambda: fail(KeyError("lost")), "KeyError: 'lost'"),
    "OSError": (lambda: fail(OSError(5, "bad disk")), "OSError: .*bad disk"),
    "MemoryError": (lambda: fail(MemoryError()), "MemoryError"),
    "DataError": (lambda: fail(DataError("bad data")), "DataError: bad data"),
}


@pytest.mark.parametrize(("fault", "named"), FAULTS.values(), ids=FAULTS)
def test_worker_that_fails_ends_the_iteration(hard_loader, fault, named):
    with pytest.raises(TrainingError, match=f"{named}.*data.num_workers"):
        list(hard_loader(fault))


def test_worker_that_is_killed_while_it_waits(hard_loader):
    batches = iter(hard_loader(lambda: None))
    next(batches)
    for worker in multiprocessing.active_children():
        worker.kill()
    with pytest.raises(TrainingError, match="worker"):
        list(batches)


def test_batches_arrive_without_shared_memory(examples, monkeypatch):
    expected = load(examples, num_workers=2)
    monkeypatch.setattr(torch.Tensor, "share_memory_", lambda tensor: fail(RuntimeError("No space left on device")))
    assert load(examples, num_workers=2) == expected


def test_training_process_loads_where_no_worker_can_start(examples, monkeypatch):
    expected = load(examples)
    monkeypatch.setattr(dataloader, "_MultiProcessingDataLoaderIter", lambda loader: fail(OSError(28, "No space left")))
    assert load(examples, num_workers=2) == expected


GROUP = """
import os, signal, subprocess, sys
import numpy as np
from gnunet.data import TrainingDataset, TrainingLoader
from tests.tables import make_table

caught = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: caught.append(number))
table = make_table(np.zeros((9, 8, 8, 3), np.uint8))
examples = TrainingDataset(table, np.arange(9), seed=0, flip=True)
loader = TrainingLoader(examples, first=0, last=400, batch_size=4, micro_batch_size=4, num_workers=2)
batches = iter(loader)
next(batches), next(batches)  # one from each worker: both are up
group = os.getpgrp()
for name in ("-INT", "-TERM"):
    subprocess.run(["kill", name, "--", f"-{group}"], start_new_session=True, check=True)
count = 2 + sum(1 for _ in batches)
print(count, sorted(caught) == [signal.SIGINT, signal.SIGTERM], flush=True)
unfinished = iter(loader)
next(unfinished)
sys.exit(3)  # with workers alive, which must not keep the process from ending
"""


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="Linux only")
def test_workers_survive_signals_to_the_process_group(run_python):
    result = run_python(GROUP)
    assert (result.returncode, result.stdout) == (3, "100 True\n"), result.stderr
    assert "Traceback" not in result.stderr
