"""The callback that Hydra runs when a multirun starts.

Hydra runs no callback after a job that failed. So the command line closes the sweep itself, however it ends.
"""

from __future__ import annotations

import sys
import traceback
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from sparse_exp.errors import SparseExpError
from sparse_exp.sweep.launch import open_sweep


class SweepCallback(Callback):
    """Opens a sweep; see `sparse_exp.sweep.launch.open_sweep`. It does nothing in a single run."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Open the sweep.

        Raises:
            SystemExit: the sweep cannot be opened. Of another exception Hydra would only warn.
        """
        try:
            open_sweep(config)
        except SparseExpError as error:
            sys.exit("\n".join(f"Error: {line}" for line in str(error).splitlines()))
        except Exception as error:
            traceback.print_exc()
            raise SystemExit(1) from error
