"""One of several processes dies or hangs: the others report it and end, and the same command resumes the run."""

import re
import signal

from tests.runs import assert_same_run, signal_in_step

LOST = r"Connection (closed|reset|refused)|Broken pipe"
"""What gloo and the system say of a peer that has died: which of these depends on what was under way."""


def test_the_others_end_with_an_error_and_the_run_resumes(tiny, start_ranks, run_ranks, tmp_path):
    """One killed, the main one killed, one hung, found within train.timeout; the relaunch ends with the same bits."""
    flags = ["--train.sample_every", "0", "--train.validate_every", "0"]
    flags += ["--train.total_images", "24", "--train.checkpoint_every", "8"]
    run_ranks(2, tiny("whole", *flags))
    fates = [("killed", 1, signal.SIGKILL), ("main", 0, signal.SIGKILL), ("hung", 1, signal.SIGSTOP)]
    for name, doomed, number in fates:
        hangs = ["--train.timeout", "8"] if name == "hung" else []
        ranks = start_ranks(2, tiny(name, *flags, *hangs), signal_in_step, doomed, 8, number)
        other = 1 - doomed
        ranks[other].join(600)
        said = ranks.said[other]
        assert ranks[other].exitcode == 2, said
        reason = re.search(r"error: another process of this run has ended or does not respond \((.+)\); the", said)
        assert reason and re.search("Timed out waiting" if name == "hung" else LOST, reason[1]), said
        assert "Traceback" not in said
        assert ("[rank 1] error: " in said) == (other == 1)
        ranks[doomed].kill()
        ranks[doomed].join()
        assert ranks[doomed].exitcode == -signal.SIGKILL
        assert "resuming" in run_ranks(2, tiny(name, *flags))[0]
        assert_same_run(tmp_path / name, tmp_path / "whole")
