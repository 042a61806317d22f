"""What ``predict`` leaves: a directory, annotated pictures, predictions as JSON, CSV and COCO results."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparse_exp.data.detection import Listing
from sparse_exp.errors import ConfigError, expected
from sparse_exp.files import landing, write_text
from sparse_exp.predict.detector import Detector
from sparse_exp.predict.pipeline import Found

FORMAT = "sparse_exp.predict/1"
PREDICTIONS, TABLE, COCO, TRUTH = "predictions.json", "predictions.csv", "coco.json", "coco_truth.json"
FORMATS = ("json", "csv", "coco")
DEFAULT = Path("outputs/predict")
_COLUMNS = ("file", "frame", "class_id", "class", "confidence", "x1", "y1", "x2", "y2")
_PIXELS, _SHARE = 3, 6  # decimals
_LONGEST_STEM = 200  # bytes


def new_directory(out: Path | None, *, overwrite: bool, sources: Sequence[Path]) -> Path:
    """A directory for the outputs, empty.

    Args:
        out: where; None: ``outputs/predict/1``, or the next number that is free.
        overwrite: delete what an earlier prediction left there.
        sources: files that must not be deleted with it.

    Raises:
        ConfigError: see `require_replaceable`; or it cannot be made.
    """
    try:
        if out is None:
            return _numbered(DEFAULT)
        require_replaceable(out, overwrite=overwrite, sources=sources)
        out.mkdir(parents=True, exist_ok=True)
        for path in out.iterdir():  # and not the directory itself, which may be a link or a mount
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    except OSError as error:
        do = "Choose another with --out DIR."
        where = out or DEFAULT
        raise ConfigError(f"Cannot make the directory {where}: {error.strerror}. {do}") from error
    return out


def require_replaceable(out: Path | None, *, overwrite: bool, sources: Sequence[Path]) -> None:
    """Refuse a directory that holds something, unless it is an earlier prediction that may be replaced.

    Args:
        out: see `new_directory`, as the others.
        overwrite: whether it may be replaced.
        sources: files that must not be in it then.

    Raises:
        ConfigError: it may not be replaced.
    """
    if out is None or not out.is_dir() or not any(out.iterdir()):
        return
    if not overwrite:
        raise ConfigError(f"{out} exists. Choose another directory, or replace what is in it: --overwrite.")
    if not _is_prediction(out):
        do = "Delete it yourself, or choose another --out."
        raise ConfigError(f"{out} holds no {PREDICTIONS} of ours, so it is no prediction. {do}")
    inside = [path for path in sources if out.resolve() in path.resolve().parents]
    if inside:
        raise ConfigError(f"{inside[0]} lies in {out}, which would be replaced. Choose another --out.")


def _is_prediction(folder: Path) -> bool:
    """Whether the file that others may call ``predictions.json``, too, begins as ours."""
    start = json.dumps({"format": FORMAT})[:-1].encode()
    try:
        with (folder / PREDICTIONS).open("rb") as stream:
            return stream.read(len(start)) == start
    except OSError:
        return False


def _numbered(parent: Path) -> Path:
    """The first of ``parent/1``, ``parent/2`` ... that is not there; it is made, by one process only."""
    parent.mkdir(parents=True, exist_ok=True)
    taken = [int(path.name) for path in parent.iterdir() if path.name.isdecimal()]
    number = max(taken, default=0) + 1
    while True:
        try:
            (parent / str(number)).mkdir()
        except FileExistsError:
            number += 1
        else:
            return parent / str(number)


class PictureNames:
    """Names for annotated files: that of the source with another ending, numbered where it is taken.

    Bytes that are no UTF-8 are left out, and what is longer than 200 bytes: file systems bear 255, and a
    file that is being written has a longer name.
    """

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def name(self, source: Path, suffix: str) -> str:
        """A name that was not given before.

        Args:
            source: image or video.
            suffix: of the new file, such as ``.jpg``.
        """
        stem = os.fsencode(source.stem)[:_LONGEST_STEM].decode(errors="ignore") or "image"
        name, number = f"{stem}{suffix}", 2
        while name.lower() in self._taken:  # some file systems do not tell A from a
            name, number = f"{stem}-{number}{suffix}", number + 1
        self._taken.add(name.lower())
        return name


@dataclass
class Results:
    """What was found in all images, and what will be written about it.

    Args:
        detector: that found it.
        settings: of the command, for the record.

    Attributes:
        images: one entry for each image or frame, as in ``predictions.json``.
        skipped: file and reason of each image that cannot be read.
        detections: number of all.
        seconds: that it took, without loading the model.
        ended_by: why not all was looked at: an error, or Ctrl-C; None: all was.
    """

    detector: Detector
    settings: dict[str, Any]
    images: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    detections: int = 0
    seconds: float = 0.0
    ended_by: BaseException | None = None

    def add(self, number: int, found: Found[Any], picture: str | None, fps: float | None = None) -> None:
        """Take in one image.

        Args:
            number: its id.
            found: what was found.
            picture: name of the annotated file; None where there is none.
            fps: of the video that it is a frame of.
        """
        one = found.input
        entry: dict[str, Any] = {"id": number, "file": str(one.file)}
        if one.frame is not None:
            entry |= {"frame": one.frame, "seconds": round(one.frame / fps, 4) if fps else None}
        entry |= {"width": found.size[0], "height": found.size[1], "picture": picture}
        rows = found.detections.astype(float).tolist()
        self.images.append({**entry, "detections": [self._described(row) for row in rows]})
        self.detections += len(rows)

    def _described(self, row: list[float]) -> dict[str, Any]:
        return described(row, self.detector.names)

    def write(self, folder: Path, formats: Sequence[str], data: Listing | None) -> None:
        """Write the files that are asked for.

        Args:
            folder: where.
            formats: of `FORMATS`.
            data: a data set; with ``coco`` its labels of these images are written, too.

        Raises:
            DataError: a label file of it is damaged; all else is written.
            OSError: a file cannot be written.
        """
        if "json" in formats:
            _write_compact(folder / PREDICTIONS, self._as_data())
        if "csv" in formats:
            write_text(folder / TABLE, self._table())
        if "coco" in formats:
            _write_compact(folder / COCO, list(_coco_results(self.images)))
        if "coco" in formats and data is not None:  # last: a label file may be damaged
            _write_compact(folder / TRUTH, coco_truth(self.images, data))

    def _as_data(self) -> dict[str, Any]:
        model = self.detector.model
        about = {
            "model": model.origin, "file": str(model.path), "engine": model.engine,
            "version": self.detector.version, "imgsz": model.imgsz, "names": list(self.detector.names),
        }  # fmt: skip
        return {
            "format": FORMAT, "complete": self.ended_by is None, "seconds": round(self.seconds, 3),
            "model": about, "settings": self.settings, "images": self.images, "skipped": self.skipped,
        }  # fmt: skip

    def _table(self) -> str:
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(_COLUMNS)
        for image in self.images:
            for found in image["detections"]:
                both = {**image, **found}
                writer.writerow([both.get(column, "") for column in _COLUMNS])
        # Of file names that are no UTF-8 the odd bytes are written as JSON writes them: \\udcfc.
        return stream.getvalue().encode(errors="backslashreplace").decode()


def described(row: Sequence[float], names: Sequence[str]) -> dict[str, Any]:
    """A detection as JSON says it.

    Args:
        row: x1, y1, x2, y2 in pixels, confidence, class id.
        names: of the classes.
    """
    corners = {key: round(value, _PIXELS) for key, value in zip(("x1", "y1", "x2", "y2"), row, strict=False)}
    number = int(row[5])
    return {"class_id": number, "class": names[number], "confidence": round(row[4], _SHARE), **corners}


def _coco_results(images: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "image_id": image["id"],
            "category_id": found["class_id"],
            "bbox": _box(found["x1"], found["y1"], found["x2"], found["y2"]),
            "score": found["confidence"],
        }
        for image in images
        for found in image["detections"]
    ]


def _box(x1: float, y1: float, x2: float, y2: float) -> list[float]:
    return [x1, y1, round(x2 - x1, _PIXELS), round(y2 - y1, _PIXELS)]


def coco_truth(images: Sequence[dict[str, Any]], data: Listing) -> dict[str, Any]:
    """The labels of images as COCO annotations, with the ids of the results.

    Args:
        images: as in ``predictions.json``; those that are not in the data set are left out.
        data: the data set.

    Raises:
        DataError: a label file is damaged.
    """
    samples = {sample.image.resolve(): sample for split in data.splits.values() for sample in split}
    known: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image in images:
        sample = samples.get(Path(image["file"]).resolve())
        if sample is None or "frame" in image:
            continue
        width, height = image["width"], image["height"]
        known.append({"id": image["id"], "file_name": image["file"], "width": width, "height": height})
        for number, x, y, w, h in sample.labels_of(len(data.names)).tolist():
            box = _box((x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height)
            annotations.append(
                {
                    "id": len(annotations) + 1, "image_id": image["id"], "category_id": int(number),
                    "bbox": box, "area": box[2] * box[3], "iscrowd": 0,
                }
            )  # fmt: skip
    categories = [{"id": number, "name": name} for number, name in enumerate(data.names)]
    return {"images": known, "annotations": annotations, "categories": categories}


def _write_compact(path: Path, data: Any) -> None:
    """JSON without indentation: a line per detection would be most of a large file."""
    with landing(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        json.dump(data, stream)
        stream.write("\n")


def check_formats(text: str) -> tuple[str, ...]:
    """The formats in a comma-separated list; ``none`` or an empty text for none.

    Raises:
        ConfigError: there is no such format.
    """
    formats = tuple(word.strip() for word in text.split(",") if word.strip() not in ("", "none"))
    for word in formats:
        if word not in FORMATS:
            do = "Separate several by commas."
            raise ConfigError(expected("--formats", f"of {', '.join(FORMATS)}", word, do))
    return formats
