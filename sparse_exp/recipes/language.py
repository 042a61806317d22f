"""The language of recipes: YAML, or Markdown with YAML front matter, with variables, expressions and stages.

It is that of SparseML 1.8, for the files that people have. A recipe is read as plain data, its modifiers as
`Tagged`; what a modifier means is known to `sparse_exp.recipes.modifiers`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import yaml

from sparse_exp.bounded_yaml import read_yaml
from sparse_exp.errors import RecipeError, first_line
from sparse_exp.recipes.expressions import ExpressionError, UnknownName, evaluate, inside, names_in

# Before the front matter there may be comments: Neural Magic's files begin with their licence.
_FRONT_MATTER = re.compile(r"\s*---[ \t\r]*\n(.*?)\n---[ \t\r]*(?:\n|\Z)", re.DOTALL)
_COMMENT = re.compile(r"\s*<!--.*?-->", re.DOTALL)
_LONGEST = 1_000_000  # characters of a recipe
_MOST_VALUES = 1_000_000  # in its modifiers, once variables are put in


class Tagged(dict[str, Any]):
    """A modifier as plain data: its arguments, and the name of its class in ``kind``."""

    def __init__(self, kind: str, arguments: Mapping[str, Any]) -> None:
        super().__init__(arguments)
        self.kind = kind


class _Loader(yaml.SafeLoader):
    """Reads modifiers, which have tags such as ``!EpochRangeModifier``, as `Tagged`."""


class _Dumper(yaml.SafeDumper):
    """Writes `Tagged` as modifiers with tags."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write equal lists out wherever they stand."""
        return True


def _construct(loader: _Loader, kind: str, node: yaml.Node) -> Tagged:
    kind = kind.removeprefix("pytorch.")
    if not isinstance(node, yaml.MappingNode):
        return Tagged(kind, {})
    return Tagged(kind, {str(key): value for key, value in loader.construct_mapping(node, deep=True).items()})


_Loader.add_multi_constructor("!", _construct)
_Dumper.add_representer(Tagged, lambda dumper, data: dumper.represent_mapping(f"!{data.kind}", dict(data)))


def body_of(text: str) -> str:
    """The YAML in a recipe file: the front matter of a Markdown file, or the whole text."""
    text, start = text.lstrip("\ufeff\r\n"), 0
    while comment := _COMMENT.match(text, start):
        start = comment.end()
    match = _FRONT_MATTER.match(text, start)
    return match.group(1) if match else text


def read_body(body: str, name: str) -> dict[str, Any]:
    """Read a recipe as plain data; expressions (``eval(...)``) stay texts.

    Args:
        body: the recipe's YAML, see `body_of`.
        name: the recipe's name, for messages.

    Returns:
        Its root variables, and its lists of modifiers or its stages, by name.

    Raises:
        RecipeError: it is no YAML, is made to grow beyond all bounds, or holds no list of modifiers.
    """
    if len(body) > _LONGEST:
        raise RecipeError(f"{name} has more than {_LONGEST} characters. Shorten the file.")
    try:
        roots = read_yaml(body, _Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{name} is not valid YAML: {first_line(error)}. Correct the file.") from error
    if not isinstance(roots, dict) or not any(modifiers_of(roots)):
        raise RecipeError(f"{name} holds no recipe: a mapping with lists of modifiers is expected.")
    return roots


def set_anchored(body: str, variables: Mapping[str, float]) -> str:
    """Write new values of variables that have YAML anchors (``num_epochs: &num_epochs 52``) into a recipe.

    Afterwards aliases (``*num_epochs``) stand for the new value, too.

    Args:
        body: the recipe's YAML.
        variables: new values by name; those of variables without an anchor are ignored.

    Returns:
        The recipe's YAML with the new values.
    """
    for name, value in variables.items():
        anchored = re.compile(rf"^({re.escape(name)}\s*:\s*&[\w-]+[ \t]+)[^\s#]+", re.MULTILINE)
        body = anchored.sub(lambda match, value=value: f"{match[1]}{value}", body)  # type: ignore[misc]
    return body


def modifiers_of(roots: Any) -> Iterator[Tagged]:
    """All modifiers of a recipe, those inside stages included."""
    if isinstance(roots, Tagged):
        yield roots
    elif isinstance(roots, dict | list):
        for value in roots.values() if isinstance(roots, dict) else roots:
            yield from modifiers_of(value)


def to_yaml(roots: Mapping[str, Any]) -> str:
    """Write a recipe given as plain data as YAML."""
    return yaml.dump(dict(roots), Dumper=_Dumper, sort_keys=False)


def check_variables(roots: Mapping[str, Any], variables: Iterable[str], name: str) -> None:
    """Refuse variables that the recipe does not have.

    Args:
        roots: the recipe, see `read_body`. Its variables are scalars at its root, or at that of a stage.
        variables: names.
        name: the recipe's name, for the message.

    Raises:
        RecipeError: names the first unknown variable, and all known ones.
    """
    known = [
        key for level in _levels(roots) for key, value in level.items() if not isinstance(value, list | dict)
    ]
    for variable in variables:
        if variable not in known:
            names = ", ".join(map(str, known))
            raise RecipeError(f"The recipe {name} has no variable {variable!r}. Its variables: {names}.")


def filled_in(roots: Mapping[str, Any], variables: Mapping[str, float], name: str) -> dict[str, list[Tagged]]:
    """Set variables of a recipe, and compute what its modifiers' expressions say.

    A variable of a stage hides the root's of the same name. An expression that is only a variable's name
    (``eval(layers)``) stands for its value, of whatever type.

    Args:
        roots: the recipe, see `read_body`.
        variables: values that replace those of the root and of stages; see `check_variables`.
        name: the recipe's name, for messages.

    Returns:
        The modifiers of each stage by its name, in the order of the file; of a recipe without stages those
        of the stage "".

    Raises:
        RecipeError: an expression is none, or uses an unknown variable; variables refer to each other in a
            circle; or a modifier stands where no list of modifiers is.
    """
    stages = {key: value for key, value in roots.items() if _is_stage(value)}
    outer = _variables(roots, stages, variables)
    globals_ = _evaluated(outer, {}, name)
    if not stages or any(_holds_modifiers(key, value) for key, value in roots.items()):
        stages = {"": roots}
    found = {}
    for stage, content in stages.items():
        own = {} if content is roots else _evaluated(_variables(content, {}, variables), globals_, name)
        listed = _listed(content)
        if len(listed) != sum(1 for _ in modifiers_of({k: v for k, v in content.items() if k not in stages})):
            raise RecipeError(
                f"{name} has modifiers outside of its lists of modifiers. "
                "Put them into lists whose names hold the word 'modifiers'."
            )
        found[str(stage)] = [_substituted(modifier, {**globals_, **own}, name) for modifier in listed]
    if _size(found, {}) > _MOST_VALUES:
        raise RecipeError(f"The variables of {name} stand for more than {_MOST_VALUES} values. Shorten them.")
    return {stage: listed for stage, listed in found.items() if listed}


def _size(part: Any, known: dict[int, int]) -> int:
    """Number of values in what variables were put into, those that are shared counted wherever they stand."""
    if isinstance(part, dict | list):
        if id(part) not in known:
            items = part.values() if isinstance(part, dict) else part
            known[id(part)] = 1 + sum(_size(item, known) for item in items)
        return known[id(part)]
    return 1


def _levels(roots: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The mappings whose scalars are variables: the root, and the stages."""
    return [roots, *(value for value in roots.values() if _is_stage(value))]


def _is_stage(value: Any) -> bool:
    return isinstance(value, dict) and not isinstance(value, Tagged) and any(modifiers_of(value))


def _holds_modifiers(key: Any, value: Any) -> bool:
    return isinstance(value, Tagged) or ("modifiers" in str(key) and isinstance(value, list))


def _listed(content: Mapping[str, Any]) -> list[Tagged]:
    """The modifiers in the lists of a stage."""
    values = [value for key, value in content.items() if _holds_modifiers(key, value)]
    items = [item for value in values for item in (value if isinstance(value, list) else [value])]
    return [item for item in items if isinstance(item, Tagged)]


def _variables(
    level: Mapping[str, Any], stages: Mapping[str, Any], given: Mapping[str, float]
) -> dict[str, Any]:
    """The variables of a level, with the values that were given for some."""
    return {
        str(key): given.get(key, value)
        for key, value in level.items()
        if key not in stages and not _holds_modifiers(key, value)
    }


def _evaluated(variables: Mapping[str, Any], outer: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The values of a level's variables.

    Args:
        variables: values or expressions by name.
        outer: values of the level around it.
        name: the recipe's name, for messages.
    """
    values: dict[str, Any] = {}

    def settle(variable: str, path: tuple[str, ...]) -> None:
        if variable in path:
            circle = " -> ".join((*path[path.index(variable) :], variable))
            raise RecipeError(
                f"The variables of {name} refer to each other in a circle: {circle}. "
                "Give one of them a value."
            )
        expression = inside(variables[variable])
        if expression is None:
            values[variable] = variables[variable]
            return
        known = dict(outer)
        for used in _names_in(expression, name):
            if used in variables and not (used == variable and used in outer):
                if used not in values:
                    settle(used, (*path, variable))
                known[used] = values[used]
        values[variable] = _computed(expression, known, name)

    try:
        for variable in variables:
            if variable not in values:
                settle(variable, ())
    except RecursionError as error:
        raise RecipeError(
            f"The variables of {name} refer to each other in too long a chain. Give some of them values."
        ) from error
    return values


def _names_in(expression: str, name: str) -> set[str]:
    try:
        return names_in(expression)
    except ExpressionError as error:
        raise _refusal(expression, error, name) from error


def _computed(expression: str, values: Mapping[str, Any], name: str) -> Any:
    """The value of an expression: that of the variable where it is only a name, else a number."""
    if expression in values:
        return values[expression]
    numbers = {key: _as_number(value) for key, value in values.items()}
    try:
        return evaluate(expression, {key: value for key, value in numbers.items() if value is not None})
    except UnknownName as error:
        known = ", ".join(key for key, value in numbers.items() if value is not None) or "none"
        raise RecipeError(
            f"{name} uses the variable {error.name!r} in eval({_short(expression)}), but sets no number for "
            f"it. Its numbers: {known}."
        ) from error
    except ExpressionError as error:
        raise _refusal(expression, error, name) from error


def _refusal(expression: str, error: ExpressionError, name: str) -> RecipeError:
    return RecipeError(
        f"{name} holds eval({_short(expression)}), which cannot be computed: {error}. Correct it."
    )


def _short(expression: str) -> str:
    line = " ".join(expression.split())
    return line if len(line) <= 60 else f"{line[:57]}..."


def _as_number(value: Any) -> int | float | None:
    """A variable's number; YAML reads ``1e-3`` as a text."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    try:
        return float(value) if isinstance(value, str) else None
    except ValueError:
        return None


def _substituted(value: Any, values: Mapping[str, Any], name: str) -> Any:
    """A modifier, or a part of one, with its expressions computed."""
    if isinstance(value, Tagged):
        return Tagged(value.kind, {key: _substituted(item, values, name) for key, item in value.items()})
    if isinstance(value, dict):
        return {key: _substituted(item, values, name) for key, item in value.items()}
    if isinstance(value, list):
        return [_substituted(item, values, name) for item in value]
    expression = inside(value)
    return value if expression is None else _computed(expression, values, name)
