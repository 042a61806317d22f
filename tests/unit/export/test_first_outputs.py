import numpy as np
import pytest
import torch

from sparse_exp.config.schema import ExportConfig
from sparse_exp.errors import EngineError
from sparse_exp.export.first_outputs import FirstOutputs

LIMITS = ExportConfig(box_atol=1.0, score_atol=0.05)


def predictions(images=6, boxes=400):
    """Predictions for 160 px, a third of them confident."""
    draw = np.random.default_rng(0)
    xywh = draw.uniform(0, 160, (images, boxes, 4))
    scores = draw.uniform(0, 0.15, (images, boxes, 3))
    return np.concatenate([xywh, scores], -1).astype(np.float32)


@pytest.fixture
def kept(tmp_path):
    """What one engine put out, written and read again."""
    first, batches = FirstOutputs(), iter((predictions(), np.zeros((2, 400, 7), np.float32)))
    watched = first.watching("openvino", "sparse", lambda _: torch.from_numpy(next(batches)))
    assert (watched(torch.zeros(6)).numpy() == predictions()).all()
    watched(torch.zeros(2))  # only the first batch is kept
    return FirstOutputs.read(first.write(tmp_path / "first.npz"))


@pytest.mark.parametrize("images", [1, 4, 6])
def test_the_same_outputs_in_another_batch_agree(kept, images):
    found = kept.compare("openvino", "sparse", predictions()[:images], LIMITS)
    assert found == {"score_mean": 0.0, "score_max": 0.0, "box_mean_px": 0.0, "box_max_px": 0.0}


def test_differences_are_those_of_the_confident_predictions(kept):
    moved = predictions()[:1]
    confident = moved[..., 4] >= 0.1
    moved[..., 0] += np.where(confident, 0.4, 100.0)
    found = kept.compare("openvino", "sparse", moved, LIMITS)
    assert found["box_mean_px"] == pytest.approx(0.1, rel=1e-4)  # one of four sides
    assert found["box_max_px"] == pytest.approx(0.4, rel=1e-3)


@pytest.mark.parametrize("change", ["boxes", "scores", "nothing is found", "not a number", "shape"])
def test_other_outputs_are_refused(kept, change):
    found = predictions()[:2]
    if change == "boxes":
        found[..., :4] += 2
    elif change == "scores":
        found[..., 4:] += 0.1
    elif change == "nothing is found":
        found[..., 4:] = 0
    elif change == "not a number":
        found[0, found[0, :, 4].argmax()] = np.nan
    else:
        found = found[:, :399]
    with pytest.raises(EngineError, match="It puts out"):
        kept.compare("openvino", "sparse", found, LIMITS)


def test_a_network_that_is_sure_of_nothing_is_compared_by_its_best_predictions():
    unsure = predictions()
    unsure[..., 4] *= 0.1
    first = FirstOutputs()
    first.watching("openvino", "sparse", torch.from_numpy)(unsure)
    assert set(first.compare("openvino", "sparse", unsure, LIMITS).values()) == {0.0}
    other = unsure.copy()
    other[..., 5:] = 1 - other[..., 5:]
    assert first.compare("openvino", "sparse", other, ExportConfig(score_atol=1.0))["score_max"] > 0.6


def test_what_was_not_verified_is_not_compared(kept, tmp_path):
    assert kept.compare("openvino", "dense", predictions(), LIMITS) == {}
    assert FirstOutputs.read(tmp_path / "none.npz").compare("openvino", "sparse", predictions(), LIMITS) == {}
