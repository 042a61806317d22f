"""The official COCO checkpoint on real photos: read, run and exported, it sees what is there."""

from __future__ import annotations

from contextlib import closing

import numpy as np
import pytest
import torch
import yaml

from sparse_exp.config.plain import CONF_DIRECTORY
from sparse_exp.config.schema import ENGINES, SourceConfig
from sparse_exp.data.images import read_square
from sparse_exp.engines import IsolatedEngine
from sparse_exp.export.exporter import export_deployment
from sparse_exp.export.onnx import FileForm
from sparse_exp.sources.cache import cache_directory, fetch
from sparse_exp.yolov5 import YOLOv5, non_max_suppression, read_checkpoint, transfer_weights

pytestmark = pytest.mark.slow
IMGSZ = 640
SHOWN = {"astronaut": "person", "chelsea": "cat", "coffee": "cup"}


@pytest.fixture(scope="module")
def checkpoint():
    """The first source of yolov5s: Ultralytics' checkpoint of release v6.0."""
    model = yaml.safe_load((CONF_DIRECTORY / "model" / "yolov5s.yaml").read_text(encoding="utf-8"))
    return read_checkpoint(fetch(SourceConfig(**model["sources"][0]), cache_directory()).path)


@pytest.fixture(scope="module")
def model(checkpoint) -> YOLOv5:
    model = YOLOv5(checkpoint.size, checkpoint.num_classes)
    assert transfer_weights(model, checkpoint).left == ()
    return model.eval()


@pytest.fixture(scope="module")
def images(photos) -> np.ndarray:
    """The photos as engines take them: uint8 (3, 3, 640, 640)."""
    return np.stack([read_square(photos[name], IMGSZ)[0].transpose(2, 0, 1) for name in SHOWN])


@pytest.fixture(scope="module")
def deployment(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("coco")
    export_deployment(model, folder, FileForm(IMGSZ, opset=13))
    return folder


def seen(predictions: torch.Tensor, names) -> list[str]:
    """What is seen with most confidence in each image; close-ups get little of it at this size."""
    kept = non_max_suppression(predictions.numpy(), 0.25, 0.45, 100)
    best = [found[found[:, 4].argmax()] for found in kept]
    return [names[int(row[5])] for row in best]


@pytest.fixture(scope="module")
def predictions(model, images) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.from_numpy(images).float() / 255)[0]


def test_torch_sees_what_is_there(checkpoint, predictions):
    assert seen(predictions, checkpoint.names) == list(SHOWN.values())


@pytest.mark.parametrize("name", [name for name in ENGINES if name != "torch"])
def test_each_engine_sees_the_same(checkpoint, predictions, images, deployment, name):
    with closing(IsolatedEngine(name)) as engine:
        engine.load(deployment / "model.onnx", batch_size=1, cores=1)
        found = torch.from_numpy(np.concatenate([engine.run(image[None])[0] for image in images]))
    assert seen(found, checkpoint.names) == list(SHOWN.values())
    sure = predictions[..., 4] > 0.1
    torch.testing.assert_close(found[sure][:, :4], predictions[sure][:, :4], atol=0.5, rtol=1e-3)
    torch.testing.assert_close(found[sure][:, 4:], predictions[sure][:, 4:], atol=0.01, rtol=0)
