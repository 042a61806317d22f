"""Find the layers of a model that names and patterns in a recipe stand for, as SparseML does."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from re import _parser  # type: ignore[attr-defined]
from typing import Any

from torch import nn

from sparse_exp.errors import RecipeError
from sparse_exp.recipes.modifiers import ALL, ALL_PRUNABLE, Modifier, as_list

_MOST_REPEATS = 6
_PRUNABLE = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.Linear, nn.Embedding),
)


def matches_parameter(target: str, parameter: str) -> bool:
    """Whether a target of a modifier's ``params`` matches a parameter.

    Args:
        target: a parameter's full name; ``re:`` and a pattern that its beginning must match; ``__ALL__``; or
            ``__ALL_PRUNABLE__``, which matches all weights here.
        parameter: full name.
    """
    if target == ALL:
        return True
    if target == ALL_PRUNABLE:
        return parameter.endswith(".weight")
    return _begins(target[3:], parameter) if target.startswith("re:") else target == parameter


def parameters_matching(targets: Sequence[str], model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that at least one target matches, with their names, in the model's order.

    Args:
        targets: see `matches_parameter`; ``__ALL_PRUNABLE__`` matches the weights of convolutions and linear
            layers.
        model: with or without quantizers, which change no names.

    Raises:
        RecipeError: a pattern is no regular expression.
    """
    prunable = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, _PRUNABLE)}

    def matches(target: str, name: str) -> bool:
        return name in prunable if target == ALL_PRUNABLE else matches_parameter(target, name)

    try:
        return [
            (name, parameter)
            for name, parameter in model.named_parameters()
            if any(matches(target, name) for target in targets)
        ]
    except re.error as error:
        raise _no_pattern(error) from error


def _by_parameter(target: str, model: nn.Module) -> list[str]:
    return [name.rpartition(".")[0] for name, _ in parameters_matching([target], model)]


def _by_module(target: str, model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules() if name == target]


def _by_module_or_pattern(target: str, model: nn.Module) -> list[str]:
    if target.startswith("re:"):
        return [name for name, _ in model.named_modules() if _begins(target[3:], name)]
    return [target] if target in (ALL, ALL_PRUNABLE) else _by_module(target, model)


def _by_prefix_or_type(target: str, model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if n.startswith(target) or type(m).__name__ == target]


def _by_type(target: str, model: nn.Module) -> list[str]:
    # Published recipes also exclude types of other architectures: any type that torch knows is accepted.
    known = [target] if hasattr(nn, target) else []
    return known + [name for name, module in model.named_modules() if type(module).__name__ == target]


# For each attribute of a modifier that names layers, a function from a target and a model to layers' names.
_MATCHERS: dict[str, Callable[[str, nn.Module], list[str]]] = {
    "params": _by_parameter,
    "param": _by_parameter,
    "final_sparsity": _by_parameter,
    "layers": _by_module_or_pattern,
    "submodules": _by_module,
    "student_layer_names": _by_module,
    "ignore": _by_prefix_or_type,
    "scheme_overrides": _by_prefix_or_type,
    "exclude_module_types": _by_type,
    "custom_quantizable_module_types": _by_type,
}


def targets_of(modifier: Modifier) -> Iterator[tuple[str, str]]:
    """(attribute, target) for each name or pattern in a modifier that must match something."""
    arguments = modifier.arguments
    optional = {"params", "param"} if arguments.get("params_strict") is False else set()
    if arguments.get("strict") is False:
        optional |= {"ignore", "scheme_overrides"}
    for attribute in _MATCHERS:
        given = arguments.get(attribute) or []
        if attribute == "final_sparsity":
            given = [t for each in given.values() for t in as_list(each)] if isinstance(given, dict) else []
        if attribute not in optional:
            names = (
                list(given) if isinstance(given, dict) else as_list(given)
            )  # the types in scheme_overrides
            yield from ((attribute, target) for target in names)


def layers_matching(attribute: str, target: str, model: nn.Module) -> list[str]:
    """Published names of the layers that a target matches, in the model's order; empty if it matches none.

    Args:
        attribute: of the modifier, see `targets_of`.
        target: a name or pattern in this attribute.
        model: before or after quantization.

    Raises:
        RecipeError: a pattern is no regular expression.
    """
    try:
        return list(dict.fromkeys(_MATCHERS[attribute](target, model)))
    except re.error as error:
        raise _no_pattern(error) from error


def _begins(pattern: str, name: str) -> bool:
    return bool(_compiled(pattern).match(name))


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    """A pattern whose matching takes a moment at most: ``(a+)+b`` takes 2^40 steps for a name of 40 letters.

    Raises:
        re.error: it is none, or may take longer.
    """
    try:
        if _open_repeats(_parser.parse(pattern), repeated=False) > _MOST_REPEATS:
            raise re.error(f"it has more than {_MOST_REPEATS} parts that repeat", pattern)
        return re.compile(pattern)
    except (RecursionError, OverflowError) as error:
        raise re.error("it is nested too deeply, or repeats too often", pattern) from error


def _open_repeats(parts: Iterable[tuple[Any, Any]], *, repeated: bool) -> int:
    """How many parts of a parsed pattern repeat a number of times that the pattern leaves open.

    Args:
        parts: as Python's own parser gives them.
        repeated: whether they stand in a part that repeats.

    Raises:
        re.error: such a part, or a choice, stands in a part that repeats.
    """
    count = 0
    for kind, value in parts:
        inner: list[Any] = []
        twice = repeated
        match str(kind):
            case "MAX_REPEAT" | "MIN_REPEAT":
                least, most, body = value
                count, inner, twice = count + (least != most), [body], repeated or most > 1
                if repeated and least != most:
                    raise re.error("a part that repeats stands in one that repeats")
            case "BRANCH":
                inner = value[1]
                if repeated:
                    raise re.error("a choice stands in a part that repeats")
            case "SUBPATTERN":
                inner = [value[-1]]
            case "ASSERT" | "ASSERT_NOT":
                inner = [value[1]]
            case "GROUPREF_EXISTS":
                inner = [part for part in value[1:] if part]
        count += sum(_open_repeats(part, repeated=twice) for part in inner)
    return count


def _no_pattern(error: re.error) -> RecipeError:
    pattern = f"re:{error.pattern!s}"
    return RecipeError(f"The pattern {pattern!r} is no regular expression ({error}). Correct it.")


def check_target(attribute: str, target: str, model: nn.Module, owner: str) -> None:
    """Refuse a target that matches no layer.

    Args:
        attribute: see `layers_matching`.
        target: see `layers_matching`.
        model: before quantization.
        owner: the modifier and its recipe, for the message.

    Raises:
        RecipeError: the message gives the names in the model that are most similar.
    """
    if not layers_matching(attribute, target, model):
        raise RecipeError(
            f"{owner} names {target!r} in {attribute}, which matches no layer of the model. "
            f"Correct it; the nearest names are {', '.join(_similar_names(attribute, target, model))}."
        )


def _similar_names(attribute: str, target: str, model: nn.Module) -> list[str]:
    """Up to three names in the model that are most similar to a target; of its own kind of names."""
    if _MATCHERS[attribute] is _by_parameter:
        names = [name for name, _ in model.named_parameters()] + [ALL, ALL_PRUNABLE]
    else:
        names = [] if attribute.endswith("types") else [name for name, _ in model.named_modules() if name]
        types = sorted({type(module).__name__ for module in model.modules()})
        names += [] if _MATCHERS[attribute] is _by_module else types
    wanted = target.removeprefix("re:")
    similar = difflib.get_close_matches(wanted, names, n=3, cutoff=0.3)
    same_but_case = [name for name in names if name.lower() == wanted.lower()]
    return list(dict.fromkeys([*same_but_case, *(similar or names[:3])]))[:3]
