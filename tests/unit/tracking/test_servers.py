"""Servers behind passwords, tokens, paths and private certificates; and that no secret is written down."""

from __future__ import annotations

import base64
import json
import logging
import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sparse_exp.config.schema import TrackerConfig
from sparse_exp.errors import SparseExpError
from sparse_exp.redaction import RedactingFormatter, without_secrets
from sparse_exp.tracking import check_server

BASIC = "Basic " + base64.b64encode(b"ann:s3cret").decode()


class _Handler(BaseHTTPRequestHandler):
    """Lets in ann and whoever has the token, below /mlflow alone."""

    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        known = self.headers.get("Authorization") in (BASIC, "Bearer t0ken")
        status = 401 if not known else 200 if self.path.startswith("/mlflow/api/") else 404
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps({"experiments": []}).encode() if status == 200 else b"")

    do_GET = do_POST = _answer

    def log_message(self, *_) -> None:
        pass


def serve(certificate: Path | None = None) -> Iterator[int]:
    server = HTTPServer(("127.0.0.1", 0), _Handler)
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, certificate.with_name("key.pem"))
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


@pytest.fixture
def port() -> Iterator[int]:
    yield from serve()


@pytest.fixture
def certificate(tmp_path) -> Path:
    """Of an authority that nobody knows."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    path = tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=us"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", tmp_path / "key.pem", "-out", path]
    subprocess.run(command, check=True, capture_output=True)
    return path


@pytest.fixture(autouse=True)
def _once(monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


def refused(uri: str) -> str:
    with pytest.raises(SparseExpError) as raised:
        check_server(TrackerConfig(uri=uri), Path("store"))
    assert "\n" not in str(raised.value)
    assert "s3cret" not in str(raised.value)
    return str(raised.value)


def test_a_server_is_asked_as_runs_will_ask_it(port, monkeypatch):
    plain = f"http://127.0.0.1:{port}/mlflow"
    check_server(TrackerConfig(uri=f"http://ann:s3cret@127.0.0.1:{port}/mlflow"), Path("store"))
    assert "401" in refused(plain)
    assert "401" in refused(f"http://bob:s3cret@127.0.0.1:{port}/mlflow")
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_TOKEN", "t0ken")
        check_server(TrackerConfig(uri=plain), Path("store"))
        assert "404" in refused(f"http://127.0.0.1:{port}/elsewhere")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ann")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "s3cret")
    check_server(TrackerConfig(uri=plain), Path("store"))


@pytest.mark.parametrize("uri", ["http://ann:s3cret@127.0.0.1", "http://ann:s3cret@none.invalid:9/x"])
def test_where_nobody_listens_one_line_says_so(uri):
    assert "tracker=none" in refused(uri)


def test_a_private_certificate(certificate, monkeypatch):
    for port in serve(certificate):
        uri = f"https://ann:s3cret@127.0.0.1:{port}/mlflow"
        assert "SSL" in refused(uri)
        monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(certificate))
        check_server(TrackerConfig(uri=uri), Path("store"))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("at http://ann:p@ss@host:1/x?y=z#a.", "at http://***@host:1/x?y=z#a."),
        ("at http://ann:p@ss@host:1/x?y=z#a@b.", "at http://***@b."),  # of what could be the password
        ("http://h:1/x and ann@example.org", "http://h:1/x and ann@example.org"),
        ("postgresql+psycopg2://u:p@db/mlflow", "postgresql+psycopg2://***@db/mlflow"),
        ("https://h/w.pt?X-Amz-Signature=abc&n=1", "https://h/w.pt?X-Amz-Signature=***&n=1"),
        ("'https://h/w.pt?n=1&token=abc'", "'https://h/w.pt?n=1&token=***'"),
        ("ann@example.org wrote https://h/@x", "ann@example.org wrote https://h/@x"),
    ],
)
def test_what_is_shown_of_an_address(text, shown):
    assert without_secrets(text) == shown


@given(st.text(st.characters(exclude_categories=["Z", "C"], exclude_characters='"'), min_size=1))
@example("a/b#c?d'e@f:g")
def test_of_a_password_nothing_is_shown_whatever_it_holds(password):
    shown = without_secrets(f"no answer from postgresql://ann:{password}@host/db, port 1")
    assert shown == "no answer from postgresql://***@host/db, port 1"


@pytest.mark.parametrize(
    "name",
    [
        "private_token",
        "passwd",
        "pwd",
        "auth_token",
        "api-key",
        "key",
        "client_secret",
        "jwt",
        "X-Amz-Signature",
    ],
)
def test_parameters_that_let_in_are_not_shown(name):
    assert without_secrets(f"https://a/b?x=1&{name}=s3cret&y=2") == f"https://a/b?x=1&{name}=***&y=2"


@pytest.mark.parametrize("name", ["author", "page", "keys", "monkey"])
def test_other_parameters_are(name):
    assert without_secrets(f"https://a/b?{name}=v") == f"https://a/b?{name}=v"


def test_a_log_shows_no_secret_not_even_in_a_traceback():
    try:
        raise ConnectionError("no answer from http://ann:s3cret@host")
    except ConnectionError:
        import sys

        record = logging.LogRecord("x", 10, __file__, 1, "at %s", ("http://a:s3cret@h",), sys.exc_info())
    text = RedactingFormatter("%(message)s").format(record)
    assert "Traceback" in text
    assert "s3cret" not in text
