import math
import random

import pytest
import torch

from sparse_exp.config.schema import LossConfig
from sparse_exp.yolov5.loss import DetectionLoss, ciou_loss, decode_cells, match

ANCHORS = torch.tensor([[1.0, 1.0], [2.0, 2.0], [10.0, 10.0]])
FAR = [[1000.0, 1000.0]] * 3  # anchors that no object of these tests fits
LN_1_E = math.log(1 + math.e)  # softplus(1)


def target(image, label, x, y, w, h):
    return [float(image), float(label), x, y, w, h]


def cells_of(targets, anchors=ANCHORS, size=(4, 4), anchor_t=4.0):
    return match(torch.tensor(targets), anchors, size, anchor_t)


def test_matching_by_hand():
    # 4x4 cells: centre (1.6, 2.2), size 1x1 cell. Anchors 0 (ratio 1) and 1 (ratio 2) fit, 2 (ratio 10) not.
    # x is 0.6 into its cell: the right neighbour answers too; y is 0.2 into its cell: the one above.
    m = cells_of([target(3, 7, 0.4, 0.55, 0.25, 0.25)])
    image_anchor_row_column = {tuple(c) for c in m.cells.tolist()}
    where = {(2, 1), (2, 2), (1, 1)}
    assert image_anchor_row_column == {(3, a, r, c) for a in (0, 1) for r, c in where}
    assert len(m.cells) == 6
    assert set(m.classes.tolist()) == {7}
    offset = {(r, c): b for (_, _, r, c), b in zip(m.cells.tolist(), m.boxes, strict=True)}
    torch.testing.assert_close(offset[2, 1], torch.tensor([0.6, 0.2, 1, 1]))
    torch.testing.assert_close(offset[2, 2], torch.tensor([-0.4, 0.2, 1, 1]))
    torch.testing.assert_close(offset[1, 1], torch.tensor([0.6, 1.2, 1, 1]))


def test_neighbours_outside_the_map_do_not_answer():
    corner = cells_of([target(0, 0, 0.1, 0.1, 0.25, 0.25)])  # centre (0.4, 0.4)
    assert {tuple(c) for c in corner.cells[:, 2:].tolist()} == {(0, 0)}
    edge = cells_of([target(0, 0, 1.0, 0.9, 0.25, 0.25)])  # centre (4.0, 3.6), on the right edge
    assert {tuple(c) for c in edge.cells[:, 2:].tolist()} == {(3, 3)}


@pytest.mark.parametrize(("side", "fits"), [(3.99, True), (4.0, False), (0.26, True), (0.25, False)])
def test_a_side_may_differ_by_less_than_anchor_t(side, fits):
    only = torch.tensor([[1.0, 1.0]])
    for w, h in ((side, 1.0), (1.0, side)):
        assert bool(len(cells_of([target(0, 0, 0.1, 0.1, w / 4, h / 4)], only).cells)) is fits


def test_matching_agrees_with_the_definition_cell_by_cell():
    rng = random.Random(0)
    targets = [
        target(rng.randrange(4), rng.randrange(3), *(rng.uniform(0.02, 0.98) for _ in range(2)),
               *(rng.uniform(0.05, 0.9) for _ in range(2)))
        for _ in range(50)
    ]  # fmt: skip
    ny, nx = 5, 7
    wanted = []
    for image, label, x, y, w, h in targets:
        cx, cy = x * nx, y * ny
        for a, (aw, ah) in enumerate(ANCHORS.tolist()):
            sides = (w * nx / aw, h * ny / ah)
            if max(max(r, 1 / r) for r in sides) >= 4:
                continue
            for row in range(ny):
                for column in range(nx):
                    in_row, in_column = row <= cy < row + 1, column <= cx < column + 1
                    wide, high = column - 0.5 < cx < column + 1.5, row - 0.5 < cy < row + 1.5
                    if (in_row and wide) or (in_column and high):
                        wanted.append((image, a, row, column, label))
    m = cells_of(targets, size=(ny, nx))
    got = [(*c, k) for c, k in zip(m.cells.tolist(), m.classes.tolist(), strict=True)]
    assert sorted(got) == sorted(wanted)


def test_complete_iou_by_hand():
    # 2x1 and 1x2 with one centre: intersection 1, union 3
    v = 4 / math.pi**2 * (math.atan(0.5) - math.atan(2)) ** 2
    ciou = 1 / 3 - v * v / (1 - 1 / 3 + v)
    got = ciou_loss(torch.tensor([[0.0, 0.0, 2.0, 1.0]]), torch.tensor([[0.0, 0.0, 1.0, 2.0]]))
    assert got.item() == pytest.approx(1 - ciou, abs=1e-5)
    # apart: 1x1 at 0 and at 3: no overlap, squared distance 9, hull 4x1 with squared diagonal 17
    apart = ciou_loss(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([[3.0, 0.0, 1.0, 1.0]]))
    assert apart.item() == pytest.approx(1 + 9 / 17, abs=1e-5)


def test_boxes_are_decoded_in_cells():
    raw = torch.tensor([[0.0, math.log(3), 0.0, -math.log(3)]])  # sigmoid 0.5, 0.75, 0.5, 0.25
    boxes = decode_cells(raw, torch.tensor([[3.0, 8.0]]))
    torch.testing.assert_close(boxes, torch.tensor([[0.5, 1.0, 3.0, 2.0]]))


def maps(num_classes, images=1, objectness=1.0, classes=(1.0, -1.0)):
    """Raw maps for 32 px, all cells equal: box logits 0."""
    values = torch.tensor([0.0, 0, 0, 0, objectness, *classes[:num_classes]])
    return [values.repeat(images, 3, s, s, 1).requires_grad_() for s in (4, 2, 1)]


def test_the_loss_by_hand():
    anchors = torch.tensor([[[1.0, 1.0], *FAR[:2]], FAR, FAR])
    loss = DetectionLoss(anchors, 2, LossConfig(), imgsz=32)
    targets = torch.tensor([target(0, 1, 0.1, 0.1, 0.25, 0.25)])  # centre (0.4, 0.4) cells, one cell answers
    total, parts = loss(maps(2), targets)
    # predicted: centre (0.5, 0.5), 1x1. Overlap 0.9^2 = 0.81, union 1.19; centres 0.1^2 + 0.1^2 apart,
    # squared; the hull is 1.1 x 1.1 with squared diagonal 2.42; equal shapes
    ciou = 0.81 / 1.19 - 0.02 / 2.42
    box = 0.05 * (1 - ciou)
    # binary cross-entropy of logit 1 and target t is softplus(1) - t; 48 cells in level 0, one with t = ciou
    levels = 4.0 * (LN_1_E - ciou / 48) + 1.0 * LN_1_E + 0.4 * LN_1_E
    obj = 1.0 * (32 / 640) ** 2 * levels
    # class 0 has logit 1 and target 0, class 1 logit -1 and target 1: softplus(1) each
    cls = 0.5 * 2 / 80 * LN_1_E
    got = [parts[k].item() for k in ("box", "obj", "cls")]
    assert got == pytest.approx([box, obj, cls], rel=1e-5)
    assert total.item() == pytest.approx(box + obj + cls, rel=1e-5)
    assert not any(p.requires_grad for p in parts.values())


def test_levels_are_weighted_by_their_size():
    anchors = torch.tensor([FAR, FAR, FAR])
    loss = DetectionLoss(anchors, 2, LossConfig(), imgsz=640)
    for level, weight in enumerate((4.0, 1.0, 0.4)):
        raw = [m.detach().clone() for m in maps(2, objectness=-100.0)]
        raw[level][..., 4] = 1.0
        _, parts = loss(raw, torch.zeros(0, 6))
        assert parts["obj"].item() == pytest.approx(weight * LN_1_E, rel=1e-5)


def test_the_loss_is_a_sum_over_the_batch():
    anchors = torch.tensor([[[1.0, 1.0], *FAR[:2]], FAR, FAR])
    loss = DetectionLoss(anchors, 2, LossConfig(), imgsz=32)
    one, _ = loss(maps(2), torch.tensor([target(0, 1, 0.1, 0.1, 0.25, 0.25)]))
    both = torch.tensor([target(i, 1, 0.1, 0.1, 0.25, 0.25) for i in (0, 1)])
    two, _ = loss(maps(2, images=2), both)
    assert two.item() == pytest.approx(2 * one.item(), rel=1e-5)


def test_gradients_reach_only_what_the_target_touches():
    anchors = torch.tensor([[[1.0, 1.0], *FAR[:2]], FAR, FAR])
    raw = maps(2)
    total, _ = DetectionLoss(anchors, 2, LossConfig(), 32)(
        raw, torch.tensor([target(0, 1, 0.1, 0.1, 0.3, 0.2)])
    )
    total.backward()
    box = raw[0].grad[..., :4].abs().sum(-1)
    assert box.nonzero().tolist() == [[0, 0, 0, 0]]
    assert raw[0].grad[0, 0, 0, 0, 5] > 0 > raw[0].grad[0, 0, 0, 0, 6]  # class 1 is wanted
    assert raw[0].grad[0, 0, 0, 0, 4] < raw[0].grad[0, 1, 0, 0, 4]  # more of an object where there is one


def test_of_two_objects_in_one_cell_the_better_fit_sets_the_objectness():
    anchors = torch.tensor([[[1.0, 1.0], *FAR[:2]], FAR, FAR])
    good, poor = target(0, 1, 0.1, 0.1, 0.25, 0.25), target(0, 1, 0.1, 0.1, 0.75, 0.75)
    loss = DetectionLoss(anchors, 2, LossConfig(), 32)
    alone = loss(maps(2), torch.tensor([good]))[1]["obj"]
    assert loss(maps(2), torch.tensor([good, poor]))[1]["obj"] == alone
    assert loss(maps(2), torch.tensor([poor, good]))[1]["obj"] == alone
    assert loss(maps(2), torch.tensor([poor]))[1]["obj"] > alone


def test_no_objects_and_one_class():
    anchors = torch.tensor([ANCHORS.tolist()] * 3)
    loss = DetectionLoss(anchors, 1, LossConfig(), 32)
    raw = maps(1)
    total, parts = loss(raw, torch.zeros(0, 6))
    total.backward()
    assert parts["box"] == parts["cls"] == 0
    assert all(torch.isfinite(r.grad).all() for r in raw)
    _, parts = loss(maps(1), torch.tensor([target(0, 0, 0.5, 0.5, 0.3, 0.3)]))
    assert parts["box"] > 0
    assert parts["cls"] == 0


def test_half_precision_maps_are_computed_in_float32():
    anchors = torch.tensor([ANCHORS.tolist()] * 3)
    loss = DetectionLoss(anchors, 2, LossConfig(), 32)
    targets = torch.tensor([target(0, 1, 0.5, 0.5, 0.3, 0.3)])
    torch.manual_seed(0)
    raw = [torch.randn_like(m).bfloat16() for m in maps(2)]
    reference, _ = loss([r.float() for r in raw], targets)
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = loss(raw, targets)
    assert total.dtype == torch.float32
    assert total.item() == reference.item()


def test_gradients_stay_finite_for_vanishing_boxes():
    anchors = torch.tensor([ANCHORS.tolist()] * 3)
    raw = [m.detach().clone() for m in maps(2)]
    for r in raw:
        r[..., 2:4] = -200.0  # sigmoid 0 in float32
        r.requires_grad_()
    total, _ = DetectionLoss(anchors, 2, LossConfig(), 32)(
        raw, torch.tensor([target(0, 1, 0.5, 0.5, 0.3, 0.3)])
    )
    total.backward()
    assert all(torch.isfinite(r.grad).all() for r in raw)


def test_objectness_is_scaled_by_the_pixels_of_a_rectangle():
    raw = [torch.zeros(1, 3, 8 // k, 16 // k, 6) for k in (1, 2, 4)]  # of 64 x 128 px
    anchors, none = torch.ones(3, 3, 2), torch.zeros(0, 6)
    losses = [DetectionLoss(anchors, 1, LossConfig(), size)(raw, none)[0] for size in ((64, 128), 64, 128)]
    assert float(losses[0]) == pytest.approx(2 * float(losses[1]))
    assert float(losses[0]) == pytest.approx(float(losses[2]) / 2)
