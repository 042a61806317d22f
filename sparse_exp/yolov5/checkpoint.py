"""Checkpoints of YOLOv5: read published ones and our own, start a model from one, write our own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparse_exp.config.imgsz import Imgsz, imgsz_of, plain, sides
from sparse_exp.errors import CheckpointError, expected
from sparse_exp.files import landing, parse_json
from sparse_exp.text import whole_text
from sparse_exp.yolov5.model import SCALES, YOLOv5
from sparse_exp.yolov5.restricted import Inert, RestrictedFile, TensorRecord, damaged, open_restricted

FORMAT = "sparse_exp/1"
SLIM_FORMAT = "sparse_exp/2"  # of slimmed detectors: what only knows the stock sizes refuses it by its name
_HEAD = "model.24."
_LEVELS = 3
_TRAINED = (".weight", ".bias")  # ends of the names of what a training learns
_SILU = {"SiLU", "Swish", "MemoryEfficientSwish"}  # one function; utils/activations.py has had all of them
_MAX_MODULES = 10_000
_NUMBERS = ("weight", "bias", "running_mean", "running_var")  # ranges of quantizers may be infinite
_LARGEST_IMGSZ = 2**15  # px
_MOST_CHANNELS = 2**12  # of a group; the largest detector has 1280
_MOST_ROWS = 2**15  # of a head that the checkpoint does not hold
# Other models (of Ultralytics and torchvision), each with a pattern for names that only its tensors have.
_FOREIGN = {
    "the Focus layer of YOLOv5 before v6.0": r"^model\.0\.conv\.conv\.",
    "a segmentation model": r"^model\.\d+\.proto\.",
    "an anchor-free head, as of YOLOv5u, YOLOv8 and later": r"^model\.\d+\.(dfl|one2one_cv2)\.",
    "a P6 model, which has four output levels": r"^model\.33\.(anchors|m\.3\.)",
    "a classification model": r"^model\.\d+\.linear\.weight$",
    "a detector of torchvision": r"^(backbone\.(body|fpn|features|0)|roi_heads|rpn)\.",
}


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint file.

    Attributes:
        format: "ultralytics" (official, or from a user's training: a pickled model or a state dict),
            "sparseml" (from Neural Magic's fork: a state dict and its recipe), "safetensors" or "sparse_exp".
        size: of the architecture: n, s, m, l or x.
        num_classes: number of classes of the head.
        names: class names, ``num_classes`` of them.
        state_dict: tensors by their published names; floating point as float32. After quantization-aware
            training there are tensors of quantizers, too, of which `quantization` tells. Where that is empty
            all the same, the names are SparseML's: see `sparse_exp.quantization.from_sparseml`.
        recipe: the SparseML recipe that the weights were trained with, or "".
        phase: "dense", "pruned" or "pruned_quant"; None for published checkpoints, which do not tell.
        epoch: epochs trained; -1 or less where unknown.
        metrics: values by name, for example ``val/map50``.
        imgsz: size of the images trained on; None where unknown.
        quantization: how each layer is quantized, as plain data (see `sparse_exp.quantization.scheme`); empty
            for floating point.
        widths: number of channels in each group of a slimmed detector, see `sparse_exp.yolov5.channels`;
            empty for the stock sizes.
    """

    format: str
    size: str
    num_classes: int
    names: tuple[str, ...]
    state_dict: dict[str, Tensor]
    recipe: str
    phase: str | None
    epoch: float
    metrics: dict[str, float]
    imgsz: Imgsz | None
    quantization: dict[str, Any] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class TransferReport:
    """Which tensors a model took from a checkpoint.

    Attributes:
        taken: number of tensors taken whole.
        total: number of the model's tensors, buffers included.
        left: names of the model's tensors that kept values of their own. Where the numbers of classes differ,
            these are the head's convolutions, which take only the rows for boxes and objectness.
    """

    taken: int
    total: int
    left: tuple[str, ...]


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint without running anything that it asks for.

    Args:
        path: a checkpoint of Ultralytics YOLOv5 v6.0 to v7.0 or of Neural Magic's fork (a pickled model,
            or a state dict, bare or under "model" or "ema"), a ``.safetensors`` file with the same names, or
            a file that `save_checkpoint` wrote.

    Raises:
        CheckpointError: the file is missing or damaged, asks to run code, or holds another architecture or
            weights that are not finite.
    """
    checkpoint = _read(path)
    for name, tensor in checkpoint.state_dict.items():
        if name.endswith(_NUMBERS) and not tensor.isfinite().all():
            do = "Choose a checkpoint of an earlier epoch: the training that wrote this one had failed."
            raise CheckpointError(f"Expected the weights in {path} to be finite, but {name} is not. {do}")
    return checkpoint


def _read(path: Path) -> Checkpoint:
    if path.suffix == ".safetensors" and path.is_file():
        return _read_safetensors(path)
    with open_restricted(path) as file:
        if isinstance(file.tree, dict) and isinstance(file.tree.get("format"), str):
            return _read_ours(path, file)
        return _read_ultralytics(path, file)


def _read_ours(path: Path, file: RestrictedFile) -> Checkpoint:
    tree = file.tree
    if tree["format"] not in (FORMAT, SLIM_FORMAT):
        should_be, do = (
            f"{FORMAT!r} or {SLIM_FORMAT!r}",
            "Read it with the release of sparse_exp that wrote it.",
        )
        raise CheckpointError(expected(f"the format of {path}", should_be, tree["format"], do))
    kinds = {"num_classes": int, "names": list, "state_dict": dict, "recipe": str, "phase": str}
    wrong = [k for k, t in kinds.items() if not isinstance(tree.get(k), t)]
    wrong += [k for k in ("epoch",) if not isinstance(tree.get(k), int | float)]
    wrong += [k for k in ("metrics", "quantization", "widths") if not isinstance(tree.get(k, {}), dict)]
    wrong += [k for k in ("size",) if tree.get(k) not in SCALES]
    wrong += [k for k in ("names",) if not wrong and len(tree[k]) != tree["num_classes"]]
    imgsz = _imgsz(tree.get("imgsz"))
    wrong += [] if imgsz else ["imgsz"]
    widths = _mapping(tree.get("widths", {})) if not wrong else {}
    counts = all(type(width) is int and 0 < width <= _MOST_CHANNELS for width in widths.values())
    wrong += [] if counts else ["widths"]
    if wrong:
        raise CheckpointError(damaged(path, f"its {wrong[0]} is malformed"))
    state = _tensors(path, file, tree["state_dict"])
    head = _find(state, f"{_HEAD}m.0")
    rows = _LEVELS * (5 + tree["num_classes"])  # of the head of the model that is made next
    if rows > _MOST_ROWS if head is None else head.shape[:1] != (rows,):
        problem = f"its head is not one of the {tree['num_classes']} classes that it names"
        raise CheckpointError(damaged(path, problem))
    return Checkpoint(
        format="sparse_exp",
        size=tree["size"],
        num_classes=tree["num_classes"],
        names=tuple(str(n) for n in tree["names"]),
        state_dict=state,
        recipe=tree["recipe"],
        phase=tree["phase"],
        epoch=float(tree["epoch"]),
        metrics={str(k): float(v) for k, v in tree["metrics"].items()},
        imgsz=imgsz,
        quantization=tree.get("quantization", {}),
        widths=widths,
    )


def _imgsz(value: object) -> Imgsz | None:
    """A size that images may have; None for all else."""
    try:
        found = imgsz_of(value)
    except ValueError:
        return None
    return found if max(sides(found)) <= _LARGEST_IMGSZ else None


def _read_ultralytics(path: Path, file: RestrictedFile) -> Checkpoint:
    tree = file.tree if isinstance(file.tree, dict) else {}
    model = next((tree[key] for key in ("ema", "model") if tree.get(key) is not None), tree)
    records = _tensors_of_module(path, model) if isinstance(model, Inert) else model
    of_model = model.state if isinstance(model, Inert) else {}
    _require_silu(path, model, (of_model.get("yaml"), tree.get("yaml")))
    names = (found.get("names") for found in (of_model, tree, _mapping(tree.get("yaml"))))
    epoch, fitness = tree.get("epoch"), tree.get("best_fitness")
    # the fork writes the text "None" where there is no recipe
    recipes = [tree[key] for key in ("checkpoint_recipe", "recipe") if tree.get(key) not in (None, "None")]
    return _published(
        path,
        _tensors(path, file, records),
        format="sparseml" if "checkpoint_recipe" in tree else "ultralytics",
        names=next(filter(None, names), None),
        recipe=recipes[0] if recipes and isinstance(recipes[0], str) else "",
        epoch=float(epoch) if isinstance(epoch, int | float) else -1.0,
        metrics={"best_fitness": float(fitness)} if isinstance(fitness, int | float) else {},
    )


def _read_safetensors(path: Path) -> Checkpoint:
    """Read tensors by their published names; class names and recipe may be texts in the file's header."""
    try:
        with safe_open(path, framework="pt") as file:
            state, header = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(damaged(path, f"{error}", "safetensors file")) from error
    state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    return _published(
        path,
        state,
        format="safetensors",
        names=_names_in_header(header.get("names")),
        recipe=header.get("recipe") or header.get("checkpoint_recipe") or "",
        epoch=-1.0,
        metrics={},
    )


def _names_in_header(text: str | None) -> Any:
    """Class names from JSON, whose keys are texts where names are mapped from ids; None without names."""
    try:
        names = parse_json(text or "null")
        return {int(k): v for k, v in names.items() if k.isdecimal()} if isinstance(names, dict) else names
    except ValueError:
        return None


def _published(
    path: Path, state: dict[str, Tensor], *, names: Any, format: str, recipe: str, epoch: float,
    metrics: dict[str, float],
) -> Checkpoint:  # fmt: skip
    """A checkpoint that does not name its architecture: the shapes of its tensors tell it."""
    first = "model.0.conv.weight"
    wrapped = next((name.removesuffix(first) for name in state if name.endswith(f".{first}")), "module.")
    state = {name.removeprefix(wrapped): tensor for name, tensor in state.items()}
    size, num_classes = _architecture(path, state)
    if (named := _count(names)) and named != num_classes:
        angles = (
            f", which are {named} classes and 180 angles of oriented boxes"
            if num_classes == named + 180
            else ""
        )
        raise _wrong_architecture(
            path, f"a head with {num_classes} scores for each box{angles}, and names of {named} classes"
        )
    return Checkpoint(
        format=format,
        size=size,
        num_classes=num_classes,
        names=_class_names(names, num_classes),
        state_dict=state,
        recipe=recipe,
        phase=None,
        epoch=epoch,
        metrics=metrics,
        imgsz=None,
    )


def _tensors_of_module(path: Path, model: Inert) -> dict[str, TensorRecord]:
    """The tensors of a pickled module under the dotted names that ``Module.state_dict`` gives them."""
    found: dict[str, TensorRecord] = {}
    for name, module in _modules_of(path, model).items():
        prefix = f"{name}." if name else ""
        for kind in ("_parameters", "_buffers"):
            own = _mapping(module.state.get(kind))
            found |= {prefix + key: value for key, value in own.items() if isinstance(value, TensorRecord)}
    return found


def _modules_of(path: Path, model: Inert) -> dict[str, Inert]:
    """A pickled module and all below it, by the dotted names that ``Module.named_modules`` gives them."""
    found: dict[str, Inert] = {}
    waiting = [("", model)]
    while waiting:
        prefix, module = waiting.pop()
        found[prefix.rstrip(".")] = module
        if len(found) > _MAX_MODULES:  # only a module that contains itself has so many
            raise CheckpointError(damaged(path, "its modules contain each other"))
        children = _mapping(module.state.get("_modules")).items()
        waiting += [(f"{prefix}{name}.", child) for name, child in children if isinstance(child, Inert)]
    return found


def _require_silu(path: Path, model: Any, descriptions: Iterable[Any]) -> None:
    """Refuse other activations and heads, as far as the file says what its tensors belong to.

    Args:
        path: of the file, for messages.
        model: as it was pickled; a state dict says nothing.
        descriptions: maps that the architecture was built from; ``activation`` is Python code in one.
    """
    modules = _modules_of(path, model) if isinstance(model, Inert) else {}
    kinds = {name: module.name.rpartition(".")[2] for name, module in modules.items()}
    found = {kind for name, kind in kinds.items() if name.endswith(".act")} - {"Identity"}
    named = (str(_mapping(one).get("activation") or "") for one in descriptions)
    found |= {text for text in named if text and "SiLU" not in text}
    if others := found - _SILU:
        raise _wrong_architecture(path, f"the activation {sorted(others)[0]} in place of SiLU")
    head = next((kind for name, kind in kinds.items() if f"{name}.".endswith(_HEAD)), "Detect")
    if head != "Detect":
        raise _wrong_architecture(path, f"a head of the kind {head}")


def _mapping(value: Any) -> dict[str, Any]:
    return {k: v for k, v in value.items() if isinstance(k, str)} if isinstance(value, dict) else {}


def _tensors(path: Path, file: RestrictedFile, records: Any) -> dict[str, Tensor]:
    own = _mapping(records).items()
    tensors = {name: file.tensor(record) for name, record in own if isinstance(record, TensorRecord)}
    if not tensors:
        do = "Choose a checkpoint of YOLOv5 v6.0 to v7.0."
        raise CheckpointError(f"Expected {path} to hold the weights of a detector, but found no tensor. {do}")
    return tensors


def _architecture(path: Path, state: Mapping[str, Tensor]) -> tuple[str, int]:
    """Size and number of classes, from the names and shapes of the tensors."""
    anchors, stem, head = (_find(state, n) for n in ("model.24.anchors", "model.0.conv", "model.24.m.0"))
    for found, pattern in _FOREIGN.items():
        if any(re.search(pattern, name) for name in state):
            raise _wrong_architecture(path, found)
    if anchors is None or stem is None or head is None:
        names = ", ".join(repr(name) for name in list(state)[:2])
        raise _wrong_architecture(path, f"{len(state)} tensors such as {names}")
    foreign = [n for n in state if n.startswith(_HEAD) and not n.startswith((f"{_HEAD}m.", f"{_HEAD}anch"))]
    if foreign:
        raise _wrong_architecture(path, f"a head with {foreign[0]!r}")
    depth = len({m[1] for m in (re.match(r"model\.6\.m\.(\d+)\.", name) for name in state) if m})
    shape = (stem.shape[0], depth)
    size = next((s for s, k in SCALES.items() if (k.channels(64), k.repeats(9)) == shape), None)
    num_classes, rest = divmod(head.shape[0] - 5 * _LEVELS, _LEVELS)
    if size is None or rest or num_classes < 1 or tuple(anchors.shape) != (_LEVELS, 3, 2):
        found = f"a stem of {shape[0]} channels, {depth} blocks in layer 6 and {head.shape[0]} outputs"
        raise _wrong_architecture(path, found)
    return size, num_classes


def _find(state: Mapping[str, Tensor], name: str) -> Tensor | None:
    """The tensor of a name, or the weight of the layer of that name, which QAT may have wrapped."""
    return next((state[n] for n in (name, f"{name}.weight", f"{name}.module.weight") if n in state), None)


def _wrong_architecture(path: Path, found: str) -> CheckpointError:
    do = "Choose a detection checkpoint of YOLOv5 v6.0 to v7.0, size n, s, m, l or x."
    return CheckpointError(f"Expected {path} to hold YOLOv5 v6.0 to v7.0, but found {found}. {do}")


def _count(names: Any) -> int:
    """Number of class names in a list, or in a mapping by class id; 0 where they are neither."""
    return len(names) if isinstance(names, list | tuple | dict) else 0


def numbered_names(num_classes: int) -> tuple[str, ...]:
    """Stand for the class names of a checkpoint that has none: ``class0``, ``class1``, ..."""
    return tuple(f"class{i}" for i in range(num_classes))


def _class_names(names: Any, num_classes: int) -> tuple[str, ...]:
    """Class names from a list or a mapping by class id; ``class0``, ``class1``, ... where there are none.

    Ids may be texts, and need not begin at 0: their order counts.
    """
    if isinstance(names, dict):
        ids = [str(key) for key in names]
        numbered = all(key.isascii() and key.isdecimal() for key in ids)
        names = [names[key] for key in sorted(names, key=lambda key: int(str(key)))] if numbered else None
    names = list(names) if isinstance(names, tuple) else names
    fits = isinstance(names, list) and len(names) == num_classes and all(isinstance(n, str) for n in names)
    return tuple(map(whole_text, names)) if fits else numbered_names(num_classes)


def transfer_weights(model: YOLOv5, checkpoint: Checkpoint) -> TransferReport:
    """Start a model from a checkpoint.

    Where the numbers of classes agree, the model takes everything, anchors included. Where they differ, the
    head's convolutions take only the rows of boxes and objectness, which mean the same for any classes, and
    keep their own rows for class scores: a training then finds boxes in its first epoch.

    Args:
        model: in floating point; changed in place.
        checkpoint: of the same size and widths.

    Raises:
        CheckpointError: the sizes or widths differ, or a tensor is missing or has another shape. The model is
            then unchanged.
    """
    if model.size != checkpoint.size:
        should_be = f"yolov5{model.size} as configured"
        do = f"Set model=yolov5{checkpoint.size}, or choose another checkpoint."
        raise CheckpointError(expected("the checkpoint", should_be, f"yolov5{checkpoint.size}", do))
    if model.widths != checkpoint.widths:
        kinds = {True: "slimmed", False: "of the stock widths"}
        own_kind, got = kinds[bool(model.widths)], kinds[bool(checkpoint.widths)]
        do = "A model is built with the widths of its checkpoint."
        raise CheckpointError(expected("the checkpoint", f"{own_kind}, with the model's widths", got, do))
    own = model.state_dict()
    same_head = model.num_classes == checkpoint.num_classes
    wanted = [name for name in own if same_head or not name.startswith(f"{_HEAD}m.")]
    for name in wanted:
        _check_fits(name, own[name], checkpoint.state_dict.get(name))
    unknown = [name for name in checkpoint.state_dict.keys() - own.keys() if name.endswith(_TRAINED)]
    if unknown:
        do = "It is no plain YOLOv5; choose another checkpoint."
        raise CheckpointError(
            f"The checkpoint has layers that the model has not, such as {min(unknown)!r}. {do}"
        )
    taken = {name: checkpoint.state_dict[name] for name in wanted}
    for name in own.keys() - wanted:
        taken[name] = _with_boxes_of(checkpoint.state_dict.get(name), checkpoint.num_classes, own[name])
    model.load_state_dict(taken, strict=False)
    return TransferReport(len(wanted), len(own), tuple(sorted(own.keys() - wanted)))


def in_order_of(checkpoint: Checkpoint, names: Sequence[str]) -> Checkpoint:
    """The checkpoint with its class scores in a data set's order, where both name the same classes.

    Of other names it stays as it is.

    Args:
        checkpoint: in floating point.
        names: of the data set's classes.
    """
    has = checkpoint.names
    if not mixes_classes(has, names) or sorted(has) != sorted(names) or len({*has}) < len(has):
        return checkpoint
    rows = [*range(5), *(5 + has.index(name) for name in names)]
    tensors = {
        name: value.view(3, -1, *value.shape[1:])[:, rows].reshape(value.shape).clone()
        for name, value in checkpoint.state_dict.items()
        if name.startswith(f"{_HEAD}m.") and name.endswith((".weight", ".bias"))
    }
    return replace(checkpoint, names=tuple(names), state_dict={**checkpoint.state_dict, **tensors})


def mixes_classes(has: Sequence[str], wanted: Sequence[str]) -> bool:
    """Whether a checkpoint's classes, taken one for one, would put a data set's class in another's place."""
    known, there = tuple(has) != numbered_names(len(has)), set(wanted)
    return known and any(name in there and [name] != [*wanted[n : n + 1]] for n, name in enumerate(has))


def _with_boxes_of(other: Tensor | None, num_classes: int, own: Tensor) -> Tensor:
    """A head convolution's weight or bias, its rows of x, y, w, h and objectness taken from another head."""
    anchors = 3
    if other is None or other.shape != (anchors * (5 + num_classes), *own.shape[1:]):
        return own
    mixed = own.clone().view(anchors, -1, *own.shape[1:])
    mixed[:, :5] = other.view(anchors, -1, *own.shape[1:])[:, :5]
    return mixed.view_as(own)


def _check_fits(name: str, own: Tensor, other: Tensor | None) -> None:
    if other is None:
        message = f"Expected the checkpoint to hold {name!r}, but it does not."
        raise CheckpointError(f"{message} Choose another one.")
    if other.shape != own.shape:
        should_be, do = f"of shape {tuple(own.shape)}", "Fetch or choose another checkpoint."
        raise CheckpointError(expected(f"the checkpoint's {name}", should_be, tuple(other.shape), do))


def save_checkpoint(
    path: Path,
    *,
    model_state: Mapping[str, Tensor],
    size: str,
    num_classes: int,
    names: Sequence[str],
    imgsz: Imgsz,
    recipe: str,
    phase: str,
    epoch: float,
    metrics: Mapping[str, float],
    quantization: Mapping[str, Any] | None = None,
    widths: Mapping[str, int] | None = None,
) -> None:
    """Write a checkpoint in our own format, whole or not at all.

    The file is a dict of builtin types and tensors that ``torch.load(weights_only=True)`` and
    `read_checkpoint` can read.

    Args:
        path: replaced if it exists; its directory is made.
        model_state: ``state_dict()`` of the model; copied to the CPU.
        size: n, s, m, l or x.
        num_classes: number of classes of the head.
        names: class names.
        imgsz: size of the training images.
        recipe: the SparseML recipe that the weights were trained with, or "".
        phase: "dense", "pruned" or "pruned_quant".
        epoch: epochs trained.
        metrics: values by name.
        quantization: see `Checkpoint`; None for floating point.
        widths: see `Checkpoint`; None for the stock sizes.

    Raises:
        OSError: the directory cannot be written.
    """
    content = {
        "format": SLIM_FORMAT if widths else FORMAT,
        "size": size,
        "num_classes": int(num_classes),
        "names": [str(name) for name in names],
        "imgsz": plain(imgsz),
        # copies: a view would be written with the whole storage behind it
        "state_dict": {k: v.detach().cpu().contiguous().clone() for k, v in model_state.items()},
        "recipe": str(recipe),
        "phase": str(phase),
        "epoch": float(epoch),
        "metrics": {str(k): float(v) for k, v in metrics.items()},
        "quantization": dict(quantization or {}),
        **({"widths": {str(k): int(v) for k, v in widths.items()}} if widths else {}),
    }
    with landing(path) as temporary, temporary.open("wb") as file:  # to a path, torch hides OSErrors
        torch.save(content, file)
