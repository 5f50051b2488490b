"""Every kind as shards: one command, one text tokenizer, attribution, disjoint splits, the same bytes each time."""

import json

import pytest

from nextflow.datamodules.openmoji.catalogue import SPLITS
from nextflow.datamodules.openmoji.dataset import OpenMojiConfig, make_openmoji
from nextflow.datamodules.openmoji.kinds import KINDS, record_of
from nextflow.datamodules.openmoji.world import MojiDocument
from nextflow.sequence.shards import open_shard
from nextflow.sequence.text_tokenizer import load_text_tokenizer

COUNT = 12


@pytest.fixture(scope="module")
def output(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    make(folder)
    return folder


def make(folder, **options):
    settings = {"max_drawings": 600, "text_tokenizer_size": 700, "num_workers": 0, "kinds": dict.fromkeys(KINDS, COUNT)}
    return make_openmoji(OpenMojiConfig(output=str(folder), **{**settings, **options}))


def samples(folder, kind, split):
    shard = open_shard(folder / kind / split / "000000.tar")
    return shard, [(key, shard.record(key)) for key in shard.keys]


def test_every_kind_and_split_is_written_with_attribution(output):
    report = json.loads((output / "report.json").read_text())
    assert set(report["kinds"]) == set(KINDS)
    for kind, counts in report["kinds"].items():
        assert counts["train"] == COUNT and set(counts) == set(SPLITS)
        for split in SPLITS:
            shard, found = samples(output, kind, split)
            assert len(found) == counts[split] and "CC BY-SA 4.0" in shard.header.text
            for key, record in found:
                assert record["source"] == f"openmoji/{kind}" and "metadata" in record
                images = [segment["image"] for segment in record["segments"] if "image" in segment]
                assert len(set(images)) == len(images)
                assert all(shard.read(key, name).startswith(b"\x89PNG") for name in images)


def test_what_is_given_is_not_learnt_unless_asked_for(output):
    given = {"questions": [False, False, True], "reasoning": [False, True, True], "examples": [False] * 6 + [True],
             "edits": [True] * 3, "scenes": [True] * 2, "text": [True]}  # fmt: skip
    for kind, learnt in given.items():
        for _, record in samples(output, kind, "train")[1]:
            assert [segment.get("loss", True) for segment in record["segments"]] == learnt
    record, files = record_of(MojiDocument(segments=(b"x", "a", b"y"), prompt=2), "k", prompt_loss=True)
    assert record["segments"] == [{"image": "0.png"}, {"text": "a"}, {"image": "1.png"}]
    assert files == {"0.png": b"x", "1.png": b"y"}


def test_no_drawing_of_a_held_out_split_is_in_a_document_of_training(output):
    """By pixels: single drawings of the held-out splits, as their own shards hold them."""
    held_out = set()
    for split in SPLITS[1:]:
        shard = open_shard(output / split / "000000.tar")
        held_out |= {shard.read(key, "0.png") for key in shard.keys}
    shard = open_shard(output / "train" / "000000.tar")
    held_out -= {shard.read(key, "0.png") for key in shard.keys}  # a few drawings look alike
    for kind in KINDS:
        shard = open_shard(output / kind / "train" / "000000.tar")
        pictures = {shard.read(key, name) for key in shard.keys for name in shard.files(key) if name != "json"}
        assert not pictures & held_out


def test_one_text_tokenizer_knows_the_texts_of_all_kinds(output, tmp_path):
    tokenizer = load_text_tokenizer(output / "text_tokenizer")
    assert tokenizer.size == 700
    lengths = {}
    for kind in KINDS:
        for split in SPLITS:
            for _, record in samples(output, kind, split)[1]:
                for text in (segment["text"] for segment in record["segments"] if "text" in segment):
                    ids = tokenizer.encode(text)
                    assert tokenizer.decode(ids) == text
                    lengths.setdefault(kind, []).append(len(text) / len(ids))
    assert all(sum(values) / len(values) > 2 for values in lengths.values())  # characters per id


def test_the_same_bytes_come_again_and_other_kinds_make_it_anew(output, tmp_path):
    kinds = {"edits": COUNT, "scenes": COUNT}
    report = make(tmp_path, kinds=kinds)
    for kind in kinds:
        for split in SPLITS:
            path = f"{kind}/{split}/000000.tar"
            assert (tmp_path / path).read_bytes() == (output / path).read_bytes()
    stamp = (tmp_path / "edits/train/000000.tar").stat().st_mtime_ns
    assert make(tmp_path, kinds=kinds) == report
    assert (tmp_path / "edits/train/000000.tar").stat().st_mtime_ns == stamp
    make(tmp_path, kinds={"text": 4}, num_workers=2)
    assert not list((tmp_path / "edits").rglob("*.tar")) and (tmp_path / "text/train/000000.tar").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kinds": {"films": 3}}, "kinds: .'films'. do not exist; there are .'edits'"),
        ({"kinds": {"text": 3}, "languages": ["xx"]}, "languages: .'xx'. do not exist"),
        ({"kinds": {"text": 3}, "size": 48}, "size: 48 is no level of `schedule`"),
        ({"layouts": {"heap": 1}}, "layouts: .'heap'. do not exist; there are .'corner'"),
        ({"layouts": {"single": 0}}, "layouts: .* no layout with a share above 0"),
        ({"people_fraction": 2}, "people_fraction: 2 is no share"),
    ],
)
def test_wrong_settings_name_their_key(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        OpenMojiConfig(output=str(tmp_path), **options)
