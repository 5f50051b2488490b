"""The file that a stage begins with: needed to begin, and not to go on.

Whether a checkpoint takes the place of initial weights is known late: Lightning reads it after `setup` and `configure_model`,
and `trainer.ckpt_path` is None until then. So a missing file is noted, and refused when nothing came instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L


class BeginsFromFile(L.LightningModule):
    """A module that is resumed and evaluated from its own checkpoint after the initial file has gone."""

    _missing: FileNotFoundError | None = None

    @contextmanager
    def may_be_gone(self) -> Iterator[None]:
        """Around reading the initial file: FileNotFoundError waits until it is known that no checkpoint is restored."""
        try:
            yield
        except FileNotFoundError as error:
            self._missing = error

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The checkpoint's weights replace the initial ones."""
        self._missing = None

    def _refuse_missing(self) -> None:
        if self._missing is not None:
            raise self._missing

    def on_train_start(self) -> None:
        """Raises FileNotFoundError when neither the initial file nor a checkpoint was there, as do the other three."""
        self._refuse_missing()

    def on_validation_start(self) -> None:
        self._refuse_missing()

    def on_test_start(self) -> None:
        self._refuse_missing()

    def on_predict_start(self) -> None:
        self._refuse_missing()
