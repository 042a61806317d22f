"""Publish in the local zoo: a finished run, a checkpoint file, or a directory in SparseZoo's layout."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from sparse_exp import __version__
from sparse_exp.config.imgsz import Imgsz, imgsz_of
from sparse_exp.config.plain import from_dict, options
from sparse_exp.config.schema import ENGINES, STAGES, DatasetConfig, ModelConfig
from sparse_exp.data import prepare
from sparse_exp.data.attributions import attributions_of, licences_of
from sparse_exp.errors import ConfigError, SparseExpError, expected
from sparse_exp.files import sha256_of, write_json
from sparse_exp.hints import override, resume_command
from sparse_exp.runs.deployment import MODEL, Deployment
from sparse_exp.runs.directory import CONFIG, MANIFEST, Run
from sparse_exp.sources.layout import BEFORE_QAT, DEPLOYMENT, FINAL, TRAINING, checkpoint_in
from sparse_exp.sources.local import (
    FORMAT,
    METADATA,
    METRICS,
    SUMS,
    Published,
    default_stub,
    directory_of,
    lacking,
    read_metadata,
    short_name,
    sparse_tag,
)
from sparse_exp.tracking.source import source_tags
from sparse_exp.zoo.card import write_card
from sparse_exp.zoo.checksums import changed_files
from sparse_exp.zoo.placing import put

if TYPE_CHECKING:
    from sparse_exp.data import DetectionDataset
    from sparse_exp.zoo.facts import Measured

_log = logging.getLogger(__name__)
AUTO = "auto"
_NEEDED = ("evaluate", "export")
# What ``model.json`` says that is known from the checkpoint, or from where it is published.
_MEASURED = ("size", "classes", "sparsity", "quantized", "block4", "work")
_OF_THE_PLACE = ("stub", "short", "dataset", "tag", "published")
_LOGS = ("config.yaml", "history.json", "sparsity.csv", "benchmark.json", "environment.txt")
_ENGINES = tuple(name for name in ENGINES if name != "torch")  # those of deployed files


def read_finished(path: Path) -> Run:
    """Read a run for publishing; nothing in it is changed.

    Args:
        path: its directory.

    Raises:
        ConfigError: it is no run, or one that is not finished.
    """
    run = Run.find(path)
    if run is None or not _has_names(run.config):
        do = "Give a directory below outputs/runs."
        what = f"the directory of a run with its {MANIFEST} and {CONFIG}"
        raise ConfigError(expected("RUN", what, str(path), do))
    status = run.state.get("status")
    # Of a run that stopped when it was to be published everything else is done.
    if status != "FINISHED" and not (status == "FAILED" and run.state.get("stage") == "publish"):
        do = f"Finish it with: {resume_command(path)}"
        raise ConfigError(expected(f"the run {path}", "FINISHED", status, do))
    return run


def _has_names(config: Mapping[str, Any]) -> bool:
    """Whether a configuration, which may be anybody's, says how run, data and recipe are called."""
    parts = config, *(config.get(group) for group in ("dataset", "recipe"))
    return all(isinstance(part, dict) and isinstance(part.get("name"), str) for part in parts)


def publish_run(
    run: Run,
    zoo: Path,
    *,
    stub: str = AUTO,
    force: bool = False,
    numbered: bool = False,
    again: bool = False,
    dataset: DetectionDataset | None = None,
) -> Published:
    """Publish what a run has made.

    Args:
        run: with the stages evaluate and export behind it.
        zoo: see `sparse_exp.sources.local.zoo_directory`.
        stub: to publish it under; ``auto``: named after its size, data set, zeros and quantization.
        force: replace a model that is published there.
        numbered: where the stub is taken, add the next free number to its tag.
        again: replace what this very run has published before.
        dataset: that sample images are taken from; None for no samples.

    Raises:
        ConfigError: the run has nothing to deploy or was changed since, or see `sparse_exp.zoo.placing.put`.
    """
    from sparse_exp.zoo.facts import measure_checkpoint

    checkpoint = _require_whole(run)
    measured = measure_checkpoint(checkpoint)
    if stub == AUTO:
        stub = _named(measured, str(run.config["dataset"]["name"]))

    def fill(final_stub: str, directory: Path) -> None:
        _copy_files(run, checkpoint, directory, measured)
        imgsz = imgsz_of(run.facts("export").get("imgsz", measured.imgsz))
        write_json(Deployment(directory / DEPLOYMENT).class_names, list(measured.names))
        samples = _samples(directory, dataset, imgsz)
        metrics = {name: value for record in run.records.values() for name, value in record.metrics.items()}
        metadata = _describe(final_stub, measured, metrics) | _described_run(run, checkpoint, zoo)
        _write_texts(directory, {**metadata, "imgsz": imgsz, "samples": samples})

    return put(stub, zoo, fill, force=force, numbered=numbered, owner=run.key if again else None)


def dataset_of(run: Run, cache: Path) -> DetectionDataset | None:
    """The data set that a run was made with; None, and a warning, where it cannot be read any more."""
    try:
        return prepare(from_dict(DatasetConfig, run.config["dataset"]), cache)
    except SparseExpError as error:
        _log.warning("No sample images: %s", error)
        return None


def import_checkpoint(file: Path, zoo: Path, *, stub: str | None = None, force: bool = False) -> Published:
    """Publish a checkpoint file.

    Args:
        file: any checkpoint that `sparse_exp.yolov5.read_checkpoint` reads.
        zoo: see `sparse_exp.sources.local.zoo_directory`.
        stub: to publish it under; None: made of what was measured in the file, and of the file's name in
            the place of the data set's.
        force: replace a model that is published there.

    Raises:
        CheckpointError: the file is no such checkpoint.
        ConfigError: see `sparse_exp.zoo.placing.put`.
    """
    from sparse_exp.zoo.facts import measure_checkpoint

    measured = measure_checkpoint(file)
    coco = len(measured.names) == 80 and measured.names[0] == "person"
    if stub is None:
        repo = "sparse_exp" if measured.ours else "ultralytics"
        stub = _require_asked(_named(measured, "coco" if coco else file.stem, repo=repo), zoo)

    def fill(final_stub: str, directory: Path) -> None:
        (directory / TRAINING).mkdir()
        suffix = ".safetensors" if file.suffix == ".safetensors" else ".pt"
        shutil.copyfile(file, directory / TRAINING / Path(FINAL).with_suffix(suffix))
        if measured.recipe:
            (directory / "recipe.md").write_text(f"---\n{measured.recipe.strip()}\n---\n", encoding="utf-8")
        metadata = _describe(final_stub, measured, measured.metrics)
        origin = {"origin": f"imported file {file.name}", "source_sha256": sha256_of(file)}
        licence = [] if measured.ours else attributions_of("ultralytics")
        _write_texts(directory, {**metadata, **origin, "licence": licence})

    return put(stub, zoo, fill, force=force)


def _require_asked(stub: str, zoo: Path) -> str:
    """A stub that an import found by itself, unless runs start from it by default.

    Raises:
        ConfigError: they do: whoever puts a model there must mean it.
    """
    for model in options("model", ModelConfig).values():
        if model.stub and directory_of(model.stub, zoo) == directory_of(stub, zoo):
            do = f"If that is meant, add --as {stub}; else choose another with --as STUB."
            raise ConfigError(f"{stub} is what every run of model={model.name} would start from. {do}")
    return stub


def _require_plain_files(folder: Path) -> None:
    """Refuse links, which may lead to anything on this machine, and what is neither file nor directory."""
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            do = "Copy the directory with cp -rL if all that it links to may be published."
            what = f"what {folder} holds"
            raise ConfigError(expected(what, "files and directories, no links", str(path), do))


def import_directory(folder: Path, zoo: Path, *, stub: str | None = None, force: bool = False) -> Published:
    """Publish a directory in SparseZoo's layout: one of SparseZoo's own, or from another local zoo.

    Args:
        folder: the directory.
        zoo: see `sparse_exp.sources.local.zoo_directory`.
        stub: to publish it under; None: the one in its ``model.json``, or else one made of what was measured
            in its checkpoint.
        force: replace a model that is published there.

    Raises:
        SourceUnavailable: it holds no checkpoint.
        CheckpointError: its checkpoint cannot be read.
        ConfigError: it holds links, its files are not what its list of hashes says, it would take the stub
            that runs start from by default, or see `sparse_exp.zoo.placing.put`.
    """
    from sparse_exp.zoo.facts import measure_checkpoint

    _require_plain_files(folder)
    damaged = changed_files(folder)
    if damaged:
        do = "Copy the directory again."
        raise ConfigError(expected(f"the files of {folder}", f"those of its {SUMS}", damaged[0], do))
    own = read_metadata(folder)
    own = {} if lacking(own) else own
    measured = measure_checkpoint(checkpoint_in(folder, "postqat"))
    coco = len(measured.names) == 80 and measured.names[0] == "person"
    fallback = _named(measured, "coco" if coco else folder.resolve().name, repo="sparsezoo")

    def fill(final_stub: str, directory: Path) -> None:
        shutil.copytree(folder, directory, dirs_exist_ok=True, copy_function=shutil.copyfile)
        metadata = _describe(final_stub, measured, measured.metrics)
        metadata |= {"origin": f"imported directory {folder.resolve().name}", "licence": []}
        for key in _MEASURED:
            if own.get(key, metadata[key]) != metadata[key]:
                _log.warning("%s says %s %s; measured is %s.", METADATA, key, own[key], metadata[key])
        metadata |= {key: value for key, value in own.items() if key not in (*_MEASURED, *_OF_THE_PLACE)}
        write_json(directory / METADATA, metadata)
        if own or not (directory / "model.md").is_file():
            write_card(directory, metadata)

    chosen = stub or _require_asked(str(own.get("stub") or fallback), zoo)
    return put(chosen, zoo, fill, force=force)


def _named(measured: Measured, dataset: str, *, repo: str = "sparse_exp") -> str:
    tag = sparse_tag(
        measured.sparsity, quantized=measured.quantized, block4=measured.block4, work=measured.work
    )
    return default_stub(measured.size, dataset, tag, repo=repo)


def _require_whole(run: Run) -> Path:
    """The checkpoint of a run, whose files are still what its stages wrote.

    Raises:
        ConfigError: the run has no deployment, or its files are others now.
    """
    missing = [stage for stage in _NEEDED if stage not in run.records]
    if missing:
        stages = missing if run.checkpoint else STAGES[: STAGES.index(_NEEDED[-1]) + 1]
        again = resume_command(run.path, override("stages", stages))
        do = f"Only what was evaluated and exported can be published. Do it with: {again}"
        found = ", ".join(run.records)
        raise ConfigError(
            f"Expected {run.path} to have run {' and '.join(missing)}, but its stages are {found}. {do}"
        )
    for stage in ("train", "export"):
        for name in run.changed_outputs(stage):
            do = f"Run the stage {stage} again with: {resume_command(run.path)}"
            raise ConfigError(f"{run.path / name} is missing or not what the run wrote. {do}")
    if run.checkpoint is None:
        raise ConfigError(f"{run.path} has no checkpoint to publish. Publish the run that trained it.")
    return run.checkpoint


def _copy_files(run: Run, checkpoint: Path, directory: Path, measured: Measured) -> None:
    for folder in (TRAINING, DEPLOYMENT, "logs"):
        (directory / folder).mkdir()
    shutil.copyfile(checkpoint, directory / TRAINING / FINAL)
    before = run.before_quantization(checkpoint) if measured.quantized else None
    if before:
        shutil.copyfile(before, directory / TRAINING / BEFORE_QAT)
    for path in run.deployment.deployed_files:
        shutil.copyfile(path, directory / DEPLOYMENT / path.name)
    shutil.copyfile(run.deployment.model, directory / MODEL)
    shutil.copyfile(run.path / "recipe.md", directory / "recipe.md")
    for name in _LOGS:
        if (run.path / name).is_file():
            shutil.copyfile(run.path / name, directory / "logs" / name)


def _samples(directory: Path, dataset: DetectionDataset | None, imgsz: Imgsz) -> dict[str, str]:
    from sparse_exp.zoo.samples import write_samples

    return write_samples(directory, dataset, imgsz) if dataset else {}


def _describe(stub: str, measured: Measured, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What ``model.json`` says of any model."""
    dataset, tag = stub.split("/")[-2:]
    return {
        "format": FORMAT,
        "stub": stub,
        "short": short_name(stub),
        "size": measured.size,
        "dataset": dataset,
        "tag": tag,
        "classes": list(measured.names),
        "imgsz": measured.imgsz,
        "sparsity": round(measured.sparsity, 6),
        "quantized": measured.quantized,
        "block4": measured.block4,
        "work": round(measured.work, 6),
        "phase": measured.phase,
        "recipe": "",
        "metrics": dict(metrics),
        "samples": {},
        "published": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "by": source_tags()["mlflow.user"],
        "sparse_exp": __version__,
        "engines": _engine_versions(),
    }


def _described_run(run: Run, checkpoint: Path, zoo: Path) -> dict[str, Any]:
    """What ``model.json`` says in addition of a model that a run has made."""
    fetched = run.facts("fetch")
    origin = str(fetched.get("origin", "")) or f"checkpoint {checkpoint.name}"
    grown_from = str(fetched.get("grown_from", ""))
    rows = run.facts("benchmark").get("rows", [])
    return {
        "recipe": run.config["recipe"]["name"],
        "origin": origin + (f", grown from {grown_from}" if grown_from else ""),
        "licence": licences_of(f"{origin} {grown_from} {run.config['dataset'].get('generator')}", zoo),
        "dataset_digest": fetched.get("dataset", ""),
        "run": {"name": run.config["name"], "id": run.state.get("tracker_run_id"), "key": run.key},
        "host": rows[0].get("cpu", "") if rows else "",
    }


def _engine_versions() -> dict[str, str]:
    found = {}
    for package in _ENGINES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _write_texts(directory: Path, metadata: Mapping[str, Any]) -> None:
    write_json(directory / METADATA, metadata)
    text = yaml.safe_dump(dict(metadata["metrics"]), sort_keys=True, allow_unicode=True)
    (directory / METRICS).write_text(text, encoding="utf-8")
    write_card(directory, metadata)
