"""The gain of a benchmark taken apart, on rows whose factors are known."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest

from sparse_exp.benchmark.advice import advise
from sparse_exp.benchmark.cells import Cell, Load
from sparse_exp.benchmark.gain import CORES, INT8, RUNTIME, ZEROS, ZEROS_AND_INT8, deployed_row
from sparse_exp.benchmark.layers import costs_of, kind_of, profiles_of
from sparse_exp.benchmark.why import console_lines, explain
from sparse_exp.engines.profile import LayerTime, Profile
from sparse_exp.errors import EngineError
from sparse_exp.report.why import layers_in_words, to_markdown

SPEEDS = {  # items/s; 3 and 5: the square of zeros and 8 bits is not one of equal factors
    ("deepsparse", "dense"): 10.0,
    ("deepsparse", "dense_int8"): 15.0,
    ("deepsparse", "sparse_fp32"): 20.0,
    ("deepsparse", "sparse"): 60.0,
    ("openvino", "dense"): 12.0,
    ("openvino", "dense_int8"): 24.0,
    ("onnxruntime", "dense"): 8.0,
}


def row(engine, variant, speed, *, batch=1, cores=2, key=None, **more) -> dict:
    precision = "int8" if variant in ("dense_int8", "sparse") else "fp32"
    given = {"engine": engine, "variant": variant, "items_per_s": speed, "precision": precision}
    given["each"] = [speed] * 8
    given["model"] = f"{variant}.onnx"
    place = {"scenario": "sync", "batch": batch, "cores": cores, "key": key or f"b{batch}"}
    return {**given, **place, "isa": ["avx2", "avx512", "vnni"], **more}


def rows_of(speeds=SPEEDS, **more) -> list[dict]:
    return [row(engine, variant, speed, **more) for (engine, variant), speed in speeds.items()]


def steps_of(gain) -> dict[str, float]:
    return {step.cause: step.factor.value for step in gain.steps}


def test_the_gain_of_a_whole_square():
    (gain,) = explain(rows_of()).gains
    assert gain.start == "openvino dense, 2 cores"
    assert gain.end == "deepsparse sparse, 2 cores"
    assert gain.total.value == pytest.approx(5)
    steps = steps_of(gain)
    assert list(steps) == [RUNTIME, ZEROS, INT8]
    assert steps[RUNTIME] == pytest.approx(10 / 12)
    assert steps[ZEROS] == pytest.approx(math.sqrt((20 / 10) * (60 / 15)))
    assert steps[INT8] == pytest.approx(math.sqrt((15 / 10) * (60 / 20)))
    assert gain.missing == ()
    assert gain.against_dense.value == pytest.approx(60 / 12)
    assert gain.against_int8.value == pytest.approx(60 / 24)
    zeros = next(step for step in gain.steps if step.cause == ZEROS)
    assert zeros.measured == ("deepsparse dense -> sparse_fp32 2.00", "deepsparse dense_int8 -> sparse 4.00")


@pytest.mark.parametrize(
    ("absent", "steps", "said"),
    [
        (["sparse_fp32"], {ZEROS: 60 / 15, INT8: 15 / 10}, "sparse_fp32: one order"),
        (["dense_int8"], {ZEROS: 20 / 10, INT8: 60 / 20}, "dense_int8: one order"),
        (["sparse_fp32", "dense_int8"], {ZEROS_AND_INT8: 60 / 10}, "cannot be told apart"),
    ],
)
def test_the_rows_that_are_missing_are_named_and_the_rest_is_still_told(absent, steps, said):
    speeds = {key: speed for key, speed in SPEEDS.items() if key not in [("deepsparse", v) for v in absent]}
    (gain,) = explain(rows_of(speeds)).gains
    found = steps_of(gain)
    assert found.pop(RUNTIME) == pytest.approx(10 / 12)
    assert found == pytest.approx(steps)
    assert any(said in line for line in gain.missing)


def test_whatever_was_measured_the_factors_multiply_to_the_whole():
    always = ("deepsparse", "sparse")
    others = [key for key in SPEEDS if key != always]
    told = 0
    for count in range(len(others) + 1):
        for kept in combinations(others, count):
            for gain in explain(rows_of({key: SPEEDS[key] for key in (*kept, always)})).gains:
                assert math.prod(steps_of(gain).values()) == pytest.approx(gain.total.value)
                told += 1
    assert told > 40


def test_more_cores_are_the_last_factor_of_the_chain():
    single = rows_of({key: speed / 2 for key, speed in SPEEDS.items()}, cores=1, key="b1_c1")
    double = rows_of({key: speed * 0.9 for key, speed in SPEEDS.items()}, cores=2)
    (gain,) = explain([*double, *single]).gains
    steps = steps_of(gain)
    assert list(steps) == [RUNTIME, ZEROS, INT8, CORES]
    assert steps[CORES] == pytest.approx(1.8)
    assert (gain.start, gain.end) == ("openvino dense, 1 core", "deepsparse sparse, 2 cores")
    assert gain.total.value == pytest.approx(60 * 0.9 / 6) == pytest.approx(math.prod(steps.values()))
    assert gain.against_dense.value == pytest.approx(5)  # on equal cores
    assert gain.cores == (1, 2)


def test_each_load_has_its_own_chain():
    rows = [*rows_of(), *rows_of({k: v * 2 for k, v in SPEEDS.items()}, batch=16)]
    rows += rows_of(key="b1_async2", scenario="async", streams=2)
    assert [gain.load for gain in explain(rows).gains] == [
        "sync, batch 1, 2 cores", "sync, batch 16, 2 cores", "async, batch 1, 2 streams, 2 cores",
    ]  # fmt: skip


def test_a_run_that_deploys_floating_point_gains_by_its_zeros_alone():
    rows = rows_of({key: SPEEDS[key] for key in SPEEDS if key[1] in ("dense", "dense_int8")})
    rows.append(row("deepsparse", "sparse", 20.0, precision="fp32"))
    (gain,) = explain(rows).gains
    assert steps_of(gain) == pytest.approx({RUNTIME: 10 / 12, ZEROS: 2.0})


def test_an_engine_that_computes_zeros_gains_nothing_by_them():
    speeds = {("openvino", "dense"): 10.0, ("openvino", "dense_int8"): 20.0, ("openvino", "sparse"): 24.0}
    why = explain(rows_of({**speeds, ("onnxruntime", "dense"): 8.0}), work=0.56)
    (gain,) = why.gains
    assert steps_of(gain) == pytest.approx({RUNTIME: 10 / 8, INT8: 24 / 10})
    assert gain.missing == ()
    assert why.zeros.startswith("56% of the multiplications meet a zero, but openvino computes them")
    assert why.zeros in console_lines(why)
    assert why.zeros in to_markdown(why)


def test_the_zeros_of_an_engine_that_skips_them_are_held_against_the_work_that_they_save():
    why = explain(rows_of(), work=0.5)
    assert why.zeros == (
        "50% of the multiplications meet a zero: to skip all of them would make it 2.00 times as fast; "
        "measured: 2.83 times."
    )
    assert explain(rows_of()).zeros == ""


def test_without_another_engine_or_without_its_own_dense_it_says_so():
    alone = {key: speed for key, speed in SPEEDS.items() if key[0] == "deepsparse"}
    (gain,) = explain(rows_of(alone)).gains
    assert gain.start == "deepsparse dense, 2 cores"
    assert any("engine other than the deployed one" in line for line in gain.missing)
    (gain,) = explain(rows_of({k: v for k, v in SPEEDS.items() if k != ("deepsparse", "dense")})).gains
    assert [*steps_of(gain).values()] == [pytest.approx(5.0)]
    assert any("deepsparse dense: without it" in line for line in gain.missing)


def test_impossible_rows_and_other_networks_do_not_count():
    impossible = {k: v for k, v in row("torch", "sparse", 0).items() if k != "items_per_s"}
    rows = [impossible | {"impossible": "no int8"}, *rows_of(network="s"), *rows_of(network="l")]
    assert [gain.total.value for gain in explain(rows).gains] == [pytest.approx(5.0)]
    assert explain([impossible]).gains == ()
    assert explain([]).gains == ()
    assert to_markdown(explain([])) == ""


PROFILE = Profile(
    (
        LayerTime("/model.0/conv/Conv,/model.1/conv/Conv", "several layers, tile by tile", 3.0),
        LayerTime("/model.5/conv/Conv", "sparse convolution", 2.0),
        LayerTime("shuffle_5", "shuffle", 2.0),
        LayerTime("/model.8/cv1/conv/Conv", "convolution", 1.5),
        LayerTime("/model.24/m.0/Conv", "convolution", 0.5),
        LayerTime("/model.24/Mul_output_0,/model.24/Add_output_0", "several layers, tile by tile", 1.0),
    ),
    0.9,
    "how",
)


def test_shares_of_a_profile():
    costs = costs_of("deepsparse/sparse", PROFILE)
    assert costs.ms == pytest.approx(10)
    assert costs.kinds == pytest.approx(
        {
            "several layers, tile by tile": 0.3,
            "sparse convolution": 0.2,
            "layout changes": 0.2,
            "dense convolution": 0.2,
            "decoding": 0.1,
        }
    )
    assert sum(costs.kinds.values()) == pytest.approx(1)
    assert list(costs.kinds.values()) == sorted(costs.kinds.values(), reverse=True)
    assert (costs.layers[0].ms, costs.layers[0].share) == (3.0, pytest.approx(0.3))
    assert costs_of("x", Profile((), None, "")).layers == ()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("Conv", "dense convolution"),  # ONNX Runtime
        ("ConvInteger", "dense convolution"),
        ("ReorderInput", "layout changes"),
        ("DequantizeLinear", "quantization"),
        ("MaxPool", "pooling and resizing"),
        ("Convolution", "dense convolution"),  # OpenVINO
        ("FakeQuantize", "quantization"),
        ("Interpolate", "pooling and resizing"),
        ("Swish", "element by element"),
        ("winograd_fused", "dense convolution"),  # DeepSparse
        ("Naive Subgraph", "element by element"),
        ("Concat", "other"),
    ],
)
def test_the_kinds_of_other_engines(kind, expected):
    assert kind_of(LayerTime("/model.3/x", kind, 1.0)) == expected


def advice_of(rows, profiles=None) -> str:
    return "\n".join(explain(rows, profiles).advice)


def test_nothing_is_advised_where_nothing_shows():
    assert advice_of(rows_of()) == ""


def test_what_the_layers_show_becomes_advice():
    text = advice_of(rows_of(), {"deepsparse/sparse": PROFILE})
    assert "20% of the time goes into convolutions that run densely" in text
    assert "20% of the time goes into layout changes" in text
    assert "10% of the time goes into decoding" in text
    assert "10% of the operators" in text
    assert advice_of(rows_of(), {"deepsparse/dense": PROFILE}) == ""  # which is not what is deployed


def test_what_the_rows_show_becomes_advice():
    slow = {**SPEEDS, ("deepsparse", "sparse"): 20.5}
    rows = rows_of(slow, isa=["avx2"])
    rows.append(row("deepsparse", "sparse", 21.0, batch=16, isa=["avx2"], noisy=True))
    text = advice_of(rows)
    assert "openvino runs dense_int8 1.17 times as fast as deepsparse" in text
    assert "deploy dense_int8.onnx with openvino instead" in text
    assert "8 bits make it only 1.24" not in text
    assert "Batch 16 gives 1.02 times" in text
    assert "transfer_quant_vnni" in text
    assert f"Something else ran while 1 of {len(rows)} cells were measured." in text


@pytest.mark.parametrize(
    ("speeds", "shipped"),
    [
        ({("deepsparse", "sparse"): 60.0}, "deepsparse"),  # nothing else was deployed
        ({("deepsparse", "sparse"): 60.0, ("openvino", "sparse"): 40.0}, "openvino"),  # it may be shipped
        ({("onnxruntime", "sparse"): 50.0, ("openvino", "sparse"): 40.0}, "onnxruntime"),
        ({("onnxruntime", "sparse"): 40.0, ("openvino", "sparse"): 50.0}, "openvino"),
    ],
)
def test_the_fastest_engine_that_may_be_shipped_is_the_one_that_is_explained(speeds, shipped):
    others = {key: speed for key, speed in SPEEDS.items() if key[1] != "sparse"}
    why = explain(rows_of({**others, **speeds}))
    assert why.gains[0].end == f"{shipped} sparse, 2 cores"
    assert not any("instead" in line for line in why.advice)


def test_an_engine_that_may_not_be_shipped_is_not_advised_in_place_of_one_that_may():
    speeds = {("openvino", "dense"): 12.0, ("openvino", "sparse"): 20.0, ("deepsparse", "dense_int8"): 60.0}
    assert "instead" not in advice_of(rows_of(speeds))
    speeds = {("openvino", "dense"): 12.0, ("openvino", "sparse"): 20.0, ("onnxruntime", "dense_int8"): 60.0}
    assert "deploy dense_int8.onnx with onnxruntime instead" in advice_of(rows_of(speeds))


def test_an_engine_that_runs_the_quantized_network_slower_than_the_dense_one_is_named():
    text = advice_of(rows_of({**SPEEDS, ("openvino", "sparse"): 40.0, ("onnxruntime", "sparse"): 4.0}))
    assert "onnxruntime runs the quantized network at 0.50 of the speed of its dense fp32" in text


def test_eight_bits_that_gain_nothing_without_vnni():
    speeds = {**SPEEDS, ("deepsparse", "dense_int8"): 10.0, ("deepsparse", "sparse"): 21.0}
    text = advice_of(rows_of(speeds, isa=["avx2"]))
    assert "8 bits make it only 1.02 times as fast, on a CPU without 8-bit dot products (VNNI)" in text
    assert "(VNNI)" not in advice_of(rows_of(speeds))
    assert "8 bits" in advice_of(rows_of(speeds))


def test_zeros_and_cores_that_gain_little():
    speeds = {**SPEEDS, ("deepsparse", "sparse_fp32"): 10.5, ("deepsparse", "sparse"): 16.0}
    single = rows_of({key: speed / 1.2 for key, speed in speeds.items()}, cores=1, key="b1_c1")
    text = advice_of([*rows_of(speeds), *single])
    assert "Zeros make it only 1.06 times as fast" in text
    assert "2 cores are 1.20 times as fast as 1" in text


def test_advice_needs_only_rows():
    rows = rows_of()
    assert list(advise(rows, deployed_row(rows), [], [])) == []


def test_no_sentence_is_drawn_from_a_ratio_within_its_interval():
    jitter = np.random.default_rng(1).normal(1, 0.15, (2, 8))
    shaky = {**SPEEDS, ("deepsparse", "sparse_fp32"): 10.5, ("deepsparse", "sparse"): 16.0}
    rows = rows_of(shaky)
    for each in rows:
        if each["variant"] in ("sparse_fp32", "sparse"):
            each["each"] = [*each["items_per_s"] * jitter[int(each["variant"] == "sparse")]]
    text = advice_of(rows)
    assert "Zeros" not in text
    assert "8 bits" not in text
    steady = advice_of(rows_of(shaky))
    assert "Zeros make it only 1.06" in steady


def test_what_is_as_fast_as_the_baseline_is_said_to_be_within_noise():
    rows = rows_of(
        {("openvino", "dense"): 10.0, ("deepsparse", "dense"): 10.0, ("deepsparse", "sparse"): 10.0}
    )
    rows[2]["each"] = [10.4, 9.7, 10.1, 9.9, 10.2, 9.8, 10.3, 9.9]
    line, *_ = console_lines(explain(rows))
    assert "deepsparse sparse, 2 cores is within noise of openvino dense, 2 cores" in line
    assert "~1.00 (sparsity and 8 bits)" in line


def test_the_section_of_the_report_and_the_lines_on_the_console():
    why = explain(rows_of(), {"deepsparse/sparse": PROFILE})
    text = to_markdown(why)
    assert "deepsparse sparse, 2 cores is 5.00 times as fast as openvino dense, 2 cores" in text
    assert "0.83 (runtime) x 2.83 (sparsity) x 2.12 (8 bits)" in text
    assert "2.50 times the fastest dense int8" in text
    assert "| model.0.conv and 1 more | several layers, tile by tile | 3.00 | 30% |" in text
    assert "90% of its operators" in text
    assert "| layout changes | 2.0 (20%) |" in text
    assert "| all together | 10.0 |" in text
    assert "**What to try next**" in text
    lines = console_lines(why)
    assert len(lines) == 1 + 3
    assert not any("\n" in line for line in lines)
    assert list(why.as_dict()) == ["splits", "zeros", "costs", "advice"]  # the keys of why.json
    assert why.as_dict()["splits"][0]["steps"][0]["cause"] == RUNTIME


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("/model.0/conv/Conv", "model.0.conv"),
        ("/model/model.6/m/m.0/cv2/conv/module/bn/BatchNormalization_output_0_quant", "model.6.m.0.cv2.conv"),
        ("/model.24/m.2/module/Conv_output_0_quant", "model.24.m.2"),
        ("/model.24/Mul_output_0,/model.24/Add_output_0", "model.24.Mul and 1 more"),
        ("shuffle_5", "shuffle_5"),
        ("Conv", "Conv"),
    ],
)
def test_layers_are_called_as_in_the_table_of_their_zeros(name, shown):
    assert layers_in_words(name) == shown


class _Profiling:
    """Stands for `IsolatedEngine`: notes how it was loaded; the dense network cannot be profiled."""

    loads: list = []

    def __init__(self, name):
        self.name = name

    def load(self, model, **settings):
        self.model = model
        self.loads.append((self.name, model.name, settings["batch_size"], settings["options"]))

    def profile(self, images):
        if self.model.name == "dense.onnx":
            raise EngineError("It cannot.")
        assert len(images) == 1
        return PROFILE

    def close(self):
        pass


def test_the_deployed_model_is_profiled_as_it_was_tuned(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("sparse_exp.benchmark.layers.IsolatedEngine", _Profiling)
    load = Load("b1", "sync", 1, 1, 2)
    cells = [
        Cell(engine, variant, tmp_path / f"{variant}.onnx", load)
        for engine in ("openvino", "deepsparse")
        for variant in ("dense", "sparse")
    ]
    speeds = {key: speed for key, speed in SPEEDS.items() if key[1] in ("dense", "sparse")}
    rows = [{**each, "options": {"bind_threads": True}} for each in rows_of(speeds)]
    images = np.zeros((4, 3, 32, 32), np.uint8)
    found = profiles_of(cells, rows, images, lock_path=tmp_path / "lock")
    assert found == {"deepsparse/sparse": PROFILE}
    assert _Profiling.loads == [
        ("deepsparse", "sparse.onnx", 1, {"bind_threads": True}),
        ("deepsparse", "dense.onnx", 1, {"bind_threads": True}),
    ]
    assert "deepsparse/dense could not be timed: It cannot." in caplog.text
