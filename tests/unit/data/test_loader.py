from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import joblib
import numpy as np
import pytest
import torch
from PIL import Image

from sparse_exp.config.schema import AugmentConfig
from sparse_exp.data import DetectionDataset, digits, load_dataset
from sparse_exp.data.augment import augment_example
from sparse_exp.data.detection import Sample
from sparse_exp.data.letterbox import PADDING
from sparse_exp.data.loader import Batch, DetectionImages, choose_workers, make_loader
from sparse_exp.data.store import choose_store
from sparse_exp.errors import DataError
from sparse_exp.training.evaluation import Validation


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> DetectionDataset:
    place = tmp_path_factory.mktemp("data") / "digits"
    return load_dataset(digits.materialize(place, imgsz=64, train=11, val=3, test=0))


def epoch(dataset: DetectionDataset, number: int, *, seed: int = 0, workers: int = 0) -> list[Batch]:
    loader = make_loader(
        dataset.splits["train"], 10, imgsz=64, batch_size=4, train=True, seed=seed, workers=workers,
        augment=AugmentConfig(transpose=0.5),
    )  # fmt: skip
    loader.set_epoch(number)
    return list(loader)


def same(one: list[Batch], two: list[Batch]) -> bool:
    pairs = zip(one, two, strict=True)
    return all(torch.equal(a.images, b.images) and torch.equal(a.targets, b.targets) for a, b in pairs)


def test_batches_depend_on_seed_and_epoch_only(dataset: DetectionDataset) -> None:
    zero, one = epoch(dataset, 0), epoch(dataset, 1)
    torch.manual_seed(7)
    np.random.seed(7)
    assert same(zero, epoch(dataset, 0))
    assert not torch.equal(zero[0].images, one[0].images)
    assert not torch.equal(zero[0].images, epoch(dataset, 0, seed=1)[0].images)


def test_each_epoch_shows_another_variant(dataset: DetectionDataset) -> None:
    images = DetectionImages(dataset.splits["train"], 10, 64, augment=AugmentConfig())
    assert torch.equal(images[0, 5, True].image, images[0, 5, True].image)
    assert not torch.equal(images[0, 5, True].image, images[1, 5, True].image)


def test_workers_and_passes_change_nothing(dataset: DetectionDataset) -> None:
    loader = make_loader(
        dataset.splits["train"], 10, imgsz=64, batch_size=4, train=True, workers=2,
        augment=AugmentConfig(transpose=0.5),
    )  # fmt: skip
    for number in (0, 3):  # the workers stay alive between passes and must hear of the new epoch
        loader.set_epoch(number)
        assert same(list(loader), epoch(dataset, number))


def test_workers_start_in_a_process_of_joblib(dataset: DetectionDataset) -> None:
    """As in a job of a sweep with ``launcher=joblib``, whose images do not fit into memory."""
    loader = make_loader(
        dataset.splits["train"], 10, imgsz=64, batch_size=4, train=True, workers=1, augment=AugmentConfig()
    )
    here, (there, _) = list(loader), joblib.Parallel(n_jobs=2)(joblib.delayed(list)(loader) for _ in range(2))
    assert same(here, there)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_at_the_beginning_are_left_out_without_being_made(
    dataset: DetectionDataset, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    wanted, following = epoch(dataset, 3), epoch(dataset, 4)
    loader = make_loader(
        dataset.splits["train"], 10, imgsz=64, batch_size=4, train=True, workers=workers,
        augment=AugmentConfig(transpose=0.5),
    )  # fmt: skip
    made: list[tuple[int, int]] = []
    make = DetectionImages.__getitem__
    monkeypatch.setattr(DetectionImages, "__getitem__", lambda self, key: made.append(key) or make(self, key))
    before = torch.get_rng_state()
    loader.set_epoch(3, skip=2)
    assert same(list(loader), wanted[2:])
    assert len(made) == (0 if workers else 3)  # workers make them elsewhere; 11 images, 8 left out
    assert len(loader) == 3
    loader.set_epoch(4)
    assert same(list(loader), following)
    assert torch.equal(torch.get_rng_state(), before)  # what the model may draw is not used up


def test_workers_only_where_images_are_decoded_again(
    dataset: DetectionDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparse_exp.data.loader.usable_physical_cores", lambda: 6)
    assert [choose_workers(None, store) for store in ("ram", "disk", "none")] == [0, 3, 3]
    assert [choose_workers(given, store) for given, store in ((0, "none"), (5, "ram"))] == [0, 5]
    for cores, workers in ((1, 1), (2, 1), (64, 8)):
        monkeypatch.setattr("sparse_exp.data.loader.usable_physical_cores", lambda cores=cores: cores)
        assert choose_workers(None, "none") == workers
    monkeypatch.setattr("sparse_exp.data.loader.usable_physical_cores", lambda: 2)
    kept = epoch(dataset, 2)
    monkeypatch.setattr("sparse_exp.data.store.free_memory", lambda: 0)
    loader = make_loader(
        dataset.splits["train"], 10, imgsz=64, batch_size=4, train=True, augment=AugmentConfig(transpose=0.5)
    )
    loader.set_epoch(2)
    assert loader.num_workers == 1
    assert same(list(loader), kept)


@pytest.mark.parametrize(("of", "workers"), [(2, 0), (4, 0), (4, 1)])
def test_the_shares_of_some_processes_are_the_batches(
    dataset: DetectionDataset, of: int, workers: int
) -> None:
    whole = make_loader(
        dataset.splits["train"], 10, imgsz=64, batch_size=4, train=True, seed=5, workers=workers,
        augment=AugmentConfig(mosaic=1.0),
    )  # fmt: skip
    whole.set_epoch(2)
    list(whole)
    shares = []
    for which in range(of):
        share = pickle.loads(pickle.dumps(whole)).share(which, of)
        share.set_epoch(2)
        shares.append(list(share))
    assert [len(share) for share in shares] == [3] * min(of, 3) + [2] * (
        of - 3
    )  # the last batch has 3 images
    for number, batch in enumerate(whole):
        parts = [share[number] for share in shares if number < len(share)]
        assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
        assert torch.equal(torch.cat([part.targets for part in parts])[:, 1:], batch.targets[:, 1:])


def test_one_process_has_the_loader_itself(dataset: DetectionDataset) -> None:
    loader = make_loader(dataset.splits["train"], 10, imgsz=64, batch_size=4, train=True)
    assert loader.share(0, 1) is loader


def test_what_is_known_of_labels_is_used(dataset: DetectionDataset, tmp_path: Path) -> None:
    sample = dataset.splits["val"][0]
    (batch,) = make_loader(
        [sample._replace(label=tmp_path / "gone.txt")], 10, imgsz=64, batch_size=1, train=False
    )
    rows = np.loadtxt(sample.label, ndmin=2)
    np.testing.assert_allclose(batch.targets[:, 1:], rows, atol=1e-5)


def test_an_epoch_is_every_image_once_in_another_order(dataset: DetectionDataset) -> None:
    loader = make_loader(dataset.splits["train"], 10, imgsz=64, batch_size=4, train=True)
    orders = []
    for number in range(2):
        loader.set_epoch(number)
        batches = list(loader)
        assert [len(batch.images) for batch in batches] == [4, 4, 3]
        orders.append([image.numpy().tobytes() for batch in batches for image in batch.images])
    assert len(set(orders[0])) == 11
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1]


def test_validation_keeps_order_and_pixels(dataset: DetectionDataset) -> None:
    samples = dataset.splits["val"]
    loader = make_loader(samples, 10, imgsz=64, batch_size=8, train=False, augment=AugmentConfig())
    (batch,) = loader
    assert batch.images.dtype == torch.uint8
    assert batch.images.shape == (3, 3, 64, 64)
    for position, sample in enumerate(samples):
        pixels = np.asarray(Image.open(sample.image))
        assert np.array_equal(batch.images[position].permute(1, 2, 0).numpy(), pixels)
        rows = batch.targets[batch.targets[:, 0] == position, 1:].numpy()
        np.testing.assert_allclose(rows, np.loadtxt(sample.label, ndmin=2), atol=1e-5)


def test_targets_are_those_of_the_letterboxed_image(tmp_path: Path) -> None:
    Image.new("RGB", (128, 64), "white").save(tmp_path / "wide.png")
    (tmp_path / "wide.txt").write_text("1 0.25 0.5 0.5 1.0\n")  # the left half
    samples = [Sample(tmp_path / "wide.png", tmp_path / "wide.txt")] * 2
    samples.insert(1, Sample(tmp_path / "wide.png", tmp_path / "missing.txt"))
    (batch,) = make_loader(samples, 2, imgsz=64, batch_size=3, train=False)
    # 64 x 32 at rows 16..48: centre (16, 32), size (32, 32) of 64.
    box = [1, 0.25, 0.5, 0.5, 0.5]
    np.testing.assert_allclose(batch.targets, [[0, *box], [2, *box]])
    assert (batch.images[:, :, :16] == PADDING).all()
    assert (batch.images[:, :, 16:48] == 255).all()


def test_large_splits_are_not_kept_in_memory(
    dataset: DetectionDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = epoch(dataset, 0)
    monkeypatch.setattr("sparse_exp.data.store.free_memory", lambda: 0)
    read = []
    original = Image.open
    monkeypatch.setattr(Image, "open", lambda path, **options: read.append(path) or original(path, **options))
    assert same(epoch(dataset, 0), kept)
    assert len(read) >= 11


def test_bad_label_names_file_and_line(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("9 0.5 0.5 0.5 0.5\n")
    with pytest.raises(DataError, match=r"a\.txt:1 to be a class id of 0..1"):
        make_loader([Sample(tmp_path / "a.png", tmp_path / "a.txt")], 2, imgsz=64, batch_size=1, train=True)


@pytest.mark.parametrize(("free", "store"), [(5 * 873 * 3 * 640**2, "ram"), (5 * 872 * 3 * 640**2, "none")])
def test_images_stay_in_memory_where_they_take_a_fifth_of_what_is_free(
    monkeypatch: pytest.MonkeyPatch, free: int, store: str
) -> None:
    monkeypatch.setattr("sparse_exp.data.store.free_memory", lambda: free)
    assert choose_store("auto", 873, 640) == store
    assert choose_store("auto", 291, 640, processes=3) == store
    assert [choose_store(given, 873, 640) for given in ("ram", "disk", "none")] == ["ram", "disk", "none"]


def batches_of(dataset: DetectionDataset, cache: str, folder: Path, **options: Any) -> list[Batch]:
    loader = make_loader(
        dataset.splits["train"], 10, imgsz=64, batch_size=4, train=True, seed=1, augment=AugmentConfig(),
        cache=cache, folder=folder, **options,
    )  # fmt: skip
    found = []
    for number in (0, 1):
        loader.set_epoch(number)
        found += list(loader)
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_a_cache_changes_no_batch(dataset: DetectionDataset, tmp_path: Path, workers: int) -> None:
    wanted = batches_of(dataset, "none", tmp_path, workers=0)
    for cache in ("ram", "disk", "disk"):
        for batch, other in zip(wanted, batches_of(dataset, cache, tmp_path, workers=workers), strict=True):
            assert torch.equal(batch.images, other.images)
            assert torch.equal(batch.targets, other.targets)


def test_decoded_images_are_shared(
    dataset: DetectionDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches_of(dataset, "disk", tmp_path)
    (place,) = (path for path in tmp_path.iterdir() if path.is_dir())
    monkeypatch.setattr("sparse_exp.data.store.read_square", lambda *_: pytest.fail("decoded again"))
    images = pickle.loads(pickle.dumps(DetectionImages(
        dataset.splits["train"], 10, 64, store="disk", folder=tmp_path
    )))  # fmt: skip
    assert len(pickle.dumps(images)) < place.joinpath("pixels.npy").stat().st_size / 4
    assert images[0, 3, True].image.shape == (3, 64, 64)


def test_an_image_that_changes_is_decoded_again(dataset: DetectionDataset, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    samples = [Sample(path, tmp_path / "a.txt")]
    for shade in (10, 200):
        Image.new("RGB", (64, 32 + shade), (shade, shade, shade)).save(path)
        image = DetectionImages(samples, 1, 64, store="disk", folder=tmp_path / "cache")[0, 0, True].image
        assert int(image[0, 32, 32]) == shade


def test_without_room_for_decoded_images(
    dataset: DetectionDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(DataError, match=r"decoded images need 0\.0 GB, but .* Set dataset\.cache=none"):
        batches_of(dataset, "disk", tmp_path)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


def test_targets_of_a_rectangle_are_shares_of_its_own_sides(tmp_path: Path) -> None:
    # 192 x 108 px fit 96 x 64 by a half: 96 x 54, 5 rows of grey above and below.
    Image.new("RGB", (192, 108)).save(tmp_path / "a.png")
    sample = Sample(tmp_path / "a.png", tmp_path / "a.txt")
    sample.label.write_text("0 0.25 0.5 0.5 1.0\n")
    for cache in ("ram", "disk", "none"):
        loader = make_loader(
            [sample],
            1,
            imgsz=(64, 96),
            batch_size=1,
            train=False,
            workers=0,
            cache=cache,
            folder=tmp_path / "cache",
        )
        (batch,) = loader
        assert batch.images.shape == (1, 3, 64, 96)
        torch.testing.assert_close(batch.targets, torch.tensor([[0, 0, 0.25, 0.5, 0.5, 54 / 64]]))
        # a perfect detector of it
        found = torch.tensor([[[24.0, 32, 48, 54, 1, 1]]])
        assert Validation(loader, 1).evaluate(lambda _, found=found: found).map50_95 == pytest.approx(
            1, abs=0.01
        )


BATCHES_OF_A_WORKER = """
import sys
from pathlib import Path
from sparse_exp.data import load_dataset
from sparse_exp.data.loader import make_loader
samples = load_dataset(Path(sys.argv[1])).splits["train"]
loader = make_loader(samples, 10, imgsz=64, batch_size=4, train=True, workers=2)
print(sum(len(batch.images) for batch in loader))
"""


@pytest.mark.parametrize(
    "length", [*(pytest.param(n, marks=pytest.mark.slow) for n in (10, 74, 75, 76)), 120]
)
def test_workers_hand_over_in_any_temporary_directory_and_leave_nothing_there(dataset, tmp_path, length):
    folder = tmp_path / "t"
    folder = folder.with_name("t" * max(1, length - len(str(folder)) + 1))
    folder.mkdir()
    environment = {**os.environ, "TMPDIR": str(folder), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", BATCHES_OF_A_WORKER, str(dataset.root / "data.yaml")],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "11\n"), done.stderr
    assert list(folder.rglob("*")) == []


def test_a_pass_without_mosaics_shows_one_picture_each(dataset: DetectionDataset) -> None:
    config = AugmentConfig(mosaic=1.0, mixup=1.0, copy_paste=0.0)
    images = DetectionImages(dataset.splits["train"], 10, 64, augment=config)
    never = DetectionImages(dataset.splits["train"], 10, 64, augment=AugmentConfig(mosaic=0.0))
    for index in range(4):
        assert torch.equal(images[2, index, False].image, never[2, index, True].image)
        assert not torch.equal(images[2, index, True].image, images[2, index, False].image)


def test_options_that_are_off_draw_nothing(dataset: DetectionDataset) -> None:
    """A variant is the same whether or not a transform that is off is known: results of old seeds stay."""
    plain = DetectionImages(dataset.splits["train"], 10, 64, seed=3, augment=AugmentConfig(mosaic=1.0))
    draw = np.random.default_rng((3, 1, 5, 2))
    draw.random()
    chosen = [2, *draw.integers(0, len(plain), 3).tolist()]
    wanted = augment_example([plain._example(index) for index in chosen], AugmentConfig(mosaic=1.0), draw)
    assert torch.equal(plain[5, 2, True].image, wanted.image)


def test_a_loader_has_no_mosaics_in_a_pass_that_is_to_have_none(dataset: DetectionDataset) -> None:
    def batches(mosaic: float, *, wanted: bool) -> list[Batch]:
        config = AugmentConfig(mosaic=mosaic)
        loader = make_loader(
            dataset.splits["train"], 10, imgsz=64, batch_size=4, train=True, augment=config, workers=0
        )
        loader.set_epoch(1, mosaic=wanted)
        return list(loader)

    assert same(batches(1.0, wanted=False), batches(0.0, wanted=True))
    assert not same(batches(1.0, wanted=True), batches(0.0, wanted=True))


def test_objects_of_other_images_are_pasted_and_mixed(dataset: DetectionDataset) -> None:
    off = {"mosaic": 0.0, "scale": 0.0, "translate": 0.0, "jitter": 0.0, "fliplr": 0.0}
    samples = dataset.splits["train"]
    one = DetectionImages(samples, 10, 64, augment=AugmentConfig(**off))
    pasted = DetectionImages(samples, 10, 64, augment=AugmentConfig(**off, copy_paste=1.0))
    assert sum(len(pasted[0, n, True].boxes) for n in range(8)) > sum(
        len(one[0, n, True].boxes) for n in range(8)
    )
    two = {**off, "mosaic": 1.0}
    mosaic = DetectionImages(samples, 10, 64, augment=AugmentConfig(**two))
    mixed = DetectionImages(samples, 10, 64, augment=AugmentConfig(**two, mixup=1.0))
    for n in range(8):
        first, both = mosaic[0, n, True], mixed[0, n, True]
        assert torch.equal(both.boxes[: len(first.boxes)], first.boxes)
        assert not torch.equal(both.image, first.image)
