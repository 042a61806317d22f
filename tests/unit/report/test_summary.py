import io

from rich.console import Console

from sparse_exp.report.summary import summary_table, summary_text


def wide_result():
    result = {"val/map50": 0.5481, "val/map50_95": 0.203, "sparsity/prunable": 0.7502, "size/onnx_mb": 7.61}
    for engine, dense, sparse in (
        ("deepsparse", 13.0, 39.8),
        ("onnxruntime", 11.4, 6.3),
        ("openvino", 17.7, 19.9),
    ):
        result[f"deployed/{engine}/map50"] = 0.5453
        for batch in (1, 128):
            for variant, items in (("dense", dense), ("sparse", sparse)):
                cell = f"benchmark/{engine}/{variant}/b{batch}"
                result |= {f"{cell}/items_per_s": items, f"{cell}/latency_p50_ms": 1e3 * batch / items}
                result |= {f"{cell}/spread": 0.034}
    return result


def test_every_number_stands_uncut_within_80_columns():
    text = summary_text(wide_result(), "yolov5s on trees, transfer_quant")
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert "! noisy" not in text
    lines = [line.split() for line in text.splitlines()]
    assert ["deepsparse", "sparse", "b1", "39.8", "25.1", "3.4%", "2.25"] in lines
    assert ["onnxruntime", "sparse", "b128", "6.3", "20317.5", "3.4%", "0.36"] in lines
    assert ["torch", "0.548", "0.203"] in lines
    assert ["deepsparse", "0.545", "-", "-0.0028"] in lines
    assert ["zeros", "in", "prunable", "weights", "75.02%"] in lines
    assert ["sparse", "ONNX", "7.6", "MB"] in lines


def test_what_is_kept_of_the_dense_accuracy_stands_below_it():
    result = {**wide_result(), "recovery/map50": 0.981, "baseline/map50": 0.559}
    lines = summary_text(result).splitlines()
    at = next(i for i, line in enumerate(lines) if "Keeps 98.1% of the dense mAP50 0.559." in line)
    assert any("openvino" in line for line in lines[:at])
    assert any("Throughput" in line for line in lines[at:])
    assert "dense mAP50" not in summary_text(wide_result())


def test_the_work_stands_below_the_sizes():
    result = {**wide_result(), "size/macs": 4.12, "size/dense_macs": 8.24, "sparsity/macs": 0.481}
    text = summary_text(result)
    sentence = "An image takes 4.12 G multiplications (50% of the 8.24 G of the dense network); 48.1% of them"
    assert sentence in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 80
    assert ["zeros", "in", "multiplications", "48.10%"] in [line.split() for line in text.splitlines()]
    assert "An image takes" not in summary_text(wide_result())


def test_without_a_terminal_there_are_no_escape_codes():
    console = Console(file=io.StringIO(), width=80)
    console.print(summary_table(wide_result()))
    assert "\x1b" not in console.file.getvalue()


def test_a_run_of_few_stages_has_only_its_own_parts():
    text = summary_text({"size/dense_onnx_mb": 28.2})
    assert "dense ONNX" in text
    assert "Accuracy" not in text
    assert "Throughput" not in text
    assert summary_text({}, "Nothing").strip() == "Nothing"


def test_noisy_cells_are_marked_and_those_that_could_not_be_measured_named():
    rows = [
        {"engine": "openvino", "variant": "dense", "key": "b1", "noisy": True},
        {"engine": "deepsparse", "variant": "dense", "key": "b1", "noisy": False},
        {"engine": "torch", "variant": "dense_int8", "key": "b1", "impossible": "It has none."},
    ]
    text = summary_text(wide_result(), rows=rows)
    lines = [line.split() for line in text.splitlines()]
    assert [line for line in lines if line[-2:-1] == ["!"]] == [
        ["openvino", "dense", "b1", "17.7", "56.5", "3.4%", "!", "1.00"]
    ]
    assert "! noisy" in text
    wide = {"benchmark/onnxruntime/sparse_fp32/b16_throughput/items_per_s": 9876.5, **wide_result()}
    wide["benchmark/onnxruntime/sparse_fp32/b16_throughput/spread"] = 0.123
    assert "…" not in summary_text(wide, rows=rows)
    assert "Not measured: torch/dense_int8 (b1): It has none." in text
    assert max(map(len, text.splitlines())) <= 80
