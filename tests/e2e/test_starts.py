"""Trainings that start from checkpoints as users have them, wherever these come from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from foreign import save_fork, save_ultralytics
from webserver import server

from sparse_exp.config.plain import recipe_path
from sparse_exp.config.schema import (
    DatasetConfig,
    Experiment,
    ModelConfig,
    PathsConfig,
    RecipeConfig,
    SourceConfig,
    TrackerConfig,
    TrainerConfig,
)
from sparse_exp.data.digits import materialize
from sparse_exp.errors import SourceUnavailable
from sparse_exp.experiment import run
from sparse_exp.recipes.checkpoints import restore
from sparse_exp.recipes.recipe import Recipe
from sparse_exp.runs.directory import Run
from sparse_exp.sparsity.prune import prune_by_magnitude
from sparse_exp.tracking import Tags
from sparse_exp.yolov5 import YOLOv5, read_checkpoint, save_checkpoint

__all__ = ["server"]  # a fixture
STUB = "zoo:cv/detection/yolov5-n/pytorch/ultralytics/coco/pruned40_quant-none"
COCO = [f"class{i}" for i in range(80)]
MADE_WITH = """version: 1.1.0
modifiers:
  - !EpochRangeModifier
    start_epoch: 0.0
    end_epoch: 4.0
  - !GMPruningModifier
    init_sparsity: 0.05
    final_sparsity: 0.6
    start_epoch: 0.0
    end_epoch: 2.0
    update_frequency: 1.0
    params: __ALL_PRUNABLE__
  - !QuantizationModifier
    start_epoch: 3.0
    submodules: [model.0]
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Images of 64 px; ten classes."""
    return materialize(tmp_path_factory.mktemp("data") / "digits", imgsz=64, train=8, val=4, test=2)


@pytest.fixture(scope="module")
def pruned() -> YOLOv5:
    """A detector of 80 classes; 60 % of its weights are zero."""
    torch.manual_seed(0)
    model = YOLOv5("n", len(COCO))
    prune_by_magnitude(model.prunable_convolutions(), 0.6)
    return model


@dataclass
class Place:
    """Where runs of one test lie, with their cache and local zoo."""

    root: Path
    data: Path
    tags: dict[str, str] = field(default_factory=dict)  # that the last run gave to its tracker

    def run(self, recipe: str = "transfer", size: str = "n", **model) -> Run:
        """Fetch, plan and train for an epoch; returns what that left."""
        experiment = Experiment(
            name="start",
            stages=["fetch", "plan", "train"],
            model=ModelConfig(name=f"yolov5{size}", size=size, **model),
            dataset=DatasetConfig(name="digits", path=str(self.data), imgsz=64),
            recipe=RecipeConfig(name=recipe, file=str(recipe_path(f"{recipe}.md")), num_epochs=1.0),
            trainer=TrainerConfig(batch_size=4),
            tracker=TrackerConfig(backend="none"),
            paths=PathsConfig(
                run=str(self.root / "run"),
                mlflow=str(self.root / "mlflow"),
                zoo=str(self.root / "zoo"),
                cache=str(self.root / "cache"),
            ),
            overwrite=True,
        )
        run(experiment, {}, [])
        return Run.reopen(self.root / "run")


@pytest.fixture
def place(tmp_path, data, monkeypatch) -> Place:
    place = Place(tmp_path, data)

    class Notebook:
        """A tracker that remembers tags."""

        run_id = address = None

        def start(self, run: object) -> None:
            place.tags.clear()

        def log(self, event: object, at: float | None = None) -> None:
            place.tags.update(event.values if isinstance(event, Tags) else {})

        def finish(self, status: object, reason: str, at: float | None = None) -> bool:
            return True

    monkeypatch.setattr("sparse_exp.experiment.create_tracker", lambda *_: Notebook())
    return place


def zeros_kept(run: Run, model: YOLOv5) -> bool:
    """Whether each zero of the start is one in the trained checkpoint too."""
    state = read_checkpoint(run.path / run.records["train"].facts["checkpoint"]).state_dict
    convs = model.prunable_convolutions()
    return all(bool((state[f"{name}.weight"][conv.weight == 0] == 0).all()) for name, conv in convs.items())


def test_a_users_own_ultralytics_training(place, pruned, tmp_path):
    path = save_ultralytics(tmp_path / "last.pt", pruned, COCO)
    run = place.run(weights=str(path))
    fetched, planned = (run.records[stage].facts for stage in ("fetch", "plan"))
    assert fetched["origin"].startswith(f"{path} (sha256 {fetched['sha256'][:12]}...)")
    assert run.result()["weights/origin"] == fetched["origin"]
    assert planned["transferred"] == "343 of 349 tensors"
    assert len(planned["left"]) == 6
    assert planned["start"] == {"sparsity": pytest.approx(0.6, abs=0.01), "quantized": False}
    assert planned["prune_to"] is None
    assert place.tags["weights/origin"] == fetched["origin"]
    assert place.tags["weights/sha256"] == fetched["sha256"]
    assert place.tags["weights/taken"] == planned["transferred"]
    assert float(place.tags["weights/sparsity"]) == planned["start"]["sparsity"]
    assert place.tags["weights/quantized"] == "False"
    assert zeros_kept(run, pruned)


def test_a_checkpoint_of_the_fork_with_its_recipe(place, pruned, tmp_path):
    """One from before its quantization: the recipe that it carries says more than was done yet."""
    path = save_fork(tmp_path / "model.ckpt.pt", pruned, "n", COCO, recipe=MADE_WITH)
    run = place.run(weights=str(path))
    assert zeros_kept(run, pruned)
    recipe = (run.path / "recipe.md").read_text()
    assert recipe.index("GMPruningModifier") < recipe.index("ConstantPruningModifier")
    composed = Recipe.from_file(recipe_path("transfer_quant.md")).after(read_checkpoint(path).recipe)
    assert composed.count("QuantizationModifier") == 1


def test_a_directory_in_sparsezoos_layout(place, pruned, tmp_path):
    folder = tmp_path / "pruned model"
    (folder / "training").mkdir(parents=True)
    save_fork(folder / "training" / "model.ckpt.pt", pruned, "n", COCO, recipe=MADE_WITH)
    run = place.run(weights=str(folder))
    assert "model.ckpt.pt (sha256 " in run.records["fetch"].facts["origin"]
    assert zeros_kept(run, pruned)


def serve_zoo(server, files: dict[str, bytes], monkeypatch) -> None:
    """Answer as SparseZoo's service did: a listing for any stub, and the files that it names."""
    monkeypatch.setenv("SPARSEZOO_API_URL", server.url)
    kinds = {"model.onnx": "onnx", "recipe_original.md": "recipe"}
    listing = [
        {
            "displayName": name, "downloadUrl": f"{server.url}/{name}", "fileSize": len(content),
            "fileType": kinds.get(name, "framework"), "modelId": "1",
        }
        for name, content in files.items()
    ]  # fmt: skip
    model = {
        "modelId": "1", "files": listing, "benchmarkResults": [], "trainingResults": [],
        "repoName": "r", "repoNamespace": "n", "modelOnnxSizeCompressedBytes": 1,
    }  # fmt: skip
    server.files = {f"/{name}": content for name, content in files.items()}
    server.posts["/v2/graphql"] = lambda _: {"data": {"models": [model]}}


def test_a_stub_from_sparsezoos_service(place, pruned, tmp_path, server, monkeypatch):
    path = save_fork(tmp_path / "model.ckpt.pt", pruned, "n", COCO, recipe=MADE_WITH)
    files = {
        "model.onnx": b"onnx", "model.pt": b"after quantization", "model.ckpt.pt": path.read_bytes(),
        "recipe_original.md": MADE_WITH.encode(),
    }  # fmt: skip
    serve_zoo(server, files, monkeypatch)
    run = place.run(weights=STUB)
    assert run.records["fetch"].facts["origin"].startswith(f"{STUB} (sha256 ")
    assert zeros_kept(run, pruned)
    asked = len(server.requests)
    place.run(weights=STUB)  # from the cache
    assert len(server.requests) == asked
    server.posts.clear()
    with pytest.raises(SourceUnavailable, match=r"SparseZoo does not answer for zoo:.*404"):
        place.run(weights=f"{STUB}?checkpoint=postqat")


def test_the_first_source_that_answers_and_its_hash(place, pruned, tmp_path, server):
    path = save_ultralytics(tmp_path / "yolov5n.pt", pruned, COCO)
    server.files = {"/v7.0/yolov5n.pt": path.read_bytes()}
    sources = [SourceConfig(f"{server.url}/missing"), SourceConfig(f"{server.url}/v7.0/yolov5n.pt")]
    run = place.run(sources=sources)
    assert run.records["fetch"].facts["origin"].startswith(f"{server.url}/v7.0/yolov5n.pt (sha256 ")
    assert run.records["plan"].facts["transferred"] == "343 of 349 tensors"


@pytest.mark.slow
def test_what_is_grown_says_what_it_was_grown_from(place, data, tmp_path):
    torch.manual_seed(0)
    small = YOLOv5("n", 10)
    path = tmp_path / "small.pt"
    values = {"names": list("0123456789"), "imgsz": 64, "recipe": "", "phase": "dense", "epoch": 1}
    save_checkpoint(path, model_state=small.state_dict(), size="n", num_classes=10, metrics={}, **values)
    run = place.run(size="s", grow_from=[SourceConfig(str(path), trained_on="digits")])
    fetched, planned = (run.records[stage].facts for stage in ("fetch", "plan"))
    assert fetched["origin"] == run.result()["weights/origin"] == "grown:yolov5n(digits)"
    assert fetched["grown_from"].startswith(f"{path} (sha256 {fetched['sha256'][:12]}")
    assert planned["transferred"] == "349 of 349 tensors"
    assert (place.tags["weights/origin"], place.tags["weights/grown_from"]) == (
        fetched["origin"], fetched["grown_from"],
    )  # fmt: skip
    assert planned["lines"]["model"] == "yolov5s from grown:yolov5n(digits)"
    assert str(path) in planned["lines"]["grown"]
    log = (run.path / "sparse_exp.log").read_text()
    assert f"No yolov5s can be had: its start is grown:yolov5n(digits), from {path}" in log


def test_a_quantized_start_is_taken_in_floating_point(place, tiny_run):
    quantized = tiny_run.best["pruned_quant"]
    run = place.run(weights=str(quantized))
    assert run.records["plan"].facts["start"]["quantized"]
    assert zeros_kept(run, restore(quantized)[0])
    log = (run.path / "sparse_exp.log").read_text()
    assert "is quantized: its weights are taken in floating point." in log
