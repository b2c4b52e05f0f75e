import json
import math

from gnunet.checkpoint.jsonl import JsonlLogger, read_jsonl


def test_write_appends_one_object_per_line_with_null_for_nan_and_infinity(tmp_path):
    log = JsonlLogger(tmp_path / "m.jsonl")
    log.write({"images": 8, "loss": 0.1})
    log.write({"images": 16, "loss": math.nan, "bins": [1.0, math.inf, None]})
    lines = ['{"images": 8, "loss": 0.1}', '{"images": 16, "loss": null, "bins": [1.0, null, null]}']
    assert log.path.read_text().splitlines() == lines


def test_truncate_after_drops_later_lines_and_a_partial_one(tmp_path):
    log = JsonlLogger(tmp_path / "m.jsonl")
    log.truncate_after(0)
    assert not log.path.exists()
    for images in (8, 16, 16, 24):
        log.write({"images": images})
    with log.path.open("a") as file:
        file.write('{"images": 3')
    log.truncate_after(16)
    assert [json.loads(line)["images"] for line in log.path.read_text().splitlines()] == [8, 16, 16]
    log.truncate_after(0)
    assert log.path.read_text() == ""


def test_read_leaves_out_a_line_that_is_being_written(tmp_path):
    path = tmp_path / "m.jsonl"
    assert read_jsonl(path) == []
    path.write_text('{"images": 1}\n{"images": 2')
    assert read_jsonl(path) == [{"images": 1}]
