"""What the service takes in: bounds on a request, its images read from the body, and refusals.

Nothing here trusts the client: a body is counted while it arrives and left unread as soon as it is too
long, and an image is measured by its header before any pixel of it is decoded.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import warnings
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from PIL import Image, UnidentifiedImageError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from sparse_exp.data.images import IMAGE_FORMATS

FIELD = "images"
_LONGEST_NAME = 100
_BODY_READ = "sparse_exp.body_read"  # in the scope of a request
_LINGER_SECONDS, _LINGER_BYTES = 2.0, 64 * 2**20


@dataclass(frozen=True)
class Limits:
    """Bounds on what clients may send.

    Attributes:
        max_bytes: length of a request's body.
        max_pixels: width times height of an image, as its header says.
        max_files: images of one request.
        queue: requests inside the service at once; more are sent away with status 503. Together with
            ``max_bytes`` this bounds the memory that bodies can take.
        timeout: seconds from a request's first byte to its answer.
    """

    max_bytes: int = 10_000_000
    max_pixels: int = 50_000_000
    max_files: int = 16
    queue: int = 128
    timeout: float = 60.0


@dataclass(frozen=True)
class Upload:
    """An image file as it was sent.

    Attributes:
        name: of the file, as the client calls it, cut to 100 characters; ``image 1``... where it has none.
        content: its bytes, at least one.
    """

    name: str
    content: bytes


class Refused(Exception):
    """A request that gets no detections.

    Args:
        status: of HTTP, 400 to 599.
        message: one line that says what to do.
        retry_after: seconds after which to try again; None where that would not help.
    """

    def __init__(self, status: int, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}


class Refusal(JSONResponse):
    """The answer to a request whose body was perhaps not read to its end.

    Many clients send the whole body before they look at the answer, and a connection that is closed under
    them shows as a broken pipe instead of as our message. So what they go on sending is thrown away for a
    while: for at most 2 s and 64 MB.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer; if the body was not read to its end, listen a little longer, then hang up."""
        if scope.get(_BODY_READ):
            await super().__call__(scope, receive, send)
            return
        self.headers["Connection"] = "close"
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        # With its length in the headers the answer is complete, and yet the exchange is not over.
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(_discard(receive), _LINGER_SECONDS)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _discard(receive: Receive) -> None:
    thrown_away = 0
    while thrown_away < _LINGER_BYTES:
        message = await receive()
        thrown_away += len(message.get("body", b""))
        if not message.get("more_body", False):
            return


def refusal(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    """The JSON answer ``{"error": message}``."""
    return Refusal({"error": message}, status, headers)


async def read_uploads(request: Request, limits: Limits) -> list[Upload]:
    """The images of a multipart request, in order.

    Args:
        request: with its body not yet read.
        limits: its bounds.

    Raises:
        Refused: the body is no whole multipart form of images, is too long, or came too slowly.
    """
    boundary = _boundary(request)
    try:
        form = _Form(boundary, limits)
        await asyncio.wait_for(_feed(form, _chunks(request, limits)), limits.timeout)
    except TimeoutError:
        do = "Send it faster, or in smaller requests."
        raise Refused(408, f"The body did not arrive within {limits.timeout:g} s. {do}") from None
    except ClientDisconnect:
        raise Refused(400, "The connection was closed before the body was complete.") from None
    except FormParserError as error:
        raise Refused(400, f"The body is no multipart form: {error}. Send it as curl -F does.") from None
    return form.uploads()


def _boundary(request: Request) -> bytes:
    kind, options = parse_options_header(request.headers.get("Content-Type"))
    if request.headers.get("Content-Encoding", "identity") != "identity":
        raise Refused(415, "The body is compressed as a whole. Send it without Content-Encoding.")
    if kind != b"multipart/form-data":
        got = kind.decode("latin-1")[:_LONGEST_NAME] or "none"
        do = f"Send it as curl -F {FIELD}=@photo.jpg does."
        raise Refused(415, f"Expected Content-Type to be multipart/form-data, but got {got}. {do}")
    if not options.get(b"boundary"):
        raise Refused(400, "Content-Type names no boundary. Let your HTTP library write that header.")
    return options[b"boundary"]


async def _chunks(request: Request, limits: Limits) -> AsyncIterator[bytes]:
    """The body in parts; stops reading where it is too long."""
    length = request.headers.get("Content-Length", "")
    _check_length(int(length) if length.isdecimal() else 0, limits)
    received, more = 0, True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        more = message.get("more_body", False)
        request.scope[_BODY_READ] = not more
        received += len(message.get("body", b""))
        _check_length(received, limits)
        yield message.get("body", b"")


def _check_length(length: int, limits: Limits) -> None:
    if length > limits.max_bytes:
        do = "Send fewer or smaller images, or start the service with a larger --max-bytes."
        raise Refused(413, f"The body is longer than {limits.max_bytes} bytes. {do}")


async def _feed(form: _Form, chunks: AsyncIterator[bytes]) -> None:
    async for chunk in chunks:
        form.write(chunk)


@dataclass
class _Part:
    """A part of a form while it arrives."""

    headers: dict[bytes, bytes] = field(default_factory=dict)
    name: bytes = b""
    filename: bytes = b""
    content: bytearray = field(default_factory=bytearray)


class _Form:
    """A multipart form as it arrives; all of it is kept, and its bounds are checked at once."""

    def __init__(self, boundary: bytes, limits: Limits) -> None:
        self._limits, self._parts = limits, list[_Part]()
        self._header, self._value, self._complete = b"", b"", False
        events = ("part_begin", "part_data", "header_field", "header_value", "header_end")
        callbacks = {f"on_{event}": getattr(self, f"_{event}") for event in events}
        callbacks |= {"on_headers_finished": self._headers_finished, "on_end": self._end}
        self._parser = MultipartParser(boundary, callbacks)  # type: ignore[arg-type]

    def write(self, chunk: bytes) -> None:
        """Take the next bytes of the body."""
        self._parser.write(chunk)

    def uploads(self) -> list[Upload]:
        """The images, when all has arrived."""
        if not self._complete:
            raise Refused(400, "The body ends before its last boundary. Send it whole.")
        if not self._parts:
            raise Refused(422, f"The form has no image. Send at least one as field {FIELD!r}.")
        return [self._upload(number, part) for number, part in enumerate(self._parts, 1)]

    def _upload(self, number: int, part: _Part) -> Upload:
        name = part.filename.decode("utf-8", "replace")
        upload = Upload(_printable(name) or f"image {number}", bytes(part.content))
        if not upload.content:
            raise Refused(422, f"The file {upload.name} is empty. Send an image.")
        return upload

    def _part_begin(self) -> None:
        if len(self._parts) == self._limits.max_files:
            do = "Send several requests, or start the service with a larger --max-files."
            raise Refused(413, f"The form has more than {self._limits.max_files} parts. {do}")
        self._parts.append(_Part())

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        self._parts[-1].headers[self._header.lower()] = self._value
        self._header = self._value = b""

    def _headers_finished(self) -> None:
        part = self._parts[-1]
        _, options = parse_options_header(part.headers.get(b"content-disposition"))
        part.name, part.filename = options.get(b"name", b""), options.get(b"filename", b"")
        if part.name != FIELD.encode():
            got = _printable(part.name.decode("utf-8", "replace"))
            raise Refused(422, f"Expected all fields to be named {FIELD!r}, but got {got!r}. Rename it.")

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        self._parts[-1].content += data[start:end]

    def _end(self) -> None:
        self._complete = True


def _printable(name: str) -> str:
    return "".join(letter for letter in name if letter.isprintable())[:_LONGEST_NAME]


def check_image(upload: Upload, limits: Limits) -> None:
    """Read the header of an image, and refuse what must not be decoded.

    Raises:
        Refused: it is no image of a known kind, or has too many pixels.
    """
    with _header_of(upload) as image:
        width, height = image.size
    if width * height > limits.max_pixels:
        do = "Scale it down, or start the service with a larger --max-pixels."
        size = f"{width} x {height} = {width * height} pixels"
        raise Refused(413, f"The image {upload.name} has {size}, more than {limits.max_pixels}. {do}")


@contextmanager
def _header_of(upload: Upload) -> Iterator[Image.Image]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(upload.content), formats=IMAGE_FORMATS) as image:
                yield image
    except Image.DecompressionBombError:
        do = "Scale it down."
        raise Refused(413, f"The image {upload.name} has far too many pixels. {do}") from None
    except UnidentifiedImageError:
        kinds = "JPEG, PNG, WebP, GIF, BMP or TIFF"
        raise Refused(422, f"The file {upload.name} is no image. Send {kinds}.") from None
    except Exception:  # a header of a known kind can be broken in ways of its own
        raise Refused(422, f"The header of the image {upload.name} is broken. Save it anew.") from None
