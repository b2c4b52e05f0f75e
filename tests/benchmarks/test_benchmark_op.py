"""The operator's benchmark runs on a CPU, refuses to time what is wrong, and its arithmetic is right."""

import importlib
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
    record = run("--shapes", *names, "--check_only")
    assert len(record["cases"]) == 2 and record["not_run"] == [case["label"] for case in record["cases"]]


BREAKING = """
import os
from common.case import Benchmark

def check_case(device, peers, backend, case):
    if "512@4" in case.name:
        os._exit(1)
    if "256@4" in case.name:
        raise ArithmeticError("an illegal memory access")
    return Benchmark(device, peers, backend, 0).run(case, with_times=False)
"""


def test_a_check_that_breaks_takes_no_other_case_with_it(run, monkeypatch, tmp_path):
    """An exception or the death of a process is a case's own; the other cases are timed, before it."""
    (tmp_path / "breaking.py").write_text(BREAKING)  # where the processes find it
    monkeypatch.syspath_prepend(str(tmp_path))
    names = ["ddpm_cifar10/512@4", "ddpm_cifar10/256@4", "adm64/768@8"]
    monkeypatch.setattr(benchmark_op, "check_case", importlib.import_module("breaking").check_case)
    record = run("--shapes", *names, "--check_first", "1", "--time_limit", "60")
    assert record["not_run"] == []  # all are timed in the end
    with pytest.raises(SystemExit, match="wrong"):
        run("--shapes", *names, "--check_first", "1", "--time_limit", "1e-9")
    (path,) = tmp_path.glob("*-cpu-operator.json")
    ours = {case["label"].split("/n")[0]: case["results"]["gnunet"] for case in json.loads(path.read_text())["cases"]}
    assert "forward" in ours["adm64/768@8"]
    assert "BrokenProcessPool" in ours["ddpm_cifar10/512@4"]["status"]
    assert "ArithmeticError" in ours["ddpm_cifar10/256@4"]["status"]


def test_the_record_is_there_before_the_first_case(run, monkeypatch, tmp_path):
    def killed(self, case, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(case_module.Benchmark, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        run("--shapes", "ddpm_cifar10/512@4")
    (path,) = tmp_path.glob("*-cpu-operator.json")
    assert json.loads(path.read_text())["not_run"] == ["ddpm_cifar10/512@4/n128 channels_last float32"]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
def test_yardsticks_move_the_bytes_of_the_case(layout, direction):
    case = shapes.Case("tiny", (2, 12, 3, 5), layout, torch.float32)
    inputs = case_module.make_inputs(case, {layout}, 1, torch.device("cpu"))
    for calls in case_module.YARDSTICKS.values():
        (call,) = calls(inputs, layout, direction)
        result = call()
        result = result[0] if isinstance(result, tuple) else result
        assert result.numel() == case.numel and result.dtype == case.dtype


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


def test_chart(run, tmp_path):
    pytest.importorskip("matplotlib")
    run("--shapes", "ddpm_cifar10/512@4")
    (record,) = tmp_path.glob("*.json")
    benchmark_op.main(["--chart", str(record), str(tmp_path / "chart.png")])
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_compiled_peer(run):
    (case,) = run("--shapes", "ddpm_cifar10/512@4", "--peers", "compile")["cases"]
    compiled = case["results"]["compile"]
    assert compiled["status"] == "right" and compiled["first_calls_seconds"] > 0
    # Backward runs again and again on one graph, after it has run once on another.
    assert all(compiled[direction]["ratio"] > 0 for direction in ("forward", "backward", "both"))


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


def test_names_of_shapes():
    named = shapes.SHAPES
    assert named["sd15/320@64/n8"] == (8, 320, 64, 64) and named["svd/320@14x72x128/n1"] == (1, 320, 14, 72, 128)
    assert shapes.matching(["sd15/320@64", "sd15/320@64/n8"]) == [f"sd15/320@64/n{n}" for n in (1, 8, 32)]
    assert len(shapes.matching(["adm64"])) == 14 and shapes.matching(["svd/320"]) == ["svd/320@14x72x128/n1"]
    default = shapes.cases(None, None, [torch.bfloat16])
    assert {case.layout for case in default} == {"channels_last", "contiguous"}
    assert len({case.label for case in default}) == len(default)
    assert all(shape[1] % shapes.NUM_GROUPS == 0 for shape in named.values())


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


def test_targets():
    def case(
        label,
        *,
        tensor_bytes=10**8,
        fits=True,
        layout="channels_last",
        share=0.9,
        compiled=1.3,
        eager=3.0,
        status="right",
    ):
        directions = ("forward", "backward", "both")
        ours = {"status": status, **{direction: {"share": share} for direction in directions}}
        peers = {
            name: {direction: {"ratio": ratio} for direction in directions}
            for name, ratio in (("compile", compiled), ("eager_channels_last", eager))
        }
        return {
            "label": label, "tensor_bytes": tensor_bytes, "layout": layout,
            "fits_one_pass": {"forward": fits, "backward": fits}, "results": {"gnunet": ours, **peers},
        }  # fmt: skip

    def verdicts(*cases, planned=None):
        found = summary.targets(cases, planned or len(cases), ["compile", "eager_channels_last"])
        return {t["target"].split(", >=")[0]: (t["value"], t.get("at"), t["met"]) for t in found}

    cases = [
        case("a"),
        case("b", share=0.8, compiled=1.3**3),
        case("small", tensor_bytes=10**6, share=0.1, compiled=1 / 1.3),
        case("two passes", fits=False, share=0.1),
        case("contiguous", layout="contiguous", eager=0.1),
    ]
    found = verdicts(*cases)
    assert found["cases of 5 that are right"] == (5, None, True)
    assert found["forward: share of the copy bandwidth, least"] == (0.8, "b", False)
    assert found["backward: share of the copy bandwidth, least"] == (0.8, "b", True)
    assert found["both: ratio to torch.compile, least"] == (1 / 1.3, "small", False)
    assert found["both: ratio to torch.compile, geometric mean"] == (1.3, None, True)
    assert found["forward: ratio to eager channels_last, geometric mean"] == (3.0, None, True)
    # What was not timed may still be the worst.
    partial = verdicts(*cases, planned=6)
    assert partial["cases of 6 that are right"] == (5, None, None)
    assert partial["forward: share of the copy bandwidth, least"] == (0.8, "b", False)
    assert partial["backward: share of the copy bandwidth, least"] == (0.8, "b", None)
    assert partial["both: ratio to torch.compile, geometric mean"] == (1.3, None, None)
    assert verdicts(*cases, case("wrong", status="wrong"), planned=9)["cases of 9 that are right"] == (
        5,
        "wrong",
        False,
    )
    nothing = verdicts(planned=9)
    assert nothing.pop("cases of 9 that are right") == (0, None, None)
    assert set(nothing.values()) == {(None, None, None)}
