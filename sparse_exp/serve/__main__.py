"""The command ``python -m sparse_exp.serve``: a detector over HTTP."""

from __future__ import annotations

import argparse
import logging
import os
import re
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from sparse_exp.command import Parser, checked, number, run_command, whole
from sparse_exp.config.places import chosen_places
from sparse_exp.config.runtimes import RUNTIMES, may_be_shipped
from sparse_exp.errors import ConfigError, expected, first_line
from sparse_exp.files import expanded
from sparse_exp.predict.options import add_detector_options, add_model_options, detector_settings

if TYPE_CHECKING:
    from types import FrameType

    from sparse_exp.serve.service import Service

_EPILOG = """MODEL is the directory of a run, a stub of the local zoo (zoo:...), a directory with
model.onnx, or an ONNX file.

  python -m sparse_exp.serve outputs/runs/DATE/TIME-NAME
  curl -F images=@photo.jpg http://127.0.0.1:8000/predict

GET /live, /ready and /health, /metrics (Prometheus), /docs (all answers and errors). See docs/serve.md."""
_log = logging.getLogger(__name__)
_INTERRUPTED = 130
_KEY_VARIABLE = "SPARSE_EXP_API_KEY"
_FORMATS = {"jpeg": "JPEG", "png": "PNG", "gif": "GIF", "bmp": "BMP", "webp": "WEBP", "tiff": "TIFF"}
MOST_PIXELS = 178_956_970  # twice `PIL.Image.MAX_IMAGE_PIXELS`, which takes too long to import here
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}


def main() -> int:
    """Serve until SIGTERM (exit code 0) or Ctrl-C (130); a second Ctrl-C ends the service at once.

    Raises:
        SparseExpError: the service cannot run; one line for the user.
        KeyboardInterrupt: after Ctrl-C, when all is closed.
    """
    options = _options()
    # Uvicorn puts its own handlers in place of these while it serves, and calls these at its end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background job starts ignoring it
    from sparse_exp.serve.connections import room_for_connections
    from sparse_exp.serve.log import set_up_log

    set_up_log(options.log)
    connections, backlog = room_for_connections(options.connections)
    # First of all, since the model takes longer: an address that is in use is reported at once.
    with _listen(options.host, options.port, backlog) as listener:
        _serve(options, listener, connections, backlog)
    return 0


def _listen(host: str, port: int, backlog: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        # Python sets SO_REUSEADDR, so that the port can be used again at once after a crash.
        return socket.create_server((host, port), family=family, backlog=backlog)
    except (OSError, OverflowError, UnicodeError) as error:
        do = "Choose others with --host and --port; port 0 takes a free one."
        reason = getattr(error, "strerror", None) or first_line(error).rstrip(".")
        raise ConfigError(f"Cannot listen on {host} port {port}: {reason}. {do}") from error


def _serve(options: argparse.Namespace, listener: socket.socket, connections: int, backlog: int) -> None:
    import uvicorn

    from sparse_exp.predict.models import find_model
    from sparse_exp.predict.tuned import tuned
    from sparse_exp.serve.app import create_app
    from sparse_exp.serve.connections import bounded
    from sparse_exp.serve.limits import Limits
    from sparse_exp.serve.service import Service
    from sparse_exp.serve.worker import DetectorSettings

    key = _key(options.api_key_file)
    model = find_model(options.model, engine=options.engine, places=chosen_places(options))
    settings = DetectorSettings(**tuned(model, detector_settings(options)))
    limits = Limits(
        options.max_bytes, options.max_pixels, options.max_files, options.image_formats, options.queue,
        options.timeout, options.min_rate, options.engine_timeout,
    )  # fmt: skip
    service = Service(model, settings, limits, options.max_wait_ms / 1e3)

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if self.should_exit and sig == signal.SIGINT:  # the second Ctrl-C
                service.kill_engine()  # it ends with this process, unless it hangs
                os._exit(_INTERRUPTED)
            if sig == signal.SIGINT or not options.drain:
                super().handle_exit(sig, frame)
            elif not service.draining:
                service.draining = True
                timer = threading.Timer(options.drain, super().handle_exit, (sig, frame))
                timer.daemon = True
                timer.start()

    def give_up() -> None:
        server.should_exit = True

    config = uvicorn.Config(
        create_app(service, lambda: _announce(service, listener), give_up, api_key=key),
        http=bounded(connections, options.head_timeout),
        ws="none",
        backlog=backlog,
        log_config=None,
        log_level="error",
        access_log=False,
        # No request takes longer, so that all are answered by then.
        timeout_graceful_shutdown=int(service.limits.timeout) + 1,
    )
    server = Server(config)
    server.run(sockets=[listener])
    if service.failure:
        raise service.failure


def _announce(service: Service, listener: socket.socket) -> None:
    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    model, settings = service.model, service.settings
    options = "".join(f", {name} {value}" for name, value in settings.options.items())
    how = f"batch {settings.batch_size}, streams {settings.streams}{options}"
    print(f"Serving {model.origin} with {model.engine} {service.version} ({how}) on {url}", flush=True)
    if not may_be_shipped(model.engine):
        others = " or ".join(filter(may_be_shipped, RUNTIMES))
        _log.warning(
            "The licence of %s (%s) does not allow use in production: choose --engine %s there.",
            model.engine, RUNTIMES[model.engine].licence, others,
        )  # fmt: skip


def _key(path: Path | None) -> str:
    """The key that clients must show; empty where there is none."""
    if path is None:
        return os.environ.get(_KEY_VARIABLE, "")
    try:
        key = expanded(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise ConfigError(f"Cannot read the key in {path}: {reason}. Correct --api-key-file.") from error
    if not key:
        raise ConfigError(expected(f"the key in {path}", "a line of text", key, "Write one into it."))
    return key


def _options() -> argparse.Namespace:
    parser = Parser(
        prog="python -m sparse_exp.serve",
        description="Serve a detector over HTTP: POST images to /predict.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add_model_options(parser)
    add("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    add("--port", type=int, default=8000, help="port to listen on; 0: a free one (%(default)s)")
    add_detector_options(parser, streams="as the run's benchmark found, else 1")
    add = parser.add_argument_group("operation").add_argument
    key = f"a file with the key that clients must show (default: {_KEY_VARIABLE}, else none)"
    add("--api-key-file", metavar="FILE", type=Path, help=key)
    log = "text: warnings; json: also requests and the engine's output (%(default)s)"
    add("--log", choices=("text", "json"), default="text", help=log)
    drain = "after SIGTERM, time in which /ready says no and all goes on (%(default)s)"
    add("--drain", metavar="SECONDS", type=_delay, default=0.0, help=drain)
    _add_limits(parser)
    return parser.parse_args()


def _add_limits(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("limits; sizes as in 500k, 10MB, 1G").add_argument
    wait = "most time that an image waits for others to fill its batch (%(default)s)"
    add("--max-wait-ms", metavar="MS", type=_delay, default=5.0, help=wait)
    length = "length of a request's body (%(default)s)"
    add("--max-bytes", metavar="SIZE", type=_size, default="10MB", help=length)
    pixels = "width times height of a request's images together (%(default)s)"
    add("--max-pixels", metavar="SIZE", type=_pixels, default="25M", help=pixels)
    add("--max-files", metavar="N", type=whole, default=16, help="images of a request (%(default)s)")
    kinds = f"kinds of images, of {','.join(_FORMATS)} (%(default)s)"
    add("--image-formats", metavar="LIST", type=_formats, default="jpeg,png", help=kinds)
    queue = "requests worked on at once; more get status 503 (%(default)s)"
    add("--queue", metavar="N", type=whole, default=128, help=queue)
    timeout = "most time that a request takes (%(default)s)"
    add("--timeout", metavar="SECONDS", type=_seconds, default=60.0, help=timeout)
    hangs = "most time that the engine takes for a batch before it is killed (%(default)s)"
    add("--engine-timeout", metavar="SECONDS", type=_seconds, default=60.0, help=hangs)
    connections = "connections at once; more close those without a request (%(default)s)"
    add("--connections", metavar="N", type=whole, default=512, help=connections)
    head = "most time that a connection is open without a request (%(default)s)"
    add("--head-timeout", metavar="SECONDS", type=_seconds, default=10.0, help=head)
    add("--min-rate", metavar="SIZE", type=_size, default="10k", help="of a body, each second (%(default)s)")


def _formats(text: str) -> tuple[str, ...]:
    words = [word.strip().lower() for word in text.split(",")]
    checked(text, all(word in _FORMATS for word in words), f"some of {','.join(_FORMATS)}")
    return tuple(_FORMATS[word] for word in words)


def _delay(text: str) -> float:
    return number(text, lambda value: 0 <= value < 1e5, "between 0 and 100000")


def _seconds(text: str) -> float:
    return number(text, lambda value: 0 < value < 1e5, "above 0 and below 100000")


def _size(text: str) -> int:
    found = re.fullmatch(r"(\d+)([kmg]?)b?", text.strip().lower())
    size = int(found[1]) * _UNITS[found[2]] if found else 0
    checked(text, size >= 1, "a size such as 10MB or 500k")
    return size


def _pixels(text: str) -> int:
    size = _size(text)
    checked(text, size <= MOST_PIXELS, f"at most {MOST_PIXELS}, which Pillow decodes")
    return size


if __name__ == "__main__":
    run_command(main)
