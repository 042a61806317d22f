"""The size of images in configuration, command lines and records."""

from __future__ import annotations

from argparse import ArgumentTypeError

import pytest
from test_resolve import config_of, problems

from sparse_exp.config.imgsz import imgsz_of, in_words, parse_imgsz, sides
from sparse_exp.config.plain import as_dict, as_yaml, from_dict
from sparse_exp.config.schema import DatasetConfig, HardwareConfig
from sparse_exp.files import fingerprint
from sparse_exp.resolve import rebuild, resolve


@pytest.mark.parametrize(
    ("value", "size", "words"),
    [
        (640, 640, "640"),
        ((640, 640), 640, "640"),
        ([384, 640], (384, 640), "[384,640]"),
        ([64, 32], (64, 32), "[64,32]"),
    ],
)
def test_a_size_has_one_form(value, size, words):
    assert imgsz_of(value) == size
    assert in_words(size) == words
    assert imgsz_of(list(sides(size))) == parse_imgsz(words) == size


@pytest.mark.parametrize(
    "value", [0, -32, True, 64.0, "64", None, [64], [64, 64, 64], [64, 0], [64, "64"], {}]
)
def test_what_is_no_size(value):
    with pytest.raises(ValueError, match="no size"):
        imgsz_of(value)


@pytest.mark.parametrize(
    ("text", "size"), [("640", 640), ("384,640", (384, 640)), (" (384, 640) ", (384, 640))]
)
def test_words_of_a_command_line(text, size):
    assert parse_imgsz(text) == size


@pytest.mark.parametrize("text", ["", "0", "a", "384,", "384x640", "1,2,3", "-32", "1.5", "²"])
def test_words_that_are_refused(text):
    with pytest.raises(
        ArgumentTypeError, match="expected pixels as 640, or HEIGHT,WIDTH as 384,640, but got"
    ):
        parse_imgsz(text)


@pytest.mark.parametrize("key", ["dataset", "hardware"])
@pytest.mark.parametrize(
    ("value", "fragments"),
    [
        ([100, 640], ["a multiple of 32, but got [100, 640]", "imgsz=[96,640]"]),
        ([384, 2080], ["at least 64 and at most 2048 px each", "[384, 2080]"]),
        ([384], ["a positive whole number of pixels, or [height,width]", "[384]"]),
        ("wide", ["a positive whole number of pixels, or [height,width]", "wide", "imgsz=[384,640]"]),
        (320.5, ["a positive whole number of pixels", "320.5"]),
        (True, ["a positive whole number of pixels"]),
        (-32, ["a positive whole number of pixels", "-32"]),
        (2080, ["at least 64 and at most 2048 px", "2080"]),
    ],
)  # fmt: skip
def test_sizes_that_are_refused(key, value, fragments):
    (problem,) = problems(**{f"{key}__imgsz": value})
    assert problem.startswith(f"Expected {key}.imgsz to be ")
    assert all(fragment in problem for fragment in fragments), problem


def test_axes_of_a_rectangle_are_not_swapped():
    (problem,) = problems(dataset__imgsz=[64, 96], trainer__augment__transpose=0.5)
    assert problem.startswith("Expected trainer.augment.transpose to be 0 with dataset.imgsz=[64,96]")
    resolve(config_of(dataset__imgsz=[96, 96], trainer__augment__transpose=0.5))


def test_a_rectangle_from_the_configuration_to_its_record_and_back():
    experiment = resolve(config_of(dataset__imgsz=[64, 96], hardware__imgsz=[64, 96]))
    assert (experiment.dataset.imgsz, experiment.hardware.imgsz) == ((64, 96), (64, 96))
    assert as_dict(experiment)["dataset"]["imgsz"] == [64, 96]
    again, filled = rebuild(as_yaml(experiment), ())
    assert (again, filled) == (experiment, [])
    assert rebuild(as_yaml(experiment), ["dataset.imgsz=[96,64]"])[0].dataset.imgsz == (96, 64)
    assert from_dict(HardwareConfig, {"name": "x", "imgsz": [64, 96]}).imgsz == (64, 96)


def test_a_square_is_recorded_as_before():
    """Fingerprints and records are of these values, and a run of an earlier version goes on."""
    one, two = (resolve(config_of(dataset__imgsz=size)) for size in (96, [96, 96]))
    assert as_dict(one)["dataset"]["imgsz"] == 96
    assert type(one.dataset.imgsz) is int
    assert fingerprint(as_dict(one)) == fingerprint(as_dict(two))
    assert as_dict(DatasetConfig(name="x"))["imgsz"] == 640
    assert as_dict(HardwareConfig(name="x"))["imgsz"] is None
