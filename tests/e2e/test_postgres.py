"""A team's server: PostgreSQL behind MLflow with users and TLS, four writers, and a crash in the middle."""

from __future__ import annotations

import base64
import os
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
from stores import client, known

from sparse_exp.tracking.dashboard import free_port

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate"),
]
psycopg2 = pytest.importorskip("psycopg2", reason="the extra server is not installed")
pytest.importorskip("flask_wtf", reason="the extra server is not installed")

PATIENCE_S = 400
WORDS = [
    "experiment=smoke", "dataset.imgsz=64", "recipe.variables.num_epochs=3", "tracker.system_metrics=false",
    "stages=[fetch,plan,train,evaluate,export]", "hardware.engines=[onnxruntime]", "trainer.threads=1",
]  # fmt: skip
WRITERS = range(4)
PASSWORD = "a-long-s3cret"
AUTH = """[mlflow]
default_permission = NO_PERMISSIONS
database_uri = sqlite:///{folder}/auth.db
admin_username = admin
admin_password = {password}
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
"""


def program(name: str) -> str:
    """One of PostgreSQL's programs, which Debian keeps off the PATH."""
    found = shutil.which(name) or next(map(str, Path("/usr/lib/postgresql").glob(f"*/bin/{name}")), None)
    if found is None:
        pytest.skip("PostgreSQL is not here")
    return found


class Machine:
    """What serves: PostgreSQL, and MLflow with users and TLS on top. All of it can be cut off at once."""

    def __init__(self, folder: Path, database: Path) -> None:
        self.folder, self.database = folder, database
        self.ports = free_port(), free_port()
        self.certificate, self.key = folder / "certificate.pem", folder / "key.pem"
        self.uri = f"https://127.0.0.1:{self.ports[1]}"
        self.processes: list[subprocess.Popen[bytes]] = []
        # PostgreSQL does not run as root.
        self.other = {"user": "nobody", "group": "nogroup", "extra_groups": []} if os.geteuid() == 0 else {}

    def set_up(self) -> None:
        """Make certificate, database and users."""
        name = ["-subj", "/CN=us", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", self.key]
        request = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *name]
        subprocess.run([*request, "-out", self.certificate], check=True, capture_output=True)
        (self.folder / "auth.ini").write_text(AUTH.format(folder=self.folder, password=PASSWORD))
        if self.other:
            shutil.chown(self.database, self.other["user"], self.other["group"])
        (self.database / "password").write_text(PASSWORD)
        make = [program("initdb"), "-D", self.database / "data", "-U", "mlflow", "-A", "scram-sha-256"]
        make += ["--no-sync", "--pwfile", self.database / "password"]
        subprocess.run(make, check=True, capture_output=True, cwd=self.database, **self.other)
        self.start_database()
        with closing(self.connection("postgres")) as connection:  # with it alone a transaction would begin
            connection.autocommit = True
            connection.cursor().execute("CREATE DATABASE mlflow")

    def connection(self, name: str):
        return psycopg2.connect(
            host="127.0.0.1", port=self.ports[0], user="mlflow", password=PASSWORD, dbname=name
        )

    def start_database(self) -> None:
        words = ["-D", self.database / "data", "-h", "127.0.0.1", "-p", str(self.ports[0]), "-k", ""]
        self.processes.append(self.quiet(program("postgres"), *words, cwd=self.database, **self.other))
        self.wait(lambda: self.connection("postgres").close(), psycopg2.OperationalError)

    def start_server(self) -> None:
        database = f"postgresql://mlflow:{PASSWORD}@127.0.0.1:{self.ports[0]}/mlflow"
        words = ["-m", "mlflow", "server", "--app-name", "basic-auth", "--backend-store-uri", database]
        words += ["--artifacts-destination", str(self.folder / "artifacts"), "--port", str(self.ports[1])]
        words += ["--workers", "1"]
        words += ["--uvicorn-opts", f"--ssl-keyfile={self.key} --ssl-certfile={self.certificate}"]
        own = {"MLFLOW_AUTH_CONFIG_PATH": str(self.folder / "auth.ini")}
        own |= {"MLFLOW_FLASK_SERVER_SECRET_KEY": "x", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        self.processes.append(self.quiet(sys.executable, *words, env={**os.environ, **own}))
        self.wait(lambda: self.ask("/health"), OSError)

    def quiet(self, *command: str | Path, **options) -> subprocess.Popen[bytes]:
        log = (self.folder / "log").open("ab")
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, **options)

    def ask(self, path: str, user: str | None = None) -> int:
        """The status of the answer to a GET."""
        request = urllib.request.Request(self.uri + path)
        if user:
            login = base64.b64encode(f"{user}:{PASSWORD}".encode()).decode()
            request.add_header("Authorization", f"Basic {login}")
        context = ssl.create_default_context(cafile=self.certificate)
        try:
            with urllib.request.urlopen(request, timeout=30, context=context) as response:
                return response.status
        except urllib.error.HTTPError as error:
            return error.code

    def wait(self, answers, failure: type[Exception]) -> None:
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            with suppress(failure):
                answers()
                return
            assert self.processes[-1].poll() is None, (self.folder / "log").read_text()[-4000:]
            time.sleep(0.5)
        pytest.fail((self.folder / "log").read_text()[-4000:])

    def crash(self) -> None:
        """End all of it as a power failure does: nothing is finished or written."""
        while self.processes:
            process = self.processes.pop()
            with suppress(ProcessLookupError):
                os.killpg(
                    process.pid, signal.SIGQUIT
                )  # of PostgreSQL, whose children have groups of their own
                if "mlflow" in str(process.args):
                    os.killpg(process.pid, signal.SIGKILL)
            process.wait(60)


@pytest.fixture
def machine(tmp_path) -> Iterator[Machine]:
    database = Path(tempfile.mkdtemp(prefix="pg-"))  # whose parents every user may enter
    machine = Machine(tmp_path, database)
    try:
        machine.set_up()
        machine.start_server()
        yield machine
    finally:
        machine.crash()
        shutil.rmtree(database, ignore_errors=True)


def sx(cwd: Path, *words: str, **variables: str) -> subprocess.Popen[str]:
    environment = {**os.environ, **variables}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, "-m", *words], cwd=cwd, env=environment, **pipes)


def ended(process: subprocess.Popen[str], code: int = 0) -> str:
    text = process.communicate(timeout=PATIENCE_S)[0]
    assert process.returncode == code, text
    return text


def test_four_writers_and_a_crash_in_the_middle(machine, tmp_path, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("SPARSE_EXP_CACHE", str(tmp_path / "cache"))
    search = "/api/2.0/mlflow/experiments/search?max_results=1"
    assert [machine.ask(search), machine.ask(search, "admin"), machine.ask(search, "bob")] == [401, 200, 401]

    login = {"MLFLOW_TRACKING_URI": machine.uri, "MLFLOW_TRACKING_USERNAME": "admin"}
    login |= {
        "MLFLOW_TRACKING_PASSWORD": PASSWORD,
        "MLFLOW_TRACKING_SERVER_CERT_PATH": str(machine.certificate),
    }
    names = [f"seed-{seed}" for seed in WRITERS]
    writers = [
        sx(tmp_path, "sparse_exp", *WORDS, f"seed={seed}", f"name={name}", f"paths.run={name}", **login)
        for seed, name in zip(WRITERS, names, strict=True)
    ]
    end = time.monotonic() + PATIENCE_S
    while not (
        list(tmp_path.glob("seed-*/weights/state.pt"))  # one of them is amid its training
        and sum('"tracker_run_id"' in path.read_text() for path in tmp_path.glob("seed-*/manifest.json")) == 4
    ):
        assert time.monotonic() < end
        time.sleep(0.1)
    machine.crash()
    time.sleep(5)
    machine.start_database()
    machine.start_server()
    said = [ended(writer) for writer in writers]
    ended(sx(tmp_path, "sparse_exp.tracking", "sync", *names, **login))

    quiet = tmp_path / "quiet"  # one after the other, into a store that nothing disturbs
    quiet.mkdir()
    for seed, name in zip(WRITERS, names, strict=True):
        ended(sx(quiet, "sparse_exp", *WORDS, f"seed={seed}", f"name={name}", f"paths.run={name}"))

    for name, value in login.items():
        monkeypatch.setenv(name, value)
    found = {}
    for store in (MlflowClient(machine.uri), client(quiet / "outputs" / "mlflow")):
        experiment = store.get_experiment_by_name("sparse_exp")
        runs = store.search_runs([experiment.experiment_id])
        assert sorted(run.info.run_name for run in runs) == names  # each once
        for run in runs:
            found.setdefault(run.info.run_name, []).append(known(store, run.info.run_id))
    for name, (disturbed, undisturbed) in found.items():
        assert disturbed["status"] == "FINISHED"
        assert len(disturbed["metrics"]["loss/box"]) == 3
        assert disturbed == undisturbed, name
    for text in (*said, *(path.read_text() for path in tmp_path.glob("seed-*/*.y*ml"))):
        assert PASSWORD not in text
