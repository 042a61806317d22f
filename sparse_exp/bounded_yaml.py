"""YAML from elsewhere: a short file must not stand for a huge one, or for one without an end."""

from __future__ import annotations

from typing import Any

import yaml

from sparse_exp.errors import first_line

_LONGEST_NUMBER = 400  # characters; those to the base of sixty take time by the square of that
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_MORE = 100_000  # values and keys that aliases may stand for, beyond as many as the text has characters


def read_yaml(text: str, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """Read YAML as plain data.

    A value behind several aliases (``*name``) is one object in all these places. Whoever writes it out, or
    walks through it, meets it in each of them, and so it is counted: nine lines of nine aliases each are a
    billion values.

    Args:
        text: the content of a file.
        loader: makes the data; a `yaml.SafeLoader`.

    Returns:
        Builtin containers and scalars, and what the loader makes of tags; None of an empty text.

    Raises:
        yaml.YAMLError: it is no YAML, its aliases stand for too much, or a number in it is too long.
    """
    loading = loader(text)
    try:
        node = loading.get_single_node()
        if node is None:
            return None
        most = _MORE + len(text)
        if _size(node, {}) > most:
            raise yaml.YAMLError(f"its aliases stand for more than {most} values")
        return loading.construct_document(node)
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply") from error
    except (ValueError, TypeError, OverflowError) as error:  # a number or a date that Python cannot hold
        raise yaml.YAMLError(str(error)) from error
    finally:
        loading.dispose()


def _size(node: yaml.Node, known: dict[int, int | None]) -> int:
    """Number of values and keys in a part of a YAML file with all aliases written out."""
    if id(node) in known:
        size = known[id(node)]
        if size is None:
            raise yaml.YAMLError("an alias in it stands for itself")
        return size
    if isinstance(node, yaml.ScalarNode) and node.tag in _NUMBERS and len(node.value) > _LONGEST_NUMBER:
        raise yaml.YAMLError(f"a number in it has more than {_LONGEST_NUMBER} characters")
    known[id(node)], size = None, 1
    if isinstance(node, yaml.CollectionNode):
        for child in node.value:
            size += sum(_size(part, known) for part in (child if isinstance(child, tuple) else (child,)))
    known[id(node)] = size
    return size


def sentence_of(error: yaml.YAMLError) -> str:
    """What is wrong with a file that is no YAML, where, and what to do about it."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    where = f"{mark.name}, line {mark.line + 1}: " if mark else ""
    return f"{where}{problem or first_line(error)}. Correct the file."
