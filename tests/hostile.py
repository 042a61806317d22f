"""Images that are made to take much time or memory from whoever decodes them."""

from __future__ import annotations

import io
import struct
import zlib

from PIL import Image


def encoded(kind: str, side: int = 8, **options) -> bytes:
    """A black image of a kind that Pillow writes."""
    file = io.BytesIO()
    Image.new("RGB", (side, side)).save(file, kind, **options)
    return file.getvalue()


def webp_of(side: int) -> bytes:
    """A lossless WebP of one colour in 34 bytes, whatever its size."""
    bits, count = 0, 0

    def put(value: int, length: int) -> None:
        nonlocal bits, count
        bits |= value << count
        count += length

    for value, length in ((0x2F, 8), (side - 1, 14), (side - 1, 14), (0, 1), (0, 3), (0, 1), (0, 1), (0, 1)):
        put(value, length)
    for _ in range(5):  # codes of one symbol, which take no bits in the image
        put(1, 4)
    data = bits.to_bytes((count + 7) // 8, "little")
    chunk = b"VP8L" + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)
    return b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk


def png_of(side: int, more: bytes = b"") -> bytes:
    """A black PNG with further chunks before its pixels, of which there are 25 million at most."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(min((3 * side + 1) * side, 10**8)), 9)
    chunks = _chunk(b"IHDR", header) + more + _chunk(b"IDAT", pixels) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def texts(count: int) -> bytes:
    """Chunks of a PNG, each of which unpacks to a megabyte of text."""
    return _chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**6 - 10), 9)) * count


def scans(count: int, side: int = 8) -> bytes:
    """A progressive JPEG with further scans, in each of which a decoder passes over all pixels."""
    whole = encoded("JPEG", side, progressive=True, subsampling=0)
    first = whole.index(b"\xff\xda")
    return whole[:first] + b"\xff\xda\x00\x08\x01\x01\x00\x00\x00\x01" * count + whole[first:]


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
