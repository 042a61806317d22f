"""The start checkpoint of a run: the first of the model's sources that serves."""

from __future__ import annotations

import logging
from pathlib import Path

from sparse_exp.config.schema import ModelConfig, SourceConfig
from sparse_exp.errors import SourceUnavailable
from sparse_exp.zoo.sources import FetchedFile, cached, fetch

_log = logging.getLogger(__name__)
SCRATCH = "scratch"


def sources_of(model: ModelConfig) -> list[SourceConfig]:
    """Where to look, in order: ``model.weights`` if it is set, else ``model.sources``."""
    return [SourceConfig(uri=model.weights)] if model.weights else list(model.sources)


def cached_start(model: ModelConfig, cache: Path) -> FetchedFile | None:
    """The start checkpoint if it is on this machine already; nothing is fetched."""
    if model.weights == SCRATCH:
        return None
    return next((file for source in sources_of(model) if (file := cached(source, cache))), None)


def fetch_start(model: ModelConfig, cache: Path) -> FetchedFile | None:
    """Fetch the start checkpoint from the first source that serves.

    Args:
        model: names the sources.
        cache: directory for downloads.

    Returns:
        The file, or None where ``model.weights=scratch`` asks for random weights.

    Raises:
        SourceUnavailable: no source serves; the message names each one's reason.
    """
    if model.weights == SCRATCH:
        return None
    ready = cached_start(model, cache)
    if ready:
        return ready
    reasons = []
    for source in sources_of(model):
        try:
            return fetch(source, cache)
        except SourceUnavailable as error:
            _log.info("%s", error)
            reasons.append(str(error))
    do = "Give a checkpoint with model.weights=PATH, or start from random weights: model.weights=scratch."
    raise SourceUnavailable(f"{' '.join(reasons) or f'{model.name} names no source.'} {do}")
