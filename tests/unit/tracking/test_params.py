import hashlib
from enum import Enum

import pytest

from sparse_exp.tracking.params import flatten, sanitize, shorten


class Precision(Enum):
    BF16 = 1


def test_flatten_by_hand():
    config = {
        "name": "läufe",
        "seed": 0,
        "stub": None,
        "dry_run": False,
        "precision": Precision.BF16,
        "trainer": {"lr": 1e-3, "tiny": 1e-9, "augment": {"mosaic": 0.5}},
        "batch_sizes": [1, 32],
        "names": ["Baum", None],
        "sources": [{"uri": "index:a==1!b", "sha256": None}, {"uri": "https://x/y"}],
        "empty": {},
        "nothing": [],
    }
    assert flatten(config) == {
        "name": "läufe",
        "seed": "0",
        "stub": "null",
        "dry_run": "false",
        "precision": "BF16",
        "trainer.lr": "0.001",
        "trainer.tiny": "1e-09",
        "trainer.augment.mosaic": "0.5",
        "batch_sizes": "[1, 32]",
        "names": '["Baum", null]',
        "sources.0.uri": "index:a==1!b",
        "sources.0.sha256": "null",
        "sources.1.uri": "https://x/y",
        "empty": "{}",
        "nothing": "[]",
    }


def test_keys_that_become_the_same_are_all_kept():
    params = flatten({"a?": 1, "a!": 2, "b.c": 3, "b": {"c": 4}})
    assert sorted(params.values()) == ["1", "2", "3", "4"]
    assert params["a_"] == "1"
    assert params["b.c"] == "3"


def test_a_long_value_says_that_it_was_shortened_and_what_it_was():
    text = "x" * 6001
    value = flatten({"recipe": text})["recipe"]
    assert len(value) == 6000
    assert value.endswith("... shortened, sha256 " + hashlib.sha256(text.encode()).hexdigest()[:8])
    assert shorten("x" * 6000, 6000) == "x" * 6000


@pytest.mark.parametrize(
    ("name", "clean"),
    [
        ("benchmark/deepsparse/sparse/b1/items_per_s", "benchmark/deepsparse/sparse/b1/items_per_s"),
        ("mAP@50 (%) é", "mAP_50 ___ _"),
        ("/a//b/../.", "_/a/_/b/_/_"),
        ("..a", "_..a"),
        ("", "_"),
    ],
)
def test_sanitize(name, clean):
    assert sanitize(name) == clean


@pytest.mark.parametrize("name", ["/a//b/../.", "..a", "", "é", "x" * 251, "a/", "..", "a\nb"])
def test_mlflow_takes_what_sanitize_makes(name):
    from mlflow.utils.validation import _validate_length_limit, _validate_metric_name

    _validate_metric_name(sanitize(name))
    _validate_length_limit("key", 250, sanitize(name))
