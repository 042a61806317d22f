"""The output directory of ``predict``: names of annotated pictures, predictions as JSON, CSV and COCO.

Predictions are written as they come, a line of JSON each, and the other files are made of these lines at the
end: memory does not grow with the number of images, and a process that is killed loses none of them.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from sparse_exp.data.detection import Listing
from sparse_exp.errors import ConfigError, expected
from sparse_exp.files import is_part, landing, remove_parts
from sparse_exp.locks import IN_DIRECTORY, alone_in

if TYPE_CHECKING:  # these import the engines, which ``--help`` does without
    from sparse_exp.predict.detector import Detector
    from sparse_exp.predict.pipeline import ImageResult

FORMAT = "sparse_exp.predict/1"
PREDICTIONS, TABLE, COCO, TRUTH = "predictions.json", "predictions.csv", "coco.json", "coco_truth.json"
LINES = "predictions.jsonl"
FORMATS = ("json", "jsonl", "csv", "coco")
FOLDER = "predict"
_COLUMNS = ("file", "frame", "class_id", "class", "confidence", "x1", "y1", "x2", "y2")
_PIXELS, _SHARE = 3, 6  # decimals
_LONGEST_STEM = 200  # bytes


@contextmanager
def alone(out: Path | None) -> Iterator[None]:
    """Be the only process that writes predictions into a directory while the block runs.

    Args:
        out: the directory; None: it will be a new one.

    Raises:
        ConfigError: another process does, or the directory cannot be made.
    """
    with ExitStack() as stack:
        if out is not None:
            try:
                stack.enter_context(alone_in(out, f"Predictions are being written into {out}"))
            except OSError as error:
                raise _cannot_make(out, error) from error
        yield


def new_directory(out: Path | None, outputs: Path, *, overwrite: bool, sources: Sequence[Path]) -> Path:
    """Make an empty directory for the outputs.

    Args:
        out: its path; None: ``predict/1`` below ``outputs``, or the next number that is free.
        outputs: where runs are, too.
        overwrite: delete the files of an earlier prediction in it.
        sources: files that must not be deleted.

    Raises:
        ConfigError: see `require_replaceable`; or the directory cannot be made.
    """
    try:
        if out is None:
            return _next_numbered(outputs / FOLDER)
        require_replaceable(out, overwrite=overwrite, sources=sources)
        out.mkdir(parents=True, exist_ok=True)
        remove_parts(out, below=False)  # of a killed process
        for path in _content(out):  # and not the directory itself, which may be a link or a mount
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    except OSError as error:
        raise _cannot_make(out or outputs / FOLDER, error) from error
    return out


def _cannot_make(where: Path, error: OSError) -> ConfigError:
    do = "Choose another with --out DIR."
    return ConfigError(f"Cannot make the directory {where}: {error.strerror}. {do}")


def _content(folder: Path) -> list[Path]:
    """What lies in a directory, but for the lock that is held while it is written, and half-written files."""
    return [path for path in folder.iterdir() if path.name != IN_DIRECTORY and not is_part(path.name)]


def require_replaceable(out: Path | None, *, overwrite: bool, sources: Sequence[Path]) -> None:
    """Refuse a directory that holds files, unless it is an earlier prediction that may be replaced.

    Args:
        out: see `new_directory`, also for the others.
        overwrite: whether an earlier prediction may be replaced.
        sources: files that must not lie in it.

    Raises:
        ConfigError: the directory may not be replaced.
    """
    if out is None or not out.is_dir() or not _content(out):
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
    """Whether a file of predictions begins as ours. Other programs write files of these names, too."""
    start = json.dumps({"format": FORMAT})[:-1].encode()
    for name in (PREDICTIONS, LINES):  # the lines are those of a prediction that was killed
        with suppress(OSError), (folder / name).open("rb") as stream:
            if stream.read(len(start)) == start:
                return True
    return False


def _next_numbered(parent: Path) -> Path:
    """Make the directory after the last of ``parent/1``, ``parent/2`` ...; two processes get two numbers."""
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
    """Names of annotated files: that of the source with another ending, and a number where it is taken.

    Bytes that are not UTF-8 are left out. A name is cut after 200 bytes: file systems allow 255, and the
    temporary name of a file that is being written is longer.
    """

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def name(self, source: Path, suffix: str) -> str:
        """A name that was not given before.

        Args:
            source: image or video.
            suffix: of the new file, for example ``.jpg``.
        """
        stem = os.fsencode(source.stem)[:_LONGEST_STEM].decode(errors="ignore") or "image"
        name, number = f"{stem}{suffix}", 2
        while name.lower() in self._taken:  # some file systems do not tell A from a
            name, number = f"{stem}-{number}{suffix}", number + 1
        self._taken.add(name.lower())
        return name


@dataclass
class Results:
    """The detections in all images, and the files that record them.

    Args:
        detector: it made the detections.
        settings: of the command, for the record.
        folder: where the files are written; ``predictions.jsonl`` grows there with each image.

    Attributes:
        images: how many there are, frames included.
        skipped: file and reason of each image that cannot be read.
        classes: detections in all images, by the name of their class.
        unfinished: names of annotated videos that were begun and are not there.
        seconds: duration without loading the model.
        ended_by: the error, or Ctrl-C, that ended the prediction early; None: it was complete.
    """

    detector: Detector
    settings: dict[str, Any]
    folder: Path
    images: int = 0
    skipped: list[dict[str, str]] = field(default_factory=list)
    classes: Counter[str] = field(default_factory=Counter)
    unfinished: set[str] = field(default_factory=set)
    seconds: float = 0.0
    ended_by: BaseException | None = None
    _lines: IO[str] | None = None

    def add(
        self, number: int, result: ImageResult[Any], picture: str | None, fps: float | None = None
    ) -> None:
        """Add one image or frame.

        Args:
            number: its id.
            result: its detections.
            picture: name of the annotated file; None where there is none.
            fps: of the video, for a frame.

        Raises:
            OSError: the line cannot be written.
        """
        source = result.input
        entry: dict[str, Any] = {"id": number, "file": str(source.file)}
        if source.frame is not None:
            entry |= {"frame": source.frame, "seconds": round(source.frame / fps, 4) if fps else None}
        entry |= {"width": result.size[0], "height": result.size[1], "picture": picture}
        rows = result.detections.astype(float).tolist()
        found = [described(row, self.detector.names) for row in rows]
        self._write_line({**entry, "detections": found})
        self.images += 1
        self.classes.update(one["class"] for one in found)

    def write(self, formats: Sequence[str], data: Listing | None) -> None:
        """Write the files that are asked for.

        Args:
            formats: some of `FORMATS`.
            data: a data set; with ``coco`` its labels of these images are written, too.

        Raises:
            DataError: one of its label files is damaged; all other files are written.
            OSError: a file cannot be written; ``predictions.jsonl`` stays.
        """
        if "json" in formats:
            start = json.dumps({**self._about(), "images": []})[:-2]
            end = f'], "skipped": {json.dumps(self.skipped)}}}'
            _write_joined(self.folder / PREDICTIONS, start, map(json.dumps, self._entries()), end)
        if "csv" in formats:
            self._write_csv()
        if "coco" in formats:
            _write_joined(self.folder / COCO, "[", map(json.dumps, _coco_results(self._entries())), "]")
        if "coco" in formats and data is not None:  # last: a label file may be damaged
            truth = json.dumps(coco_truth(self._entries(), data))
            _write_joined(self.folder / TRUTH, truth, (), "")
        if "jsonl" in formats:
            self._write_line({"end": {**self._about(), "skipped": self.skipped}})
        self._close()
        if "jsonl" not in formats:
            (self.folder / LINES).unlink(missing_ok=True)

    def _about(self) -> dict[str, Any]:
        """What is known at the end, but for the images."""
        ended = {"complete": self.ended_by is None, "seconds": round(self.seconds, 3)}
        return {"format": FORMAT, **ended, **self._made_with()}

    def _made_with(self) -> dict[str, Any]:
        model = self.detector.model
        about = {
            "model": model.origin, "file": str(model.path), "engine": model.engine,
            "version": self.detector.version, "imgsz": model.imgsz, "names": list(self.detector.names),
        }  # fmt: skip
        return {"model": about, "settings": self.settings}

    def _write_line(self, entry: dict[str, Any]) -> None:
        if self._lines is None:
            self._lines = (self.folder / LINES).open(
                "w", encoding="utf-8", buffering=1
            )  # a line is out at once
            self._lines.write(json.dumps({"format": FORMAT, **self._made_with()}) + "\n")
        self._lines.write(json.dumps(entry) + "\n")

    def _close(self) -> None:
        if self._lines is not None:
            self._lines.close()

    def _entries(self) -> Iterator[dict[str, Any]]:
        """The images again, one after the other, as in ``predictions.json``."""
        if self._lines is None:
            return
        with (self.folder / LINES).open(encoding="utf-8") as lines:
            next(lines)
            for line in lines:
                if not line.endswith("\n"):  # the disk was full
                    return
                entry: dict[str, Any] = json.loads(line)
                if entry["picture"] in self.unfinished:
                    entry["picture"] = None
                yield entry

    def _write_csv(self) -> None:
        # Bytes of a file name that are not UTF-8 are written as in JSON: \\udcfc.
        how: dict[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace", "newline": ""}
        with landing(self.folder / TABLE) as temporary, temporary.open("w", **how) as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(_COLUMNS)
            for image in self._entries():
                for detection in image["detections"]:
                    both = {**image, **detection}
                    writer.writerow([both.get(column, "") for column in _COLUMNS])


def described(row: Sequence[float], names: Sequence[str]) -> dict[str, Any]:
    """A detection as an object of ``predictions.json``.

    Args:
        row: x1, y1, x2, y2 in pixels, confidence, class id.
        names: of the classes.
    """
    corners = {key: round(value, _PIXELS) for key, value in zip(("x1", "y1", "x2", "y2"), row, strict=False)}
    number = int(row[5])
    return {"class_id": number, "class": names[number], "confidence": round(row[4], _SHARE), **corners}


def _coco_results(images: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for image in images:
        for detection in image["detections"]:
            yield {
                "image_id": image["id"],
                "category_id": detection["class_id"],
                "bbox": _coco_box(detection["x1"], detection["y1"], detection["x2"], detection["y2"]),
                "score": detection["confidence"],
            }


def _coco_box(x1: float, y1: float, x2: float, y2: float) -> list[float]:
    """Left, top, width and height, px."""
    return [x1, y1, round(x2 - x1, _PIXELS), round(y2 - y1, _PIXELS)]


def coco_truth(images: Iterable[dict[str, Any]], data: Listing) -> dict[str, Any]:
    """The labels of images as COCO annotations, under the same image ids as the results.

    Args:
        images: as in ``predictions.json``; those that the data set does not hold are left out.
        data: the data set.

    Raises:
        DataError: a label file is damaged.
    """
    samples = {sample.image.resolve(): sample for split in data.splits.values() for sample in split}
    labelled: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image in images:
        sample = samples.get(Path(image["file"]).resolve())
        if sample is None or "frame" in image:
            continue
        width, height = image["width"], image["height"]
        labelled.append({"id": image["id"], "file_name": image["file"], "width": width, "height": height})
        for number, x, y, w, h in sample.labels_of(len(data.names)).tolist():
            left, right = (x - w / 2) * width, (x + w / 2) * width
            top, bottom = (y - h / 2) * height, (y + h / 2) * height
            box = _coco_box(left, top, right, bottom)
            annotations.append(
                {
                    "id": len(annotations) + 1, "image_id": image["id"], "category_id": int(number),
                    "bbox": box, "area": box[2] * box[3], "iscrowd": 0,
                }
            )  # fmt: skip
    categories = [{"id": number, "name": name} for number, name in enumerate(data.names)]
    return {"images": labelled, "annotations": annotations, "categories": categories}


def _write_joined(path: Path, start: str, parts: Iterable[str], end: str) -> None:
    """Write a text file whole or not at all: the parts with commas between them, one after the other."""
    with landing(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        stream.write(start)
        for number, part in enumerate(parts):
            stream.write(f", {part}" if number else part)
        stream.write(f"{end}\n")


def check_formats(text: str) -> tuple[str, ...]:
    """The formats in a comma-separated list; ``none`` or an empty text means none.

    Raises:
        ConfigError: a word is not one of `FORMATS`.
    """
    formats = tuple(word.strip() for word in text.split(",") if word.strip() not in ("", "none"))
    for word in formats:
        if word not in FORMATS:
            do = "Separate several by commas."
            raise ConfigError(expected("--formats", f"of {', '.join(FORMATS)}", word, do))
    return formats
