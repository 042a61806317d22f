"""The fingerprint of a stage: a digest of everything that its result depends on.

Where it is the same, a finished stage is kept when its run goes on, and jobs of a sweep share what one of
them made. It takes in the configuration, the content of the files that it names (`Stage.content`),
the version of this package, and the fingerprint of the stages before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sparse_exp import __version__
from sparse_exp.config.plain import as_dict
from sparse_exp.errors import ConfigError
from sparse_exp.files import fingerprint, sha256_of
from sparse_exp.runs.directory import StageRecord
from sparse_exp.stages.base import Context, Stage
from sparse_exp.stages.fetch import data_content

# Any number of workers and any cache read the same images, so they may change while a run goes on.
_HOW_IT_COMPUTES = {"dataset": ("workers", "cache")}
_ANY = object()
# Keys that versions before 0.2 did not have, with the value that says what these versions did.
_NEW: Mapping[str, Any] = {
    "dataset": {"cache": _ANY},
    "model": {"anchors": "start", "macs": None, "speedup": None, "most_epochs": 12.0},
    "recipe": {"engine": "native", "channels": None},  # SparseML ran recipes, to the same masks and rates
    "trainer": {
        "augment": {"degrees": 0.0, "shear": 0.0, "mixup": 0.0, "copy_paste": 0.0},
        "close_mosaic": 0.0,
        "device": "auto",
        "ema_tau": None,
        "freeze": [],
        "monitor": "map50",
        "quantize_from": _ANY,  # quantized recipes are planned once more all the same
        "val_every": 1,
        "warmup_momentum": None,
    },
}
_VERSION, _BEFORE = "the version of sparse_exp", "a stage before it"


@dataclass(frozen=True)
class Fingerprint:
    """What a stage, and with it the stages behind it, build on.

    Attributes:
        mark: the digest; "" before the first stage.
        parts: digest of each thing that it takes in, by its name in words.
        earlier: as versions before 0.2 took it, without the content of files; None: what such a version
            recorded is not kept.
        has_checkpoint: whether the content of the given checkpoint is taken in.
    """

    mark: str = ""
    parts: Mapping[str, str] = field(default_factory=dict)
    earlier: str | None = ""
    has_checkpoint: bool = False

    def changes(self, record: StageRecord) -> list[str]:
        """What is not as it was when a stage was recorded, in words; empty where that is not known."""
        if not record.parts:
            return []
        return [
            name for name in {**record.parts, **self.parts} if record.parts.get(name) != self.parts.get(name)
        ]


def take_fingerprint(context: Context, stage: Stage, before: Fingerprint) -> Fingerprint:
    """Take the fingerprint of a stage.

    Args:
        context: of the run.
        stage: that is about to run.
        before: of the stages before it.

    Raises:
        SparseExpError: files that it depends on cannot be had, or cannot be used.
    """
    config, content = as_dict(context.experiment), dict(stage.content(context))
    parts = {key: config[key] for key in stage.depends_on} | dict(stage.marks(context))
    if not before.mark and "dataset" not in parts:  # the fingerprint of the stages before would say it
        parts |= {key: config[key] for key in ("dataset", "seed")}
        content |= data_content(context)
    takes_checkpoint = stage.takes_checkpoint and not before.has_checkpoint
    if takes_checkpoint:
        parts["checkpoint"] = _given_checkpoint(context)
    named = {_BEFORE: before.mark, _VERSION: __version__}
    counted, known_before = _without(parts, _HOW_IT_COMPUTES), _as_before(parts)
    named |= {key: fingerprint(value) for key, value in counted.items()}
    named |= {content_name(name): digest for name, digest in content.items()}
    with_content = counted | ({"content": content} if content else {})
    mark = fingerprint(stage.name, before.mark, with_content, __version__)
    earlier = (
        None if before.earlier is None else fingerprint(stage.name, before.earlier, known_before, __version__)
    )
    return Fingerprint(mark, named, earlier, before.has_checkpoint or takes_checkpoint)


def content_name(name: str) -> str:
    """What a part of a fingerprint is called that is the content of a file or of a data set."""
    return f"the content of the {name}"


def _without(parts: Mapping[str, Any], keys: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The parts without some keys of groups of the configuration."""
    return {
        name: {key: each for key, each in value.items() if key not in keys[name]} if name in keys else value
        for name, value in parts.items()
    }


def _as_before(parts: Mapping[str, Any], new: Mapping[str, Any] = _NEW) -> dict[str, Any]:
    """The parts as versions before 0.2 had them: without new keys that change nothing."""
    return {
        key: _as_before(value, new[key]) if isinstance(new.get(key), Mapping) else value
        for key, value in parts.items()
        if key not in new or isinstance(new[key], Mapping) or new[key] not in (_ANY, value)
    }


def as_it_was() -> dict[str, Any]:
    """What versions before 0.2 did in place of keys that they did not have, for their records."""
    return {group: _known(keys) for group, keys in _NEW.items()}


def _known(keys: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _known(value) if isinstance(value, Mapping) else value
        for key, value in keys.items()
        if value is not _ANY
    }


def pass_on(stage: Stage, context: Context, before: Fingerprint, own: Fingerprint) -> Fingerprint:
    """What the stages behind a stage build on."""
    if stage.passes_on(context.experiment):
        return own
    return replace(before, has_checkpoint=own.has_checkpoint)


def _given_checkpoint(context: Context) -> str | None:
    """Digest of a checkpoint that was trained before; None where this training makes it, or there is none."""
    if "train" in context.experiment.stages and not context.experiment.checkpoint:
        return None
    try:
        return sha256_of(context.checkpoint)
    except (ConfigError, OSError):  # the stage that needs it says so
        return None
