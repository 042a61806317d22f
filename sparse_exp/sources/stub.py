"""SparseZoo stubs: their two grammars, and the files that they name.

SparseZoo closed in June 2025, and its service may be gone for good. Wherever a stub is accepted, so is a
local file. The service is asked as SparseZoo's client 1.8.1 asked it: a GraphQL query for the model's files,
whose answer names an address for each, and then plain downloads.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tarfile
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from sparse_exp.errors import ConfigError, SourceUnavailable, expected, first_line
from sparse_exp.sources.download import NETWORK, download, opened
from sparse_exp.sources.layout import CHECKPOINT_SUFFIXES, choose_checkpoint, choose_recipe

STUB_PREFIX = "zoo:"
PARAMETERS = ("recipe", "recipe_type", "checkpoint", "deployment")
_SERVICE, _SERVICE_VARIABLE = "https://api.neuralmagic.com", "SPARSEZOO_API_URL"
_QUERY = "{ models(%s) { files(version: 2) { displayName downloadUrl fileType } } }"
_TRAINING = ("training", "framework")  # kinds of files
_NAME = r"[A-Za-z0-9_.]+"
_V1 = re.compile(
    rf"(?P<domain>{_NAME})/(?P<task>{_NAME})/(?P<architecture>{_NAME})(-(?P<sub>{_NAME}))?"
    rf"/(?P<framework>{_NAME})/(?P<repo>{_NAME})/(?P<dataset>{_NAME})(-{_NAME})?/(?P<tag>[A-Za-z0-9_.-]+)"
)
# The parts of a stub of the first grammar by the names that the service has for them.
_ARGUMENTS = {
    "domain": "domain", "task": "task", "architecture": "architecture", "subArchitecture": "sub",
    "framework": "framework", "repo": "repo", "sourceDataset": "dataset", "sparseTag": "tag",
}  # fmt: skip
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


def download_stub(text: str, file: Path, unfinished: Path) -> None:
    """Download the file of a stub from SparseZoo's service.

    Args:
        text: the stub; with ``recipe`` or ``recipe_type`` its recipe, else its checkpoint.
        file: where it goes.
        unfinished: keeps what came of a download that stopped, for the next call.

    Raises:
        SourceUnavailable: the service does not answer, or has no such file.
        OSError: the disk is full.
    """
    stub = parse_stub(text)
    files = _files(stub)
    if stub.names_recipe:
        which = stub.parameters.get("recipe") or stub.parameters.get("recipe_type")
        name = choose_recipe([name for name, one in files.items() if one.kind == "recipe"], which, text)
    else:
        name = _checkpoint_or_archive(stub, files)
    download(files[name].url, unfinished, name)
    if name.endswith(".tar.gz"):
        _extract(stub, unfinished, file)
        unfinished.unlink()
    else:
        unfinished.replace(file)


@dataclass(frozen=True)
class _File:
    """A file of a model on the service: its kind, such as ``recipe``, and its address."""

    kind: str
    url: str


def _files(stub: Stub) -> dict[str, _File]:
    """The files of a model by their names, as the service lists them."""
    try:
        models = _asked(_QUERY % _arguments(stub))["data"]["models"]
        listed = models[0]["files"] if models else []
        files = {str(one["displayName"]): _File(one["fileType"], one["downloadUrl"]) for one in listed}
    except (*NETWORK, ValueError, LookupError, TypeError) as error:
        reason = first_line(error).rstrip(".")
        raise SourceUnavailable(
            f"SparseZoo does not answer for {stub.text} ({reason[:100]}). The service closed in 2025: give a "
            "local file instead, such as recipe.file=PATH, recipe.teacher=PATH or model.weights=PATH."
        ) from error
    if not files:
        do = "Correct the stub, or give a local file."
        raise SourceUnavailable(f"Expected SparseZoo to have {stub.text}, but it knows no such model. {do}")
    return files


def _asked(query: str) -> Any:
    """The service's answer to a query.

    Raises:
        OSError: it does not answer, or refuses.
        ValueError: the answer is no JSON, or names an error.
    """
    address = f"{os.environ.get(_SERVICE_VARIABLE) or _SERVICE}/v2/graphql"
    headers = {"Content-Type": "application/json", "User-Agent": "sparse_exp"}
    request = urllib.request.Request(address, json.dumps({"query": query}).encode(), headers)
    with opened(request) as response:
        answer = json.load(response)
    if "errors" in answer:
        raise ValueError(answer["errors"][0]["message"])
    return answer


def _arguments(stub: Stub) -> str:
    """What names the model in a query."""
    path = stub.text.removeprefix(STUB_PREFIX).partition("?")[0]
    match = _V1.fullmatch(path)
    values = {name: match[part] for name, part in _ARGUMENTS.items()} if match else {"repoName": path}
    return ", ".join(f'{name}: "{value}"' for name, value in values.items() if value)


def _checkpoint_or_archive(stub: Stub, files: Mapping[str, _File]) -> str:
    """The name of a model's checkpoint, or of the archive that it is in."""
    names = [name for name, one in files.items() if one.kind in _TRAINING]
    single = [name for name in names if name.endswith(CHECKPOINT_SUFFIXES)]
    archive = next((name for name in names if name.endswith(".tar.gz")), None)
    if archive and not single:
        return archive
    return choose_checkpoint(single, stub.parameters.get("checkpoint"), stub.text)


def _extract(stub: Stub, archive: Path, file: Path) -> None:
    """Take the checkpoint out of an archive."""
    try:
        with tarfile.open(archive) as content:
            members = {PurePosixPath(one.name).name: one for one in content if one.isfile()}
            names: Sequence[str] = [name for name in members if name.endswith(CHECKPOINT_SUFFIXES)]
            name = choose_checkpoint(names, stub.parameters.get("checkpoint"), stub.text)
            source = content.extractfile(members[name])
            assert source is not None  # it is a file
            with source, file.open("wb") as target:
                shutil.copyfileobj(source, target)
    except tarfile.TarError as error:
        raise SourceUnavailable(
            f"What SparseZoo has for {stub.text} is no whole archive: {error}."
        ) from error
