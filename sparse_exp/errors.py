"""Errors written for users: each message is one line that says what to do next."""

from __future__ import annotations

from collections.abc import Sequence


class SparseExpError(Exception):
    """Base of all errors that are shown to users as one line, without a traceback."""


class ConfigError(SparseExpError):
    """The configuration cannot be run as it is.

    Args:
        problems: every problem found, one sentence or two each; at least one.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class DataError(SparseExpError):
    """A data set, image or label file cannot be used; names the file and, in a label, the line."""


class SourceUnavailable(SparseExpError):
    """A file could not be fetched, or is not the file that was promised."""


class CheckpointError(SparseExpError):
    """A checkpoint cannot be read, asks to run code, or belongs to another architecture."""


class RecipeError(SparseExpError):
    """A recipe cannot be read, or does not fit the model or the schedule."""


class SparsityError(SparseExpError):
    """Weights that were promised to stay zero did not, or a file is not as sparse as it should be."""


class ExportError(SparseExpError):
    """An exported graph failed one of its checks."""


class EngineError(SparseExpError):
    """An inference engine cannot load or run a model here."""


class Impossible(SparseExpError):
    """There is no file for this engine and this variant, and there cannot be; says why."""


class MissingDependency(SparseExpError):
    """A package that the configuration asks for is not installed."""


class StageFailed(SparseExpError):
    """A stage stopped for a reason that is not the user's; its traceback is in the run's log."""


def for_users(error: Exception) -> Exception:
    """The error, but where a package is missing that a small installation does not have, what to install."""
    if not isinstance(error, ModuleNotFoundError) or (error.name or "sparse_exp").startswith("sparse_exp"):
        return error
    do = "Run: pip install 'sparse-exp[train]'."
    return MissingDependency(f"This needs the package {error.name}, which is not installed. {do}")


def first_line(error: BaseException) -> str:
    """The first line of another library's message; the name of its kind where there is none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def expected(what: str, should_be: str, got: object, do: str) -> str:
    """The house's error sentence: ``Expected WHAT to be RANGE, but got VALUE. WHAT TO DO.``"""
    return f"Expected {what} to be {should_be}, but got {got!r}. {do}"
