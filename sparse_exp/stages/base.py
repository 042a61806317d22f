"""What the stages of one run share."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_exp.config.schema import Experiment
from sparse_exp.errors import ConfigError
from sparse_exp.runs.directory import RunDirectory
from sparse_exp.tracking import Tracker

if TYPE_CHECKING:
    from sparse_exp.data import DetectionDataset
    from sparse_exp.data.loader import DetectionLoader
    from sparse_exp.sparsity.recipe import Recipe
    from sparse_exp.training.precision import Precision


@dataclass(frozen=True)
class SweepMember:
    """What a run knows of the sweep that it is a job of.

    Attributes:
        directory: of the sweep; the run directories of its jobs lie in it.
        parent: the tracker's name of the sweep's own run; None where it is not tracked.
        job: its number, from 0; None for a run that a job makes for itself, such as its dense counterpart.
    """

    directory: Path
    parent: str | None
    job: int | None = None


@dataclass
class Context:
    """One run: its configuration, its directory, its tracker, and what several stages need.

    Attributes:
        experiment: the checked configuration.
        run: the run directory; finished stages are found in its records.
        tracker: started.
        recipe: as it will run.
        sweep: the sweep that the run is a job of; None: it is none.
        mismatch: what of the hardware target does not fit this host, a clause each.
        mark: fingerprint of the stage that runs.
    """

    experiment: Experiment
    run: RunDirectory
    tracker: Tracker
    recipe: Recipe
    sweep: SweepMember | None = None
    mismatch: tuple[str, ...] = ()
    mark: str = ""
    _loaders: dict[tuple[str, bool], DetectionLoader] = field(default_factory=dict, init=False)

    @cached_property
    def cache(self) -> Path:
        """Directory for downloads and data sets."""
        from sparse_exp.sources.cache import cache_directory

        return cache_directory(self.experiment.paths.cache)

    @cached_property
    def zoo(self) -> Path:
        """The local zoo; it may not exist yet."""
        from sparse_exp.sources.local import zoo_directory

        return zoo_directory(self.experiment.paths.zoo)

    @cached_property
    def dataset(self) -> DetectionDataset:
        """The data set, built or read; ready at once when the fetch stage has seen it."""
        from sparse_exp.data import prepare

        return prepare(self.experiment.dataset, self.cache)

    @cached_property
    def cores(self) -> int:
        """Cores that engines run on: the first of ``hardware.cores``, or all usable physical ones."""
        from sparse_exp.hardware import usable_physical_cores

        return next(iter(self.experiment.hardware.cores), usable_physical_cores())

    @cached_property
    def precision(self) -> Precision:
        """How floating-point phases compute on this host."""
        from sparse_exp.hardware import has_bf16
        from sparse_exp.training.precision import choose_precision

        return choose_precision(self.experiment.trainer, has_bf16=has_bf16())

    @cached_property
    def threads(self) -> int:
        """Threads of each training process."""
        from sparse_exp.training.threads import training_threads

        return training_threads(self.experiment)

    def loader(self, split: str, *, train: bool = False) -> DetectionLoader:
        """Batches of a split, shuffled and augmented for training; images are read once a run."""
        if (split, train) not in self._loaders:
            self._loaders[split, train] = self._make_loader(split, train=train)
        return self._loaders[split, train]

    def _make_loader(self, split: str, *, train: bool) -> DetectionLoader:
        from sparse_exp.data.loader import make_loader

        trainer, dataset = self.experiment.trainer, self.experiment.dataset
        return make_loader(
            self.dataset.splits[split],
            len(self.dataset.names),
            imgsz=dataset.imgsz,
            batch_size=trainer.batch_size if train else trainer.val_batch_size,
            train=train,
            seed=self.experiment.seed,
            workers=dataset.workers,
            augment=trainer.augment,
        )

    @property
    def checkpoint(self) -> Path:
        """The trained checkpoint: what ``checkpoint=`` names, else what the train stage chose.

        Raises:
            ConfigError: there is neither.
        """
        if self.experiment.checkpoint:
            return Path(self.experiment.checkpoint).expanduser()
        record = self.run.records.get("train")
        if record is None:
            raise ConfigError("No trained checkpoint. Give one with checkpoint=PATH, or add train to stages.")
        return self.run.path / str(record.facts["checkpoint"])

    @property
    def planned_sparsity(self) -> float:
        """Share of zeros that the plan promised, 0..1; 0 where nothing was planned."""
        return float(self.facts("plan").get("sparsity", 0.0))

    def deployed(self, engine: str) -> Path:
        """The variant ``sparse`` for an engine: integer graph, QDQ where integers are slow, or checkpoint."""
        if engine == "torch":
            return self.checkpoint
        folder = self.run.path / "deployment"
        qdq = folder / "model.qdq.onnx"
        return qdq if engine != "deepsparse" and qdq.is_file() else folder / "model.onnx"

    def facts(self, stage: str) -> dict[str, Any]:
        """What a finished stage left for others; empty when it did not run."""
        record = self.run.records.get(stage)
        return record.facts if record else {}


@dataclass(frozen=True)
class Outcome:
    """What a stage returns.

    Attributes:
        files: files it wrote below the run directory.
        metrics: numbers and texts for ``result.json``.
        facts: plain data for later stages.
        spent: files that nobody needs once the stage is recorded; they are deleted then.
    """

    files: list[Path] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    spent: list[Path] = field(default_factory=list)
