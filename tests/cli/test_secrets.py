"""A password or a token stays in the process: it is in no file, no message and nothing that is told."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from command import command_line

from sparse_exp.files import write_text

__all__ = ["command_line"]

SMOKE = ["experiment=smoke", "model.weights=scratch", "stages=[fetch]", "tracker.system_metrics=false"]
SMOKE += ["paths.cache=cache"]


@pytest.fixture
def server(monkeypatch, tmp_path):
    """Takes what it is told from ann, as far as a run needs an answer; ``.told`` has all of it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    told: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def reply(self) -> None:
            told.append(self.path.encode() + self.rfile.read(int(self.headers.get("Content-Length") or 0)))
            known = self.headers.get("Authorization") == "Basic " + base64.b64encode(b"ann:s3cret").decode()
            info = {"run_id": "a" * 32, "experiment_id": "1", "status": "RUNNING", "artifact_uri": "s3://x"}
            info["lifecycle_stage"] = "active"
            experiment = {"experiment_id": "1", "name": "e", "lifecycle_stage": "active"}
            body = {"experiment": experiment, "run": {"info": info, "data": {}}}
            self.send_response(200 if known else 401)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        do_GET = do_POST = do_PATCH = reply

        def log_message(self, *_) -> None:
            pass

    http = HTTPServer(("127.0.0.1", 0), Handler)
    http.told = told
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield http
    http.shutdown()
    http.server_close()


def written(place: Path) -> str:
    """All that is in the files of a directory."""
    return "".join(path.read_text(errors="replace") for path in place.rglob("*") if path.is_file())


def test_the_password_of_a_server_is_in_no_file_and_no_line(server, monkeypatch, command_line, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://ann:s3cret@127.0.0.1:{server.server_port}")
    ended = command_line(*SMOKE, "paths.run=run")
    assert ended.code == 0, ended.output
    assert f"Tracking to http://***@127.0.0.1:{server.server_port}" in ended.output
    assert len(server.told) > 3
    for text in (ended.output, written(tmp_path), b"".join(server.told).decode()):
        assert "s3cret" not in text


@pytest.mark.parametrize(
    ("word", "do"),
    [
        ("tracker.uri='http://ann:s3cret@host'", "MLFLOW_TRACKING_URI"),
        ("model.weights='https://ann:s3cret@host/w.pt'", "~/.netrc"),
        ("model.weights='https://host/w.pt?X-Amz-Signature=s3cret'", "download"),
    ],
)
@pytest.mark.parametrize("typed", [True, False])
@pytest.mark.parametrize("swept", [[], ["-m"]])
def test_a_secret_in_the_configuration_is_refused_and_not_shown(
    command_line, tmp_path, monkeypatch, word, do, typed, swept
):
    monkeypatch.chdir(tmp_path)
    words = [*swept, "model=yolov5n", "dataset=digits", "stages=[fetch]", "paths.cache=cache"]
    if typed:
        words.append(word)
    else:
        (group, key), value = word.partition("=")[0].split("."), word.partition("=")[2]
        text = f"# @package _global_\n{group}: {{{key}: {value}}}\n"
        write_text(tmp_path / "mine" / "local" / "default.yaml", text)
        words += ["--config-dir", "mine"]
    ended = command_line(*words)
    assert ended.code == 1
    assert do in ended.error
    assert "s3cret" not in ended.error + ended.output
    assert not (tmp_path / "outputs").exists()
