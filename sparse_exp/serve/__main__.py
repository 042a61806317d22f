"""The command ``python -m sparse_exp.serve``: a detector over HTTP."""

from __future__ import annotations

import argparse
import logging
import os
import re
import signal
import socket
import sys
from typing import TYPE_CHECKING

from sparse_exp.command import Parser, checked, number, run_command, whole
from sparse_exp.config.places import chosen_places
from sparse_exp.errors import ConfigError, first_line
from sparse_exp.predict.options import add_detector_options, add_model_options, detector_settings

if TYPE_CHECKING:
    from types import FrameType

    from sparse_exp.serve.service import Service

_EPILOG = """MODEL is the directory of a run, a stub of the local zoo (zoo:...), a directory with
model.onnx, or an ONNX file.

  python -m sparse_exp.serve outputs/runs/DATE/TIME-NAME
  curl -F images=@photo.jpg http://127.0.0.1:8000/predict

GET /health, GET /metrics (Prometheus), GET /docs (all answers and errors). See docs/serve.md."""
_INTERRUPTED = 130
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
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # the client is told what it would log
    # First of all, since the model takes longer: an address that is in use is reported at once.
    with _listen(options.host, options.port) as listener:
        _serve(options, listener)
    return 0


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        # Python sets SO_REUSEADDR, so that the port can be used again at once after a crash.
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError, UnicodeError) as error:
        do = "Choose others with --host and --port; port 0 takes a free one."
        reason = getattr(error, "strerror", None) or first_line(error).rstrip(".")
        raise ConfigError(f"Cannot listen on {host} port {port}: {reason}. {do}") from error


def _serve(options: argparse.Namespace, listener: socket.socket) -> None:
    from sparse_exp.predict.models import find_model
    from sparse_exp.serve.limits import Limits
    from sparse_exp.serve.service import Service
    from sparse_exp.serve.worker import DetectorSettings

    model = find_model(options.model, engine=options.engine, places=chosen_places(options))
    settings = DetectorSettings(**detector_settings(options))
    limits = Limits(options.max_bytes, options.max_pixels, options.max_files, options.queue, options.timeout)
    _run(Service(model, settings, limits, options.max_wait_ms / 1e3), listener)


def _run(service: Service, listener: socket.socket) -> None:
    import uvicorn

    from sparse_exp.serve.app import create_app

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if self.should_exit and sig == signal.SIGINT:  # the second Ctrl-C
                service.kill_engine()  # it ends with this process, unless it hangs
                os._exit(_INTERRUPTED)
            super().handle_exit(sig, frame)

    def announce() -> None:
        host, port = listener.getsockname()[:2]
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        engine, settings = f"{service.model.engine} {service.version}", service.settings
        how = f"batch {settings.batch_size}, streams {settings.streams}"
        print(f"Serving {service.model.origin} with {engine} ({how}) on {url}", flush=True)

    def give_up() -> None:
        server.should_exit = True

    config = uvicorn.Config(
        create_app(service, announce, give_up),
        log_level="error",
        access_log=False,
        # No request takes longer, so that all are answered by then.
        timeout_graceful_shutdown=int(service.limits.timeout) + 1,
    )
    server = Server(config)
    server.run(sockets=[listener])
    if service.failure:
        raise service.failure


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
    add_detector_options(parser, streams=1)
    _add_limits(parser)
    return parser.parse_args()


def _add_limits(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("limits; sizes as in 500k, 10MB, 1G").add_argument
    wait = "most time that an image waits for others to fill its batch (%(default)s)"
    add("--max-wait-ms", metavar="MS", type=_amount, default=5.0, help=wait)
    length = "length of a request's body (%(default)s)"
    add("--max-bytes", metavar="SIZE", type=_size, default="10MB", help=length)
    pixels = "width times height of an image (%(default)s)"
    add("--max-pixels", metavar="SIZE", type=_pixels, default="50M", help=pixels)
    add("--max-files", metavar="N", type=whole, default=16, help="images of a request (%(default)s)")
    queue = "requests worked on at once; more get status 503 (%(default)s)"
    add("--queue", metavar="N", type=whole, default=128, help=queue)
    timeout = "most time that a request takes (%(default)s)"
    add("--timeout", metavar="SECONDS", type=_seconds, default=60.0, help=timeout)


def _amount(text: str) -> float:
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
