"""The data set and the start checkpoint, on this machine and verified."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sparse_exp.config.schema import Experiment
from sparse_exp.data import check_dataset, is_prepared
from sparse_exp.errors import DataError
from sparse_exp.runs.directory import StageRecord
from sparse_exp.sources.cache import cache_directory
from sparse_exp.sources.local import zoo_directory
from sparse_exp.sources.start import SCRATCH, StartFile, cached_start, fetch_start
from sparse_exp.stages.base import Context, Outcome, Stage
from sparse_exp.tracking import Dataset, Event, Tags, as_plain

if TYPE_CHECKING:
    from sparse_exp.data import DetectionDataset

_log = logging.getLogger(__name__)


def _run(context: Context) -> Outcome:
    dataset = context.dataset
    boxes = check_dataset(dataset)
    for split, samples in dataset.splits.items():
        _log.info("%s/%s: %d images, %d boxes", dataset.name, split, len(samples), boxes[split])
    facts: dict[str, Any] = {
        "dataset": dataset.digest,
        "boxes": boxes,
        "names": list(dataset.names),
        "skipped": dataset.skipped,
    }
    if "train" in context.experiment.stages:
        facts |= _start_facts(_find_start(context))
        if facts["sha256"]:
            _log.info("Start weights: %s, sha256 %s", facts["origin"], facts["sha256"])
    origin = {"weights/origin": facts["origin"]} if "origin" in facts else {}
    return Outcome(metrics=origin, facts=facts, events=_events(context, facts))


def _find_start(context: Context) -> StartFile | None:
    """The start checkpoint, which the fingerprint was taken of already: no source is asked twice."""
    places = context.experiment.model, context.cache, context.zoo
    return cached_start(*places) or fetch_start(*places)


def _start_facts(start: StartFile | None) -> dict[str, str]:
    return start.as_facts() if start else {"origin": SCRATCH, "sha256": ""}


def _events(context: Context, facts: Mapping[str, Any]) -> list[Event]:
    dataset = context.dataset
    inputs: list[Event] = [
        Dataset(dataset.name, dataset.digest, str(dataset.root), split, len(samples))
        for split, samples in dataset.splits.items()
    ]
    weights = {f"weights/{name}": facts.get(name) for name in ("origin", "sha256", "grown_from")}
    tags = {"dataset.digest": facts["dataset"], "dataset.skipped": str(facts["skipped"])}
    return [*inputs, Tags({**tags, **{name: text for name, text in weights.items() if text}})]


def _content(context: Context) -> dict[str, str]:
    return content_now(context.experiment, context.facts("fetch"), lambda: context.dataset)


def content_now(
    experiment: Experiment, known: Mapping[str, Any], dataset: Callable[[], DetectionDataset]
) -> dict[str, str]:
    """Digests of the data set and of the start checkpoint as they are now.

    What an earlier start of the run has seen and is no longer on this machine counts as it was: a finished
    run can be looked at and published without its data.

    Args:
        experiment: names them.
        known: facts of the fetch stage of an earlier start; empty where there was none.
        dataset: reads the data set.

    Raises:
        SparseExpError: they cannot be had, or cannot be used.
    """
    cache, zoo = cache_directory(experiment.paths.cache), zoo_directory(experiment.paths.zoo)
    found = {"data set": _data_digest(experiment, known.get("dataset"), dataset)}
    if "train" not in experiment.stages or experiment.model.weights == SCRATCH:
        return found
    start = cached_start(experiment.model, cache, zoo) if known.get("sha256") else None
    if start is None and known.get("sha256"):
        _log.warning("The start checkpoint is not on this machine: it counts as unchanged.")
        return found | {"start checkpoint": str(known["sha256"])}
    start = start or fetch_start(experiment.model, cache, zoo)
    return found | {"start checkpoint": start.file.sha256 if start else ""}


def _data_digest(experiment: Experiment, known: str | None, dataset: Callable[[], DetectionDataset]) -> str:
    name, cache = experiment.dataset.name, cache_directory(experiment.paths.cache)
    if known and not is_prepared(experiment.dataset, cache):
        _log.warning("The data set %s is not on this machine: it counts as unchanged.", name)
        return known
    try:
        return dataset().digest
    except DataError as error:
        if not known:
            raise
        _log.warning("The data set %s cannot be read: it counts as unchanged. %s", name, error)
        return known


def data_content(context: Context) -> dict[str, str]:
    """Digest of a user's own data set, for runs that begin behind this stage.

    Generated data sets are what their version says; and what only such a run needs is not fetched for this.
    """
    if context.experiment.dataset.path is None:
        return {}
    known = context.facts("fetch").get("dataset")
    return {"data set": _data_digest(context.experiment, known, lambda: context.dataset)}


def _adopt(record: StageRecord, context: Context) -> StageRecord | None:
    """A record of an earlier version, with the path of the start checkpoint that it lacks."""
    facts, now = record.facts, _content(context)
    same_start = facts.get("sha256", "") == now.get("start checkpoint", "")
    if facts.get("dataset") != now["data set"] or not same_start:
        return None
    sha256, places = facts.get("sha256"), (context.experiment.model, context.cache, context.zoo)
    start = cached_start(*places) if sha256 else None
    facts = {**facts, "path": str(start.file.path)} if start else facts
    events = _events(context, facts)
    return replace(record, facts=facts, events=[as_plain(event, context.run.path) for event in events])


def _marks(context: Context) -> dict[str, Any]:
    return {"start": "train" in context.experiment.stages}  # which is fetched for a training only


def _certain_names(experiment: Experiment) -> Iterator[str]:
    if "train" in experiment.stages:
        yield "weights/origin"


STAGE = Stage(
    name="fetch",
    run=_run,
    depends_on=("model", "dataset"),
    marks=_marks,
    content=_content,
    shared=lambda _: True,
    light=True,
    certain_names=_certain_names,
    adopt=_adopt,
)
