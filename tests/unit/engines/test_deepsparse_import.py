from __future__ import annotations

import importlib
import sys

import pytest

from sparse_exp.engines.deepsparse import _without


def test_modules_that_are_not_imported_yet_seem_missing_for_a_while(monkeypatch):
    monkeypatch.delitem(sys.modules, "this", raising=False)
    with _without("this", "json"):
        assert importlib.import_module("json").loads("1") == 1  # it was there before
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("this")
    assert "this" not in sys.modules
    assert importlib.util.find_spec("this")


def test_after_a_failure_nothing_is_hidden():
    with pytest.raises(KeyError), _without("antigravity"):
        raise KeyError("antigravity")
    assert "antigravity" not in sys.modules
