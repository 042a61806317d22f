import json
import logging
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sparse_exp.errors import SparseExpError
from sparse_exp.tracking import Artifact, Dataset, Finish, Metrics, Model, Tags
from sparse_exp.tracking.spool import UNSENT, Destination, Spool, Waiting, read_destination, read_waiting

THERE = Destination("http://server:5000", "a" * 32)


def events(folder: Path) -> list:
    return [
        Metrics({"val/map50": 0.5}, 3),
        Metrics({"size/onnx_mb": 1e-9}),
        Tags({"recipe": "prüne\n"}),
        Dataset("trees", "0123", "index:a==1!b", "train", 100),
        Artifact(folder / "plots", "report"),
        Artifact(Path("/elsewhere/ü.md")),
        Model(folder / "deployment" / "model.onnx", "crowns", "candidate", {"map50": "0.5"}),
        Finish("FAILED", "why"),
    ]


def test_every_kind_of_event_is_read_back_as_it_was(tmp_path):
    spool = Spool(tmp_path / "new", THERE)
    waiting = [Waiting(event, 1000 + number) for number, event in enumerate(events(tmp_path / "new"))]
    for one in waiting:
        spool.append(one)
    assert spool.read() == waiting == read_waiting(tmp_path / "new" / UNSENT)
    assert read_destination(spool.path) == THERE


def test_a_run_that_was_moved_takes_its_files_along(tmp_path):
    Spool(tmp_path / "old", THERE).append(Waiting(Artifact(tmp_path / "old" / "report.md"), 1))
    (tmp_path / "old").rename(tmp_path / "moved")
    (waiting,) = read_waiting(tmp_path / "moved" / UNSENT)
    assert waiting.event.path == tmp_path / "moved" / "report.md"


def test_what_was_sent_leaves_and_with_the_last_event_the_file(tmp_path):
    spool = Spool(tmp_path, THERE)
    first, second = Waiting(Tags({"a": "1"}), 1), Waiting(Tags({"a": "2"}), 2)
    spool.append(first)
    spool.append(second)
    spool.replace([second])
    assert spool.read() == [second]
    assert read_destination(spool.path) == THERE
    spool.replace([])
    spool.close()
    assert list(tmp_path.iterdir()) == []


def test_a_line_that_a_kill_cut_off_is_left_out(tmp_path, caplog):
    spool = Spool(tmp_path, THERE)
    spool.append(Waiting(Tags({"a": "1"}), 1))
    whole = spool.path.read_text()
    spool.append(Waiting(Tags({"b": "2"}), 2))
    spool.path.write_text(spool.path.read_text()[: len(whole) + 20])
    with caplog.at_level(logging.WARNING):
        assert [waiting.event for waiting in spool.read()] == [Tags({"a": "1"})]
    assert "Line 3" in caplog.text


@pytest.mark.parametrize("text", ["", "no json\n", '{"event": "tags"}\n', "[]\n"])
def test_a_file_that_says_nothing_of_a_store_is_refused(tmp_path, text):
    (tmp_path / UNSENT).write_text(text)
    with pytest.raises(SparseExpError, match=UNSENT) as caught:
        read_destination(tmp_path / UNSENT)
    assert "\n" not in str(caught.value)


def test_a_password_is_not_written(tmp_path):
    from sparse_exp.tracking.outbox import without_password

    spool = Spool(tmp_path, Destination(without_password("http://me:secret@server:5000"), "id"))
    spool.append(Waiting(Tags({}), 1))
    assert json.loads(spool.path.read_text().splitlines()[0])["uri"] == "http://***@server:5000"


HOLD = """
import sys, time
from pathlib import Path
from sparse_exp.tracking import Tags
from sparse_exp.tracking.spool import Destination, Spool, Waiting
spool = Spool(Path(sys.argv[1]), Destination("http://server:5000", "a" * 32))
spool.append(Waiting(Tags({"a": "1"}), 1))
print("open", flush=True)
time.sleep(60)
"""


def test_one_process_at_a_time_and_a_killed_one_lets_go(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "open\n"
        with pytest.raises(TimeoutError):
            Spool(tmp_path, THERE)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    started = time.monotonic()
    assert [waiting.event for waiting in Spool(tmp_path, THERE, 20.0).read()] == [Tags({"a": "1"})]
    assert time.monotonic() - started < 10
