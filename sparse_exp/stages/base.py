"""What a stage is, what it is given, and what it returns.

Stages hand each other files and the facts of their records, never objects, so that each can run alone and a
run can be resumed between any two of them. A stage's file is light to import: what it computes with is
imported when it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_exp.config.schema import Experiment
from sparse_exp.data import prepare
from sparse_exp.errors import ConfigError, SourceUnavailable, expected
from sparse_exp.files import expanded
from sparse_exp.hardware import has_bf16, usable_physical_cores
from sparse_exp.runs.directory import Run, StageRecord
from sparse_exp.sources.cache import cache_directory
from sparse_exp.sources.local import zoo_directory
from sparse_exp.sources.start import SCRATCH, StartFile, fetch_start
from sparse_exp.tracking import Event, Tracker

if TYPE_CHECKING:
    import torch

    from sparse_exp.data import DetectionDataset
    from sparse_exp.data.loader import DetectionLoader
    from sparse_exp.recipes.recipe import Recipe
    from sparse_exp.training.evaluation import Validation
    from sparse_exp.training.precision import Precision


@dataclass(frozen=True)
class SweepMember:
    """What a run knows of the sweep that it is a job of.

    Attributes:
        directory: of the sweep; the run directories of its jobs lie in it.
        parent: the tracker's name of the sweep's own run; None where it is not tracked.
        job: its number, from 0; None for a run that a job makes for itself, such as its dense counterpart.
        label: what tells the job from the others, as far as its name does not.
        command: which command's job it is; see `sparse_exp.sweep.naming.sweep_name`.
    """

    directory: Path
    parent: str | None
    job: int | None = None
    label: str = ""
    command: str = ""


RunNested = Callable[[Experiment, list[str], SweepMember | None], None]


def _cannot_run(*_: Any) -> None:
    raise NotImplementedError("This context cannot run another experiment")


@dataclass
class Context:
    """One run, for its stages: its configuration, its directory, its tracker, and what several stages need.

    Attributes:
        experiment: the checked configuration.
        run: the run directory; finished stages are found in its records.
        tracker: started.
        recipe: as it will run.
        sweep: the sweep that the run is a job of; None: it is none.
        mismatch: what of the hardware target does not fit this host, a clause each.
        mark: fingerprint of the stage that runs.
        earlier_mark: the same as versions before 0.2 took it; None: nothing of such a version counts.
        conditions: key of the code, packages and host that this process runs with.
        settled: batch and length are numbers, chosen by their rules where the configuration leaves them open.
        run_nested: runs another experiment, given its command line and its sweep.
    """

    experiment: Experiment
    run: Run
    tracker: Tracker
    recipe: Recipe
    sweep: SweepMember | None = None
    mismatch: tuple[str, ...] = ()
    mark: str = ""
    earlier_mark: str | None = None
    conditions: str = ""
    run_nested: RunNested = _cannot_run
    settled: bool = False
    _loaders: dict[tuple[str, bool], DetectionLoader] = field(default_factory=dict, init=False)

    @cached_property
    def cache(self) -> Path:
        """Directory for downloads and data sets."""
        return cache_directory(self.experiment.paths.cache)

    @cached_property
    def zoo(self) -> Path:
        """The local zoo; it may not exist yet."""
        return zoo_directory(self.experiment.paths.zoo)

    @cached_property
    def dataset(self) -> DetectionDataset:
        """The data set, built or read; ready at once when the fetch stage has seen it."""
        return prepare(self.experiment.dataset, self.cache)

    @property
    def start(self) -> StartFile | None:
        """The start checkpoint that the fetch stage found; None: training starts from random weights.

        It is looked for again where that file is gone since, or the stage did not run.

        Raises:
            SourceUnavailable: it cannot be had, or is another now than the fetch stage found.
        """
        facts = self.facts("fetch")
        if facts.get("origin") == SCRATCH:
            return None
        found = StartFile.from_facts(facts) or fetch_start(self.experiment.model, self.cache, self.zoo)
        sha256 = found.file.sha256 if found else ""
        if facts.get("sha256", sha256) != sha256:
            then, do = f"{facts['sha256'][:12]}... as it was fetched", "Run the stage fetch once more."
            raise SourceUnavailable(expected("the start checkpoint", then, f"{sha256[:12]}...", do))
        return found

    @property
    def cores(self) -> int:
        """Cores that engines run on: the first of ``hardware.cores``, or all usable physical ones."""
        return next(iter(self.experiment.hardware.cores), usable_physical_cores())

    @cached_property
    def precision(self) -> Precision:
        """How floating-point phases compute on this host."""
        from sparse_exp.training.precision import choose_precision

        return choose_precision(self.experiment.trainer, has_bf16=has_bf16(), device=self.device)

    @cached_property
    def device(self) -> torch.device:
        """What torch computes on.

        Raises:
            ConfigError: ``trainer.device`` names a GPU that is not there.
        """
        from sparse_exp.training.devices import choose_device

        return choose_device(self.experiment.trainer.device)

    @cached_property
    def threads(self) -> int:
        """Threads of each training process."""
        from sparse_exp.training.threads import training_threads

        return training_threads(self.experiment)

    def loader(self, split: str, *, train: bool = False) -> DetectionLoader:
        """Batches of a split, shuffled and augmented for training; images are read once a run."""
        from sparse_exp.data.loader import make_loader

        if (split, train) not in self._loaders:
            trainer, dataset = self.experiment.trainer, self.experiment.dataset
            self._loaders[split, train] = make_loader(
                self.dataset.splits[split],
                len(self.dataset.names),
                imgsz=dataset.imgsz,
                batch_size=trainer.batch_size if train else trainer.val_batch_size,
                train=train,
                seed=self.experiment.seed,
                workers=dataset.workers,
                augment=trainer.augment,
                cache=dataset.cache,
                folder=self.cache / "decoded",
                pin_memory=self.device.type == "cuda",
                processes=trainer.devices if train else 1,
            )
        return self._loaders[split, train]

    def validation(self, split: str = "val") -> Validation:
        """How accuracies on a split are measured."""
        from sparse_exp.training.evaluation import Validation

        trainer = self.experiment.trainer
        return Validation(
            self.loader(split), len(self.dataset.names), trainer.conf, trainer.iou, trainer.max_det
        )

    @property
    def checkpoint(self) -> Path:
        """The trained checkpoint: what ``checkpoint=`` names, else what the train stage chose.

        Raises:
            ConfigError: there is neither.
        """
        given = self.experiment.checkpoint
        found = expanded(given) if given else self.run.trained_checkpoint
        if found is None:
            raise ConfigError("No trained checkpoint. Give one with checkpoint=PATH, or add train to stages.")
        return found

    @property
    def planned_sparsity(self) -> float:
        """Share of zeros that the plan promised, 0..1; 0 where nothing was planned."""
        return float(self.facts("plan").get("sparsity", 0.0))

    def facts(self, stage: str) -> dict[str, Any]:
        """What a finished stage left for others; empty when it did not run."""
        return self.run.facts(stage)


@dataclass(frozen=True)
class Outcome:
    """What a stage returns.

    Attributes:
        files: files it wrote below the run directory.
        metrics: numbers and texts for ``result.json``.
        facts: plain data for later stages.
        events: what the tracker is told beside the metrics; kept in the record, to be told again.
        spent: files that nobody needs once the stage is recorded; they are deleted then.
    """

    files: list[Path] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    spent: list[Path] = field(default_factory=list)


def _nothing(_: Any) -> dict[str, Any]:
    return {}


def _none(_: Experiment) -> Iterator[str]:
    return iter(())


def _always(_: Experiment) -> bool:
    return True


def _keep(record: StageRecord, _: Context) -> StageRecord | None:
    return record


@dataclass(frozen=True)
class Stage:
    """All that is known of a stage. One instance stands in its file; `sparse_exp.stages.registry` lists them.

    Attributes:
        name: as in ``stages=[...]`` and in the manifest.
        run: does the work.
        depends_on: groups and keys of the configuration that its result depends on, beyond those of the
            stages before it.
        marks: what else its fingerprint depends on, as plain data by name.
        content: digests of files that its fingerprint depends on, by their names in words, such as ``data
            set``; the configuration only says where they lie. They are read each time the run starts.
        passes_on: whether the stages behind it depend on its result.
        shared: whether jobs of a sweep take its result over from each other where their fingerprints agree;
            not where it measures this host, says something of this run alone, or puts it somewhere.
        light: others may measure while it runs: it waits for the network or a disk, or measures itself.
        outside: its result lies outside of the run's directory: a copy of the run has to do it itself.
        computes: torch computes in it, and rounds otherwise with another number of threads.
        takes_checkpoint: it works on a trained checkpoint; the first of these in a run depends on the
            content of the one that ``checkpoint=`` names.
        needs_checkpoint: it cannot run without one, nor without ``train``.
        needs_files: it cannot run without exported files, nor without ``export``.
        wanted: whether it has anything to do in an experiment; where it has not, it is left out.
        certain_names: metrics that its result has for certain.
        possible_names: metrics that it may have, if the data set, the baseline or the host allow.
        check: problems of a configuration, a sentence or two each.
        held: entered when the stage is finished, and left when the stage `held_until` is.
        held_until: name of that stage.
        adopt: a record without parts, as versions before 0.2 wrote, as it is kept; None: it is done again.
    """

    name: str
    run: Callable[[Context], Outcome]
    depends_on: tuple[str, ...] = ()
    marks: Callable[[Context], Mapping[str, Any]] = _nothing
    content: Callable[[Context], Mapping[str, str]] = _nothing
    passes_on: Callable[[Experiment], bool] = _always
    shared: Callable[[Experiment], bool] = lambda _: False
    light: bool = False
    outside: bool = False
    computes: bool = False
    takes_checkpoint: bool = False
    needs_checkpoint: bool = False
    needs_files: bool = False
    wanted: Callable[[Experiment], bool] = _always
    certain_names: Callable[[Experiment], Iterator[str]] = _none
    possible_names: Callable[[Experiment], Iterator[str]] = _none
    check: Callable[[Experiment], Iterator[str]] = _none
    held: Callable[[Context], AbstractContextManager[None]] = lambda _: nullcontext()
    held_until: str = ""
    adopt: Callable[[StageRecord, Context], StageRecord | None] = _keep
