"""Where checkpoints and recipes lie in a directory in SparseZoo's layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sparse_exp.errors import SourceUnavailable

TRAINING, DEPLOYMENT = "training", "deployment"
FINAL, BEFORE_QAT = "model.pt", "checkpoint_preqat.pt"
CHECKPOINT_SUFFIXES = (".pt", ".pth", ".safetensors")


def checkpoint_in(directory: Path, which: str | None = None) -> Path:
    """The checkpoint in a directory in SparseZoo's layout, ours or SparseZoo's own.

    Args:
        directory: of the model; its checkpoints lie in ``training``, or where there is none in itself.
        which: ``preqat``: before quantization-aware training; ``postqat``: after it, the final one; or a
            file's name. None: the one before quantization where there is one, to be trained further.

    Raises:
        SourceUnavailable: there is no such checkpoint; the message names those that the directory has.
    """
    files = {path.name: path for path in reversed(_checkpoints(directory))}
    return files[choose_checkpoint(list(files), which, str(directory))]


def choose_checkpoint(names: Sequence[str], which: str | None, place: str) -> str:
    """The name of the checkpoint that is meant.

    Args:
        names: of the checkpoints that there are.
        which: see `checkpoint_in`.
        place: that has them, for the message.

    Raises:
        SourceUnavailable: see `checkpoint_in`.
    """
    before = [name for name in sorted(names) if _is_before_qat(name)]
    final = [name for name in sorted(names) if name not in before]
    final.sort(key=lambda name: name != FINAL)
    # A model that was never quantized is what it was before quantization.
    choices = {None: [*before, *final], "preqat": [*before, *final], "postqat": final}
    named = [name for name in names if name == which]
    for name in choices.get(which, named):
        return name
    listed = ", ".join(sorted(names)) or "none"
    do = "Give a directory in SparseZoo's layout, with a checkpoint in training/."
    if names:
        do = f"It has {listed}; choose with ?checkpoint=preqat, ?checkpoint=postqat or a file's name."
    what = f"the checkpoint {which}" if which else "a checkpoint"
    raise SourceUnavailable(f"Expected {place} to hold {what}, but found {listed}. {do}")


def recipe_in(directory: Path, which: str | None = None) -> Path:
    """The recipe in a directory in SparseZoo's layout.

    Args:
        directory: of the model.
        which: as after ``?recipe=`` in a stub; None or ``original``: the recipe that made the model.

    Raises:
        SourceUnavailable: there is no such recipe; the message names those that the directory has.
    """
    found = [path.name for path in directory.glob("recipe*")] if directory.is_dir() else []
    return directory / choose_recipe(found, which, str(directory))


def choose_recipe(names: Sequence[str], which: str | None, place: str) -> str:
    """The name of the recipe file that is meant.

    Args:
        names: of the recipe files that there are.
        which: see `recipe_in`.
        place: that has them, for the message.

    Raises:
        SourceUnavailable: see `recipe_in`.
    """
    wanted = which or "original"
    choices = [f"recipe_{wanted}.md", f"recipe_{wanted}.yaml"]
    choices += ["recipe.md", "recipe.yaml"] if wanted == "original" else []
    for name in choices:
        if name in names:
            return name
    do = "Choose one of these with ?recipe=NAME, or give a local file."
    listed = ", ".join(sorted(names)) or "none"
    raise SourceUnavailable(f"Expected {place} to hold the recipe {wanted}, but found {listed}. {do}")


def _checkpoints(directory: Path) -> list[Path]:
    for folder in (directory / TRAINING, directory):
        if folder.is_dir():
            files = [p for p in folder.rglob("*") if p.suffix in CHECKPOINT_SUFFIXES and p.is_file()]
            if files:
                return sorted(files)
    return []


def _is_before_qat(name: str) -> bool:
    """Older models of SparseZoo have ``model.ckpt.pt``; newer ones, and ours, say ``preqat``."""
    return "preqat" in name.lower() or ".ckpt" in name.lower()
