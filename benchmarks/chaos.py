"""Kill runs and sweeps at random moments, break what they stand on, go on with them, and look what is lost.

Each attempt has a folder of its own, with a cache, a tracking store and a place for temporary files. In it a
small run, or a sweep of two, is started and disturbed, mostly several times, then gone on with until it ends.
After each disturbance no process may be left, and of what ended early there is one line. At the end all is
compared with a run or sweep that nobody disturbed:

- accuracies, sparsities, all other results but times and sizes, and the digests of checkpoints (exported
  files hold the name of their run);
- the names of all files in the folder, so that a lock or a half-written file that stayed is found;
- the runs in the tracking store, of which none may be RUNNING.

    python benchmarks/chaos.py --minutes 10 --write docs/reliability.md
    python benchmarks/chaos.py --times 100 --seed 7 --json chaos.json
    python benchmarks/chaos.py --times 1 --seed 7 --first 12        # attempt 12 of that seed alone

With ``--json`` the attempts of former calls count, too, and the next ones follow. A seed gives the same
disturbances at the same shares of the time that an undisturbed run takes, which is as near as machines repeat
themselves. Full and read-only disks are small file systems in a namespace that ``unshare`` makes;
where the system does not allow that, they are left out. The exit code is 1 where anything was lost.
"""

from __future__ import annotations

import argparse
import http.client
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil

from sparse_exp.command import Parser, amount, run_command, whole
from sparse_exp.errors import StageFailed
from sparse_exp.files import read_json, write_json, write_text
from sparse_exp.hardware import host_facts
from sparse_exp.text import between_marks, markdown_table
from sparse_exp.tracking.dashboard import free_port

MARK = "chaos"
SMALL = [
    "experiment=smoke", "dataset.imgsz=64", "recipe.variables.num_epochs=2", "dataset.workers=1",
    "trainer.threads=1", "hardware.engines=[onnxruntime]", "hardware.warmup_s=0", "hardware.repeats=1",
    "tracker.system_metrics=false",
]  # fmt: skip
RUN = [*SMALL, "paths.run=run"]
SWEEP = ["-m", *SMALL, "recipe=dense,transfer_quant", "launcher=joblib", "launcher.jobs=2"]
_OWN = ("time/", "benchmark/", "size/")  # results that differ from run to run
_NAMES = re.compile(r"[0-9a-f]{20,32}")  # parts of names that do: identifiers, digests of paths
_PATIENCE = 600.0  # seconds until a start counts as hanging
_SECONDS_TO_LEAVE = 20.0  # for processes whose parent was killed
_IN_NAMESPACE = "SPARSE_EXP_CHAOS_NAMESPACE"


@dataclass
class Disturbance:
    """What was done to a run or sweep, and what that led to.

    Attributes:
        what: such as ``SIGKILL of its main process``.
        at: seconds since the start.
        ended: how the start ended: ``killed``, ``finished``, ``one line``.
        lost: whatever should not be.
        said: the line that it ended with; empty where it finished.
    """

    what: str
    at: float
    ended: str
    lost: list[str]
    said: str


class Place:
    """A folder in which a run or a sweep is made, with all that it writes.

    Args:
        folder: it is made.
        words: of the command that starts it.
        size: bytes that it needs.
    """

    def __init__(self, folder: Path, words: list[str], size: int = 0) -> None:
        self.folder, self.words, self.size = folder, words, size
        self.console = folder.with_name(f"{folder.name}.console")
        self.console.touch()
        (folder / "tmp").mkdir(parents=True, exist_ok=True)

    def start(self, words: list[str]) -> subprocess.Popen[bytes]:
        """Start the product, whose output goes to the console's file."""
        own = {"SPARSE_EXP_CACHE": str(self.folder / "cache"), "TMPDIR": str(self.folder / "tmp")}
        environment = {**os.environ, **own, "HYDRA_FULL_ERROR": "0"}
        environment.pop("MLFLOW_TRACKING_URI", None)
        with self.console.open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-m", *words], cwd=self.folder, env=environment,
                stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def go_on(self) -> subprocess.Popen[bytes]:
        """Start it, or go on with it where it has begun."""
        begun = (self.folder / "run" / "manifest.json").is_file()
        return self.start(["sparse_exp", *(["resume=run"] if begun else self.words)])

    def finish(self) -> None:
        """Go on until it ends well.

        Raises:
            StageFailed: it does not.
        """
        process = self.go_on()
        if self.wait(process) != 0:
            raise StageFailed(f"It cannot be gone on with: {self.last_line()}")

    def wait(self, process: subprocess.Popen[bytes]) -> int:
        """The exit code of a start; one that hangs is killed."""
        try:
            return process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return 124

    def last_line(self) -> str:
        """The last line that was printed."""
        return (self.console.read_text(errors="replace").splitlines() or [""])[-1]

    def processes(self) -> list[psutil.Process]:
        """The processes that were started from here and still are."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("SPARSE_EXP_CACHE") == str(self.folder / "cache"):
                    found.append(process)
        return [process for process in found if process.is_running() and process.status() != "zombie"]

    def left_processes(self) -> list[str]:
        """Those that stay, which are then ended."""
        end = time.monotonic() + _SECONDS_TO_LEAVE
        while (left := self.processes()) and time.monotonic() < end:
            time.sleep(0.1)
        said = []
        for process in left:
            with suppress(psutil.Error):
                said.append(f"process left: {' '.join(process.cmdline())[:100]}")
                process.kill()
        return said

    @property
    def runs(self) -> list[Path]:
        """The directories of its runs."""
        found = (path.parent for path in self.folder.rglob("manifest.json") if "mlflow" not in path.parts)
        return sorted(path for path in found if path.is_dir())

    def outcome(self) -> dict[str, Any]:
        """All that must be the same again: plain data by name."""
        said: dict[str, Any] = {}
        for run in self.runs:
            name, manifest = str(run.relative_to(self.folder)), read_json(run / "manifest.json")
            said[f"{name}: status"] = manifest.get("status")
            for key, value in read_json(run / "result.json").items():
                if not key.startswith(_OWN):
                    said[f"{name}: {key}"] = value
            for file, digest in manifest.get("stages", {}).get("train", {}).get("outputs", {}).items():
                if file.startswith("weights/"):
                    said[f"{name}: digest of {file}"] = digest
        for path in self.folder.rglob("*"):
            if path.is_dir() or path.suffix == ".seen":  # written when a data set is used again
                continue
            if not any(part.startswith("pymp-") for part in path.parts):  # only its own process can remove it
                said[f"file {_NAMES.sub('*', str(path.relative_to(self.folder)))}"] = "there"
        return said

    @property
    def store(self) -> Path:
        """Its tracking store."""
        return self.folder / "outputs" / "mlflow"

    def note(self, text: str) -> None:
        """Write a line of this script's into the console's file."""
        with self.console.open("a") as file:
            file.write(f"-- {text}\n")


def open_runs(store: Path) -> list[str]:
    """Runs that a tracking store believes to be at work."""
    if not (store / "mlflow.db").is_file():
        return []
    with closing(sqlite3.connect(store / "mlflow.db")) as connection:
        rows = connection.execute("select name from runs where status = 'RUNNING'").fetchall()
    return [f"the run {name} is RUNNING in MLflow" for (name,) in rows]


def differences(undisturbed: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs at the end from what nobody disturbed."""
    return [
        f"{key} is {now.get(key, 'not there')!r}, and was {undisturbed.get(key, 'not there')!r}"
        for key in sorted(undisturbed.keys() | now.keys())
        if undisturbed.get(key) != now.get(key)
    ]


def _without(outcome: dict[str, Any], start: str) -> dict[str, Any]:
    return {key: value for key, value in outcome.items() if not key.startswith(start)}


# Of each thing whom a kill can hit: those of its processes whose command line holds a text; "": the first.
VICTIMS = {
    "run": {
        "its main process": "",
        "all its processes at once": None,
        "a worker that loads images": "-m sparse_exp",
        "an engine": "engines",
    },
    "sweep": {"its launcher": "", "all its processes at once": None, "the process of a job": "popen_loky"},
}


def victims(process: psutil.Process, text: str | None) -> list[psutil.Process]:
    """The processes that a kill may hit, as they are now."""
    if text == "":
        return [process]
    found = [process] if text is None else []
    with suppress(psutil.Error):
        for child in process.children(recursive=True):
            with suppress(psutil.Error):
                if text is None or text in " ".join(child.cmdline()):
                    found.append(child)
    return found


def kills(place: Place, draw: random.Random, seconds: float, *, kind: str) -> Iterator[Disturbance]:
    """Kill it at up to six moments, and go on in between, until it has ended."""
    for _ in range(draw.randint(2, 6)):
        name = draw.choice(list(VICTIMS[kind]))
        text, moment, extra = VICTIMS[kind][name], draw.random(), draw.random()
        begun, process = Begun(place), place.go_on()
        watched = psutil.Process(process.pid)
        if text:  # at some moment of such a process, of which there are few
            while process.poll() is None and not victims(watched, text):
                time.sleep(0.05)
            time.sleep(extra)
        else:
            with suppress(subprocess.TimeoutExpired):
                process.wait(moment * seconds)
        found = [] if process.poll() is not None else victims(watched, text)
        at = begun.seconds
        for victim in found if text is None else found and [draw.choice(found)]:
            with suppress(psutil.Error):
                victim.kill()
        what = f"SIGKILL of {name}" if found else "nothing, as it had ended"
        yield begun.ended(process, what, at)
        if not found:
            return


class Begun:
    """A start of which it is about to be seen how it ends."""

    def __init__(self, place: Place) -> None:
        self._place, self._begin, self._started = place, place.console.stat().st_size, time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._started

    def ended(self, process: subprocess.Popen[bytes], what: str, at: float) -> Disturbance:
        """Wait for its end, and see whether all its processes end with it, and with one line at most."""
        code = self._place.wait(process)
        with self._place.console.open("rb") as file:
            file.seek(self._begin)
            said = file.read().decode(errors="replace")
        errors = [line for line in said.splitlines() if line.startswith("Error: ")]
        unfinished = "The same command goes on with the others" in said
        ended = "killed" if code == -signal.SIGKILL else "finished" if code == 0 else f"exit code {code}"
        if code == 1 and (len(errors) == 1 or unfinished):
            ended = "one line"
        bad = [f"{what}: it ended with {ended}"] if ended.startswith("exit code") else []
        bad += ["a traceback was printed"] if "Traceback" in said else []
        bad += self._place.left_processes()
        return Disturbance(what, at, ended, bad, errors[-1][:300] if errors else "")


def mount(*words: str) -> None:
    """Call ``mount``, in the namespace of this script; where a file is just being written, once more."""
    for left in reversed(range(50)):
        if subprocess.run(["mount", *words], capture_output=True, check=not left).returncode == 0:
            return
        time.sleep(0.1)


def full_disk(place: Place, draw: random.Random, _seconds: float) -> Iterator[Disturbance]:
    """A file system that is full at some write; then it is made larger."""
    size = round(draw.uniform(0.1, 1.0) * place.size / 1024)
    mount("-t", "tmpfs", "-o", f"size={size}k", "none", str(place.folder))
    (place.folder / "tmp").mkdir()
    begun, process = Begun(place), place.go_on()
    yield begun.ended(process, "the disk is full", 0.0)
    mount("-o", "remount,size=4g", str(place.folder))


def read_only(place: Place, draw: random.Random, seconds: float) -> Iterator[Disturbance]:
    """A directory that becomes read-only, and then writable again."""
    begun, process = Begun(place), place.go_on()
    with suppress(subprocess.TimeoutExpired):
        process.wait(draw.random() * seconds)
    at, there = begun.seconds, [place.folder / name for name in ("run", "cache", "outputs/mlflow")]
    if there := [folder for folder in there if folder.is_dir()]:
        folder = str(draw.choice(there))
        mount("--bind", folder, folder)
        mount("-o", "remount,bind,ro", folder)
    yield begun.ended(process, "a directory becomes read-only", at)
    unmount_below(place.folder)


def lost_file(place: Place, draw: random.Random, seconds: float) -> Iterator[Disturbance]:
    """A file of the cache that goes in the middle of a run."""
    begun, process = Begun(place), place.go_on()
    with suppress(subprocess.TimeoutExpired):
        process.wait(draw.random() * seconds)
    at, files = begun.seconds, sorted(p for p in (place.folder / "cache").rglob("*") if p.is_file())
    if files:
        draw.choice(files).unlink()
    yield begun.ended(process, "a file of the cache goes", at)


def flipped_bit(place: Place, draw: random.Random, seconds: float) -> Iterator[Disturbance]:
    """A bit of a checkpoint or of an exported file that changes while the run stands still."""
    begun, process = Begun(place), place.go_on()
    with suppress(subprocess.TimeoutExpired):
        process.wait(draw.uniform(0.4, 1.0) * seconds)
    at = begun.seconds
    for one in victims(psutil.Process(process.pid), None) if process.poll() is None else []:
        with suppress(psutil.Error):
            one.kill()
    told = begun.ended(process, "a bit of a file of the run flips", at)
    files = sorted(p for p in (place.folder / "run").glob("[wd]e*/*.[op][nt]*") if not p.name.startswith("."))
    if files:
        file = draw.choice(files)
        place.note(f"flipped a bit of {file.name}")
        content = bytearray(file.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        file.write_bytes(content)
    yield told


class Server:
    """A tracking server, behind a door that can be made to answer badly.

    Args:
        folder: of its database and files.

    Attributes:
        mode: ``well``, ``slow``, ``500``, ``401``, ``HTML`` or ``gone``.
    """

    def __init__(self, folder: Path) -> None:
        self.mode, self.folder, self._port = "well", folder, free_port()
        folder.mkdir()
        command = [
            sys.executable, "-m", "mlflow", "server", "--port", str(self._port), "--workers", "1",
            "--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}",
            "--artifacts-destination", str(folder / "files"),
        ]  # fmt: skip
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, env=environment, start_new_session=True, **quiet)
        while True:
            with (
                suppress(OSError),
                urllib.request.urlopen(f"http://127.0.0.1:{self._port}/health", timeout=5),
            ):
                break
            time.sleep(0.5)
        self._door = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Door,), {"owner": self}))
        self.uri = f"http://127.0.0.1:{self._door.server_port}"
        threading.Thread(target=self._door.serve_forever, daemon=True).start()

    def pass_on(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, str, bytes]:
        """Status, kind and body of the real server's answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        with closing(connection):
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.getheader("Content-Type", "text/plain"), answer.read()

    def close(self) -> None:
        """End it."""
        self._door.shutdown()
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class _Door(BaseHTTPRequestHandler):
    owner: Server

    def _answer(self) -> None:
        mode, body = self.owner.mode, self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if mode == "gone":
            self.close_connection = True
            return
        if mode == "slow":
            time.sleep(0.5)
        status, kind, content = {
            "500": (500, "application/json", b'{"error_code": "INTERNAL_ERROR"}'),
            "401": (401, "text/plain", b"You are not authenticated."),
            "HTML": (200, "text/html", b"<html><body>Sign in</body></html>"),
        }.get(mode) or self.owner.pass_on(self.command, self.path, body, dict(self.headers))
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = _answer

    def log_message(self, *_: object) -> None:
        pass


def bad_server(place: Place, draw: random.Random, seconds: float, *, server: Server) -> Iterator[Disturbance]:
    """A tracking server that answers badly from some moment on, which may be the start, and well again."""
    mode, moment = draw.choice(("slow", "500", "401", "HTML", "gone")), draw.choice((0.0, draw.random()))
    place.words = [*RUN, f"tracker.uri={server.uri}"]
    server.mode = mode if moment == 0 else "well"
    begun, process = Begun(place), place.go_on()
    with suppress(subprocess.TimeoutExpired):
        process.wait(moment * seconds)
    at, server.mode = begun.seconds, mode
    yield begun.ended(process, f"the tracking server is {mode}" if mode in ("slow", "gone")
                      else f"the tracking server answers {mode}", at)  # fmt: skip
    server.mode = "well"


def unmount_below(folder: Path) -> None:
    """Undo all mounts at a folder and below, the last first."""
    places = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    for at in reversed([at for at in places if Path(at).is_relative_to(folder)]):
        subprocess.run(["umount", "-l", at], check=True)


@dataclass
class Chaos:
    """What an attempt needs: where it happens, and what nobody disturbed.

    Attributes:
        folder: of all attempts.
        undisturbed: what a run and a sweep come to, and their seconds and bytes, by kind; made when needed.
        server: made when needed.
    """

    folder: Path
    undisturbed: dict[str, tuple[dict[str, Any], float, int]] = field(default_factory=dict)
    server: Server | None = None

    def attempt(self, kind: str, seed: int, number: int) -> list[Disturbance]:
        """Disturb one run or sweep, go on with it, and look what is lost."""
        draw, base = random.Random(f"{seed} {number} {kind}"), "sweep" if kind == "sweep" else "run"
        expected, seconds, size = self._undisturbed(base)
        place = Place(self.folder / f"{kind}-{number}", SWEEP if base == "sweep" else RUN, size)
        if kind == "server":
            self.server = self.server or Server(self.folder / "mlflow-server")
            expected = _without(expected, "file outputs/")
            how = partial(bad_server, server=self.server)
        else:
            how = KINDS[kind]
        told = []
        try:
            told += how(place, draw, seconds)
            try:
                place.finish()
                outcome = place.outcome()
                if kind == "cache":  # whoever needs the file next makes it again, and a finished run does not
                    expected, outcome = (_without(each, "file cache/") for each in (expected, outcome))
                store = self.server.folder if kind == "server" and self.server else place.store
                told[-1].lost += [
                    *place.left_processes(),
                    *differences(expected, outcome),
                    *open_runs(store),
                ]
            except StageFailed as error:
                told[-1].lost.append(str(error))
        finally:
            unmount_below(place.folder)
        if not any(one.lost for one in told):
            shutil.rmtree(place.folder)
            place.console.unlink()
        return told

    def _undisturbed(self, kind: str) -> tuple[dict[str, Any], float, int]:
        if kind not in self.undisturbed:
            place = Place(self.folder / f"undisturbed-{kind}", SWEEP if kind == "sweep" else RUN)
            started = time.monotonic()
            place.finish()
            seconds = time.monotonic() - started
            size = sum(path.stat().st_size for path in place.folder.rglob("*") if path.is_file())
            self.undisturbed[kind] = place.outcome(), seconds, size
            print(f"An undisturbed {kind} takes {seconds:.0f} s and {size / 1e6:.0f} MB.", flush=True)
        return self.undisturbed[kind]


# What an attempt can be; with the weight that it is drawn with.
KINDS: dict[str, Callable[[Place, random.Random, float], Iterator[Disturbance]]] = {
    "run": partial(kills, kind="run"),
    "sweep": partial(kills, kind="sweep"),
    "full": full_disk,
    "read-only": read_only,
    "cache": lost_file,
    "bit": flipped_bit,
}
_WEIGHTS = {"run": 8, "sweep": 3, "full": 3, "read-only": 3, "cache": 2, "bit": 3, "server": 3}
_MOUNTS = ("full", "read-only")


def main() -> int:
    """Disturb, and print what came of it."""
    options = _options()
    if shutil.which("unshare") and not os.environ.get(_IN_NAMESPACE):
        words = ["unshare", "-rm", "--propagation", "private"]
        if subprocess.run([*words, "true"], capture_output=True, check=False).returncode == 0:
            os.environ[_IN_NAMESPACE] = "yes"
            os.execvp("unshare", [*words, sys.executable, *sys.argv])
    kinds = [kind for kind in options.only if os.environ.get(_IN_NAMESPACE) or kind not in _MOUNTS]
    attempts = _former(options)
    number, end = options.first + len(attempts), time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as name:
        folder = options.keep or Path(name)
        chaos = Chaos(folder.resolve())
        chaos.folder.mkdir(parents=True, exist_ok=True)
        try:
            while number < options.first + options.times and time.monotonic() < end:
                weights = [_WEIGHTS[kind] for kind in kinds]
                kind = random.Random(f"{options.seed} {number}").choices(kinds, weights)[0]
                started = time.monotonic()
                told = chaos.attempt(kind, options.seed, number)
                row = {
                    "number": number,
                    "kind": kind,
                    "seed": options.seed,
                    "seconds": time.monotonic() - started,
                }
                attempts.append({**row, "disturbances": [asdict(one) for one in told]})
                _show(attempts[-1])
                number += 1
                if options.json:
                    write_json(options.json, {"attempts": attempts})
        finally:
            if chaos.server:
                chaos.server.close()
    text = _table(attempts, options.seed)
    if options.write:
        page = options.write.read_text(encoding="utf-8")
        write_text(options.write, between_marks(page, MARK, text))
    else:
        sys.stdout.write(text)
    return int(any(one["lost"] for attempt in attempts for one in attempt["disturbances"]))


def _options() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--minutes", type=amount, default=10.0, help="after which no attempt begins (%(default)s)")
    add("--times", type=whole, default=10**6, help="attempts at most, former ones counted")
    add("--seed", type=int, default=0)
    add("--first", type=int, default=0, help="number of the first attempt")
    add(
        "--only",
        nargs="+",
        choices=list(_WEIGHTS),
        default=list(_WEIGHTS),
        metavar="KIND",
        help="%(choices)s",
    )
    add("--json", type=Path, help="file that keeps the attempts")
    add("--keep", type=Path, help="folder that the attempts happen in; those that lost something stay there")
    add("--write", type=Path, help=f"page to put the table into, between its marks {MARK!r}")
    return parser.parse_args()


def _former(options: argparse.Namespace) -> list[dict[str, Any]]:
    former = read_json(options.json).get("attempts", []) if options.json else []
    return [attempt for attempt in former if attempt["seed"] == options.seed]


def _show(attempt: dict[str, Any]) -> None:
    for one in attempt["disturbances"]:
        lost = "; ".join(one["lost"]) or "nothing"
        line = f"{attempt['number']:4} {attempt['kind']:9} {one['what']:45} at {one['at']:5.1f} s"
        print(f"{line}: {one['ended']}; lost: {lost}", flush=True)
        if one["said"]:
            print(f"     {one['said']}", flush=True)


def _table(attempts: list[dict[str, Any]], seed: int) -> str:
    """What was done, how often, how it ended, and what was lost."""
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for attempt in attempts:
        for one in attempt["disturbances"]:
            thing = "sweep" if attempt["kind"] == "sweep" else "run"
            rows.setdefault((thing, one["what"]), []).append(one)
    cells = []
    for (thing, what), them in sorted(rows.items()):
        ends = {
            end: sum(one["ended"] == end for one in them) for end in sorted({one["ended"] for one in them})
        }
        lost = sum(bool(one["lost"]) for one in them)
        ended = ", ".join(f"{count} {end}" for end, count in ends.items())
        cells.append((thing, what, str(len(them)), ended, str(lost) if lost else "nothing"))
    minutes = sum(attempt["seconds"] for attempt in attempts) / 60
    count = sum(len(attempt["disturbances"]) for attempt in attempts)
    return (
        f"{count} disturbances in {len(attempts)} attempts, seed {seed}, {minutes:.0f} minutes on "
        f"{host_facts().cpu}:\n\n"
        f"{markdown_table(('of a', 'what happens', 'times', 'that start ended', 'lost'), cells)}\n"
    )


if __name__ == "__main__":
    run_command(main)
