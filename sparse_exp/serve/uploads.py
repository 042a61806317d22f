"""The images of a request: read from its form, and measured before one is decoded."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass

from fastapi import Request
from PIL import Image, PngImagePlugin, UnidentifiedImageError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from sparse_exp.data.images import IMAGE_FORMATS
from sparse_exp.serve.limits import PATIENCE, Limits, Refused

FIELD = "images"
_LONGEST_NAME = 100
_MOST_SCANS = 100  # of a progressive JPEG, each of which passes over all pixels; programs write about ten
_SCAN_HEADERS = [bytes((0xFF, 0xDA, 0, 6 + 2 * components)) for components in range(1, 5)]  # marker, length
PngImagePlugin.MAX_TEXT_MEMORY = 2**20  # bytes that the texts in a PNG unpack to; Pillow's own bound is 64 MB


@dataclass(frozen=True)
class Upload:
    """An image file as it was sent.

    Attributes:
        name: of the file, as the client calls it, cut to 100 characters; ``image 1``... where it has none.
        content: its bytes, at least one.
    """

    name: str
    content: bytes


async def read_uploads(request: Request, limits: Limits, count: Callable[[int], None]) -> list[Upload]:
    """Read the images of a multipart request, in order.

    Args:
        request: with its body not yet read; `LimitBody` bounds its length.
        limits: its bounds.
        count: called with the length of each part of the body that arrives; it may raise.

    Raises:
        Refused: the body is no whole multipart form of images, is too long, or came too slowly.
    """
    form = _Form(_boundary(request.headers), _arriving(request, limits, count), limits)
    try:
        data = await form.parse()
    except ClientDisconnect:
        raise Refused(400, "The connection was closed before the body was complete.") from None
    except (MultiPartException, FormParserError) as error:
        reason = error.__cause__ or error
        if isinstance(reason, FormParserError):
            raise Refused(400, f"The body is no multipart form: {reason}. Send it as curl -F does.") from None
        raise _misnamed("") from None  # of its other reasons only this is left: a part without a name
    if not form.ended:
        raise Refused(400, "The body ends before its last boundary. Send it whole.")
    parts = data.multi_items()
    if not parts:
        raise Refused(422, f"The form has no image. Send at least one as field {FIELD!r}.")
    return [_upload(number, field, part) for number, (field, part) in enumerate(parts, 1)]


async def _arriving(
    request: Request, limits: Limits, count: Callable[[int], None]
) -> AsyncGenerator[bytes, None]:
    """The body as it arrives, which must be fast enough."""
    stream, received, start = request.stream(), 0, asyncio.get_running_loop().time()
    while True:
        patience = min(limits.timeout, PATIENCE + received / limits.min_rate)
        try:
            async with asyncio.timeout_at(start + patience):
                chunk = await anext(stream, None)
        except TimeoutError:
            do = "Send it faster, or in smaller requests."
            message = f"Of the body only {received} bytes arrived within {patience:.3g} s. {do}"
            raise Refused(408, message) from None
        if chunk is None:
            return
        received += len(chunk)
        count(len(chunk))
        yield chunk


def _boundary(headers: Headers) -> str:
    kind, options = parse_options_header(headers.get("Content-Type"))
    if headers.get("Content-Encoding", "identity") != "identity":
        raise Refused(415, "The body is compressed as a whole. Send it without Content-Encoding.")
    if kind != b"multipart/form-data":
        got = kind.decode("latin-1")[:_LONGEST_NAME] or "none"
        do = f"Send it as curl -F {FIELD}=@photo.jpg does."
        raise Refused(415, f"Expected Content-Type to be multipart/form-data, but got {got}. {do}")
    boundary = options.get(b"boundary", b"").decode("latin-1")
    if not boundary or '"' in boundary or "\\" in boundary:
        raise Refused(400, "Content-Type names no boundary. Let your HTTP library write that header.")
    return boundary


class _Form(MultiPartParser):
    """Starlette's parser, which keeps files in memory, bounds files and fields together, and notes the end.

    Args:
        boundary: what separates the parts.
        chunks: the body; its length is bounded elsewhere.
        limits: of them ``max_files``.

    Attributes:
        ended: whether the last boundary has arrived; starlette accepts a form that was cut off.
    """

    def __init__(self, boundary: str, chunks: AsyncGenerator[bytes, None], limits: Limits) -> None:
        # Latin-1 keeps every byte of a part without a file name. The client must not choose: some charsets
        # of Python raise errors of their own.
        headers = Headers({"Content-Type": f'multipart/form-data; charset=latin-1; boundary="{boundary}"'})
        most, longest = limits.max_files, limits.max_bytes
        super().__init__(headers, chunks, max_files=most, max_fields=most, max_part_size=longest)
        self.spool_max_size = longest
        self.ended = False
        self._parts, self._most = 0, most

    def on_part_begin(self) -> None:
        """Refuse one part too many."""
        super().on_part_begin()
        self._parts += 1
        if self._parts > self._most:
            do = "Send several requests, or start the service with a larger --max-files."
            raise Refused(413, f"The form has more than {self._most} parts. {do}")

    def on_end(self) -> None:
        """Note that the form is complete."""
        self.ended = True


def _upload(number: int, field: str, part: UploadFile | str) -> Upload:
    """A part of a form, whose texts were decoded as Latin-1."""
    if field != FIELD:
        raise _misnamed(field)
    if isinstance(part, str):  # it has no file name
        name, content = "", part.encode("latin-1")
    else:
        with part.file as file:
            name, content = part.filename or "", file.read()
    upload = Upload(_printable(name) or f"image {number}", content)
    if not content:
        raise Refused(422, f"The file {upload.name} is empty. Send an image.")
    return upload


def _misnamed(field: str) -> Refused:
    got = _printable(field)
    return Refused(422, f"Expected all fields to be named {FIELD!r}, but got {got!r}. Rename it.")


def _printable(name: str) -> str:
    """A name as clients send it, in UTF-8, of what was decoded as Latin-1."""
    text = name.encode("latin-1").decode("utf-8", "replace")
    return "".join(letter for letter in text if letter.isprintable())[:_LONGEST_NAME]


def check_images(uploads: Sequence[Upload], limits: Limits) -> list[int]:
    """Read the headers of images, and refuse what must not be decoded.

    Args:
        uploads: the images of a request.
        limits: its bounds.

    Returns:
        The pixels of each.

    Raises:
        Refused: one is no image of a kind that is taken, or they have too many pixels.
    """
    pixels, total = [], 0
    for upload in uploads:
        width, height = _size_of(upload, limits)
        pixels.append(width * height)
        total += width * height
        if total > limits.max_pixels:
            size = f"The image {upload.name} has {width} x {height} = {width * height} pixels"
            if total > width * height:
                size = f"The images up to {upload.name} have {total} pixels together"
            do = "Scale them down, send fewer, or start the service with a larger --max-pixels."
            raise Refused(413, f"{size}, more than {limits.max_pixels}. {do}")
    return pixels


def _size_of(upload: Upload, limits: Limits) -> tuple[int, int]:
    """Width and height of an image, px."""
    try:
        with Image.open(io.BytesIO(upload.content), formats=limits.formats) as image:
            size = image.size
    except Image.DecompressionBombError:
        raise Refused(413, f"The image {upload.name} has far too many pixels. Scale it down.") from None
    except UnidentifiedImageError:
        others = ", ".join(name for name in IMAGE_FORMATS if name not in limits.formats)
        do = f"Convert it, or start the service with --image-formats ({others})." if others else "Convert it."
        kinds = ", ".join(limits.formats)
        message = f"The file {upload.name} is no image of a kind that is taken here: {kinds}. {do}"
        raise Refused(422, message) from None
    except Exception:  # a header of a known kind can be broken in ways of its own
        raise Refused(
            422, f"The header of the image {upload.name} is broken or too long. Save it anew."
        ) from None
    scans = sum(map(upload.content.count, _SCAN_HEADERS)) if upload.content.startswith(b"\xff\xd8") else 1
    if scans > _MOST_SCANS:
        raise Refused(
            413, f"The image {upload.name} has {scans} scans, more than {_MOST_SCANS}. Save it anew."
        )
    return size
