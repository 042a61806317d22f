"""SparseZoo stubs: their two grammars, and the files that they name.

SparseZoo closed in June 2025, and its service may be gone for good. Wherever a stub is accepted, so is a
local file. The client is imported when a stub is fetched, and nowhere else.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_exp.errors import ConfigError, SourceUnavailable, expected, first_line
from sparse_exp.sources.layout import checkpoint_in

STUB_PREFIX = "zoo:"
PARAMETERS = ("recipe", "recipe_type", "checkpoint", "deployment")
_TIMEOUT_S = (5.0, 20.0)  # to connect, to answer
_NAME = r"[A-Za-z0-9_.]+"
_V1 = re.compile(
    rf"{_NAME}/{_NAME}/(?P<architecture>{_NAME})(-(?P<sub>{_NAME}))?/{_NAME}/{_NAME}"
    rf"/(?P<dataset>{_NAME})(-{_NAME})?/(?P<tag>[A-Za-z0-9_.-]+)"
)
_V2 = re.compile(
    rf"(?P<architecture>{_NAME})(-(?P<sub>{_NAME}))?-(?P<dataset>{_NAME})(-{_NAME})?-(?P<tag>{_NAME})"
)
_FORMS = (
    "zoo:DOMAIN/SUBDOMAIN/ARCHITECTURE[-SUB]/FRAMEWORK/REPO/DATASET[-SCHEME]/TAG or "
    "zoo:ARCHITECTURE[-SUB]-DATASET[-TRAINING_DATASET]-TAG"
)


@dataclass(frozen=True)
class Stub:
    """The parts of a stub.

    Attributes:
        text: as given, ``zoo:`` and parameters included.
        architecture: such as ``yolov5``.
        sub: its variant, such as ``s``; empty where the stub names none.
        dataset: that the model was trained on, such as ``coco``; in the second grammar the first of two.
        tag: how it was made sparse, such as ``pruned75_quant-none``.
        parameters: after the question mark: which recipe, checkpoint or deployment.
    """

    text: str
    architecture: str
    sub: str
    dataset: str
    tag: str
    parameters: Mapping[str, str]

    @property
    def names_recipe(self) -> bool:
        """Whether it asks for a recipe rather than for a checkpoint."""
        return bool({"recipe", "recipe_type"} & set(self.parameters))


def parse_stub(text: str) -> Stub:
    """Read a stub of either grammar; nothing is fetched.

    Args:
        text: ``zoo:...``, perhaps with ``?key=value&key=value``.

    Raises:
        ConfigError: it is of neither grammar, or has an unknown parameter.
    """
    path, question, query = text.removeprefix(STUB_PREFIX).partition("?")
    match = (_V1 if "/" in path else _V2).fullmatch(path)
    if match is None or not text.startswith(STUB_PREFIX):
        raise ConfigError(expected("the SparseZoo stub", _FORMS, text, "Correct the stub."))
    pairs = [pair.partition("=") for pair in query.split("&")] if question else []
    if any(key not in PARAMETERS or not value for key, _, value in pairs):
        form = f"key=value, joined by &, of {', '.join(PARAMETERS)}"
        raise ConfigError(expected(f"what follows ? in {text}", form, query, "Correct the stub."))
    parameters = {key: value for key, _, value in pairs}
    return Stub(text, match["architecture"], match["sub"] or "", match["dataset"], match["tag"], parameters)


def file_name(text: str) -> str:
    """The name of a stub's file in the cache."""
    stub = parse_stub(text)
    return f"{stub.architecture}-{stub.sub}-{stub.dataset}-{stub.tag}.{'md' if stub.names_recipe else 'pt'}"


def download_stub(text: str, file: Path, folder: Path) -> None:
    """Download the file of a stub through SparseZoo's client.

    Args:
        text: the stub; with ``recipe`` or ``recipe_type`` its recipe, else its checkpoint.
        file: where it goes.
        folder: for the client's own files.

    Raises:
        SourceUnavailable: the service does not answer, or has no such file.
        OSError: the disk is full.
    """
    stub = parse_stub(text)
    try:
        with _short_timeouts():
            shutil.copyfile(_fetched_by_client(stub, folder / "sparsezoo"), file)
    except SourceUnavailable:
        raise
    except Exception as error:  # of requests, of JSON, of the client itself
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise
        reason = first_line(error).rstrip(".")
        if not 0 < len(reason) < 100:  # messages on failed connections are long
            reason = type(error).__name__
        raise SourceUnavailable(
            f"SparseZoo does not answer for {text} ({reason}). The service closed in 2025: give a local "
            "file instead, such as recipe.file=PATH, recipe.teacher=PATH or model.weights=PATH."
        ) from error


def _fetched_by_client(stub: Stub, folder: Path) -> Path:
    os.environ.setdefault("NM_DISABLE_ANALYTICS", "True")  # read when the client is imported
    from sparsezoo import Model

    model = Model(stub.text, download_path=str(folder))
    if stub.names_recipe:
        return Path(model.recipes.default.path)
    _ = model.training.default.path  # fetches it; single files do not land where this says
    return checkpoint_in(folder, stub.parameters.get("checkpoint"))


@contextmanager
def _short_timeouts() -> Iterator[None]:
    """Give the client's requests a time limit; without one they wait minutes for a dead host."""
    from requests.adapters import HTTPAdapter

    send = HTTPAdapter.send

    def limited(self: Any, *args: Any, **options: Any) -> Any:
        return send(self, *args, **{**options, "timeout": options.get("timeout") or _TIMEOUT_S})

    HTTPAdapter.send = limited  # type: ignore[method-assign]
    try:
        yield
    finally:
        HTTPAdapter.send = send  # type: ignore[method-assign]
