"""Which file, engine and class names a person means by the name of a model. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sparse_exp.config.imgsz import Imgsz, imgsz_of
from sparse_exp.config.places import Places, find_places
from sparse_exp.config.runtimes import RUNTIMES
from sparse_exp.config.schema import ENGINES, STAGES
from sparse_exp.engines.signature import check_detector, read_signature
from sparse_exp.errors import ConfigError, EngineError, MissingDependency, SourceUnavailable, expected
from sparse_exp.files import expanded
from sparse_exp.hardware import host_facts
from sparse_exp.hardware.targets import unusable
from sparse_exp.hints import command_line, override, resume_command
from sparse_exp.runs.deployment import MODEL, TORCH, Deployment
from sparse_exp.runs.directory import Run, find_directories
from sparse_exp.runs.metadata import read_metadata
from sparse_exp.sources.layout import CHECKPOINT_SUFFIXES, DEPLOYMENT, checkpoint_in
from sparse_exp.sources.local import find
from sparse_exp.sources.stub import STUB_PREFIX

if TYPE_CHECKING:
    from sparse_exp.engines.signature import Signature

_USUAL = ("deepsparse", "onnxruntime", "openvino")
_FORMS = "a run, a stub (zoo:...), a directory with model.onnx, or an ONNX file"


@dataclass(frozen=True)
class Model:
    """A detector that can be loaded into an engine.

    Attributes:
        path: its file: ONNX, or for torch a checkpoint.
        names: of the classes, the class id being the position; empty where nothing says them.
        imgsz: size of the images that it takes.
        engine: that runs it; one of `sparse_exp.config.schema.ENGINES`.
        origin: what it was found by, for people.
        signature: what the ONNX file takes and gives; None for a checkpoint.
    """

    path: Path
    names: tuple[str, ...]
    imgsz: Imgsz
    engine: str
    origin: str
    signature: Signature | None = None


def find_model(name: str, *, engine: str | None = None, places: Places | None = None) -> Model:
    """The model that a person means.

    Args:
        name: a run's directory, the end of its path below ``outputs`` or its MLflow id; a stub of the local
            zoo; a directory in SparseZoo's layout (``model.onnx`` in ``deployment`` or in itself); an ONNX
            file; a checkpoint, which torch runs.
        engine: one of `sparse_exp.config.schema.ENGINES`. None: the first that can run here of those of the
            run, DeepSparse, ONNX Runtime and OpenVINO; for a checkpoint torch.
        places: where outputs and zoo are; None: see `sparse_exp.config.places.find_places`.

    Returns:
        The model; of a quantized run or published model the file that suits the engine.

    Raises:
        ConfigError: there is no such model, or several.
        SourceUnavailable: the stub is not in the local zoo, or holds nothing to run.
        EngineError: there is no such engine, or the file is no detector that engines can run.
        CheckpointError: the checkpoint cannot be read.
        MissingDependency: it needs torch, which is not installed.
    """
    if engine is not None and engine not in ENGINES:
        do = "Choose one of these."
        raise EngineError(expected("the engine", f"one of {', '.join(ENGINES)}", engine, do))
    place = _place(name, places or find_places())
    run = Run.find(place) if place.is_dir() else None
    chosen = engine or _default_engine(place, run)
    path = place if place.is_file() else _file_in(place, run, chosen)
    signature: Signature | None = None
    if path.suffix in CHECKPOINT_SUFFIXES:
        names, imgsz = _of_checkpoint(path, chosen)
    else:
        names, imgsz, signature = _of_onnx(path, chosen)
    names = names or _recorded_names([place, *path.parents[:2]])
    return Model(path, names, imgsz, chosen, name, signature)


def _place(name: str, places: Places) -> Path:
    """The file or directory that a name means."""
    if name.startswith(STUB_PREFIX):
        directory = find(name, places.zoo)
        if directory is None:
            do = f"What it holds: {command_line('list', '--zoo', str(places.zoo), module='sparse_exp.zoo')}"
            raise SourceUnavailable(f"{name} is not in the local zoo {places.zoo}. {do}")
        return directory
    try:
        place = expanded(name)
        return place if place.exists() else _named_run(name, places)
    except OSError as error:
        raise ConfigError(f"Cannot read {name}: {error.strerror}. Allow it, or correct the name.") from error


def _named_run(name: str, places: Places) -> Path:
    """A run by the end of its path below ``outputs``, or by its MLflow id."""
    wanted = Path(name).parts
    runs = [run for folder in places.runs if folder.is_dir() for run in find_directories(folder)]
    by_name = [run for run in runs if wanted and run.parts[-len(wanted) :] == wanted]
    found = by_name or [path for path in runs if (run := Run.find(path)) and run.tracker_run_id == name]
    if not found:
        raise ConfigError(expected("MODEL", _FORMS, name, "Correct the name or the path."))
    if len(found) > 1:
        several = ", ".join(map(str, found[:3]))
        raise ConfigError(expected("MODEL", "one run", name, f"It may be {several}: give the path."))
    return found[0]


def _default_engine(place: Path, run: Run | None) -> str:
    if place.suffix in CHECKPOINT_SUFFIXES:
        return "torch"
    configured = run.config.get("hardware") if run else None
    engines = configured.get("engines") if isinstance(configured, dict) else None
    preferred = [name for name in engines if name in ENGINES] if isinstance(engines, list) else []
    facts = host_facts()
    return next((name for name in (*preferred, *_USUAL) if not unusable(name, facts)), "onnxruntime")


def _file_in(directory: Path, run: Run | None, engine: str) -> Path:
    """The file of a run or of a published model that suits an engine."""
    if engine == TORCH:
        if run is None:
            return checkpoint_in(directory, "postqat")
        if run.checkpoint is None or not run.checkpoint.is_file():
            raise ConfigError(f"The run {directory} has no checkpoint. Give one, or choose another engine.")
        return run.checkpoint
    for folder in (directory / DEPLOYMENT, directory):
        path = Deployment(folder).deployed(engine)
        if path.is_file():
            return path
    if run:
        stages = ["export"] if run.checkpoint else STAGES[: STAGES.index("export") + 1]
        do = f"Export it first: {resume_command(directory, override('stages', stages))}"
        raise ConfigError(f"The run {directory} has no exported model. {do}")
    raise ConfigError(expected("MODEL", _FORMS, str(directory), f"It holds no {MODEL}."))


def _of_checkpoint(path: Path, engine: str) -> tuple[tuple[str, ...], Imgsz]:
    if engine != "torch":
        do = "Give its run's directory or an ONNX file, or choose --engine torch."
        raise EngineError(f"{engine} runs no checkpoints such as {path}. {do}")
    try:
        from sparse_exp.yolov5 import read_checkpoint
    except ImportError as error:
        do = f"Run: pip install '{RUNTIMES[TORCH].requirement}', or give the ONNX file exported from it."
        raise MissingDependency(f"The checkpoint {path} needs torch, which is not installed. {do}") from error

    checkpoint = read_checkpoint(path)
    return checkpoint.names, checkpoint.imgsz or 640


def _of_onnx(path: Path, engine: str) -> tuple[tuple[str, ...], Imgsz, Signature]:
    """Class names, image size and signature of an ONNX file; refuses what takes no images as ours do."""
    if engine == "torch":
        do = "Give a run or a checkpoint, or choose another engine."
        raise EngineError(f"torch runs checkpoints, not ONNX files such as {path}. {do}")
    signature = read_signature(path)
    check_detector(path, signature, signature.batch or 1)
    assert signature.size is not None  # of what `check_detector` lets through
    return read_metadata(path).get("names", ()), imgsz_of(signature.size), signature


def _recorded_names(places: Iterable[Path]) -> tuple[str, ...]:
    """The class names that lie beside a model: in its run's manifest, or in its published directory."""
    for place in places:
        run = Run.find(place)
        beside = Deployment(place / DEPLOYMENT).names or Deployment(place).names
        if names := (run.names if run else ()) or beside:
            return names
    return ()
