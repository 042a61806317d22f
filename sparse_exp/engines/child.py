"""What the child process of an `IsolatedEngine` runs: it answers the parent's questions."""

from __future__ import annotations

import sys
import threading
from functools import cache, partial
from multiprocessing.connection import Connection
from typing import Any

from sparse_exp.children import exit_with_parent
from sparse_exp.engines import create_engine
from sparse_exp.engines.isolated import answer


def serve(descriptor: int, name: str) -> None:
    """Answer questions from a pipe until the parent closes it.

    Args:
        descriptor: file descriptor of the child's end of the pipe.
        name: engine to serve, one of `sparse_exp.config.schema.ENGINES`.
    """
    if name != "torch":  # DeepSparse would import it if it could, which takes seconds and 500 MB
        sys.modules["torch"] = None  # type: ignore[assignment]
    threading.Thread(target=exit_with_parent, args=(descriptor,), daemon=True).start()
    pipe: Connection[Any, Any] = Connection(descriptor)
    engine = cache(partial(create_engine, name, quiet=False))  # when first asked: an error is an answer, too

    def ask(method: str, *arguments: Any, **named: Any) -> Any:
        value = getattr(engine(), method)(*arguments, **named)
        return engine().version if method == "load" else value

    while True:
        try:
            method, arguments, named = pipe.recv()
        except EOFError:
            return
        pipe.send(answer(f"The engine {name}", ask, method, *arguments, **named))
