import copy
import dataclasses
import sys
from collections import OrderedDict

import numpy as np
import pytest
import torch
from foreign import save_fork, save_ultralytics, ultralytics_modules
from safetensors.torch import save_file

from sparse_exp.errors import CheckpointError
from sparse_exp.quantization.quantizers import is_quantized
from sparse_exp.recipes.checkpoints import restore
from sparse_exp.yolov5 import checkpoint as module
from sparse_exp.yolov5.checkpoint import read_checkpoint, save_checkpoint, transfer_weights
from sparse_exp.yolov5.model import YOLOv5

NAMES = ["tree", "bush"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = YOLOv5("n", 2)
    with torch.no_grad():  # so that a swap of two tensors of one shape shows
        for tensor in model.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape) if tensor.is_floating_point() else torch.tensor(17))
    return model


@pytest.fixture
def upstream():
    """Makes our detector over into Ultralytics' classes, which are importable as long as the test runs."""
    with ultralytics_modules() as imitate:
        yield lambda ours: imitate(ours, "Model")


def save_upstream(path, theirs, monkeypatch, **more):
    theirs.names, theirs.yaml = NAMES, {"nc": 2, "depth_multiple": 0.33}
    fitness = np.float64(0.5)
    content = {"epoch": 299, "best_fitness": np.array([fitness]), "model": theirs, "optimizer": None, **more}
    torch.save(content, path)
    for name in ("models", "models.yolo", "models.common"):
        monkeypatch.delitem(sys.modules, name)  # reading must not need, let alone import, them
    return path


def test_a_pickled_model_is_read_without_its_classes(model, upstream, monkeypatch, tmp_path):
    path = save_upstream(tmp_path / "best.pt", upstream(model), monkeypatch)
    checkpoint = read_checkpoint(path)
    assert "models" not in sys.modules
    assert (checkpoint.format, checkpoint.size, checkpoint.num_classes) == ("ultralytics", "n", 2)
    assert (checkpoint.names, checkpoint.epoch, checkpoint.phase) == (("tree", "bush"), 299, None)
    assert checkpoint.state_dict.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(checkpoint.state_dict[name], tensor), name


def test_half_precision_becomes_float32(model, upstream, monkeypatch, tmp_path):
    path = save_upstream(tmp_path / "best.pt", upstream(copy.deepcopy(model).half()), monkeypatch)
    state = read_checkpoint(path).state_dict
    assert {t.dtype for t in state.values()} == {torch.float32, torch.int64}
    weight = model.state_dict()["model.3.conv.weight"]
    assert torch.equal(state["model.3.conv.weight"], weight.half().float())


def test_the_averaged_weights_are_preferred(model, upstream, monkeypatch, tmp_path):
    plain = YOLOv5("n", 2)
    path = save_upstream(tmp_path / "last.pt", upstream(plain), monkeypatch, ema=upstream(model))
    got = read_checkpoint(path).state_dict["model.0.conv.weight"]
    assert torch.equal(got, model.state_dict()["model.0.conv.weight"])


@pytest.mark.parametrize("wrap", ["bare", "model", "parallel"])
def test_state_dicts_are_read(model, wrap, tmp_path):
    state = model.state_dict()
    if wrap == "parallel":
        state = OrderedDict((f"module.{k}", v) for k, v in state.items())
    more = {"recipe": "modifiers: []", "names": {0: "a", 1: "b"}, "epoch": 3, "ema": None}
    torch.save(state if wrap == "bare" else {"model": state, **more}, tmp_path / "x.pt")
    checkpoint = read_checkpoint(tmp_path / "x.pt")
    assert checkpoint.state_dict.keys() == model.state_dict().keys()
    known = wrap != "bare"
    assert checkpoint.names == (("a", "b") if known else ("class0", "class1"))
    assert checkpoint.recipe == ("modifiers: []" if known else "")


@pytest.mark.parametrize("names", [{1: "a", 2: "b"}, {"0": "a", "1": "b"}, {"10": "b", "9": "a"}, ("a", "b")])
def test_class_names_by_any_ids_are_read_in_their_order(model, names, tmp_path):
    torch.save({"model": model.state_dict(), "names": names}, tmp_path / "x.pt")
    assert read_checkpoint(tmp_path / "x.pt").names == ("a", "b")


@pytest.mark.parametrize("name", ["model.4.cv1.se.fc1.weight", "model.25.cv.weight", "model.3.conv.bias"])
def test_a_detector_with_further_layers_is_no_start(model, name, tmp_path):
    torch.save({**model.state_dict(), name: torch.ones(3)}, tmp_path / "x.pt")
    checkpoint = read_checkpoint(tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=f"layers that the model has not, such as '{name}'"):
        transfer_weights(model, checkpoint)


@pytest.mark.parametrize("size", "nsmlx")
def test_sizes_are_told_by_their_shapes(size, tmp_path):
    with torch.device("meta"):
        names = YOLOv5(size, 3).state_dict()
    shown = ("model.0.conv.weight", "model.24.anchors", "model.24.m.0.weight")
    # the other tensors of the big sizes need not be large: only their names count
    state = {k: torch.zeros(v.shape if k in shown else (1,)) for k, v in names.items()}
    torch.save(state, tmp_path / "x.pt")
    checkpoint = read_checkpoint(tmp_path / "x.pt")
    assert (checkpoint.size, checkpoint.num_classes) == (size, 3)


@pytest.mark.parametrize("names", [["tree", "bush"], {0: "tree", 1: "bush"}])
def test_the_last_checkpoint_of_a_users_training(model, names, tmp_path):
    """With the optimizer's state, half precision, and anchors that were fitted to the user's data."""
    ours = copy.deepcopy(model)
    ours.anchors.copy_(torch.rand(3, 3, 2))
    checkpoint = read_checkpoint(save_ultralytics(tmp_path / "last.pt", ours, names))
    assert (checkpoint.format, checkpoint.size, checkpoint.num_classes) == ("ultralytics", "n", 2)
    assert (checkpoint.names, checkpoint.epoch, checkpoint.recipe) == (("tree", "bush"), 7, "")
    assert checkpoint.state_dict.keys() == ours.state_dict().keys()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(checkpoint.state_dict[name], tensor.half().to(tensor.dtype)), name
    fresh = YOLOv5("n", 5)
    transfer_weights(fresh, checkpoint)
    assert torch.equal(fresh.anchors, ours.anchors.half().float())


def test_a_checkpoint_of_neural_magics_fork(model, tmp_path):
    path = save_fork(tmp_path / "model.pt", model, "n", NAMES, recipe="modifiers: []")
    checkpoint = read_checkpoint(path)
    assert (checkpoint.format, checkpoint.size, checkpoint.num_classes) == ("sparseml", "n", 2)
    assert (checkpoint.names, checkpoint.epoch, checkpoint.recipe) == (("tree", "bush"), -1, "modifiers: []")
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in checkpoint.state_dict.items())
    assert transfer_weights(YOLOv5("n", 2), checkpoint).left == ()


def test_the_fork_during_a_training_keeps_the_average_and_no_recipe(model, tmp_path):
    plain = YOLOv5("n", 2)
    more = {"epoch": 3, "ema": model.state_dict(), "updates": 100, "yaml": "yolov5n.yaml"}
    path = save_fork(tmp_path / "last.pt", plain, "n", NAMES, recipe=None, **more)
    checkpoint = read_checkpoint(path)
    assert (checkpoint.recipe, checkpoint.epoch, checkpoint.names) == ("", 3, ("class0", "class1"))
    assert torch.equal(
        checkpoint.state_dict["model.0.conv.weight"], model.state_dict()["model.0.conv.weight"]
    )


def test_a_quantized_checkpoint_of_the_fork_is_known_as_such(tiny_run, tmp_path):
    quantized, _ = restore(tiny_run.best["pruned_quant"])
    path = save_fork(tmp_path / "model.pt", quantized, "n", list("0123456789"), recipe="modifiers: []")
    checkpoint = read_checkpoint(path)
    assert (checkpoint.size, checkpoint.num_classes, checkpoint.format) == ("n", 10, "sparseml")
    assert is_quantized(list(checkpoint.state_dict))


@pytest.mark.parametrize("prefix", ["", "model.", "module."])
@pytest.mark.parametrize("header", [{}, {"names": '{"0": "tree", "1": "bush"}', "recipe": "modifiers: []"}])
def test_safetensors(model, prefix, header, tmp_path):
    state = {prefix + name: tensor.half() for name, tensor in model.state_dict().items()}
    save_file(state, tmp_path / "x.safetensors", header)
    checkpoint = read_checkpoint(tmp_path / "x.safetensors")
    assert (checkpoint.format, checkpoint.size, checkpoint.num_classes) == ("safetensors", "n", 2)
    assert checkpoint.names == (("tree", "bush") if header else ("class0", "class1"))
    assert checkpoint.recipe == header.get("recipe", "")
    assert checkpoint.state_dict.keys() == model.state_dict().keys()
    weight = checkpoint.state_dict["model.3.conv.weight"]
    assert torch.equal(weight, model.state_dict()["model.3.conv.weight"].half().float())


@pytest.mark.parametrize("text", ['{"\u00b2": "a"}', '{"' + "9" * 5000 + '": "a"}', "[" * 10**5])
def test_a_header_of_safetensors_without_names_that_can_be_read(model, text, tmp_path):
    save_file(dict(model.state_dict()), tmp_path / "x.safetensors", {"names": text})
    assert read_checkpoint(tmp_path / "x.safetensors").names == ("class0", "class1")


@pytest.mark.parametrize("content", [b"", b"not a header at all", b"\xff" * 64, "cut"])
def test_damaged_safetensors_are_refused(model, content, tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(dict(model.state_dict()), path)
    path.write_bytes(path.read_bytes()[:100_000] if content == "cut" else content)
    with pytest.raises(CheckpointError, match="to be a whole safetensors file, but ") as raised:
        read_checkpoint(path)
    assert "\n" not in str(raised.value)


def without(state, *prefixes):
    return {k: v for k, v in state.items() if not k.startswith(prefixes)}


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (
            lambda s: {**without(s, "model.0."), "model.0.conv.conv.weight": torch.zeros(16, 12, 3, 3)},
            "Focus",
        ),
        (lambda s: without(s, "model.24."), "342 tensors such as 'model.0.conv.weight'"),
        (lambda s: {"fc.weight": torch.zeros(3, 3)}, "1 tensors such as 'fc.weight'"),
        (lambda s: without(s, "model.6.m.2."), "2 blocks in layer 6"),
        (lambda s: {**s, "model.0.conv.weight": torch.zeros(17, 3, 6, 6)}, "a stem of 17 channels"),
        (lambda s: {**s, "model.24.m.0.weight": torch.zeros(20, 64, 1, 1)}, "20 outputs"),
        (lambda s: {**s, "model.24.proto.cv1.conv.weight": torch.zeros(1)}, "a segmentation model"),
        (lambda s: {**s, "model.24.cv4.conv.weight": torch.zeros(1)}, "a head with 'model.24.cv4"),
        (lambda s: {**without(s, "model.24."), "model.24.dfl.conv.weight": torch.zeros(1)}, "an anchor-free"),
        (lambda s: {"model.22.dfl.conv.weight": torch.zeros(1)}, "an anchor-free head"),
        (lambda s: {**without(s, "model.24."), "model.33.anchors": torch.zeros(4, 3, 2)}, "a P6 model"),
        (lambda s: {**without(s, "model.9."), "model.9.linear.weight": torch.zeros(1)}, "a classification"),
        (lambda s: {"backbone.body.conv1.weight": torch.zeros(1)}, "a detector of torchvision"),
        (lambda s: {"epoch": 3}, "no tensor"),
        (lambda s: [1, 2], "no tensor"),
    ],
)
def test_other_architectures_are_refused(model, change, found, tmp_path):
    torch.save(change(model.state_dict()), tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=found) as raised:
        read_checkpoint(tmp_path / "x.pt")
    assert "\n" not in str(raised.value)
    assert "v6.0" in str(raised.value)


ACTIVATIONS = {
    "ReLU": torch.nn.ReLU, "LeakyReLU": lambda: torch.nn.LeakyReLU(0.1), "Hardswish": torch.nn.Hardswish,
    "Mish": torch.nn.Mish,
}  # fmt: skip


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("everywhere", [True, False])
def test_other_activations_are_refused(name, everywhere, upstream, monkeypatch, tmp_path):
    """Their tensors are those of SiLU's: only the pickled modules tell."""
    ours = YOLOv5("n", 2)
    convs = [module for module in ours.modules() if hasattr(module, "act")]
    for conv in convs if everywhere else convs[-1:]:
        conv.act = ACTIVATIONS[name]()
    path = save_upstream(tmp_path / "best.pt", upstream(ours), monkeypatch)
    with pytest.raises(CheckpointError, match=f"found the activation {name} in place of SiLU"):
        read_checkpoint(path)


def test_an_activation_that_only_the_description_names_is_refused(model, upstream, monkeypatch, tmp_path):
    path = save_fork(
        tmp_path / "a.pt", model, "n", NAMES, recipe=None, yaml={"activation": "nn.LeakyReLU(0.1)"}
    )
    with pytest.raises(CheckpointError, match=r"the activation nn\.LeakyReLU"):
        read_checkpoint(path)
    path = save_fork(tmp_path / "b.pt", model, "n", NAMES, recipe=None, yaml={"activation": "nn.SiLU()"})
    assert read_checkpoint(path).num_classes == 2


@pytest.mark.parametrize("kind", ["Segment", "OBB", "Pose", "IKeypoint"])
def test_other_heads_are_refused_by_their_kind(model, kind, upstream, monkeypatch, tmp_path):
    theirs = upstream(model)
    head = type(kind, (torch.nn.Module,), {"__module__": "models.yolo"})
    monkeypatch.setattr(sys.modules["models.yolo"], kind, head, raising=False)
    theirs._modules["model"][24].__class__ = head
    with pytest.raises(CheckpointError, match=f"found a head of the kind {kind}"):
        read_checkpoint(save_upstream(tmp_path / "best.pt", theirs, monkeypatch))


@pytest.mark.parametrize(
    ("scores", "says"), [(182, "180 angles of oriented boxes"), (12, "12 scores"), (1, "1 scores")]
)
@pytest.mark.parametrize("names", [NAMES, {0: "tree", 1: "bush"}])
def test_a_head_whose_scores_are_not_the_named_classes_is_refused(scores, says, names, tmp_path):
    with pytest.raises(CheckpointError, match=f"{says}.* names of 2 classes"):
        read_checkpoint(save_ultralytics(tmp_path / "last.pt", YOLOv5("n", scores), names))


def test_names_of_ours_that_do_not_fit_are_refused(model, tmp_path):
    with pytest.raises(CheckpointError, match="its names is malformed"):
        read_checkpoint(ours(tmp_path / "x.pt", model, names=["tree"]))


def ours(path, model, **changes):
    values = {
        "model_state": model.state_dict(), "size": "n", "num_classes": 2, "names": NAMES, "imgsz": 320,
        "recipe": "modifiers: []", "phase": "pruned", "epoch": 12.0,
        "metrics": {"val/map50": np.float32(0.5)}, "quantization": {"model.0.conv": {"inputs": None}},
    }  # fmt: skip
    save_checkpoint(path, **{**values, **changes})
    return path


def test_our_own_round_trip(model, tmp_path):
    path = ours(tmp_path / "best_pruned.pt", model)
    checkpoint = read_checkpoint(path)
    values = dataclasses.asdict(checkpoint)
    state = values.pop("state_dict")
    assert values == {
        "format": "sparse_exp", "size": "n", "num_classes": 2, "names": ("tree", "bush"), "imgsz": 320,
        "recipe": "modifiers: []", "phase": "pruned", "epoch": 12.0, "metrics": {"val/map50": 0.5},
        "quantization": {"model.0.conv": {"inputs": None}}, "widths": {},
    }  # fmt: skip
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert torch.load(path, weights_only=True)["format"] == "sparse_exp/1"
    assert [p.name for p in tmp_path.iterdir()] == ["best_pruned.pt"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_tensors_of_observers_survive(model, tmp_path):
    odd = {
        "empty": torch.tensor([]), "scalar": torch.tensor(3), "byte": torch.tensor([1], dtype=torch.uint8),
        "int": torch.tensor([4], dtype=torch.int32), "bool": torch.tensor([True, False]),
        "view": torch.arange(12.0).view(3, 4).T[1:], "wide": torch.tensor(2.0).expand(5),
        "infinite": torch.tensor([float("inf")]),
    }  # fmt: skip
    whole = {**model.state_dict(), **odd}
    state = read_checkpoint(ours(tmp_path / "x.pt", model, model_state=whole)).state_dict
    for name, tensor in odd.items():
        assert torch.equal(state[name], tensor), name
        assert state[name].dtype == tensor.dtype


def test_a_failed_write_leaves_the_old_file_and_nothing_else(model, monkeypatch, tmp_path):
    path = ours(tmp_path / "last.pt", model)
    before = path.read_bytes()

    def fail(content, file):
        file.write(b"half a checkpoint")
        message = "disk full"
        raise OSError(message)

    monkeypatch.setattr(module.torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        ours(path, model, epoch=13)
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("key", "value"),
    [("size", "q"), ("num_classes", "2"), ("names", None), ("state_dict", []), ("epoch", None),
     ("metrics", 3), ("metrics", {"a": "b"}), ("recipe", None), ("imgsz", 1.5), ("imgsz", [384]),
     ("imgsz", [384, 0]), ("imgsz", "640"), ("format", "sparse_exp/9")],
)  # fmt: skip
def test_malformed_files_of_ours_are_refused(model, key, value, tmp_path):
    path = ours(tmp_path / "x.pt", model)
    torch.save({**torch.load(path, weights_only=True), key: value}, path)
    with pytest.raises(CheckpointError) as raised:
        read_checkpoint(path)
    assert "\n" not in str(raised.value)


def test_everything_is_taken_when_the_classes_agree(model, tmp_path):
    checkpoint = read_checkpoint(ours(tmp_path / "x.pt", model))
    fresh = YOLOv5("n", 2)
    report = transfer_weights(fresh, checkpoint)
    assert (report.taken, report.total, report.left) == (349, 349, ())
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in fresh.state_dict().items())


def test_the_class_scores_are_left_when_the_classes_differ(model, tmp_path):
    checkpoint = read_checkpoint(ours(tmp_path / "x.pt", model))
    fresh = YOLOv5("n", 5)
    own = {k: v.clone() for k, v in fresh.state_dict().items() if k.startswith("model.24.m.")}
    report = transfer_weights(fresh, checkpoint)
    assert (report.taken, report.total) == (343, 349)
    assert report.left == tuple(sorted(own))
    assert torch.equal(fresh.anchors, model.anchors)  # not the default ones
    for name, tensor in fresh.state_dict().items():
        other = model.state_dict()[name]
        if name not in own:
            assert torch.equal(tensor, other), name
            continue
        for anchor in range(3):  # 10 outputs an anchor here, 7 there
            assert torch.equal(tensor[10 * anchor : 10 * anchor + 5], other[7 * anchor : 7 * anchor + 5])
            classes = slice(10 * anchor + 5, 10 * anchor + 10)
            assert torch.equal(tensor[classes], own[name][classes])


def test_boxes_are_found_at_once_with_other_classes(tmp_path):
    """Boxes and objectness of the new detector are those of the old one."""
    model = YOLOv5("n", 2)
    checkpoint = read_checkpoint(ours(tmp_path / "x.pt", model))
    fresh = YOLOv5("n", 1).eval()
    transfer_weights(fresh, checkpoint)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        found, wanted = fresh(images)[0], model.eval()(images)[0]
    torch.testing.assert_close(found[..., :5], wanted[..., :5])


def test_a_checkpoint_without_a_head_leaves_it(model, tmp_path):
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("model.24.m.")}
    checkpoint = module.Checkpoint("ultralytics", "n", 2, ("a", "b"), state, "", None, -1, {}, None)
    fresh = YOLOv5("n", 5)
    head = fresh.state_dict()["model.24.m.0.weight"].clone()
    assert len(transfer_weights(fresh, checkpoint).left) == 6
    assert torch.equal(fresh.state_dict()["model.24.m.0.weight"], head)


def test_another_size_is_refused(model, tmp_path):
    checkpoint = read_checkpoint(ours(tmp_path / "x.pt", model))
    with pytest.raises(CheckpointError, match=r"yolov5s .*'yolov5n'.*model=yolov5n"):
        transfer_weights(YOLOv5("s", 2), checkpoint)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (None, "hold 'model.9.cv2.conv.weight'"),
        (torch.zeros(3), r"of shape \(256, 512, 1, 1\), but got \(3,\)"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named_and_nothing_is_changed(model, tensor, message):
    state = {**model.state_dict(), "model.9.cv2.conv.weight": tensor}
    state = {k: v for k, v in state.items() if v is not None}
    checkpoint = module.Checkpoint("ultralytics", "n", 2, ("a", "b"), state, "", None, -1, {}, None)
    fresh = YOLOv5("n", 2)
    before = fresh.state_dict()["model.0.conv.weight"].clone()
    with pytest.raises(CheckpointError, match=message):
        transfer_weights(fresh, checkpoint)
    assert torch.equal(fresh.state_dict()["model.0.conv.weight"], before)


def test_the_size_of_images_survives(model, tmp_path):
    path = ours(tmp_path / "x.pt", model, imgsz=(384, 640))
    assert read_checkpoint(path).imgsz == (384, 640)
    assert torch.load(path, weights_only=True)["imgsz"] == [384, 640]
    assert torch.load(ours(tmp_path / "y.pt", model), weights_only=True)["imgsz"] == 320
