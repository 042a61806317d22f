from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from sparse_exp.errors import RecipeError
from sparse_exp.recipes.distillation import Distiller, LayerTerm, OutputTerm, detection_distillation
from sparse_exp.recipes.recipe import Recipe
from sparse_exp.yolov5 import YOLOv5

SIZES = ((2, 3), (1, 2), (1, 1))


def raw_maps(seed: int, classes: int = 3, images: int = 2) -> list[Tensor]:
    torch.manual_seed(seed)
    return [3 * torch.randn(images, 3, ny, nx, 5 + classes) for ny, nx in SIZES]


def detector(seed: int, size: str = "n", classes: int = 3) -> YOLOv5:
    torch.manual_seed(seed)
    return YOLOv5(size, classes)


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def relative_entropy(student: float, teacher: float) -> float:
    p, q = sigmoid(teacher), sigmoid(student)
    return float(p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))


def reference(student: Sequence[Tensor], teacher: Sequence[Tensor], temperature: float) -> float:
    """The documented sum, one prediction at a time."""
    images, _, ny, nx, outputs = student[0].shape
    classes = outputs - 5
    total = 0.0
    for balance, s_map, t_map in zip((4.0, 1.0, 0.4), student, teacher, strict=True):
        rows = list(
            zip(s_map.reshape(-1, outputs).tolist(), t_map.reshape(-1, outputs).tolist(), strict=True)
        )
        seen = sum(sigmoid(t[4]) for _, t in rows)
        objectness = box = kinds = 0.0
        for s, t in rows:
            objectness += (
                temperature**2 * relative_entropy(s[4] / temperature, t[4] / temperature) / len(rows)
            )
            weight = sigmoid(t[4]) / max(1.0, seen)
            box += weight * sum((2 * sigmoid(s[i]) - 2 * sigmoid(t[i])) ** 2 for i in range(4))
            each = [relative_entropy(s[i] / temperature, t[i] / temperature) for i in range(5, outputs)]
            kinds += weight * temperature**2 * sum(each) / classes
        area = (ny * 8) * (nx * 8) / 640**2
        total += (
            0.05 * box
            + 1.0 * area * balance * objectness
            + (0.5 * classes / 80 * kinds if classes > 1 else 0)
        )
    return total * images


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("classes", [1, 3])
def test_the_loss_is_the_documented_sum(temperature, classes):
    student, teacher = raw_maps(0, classes), raw_maps(1, classes)
    value = detection_distillation(student, teacher, temperature)
    assert float(value) == pytest.approx(reference(student, teacher, temperature), rel=1e-4)


def test_a_student_that_is_the_teacher_has_no_loss_and_any_other_has():
    teacher = raw_maps(1)
    assert float(detection_distillation([t.clone() for t in teacher], teacher, 2.0)) == pytest.approx(
        0, abs=1e-6
    )
    for part in (0, 4, 6):
        student = [t.clone() for t in teacher]
        student[1][..., part] += 1
        assert float(detection_distillation(student, teacher, 2.0)) > 1e-5


def test_boxes_and_classes_count_only_where_the_teacher_sees_something():
    teacher = raw_maps(1)
    for level in teacher:
        level[..., 4] = -30
    student = [t.clone() for t in teacher]
    for level in student:
        level[..., :4] += 2
        level[..., 5:] -= 2
    assert float(detection_distillation(student, teacher, 1.0)) == pytest.approx(0, abs=1e-6)


def test_following_the_gradient_leads_to_the_teacher():
    teacher = raw_maps(1)
    student = [s.requires_grad_() for s in raw_maps(0)]
    optimizer = torch.optim.Adam(student, lr=0.1)
    gap = [
        float((s.sigmoid() - t.sigmoid())[..., 4].abs().mean()) for s, t in zip(student, teacher, strict=True)
    ]
    for _ in range(150):
        optimizer.zero_grad()
        detection_distillation(student, teacher, 2.0).backward()
        optimizer.step()
    now = [
        float((s.sigmoid() - t.sigmoid())[..., 4].abs().mean()) for s, t in zip(student, teacher, strict=True)
    ]
    assert all(after < 0.1 * before for after, before in zip(now, gap, strict=True))


def test_twice_the_images_are_twice_the_loss():
    student, teacher = raw_maps(0), raw_maps(1)
    for level in teacher:
        level[..., 4] += 4  # enough objects in both for the mean over them to be one
    twice = [[torch.cat([m, m]) for m in maps] for maps in (student, teacher)]
    once = float(detection_distillation(student, teacher, 2.0))
    assert float(detection_distillation(*twice, 2.0)) == pytest.approx(2 * once, rel=1e-5)


IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(5))
TASK = torch.tensor(0.7)


def distiller_of(student, teacher, outputs=(), layers=(), optimizer=None) -> Distiller:
    optimizer = optimizer or torch.optim.SGD(student.parameters(), lr=0.1)
    return Distiller(student, teacher, outputs, layers, optimizer)


def test_hardness_weighs_task_and_teacher_and_epochs_bound_it():
    student, teacher = detector(0), detector(1)
    raw = student(IMAGES)
    taught = teacher.eval()(IMAGES)[1]
    distillation = detection_distillation(raw, taught, 3.0)
    distiller = distiller_of(student, teacher, [OutputTerm(1.0, 2.0, 0.25, 3.0)])
    total = distiller.add_to(TASK, IMAGES, raw, 1.5)
    assert float(total) == pytest.approx(0.75 * 0.7 + 0.25 * float(distillation), rel=1e-5)
    assert distiller.add_to(TASK, IMAGES, raw, 0.99) is TASK
    assert distiller.add_to(TASK, IMAGES, raw, 2.0) is TASK


def test_the_teacher_learns_nothing():
    student, teacher = detector(0), detector(1).train()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    distiller = distiller_of(student, teacher, [OutputTerm(0.0, -1.0, 0.5, 2.0)])
    distiller.add_to(TASK, IMAGES, student(IMAGES), 0.0).backward()
    assert not teacher.training
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())
    assert any(bool(p.grad.any()) for p in student.parameters())


def layer_term(*pairs: tuple[str, str], **changes) -> LayerTerm:
    options = {"start": 0.0, "end": -1.0, "gain": 2.0, "normalize": False, "project": True, "epsilon": 1e-6}
    return LayerTerm(layers=pairs, **{**options, **changes})


@pytest.mark.parametrize("normalize", [False, True])
def test_feature_maps_are_compared_layer_by_layer(normalize):
    student, teacher = detector(0).eval(), detector(1)
    distiller = distiller_of(
        student, teacher, layers=[layer_term(("model.1", "model.1"), normalize=normalize)]
    )
    raw = student(IMAGES)[1]
    with torch.no_grad():
        own, other = (m.eval().model[1](m.model[0](IMAGES)).numpy() for m in (student, teacher))
    wanted = ((own - other) ** 2).mean() / ((other**2).mean() + 1e-6 if normalize else 1.0)
    total = distiller.add_to(TASK, IMAGES, raw, 0.0)
    assert float(total) == pytest.approx(0.7 + 2.0 * float(wanted) * 2, rel=1e-4)


def test_evaluating_the_student_in_between_does_not_disturb():
    student, teacher = detector(0).eval(), detector(1)
    distiller = distiller_of(student, teacher, layers=[layer_term(("model.1", "model.1"))])
    raw = student(IMAGES)[1]
    with torch.no_grad():
        student(torch.zeros(1, 3, 32, 32))
    between = float(distiller.add_to(TASK, IMAGES, raw, 0.0))
    assert between == pytest.approx(float(distiller.add_to(TASK, IMAGES, student(IMAGES)[1], 0.0)))


def test_only_different_shapes_are_projected_and_the_projection_is_trained():
    student, teacher = detector(0), detector(1, size="s")
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01)
    distiller = distiller_of(
        student, teacher, layers=[layer_term(("model.17", "model.17"), normalize=True)], optimizer=optimizer
    )
    distiller.add_to(TASK, IMAGES, student(IMAGES), 0.0)
    assert len(optimizer.param_groups) == 2
    (projection,) = optimizer.param_groups[1]["params"]
    assert projection.shape == (128, 64, 1, 1)
    before = projection.detach().clone()
    distiller.add_to(TASK, IMAGES, student(IMAGES), 0.0).backward()
    optimizer.step()
    assert not torch.equal(projection, before)
    distiller.add_to(TASK, IMAGES, student(IMAGES), 0.0)
    assert len(optimizer.param_groups) == 2

    alike = torch.optim.SGD(student.parameters(), lr=0.01)
    same = distiller_of(student, detector(2), layers=[layer_term(("model.17", "model.17"))], optimizer=alike)
    same.add_to(TASK, IMAGES, student(IMAGES), 0.0)
    assert len(alike.param_groups) == 1


def test_shapes_that_do_not_fit_and_layers_that_are_not_there_are_refused():
    student, teacher = detector(0), detector(1, size="s")
    distiller = distiller_of(student, teacher, layers=[layer_term(("model.17", "model.17"), project=False)])
    with pytest.raises(RecipeError, match=r"outputs of model\.17 .* one shape.*Set project_features: True"):
        distiller.add_to(TASK, IMAGES, student(IMAGES), 0.0)
    with pytest.raises(RecipeError, match=r"teacher's layer 'model\.99'.*Correct teacher_layer_names"):
        distiller_of(student, teacher, layers=[layer_term(("model.17", "model.99"))])


QUANTIZED_FROM_ONE = """modifiers:
  - !EpochRangeModifier
    start_epoch: 0.0
    end_epoch: 2.0
  - !PerLayerDistillationModifier
    start_epoch: 0.0
    gain: 1.0
    student_layer_names: [{}]
  - !QuantizationModifier
    start_epoch: 1.0
    ignore: [SiLU, BatchNorm2d, MaxPool2d, Upsample, Concat]
"""


@pytest.mark.parametrize(("layer", "survives"), [("model.17", True), ("model.2.cv1.conv", False)])
def test_blocks_teach_through_quantization_and_bare_convolutions_end_with_a_reason(layer, survives, caplog):
    student, teacher = detector(0), detector(1)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.0)
    sparsifier = Recipe(QUANTIZED_FROM_ONE.format(layer)).attach(student, optimizer, 2, teacher=teacher)
    added = []
    with caplog.at_level(logging.INFO, "sparse_exp"):
        for step in range(4):
            sparsifier.before_step(step / 2)
            raw = student(IMAGES)
            loss = sparsifier.loss(raw[0].sum(), IMAGES, raw, step / 2)
            added.append(float(loss.detach() - raw[0].detach().sum()))
            loss.backward()
            sparsifier.step(step / 2)
    sparsifier.finish()
    assert min(added[:2]) > 0.1
    assert min(added[2:]) > 0.1 if survives else added[2:] == [0.0, 0.0]
    assert (f"{layer} is quantized now" in caplog.text) is not survives
    assert not any(module._forward_hooks for module in teacher.modules())
    assert not student.model[17]._forward_hooks
