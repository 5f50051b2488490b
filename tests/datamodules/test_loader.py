"""WaitedLoader: a DataLoader's batches, and the time that they were waited for."""

import time

import pytest
from torch.utils.data import DataLoader, Dataset

from nextflow.datamodules.loader import WaitedLoader


class Slow(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        time.sleep(0.05)
        return index


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_are_a_dataloaders_and_only_the_wait_counts(num_workers):
    options = {"batch_size": 2, "num_workers": num_workers}
    loader = WaitedLoader(Slow(), **options)
    seen = []
    for batch in loader:
        seen.append(batch.tolist())
        time.sleep(0.1)  # not a wait; a worker makes the next batch meanwhile
    assert seen == [batch.tolist() for batch in DataLoader(Slow(), **options)] == [[0, 1], [2, 3]]
    assert loader.seconds_waited >= (0.2 if num_workers == 0 else 0.1)
    if num_workers == 0:
        first = loader.seconds_waited
        assert [batch.tolist() for batch in loader] == seen
        assert loader.seconds_waited >= first + 0.2


def test_leaving_early_counts_what_was_read():
    loader = WaitedLoader(Slow(), batch_size=1)
    next(iter(loader))
    assert loader.seconds_waited >= 0.05
