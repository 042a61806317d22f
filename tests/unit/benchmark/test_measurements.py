import csv
import io
import json
import statistics
from pathlib import Path

import numpy as np
import onnx
import pytest

from sparse_exp.benchmark import Cell, Load, Measurement, write_rows
from sparse_exp.benchmark.measurements import CAUSES, Round, as_csv, megabytes, noise_sentence
from sparse_exp.benchmark.rounds import precision

CELL = Cell("deepsparse", "sparse", Path("model.onnx"), Load("b4", "sync", 4, 1, 2))
# 4 * 3/0.4 = 30, 4 * 8/0.4 = 80, 4 * 1/0.4 = 10
ROUNDS = [Round([0.1, 0.1, 0.2], 0.4), Round([0.05] * 8, 0.4), Round([0.4], 0.4)]


def test_items_per_second_is_the_median_of_the_repeats_and_the_spread_their_range_over_it():
    numbers = Measurement(CELL, ROUNDS).numbers()
    assert numbers["items_per_s"] == pytest.approx(30)
    assert numbers["spread"] == pytest.approx((80 - 10) / 30)
    assert Measurement(CELL, ROUNDS).row()["runs"] == 12


def test_streams_that_overlap_count_by_the_clock_and_not_by_their_latencies():
    two_at_once = Measurement(CELL, [Round([0.2] * 10, 1.0)])
    assert two_at_once.each == [pytest.approx(40)]
    assert two_at_once.numbers()["latency_p50_ms"] == pytest.approx(200)


def test_percentiles_are_those_of_all_latencies_in_milliseconds():
    latencies = np.random.default_rng(0).gamma(2, 0.01, 10000)
    numbers = Measurement(CELL, [Round(part, 1.0) for part in np.split(latencies, 4)]).numbers()
    thousandths = statistics.quantiles(sorted(1e3 * latencies), n=1000, method="inclusive")
    places = {"p25": 250, "p50": 500, "p75": 750, "p90": 900, "p95": 950, "p99": 990, "p999": 999}
    for name, place in places.items():
        assert numbers[f"latency_{name}_ms"] == pytest.approx(thousandths[place - 1])


@pytest.mark.parametrize(("count", "highest"), [(12, "p50"), (40, "p75"), (999, "p95"), (1000, "p99")])
def test_a_percentile_needs_ten_latencies_beyond_it(count, highest):
    numbers = Measurement(CELL, [Round([0.1] * count, 1.0)]).numbers()
    assert [name for name in numbers if name.startswith("latency")][-1] == f"latency_{highest}_ms"


def test_one_repeat_has_no_spread():
    assert Measurement(CELL, ROUNDS[:1]).numbers()["spread"] == 0


def test_metrics_have_the_names_of_the_result():
    metrics = Measurement(CELL, ROUNDS, peak_rss_mb=99.0).metrics()
    assert metrics == pytest.approx(
        {
            "benchmark/deepsparse/sparse/b4/items_per_s": 30,
            "benchmark/deepsparse/sparse/b4/latency_p25_ms": 50,
            "benchmark/deepsparse/sparse/b4/latency_p50_ms": 50,
            "benchmark/deepsparse/sparse/b4/spread": 70 / 30,
            "benchmark/deepsparse/sparse/b4/peak_rss_mb": 99,
        }
    )


def test_json_and_csv_hold_the_same_rows(tmp_path):
    conditions = {"options": {"a": True}, "isa": ("avx2",)}
    impossible = Cell("torch", "dense_int8", None, CELL.load, impossible="torch, alas, has none")
    rows = [Measurement(CELL, ROUNDS, conditions=conditions).row(), Measurement(impossible).row()]
    files = write_rows(tmp_path, rows)
    assert [file.name for file in files] == ["benchmark.json", "benchmark.csv"]
    loaded = json.loads(files[0].read_text())
    table = list(csv.DictReader(io.StringIO(files[1].read_text())))
    assert [float(table[0][name]) for name in ("items_per_s", "batch")] == pytest.approx([30, 4])
    assert json.loads(table[0]["options"]) == loaded[0]["options"] == {"a": True}
    assert json.loads(table[0]["each"]) == loaded[0]["each"]
    assert table[1]["impossible"] == "torch, alas, has none"
    assert (table[1]["items_per_s"], table[1]["model"]) == ("", "")
    assert "items_per_s" not in loaded[1]


def test_a_column_is_there_if_one_row_has_it():
    assert as_csv([{"a": 1}, {"b": False}]) == "a,b\n1,\n,false\n"


def test_openvinos_own_format_weighs_as_much_as_both_its_files(tmp_path):
    for name, size in (("a.xml", 1_000), ("a.bin", 2_000_000), ("b.onnx", 500)):
        (tmp_path / name).write_bytes(b"x" * size)
    assert megabytes(tmp_path / "a.xml") == pytest.approx(2.001)
    assert megabytes(tmp_path / "b.onnx") == pytest.approx(0.0005)


@pytest.mark.parametrize(
    ("operator", "expected"),
    [("ConvInteger", "int8"), ("QuantizeLinear", "int8"), ("Conv", "fp32")],  # integer graph, QDQ, neither
)
def test_what_is_deployed_is_int8_if_its_file_is(operator, expected, tmp_path):
    node = onnx.helper.make_node(operator, ["x", "y"], ["z"])
    graph = onnx.helper.make_graph([node], "g", [], [])
    onnx.save(onnx.helper.make_model(graph), str(tmp_path / "model.onnx"))
    assert precision("sparse", tmp_path / "model.onnx") == expected


def test_the_other_variants_are_what_their_names_say(tmp_path):
    assert precision("sparse", tmp_path / "last.pt") == "fp32"
    assert precision("dense_int8", None) == "int8"
    assert precision("sparse_fp32", None) == precision("dense", None) == "fp32"


def test_what_other_programs_took_is_told_from_turns_that_merely_differ():
    limits = {"max_disturbance": 0.02, "precision_of_ratios": 0.03, "budget_s": 60.0}
    none = dict.fromkeys(CAUSES, 0.01)
    quiet, wide = {"noisy": False, **none, **limits}, {"noisy": True, **none, **limits}
    impossible = {"impossible": "no such file"}
    assert noise_sentence([quiet, impossible]) == ""
    assert noise_sentence([quiet, wide, impossible]) == (
        "The ratios of 1 of 2 cells are not known to 3%: turns differ, though nothing else ran here. "
        "More turns tell more: hardware.budget_s=300."
    )
    for cause in CAUSES:
        said = noise_sentence([quiet, wide, {**wide, cause: 0.3}])
        assert said.startswith("Something else ran while 2 of 3 cells were measured.")
    assert "nothing else running" in noise_sentence([{"noisy": True}])  # of an early version
