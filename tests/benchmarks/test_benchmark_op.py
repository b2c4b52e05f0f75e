"""The operator's benchmark runs on a CPU, refuses to time what is wrong, and its arithmetic is right."""

import json
import math

import pytest
import torch

import benchmark_op
from common import case as case_module
from common import peers, shapes, summary, timing

TINY = ["--device", "cpu", "--max_elements", "4096", "--seconds_per_case", "0.001"]


@pytest.fixture
def run(tmp_path):
    """Runs the script with more arguments and returns the record it wrote."""

    def run(*arguments: str) -> dict:
        benchmark_op.main([*TINY, "--out", str(tmp_path), *arguments])
        (path,) = tmp_path.glob("*-cpu-operator.json")
        return json.loads(path.read_text())

    return run


def test_record_of_a_run(run):
    names = ("ddpm_cifar10/256@4/n128", "svd/1280@14x18x32/n1", "sd15/320@64/n1")
    record = run("--shapes", *names, "--layouts", "channels_last", "contiguous")
    assert record["torch"] == torch.__version__ and record["copy_gb_per_s"] > 0
    assert record["not_run"] == [] and record["targets"] == []
    # One of each family, then the next of each.
    assert [case["label"].split()[0] for case in record["cases"]] == [*names, *names]
    assert [case["layout"] for case in record["cases"]] == ["channels_last"] * 3 + ["contiguous"] * 3
    for case in record["cases"]:
        assert math.prod(case["shape"]) <= 4096 and case["tensor_bytes"] == 4 * math.prod(case["shape"])
        timed = {name for name, result in case["results"].items() if result["status"] == "right"}
        assert {"gnunet", "copy", "rms_norm", "eager_contiguous", "eager_channels_last"} <= timed
        for name in timed:
            for direction, tensors in (("forward", 2), ("backward", 3), ("both", 5)):
                numbers = case["results"][name][direction]
                rate = tensors * case["tensor_bytes"] / (numbers["us"] * 1e-6)
                assert numbers["share"] == pytest.approx(rate / (record["copy_gb_per_s"] * 1e9), rel=2e-3)
                assert numbers["us_quartiles"][0] <= numbers["us"] <= numbers["us_quartiles"][1]
                assert ("ratio" in numbers) == name.startswith("eager")
        assert all(error < 1e-5 for error in case["results"]["gnunet"]["errors"].values())
    ratios = [case["results"]["eager_contiguous"]["both"]["ratio"] for case in record["cases"]]
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    assert record["geometric_means"]["eager_contiguous"]["both"] == pytest.approx(mean, rel=1e-3)


def test_out_of_time_after_the_first_case(run):
    record = run("--shapes", "ddpm_cifar10/512@4", "adm64/768@8", "--time_limit", "1e-9")
    assert [case["label"] for case in record["cases"]] == ["ddpm_cifar10/512@4/n128 channels_last float32"]
    assert record["not_run"] == ["adm64/768@8/n32 channels_last float32"]


def test_every_case_is_checked_before_the_first_is_timed(run):
    names = ("ddpm_cifar10/512@4", "adm64/768@8")
    record = run("--shapes", *names, "--check_first", "2", "--time_limit", "1e-9")
    assert all(case["results"]["gnunet"]["status"] == "right" for case in record["cases"])
    assert ["copy" in case["results"] for case in record["cases"]] == [True, False]
    assert record["not_run"] == [record["cases"][1]["label"]]
    record = run("--shapes", names[0], "--check_only")
    assert record["not_run"] == [case["label"] for case in record["cases"]] != []


def test_what_is_wrong_or_fails_is_not_timed(run, monkeypatch):
    def wrong(case):
        right = peers.PEERS["eager_contiguous"](case)
        return peers.Contender(lambda *inputs: right.function(*inputs) * 1.01, right.layout)

    def failing(case):
        def function(x, weight, bias):
            raise RuntimeError("no kernel\nfor this")

        return peers.Contender(function, "contiguous")

    monkeypatch.setitem(peers.PEERS, "wrong", wrong)
    monkeypatch.setitem(peers.PEERS, "failing", failing)
    (case,) = run("--shapes", "ddpm_cifar10/512@4", "--peers", "wrong", "failing")["cases"]
    assert case["results"]["wrong"]["status"] == "wrong"
    assert case["results"]["wrong"]["errors"]["y"] == pytest.approx(0.01, rel=1e-3)
    assert case["results"]["failing"]["status"] == "failed: RuntimeError: no kernel"
    assert not any("forward" in case["results"][name] for name in ("wrong", "failing"))
    assert "forward" in case["results"]["gnunet"]


def test_fails_where_the_operator_is_wrong(run, monkeypatch):
    zero = peers.Contender(lambda x, weight, bias: x * weight.sum() * bias.sum() * 0, "channels_last")
    monkeypatch.setattr(case_module, "gnunet", lambda case, backend: zero)
    with pytest.raises(SystemExit, match="wrong"):
        run("--shapes", "ddpm_cifar10/512@4")


def test_refuses(capsys, monkeypatch):
    with pytest.raises(SystemExit):
        benchmark_op.main([*TINY, "--shapes", "sd14"])
    assert "no shape is called 'sd14'" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        benchmark_op.main(["--device", "cuda"])
    assert "torch sees no GPU" in capsys.readouterr().err


def test_exact_values_do_not_depend_on_how_many_groups_are_computed_at_once(monkeypatch):
    case = shapes.Case("tiny", (2, 12, 3, 5), num_groups=4)
    x, dy = (torch.randn(case.shape) for _ in range(2))
    weight, bias = torch.randn(12), torch.randn(12)
    whole = peers.exact(case, x, weight, bias, dy)
    monkeypatch.setattr(peers, "_REFERENCE_ELEMENTS", 100)
    parts = peers.exact(case, x, weight, bias, dy)
    for name, value in whole.items():
        assert value.dtype == torch.float64
        torch.testing.assert_close(parts[name], value)
    assert peers.errors({"y": whole["y"] * 0.75}, {"y": whole["y"]}) == pytest.approx({"y": 0.25})
    assert not peers.is_right(case, {"y": math.nan})


def test_sizes_of_a_case():
    case = shapes.Case("sd15", (8, 320, 64, 64))
    assert case.tensor_bytes == 8 * 320 * 64 * 64 * 2
    assert case.working_set == 4 * 10 * 64 * 64 * 2  # 4 groups of 10 channels fill 64 bytes
    assert shapes.Case("sd15", case.shape, "contiguous").working_set == 10 * 64 * 64 * 2
    assert case.shrunk(3 * 10**6).shape == (2, 320, 64, 64) and case.shrunk(2**16).shape == (1, 320, 8, 16)
    assert case.shrunk(1).shape == (1, 320, 1, 1) and case.shrunk(None) == case
    cache = 4 * case.working_set
    assert summary.fits_one_pass(case, "backward", cache)
    assert not summary.fits_one_pass(case, "backward", cache - 2)
    assert summary.fits_one_pass(case, "forward", cache // 2)


def test_order_turns_around_and_repeats_fill_the_time():
    order = []

    class Contender:
        def __init__(self, name):
            self.name = name

        def seconds(self, repeats):
            order.append((self.name, repeats))
            return float(len(order))

    times = timing.alternate({"a": Contender("a"), "b": Contender("b")}, seconds=0.0, rounds=4)
    assert [name for name, _ in order] == [*"ab", *"abbaabba"] and all(repeats == 1 for _, repeats in order)
    assert times == {"a": [3.0, 6.0, 7.0, 10.0], "b": [4.0, 5.0, 8.0, 9.0]}


def test_sets_of_inputs_outsize_the_cache_twice():
    needed = timing.sets_needed
    assert needed(call_bytes=30, cache_bytes=60) == 4 and needed(call_bytes=31, cache_bytes=60) == 4
    assert needed(call_bytes=121, cache_bytes=60) == 1 and needed(call_bytes=5, cache_bytes=0) == 1


def test_numbers_of_a_direction():
    numbers = summary.timing([4e-6, 2e-6, 3e-6], [2e-6, 2e-6, 1e-6], floor_bytes=6, bandwidth=4e6)
    assert numbers["us"] == 3 and numbers["share"] == 0.5 and numbers["ratio"] == 2
    assert "ratio" not in summary.timing([1.0, 1.0], None, 1, 1.0)
