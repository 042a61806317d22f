"""Recipes that a stub names."""

from __future__ import annotations

from pathlib import Path

from sparse_exp.config.schema import SourceConfig
from sparse_exp.sources.cache import fetch
from sparse_exp.sources.layout import recipe_in
from sparse_exp.sources.local import find
from sparse_exp.sources.stub import parse_stub


def fetch_recipe(text: str, cache: Path, zoo: Path) -> Path:
    """The recipe that a stub names, from the local zoo, the cache or SparseZoo.

    Args:
        text: the stub; without ``?recipe=`` the original recipe is meant.
        cache: see `sparse_exp.sources.cache.cache_directory`.
        zoo: the local zoo.

    Returns:
        A Markdown or YAML file.

    Raises:
        ConfigError: the stub is malformed.
        SourceUnavailable: SparseZoo does not answer, or has no such recipe.
    """
    stub, published = parse_stub(text), find(text, zoo)
    if published:
        return recipe_in(published, stub.parameters.get("recipe") or stub.parameters.get("recipe_type"))
    named = text if stub.names_recipe else f"{text}{'&' if stub.parameters else '?'}recipe=original"
    return fetch(SourceConfig(uri=named), cache).path
