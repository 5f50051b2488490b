import json
import tarfile

import numpy as np
import pytest

from nextflow.sequence.scales import ScaleSchedule
from nextflow.sequence.shards import (
    HEADER_NAME,
    Codes,
    ShardHeader,
    ShardWriter,
    check_header,
    decode_codes,
    encode_codes,
    open_shard,
)

SCHEDULE = ScaleSchedule(sides=(1, 2, 4), levels={32: 3}, stride=8, base_grids=((4, 4),))
DOCUMENTS = ShardHeader(kind="documents", text="CC0")


def codes_header(fingerprint: str = "0123456789abcdef") -> ShardHeader:
    return ShardHeader(kind="codes", schedule=SCHEDULE.to_dict(), tokenizer=fingerprint)


@pytest.mark.parametrize("with_corrected", [False, True])
def test_codes_survive_a_shard_byte_by_byte(tmp_path, with_corrected):
    codes_N = np.random.default_rng(0).integers(0, 2**17, 21, dtype=np.int32)
    corrected = (codes_N[::-1].copy(), codes_N + 1) if with_corrected else (None, None)
    codes = Codes(codes_N, 32, (4, 4), *corrected)
    with ShardWriter(tmp_path, header=codes_header()) as writer:
        writer.write("a", {"segments": [{"image": "0.png"}]}, {"0.npz": encode_codes(codes)})

    shard = open_shard(tmp_path / "000000.tar")
    stored = shard.read("a", shard.image_name("a", "0.png"))
    read = decode_codes(stored)

    assert stored == encode_codes(read)
    assert read.codes_N.tobytes() == codes_N.tobytes()
    assert (read.input_codes_N is None) == (not with_corrected)
    if with_corrected:
        assert read.input_codes_N.tobytes() == codes.input_codes_N.tobytes()
        assert read.target_codes_N.tobytes() == codes.target_codes_N.tobytes()
    assert (read.level, read.base_grid) == (32, (4, 4))


def test_equal_data_gives_equal_files(tmp_path):
    for name in ("one", "two"):
        with ShardWriter(tmp_path / name, header=DOCUMENTS) as writer:
            writer.write("a", {"segments": []}, {"0.png": b"123"})
    assert (tmp_path / "one/000000.tar").read_bytes() == (tmp_path / "two/000000.tar").read_bytes()


def test_samples_are_found_by_seeking_in_the_order_written(tmp_path):
    with ShardWriter(tmp_path, header=DOCUMENTS, samples_per_shard=2) as writer:
        for key in "cab":
            writer.write(key, {"name": key}, {"0.png": key.encode() * 1000})
    assert [path.name for path in writer.paths] == ["000000.tar", "000001.tar"]
    shard = open_shard(writer.paths[0])
    assert shard.header == DOCUMENTS
    assert shard.keys == ["c", "a"]
    assert shard.read("a", "0.png") == b"a" * 1000
    assert shard.record("c") == {"name": "c"}
    assert open_shard(writer.paths[1]).keys == ["b"]


def test_webdataset_reads_the_same_samples(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    with ShardWriter(tmp_path, header=DOCUMENTS) as writer:
        for key in ("1F34E", "1F34F-200D"):
            writer.write(key, {"name": key}, {"0.png": b"png of " + key.encode()})
    samples = list(webdataset.WebDataset(str(tmp_path / "000000.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == ["_header", "1F34E", "1F34F-200D"]
    assert samples[1]["0.png"] == b"png of 1F34E"
    assert json.loads(samples[2]["json"]) == {"name": "1F34F-200D"}


def test_an_unfinished_shard_has_no_final_name(tmp_path):
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, header=DOCUMENTS, samples_per_shard=2) as writer:
        for key in "abc":
            writer.write(key, {}, {})
        raise RuntimeError("interrupted")
    assert [path.name for path in tmp_path.iterdir()] == ["000000.tar"]


def test_another_tokenizer_is_refused_naming_both_fingerprints():
    check_header(codes_header(), SCHEDULE, "0123456789abcdef", "x.tar")
    check_header(DOCUMENTS, SCHEDULE, "0123456789abcdef", "x.tar")
    with pytest.raises(ValueError, match=r"x\.tar.*0123456789abcdef.*fedcba9876543210"):
        check_header(codes_header(), SCHEDULE, "fedcba9876543210", "x.tar")


def test_another_schedule_is_refused_naming_the_key():
    other = ScaleSchedule(sides=(1, 3, 4), levels={32: 3}, stride=8, base_grids=((4, 4),))
    with pytest.raises(ValueError, match=r"data\.schedule") as error:
        check_header(codes_header(), other, None, "x.tar")
    assert "[1, 2, 4]" in str(error.value) and "[1, 3, 4]" in str(error.value)


def test_a_tar_without_header_is_refused(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(__file__, "a.json")
    with pytest.raises(ValueError, match=HEADER_NAME):
        open_shard(tmp_path / "x.tar")


def test_a_cut_off_shard_is_refused_or_names_the_sample(tmp_path):
    with ShardWriter(tmp_path, header=DOCUMENTS) as writer:
        writer.write("a", {}, {"0.png": b"x" * 5000})
    data = writer.paths[0].read_bytes()
    (tmp_path / "cut.tar").write_bytes(data[:4000])
    with pytest.raises(ValueError, match=r"cut\.tar"):
        open_shard(tmp_path / "cut.tar").read("a", "0.png")


@pytest.mark.parametrize("key", ["", "a.b", "_header"])
def test_keys_that_webdataset_would_split_are_refused(tmp_path, key):
    with ShardWriter(tmp_path, header=DOCUMENTS) as writer, pytest.raises(ValueError, match="key"):
        writer.write(key, {}, {})
