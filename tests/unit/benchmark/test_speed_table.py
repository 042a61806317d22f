import pytest

from sparse_exp.benchmark.speed_table import impossible_lines, load_text, options_table, ratio, speed_table


def row(engine, variant, items, **more):
    load = {"key": "b1", "scenario": "sync", "batch": 1, "streams": 1, "cores": 2, "imgsz": 320}
    each = [items] * 8
    return {
        "engine": engine,
        "variant": variant,
        "items_per_s": items,
        "each": each,
        "spread": 0.034,
        **load,
        **more,
    }


SQUARE = [
    row("onnxruntime", "dense", 10.0),
    row("openvino", "dense", 16.0, noisy=True),
    row("openvino", "dense_int8", 25.0),
    row("deepsparse", "sparse", 40.0, map50=0.55),
    row("deepsparse", "sparse", 70.0, key="b16", batch=16),
    row("onnxruntime", "dense", 14.0, key="b16", batch=16),
    {**row("torch", "dense_int8", 0.0), "impossible": "There is none."},
]


def by_title(rows):
    titles, cells = speed_table(rows)
    return [dict(zip(titles, one, strict=True)) for one in cells]


def test_a_row_has_its_ratios_to_the_baselines_of_the_same_load():
    rows = by_title(SQUARE)
    sparse = rows[3]
    assert [sparse[f"x {name}"] for name in ("ORT fp32", "best fp32", "best int8")] == [
        "4.00",
        "2.50",
        "1.60",
    ]
    assert (rows[4]["x ORT fp32"], rows[4]["x best int8"]) == ("5.00", "-")
    assert (sparse["items/s"], sparse["spread"], sparse["mAP50"]) == ("40.00", "3.4%", "0.550")
    assert rows[0]["mAP50"] == "-"


def test_what_is_noisy_is_marked_and_what_is_impossible_is_not_in_the_table():
    rows = by_title(SQUARE)
    assert [one[""] for one in rows] == ["", "noisy", "", "", "", ""]
    assert not [one for one in rows if one["engine"] == "torch"]


def test_columns_that_nobody_has_are_left_out():
    titles, _ = speed_table([row("deepsparse", "sparse", 40.0)])
    assert "mAP50" not in titles
    assert "x ORT fp32" not in titles
    assert "" not in titles
    assert speed_table([])[1] == []


def test_networks_are_compared_up_to_the_first_hyphen():
    rows = [
        row("onnxruntime", "dense", 10.0, network="s"),
        row("onnxruntime", "dense", 2.0, network="l"),
        row("deepsparse", "sparse", 30.0, network="s-85-block4"),
        row("deepsparse", "sparse", 9.0, network="m-70"),
    ]
    ratios = [ratio(rows, one, "x ORT fp32") for one in rows]
    assert [one and one.value for one in ratios] == [1.0, 1.0, pytest.approx(3), None]


def test_a_ratio_that_cannot_be_told_from_one_stands_after_a_tilde():
    shaky = row("deepsparse", "sparse", 10.2, each=[10.2, 9.8, 10.9, 10.2, 9.9, 10.3, 9.7, 10.6])
    (first, second) = by_title([row("onnxruntime", "dense", 10.0), shaky])
    assert (first["x best fp32"], second["x best fp32"]) == ("1.00", "~1.02")
    once = by_title(
        [row("onnxruntime", "dense", 10.0, each=[10.0]), row("deepsparse", "sparse", 20.0, each=[20.0])]
    )
    assert once[1]["x best fp32"] == "~2.00"  # one measurement says little


@pytest.mark.parametrize("other", [{"cores": 1}, {"imgsz": 640}, {"key": "b1_throughput"}, {"cpu": "Z80"}])
def test_what_ran_under_another_load_or_on_another_cpu_is_no_baseline(other):
    rows = [row("onnxruntime", "dense", 10.0, **other), row("deepsparse", "sparse", 30.0)]
    assert ratio(rows, rows[1], "x ORT fp32") is None


def test_impossible_cells_are_named_once_with_all_their_loads():
    rows = [{**row("torch", "sparse", 0.0, key=key), "impossible": "None."} for key in ("b1", "b16")]
    assert impossible_lines([*rows, *SQUARE[:2]]) == ["torch/sparse (b1, b16): None."]


def test_the_search_is_told_with_what_it_gained():
    tries = [
        {"streams": 1, "options": {}, "items_per_s": 20.0},
        {"streams": 2, "options": {}, "failed": "no streams here"},
        {"streams": 1, "options": {"a": True}, "items_per_s": 25.0},
    ]
    found = row("openvino", "dense", 25.0, options={"a": True}, tries=tries)
    titles, cells = options_table([found, row("torch", "dense", 1.0, options={}, tries=tries[:1])])
    assert [dict(zip(titles, one, strict=True)) for one in cells] == [
        {"cell": "openvino/dense/b1", "streams": "1", "options": "a=True", "x first try": "1.25",
         "tries": "3", "did not work": "2 streams, defaults: no streams here"}
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("load", "text"),
    [
        ({}, "batch 1"),
        (
            {"key": "b16_throughput", "batch": 16, "scenario": "throughput", "streams": 3},
            "batch 16, throughput",
        ),
        (
            {"key": "b16_throughput_s4", "batch": 16, "scenario": "throughput", "streams": 4},
            "batch 16, throughput, 4 streams",
        ),
        ({"key": "b1_async4", "scenario": "async", "streams": 4}, "async, 4 streams"),
    ],
)
def test_loads_in_words(load, text):
    assert load_text(row("torch", "dense", 1.0, **load)) == text
