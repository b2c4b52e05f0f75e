import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from gnunet.data import decode, decoder_processes
from gnunet.data.decoder_processes import Decoders
from gnunet.errors import DataError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
IMAGE = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)


@pytest.fixture
def decoders():
    with Decoders(1) as decoders:
        yield decoders


def spin():
    while True:
        pass


FAULTS = {
    "time": (spin, "took more than 0.1 s"),
    "memory": (lambda: bytearray(2**31), "memory"),
    "killed": (lambda: os.kill(os.getpid(), signal.SIGKILL), "signal 9"),
    "exception": (lambda: 1 / 0, "division by zero"),
}


@pytest.mark.parametrize(("fault", "message"), FAULTS.values(), ids=FAULTS)
def test_what_ends_a_decoder_is_an_error_for_its_image_alone(monkeypatch, fault, message):
    monkeypatch.setattr(decoder_processes, "MAX_SECONDS", 0.1)
    monkeypatch.setattr(decoder_processes, "MAX_BYTES", 2**30)
    original = decode.flatten
    monkeypatch.setattr(decode, "flatten", lambda image: original(image) if image.size == (4, 4) else fault())
    with Decoders(2) as decoders, ThreadPoolExecutor(2) as pool:
        monkeypatch.delattr(os, "fork")  # which torch's process groups may not survive in a thread
        tall = [np.tile(IMAGE, (n, 1, 1)) for n in (1, 2, 2, 2, 1, 1)]
        results = [pool.submit(decoders.decode, (image,), 4, 3) for image in tall]
        for image, result in zip(tall, results, strict=True):
            if len(image) == 4:
                np.testing.assert_array_equal(result.result()[0], IMAGE)
            else:
                with pytest.raises(ValueError, match=message):
                    result.result()


def test_large_images_are_decoded_one_at_a_time(decoders, monkeypatch):
    monkeypatch.setattr(decoder_processes, "LARGE_IMAGE_PIXELS", 15)
    held = []
    original = decoder_processes.DecoderProcess.decode

    def decode_and_note(self, *arguments):
        held.append((arguments[-1], decoders._large_image_lock.locked()))
        return original(self, *arguments)

    monkeypatch.setattr(decoder_processes.DecoderProcess, "decode", decode_and_note)
    np.testing.assert_array_equal(decoders.decode((IMAGE,), 4, 3)[0], IMAGE)
    decoders.decode((IMAGE[:3, :3],), 3, 3)
    assert held == [(15, False), (decode.MAX_PIXELS, True), (15, False)]


def test_processes_that_cannot_be_started_or_are_ended_are_no_fault_of_the_image(decoders, monkeypatch):
    decoders._processes[0].close()
    with pytest.raises(DataError, match="ended"):
        decoders.decode((IMAGE,), 4, 3)
    monkeypatch.setattr(os, "fork", lambda: (_ for _ in ()).throw(BlockingIOError("too many")))
    with pytest.raises(DataError, match="too many"), Decoders(1):
        pass


class EndsOtherProcesses:
    """Ends the process that frees it if that did not create it, as torch's process groups may."""

    def __init__(self):
        self.pid = os.getpid()

    def __del__(self):
        if os.getpid() != self.pid:
            os._exit(1)


def test_processes_start_in_the_thread_that_enters(monkeypatch):
    local = threading.local()  # which a fork in another thread frees in the child
    local.value = EndsOtherProcesses()
    monkeypatch.setattr(decode, "flatten", lambda image: (_ for _ in ()).throw(ValueError(os.getpid())))
    with Decoders(2) as decoders, ThreadPoolExecutor(2) as pool:
        errors = [pool.submit(decoders.decode, (IMAGE,), 4, 3).exception() for _ in range(4)]
    assert all(int(str(error)) != os.getpid() for error in errors)
