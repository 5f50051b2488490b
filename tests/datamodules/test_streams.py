"""Streams: every sample once a pass, over any number of slots, and from any place on."""

import pytest

from nextflow.datamodules.streams import Place, ShardFolder, ShuffledStream, find_shards
from nextflow.sequence.shards import ShardHeader, ShardWriter

NUM_SAMPLES = 25


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streams")
    with ShardWriter(folder, header=ShardHeader(kind="documents"), samples_per_shard=4) as writer:
        for index in range(NUM_SAMPLES):
            writer.write(f"{index:02d}", {}, {})
    return find_shards(f"{folder}/*.tar", "data.shards.train", "")


def stream(paths, **options):
    return ShuffledStream(paths, ShardFolder(max_open=3), **{"seed": 1, "window_shards": 2, **options})


def first_pass(one):
    samples = []
    while True:
        _, sample = one.advance()
        if sample.number:
            return samples
        samples.append(sample.key)


@pytest.mark.parametrize("num_slots", [1, 2, 3, 5])
def test_slots_share_each_pass(paths, num_slots):
    # 7 shards in windows of 2: up to 3 slots take shards of their own, 5 deal the samples of each window.
    parts = [first_pass(stream(paths, slot=slot, num_slots=num_slots)) for slot in range(num_slots)]
    assert sorted(key for part in parts for key in part) == [f"{index:02d}" for index in range(NUM_SAMPLES)]


def test_passes_and_seeds_differ(paths):
    one = stream(paths)
    keys = [one.advance()[1].key for _ in range(2 * NUM_SAMPLES)]
    assert sorted(keys[:NUM_SAMPLES]) == sorted(keys[NUM_SAMPLES:])
    assert keys[:NUM_SAMPLES] != keys[NUM_SAMPLES:] != first_pass(stream(paths, seed=2))
    assert keys[:NUM_SAMPLES] == first_pass(stream(paths))


def test_a_stream_goes_on_from_any_place(paths):
    one = stream(paths)
    steps = [(one.next_place, *one.advance()) for _ in range(60)]
    for index in (0, 7, 24, 25, 33):
        again = stream(paths, start=Place(*steps[index][0]))
        assert [again.advance()[1].key for _ in range(20)] == [sample.key for _, _, sample in steps[index : index + 20]]
        assert again.at(steps[index][1]).key == steps[index][2].key


def test_randomness_belongs_to_seed_pass_and_key(paths):
    _, sample = stream(paths).advance()
    assert sample.random(3).random() == sample._replace().random(3).random()
    draws = {sample.random(3).random(), sample.random(4).random(), sample._replace(number=1).random(3).random()}
    assert len(draws) == 3
