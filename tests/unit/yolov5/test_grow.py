from __future__ import annotations

import copy
import itertools
import re
from pathlib import Path

import pytest
import torch
import yaml
from torchvision.ops import box_iou

from sparse_exp.config.schema import SourceConfig
from sparse_exp.data.images import read_square
from sparse_exp.errors import CheckpointError
from sparse_exp.sources.cache import cache_directory, fetch
from sparse_exp.sparsity.prune import prune_layer_adaptively
from sparse_exp.yolov5 import Checkpoint, YOLOv5, non_max_suppression, read_checkpoint, transfer_weights
from sparse_exp.yolov5.grow import grow
from sparse_exp.yolov5.model import C3

CONF = Path(__file__).parents[3] / "conf"

IMGSZ, CLASSES = 64, 3
BACKBONE = 9  # the last module of it
PAIRS = list(itertools.combinations("nsmlx", 2))
QUICK = [pair for pair in PAIRS if pair[1] in "sm"]


def checkpoint_of(model: YOLOv5) -> Checkpoint:
    names = tuple(f"class{i}" for i in range(model.num_classes))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return Checkpoint("ultralytics", model.size, model.num_classes, names, state, "", None, -1.0, {}, None)


def detector_of(checkpoint: Checkpoint) -> YOLOv5:
    model = YOLOv5(checkpoint.size, checkpoint.num_classes)
    transfer_weights(model, checkpoint)
    return model.eval()


def structured_images() -> torch.Tensor:
    """Stripes, a gradient, a disc on black, and noise: float64 (4, 3, 64, 64)."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, IMGSZ), torch.linspace(-1, 1, IMGSZ), indexing="ij")
    grey = torch.stack([(8 * x).sin() / 2 + 0.5, (y + 1) / 2, (x**2 + y**2 < 0.4).float()])
    colours = torch.tensor([1.0, 0.6, 0.2]).view(1, 3, 1, 1)
    noise = torch.rand(1, 3, IMGSZ, IMGSZ, generator=torch.Generator().manual_seed(5))
    return torch.cat([grey[:, None] * colours, noise]).double()


@pytest.fixture(scope="module")
def small() -> dict[str, Checkpoint]:
    """Detectors whose outputs depend on the image, as a trained one's do, with fitting statistics."""

    @torch.no_grad()
    def lively(size: str) -> Checkpoint:
        torch.manual_seed(1)
        model = YOLOv5(size, CLASSES).double().train()
        for norm in [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]:
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.uniform_(-0.5, 0.5)
            norm.momentum = None  # the mean over all batches
        for _ in range(4):
            model(torch.cat([structured_images(), torch.rand(4, 3, IMGSZ, IMGSZ).double()]))
        return checkpoint_of(model.float())

    return {size: lively(size) for size in "ns"}


@pytest.fixture(scope="module")
def medium(small) -> Checkpoint:
    """yolov5s grown to m, which is 1.5 times as wide and has new bottlenecks in every block."""
    return grow(small["s"], "m", noise=0.0)


def raw_maps(checkpoint: Checkpoint, *, train: bool = False) -> list[torch.Tensor]:
    with torch.no_grad():
        model = detector_of(checkpoint).double()
        return model.train()(structured_images()) if train else model(structured_images())[1]


def backbone_maps(checkpoint: Checkpoint, *, train: bool = False) -> torch.Tensor:
    with torch.no_grad():
        return detector_of(checkpoint).double().train(train).model[: BACKBONE + 1](structured_images())


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Root mean square of the difference, as a share of what varies in the wanted values."""
    return float((found - wanted).square().mean().sqrt() / wanted.std())


@pytest.mark.parametrize(("before", "after"), QUICK)
def test_every_tensor_of_the_larger_size_is_there(before, after):
    grown = grow(checkpoint_of(YOLOv5(before, CLASSES)), after)

    wanted = {name: tuple(tensor.shape) for name, tensor in YOLOv5(after, CLASSES).state_dict().items()}
    assert {name: tuple(tensor.shape) for name, tensor in grown.state_dict.items()} == wanted
    assert (grown.size, grown.num_classes, len(grown.names)) == (after, CLASSES, CLASSES)
    assert transfer_weights(YOLOv5(after, CLASSES), grown).left == ()


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [pair for pair in PAIRS if pair not in QUICK])
def test_every_tensor_of_the_largest_sizes_is_there(before, after):
    test_every_tensor_of_the_larger_size_is_there(before, after)


@pytest.mark.parametrize("train", [False, True])
def test_a_wider_detector_computes_the_same(small, train):
    grown = grow(small["n"], "s", noise=0.0)  # twice as wide, as deep

    for found, wanted in zip(raw_maps(grown, train=train), raw_maps(small["n"], train=train), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)  # shares and copies are float32


@pytest.mark.parametrize("train", [False, True])
def test_new_bottlenecks_with_a_shortcut_change_nothing(small, medium, train):
    wanted = backbone_maps(small["s"], train=train)
    found = backbone_maps(medium, train=train)

    # the old channels come first
    torch.testing.assert_close(found[:, : wanted.shape[1]], wanted, rtol=1e-5, atol=1e-5)


def test_new_bottlenecks_without_a_shortcut_change_nearly_nothing(small, medium):
    found, wanted = raw_maps(medium), raw_maps(small["s"])

    assert all(0 < distance(f, w) < 0.01 for f, w in zip(found, wanted, strict=True))


def test_in_training_mode_they_change_little_too(small, medium):
    found, wanted = raw_maps(medium, train=True), raw_maps(small["s"], train=True)

    # of the deepest maps a channel's batch statistics come from 16 values, and are no normal distribution's
    assert all(distance(f, w) < limit for f, w, limit in zip(found, wanted, (0.1, 0.2, 0.3), strict=True))


def test_the_noise_changes_little(small, medium):
    found, wanted = raw_maps(grow(small["s"], "m")), raw_maps(medium)

    assert all(0 < distance(f, w) < 0.02 for f, w in zip(found, wanted, strict=True))


def test_what_reads_copies_gets_the_whole_weight_of_the_first(small):
    old, new = (c.state_dict["model.1.conv.weight"] for c in (small["n"], grow(small["n"], "s", noise=0.0)))

    rows, channels = old.shape[:2]  # the new channels are the old ones twice, in some order the second time
    assert torch.equal(new[:rows, :channels], old)
    assert not new[:, channels:].any()
    assert sorted(new[rows:, :channels].sum((1, 2, 3)).tolist()) == pytest.approx(
        sorted((0.1 * old.sum((1, 2, 3))).tolist()), rel=1e-4, abs=1e-6
    )


def test_copies_give_what_the_first_gives(small):
    grown = detector_of(grow(small["n"], "s", noise=0.0)).double()
    with torch.no_grad():
        maps = grown.model[0](structured_images())

    first, copies = maps.chunk(2, dim=1)
    distances = (copies[:, :, None] - first[:, None]).abs().amax((0, 3, 4))
    assert float(distances.amin(1).max()) < 1e-5  # each copy is equal to some channel
    assert len(distances.argmin(1).unique()) == len(distances)  # and each channel has its copy


def test_copies_differ_in_what_they_read_and_in_who_reads_them(small):
    grown = grow(small["n"], "s").state_dict
    for name in ("model.1.conv.weight", "model.4.cv3.conv.weight", "model.23.m.0.cv2.conv.weight"):
        for matrix in (grown[name].flatten(1), grown[name].transpose(0, 1).flatten(1)):
            assert len(matrix.unique(dim=0)) == len(matrix)


@pytest.mark.slow
def test_nothing_is_held_at_zero_and_pruning_leaves_every_layer_some(small):
    model = detector_of(grow(small["s"], "m"))
    layers = model.prunable_convolutions()
    assert all(bool((conv.weight != 0).all()) for conv in layers.values())  # so the plan takes it for dense

    prune_layer_adaptively(layers, 0.9)

    assert min(int((conv.weight != 0).sum()) for conv in layers.values()) >= 30
    new = sum(int((conv.weight != 0).sum()) for name, conv in layers.items() if is_new(name))
    assert new < 0.2 * sum(int((conv.weight != 0).sum()) for conv in layers.values())


def is_new(layer: str) -> bool:
    """Whether a layer of yolov5m belongs to a bottleneck that yolov5s has not."""
    found = re.fullmatch(r"model\.(\d+)\.m\.(\d+)\..*", layer)
    return found is not None and int(found[2]) >= {4: 2, 6: 3}.get(int(found[1]), 1)


def test_new_bottlenecks_learn(small):
    model = detector_of(grow(small["n"], "m")).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before, images = copy.deepcopy(model), structured_images().float()
    for _ in range(2):  # in the first step the branch's scale learns, then what is behind it
        optimizer.zero_grad()
        sum(m.square().mean() for m in model(images)).backward()
        optimizer.step()

    blocks = zip(before.model, model.model, strict=True)
    added = [(old.m[-1], new.m[-1]) for old, new in blocks if isinstance(new, C3)]
    assert len(added) == 4 + 4  # of the backbone and of the neck
    for old, new in added:
        assert float((new.cv2.bn.weight - old.cv2.bn.weight).abs().mean()) > 5e-4
        assert float((new.cv1.conv.weight - old.cv1.conv.weight).abs().mean()) > 1e-4


def test_the_seed_decides(small):
    state = torch.get_rng_state()
    first, again, other = (grow(small["n"], "s", seed=seed).state_dict for seed in (3, 3, 4))

    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.1.conv.weight"], other["model.1.conv.weight"])


def test_the_smaller_one_stays_as_it_is(small):
    before = {name: tensor.clone() for name, tensor in small["n"].state_dict.items()}
    grow(small["n"], "s")

    assert all(torch.equal(small["n"].state_dict[name], before[name]) for name in before)


@pytest.mark.parametrize(("before", "after"), [("s", "s"), ("s", "n"), ("s", "xl")])
def test_only_larger_sizes_are_grown_to(small, before, after):
    with pytest.raises(CheckpointError, match=r"larger than s \(m, l, x\), but got '?\w+'?\. Name smaller"):
        grow(small[before], after)


def test_a_checkpoint_without_its_tensors_is_refused(small):
    state = {k: v for k, v in small["n"].state_dict.items() if k != "model.4.cv1.conv.weight"}
    damaged = Checkpoint("ultralytics", "n", CLASSES, small["n"].names, state, "", None, -1.0, {}, None)

    with pytest.raises(CheckpointError, match=r"model\.4\.cv1\.conv\.weight"):
        grow(damaged, "s")


@pytest.fixture(scope="module")
def official() -> Checkpoint:
    """Ultralytics' yolov5s, trained on COCO."""
    source = yaml.safe_load((CONF / "model" / "yolov5s.yaml").read_text(encoding="utf-8"))["sources"][0]
    return read_checkpoint(fetch(SourceConfig(**source), cache_directory()).path)


def detections(checkpoint: Checkpoint, photo: Path) -> torch.Tensor:
    """(D, 6): x1, y1, x2, y2 in pixels, confidence and class of what is found at 320 px."""
    square, _ = read_square(photo, 320)
    images = torch.from_numpy(square).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        predictions = detector_of(checkpoint)(images)[0]
    return torch.from_numpy(non_max_suppression(predictions.numpy(), 0.25, 0.45, 300)[0])


@pytest.mark.slow
@pytest.mark.parametrize("photo", ["astronaut", "chelsea", "coffee"])
@pytest.mark.parametrize("size", ["m", "l"])
def test_grown_from_coco_it_detects_what_the_small_one_does(official, photos, photo, size):
    wanted, found = (detections(c, photos[photo]) for c in (official, grow(official, size)))

    sure = wanted[wanted[:, 4] > 0.5]
    assert len(sure) >= 1
    for box in sure:
        same = found[found[:, 5] == box[5]]
        overlap = box_iou(box[None, :4], same[:, :4])[0]
        assert float(overlap.max()) >= 0.9
        assert abs(float(same[overlap.argmax(), 4] - box[4])) <= 0.05
    assert int((found[:, 4] > 0.55).sum()) <= len(sure)
