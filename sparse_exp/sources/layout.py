"""Where checkpoints and recipes lie in a directory in SparseZoo's layout."""

from __future__ import annotations

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
    files = _checkpoints(directory)
    before = [path for path in files if _is_before_qat(path.name)]
    final = [path for path in files if path not in before]
    final.sort(key=lambda path: (path.name != FINAL, path.name))
    # A model that was never quantized is what it was before quantization.
    choices = {None: [*before, *final], "preqat": [*before, *final], "postqat": final}
    named = [path for path in files if path.name == which]
    for path in choices.get(which, named):
        return path
    names = ", ".join(path.name for path in files) or "none"
    do = "Give a directory in SparseZoo's layout, with a checkpoint in training/."
    if files:
        do = f"It has {names}; choose with ?checkpoint=preqat, ?checkpoint=postqat or a file's name."
    what = f"the checkpoint {which}" if which else "a checkpoint"
    raise SourceUnavailable(f"Expected {directory} to hold {what}, but found {names}. {do}")


def recipe_in(directory: Path, which: str | None = None) -> Path:
    """The recipe in a directory in SparseZoo's layout.

    Args:
        directory: of the model.
        which: as after ``?recipe=`` in a stub; None or ``original``: the recipe that made the model.

    Raises:
        SourceUnavailable: there is no such recipe; the message names those that the directory has.
    """
    wanted = which or "original"
    names = [f"recipe_{wanted}.md", f"recipe_{wanted}.yaml"]
    names += ["recipe.md", "recipe.yaml"] if wanted == "original" else []
    for name in names:
        if (directory / name).is_file():
            return directory / name
    found = sorted(path.name for path in directory.glob("recipe*")) if directory.is_dir() else []
    do = "Choose one of these with ?recipe=NAME, or give a local file."
    names_found = ", ".join(found) or "none"
    raise SourceUnavailable(
        f"Expected {directory} to hold the recipe {wanted}, but found {names_found}. {do}"
    )


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
