"""Packages fetched with pip, as it is configured on this machine; nothing is installed."""

from __future__ import annotations

import errno
import logging
import os
import re
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import IO

from sparse_exp.errors import SourceUnavailable
from sparse_exp.progress import Bar, progress

_log = logging.getLogger(__name__)
_CHUNK = 1 << 20
_PROGRESS = re.compile(r"^Progress (\d+) of (\d+)")
_DISK_FULL = os.strerror(errno.ENOSPC)
_FOUND_HASH = re.compile(r"\bGot\s+([0-9a-f]{64})\b")


def download_package(requirement: str, sha256: str | None, folder: Path) -> Path:
    """Fetch one distribution file with ``pip download``.

    With a ``sha256`` pip itself compares it before it opens the file. pip prepares the metadata of
    a source distribution by running its build script (here with the installed setuptools), so
    without a ``sha256`` only wheels, which run nothing, are accepted.

    Args:
        requirement: ``<distribution>==<version>``.
        sha256: expected hash of the file, 64 hex digits.
        folder: an empty directory for the file and pip's own temporary files.

    Returns:
        Path of the wheel or source distribution inside ``folder``.

    Raises:
        SourceUnavailable: pip cannot find or reach the file, or its hash is another.
        OSError: the disk is full.
    """
    downloads, scratch = folder / "downloads", folder / "pip"
    downloads.mkdir()
    scratch.mkdir()
    output = _run_pip(_command(requirement, sha256, downloads, scratch), scratch, requirement)
    files = [path for path in downloads.iterdir() if path.is_file()]
    if len(files) == 1:
        return files[0]
    if _DISK_FULL in output:
        raise OSError(errno.ENOSPC, _DISK_FULL)
    if sha256 and (found := _FOUND_HASH.search(output)):
        raise SourceUnavailable(
            f"Expected the file of {requirement} to have sha256 {sha256}, but got {found[1]}. "
            "Do not use it; correct archive_sha256 only if you trust the new file."
        )
    wheels_only = "" if sha256 else " (only wheels are accepted unless archive_sha256 is given)"
    raise SourceUnavailable(f"pip could not find or reach {requirement}{wheels_only}")


def _command(requirement: str, sha256: str | None, downloads: Path, scratch: Path) -> list[str]:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-build-isolation", "--no-input"]
    command += ["--disable-pip-version-check", "--no-cache-dir", "-d", str(downloads)]
    command += ["--progress-bar", "raw" if _pip_reports_progress() else "off"]
    if sha256 is None:
        return [*command, "--only-binary", ":all:", requirement]
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{requirement} --hash=sha256:{sha256}\n", encoding="utf-8")
    return [*command, "--require-hashes", "-r", str(requirements)]


def _pip_reports_progress() -> bool:
    """Whether pip knows ``--progress-bar raw``, which came with 24.1."""
    try:
        major, minor = metadata.version("pip").split(".")[:2]
    except (metadata.PackageNotFoundError, ValueError):
        return False
    return (int(major), int(re.sub(r"\D.*", "", minor) or 0)) >= (24, 1)


def _run_pip(command: list[str], scratch: Path, requirement: str) -> str:
    # The caller clears the directory of pip's temporary files, even when pip is killed.
    # An index that does not answer must not hold up the next source, unless the user has set other times.
    patience = {"PIP_DEFAULT_TIMEOUT": "8", "PIP_RETRIES": "1", **os.environ}
    environment = {**patience, "TMPDIR": str(scratch), "PYTHONUNBUFFERED": "1"}
    lines: list[str] = []
    with (
        progress(f"Fetching {requirement}", unit="MB") as bar,
        subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace",
        ) as process,
    ):  # fmt: skip
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if not _show(line, bar):
                    lines.append(line)
        except BaseException:
            process.kill()
            raise
    _log.debug("pip ended with %d:\n%s", process.returncode, "".join(lines))
    return "".join(lines)


def _show(line: str, bar: Bar) -> bool:
    """Whether the line was one of pip's progress lines; those go to the bar."""
    match = _PROGRESS.match(line)
    if match:
        bar.goto(round(int(match[1]) / 1e6, 1), round(int(match[2]) / 1e6, 1))
    return match is not None


def extract_member(archive: Path, member: str, destination: Path) -> None:
    """Copy one file out of a wheel or source distribution; nothing else is unpacked.

    Args:
        archive: a zip (wheel) or tar file.
        member: path inside; in a tar it may leave out the leading ``<name>-<version>/``.
        destination: file to write. No path of the archive is ever used as a path on disk.

    Raises:
        SourceUnavailable: the archive has no such file, or cannot be read.
    """
    try:
        with _open_member(archive, member) as stream, destination.open("wb") as out:
            while chunk := stream.read(_CHUNK):
                out.write(chunk)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise SourceUnavailable(f"{archive.name} cannot be read as an archive: {error}") from error


@contextmanager
def _open_member(archive: Path, member: str) -> Iterator[IO[bytes]]:
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as bundle:
            if member not in bundle.namelist():
                raise SourceUnavailable(f"{archive.name} holds no file {member!r}")
            with bundle.open(member) as stream:
                yield stream
        return
    # Read as a stream: a compressed tar has no index, and unpacking stops at the file.
    with tarfile.open(archive, "r|*") as tape:
        for entry in tape:
            if entry.isfile() and member in (entry.name, entry.name.partition("/")[2]):
                content = tape.extractfile(entry)
                assert content is not None  # it is a regular file
                yield content
                return
    raise SourceUnavailable(f"{archive.name} holds no file {member!r}")
