"""The mixed stream: shares, every source's own order, and any place taken up again."""

from collections import Counter

import pytest

from nextflow.datamodules.mixing import MixedStream, SourceShards
from nextflow.datamodules.streams import Place, ShardFolder, find_shards
from nextflow.sequence.shards import ShardHeader, ShardWriter


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {}
    for name, count in (("a", 7), ("b", 20), ("c", 5)):
        folder = tmp_path_factory.mktemp(name)
        with ShardWriter(folder, header=ShardHeader(kind="documents"), samples_per_shard=4) as writer:
            for index in range(count):
                writer.write(f"{name}{index:02d}", {}, {})
        found[name] = find_shards(f"{folder}/*.tar", "data.sources", "")
    return found


def stream(folders, weights, **options):
    sources = [SourceShards(name, f"{name} 32", folders[name], weight) for name, weight in weights.items()]
    return MixedStream(sources, ShardFolder(), **{"seed": 1, "window_shards": 2, **options})


def keys(one, count):
    return [one.advance()[1].key for _ in range(count)]


def test_shares_follow_the_weights(folders):
    drawn = Counter(key[0] for key in keys(stream(folders, {"a": 1, "b": 3, "c": 0}), 4000))
    assert drawn["c"] == 0 and abs(drawn["a"] / 4000 - 0.25) < 0.03


def test_every_source_is_seen_whole_before_it_comes_again(folders):
    one = stream(folders, {"a": 2, "b": 1})
    drawn = keys(one, 300)
    of_a = [key for key in drawn if key[0] == "a"]
    for start in range(0, len(of_a) - 7, 7):
        assert sorted(of_a[start : start + 7]) == [f"a{index:02d}" for index in range(7)]


def test_the_order_is_a_function_of_the_seed_and_the_slot(folders):
    weights = {"a": 1, "b": 1}
    assert keys(stream(folders, weights), 50) == keys(stream(folders, weights), 50)
    assert keys(stream(folders, weights), 50) != keys(stream(folders, weights, seed=2), 50)


def test_slots_share_each_pass_of_each_source(folders):
    parts = []
    for slot in (0, 1):
        one = stream(folders, {"a": 1, "b": 1}, slot=slot, num_slots=2)
        samples = [one.advance()[1] for _ in range(100)]
        parts.append({sample.key for sample in samples if sample.number == 0})
    assert not parts[0] & parts[1]
    assert parts[0] | parts[1] == {f"a{index:02d}" for index in range(7)} | {f"b{index:02d}" for index in range(20)}


@pytest.mark.parametrize("stop", [0, 1, 17, 60])
def test_a_position_is_taken_up_exactly(folders, stop):
    weights = {"a": 1, "b": 2, "c": 1}
    one, again = stream(folders, weights), stream(folders, weights)
    keys(one, stop)
    again.go_to(one.position())
    assert keys(again, 60) == keys(one, 60)


def test_a_source_that_rests_keeps_its_place(folders):
    one = stream(folders, {"a": 1, "b": 1})
    keys(one, 11)
    before = one.position()["streams"]["b 32"]
    resting = stream(folders, {"a": 1, "b": 0, "c": 2})
    resting.go_to(one.position())
    keys(resting, 30)
    assert resting.position()["streams"]["b 32"] == before
    assert resting.position()["drawn"] == 41
    assert resting.at(Place(0, 0, 0, "b 32")) is None
    awake = stream(folders, {"b": 1})
    awake.go_to(resting.position())
    place, sample = awake.advance()
    assert list(place[:3]) == before and sample.source == "b" and place.source == "b 32"
    assert awake.at(place) == sample


def test_sources_over_the_same_shards_do_not_meet_the_same_document(folders):
    both = {"x": folders["b"], "y": folders["b"]}
    one = stream(both, {"x": 1, "y": 1})
    drawn = [(sample.source, sample.key) for _, sample in (one.advance() for _ in range(30))]
    orders = [[key for name, key in drawn if name == which][:10] for which in ("x", "y")]
    assert orders[0] != orders[1]
