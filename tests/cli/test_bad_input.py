"""What a user can get wrong: one clear line, an exit code that is not 0, nothing left behind.

Most cases call the command line inside this process, which saves its start-up; a few are processes.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command import Ended, command_line

from sparse_exp.data.digits import materialize
from sparse_exp.hardware.deepsparse import DeepSparse
from sparse_exp.yolov5 import YOLOv5, save_checkpoint

__all__ = ["command_line"]

TINY = ["model=yolov5n", "model.weights=scratch", "tracker=none"]


@pytest.fixture
def cwd(tmp_path, monkeypatch) -> Path:
    """An empty current directory."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def sx(cwd, cache, monkeypatch, command_line):
    """Calls the command line in this process, as ``sparse-exp WORDS`` in the directory `cwd`."""
    monkeypatch.setenv("SPARSE_EXP_CACHE", str(cache))
    return command_line


def check_message(ended: Ended, *fragments: str) -> None:
    assert ended.code != 0
    # One line: sentences, the last of which may end with a command that is typed as it stands there.
    assert re.fullmatch(r"Error: [^\n]+(\.|: python -m sparse_exp[^\n]+)", ended.error), ended.error
    assert "Traceback" not in ended.output
    for fragment in fragments:
        assert fragment in ended.error


def refused(ended: Ended, cwd: Path, *fragments: str) -> None:
    """It ended with a message before any run began."""
    check_message(ended, *fragments)
    assert list(cwd.iterdir()) == []


def failed(ended: Ended, cwd: Path, *fragments: str, stage: str) -> Path:
    """It ended with a message in a stage of the run, whose manifest says so."""
    check_message(ended, *fragments)
    (run,) = (cwd / "outputs" / "runs").glob("*/*")
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["status"] == "FAILED"
    assert manifest["stage"] == stage
    assert stage not in manifest["stages"]
    assert "Error: " + manifest["failure"] == " ".join(ended.error.split())
    assert not list(run.rglob("*.part*"))
    return run


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("core: [2]", "Error: hardware/mine.yaml: Unknown key hardware.core. Keys there: name, engines, "),
        (
            "cores: 2",
            "Error: hardware/mine.yaml: Expected hardware.cores to be a list. Write it in brackets: ",
        ),
    ],
)
def test_a_mistake_in_a_users_own_file_names_the_file(sx, cwd, line, message):
    (cwd / "own/hardware").mkdir(parents=True)
    (cwd / "own/hardware/mine.yaml").write_text(f"defaults:\n  - cpu\n{line}\n")
    ended = sx(f"hydra.searchpath=[file://{cwd}/own]", "hardware=mine", *TINY)
    assert (ended.code, ended.error[: len(message)]) == (1, message)


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        (["model=yolov9"], ["model/yolov9", "yolov5l, yolov5m, yolov5n, yolov5s, yolov5x"]),
        (["experiment=nope"], ["experiment/nope", "smoke"]),
        (["nope=1"], ["nope"]),
        (["model=null"], ["model", "--help"]),
        (["model.dept=1"], ["Unknown key model.dept", "size", "sparsity"]),
        (["+model.dept=1"], ["Unknown key model.dept"]),
        (["recipe.variables.num_epoch=3"], ["no variable 'num_epoch'", "num_epochs", "transfer_quant.md"]),
        (["+recipe.variables.num_epoch=3"], ["no variable 'num_epoch'", "num_epochs", "transfer_quant.md"]),
        (["trainer.val_batch_size=abc"], ["trainer.val_batch_size", "'abc'", "Integer"]),
        (["trainer.batch_size=abc"], ["trainer.batch_size", "auto or a whole number", "abc"]),
        (["trainer.batch_size=1.5"], ["trainer.batch_size", "auto or a whole number", "1.5"]),
        (["trainer.batch_size=null"], ["trainer.batch_size", "auto or a whole number"]),
        (["recipe.variables.num_epochs=abc"], ["recipe.variables.num_epochs", "Float"]),
        (["dry_run=perhaps"], ["dry_run", "'perhaps'"]),
        (
            ["hardware.engines=onnxruntime"],
            ["Expected hardware.engines to be a list", "hardware.engines=[...]"],
        ),
        (["paths.run=null"], ["paths.run"]),
        (["name=${nope}"], ["nope"]),
        (["trainer.batch_size=0"], ["trainer.batch_size", "at least 1 and at most 1024 images", "got 0"]),
        (["trainer.lr=nan"], ["trainer.lr"]),
        (["hardware.engines=[tensorrt]"], ["hardware.engines", "deepsparse, onnxruntime, openvino"]),
        (["dataset=custom"], ["dataset.path=PATH"]),
        (["dataset=custom", "dataset.path=/nowhere.yaml"], ["dataset.path", "'/nowhere.yaml'"]),
        (["model.weights=/nowhere.pt"], ["model.weights", "'/nowhere.pt'"]),
        (["model.stub=zoo:yolov5-s-here-none", "model.weights=scratch"], ["two starts", "Leave one out"]),
        (["recipe.file=nowhere.md"], ["recipe.file", "transfer_quant.md"]),
        (["recipe=custom"], ["recipe.file=VALUE"]),
        (["recipe.file=zoo:nowhere"], ["the SparseZoo stub", "'zoo:nowhere'"]),
        (["recipe.teacher=nowhere.pt"], ["recipe.teacher", "'nowhere.pt'"]),
        (["recipe.teacher=baseline", "recovery.baseline=none"], ["recovery.baseline=auto"]),
        (["recovery.baseline=nowhere"], ["recovery.baseline", "manifest.json"]),
        (["stages=[export]"], ["checkpoint=PATH"]),
        (["stages=[export]", "checkpoint=nowhere.pt"], ["checkpoint", "'nowhere.pt'"]),
        (["resume=nowhere"], ["resume", "manifest.json"]),
        (["hardware.cores=[1000]"], ["hardware.cores=[]"]),
        (
            ["hardware=edge2", "hardware.cores=[1]", "dataset.imgsz=640"],
            ["dataset.imgsz=320", "strict=false"],
        ),
        (["hardware=production", "hardware.engines=[deepsparse]"], ["deepsparse", "production", "licensed"]),
        (["trainer.batch_size="], ["trainer.batch_size"]),
        (["seed=1,2"], ["seed=1,2", "--multirun"]),
        (["--config-dir", "/nowhere"], ["/nowhere"]),
    ],
)
def test_refused_before_anything_begins(sx, cwd, words, fragments):
    refused(sx(*words), cwd, *fragments)


@pytest.mark.parametrize("words", [["experiment=smoke"], ["model=mine", "dataset=digits"]])
def test_a_stub_that_is_typed_and_that_nobody_has(sx, cwd, monkeypatch, words):
    """Also over weights that a file names, and for a model of one's own."""
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # nobody listens
    (cwd / "own/model").mkdir(parents=True)
    (cwd / "own/model/mine.yaml").write_text("name: mine\nsize: n\nstub: zoo:yolov5-n-mine-none\n")
    ended = sx("--config-dir", f"{cwd}/own", *words, "model.stub=zoo:yolov5-n-nobodys-none", "tracker=none")
    check_message(ended, "yolov5-n-nobodys-none")
    (run,) = (cwd / "outputs" / "runs").glob("*/*")
    assert json.loads((run / "manifest.json").read_text())["stage"] == "fetch"


@pytest.mark.parametrize(
    ("word", "fragment"),  # one of each kind: Hydra's, a value, the recipe, the host
    [
        ("model=yolov9", "model/yolov9"),
        ("trainer.batch_size=0", "at least 1 and at most 1024 images"),
        ("recipe.variables.num_epoch=3", "no variable 'num_epoch'"),
        ("hardware.cores=[1000]", "hardware.cores=[]"),
    ],
)
def test_a_dry_run_refuses_the_same(sx, cwd, word, fragment):
    refused(sx(word, "dry_run=true"), cwd, fragment)


def test_model_that_was_deleted(sx, cwd):
    assert sx("~model").error.splitlines() == [
        "Error: model.name has no value. Set it with model.name=VALUE.",
        "Error: model.size has no value. Set it with model.size=VALUE.",
    ]
    assert not list(cwd.iterdir())


def test_all_problems_are_named_at_once(sx, cwd):
    ended = sx("trainer.batch_size=0", "dataset.imgsz=100", "hardware.engines=[]", "dry_run=true")
    lines = ended.error.splitlines()
    assert [line.split()[2] for line in lines] == ["dataset.imgsz", "trainer.batch_size", "hardware.engines"]
    assert all(line.startswith("Error: ") for line in lines)
    assert not list(cwd.iterdir())


def test_a_target_that_does_not_fit_is_planned_all_the_same_where_that_is_asked_for(sx, cwd):
    words = ("hardware.cores=[1000]", "hardware.strict=false", "dry_run=true", "model.weights=scratch")
    ended = sx("model=yolov5n", *words)
    shown = " ".join(ended.output.split())
    assert ended.code == 0, ended.error
    assert re.search(r"Warning: hardware=cpu does not fit here: \d+ of 1000 cores\.", shown)
    assert not list(cwd.iterdir())


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_engine_that_is_not_installed(sx, cwd, monkeypatch, engine):
    monkeypatch.setitem(sys.modules, engine, None)
    refused(sx("experiment=smoke"), cwd, engine, "pip install", "hardware.engines")


def test_without_deepsparse_the_plan_says_how_to_get_it(sx, monkeypatch):
    gone = DeepSparse(problem="gone", do="Get it.")
    monkeypatch.setattr("sparse_exp.hardware.targets.find_deepsparse", lambda *_: gone)
    ended = sx("experiment=smoke", "dry_run=true")
    assert ended.code == 0, ended.error
    assert "without deepsparse: gone (get it)" in " ".join(ended.output.split())


@pytest.mark.parametrize(
    "text",
    ["hello", "---\na: [\n---\n", "---\ntraining_modifiers:\n  - !NoSuchModifier\n    a: 1\n---\n"],
)
def test_recipe_file_that_is_no_recipe(sx, cwd, tmp_path, text):
    (tmp_path / "bad.md").write_text(text)
    refused(sx(*TINY, "dataset=digits", "recipe=dense", f"recipe.file={tmp_path}/bad.md"), cwd, "bad.md")


def matching_nothing(folder: Path) -> Path:
    """A recipe that names a layer which the model does not have."""
    text = (
        "---\nnum_epochs: 1.0\nwarmup_epochs: 1.0\nwarmup_lr: 0.1\ninit_lr: 0.1\nfinal_lr: 0.1\n"
        "training_modifiers:\n"
        "  - !EpochRangeModifier\n    start_epoch: 0.0\n    end_epoch: eval(num_epochs)\n"
        "pruning_modifiers:\n  - !ConstantPruningModifier\n    start_epoch: 0.0\n"
        "    params: ['model.99.conv.weight']\n---\n"
    )
    path = folder / "nothing.md"
    path.write_text(text)
    return path


def test_recipe_that_matches_no_layer(sx, cwd, tmp_path):
    words = [*TINY, "dataset=digits", "recipe=dense", f"recipe.file={matching_nothing(tmp_path)}"]
    named = ("nothing.md", "'model.99.conv.weight'", "nearest")
    refused(sx(*words, "dry_run=true"), cwd, *named)
    failed(sx(*words), cwd, *named, stage="plan")


EPOCHS = "modifiers:\n  - !EpochRangeModifier\n    start_epoch: 0.0\n    end_epoch: {0}\n"
HOLD = "  - !ConstantPruningModifier\n    start_epoch: 0.0\n    params: __ALL_PRUNABLE__\n"
PRUNE = (
    "  - !GMPruningModifier\n    start_epoch: 4.0\n    end_epoch: 8.0\n    update_frequency: 0.5\n"
    "    init_sparsity: 0.05\n    final_sparsity: 0.8\n    params: __ALL_PRUNABLE__\n"
)
DISTILL = "  - !DistillationModifier\n    start_epoch: 0.0\n    hardness: 0.5\n    temperature: 2.0\n"


@pytest.mark.parametrize(
    ("text", "words", "fragments"),
    [
        (EPOCHS.format(2) + PRUNE, [], ["ends before it prunes", "below 2", "got 4.0"]),
        (EPOCHS.format(2) + DISTILL, [], ["no teacher", "recipe.teacher=PATH", "recipe.teacher=self"]),
        (EPOCHS.format(2), ["recipe.oneshot=true"], ["neither prunes nor quantizes", "recipe.oneshot=false"]),
        (
            EPOCHS.format(2) + HOLD.replace("__ALL_PRUNABLE__", "[model.24.conv.weight]"),
            [],
            ["'model.24.conv.weight'", "matches no layer", "nearest", "model.21.conv.weight"],
        ),
        (EPOCHS.format(0), [], ["more than 0 epochs"]),
    ],
)
def test_recipe_that_cannot_do_what_it_says(sx, cwd, tmp_path, text, words, fragments):
    (tmp_path / "mine.yaml").write_text(text)
    mine = [*TINY, "dataset=digits", "recipe=custom", f"recipe.file={tmp_path}/mine.yaml", "dry_run=true"]
    refused(sx(*mine, *words), cwd, *fragments)


def test_recipe_that_warns(sx, cwd, tmp_path):
    """What is allowed and probably not meant is said in the plan."""
    (tmp_path / "mine.yaml").write_text(EPOCHS.format(2) + HOLD)
    mine = ["recipe=custom", f"recipe.file={tmp_path}/mine.yaml", "recipe.teacher=self", "dry_run=true"]
    ended = sx(*TINY, "dataset=digits", *mine)
    assert ended.code == 0
    assert "Warning: recipe.teacher=self is not used: mine.yaml does not distill." in ended.output


def test_existing_run_directory(sx, cwd, tmp_path):
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "weights.pt").write_text("precious")
    for words in ([], ["overwrite=true"]):  # neither could go on with it or replace it
        ended = sx(*TINY, "dataset=digits", f"paths.run={kept}", *words)
        refused(ended, cwd, str(kept), "holds no manifest.json")
    (kept / "manifest.json").write_text("{}")
    ended = sx(*TINY, "dataset=digits", f"paths.run={kept}")
    refused(ended, cwd, str(kept), "overwrite=true", f"python -m sparse_exp resume={kept}")
    assert (kept / "weights.pt").read_text() == "precious"


@pytest.fixture
def own(tmp_path) -> Path:
    """A data set of one's own, whole."""
    return materialize(tmp_path / "own", imgsz=64, train=3, val=2, test=0)


def break_image(data: Path) -> str:
    image = data.parent / "images" / "train" / "001.png"
    image.write_bytes(image.read_bytes()[:200])
    return str(image)


def break_label(line: str):
    def change(data: Path) -> str:
        label = data.parent / "labels" / "train" / "001.txt"
        lines = label.read_text().splitlines()
        label.write_text("\n".join([lines[0], line, *lines[1:]]))
        return f"{label}:2"

    return change


def empty_training(data: Path) -> str:
    for image in (data.parent / "images" / "train").iterdir():
        image.unlink()
    return "'train'"


def lose_split(data: Path) -> str:
    data.write_text(data.read_text().replace("val: images/val", "val: images/lost"))
    return "lost"


def lose_names(data: Path) -> str:
    data.write_text(data.read_text().partition("names:")[0])
    return "names"


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        (break_image, ["Cannot read the image"]),
        (break_label("0 0.5 half 0.1 0.1"), ["only numbers", "half"]),
        (break_label("0 0.5 0.5"), ["class x y w h"]),
        (break_label("0 0.5 0.5 3 0.1"), ["0..1"]),
        (break_label("10 0.5 0.5 0.1 0.1"), ["class id of 0..9", "names", "'10'"]),
        (empty_training, ["at least one image"]),
        (lose_split, ["an existing folder"]),
        (lose_names, ["class names"]),
        (lambda data: data.write_text("path: [") and str(data), ["data yaml"]),
    ],
)
def test_data_that_cannot_be_used(sx, cwd, own, change, fragments):
    place = change(own)
    ended = sx(*TINY, "dataset=custom", f"dataset.path={own}", "dataset.imgsz=64")
    run = failed(ended, cwd, place, *fragments, stage="fetch")
    assert not (run / "weights").exists()
    assert "Traceback" in (run / "sparse_exp.log").read_text()


def checkpoint(path: Path, size: str = "n", extra: dict | None = None) -> Path:
    torch.manual_seed(0)
    names = [str(digit) for digit in range(10)]
    state = {**YOLOv5(size, 10).state_dict(), **(extra or {})}
    save_checkpoint(
        path,
        model_state=state,
        size=size,
        num_classes=10,
        names=names,
        imgsz=96,
        recipe="",
        phase="dense",
        epoch=0.0,
        metrics={},
    )
    return path


class Asks:
    """Pickles as a call of a function."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def another_size(path: Path) -> list[str]:
    checkpoint(path, "s")
    return ["yolov5n as configured", "'yolov5s'", "model=yolov5s"]


def another_architecture(path: Path) -> list[str]:
    torch.save({"model": torch.nn.Linear(2, 2).state_dict()}, path)
    return [str(path), "YOLOv5 v6.0 to v7.0"]


def code(path: Path) -> list[str]:
    torch.save({"model": Asks(os.system, f"touch {path.parent}/executed")}, path)
    return [str(path), "system"]


def damaged(path: Path) -> list[str]:
    content = checkpoint(path).read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return [str(path)]


def no_checkpoint(path: Path) -> list[str]:
    path.write_text("hello")
    return [str(path), "PyTorch checkpoint"]


BAD_CHECKPOINTS = [another_size, another_architecture, code, damaged, no_checkpoint]


@pytest.mark.parametrize("make", BAD_CHECKPOINTS)
def test_start_checkpoint_that_cannot_be_used(sx, cwd, tmp_path, make):
    path = tmp_path / "start.pt"
    fragments = make(path)
    ended = sx("model=yolov5n", f"model.weights={path}", "tracker=none", "dataset=digits")
    run = failed(ended, cwd, *fragments, stage="plan")
    assert not (run / "weights").exists()
    assert not (tmp_path / "executed").exists()
    # the data are in the cache by now, so that a dry run can know it too
    again = sx("model=yolov5n", f"model.weights={path}", "tracker=none", "dataset=digits", "dry_run=true")
    check_message(again, *fragments)
    assert len(list((cwd / "outputs" / "runs").glob("*/*"))) == 1


@pytest.mark.parametrize("make", [another_architecture, code, damaged, no_checkpoint])
def test_trained_checkpoint_that_cannot_be_used(sx, cwd, tmp_path, make):
    path = tmp_path / "trained.pt"
    fragments = make(path)
    words = [*TINY, "dataset=digits", "stages=[export]", f"checkpoint={path}"]
    run = failed(sx(*words), cwd, *fragments, stage="export")
    assert not list(run.rglob("*.onnx"))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("start", ["scratch", "file"])
def test_transfer_that_would_stay_dense(sx, cwd, tmp_path, start):
    weights = start if start == "scratch" else checkpoint(tmp_path / "dense.pt")
    words = ["model=yolov5n", f"model.weights={weights}", "tracker=none", "dataset=digits"]
    ended = sx(*words, "recipe.prune_dense_start=false")
    failed(ended, cwd, "is dense", "recipe.prune_dense_start=true", "model.weights=PATH", stage="plan")


def test_one_shot_without_training_before(sx, cwd):
    """The refusal comes before the calibration, and a dry run knows it too once the data are there."""
    ended = sx(*TINY, "dataset=digits", "recipe=oneshot")
    failed(ended, cwd, "the start is random", "model.weights=PATH", stage="plan")
    again = sx(*TINY, "dataset=digits", "recipe=oneshot", "dry_run=true")
    check_message(again, "the start is random", "model.weights=PATH")


def test_teacher_that_knows_nothing(sx, cwd, tmp_path):
    (tmp_path / "mine.yaml").write_text(EPOCHS.format(2) + DISTILL)
    mine = ["recipe=custom", f"recipe.file={tmp_path}/mine.yaml", "recipe.teacher=self"]
    failed(sx(*TINY, "dataset=digits", *mine), cwd, "recipe.teacher=self would teach noise", stage="plan")


def test_wrong_sha256(sx, cwd, tmp_path):
    path = checkpoint(tmp_path / "start.pt")
    source = f"model.sources=[{{uri:{path},sha256:'{'0' * 64}'}}]"
    ended = sx("model=yolov5n", source, "tracker=none", "dataset=digits")
    failed(ended, cwd, str(path), "sha256 " + "0" * 64, "Do not use it", stage="fetch")


def test_server_that_does_not_answer(sx, cwd):
    source = "model.sources=[{uri:'http://127.0.0.1:9/start.pt'}]"
    ended = sx("model=yolov5n", source, "tracker=none", "dataset=digits")
    failed(ended, cwd, "http://127.0.0.1:9/start.pt", "model.weights=PATH", stage="fetch")


# The same as processes of their own.


def process(cwd: Path, *words: str, **variables: str) -> Ended:
    command = [sys.executable, "-m", "sparse_exp", *words]
    environment = {**os.environ, **variables}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=120, env=environment, cwd=cwd
    )
    lines = done.stderr.strip().splitlines()
    return Ended(done.returncode, lines[-1] if lines else "", done.stdout + done.stderr)


def test_process_refuses_an_unknown_option(cwd):
    refused(process(cwd, "model=yolov9"), cwd, "yolov5l")


@pytest.mark.slow
def test_process_without_a_package(cwd, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['openvino'] = None\n")
    ended = process(cwd, "experiment=smoke", PYTHONPATH=str(tmp_path))
    refused(ended, cwd, "openvino", "pip install")


@pytest.mark.slow
def test_process_that_reaches_no_index_and_has_nothing_cached(cwd, tmp_path):
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_CONFIG_FILE": os.devnull}
    ended = process(cwd, "tracker=none", SPARSE_EXP_CACHE=str(tmp_path / "none"), **offline)
    failed(ended, cwd, "deepforest==2.1.0", "network", "paths.cache", stage="fetch")
    left = [path for path in (tmp_path / "none").rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert left == []
