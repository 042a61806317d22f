import csv
import io
import json

import pytest

from sparse_exp.compare.comparison import compare
from sparse_exp.compare.pictures import draw
from sparse_exp.compare.table import as_csv, as_data, as_markdown, remarks
from sparse_exp.errors import ConfigError, SparseExpError
from sparse_exp.runs.past import PastRun


def run(name, speed=None, map50=None, size=None, status="FINISHED", words=(), **more):
    given = {"b/items_per_s": speed, "val/map50": map50, "size/onnx_gzip_mb": size, **more}
    metrics = {key: value for key, value in given.items() if value is not None}
    return PastRun(name, f"/runs/{name}", status, metrics, ("seed=0", *words, f"paths.run=/runs/{name}"))


RUNS = [
    run("slow", 5, 0.7, 20, words=("model=l",)),
    run("good", 20, 0.62, 3.5, words=("model=s", "recipe=transfer")),
    run("beaten", 19, 0.62, 3, words=("model=s",)),
    run("fast", 60, 0.45, 1, words=("model=n",)),
    run("broken", 99, 0.9, 1, status="FAILED"),
    run("unmeasured", None, 0.65, 2),
]


@pytest.fixture
def comparison():
    return compare(RUNS, "items_per_s", "map50", limits="map50>=0.6, size<=4", by="items_per_s")


def test_rows_are_in_order_and_only_finished_ones_are_weighed(comparison):
    assert [row.label for row in comparison.rows] == [
        "slow",
        "unmeasured",
        "good",
        "beaten",
        "fast",
        "broken",
    ]
    assert {row.label for row in comparison.rows if row.front} == {"slow", "good", "fast"}
    assert [row.number for row in comparison.rows] == [1, 2, 3, 4, 5, 6]


def test_the_best_keeps_the_limits(comparison):
    assert comparison.best.label == "good"
    assert compare(RUNS, "items_per_s", "map50", by="size").best.label == "fast"  # less is better
    assert compare(RUNS, "items_per_s", "map50", limits="size<=4").best.label == "unmeasured"  # by y
    assert compare(RUNS, "items_per_s", "map50").best is None


def test_of_equals_the_more_accurate_is_the_best():
    equals = [run("a", 10, 0.5), run("b", 10, 0.6), run("c", 10, 0.55)]
    assert compare(equals, "items_per_s", "map50", by="items_per_s").best.label == "b"


def test_what_the_spread_does_not_tell_apart_is_no_winner():
    """The spread is (largest - smallest) / median of the repeats: 20.5 +- 0.6 and 20.0 +- 0.5 overlap."""
    runs = [
        run("a", 20.5, 0.50, **{"b/spread": 0.06}),
        run("b", 20.0, 0.55, **{"b/spread": 0.05}),
        run("c", 19.0, 0.60, **{"b/spread": 0.02}),
        run("d", 20.4, 0.40, **{"b/spread": 0.02}),
    ]
    found = compare(runs, "items_per_s", "map50", by="items_per_s")
    assert found.best.label == "b"
    assert {row.label for row in found.tied} == {"a", "d"}
    tied = "The spread of items_per_s does not tell it from run 3 (20.5), 4 (20.4)"
    assert remarks(found)[-2] == f"{tied}: of these it is the best in map50."
    assert remarks(found)[-1].startswith("Make it again: ")
    assert as_data(found)["tied"] == [3, 4]
    steady = [run("a", 20.5, 0.50, **{"b/spread": 0.01}), run("b", 20.0, 0.55, **{"b/spread": 0.01})]
    assert compare(steady, "items_per_s", "map50", by="items_per_s").best.label == "a"
    assert compare(steady, "items_per_s", "map50", by="items_per_s").tied == ()


def test_intervals_of_a_metric_count_and_the_other_axis_decides():
    def kept(name, value, low, high, speed):
        recovery = {"recovery/e/map50": value, "recovery/e/map50_low": low, "recovery/e/map50_high": high}
        return run(name, speed, None, **recovery)

    runs = [kept("a", 0.98, 0.95, 1.0, 10), kept("b", 0.97, 0.94, 0.99, 30), kept("c", 0.9, 0.87, 0.93, 90)]
    found = compare(runs, "items_per_s", "recovery/e/map50", limits="")
    assert found.best.label == "b"
    assert [row.label for row in found.tied] == ["a"]


def test_when_none_keeps_the_limits_it_says_how_close_they_come():
    with pytest.raises(
        SparseExpError, match=r"map50 >= 0.8 by 0 of 5 .* reach 0.7; size.* <= 4 by 4 of 5"
    ) as error:
        compare(RUNS, "items_per_s", "map50", limits="map50>=0.8, size<=4")
    assert "\n" not in str(error.value)


def test_what_differs_leaves_out_what_all_share_and_where_they_lie(comparison):
    words = {row.label: row.own_words for row in comparison.rows}
    assert words["good"] == "model=s recipe=transfer"
    assert words["unmeasured"] == ""


def test_what_the_label_says_is_not_repeated():
    runs = [
        run("0-yolov5n-dense", 1, 0.1, words=("model=yolov5n", "recipe=dense", "seed=0")),
        run("1-yolov5n-dense", 1, 0.1, words=("model=yolov5n", "recipe=dense", "seed=1")),
        run("2-yolov5s-dense", 1, 0.1, words=("model=yolov5s", "recipe=dense", "trainer.lr=0.1")),
    ]
    rows = compare(runs, "items_per_s", "map50").rows
    assert [row.unlabelled_words for row in rows] == ["", "seed=1", "trainer.lr=0.1"]


def test_what_runs_compute_is_shown_where_it_differs():
    def with_work(macs, zeros):
        work = {"size/macs": macs, "size/dense_macs": 8.0, "sparsity/macs": zeros}
        one = run("x", 10, 0.5)
        return PastRun("x", "/runs/x", "FINISHED", {**one.metrics, **work}, one.words)

    def shown(*runs):
        return [column.title for column in compare(runs, "items_per_s", "map50").others]

    assert shown(with_work(8.0, 0.0), with_work(4.0, 0.5)) == ["sparsity/macs", "size/macs"]
    assert shown(with_work(8.0, 0.0), with_work(8.0, 0.5), run("y", 1, 0.1)) == ["macs"]
    assert shown(with_work(8.0, 0.5), run("y", 1, 0.1)) == []


def test_unusable_questions_are_refused():
    with pytest.raises(ConfigError, match="two different metrics"):
        compare(RUNS, "map50", "val/map50")
    with pytest.raises(ConfigError, match="no metrics yet"):
        compare([run("new", status="RUNNING")], "items_per_s", "map50")


def test_csv_has_all_of_it(comparison):
    rows = {row["run"]: row for row in csv.DictReader(io.StringIO(as_csv(comparison)))}
    assert len(rows) == 6
    assert float(rows["good"]["b/items_per_s"]) == 20
    assert rows["unmeasured"]["b/items_per_s"] == ""
    assert rows["broken"]["status"] == "FAILED"
    assert {name for name, row in rows.items() if row["front"] == "1"} == {"slow", "good", "fast"}


def test_data_is_json(comparison):
    data = json.loads(json.dumps(as_data(comparison)))
    assert data["best"]["place"] == "/runs/good"
    assert data["best"]["command"] == "python -m sparse_exp seed=0 model=s recipe=transfer"
    assert data["less_is_better"] == ["size/onnx_gzip_mb"]


def test_markdown_is_a_table_and_ends_with_the_command(comparison):
    lines = as_markdown(comparison).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 8
    assert len({line.count("|") for line in table}) == 1
    assert lines[-1] == "    python -m sparse_exp seed=0 model=s recipe=transfer"


def test_remarks(comparison):
    text = "\n".join(remarks(comparison))
    assert "items_per_s: b/items_per_s, more is better" in text
    assert "3 of 6 runs. Not weighed, as they did not finish or lack a value: 2." in text
    assert "Ship run 3, good: b/items_per_s 20, keeping val/map50 >= 0.6, size/onnx_gzip_mb <= 4." in text


def test_pictures(comparison, tmp_path):
    from PIL import Image

    picture, html = draw(comparison, tmp_path / "out")
    with Image.open(picture) as image:
        assert image.format == "PNG"
        assert len(image.convert("RGB").getcolors(1 << 20)) > 50  # something was drawn
    assert html.read_text(encoding="utf-8").count("<circle") == 4
    assert draw(compare([run("a", None, 0.5), run("b", 3)], "items_per_s", "map50"), tmp_path) == []
