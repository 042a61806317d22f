from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from sparse_exp.config.plain import recipe_path
from sparse_exp.config.schema import SHARES, DatasetConfig, Experiment, ModelConfig, RecipeConfig
from sparse_exp.data.detection import DetectionDataset, Sample
from sparse_exp.errors import CheckpointError, ConfigError, RecipeError, SourceUnavailable
from sparse_exp.quantization.quantizers import is_rounding
from sparse_exp.recipes.checkpoints import CheckpointWriter, restore
from sparse_exp.recipes.recipe import Recipe
from sparse_exp.sources.cache import FetchedFile
from sparse_exp.sources.start import StartFile, teacher_file
from sparse_exp.sparsity.measure import layer_sparsity, overall, total_macs
from sparse_exp.training.oneshot import refuse_untrained_start
from sparse_exp.training.start import Start, load_start, load_teacher, prune_start, slim_start, suit_anchors
from sparse_exp.yolov5 import Checkpoint, TransferReport, YOLOv5

HEAD = ("model.24.m.0.bias", "model.24.m.0.weight", "model.24.m.1.bias", "model.24.m.1.weight")


def loaded(*left: str) -> Start:
    checkpoint = Checkpoint("sparse_exp", "n", 10, tuple("0123456789"), {}, "", "dense", 1.0, {}, 64)
    report = TransferReport(300, 300 + len(left), left)
    return Start("somewhere", 0.0, left=left, checkpoint=checkpoint, report=report)


def save(path, classes: int, size: str = "n") -> YOLOv5:
    torch.manual_seed(5)
    model = YOLOv5(size, classes)
    CheckpointWriter(path.parent, tuple("0123456789")[:classes], 64, "").save(
        path.name, model, "dense", {"epoch": 1.0}, {}
    )
    return model


@pytest.fixture(scope="module")
def student() -> YOLOv5:
    return YOLOv5("n", 10)


def test_the_start_itself_teaches_as_it_was_before_pruning(tmp_path):
    student = YOLOv5("n", 10)
    teacher = load_teacher(None, student, loaded())
    before = {name: value.clone() for name, value in student.state_dict().items()}
    prune_start(student, 0.5, RecipeConfig())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not torch.equal(student.state_dict()["model.1.conv.weight"], before["model.1.conv.weight"])


@pytest.mark.parametrize("start", [loaded(*HEAD), Start("scratch", 0.0)], ids=["new head", "scratch"])
def test_a_start_that_knows_nothing_of_the_classes_neither_teaches_nor_is_used_at_once(
    student, tmp_path, start
):
    with pytest.raises(ConfigError, match=r"recipe\.teacher=self would teach noise") as teaching:
        load_teacher(None, student, start)
    with pytest.raises(RecipeError, match=r"know the data set's classes already") as at_once:
        refuse_untrained_start(start, "0123456789")
    for error in (teaching, at_once):
        assert "\n" not in str(error.value)
        wanted = "model.24.m.0.bias, model.24.m.0.weight, model.24.m.1.bias and 1 more"
        assert (wanted in str(error.value)) is bool(start.left)
    refuse_untrained_start(loaded(), "0123456789")
    refuse_untrained_start(loaded(), "abcdefghij")  # as many, by other names
    with pytest.raises(RecipeError, match="the classes of the start to be 0, 1, 3, 4"):
        refuse_untrained_start(loaded(), "013456789a")


def test_classes_in_another_order_are_taken_by_their_names(tmp_path):
    own = save(tmp_path / "start.pt", 3).eval()
    start = StartFile(FetchedFile(tmp_path / "start.pt", "", "somewhere", downloaded=False), "somewhere")
    taken, _ = load_start(start, "n", ["2", "0", "1"], seed=0)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        before, after = (model.eval()(images)[0] for model in (own, taken))
    assert torch.equal(after, before[..., [0, 1, 2, 3, 4, 7, 5, 6]])
    for names in (["0", "1", "2"], ["a", "b", "c"], ["1", "2", "3"]):  # others are trained anew
        with torch.no_grad():
            assert torch.equal(load_start(start, "n", names, seed=0)[0].eval()(images)[0], before)
    with pytest.raises(CheckpointError, match=r"teacher .* to be in the data set's order"):
        load_teacher(tmp_path / "start.pt", own, loaded(), ["2", "0", "1"])
    load_teacher(tmp_path / "start.pt", own, loaded(), ["0", "1", "2"])


@pytest.mark.parametrize("teacher", [None, "self", "baseline"])
def test_what_is_no_place_names_no_file(tmp_path, teacher):
    assert teacher_file(teacher, tmp_path, tmp_path) is None


@pytest.mark.parametrize("by", ["path", "baseline"])
def test_a_checkpoint_teaches_whatever_its_size(student, tmp_path, by):
    saved = save(tmp_path / "best_dense.pt", classes=10, size="s")
    path = tmp_path / "best_dense.pt"
    given = (str(path), None) if by == "path" else ("baseline", path)
    file = teacher_file(given[0], tmp_path, tmp_path, baseline=given[1])
    teacher = load_teacher(file, student, Start("scratch", 0.0))
    assert teacher.size == "s"
    assert all(torch.equal(v, saved.state_dict()[name]) for name, v in teacher.state_dict().items())


def test_a_quantized_checkpoint_teaches_too(student, tiny_run, tmp_path):
    path = tiny_run.best["pruned_quant"]
    teacher = load_teacher(teacher_file(str(path), tmp_path, tmp_path), student, loaded())
    assert is_rounding(teacher)


def test_teachers_that_cannot_be_are_refused(student, tmp_path):
    save(tmp_path / "other.pt", classes=3)
    with pytest.raises(CheckpointError, match=r"classes of the teacher .*other\.pt to be 10 as in .* got 3"):
        load_teacher(tmp_path / "other.pt", student, loaded())
    with pytest.raises(SourceUnavailable, match="nowhere"):
        teacher_file(str(tmp_path / "nowhere.pt"), tmp_path, tmp_path)


@pytest.mark.parametrize("pattern", ["unstructured", "block4"])
def test_the_start_is_pruned_in_the_pattern_asked_for(pattern):
    torch.manual_seed(0)
    model = YOLOv5("n", 10)
    prune_start(model, 0.7, RecipeConfig(pattern=pattern))
    weights = [conv.weight.detach() for conv in model.prunable_convolutions().values()]
    zeros = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    assert zeros == pytest.approx(0.7, abs=1e-4)
    groups = torch.cat([(w == 0).permute(0, 2, 3, 1).reshape(-1, 4).sum(1) for w in weights])
    assert (set(groups.tolist()) == {0, 4}) is (pattern == "block4")
    untouched = [p.detach().clone() for p in model.parameters()]
    prune_start(model, None, RecipeConfig(pattern=pattern))
    assert all(map(torch.equal, untouched, model.parameters()))


@pytest.mark.parametrize("pattern", ["unstructured", "block4"])
def test_with_uniform_shares_every_layer_loses_the_same_part(pattern):
    torch.manual_seed(0)
    model = YOLOv5("n", 10)
    prune_start(model, 0.7, RecipeConfig(pattern=pattern, shares="uniform"))
    convolutions = model.prunable_convolutions().values()
    shares = [float((conv.weight == 0).float().mean()) for conv in convolutions]
    assert shares == pytest.approx([0.7] * len(shares), abs=4 / 256)  # whole blocks of the smallest layer


def boxes_of(width: float, height: float) -> DetectionDataset:
    """Twenty boxes of nearly these sides, in px of an image of 1280 x 720 px."""
    draw = np.random.default_rng(0)
    sides = draw.uniform(0.9, 1.1, (20, 2)) * [width / 1280, height / 720]
    rows = np.column_stack([np.zeros(20), np.full((20, 2), 0.5), sides]).astype(np.float32)
    sample = Sample(Path("a.png"), Path("a.txt"), rows.tobytes(), size=(1280, 720))
    return DetectionDataset("long", Path(), ("a",), {"train": (sample,), "val": (sample,)}, "")


def asking(anchors: str, **recipe) -> Experiment:
    result = Experiment(name="x")
    result.model = ModelConfig(name="n", size="n", anchors=anchors)
    result.dataset, result.recipe = DatasetConfig(name="long", imgsz=640), RecipeConfig(name="r", **recipe)
    return result


def test_anchors_are_fitted_where_those_of_the_start_miss_boxes(tmp_path):
    """Of 1000 x 16 px at 640 px 500 x 8 are left, which no published anchor answers for."""
    model, data = YOLOv5("n", 1), boxes_of(1000, 16)
    published = model.anchors.clone()
    told = suit_anchors(model, data, asking("start"))
    assert (told.before, told.recall, told.fitted) == (0.0, 0.0, False)
    assert torch.equal(model.anchors, published)
    assert not suit_anchors(model, data, asking("auto", oneshot=True)).fitted  # nothing is trained
    found = suit_anchors(model, data, asking("auto"))
    assert (found.before, found.recall, found.fitted) == (0.0, 1.0, True)
    strides = torch.tensor([8.0, 16.0, 32.0]).view(3, 1, 1)
    assert (model.anchors * strides).view(-1, 2).mean(0).tolist() == pytest.approx([500, 8], rel=0.2)
    # into the checkpoint, and out of it again
    writer = CheckpointWriter(tmp_path, ("a",), 64, "")
    again, _ = restore(writer.save("a.pt", model, "dense", {"epoch": 1.0}, {}))
    assert torch.equal(again.anchors, model.anchors)


def test_anchors_that_answer_for_all_boxes_stay():
    model = YOLOv5("n", 1)
    published = model.anchors.clone()
    assert suit_anchors(model, boxes_of(100, 60), asking("auto")).recall == 1.0
    assert torch.equal(model.anchors, published)


def test_a_teacher_of_other_anchors_is_refused(tmp_path):
    save(tmp_path / "teacher.pt", 1)
    student = YOLOv5("n", 1)
    assert load_teacher(tmp_path / "teacher.pt", student, loaded()).num_classes == 1
    suit_anchors(student, boxes_of(1000, 16), asking("auto"))
    with pytest.raises(ConfigError, match="other anchors than the model"):
        load_teacher(tmp_path / "teacher.pt", student, loaded())
    with pytest.raises(ConfigError, match=r"recipe\.teacher=self teaches with the anchors of the start"):
        suit_anchors(YOLOv5("n", 1), boxes_of(1000, 16), asking("auto", teacher="self"))


def work_left(model) -> float:
    """Share of the multiplications that meet no zero, counted by torch's flop counter: half of its flops."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, model.eval().export_mode(64), torch.no_grad():
        model(torch.zeros(1, 3, 64, 64))
    counts = {name: sum(c.values()) for name, c in counter.get_flop_counts().items()}
    convs = model.quantizable_convolutions()
    left = sum(counts[f"YOLOv5.{n}"] * float((c.weight != 0).double().mean()) for n, c in convs.items())
    return left / counter.get_total_flops()


@pytest.mark.parametrize("pattern", ["unstructured", "block4"])
@pytest.mark.parametrize("shares", [shares for shares in SHARES if shares != "speed"])
def test_a_share_of_the_work_is_left(shares, pattern):
    torch.manual_seed(0)
    model = YOLOv5("n", 10)
    prune_start(model, 0.75, RecipeConfig(pattern=pattern, shares=shares), macs=0.4)
    assert work_left(model) == pytest.approx(0.4, abs=1e-3)


def test_shares_by_work_save_more_of_it_than_adaptive_ones_at_the_same_sparsity():
    left = {}
    for shares in ("adaptive", "work"):
        torch.manual_seed(0)
        model = YOLOv5("n", 10)
        prune_start(model, 0.7, RecipeConfig(shares=shares))
        weights = [conv.weight for conv in model.prunable_convolutions().values()]
        assert sum(int((w == 0).sum()) for w in weights) == pytest.approx(
            0.7 * sum(w.numel() for w in weights), rel=1e-4
        )
        assert all(bool((w != 0).any()) for w in weights)
        left[shares] = work_left(model)
    assert left["work"] < left["adaptive"] - 0.1


@pytest.mark.parametrize("pattern", ["unstructured", "block4"])
def test_each_layer_gets_the_share_that_it_is_given(pattern):
    torch.manual_seed(0)
    model = YOLOv5("n", 10)
    names = list(model.prunable_convolutions())
    wanted = {name: (0.0, 0.5, 0.95)[number % 3] for number, name in enumerate(names)}
    prune_start(model, 0.75, RecipeConfig(pattern=pattern, shares="speed"), shares=wanted)
    found = {layer.name: layer.sparsity for layer in layer_sparsity(model.prunable_convolutions())}
    assert found == pytest.approx(wanted, abs=4 / 256)


def test_work_that_stem_and_head_take_cannot_be_saved():
    with pytest.raises(
        ConfigError, match=r"model\.macs to be at least 0\.\d\d for yolov5n, but got 0\.01"
    ) as error:
        prune_start(YOLOv5("n", 10), 0.75, RecipeConfig(), macs=0.01)
    assert "\n" not in str(error.value)
    least = float(re.search(r"at least (0\.\d\d)", str(error.value))[1])
    prune_start(YOLOv5("n", 10), 0.75, RecipeConfig(shares="uniform"), macs=least)


def test_channels_are_taken_out_of_the_start_for_recipes_that_take_none_out():
    recipe, slim = (Recipe.from_file(recipe_path(f"{name}.md")) for name in ("transfer", "slim"))
    model = YOLOv5("n", 10)
    before = total_macs(model.quantizable_convolutions(), 64)
    for chosen, channels in ((recipe, None), (slim, 0.5)):
        slim_start(model, chosen, RecipeConfig(channels=channels))
        assert model.widths == {}
    slim_start(model, recipe, RecipeConfig(channels=0.5))
    assert 0.45 < total_macs(model.quantizable_convolutions(), 64) / before <= 0.5
    prune_start(model, 0.75, RecipeConfig())
    assert overall(layer_sparsity(model.prunable_convolutions())) == pytest.approx(0.75, abs=1e-3)
    assert work_left(model) < 0.7
