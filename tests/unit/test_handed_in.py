"""Files and texts that people hand in, damaged in any way: read, or refused with an error of our own.

Checkpoints are in ``yolov5/test_hostile_checkpoints.py``, recipes and YAML in ``test_bounded_yaml.py``.
"""

from __future__ import annotations

import copy
import json
import shutil
import tarfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hostile import encoded
from hydra import compose as composed_of
from hydra import initialize_config_dir
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import open_dict
from standin import write_detector

from sparse_exp import rerun
from sparse_exp.compare.comparison import compare
from sparse_exp.compare.files import write_files
from sparse_exp.compare.table import terminal_table
from sparse_exp.config.places import register_schema
from sparse_exp.config.plain import CONF_DIRECTORY
from sparse_exp.config.schema import TrackerConfig
from sparse_exp.data.detection import list_dataset, load_dataset
from sparse_exp.data.images import measure_image, read_frame, read_square
from sparse_exp.errors import DataError, SparseExpError
from sparse_exp.files import read_json
from sparse_exp.metrics.names import parse_limits
from sparse_exp.predict.models import find_model
from sparse_exp.resolve import rebuild
from sparse_exp.resume import resumed
from sparse_exp.runs.directory import MANIFEST, Run
from sparse_exp.runs.metadata import read_metadata
from sparse_exp.runs.past import read_run
from sparse_exp.runs.replay import told_of
from sparse_exp.sources.local import METADATA, SUMS, Published, published
from sparse_exp.sources.local import read_metadata as read_metadata_of_zoo
from sparse_exp.sources.stub import parse_stub
from sparse_exp.sweep.overview import read_overview
from sparse_exp.zoo.__main__ import main as zoo_main
from sparse_exp.zoo.checksums import changed_files
from sparse_exp.zoo.publish import publish_run, read_finished
from sparse_exp.zoo.search import find_models

ARCHIVE = Path(__file__).parents[1] / "data" / "run-0.1.0.tar.xz"
IMAGES = [
    *(encoded(kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP")),
    encoded(
        "JPEG", progressive=True, exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0"
    ),
]
LABELS = b"0 0.5 0.5 0.2 0.2\n1 0.1 0.1 0.3 0.1 0.3 0.4\r\n\n2 0.9 0.9 0.1 0.1 0.5 3\n0 0.5 0.5 0.2 0.2"
WORDS = [
    b"nan",
    b"inf",
    b"1e999",
    b"-0",
    b"1_0",
    b"0x1",
    b"\xff",
    b"\0",
    b"\xe2\x80\xa8",
    b"\x1c",
    b" ",
    b"\n",
]
MODEL = {
    "format": "sparse_exp.zoo/1", "stub": "zoo:cv/detection/yolov5-n/pytorch/me/digits/pruned75_quant-none",
    "short": "zoo:yolov5-n-digits-pruned75_quant", "size": "n", "dataset": "digits",
    "recipe": "transfer_quant",
    "tag": "pruned75_quant-none", "published": "2026-01-01T00:00:00", "by": "me", "classes": ["a", "b"],
    "sparsity": 0.75, "quantized": True, "block4": False, "imgsz": 64, "licence": ["MIT"], "origin": "x",
    "metrics": {"val/map50": 0.5, "sparsity/onnx": 0.75}, "samples": {"onnxruntime": "sample-outputs"},
}  # fmt: skip
RECORD = {
    "status": "FINISHED", "name": "a", "key": "0" * 32, "overrides": ["seed=1"], "tracker_run_id": "0" * 32,
    "conditions": {"commit": "a"}, "environments": {"a": {"packages": ["b"]}}, "told": True, "started": 1.0,
    "stages": {
        "fetch": {"fingerprint": "a", "facts": {"names": ["a", "b"], "dataset": "d"}, "metrics": {"n": 1}},
        "train": {"fingerprint": "b", "outputs": {"weights/last.pt": "0"},
                  "facts": {"checkpoint": "weights/last.pt"}, "metrics": {"val/map50": 0.5},
                  "seconds": 1.5, "events": [{"kind": "metrics"}], "step": 3},
        "evaluate": {"fingerprint": "c", "metrics": {"val/map50": 0.5}, "facts": {"dense_fingerprint": "x"}},
        "export": {"fingerprint": "d", "facts": {"impossible": {"a": "b"}, "dense": {"trained": True}}},
    },
}  # fmt: skip
RESULT = {"val/map50": 0.5, "size/onnx_mb": 1.5, "time/train_s": 3.0, "model": "n"}
ODD = st.sampled_from([
    None, True, False, 0, -1, 10**400, 1e308, float("inf"), float("nan"), "", "x", "9" * 5000, "\0", "\ud800",
    "../../../etc/passwd", "/", "~nobody/x", "${oc.env:HOME}", "<b>", "[/x]", [], {}, [[]], [None], {"": []},
    {"a": {"a": 1}}, ["x" * 300], list(range(50)),
])  # fmt: skip


@st.composite
def changed_trees(draw: Any, tree: Any) -> Any:
    """Plain data in which some values are others, gone, or of another kind."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        at = tree
        while True:
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(at[key], dict | list) and draw(st.booleans()):
                at = at[key]
                continue
            if draw(st.integers(0, 3)):
                at[key] = copy.deepcopy(draw(ODD))
            else:
                del at[key]
            break
    return tree


@st.composite
def damaged(draw: Any, contents: list[bytes]) -> bytes:
    """Bytes of a file of which some are others, gone, repeated or new."""
    content = draw(st.sampled_from(contents))
    for _ in range(draw(st.integers(1, 4))):
        at, length = draw(st.integers(0, len(content))), draw(st.sampled_from([0, 1, 1, 2, 4, 40]))
        new = draw(
            st.one_of(st.binary(max_size=4), st.sampled_from(WORDS), st.just(content[at : at + length] * 3))
        )
        content = content[:at] + new + content[at + length :]
    return content


def often(examples: int) -> Any:
    return settings(
        max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )


def try_images(examples: int, folder: Path) -> None:
    @often(examples)
    @given(damaged(IMAGES))
    def attempt(content: bytes) -> None:
        path = folder / "a.png"
        path.write_bytes(content)
        for read in (
            lambda: read_frame(path),
            lambda: read_square(path, 64),
            lambda: measure_image(content, path),
        ):
            with suppress(SparseExpError):
                read()

    attempt()


def try_data(examples: int, folder: Path) -> None:
    """A data set of one image, whose labels, image list or yaml are damaged."""
    for split in ("images", "labels"):
        (folder / split).mkdir()
    (folder / "images" / "a.png").write_bytes(IMAGES[0])
    good = {
        "data.yaml": b"path: .\ntrain: list.txt\nval: images\nnames: [a, b, c]\nkpt_shape: [1, 2]\nnc: 3\n",
        "list.txt": b"./images/a.png\nimages/b.png\n",
        "labels/a.txt": LABELS,
    }

    @often(examples)
    @given(st.sampled_from(sorted(good)), st.data())
    def attempt(name: str, data: Any) -> None:
        for each, content in good.items():
            (folder / each).write_bytes(data.draw(damaged([content])) if each == name else content)
        for read in (
            list_dataset,
            lambda path: load_dataset(path, on_corrupt="skip", cache=folder / "cache"),
        ):
            with suppress(SparseExpError):
                read(folder / "data.yaml")

    attempt()


def try_models(examples: int, folder: Path) -> None:
    """Files that engines run."""
    whole = write_detector(folder / "whole.onnx").read_bytes()
    xml = (
        b'<?xml version="1.0" encoding="utf-8"?>'
        b'<net><rt_info><framework><names value="[&quot;a&quot;]"/><imgsz value="64"/></framework>'
        b"</rt_info></net>"
    )

    @often(examples)
    @given(damaged([whole]), damaged([xml]))
    def attempt(content: bytes, text: bytes) -> None:
        (folder / "a.onnx").write_bytes(content)
        (folder / "a.xml").write_bytes(text)
        read_metadata(folder / "a.onnx")
        read_metadata(folder / "a.xml")
        with suppress(SparseExpError):
            find_model(str(folder / "a.onnx"), engine="onnxruntime")

    attempt()


def real_run(folder: Path) -> Path:
    """The directory of a run that version 0.1.0 made, with a benchmark."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return next(folder.rglob(MANIFEST)).parent


@st.composite
def replaced_parts(draw: Any, tree: Any) -> Any:
    """Plain data of which one part, of all that lie as deep drawn as often, is of another kind."""
    tree = copy.deepcopy(tree)
    by_depth: dict[int, list[tuple[Any, Any]]] = {}

    def collect(at: Any, depth: int) -> None:
        for key in at if isinstance(at, dict) else range(len(at)):
            by_depth.setdefault(depth, []).append((at, key))
            if isinstance(at[key], dict | list):
                collect(at[key], depth + 1)

    collect(tree, 0)
    at, key = draw(st.sampled_from(by_depth[draw(st.sampled_from(sorted(by_depth)))]))
    at[key] = copy.deepcopy(draw(ODD))
    return tree


def try_real_records(examples: int, folder: Path) -> None:
    """A run that was really made: what `rerun`, `resume`, `compare`, `predict`, `sync`, `publish` read."""
    place = real_run(folder / "real")
    whole = json.loads((place / MANIFEST).read_text())
    whole |= {"job": 0, "environments": {"a": {**whole["conditions"], "packages": ["numpy==1"]}},
              "settled": {"batch_size": 4, "num_epochs": 2.0, "why": {"batch": "4"}},
              "counterpart": {"fingerprint": "a", "directory": "../b"}, "started": 1.0, "ended": 2.0,
              "tracker_address": "sqlite:///nowhere"}  # fmt: skip
    del whole["stages"]["export"]["outputs"]["deployment/dense.onnx"]  # which was not kept
    fetch = whole["stages"]["fetch"]
    fetch |= {"events": [{"event": "tags", "values": {"a": "b"}}], "conditions": "a", "parts": {"a": "b"}}
    register_schema()
    with initialize_config_dir(str(CONF_DIRECTORY), version_base="1.3"):
        composed = composed_of("config", [f"resume='{place}'"], return_hydra_config=True)
    job = composed.hydra
    with open_dict(composed):
        del composed["hydra"]

    def run_again() -> None:
        record = rerun.find_record(str(place), TrackerConfig(), folder)
        experiment, filled = rebuild(record.config, [])
        rebuild(record.config, rerun.settled_words(record.manifest, experiment))
        rerun.place_anew(experiment)
        assert isinstance(record.overrides, list | None)
        rerun.differences(record, experiment, filled)

    def compare_jobs() -> None:
        read_overview(place, ["size/onnx_mb", "val/map50"], max_loss=1.0)

    def tell_all() -> None:
        list(told_of(Run.read(place)))

    def publish() -> None:
        publish_run(read_finished(place), folder / "zoo", force=True)

    @often(examples)
    @given(replaced_parts(whole))
    def attempt(record: Any) -> None:
        (place / MANIFEST).write_text(json.dumps(record))
        for read in (
            run_again,
            lambda: resumed(composed, job),
            compare_jobs,
            lambda: find_model(str(place), engine="onnxruntime"),
            lambda: find_model(str(place), engine="torch"),
            tell_all,
            publish,
        ):
            with suppress(SparseExpError):
                read()

    attempt()


def try_records(examples: int, folder: Path) -> None:
    """Directories of runs: what `compare`, `predict` and `resume` read of them."""
    other = folder / "runs" / "other"
    other.mkdir(parents=True)
    (other / MANIFEST).write_text(json.dumps(RECORD))
    (other / "result.json").write_text(json.dumps(RESULT))
    place = folder / "runs" / "run"
    place.mkdir()
    good = read_run(other)

    def read_all() -> None:
        run = Run.read(place)
        assert isinstance(run.status + run.dense_fingerprint.__str__(), str)
        run.result(), run.environments, run.names, run.checkpoint, run.deployment.names, run.key
        run.composed_recipe, run.baseline_checkpoint, run.tracker_run_id
        for name in run.records:
            run.changed_outputs(name)

    @often(examples)
    @given(changed_trees(RECORD), changed_trees(RESULT))
    def attempt(record: Any, result: Any) -> None:
        (place / MANIFEST).write_text(json.dumps(record))
        (place / "result.json").write_text(json.dumps(result))
        with suppress(SparseExpError):
            read_all()
        past = read_run(place)
        if past is not None:
            assert isinstance(past.command, str)
            with suppress(SparseExpError):
                comparison = compare([good, past], "size/onnx_mb", "val/map50", limits="map50>=0.1")
                terminal_table(comparison, comparison.rows)
        with suppress(SparseExpError):
            find_model(str(place), engine="onnxruntime")

    attempt()
    write_files(compare([good], "size/onnx_mb", "val/map50"), folder / "out")


def try_zoos(examples: int, folder: Path) -> None:
    """Zoos that somebody else wrote: what list, show, search and verify read of them."""
    place = folder / MODEL["stub"].removeprefix("zoo:")
    place.mkdir(parents=True)
    sums = b"0" * 64 + b"  model.json\n" + b"1" * 64 + b"  ../x\n"

    @often(examples)
    @given(changed_trees(MODEL), damaged([sums]))
    def attempt(model: Any, listed: bytes) -> None:
        (place / METADATA).write_text(json.dumps(model))
        (place / SUMS).write_bytes(listed)
        changed_files(place)
        for words in (
            ["list"],
            ["list", "--json"],
            ["show", MODEL["stub"]],
            ["show", MODEL["stub"], "--json"],
            ["search", "size=n sparsity>=0.5 quantized map50>0 a published>2020"],
        ):
            with suppress(SparseExpError):
                zoo_main([*words, "--zoo", str(folder)])

    attempt()
    shutil.rmtree(place)


WORDS_OF_QUERIES = [
    "size",
    "=",
    "==",
    "!=",
    ">=",
    "<",
    ">",
    "n",
    "sparsity",
    "0.5",
    "70%",
    "map50",
    ",",
    "*",
    "?",
    "[",
    "]",
    "!",
    "nan",
    "inf",
    "1e999",
    "quantized",
    "published",
    "true",
    "ß",
    "zoo:",
    "-",
    "/",
    "cv/detection/yolov5-n/pytorch/me/digits/",
    "recipe_type",
    "&",
    "..",
    "%2e",
    "#",
]
PARTS = st.sampled_from([*WORDS_OF_QUERIES, " ", "\0", "\u0130", "\u2028", "9" * 400, "*" * 30 + "a"])
MODELS = [Published(MODEL["stub"], Path("a"), MODEL)]


def try_queries(examples: int, _folder: Path) -> None:
    @often(examples)
    @given(st.one_of(st.lists(PARTS, max_size=12).map("".join), st.text(max_size=20)))
    def attempt(text: str) -> None:
        for read in (
            lambda: find_models(text, MODELS),
            lambda: parse_limits(text, list(RESULT)),
            lambda: parse_stub(text),
            lambda: parse_stub(f"zoo:{text}"),
        ):
            with suppress(SparseExpError):
                read()

    attempt()


TRIES: list[
    tuple[Callable[[int, Path], None], int, int]
] = [  # and how often, in a moment and in some seconds
    (try_images, 100, 6000),
    (try_data, 40, 1500),
    (try_models, 40, 2500),
    (try_records, 40, 1500),
    (try_real_records, 5, 400),
    (try_zoos, 40, 1500),
    (try_queries, 200, 10_000),
]
NAMES = [attempt.__name__.removeprefix("try_") for attempt, _, _ in TRIES]


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Warnings of thousands of files need not be kept."""
    caplog.set_level("ERROR")


@pytest.mark.parametrize(("attempt", "few", "many"), TRIES, ids=NAMES)
def test_what_is_handed_in_is_read_or_refused(attempt, few, many, tmp_path):
    attempt(few, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("attempt", "few", "many"), TRIES, ids=NAMES)
def test_much_that_is_handed_in_is_read_or_refused(attempt, few, many, tmp_path):
    attempt(many, tmp_path)


@pytest.mark.parametrize(
    "line", ['path: "~\\0"', 'path: "a\\0b"', f"train: {'9' * 5000}", 'train: "a\\0.png"', "train: list.txt"]
)
def test_names_that_no_file_can_have_in_a_data_yaml(tmp_path, line):
    (tmp_path / "list.txt").write_bytes(b"a\0.png\n" + b"9" * 5000 + b"\n")
    text = {"path": "path: .", "train": "train: images", "val": "val: images", "names": "names: [a]"}
    text[line.partition(":")[0]] = line
    (tmp_path / "data.yaml").write_text("\n".join(text.values()))
    with pytest.raises(DataError):
        list_dataset(tmp_path / "data.yaml")


@pytest.mark.parametrize("content", ["[" * 10**5, '{"stages": {"fetch": ' + "[" * 10**5, "1" * 5000])
def test_records_that_python_cannot_parse_are_none(tmp_path, content):
    for name in (MANIFEST, METADATA, "result.json"):
        (tmp_path / name).write_text(content)
    assert Run.find(tmp_path) is None
    assert read_json(tmp_path / "result.json") == {}
    assert read_metadata_of_zoo(tmp_path) == {}


@pytest.mark.parametrize(
    "change",
    [
        {"metrics": 5}, {"facts": [1]}, {"outputs": ["a"]}, {"seconds": "long"}, {"fingerprint": None},
        {"metrics": {"a": 10**400}}, {"step": "x"}, {"events": {}},
    ],
)  # fmt: skip
def test_a_record_with_values_of_another_kind_is_none(tmp_path, change):
    record = copy.deepcopy(RECORD)
    record["stages"]["train"] |= change
    (tmp_path / MANIFEST).write_text(json.dumps(record))
    assert Run.find(tmp_path) is None


@pytest.mark.parametrize("change", [{"licence": 5}, {"sparsity": 10**400}, {"metrics": [1]}])
def test_a_model_with_values_of_another_kind_is_left_out(tmp_path, change):
    place = tmp_path / MODEL["stub"].removeprefix("zoo:")
    place.mkdir(parents=True)
    (place / METADATA).write_text(json.dumps({**MODEL, **change}))
    assert published(tmp_path) == []


def test_brackets_in_a_zoo_are_no_markup(tmp_path, capsys):
    place = tmp_path / MODEL["stub"].removeprefix("zoo:")
    place.mkdir(parents=True)
    (place / METADATA).write_text(json.dumps({**MODEL, "dataset": "[/x]", "licence": ["MIT", 1]}))
    assert zoo_main(["list", "--zoo", str(tmp_path)]) == 0
    assert zoo_main(["show", MODEL["stub"], "--zoo", str(tmp_path)]) == 0
    assert "[/x]" in capsys.readouterr().out


def test_names_in_an_exported_file_that_are_no_text(tmp_path):
    content = write_detector(tmp_path / "a.onnx").read_bytes()
    for part in (b"names", b"images", b"predictions"):
        assert part in content
        (tmp_path / "b.onnx").write_bytes(content.replace(part, b"\xff" * len(part)))
        read_metadata(tmp_path / "b.onnx")
        with suppress(SparseExpError):
            find_model(str(tmp_path / "b.onnx"), engine="onnxruntime")
    (tmp_path / "a.xml").write_bytes(b'<?xml version="1.0" encoding="utf-99"?><net/>')
    assert read_metadata(tmp_path / "a.xml") == {}


def test_the_zoo_of_the_tests_is_one(tmp_path):
    place = tmp_path / MODEL["stub"].removeprefix("zoo:")
    place.mkdir(parents=True)
    (place / METADATA).write_text(json.dumps(MODEL))
    assert len(published(tmp_path)) == 1
