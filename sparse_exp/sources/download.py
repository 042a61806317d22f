"""Downloads over HTTP that continue where an earlier try stopped.

The beginning of a file is kept as ``<name>`` beside ``<name>.json``, which holds the version that the server
named: a strong ETag, or a date. The rest is requested on condition that the version is still the same
(RFC 9110, Range and If-Range). A server that does not know ranges, or has another version by now, sends the
whole file, and the kept beginning is dropped.
"""

from __future__ import annotations

import base64
import http.client
import json
import netrc
import os
import re
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit

from sparse_exp.errors import SourceUnavailable
from sparse_exp.files import remove_left_parts, write_json
from sparse_exp.progress import progress

ADVICE = (
    "Check the network, point paths.cache at a cache that holds it, "
    "or give a local file (model.weights=PATH, dataset.path=YAML)."
)
_CHUNK = 1 << 20
_CONNECT_S = 5.0  # seconds; a host that does not answer must not hold up the next source
_READ_S = 30.0
NETWORK = (OSError, http.client.HTTPException)  # URLError and timeouts are OSErrors


class _ShortConnect:
    """Waits less long for a connection than for an answer."""

    timeout: Any
    sock: Any

    def connect(self) -> None:
        self.timeout = _CONNECT_S
        super().connect()  # type: ignore[misc]
        self.sock.settimeout(_READ_S)


class _Connection(_ShortConnect, http.client.HTTPConnection):
    pass


class _SecureConnection(_ShortConnect, http.client.HTTPSConnection):
    pass


class _Http(urllib.request.HTTPHandler):
    def http_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(_Connection, request)


class _Https(urllib.request.HTTPSHandler):
    def https_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(_SecureConnection, request, context=getattr(self, "_context", None))


class _Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if req.type == "https" and not newurl.lower().startswith("https:"):
            raise HTTPError(req.full_url, code, "the server sends on to an address without TLS", headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def download(url: str, part: Path, name: str) -> None:
    """Download a file, or the rest of it.

    Args:
        url: ``https://`` or ``http://``; redirects are followed.
        part: where the file goes. What an earlier call left there is continued.
        name: of the file, for people.

    Raises:
        SourceUnavailable: the server cannot be reached, refuses, or stops in the middle. What has arrived
            stays for the next try.
        OSError: the file cannot be written; nothing of it stays.
    """
    try:
        with _opened(url, part) as response:
            expected_size = _receive(response, part, name, url)
    except OSError:
        forget(part)
        raise
    if expected_size is not None and part.stat().st_size != expected_size:
        raise SourceUnavailable(
            f"Fetching {public(url)} stopped after {part.stat().st_size} of {expected_size} bytes. "
            f"Run it again to go on from there. {ADVICE}"
        )
    _note(part).unlink(missing_ok=True)


def forget(part: Path) -> None:
    """Remove what is kept of a download."""
    part.unlink(missing_ok=True)
    _note(part).unlink(missing_ok=True)


def public(uri: str) -> str:
    """A URI without user name, password, query and hash, for messages and reports."""
    if not uri.startswith(("https://", "http://")):
        return uri
    parts = urlsplit(uri)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _note(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def opened(request: urllib.request.Request) -> Any:
    """The server's answer to a request, a context manager; a host that does not answer is soon given up.

    Raises:
        OSError: it does not answer, or refuses (`urllib.error.HTTPError`).
        http.client.HTTPException: it breaks off.
    """
    if login := _login(request):
        request.add_unredirected_header("Authorization", f"Basic {login}")
    return urllib.request.build_opener(_Http, _Https, _Redirects).open(request, timeout=_READ_S)


def _login(request: urllib.request.Request) -> str:
    """User and password that ``~/.netrc`` (or the file that NETRC names) has for a host, in base 64."""
    try:
        found = netrc.netrc(os.environ.get("NETRC")).authenticators(urlsplit(request.full_url).hostname or "")
    except (OSError, netrc.NetrcParseError):
        return ""
    return base64.b64encode(f"{found[0]}:{found[2]}".encode()).decode() if found else ""


def _opened(url: str, part: Path) -> Any:
    """The server's answer to a request for the file, or for the rest of it."""
    request = urllib.request.Request(url, headers={"User-Agent": "sparse_exp"})
    version, size = _kept_version(part), part.stat().st_size if part.is_file() else 0
    if version and size:
        request.add_header("Range", f"bytes={size}-")
        request.add_header("If-Range", version)
    try:
        return opened(request)
    except HTTPError as error:
        if error.code == 416 and version:  # the file is not longer than what we have: that is another file's
            forget(part)
            return _opened(url, part)
        raise _unavailable(url, f"{error.code} {error.reason}") from error
    except NETWORK as error:
        raise _unavailable(url, getattr(error, "reason", None) or error) from error


def _kept_version(part: Path) -> str | None:
    with suppress(OSError, ValueError, KeyError, TypeError):
        return str(json.loads(_note(part).read_text(encoding="utf-8"))["version"])
    return None


def _receive(response: Any, part: Path, name: str, url: str) -> int | None:
    """Append the answer to the beginning, or replace that; returns the whole file's size if it is known."""
    start = _start_of(response)
    if start == 0:
        _keep_version(response, part)
    elif start != part.stat().st_size:
        forget(part)
        raise _unavailable(url, f"the server sent bytes from {start} on, which were not asked for")
    length = response.headers.get("Content-Length")
    size = start + int(length) if length and length.isdecimal() else None
    with part.open("ab") as out, progress(f"Fetching {name}", (size or 0) / 1e6 or None, unit="MB") as bar:
        bar.advance(start / 1e6)
        while chunk := _read(response, url):
            out.write(chunk)
            bar.advance(len(chunk) / 1e6)
    return size


def _start_of(response: Any) -> int:
    """Where in the file the answer begins, bytes."""
    found = re.match(r"bytes (\d+)-", response.headers.get("Content-Range") or "")
    return int(found[1]) if response.status == http.client.PARTIAL_CONTENT and found else 0


def _keep_version(response: Any, part: Path) -> None:
    part.unlink(missing_ok=True)
    part.parent.mkdir(parents=True, exist_ok=True)
    tag = response.headers.get("ETag") or ""
    # A weak tag stays the same while bytes change.
    version = response.headers.get("Last-Modified") if not tag or tag.startswith("W/") else tag
    remove_left_parts(part.parent)
    write_json(_note(part), {"version": version}) if version else _note(part).unlink(missing_ok=True)


def _read(response: Any, url: str) -> bytes:
    try:
        data: bytes = response.read(_CHUNK)
    except NETWORK as error:
        raise _unavailable(url, f"stopped in the middle ({error}); run it again to go on") from error
    return data


def _unavailable(url: str, reason: object) -> SourceUnavailable:
    return SourceUnavailable(f"Could not fetch {public(url)}: {reason}. {ADVICE}")
