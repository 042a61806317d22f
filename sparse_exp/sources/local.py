"""The local zoo: models that runs have published, in SparseZoo's directory layout, to start from again.

A model lies in ``<zoo>/<path of its stub>``, such as
``cv/detection/yolov5-s/pytorch/sparse_exp/trees/pruned75_quant-none``, and its ``model.json`` describes it.
Nothing here imports torch, so that finding and listing models is fast.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_exp.errors import ConfigError, expected
from sparse_exp.files import expanded, parse_json
from sparse_exp.sources.layout import TRAINING
from sparse_exp.sources.stub import STUB_PREFIX, parse_stub

FORMAT = "sparse_exp.zoo/1"
METADATA, SUMS, CARD, METRICS = "model.json", "SHA256SUMS", "model.md", "metrics.yaml"
_KINDS: dict[str, Any] = {
    **dict.fromkeys(("stub", "short", "size", "dataset", "tag", "recipe", "published", "by"), str),
    "classes": list, "sparsity": (int, float), "quantized": bool, "block4": bool, "metrics": dict,
    "samples": dict,
}  # fmt: skip
_OPTIONAL: dict[str, Any] = {"licence": list}
_log = logging.getLogger(__name__)
_DEPTH = 7  # names in a stub of the first grammar
_PREFIX = ("cv", "detection")
_REPO = "sparse_exp"


@dataclass(frozen=True)
class Published:
    """A model in the local zoo.

    Attributes:
        stub: ``zoo:...``, first grammar.
        directory: where it lies.
        metadata: content of ``model.json``, plain data.
    """

    stub: str
    directory: Path
    metadata: dict[str, Any]


def zoo_directory(configured: str | None = None) -> Path:
    """Where the local zoo is.

    Args:
        configured: the value of ``paths.zoo``, or of ``--zoo``.

    Returns:
        ``configured``, else ``$SPARSE_EXP_ZOO``, else ``outputs/zoo``; absolute. It may not exist yet.
    """
    chosen = configured or os.environ.get("SPARSE_EXP_ZOO") or "outputs/zoo"
    return expanded(chosen).absolute()


def find(stub: str, zoo: Path) -> Path | None:
    """The directory of the model that is published under a stub.

    A stub of the second grammar means each model whose architecture, data set and tag it names; see
    `short_name`.

    Args:
        stub: ``zoo:...`` of either grammar; what follows ``?`` does not matter here.
        zoo: see `zoo_directory`.

    Returns:
        The directory, or None where the zoo has no such model.

    Raises:
        ConfigError: the stub is malformed, or means several models; the message names them.
    """
    parse_stub(stub)
    path = _path_of(stub)
    if "/" in path:
        return zoo / path if _is_model(zoo / path) else None
    matches = [model for model in _directories(zoo) if _means(path, model.relative_to(zoo).parts)]
    if len(matches) > 1:
        stubs = ", ".join(stub_of(model, zoo) for model in matches)
        raise ConfigError(expected("the stub", "that of one model", stub, f"Give one of {stubs}."))
    return matches[0] if matches else None


def directory_of(stub: str, zoo: Path) -> Path:
    """The directory of a stub, whether there is a model or not.

    Args:
        stub: of either grammar. The second names no repository; then it is ``sparse_exp``.
        zoo: see `zoo_directory`.

    Raises:
        ConfigError: the stub is malformed, or has parameters.
    """
    found = parse_stub(stub)
    path = _path_of(stub)
    if found.parameters or any(part.startswith(".") for part in path.split("/")):
        should_be = "zoo:DOMAIN/SUBDOMAIN/ARCHITECTURE[-SUB]/FRAMEWORK/REPO/DATASET[-SCHEME]/TAG"
        raise ConfigError(expected("the stub to publish under", should_be, stub, "Correct the stub."))
    return zoo / path if "/" in path else zoo.joinpath(*_long_parts(path))


def stub_of(directory: Path, zoo: Path) -> str:
    """The stub of a model's directory in the zoo."""
    return STUB_PREFIX + directory.relative_to(zoo).as_posix()


def default_stub(size: str, dataset: str, tag: str, *, repo: str = _REPO) -> str:
    """A stub of the first grammar for a YOLOv5.

    Args:
        size: n, s, m, l or x.
        dataset: its name; characters that a stub cannot hold become underscores.
        tag: see `sparse_tag`.
        repo: who made it.
    """
    name = re.sub(r"[^A-Za-z0-9_]+", "_", dataset).strip("_") or "custom"
    return f"{STUB_PREFIX}{'/'.join(_PREFIX)}/yolov5-{size}/pytorch/{repo}/{name}/{tag}"


def sparse_tag(sparsity: float, *, quantized: bool, block4: bool = False, work: float = 1.0) -> str:
    """The tag of a stub, as SparseZoo writes how sparse a model is: ``pruned75_quant-none``, ``base-none``.

    Of a slimmed model it begins with how much of its work is left: ``slim50-none``, ``slim50_pruned75-none``.

    Args:
        sparsity: share of zeros in the prunable convolutions, 0..1; below half a percent counts as none.
        quantized: whether it computes with 8 bits.
        block4: whether the zeros come in blocks of four input channels, made for VNNI.
        work: its multiplications as a share of those of its stock size, 0..1.
    """
    percent = round(100 * sparsity)
    name = f"pruned{percent}" if percent else "base"
    if work < 1.0:
        name = f"slim{round(100 * work)}" + (f"_{name}" if percent else "")
    return f"{name}{'_quant' if quantized else ''}-none{'-vnni' if block4 and percent else ''}"


def short_name(stub: str) -> str:
    """The stub of the second grammar that means this model: ``zoo:yolov5-s-trees-pruned75_quant``.

    Args:
        stub: of the first grammar. The ``none`` of its tag (nothing else was done) is left out, and other
            hyphens of the tag become underscores, because the second grammar allows no hyphens there.
    """
    architecture, dataset, tag = _short_parts(_path_of(stub).split("/"))
    return f"{STUB_PREFIX}{architecture}-{dataset}-{tag}"


def published(zoo: Path) -> list[Published]:
    """All models of the zoo whose ``model.json`` says all that it must, sorted by stub.

    Another that has such a file is left out with a warning.
    """
    found = []
    for directory in _directories(zoo):
        metadata = read_metadata(directory)
        if not lacking(metadata):
            found.append(Published(stub_of(directory, zoo), directory, metadata))
        elif (directory / METADATA).exists():
            what = ", ".join(lacking(metadata)) if metadata else "all that it should say"
            _log.warning("%s is left out: its %s lacks %s.", directory, METADATA, what)
    return found


def lacking(metadata: Mapping[str, Any]) -> list[str]:
    """The keys that a ``model.json`` does not have and must, or has with a value of another kind."""
    there = {key: kind for key, kind in _OPTIONAL.items() if metadata.get(key) is not None}
    return [key for key, kind in (_KINDS | there).items() if not isinstance(metadata.get(key), kind)]


def read_metadata(directory: Path) -> dict[str, Any]:
    """The content of a model's ``model.json``; empty where it is missing, damaged or of another format."""
    try:
        content = parse_json((directory / METADATA).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) and content.get("format") == FORMAT else {}


def _path_of(stub: str) -> str:
    return stub.removeprefix(STUB_PREFIX).partition("?")[0]


def _directories(zoo: Path) -> Iterator[Path]:
    """Directories of models, sorted. They lie as deep as a stub's path is long; hidden ones are left out."""
    level = [zoo]
    for _ in range(_DEPTH):
        level = [child for folder in level for child in _folders(folder)]
    yield from (folder for folder in level if _is_model(folder))


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    except OSError:  # not there yet, or not ours to read
        return []


def _is_model(folder: Path) -> bool:
    return (folder / METADATA).is_file() or (folder / TRAINING).is_dir()


def _short_parts(parts: Any) -> tuple[str, str, str]:
    """Architecture, data set and tag as the second grammar names them."""
    _, _, architecture, _, _, dataset, tag = parts
    words = [word for word in tag.split("-") if word != "none"]
    return architecture, dataset.partition("-")[0], "_".join(words)


def _means(path: str, parts: tuple[str, ...]) -> bool:
    """Whether a stub's path of the second grammar means the model at ``parts``.

    Between architecture and tag stand one or two data sets, of which the last is that of the training.
    """
    architecture, dataset, tag = _short_parts(parts)
    if not (path.startswith(f"{architecture}-") and path.endswith(f"-{tag}")):
        return False
    between = path[len(architecture) + 1 : -len(tag) - 1].split("-")
    return len(between) in (1, 2) and between[-1] == dataset


def _long_parts(path: str) -> tuple[str, ...]:
    """The path of the first grammar for one of the second: ``yolov5-s[-coco]-trees-pruned75``."""
    *names, dataset, tag = path.split("-")
    architecture = "-".join(names[:2])
    return (*_PREFIX, architecture, "pytorch", _REPO, dataset, f"{tag}-none")


def is_free(stub: str, zoo: Path, owner: str | None = None) -> bool:
    """Whether no model is published under a stub, or one that a run has published itself.

    Args:
        stub: of either grammar.
        zoo: see `zoo_directory`.
        owner: key of the run, see `sparse_exp.runs.directory.Run.key`; None: of none.

    Raises:
        ConfigError: the stub is malformed.
    """
    directory = directory_of(stub, zoo)
    made_by = read_metadata(directory).get("run")
    own = owner is not None and isinstance(made_by, dict) and made_by.get("key") == owner
    return own or not directory.exists()


def require_free(stub: str, zoo: Path, owner: str | None = None) -> None:
    """Refuse a stub that is not free; see `is_free`.

    Raises:
        ConfigError: the stub is malformed, or taken.
    """
    if not is_free(stub, zoo, owner):
        do = "Choose another (publish=STUB, --as STUB). To replace it: python -m sparse_exp.zoo, --force."
        raise ConfigError(f"{stub} is published already in {zoo}. {do}")


def require_writable(zoo: Path) -> None:
    """Refuse a zoo that this user can neither write nor make.

    Raises:
        ConfigError: the user cannot.
    """
    there = next(folder for folder in (zoo, *zoo.parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        do = "Ask for the permission, or choose another zoo with paths.zoo=PATH (--zoo PATH)."
        raise ConfigError(expected("the local zoo", "a directory that you can write", str(zoo), do))
