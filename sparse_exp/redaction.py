"""Users, passwords and tokens in addresses: kept out of records, logs, messages and tracebacks."""

from __future__ import annotations

import logging
import re
import sys
import traceback
from types import TracebackType

from sparse_exp.errors import expected

# A password may hold what ends a host, as people do not always encode it: rather too much is hidden.
_USER = re.compile(r"(?<=://)(?:[^/?#\s'\"@:]*:(?:(?!://)[^\s\"])*@|[^/?#\s'\"]*@)")
# Parameters that sign an address or let in whoever has it.
_SIGNED = re.compile(
    r"(?P<name>[?&;#](?:[\w.-]{0,40}(?:token|secret|passw|pwd|auth(?!or)|credential|signature|api[-_]?key"
    r"|access[-_]?key|jwt)[\w.-]{0,40}|sig|key)=)[^&\s'\"]+",
    re.IGNORECASE,
)


def without_secrets(text: str) -> str:
    """A text with the users, passwords and tokens of the addresses in it replaced by ``***``."""
    return _SIGNED.sub(r"\g<name>***", _USER.sub("***@", text))


def secret_problem(key: str, text: str) -> str:
    """What to say of a value of the configuration that holds a secret, which is not shown.

    Args:
        key: of the configuration.
        text: the value.
    """
    do = "Put user and password into ~/.netrc, or download the file and give its path."
    if key.lstrip("+") == "tracker.uri":
        do = "Put the address into MLFLOW_TRACKING_URI of the environment, see docs/tracking-server.md."
    should_be = "an address without user, password and token, as it is written down"
    return expected(key, should_be, without_secrets(text), do)


class RedactingFormatter(logging.Formatter):
    """Formats records of a log, tracebacks included, without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as it may be shown."""
        return without_secrets(super().format(record))


def redact_tracebacks() -> None:
    """Let Python print an error that nobody catches without secrets."""

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        sys.stderr.write(without_secrets("".join(traceback.format_exception(kind, error, trace))))

    sys.excepthook = show
