"""A DataLoader that knows how long it has been waited for."""

import time
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader


class WaitedLoader(DataLoader):
    """As a DataLoader. With workers, the wait is what they did not have ready; without, the time to make the batches."""

    seconds_waited: float = 0.0
    """By whoever reads it, over all passes; starting the workers counts."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        started = time.perf_counter()
        batches = super().__iter__()
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self.seconds_waited += time.perf_counter() - started
            yield batch
            started = time.perf_counter()
