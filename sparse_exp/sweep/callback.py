"""What Hydra calls when a multirun starts.

It calls nothing when a job has failed; so the command line closes the sweep itself, whatever happened.
"""

from __future__ import annotations

import sys
import traceback
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from sparse_exp.errors import SparseExpError


class SweepCallback(Callback):
    """Opens a sweep; see `sparse_exp.sweep.launch.open_sweep`. Single runs do not notice it."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Check what can be checked, and take the sweep's directory.

        Raises:
            SystemExit: with what is wrong. Hydra would only warn of another exception here.
        """
        from sparse_exp.sweep.launch import open_sweep

        try:
            open_sweep(config)
        except SparseExpError as error:
            sys.exit("\n".join(f"Error: {line}" for line in str(error).splitlines()))
        except Exception as error:
            traceback.print_exc()
            raise SystemExit(1) from error
