import json

import pytest
from PIL import Image

from nextflow.datamodules.documents import DocumentsConfig, write_documents
from nextflow.sequence.shards import open_shard


@pytest.fixture
def folder(tmp_path):
    """Ten good rows and, between them, five bad ones."""
    (tmp_path / "images").mkdir()
    rows = []
    for index in range(10):
        Image.new("RGB", (8, 8), (index * 20, 0, 0)).save(tmp_path / f"images/{index}.{'jpg' if index == 4 else 'png'}")
        rows.append(
            json.dumps(
                {"file": f"{index}.{'jpg' if index == 4 else 'png'}", "caption": f"shade {index}", "shade": index}
            )
        )
    (tmp_path / "images/broken.png").write_bytes((tmp_path / "images/1.png").read_bytes()[:40])
    rows.insert(2, json.dumps({"file": "broken.png", "caption": "x"}))
    rows.insert(4, json.dumps({"file": "missing.png", "caption": "x"}))
    rows.insert(6, json.dumps({"file": "1.png", "caption": "  "}))
    rows.insert(8, "{not json")
    rows.insert(10, json.dumps({"caption": "x"}))
    (tmp_path / "captions.jsonl").write_text("\n".join(rows) + "\n")
    return tmp_path


def config(folder, **options):
    paths = {
        "captions": str(folder / "captions.jsonl"),
        "images": str(folder / "images"),
        "output": str(folder / "out"),
    }
    return DocumentsConfig(**{**paths, "max_bad_fraction": 0.5, "validation_fraction": 0.0, **options})


def test_bad_rows_are_reported_by_line(folder):
    report = write_documents(config(folder))
    assert report["splits"] == {"train": 10}
    reasons = {row["line"]: row["reason"] for row in report["skipped"]}
    assert sorted(reasons) == [3, 5, 7, 9, 11]
    for line, words in (
        (3, "broken image"),
        (5, "no such file"),
        (7, "empty caption"),
        (9, "not JSON"),
        (11, 'no "file"'),
    ):
        assert words in reasons[line]


def test_good_rows_arrive_unchanged(folder):
    write_documents(config(folder))
    shard = open_shard(folder / "out/train/000000.tar")
    record = shard.record("000000008")
    assert record["segments"] == [{"text": "shade 4"}, {"image": "0.jpg"}]
    assert record["metadata"] == {"caption": "shade 4", "file": "4.jpg", "shade": 4}
    assert shard.read("000000008", "0.jpg") == (folder / "images/4.jpg").read_bytes()


def test_too_many_bad_rows_stop_it_and_leave_no_output(folder):
    with pytest.raises(ValueError, match=r"5 of 15 rows.*`max_bad_fraction` = 0\.2.*line 3"):
        write_documents(config(folder, max_bad_fraction=0.2))
    assert not (folder / "out").exists()
    write_documents(config(folder))


def test_a_finished_output_is_kept_and_another_is_refused(folder):
    first = write_documents(config(folder))
    stamp = (folder / "out/train/000000.tar").stat().st_mtime_ns
    assert write_documents(config(folder)) == first
    assert (folder / "out/train/000000.tar").stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="output"):
        write_documents(config(folder, source="other"))


def test_validation_and_text_tokenizer(folder):
    report = write_documents(config(folder, validation_fraction=0.4, text_tokenizer_size=260))
    assert sum(report["splits"].values()) == 10 and set(report["splits"]) == {"train", "validation"}
    train, validation = (set(open_shard(folder / f"out/{split}/000000.tar").keys) for split in ("train", "validation"))
    assert not train & validation
    assert (folder / "out/text_tokenizer/tokenizer.json").is_file()


def test_missing_inputs_name_their_key(folder):
    with pytest.raises(FileNotFoundError, match="captions"):
        write_documents(config(folder, captions=str(folder / "none.jsonl")))
    with pytest.raises(FileNotFoundError, match="images"):
        write_documents(config(folder, images=str(folder / "none")))
