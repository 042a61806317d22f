"""Which file to ship: the front over files, noise between runs, licences, and what is said."""

import json

import pytest

from sparse_exp.compare.shipping import shipping
from sparse_exp.runs.past import read_run

TURNS = 6
WOBBLE = (1.0, 1.01, 0.99, 1.005, 0.995, 1.0)  # of each turn, of all cells alike or of one alone


def row(engine, variant, speed, map50, wobble=WOBBLE, file="model.onnx"):
    each = [speed * factor for factor in wobble]
    return {
        "engine": engine, "variant": variant, "scenario": "sync", "batch": 1, "cores": 2, "key": "b1",
        "imgsz": 320, "model": file, "items_per_s": sorted(each)[TURNS // 2], "each": each,
        "turns": list(range(TURNS)), "map50": map50,
    }  # fmt: skip


@pytest.fixture
def make(tmp_path):
    """Makes a finished run of a sweep with the rows of its benchmark."""

    def made(name, *rows, dense=0.6, words=(), status="FINISHED"):
        directory = tmp_path / name
        (directory / "deployment").mkdir(parents=True)
        for file in (
            "dense.onnx",
            "dense.int8.openvino.xml",
            "model.onnx",
            "model.qdq.onnx",
            "sparse.fp32.onnx",
        ):
            (directory / "deployment" / file).write_bytes(b"")
        stages = {
            "baseline": {"fingerprint": "1", "metrics": {"baseline/map50": dense}, "outputs": {}},
            "benchmark": {"fingerprint": "2", "facts": {"rows": rows}, "outputs": {}},
        }
        state = {"name": name, "status": status, "overrides": ["sweep=ship", f"recipe={name}", *words]}
        (directory / "manifest.json").write_text(json.dumps({**state, "stages": stages}))
        return read_run(directory)

    return made


def dense(speed=10.0, engine="openvino", map50=0.6, wobble=WOBBLE):
    return row(engine, "dense", speed, map50, wobble, "dense.onnx")


def test_the_fastest_file_that_keeps_the_accuracy_is_named_with_its_command(make):
    runs = [
        make("quant", dense(), row("openvino", "sparse", 20.0, 0.598)),
        make(
            "slim_quant",
            dense(),
            row("openvino", "sparse", 40.0, 0.593),
            row("onnxruntime", "sparse", 30, 0.59),
        ),
        make("slim_quant_30", dense(), row("openvino", "sparse", 80.0, 0.5)),
    ]
    found = shipping(runs, 0.01)
    assert (found.chosen.run.name, found.chosen.engine) == ("slim_quant", "OpenVINO")
    (sentence,) = found.lines
    assert (
        f"Ship {runs[1].place}/deployment/model.qdq.onnx in OpenVINO: 40.0 images/s, 4.00 times" in sentence
    )
    assert "the fastest dense network in fp32 (OpenVINO)" in sentence
    assert "0.593 where the dense network has 0.600" in sentence
    assert sentence.endswith("made by: python -m sparse_exp sweep=ship recipe=slim_quant")
    assert shipping(runs, 0.2).chosen.run.name == "slim_quant_30"
    assert shipping(runs, 0.005).chosen.run.name == "quant"


def test_the_dense_network_of_all_runs_is_one_and_may_be_the_answer(make):
    runs = [make("a", dense(), row("openvino", "sparse", 5.0, 0.6)), make("b", dense(11.0))]
    found = shipping(runs, 0.01)
    assert [file.is_dense for file in found.files].count(True) == 1
    assert found.chosen.is_dense
    other = make("n", dense(30.0, map50=0.5), dense=0.5)  # of another model
    assert [file.is_dense for file in shipping([*runs, other], 0.01).files].count(True) == 2
    assert shipping([*runs, other], 0.01).dense_map50 == 0.6


def test_what_is_faster_and_may_not_be_shipped_is_said_and_never_chosen(make):
    run = make(
        "a", dense(), row("openvino", "sparse", 20.0, 0.6), row("deepsparse", "sparse", 40.0, 0.6),
        row("deepsparse", "dense_int8", 90.0, 0.1),
    )  # fmt: skip
    found = shipping([run], 0.01)
    assert found.chosen.engine == "OpenVINO"
    assert found.lines[1].startswith("Faster, but not for production: a in DeepSparse, 2.00 times")
    on_front = [file for file in found.files if file.front]
    assert {file.engine for file in on_front} == {"OpenVINO"}


def test_files_that_the_spread_does_not_tell_apart_are_as_fast_and_the_more_accurate_is_taken(make):
    """Of two equal files in turns that differ by a tenth, the one measured a little faster does not win."""
    apart = (1.0, 0.9, 1.1, 0.95, 1.05, 1.0)
    runs = [
        make("a", dense(), row("openvino", "sparse", 20.4, 0.591, apart)),
        make("b", dense(), row("openvino", "sparse", 20.0, 0.599, apart[::-1])),
    ]
    found = shipping(runs, 0.01)
    assert found.chosen.run.name == "b"
    assert [file.run.name for file in found.equal] == ["a"]
    assert "do not tell it from recipe=a in OpenVINO in speed" in found.lines[1]
    steady = [
        make("c", dense(), row("openvino", "sparse", 21.0, 0.591)),
        make("d", dense(), row("openvino", "sparse", 20.0, 0.599)),
    ]
    assert shipping(steady, 0.01).chosen.run.name == "c"


def test_a_machine_that_became_slower_between_two_runs_counts_for_neither(make):
    """The second run's host was at half speed: its file is half as fast as measured, and really faster."""
    runs = [
        make("before", dense(10.0), row("openvino", "sparse", 20.0, 0.6)),
        make("after", dense(5.0), row("openvino", "sparse", 15.0, 0.6)),
    ]
    found = shipping(runs, 0.01)
    assert found.chosen.run.name == "after"
    assert {file.run.name: round(file.speed) for file in found.files if not file.is_dense} == {
        "before": 20, "after": 30,
    }  # fmt: skip
    assert found.chosen.front


def test_when_nothing_keeps_the_accuracy_the_most_accurate_is_named(make):
    run = make("a", dense(map50=None), row("openvino", "sparse", 20.0, 0.5))
    found = shipping([run], 0.01)
    assert found.chosen is None
    assert "within 0.01 of the dense 0.600" in found.lines[0]
    assert "0.500. Allow more with sweep.max_loss." in found.lines[0]


def test_what_did_not_finish_or_was_not_measured_does_not_count(make):
    assert shipping([make("a"), make("b", dense(), status="FAILED")], 0.01) is None
    assert shipping([], 0.01) is None


def test_picture_and_page(make, tmp_path):
    from PIL import Image

    run = make("a", dense(), row("openvino", "sparse", 20.0, 0.6), row("deepsparse", "sparse", 40.0, 0.6))
    picture, page = shipping([run], 0.01).write(tmp_path / "out")
    with Image.open(picture) as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 20)}
    assert {(0x00, 0x72, 0xB2), (0xE6, 0x9F, 0x00)} <= colours  # the front, the dense network
    text = page.read_text(encoding="utf-8")
    assert text.count("\n|") == 2 + 3
    assert "(ship.png)" in text
