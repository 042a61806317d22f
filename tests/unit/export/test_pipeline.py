"""DeepSparse's own pipeline opens a run's deployment directory as it is."""

from __future__ import annotations

import shutil

import pytest
import torch

from sparse_exp.export.differences import matched_shares
from sparse_exp.export.verification import predict
from sparse_exp.quantization.reference import as_deployed
from sparse_exp.yolov5 import non_max_suppression

CONF, IOU = 0.05, 0.6


@pytest.mark.slow
def test_it_finds_what_the_evaluation_finds(deployment, lively_model, digit_images, tmp_path):
    pytest.importorskip("deepsparse", reason="the pipeline runs where the extra neuralmagic is installed")
    pytest.importorskip("cv2", reason="DeepSparse's pipeline for YOLO imports OpenCV")
    from deepsparse import Pipeline

    folder = shutil.copytree(deployment, tmp_path / "deployment")  # it may write beside the model
    pipeline = Pipeline.create(task="yolo", model_path=str(folder), num_cores=1)
    assert tuple(pipeline.image_size) == (64, 64)
    ours = predict(as_deployed(lively_model), torch.from_numpy(digit_images))
    kept = non_max_suppression(ours.numpy(), CONF, IOU, 300, multi_label=False)
    wanted = list(map(torch.from_numpy, kept))
    # Square images of the model's size: others it stretches, where evaluation adds borders.
    found = [_detections(pipeline, image.transpose(1, 2, 0)) for image in digit_images]
    assert sum(map(len, wanted)) > 20
    # The same boxes to an IoU of 0.9, classes, and confidences to 0.1, but where rounding to 8 bits decides.
    shares = matched_shares(found, wanted)
    assert min(shares.values()) >= 0.9, shares


def _detections(pipeline, image) -> torch.Tensor:
    output = pipeline(images=[image], conf_thres=CONF, iou_thres=IOU)
    columns = output.boxes[0], output.scores[0], output.labels[0]
    rows = [[*box, score, float(label)] for box, score, label in zip(*columns, strict=True)]
    return torch.tensor(rows).reshape(-1, 6)
