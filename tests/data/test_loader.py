import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import gnunet
from gnunet.data import TrainingDataset, training_loader
from gnunet.data.loader import MicroBatchSampler
from gnunet.errors import ConfigError


@pytest.fixture
def examples(table):
    return TrainingDataset(table, np.arange(23), seed=11, flip=True, label_dropout=0.2, class_conditional=True)


def load(examples, *, first=0, last=48, batch_size=16, micro_batch_size=None, world_size=1, num_workers=0):
    """All ranks' micro-batches, as {example index: its bytes}."""
    seen = {}
    for rank in range(world_size):
        loader = training_loader(
            examples,
            first=first,
            last=last,
            batch_size=batch_size,
            micro_batch_size=micro_batch_size or batch_size // world_size,
            rank=rank,
            world_size=world_size,
            num_workers=num_workers,
        )
        for batch in loader:
            for i, index in enumerate(batch["index"].tolist()):
                assert index not in seen
                seen[index] = {name: tensor[i].numpy().tobytes() for name, tensor in batch.items()}
    return seen


@pytest.mark.parametrize(
    "keys",
    [
        {"batch_size": 8},
        {"micro_batch_size": 4},
        {"world_size": 2},
        {"world_size": 4},
        {"world_size": 2, "micro_batch_size": 2},
        {"world_size": 4, "micro_batch_size": 4, "num_workers": 2},
        {"num_workers": 2},
        {"num_workers": 1, "micro_batch_size": 1},
    ],
    ids=str,
)
def test_bytes_depend_on_the_index_alone(examples, keys):
    assert load(examples, **keys) == load(examples)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resuming_continues_the_same_examples(examples, num_workers):
    whole = load(examples)
    rest = load(examples, first=32, num_workers=num_workers)
    assert rest == {index: whole[index] for index in range(32, 48)}


def test_indices_of_each_rank_and_micro_batch():
    def indices(rank):
        return list(MicroBatchSampler(first=8, last=17, batch_size=8, micro_batch_size=2, rank=rank, world_size=2))

    assert indices(0) == [[8, 9], [12, 13], [16, 17], [20, 21]]
    assert indices(1) == [[10, 11], [14, 15], [18, 19], [22, 23]]
    assert len(MicroBatchSampler(first=8, last=17, batch_size=8, micro_batch_size=2, rank=0, world_size=2)) == 4


def test_sizes_that_do_not_divide():
    with pytest.raises(ConfigError, match="train.batch_size.*a multiple of 4"):
        MicroBatchSampler(first=0, last=10, batch_size=10, micro_batch_size=2, rank=0, world_size=2)
    with pytest.raises(ConfigError, match="image 3"):
        MicroBatchSampler(first=3, last=10, batch_size=2, micro_batch_size=2, rank=0, world_size=1)


@pytest.mark.parametrize("channels", [1, 3])
def test_batches_from_workers_keep_types_and_strides(table, channels):
    table = type(table).from_arrays(table.images[..., :channels])
    examples = TrainingDataset(table, np.arange(23), seed=0, flip=True)
    sizes = {"first": 0, "last": 6, "batch_size": 6, "micro_batch_size": 6}
    here, there = (next(iter(training_loader(examples, **sizes, num_workers=n))) for n in (0, 1))
    assert type(there) is dict and set(here) == set(there)
    for name, tensor in here.items():
        assert torch.equal(there[name], tensor)
        assert (there[name].dtype, there[name].stride()) == (tensor.dtype, tensor.stride())


GROUP = """
import os, signal, subprocess, sys
import numpy as np
from gnunet.data import DecodedImages, TrainingDataset, training_loader

caught = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: caught.append(number))
table = DecodedImages.from_arrays(np.zeros((9, 8, 8, 3), np.uint8))
examples = TrainingDataset(table, np.arange(9), seed=0, flip=True)
loader = training_loader(
    examples, first=0, last=400, batch_size=4, micro_batch_size=4, num_workers=2
)
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
def test_workers_survive_signals_to_the_process_group():
    root = Path(gnunet.__file__).parent.parent
    result = subprocess.run(
        [sys.executable, "-c", GROUP],
        env={**os.environ, "PYTHONPATH": str(root)},
        start_new_session=True,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert (result.returncode, result.stdout) == (3, "100 True\n"), result.stderr
    assert "Traceback" not in result.stderr
