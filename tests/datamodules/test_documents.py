import json
import subprocess
import sys

import pytest
from PIL import Image

from nextflow.datamodules.documents import DocumentsConfig, check_documents, write_documents
from nextflow.sequence.shards import open_shard


@pytest.fixture
def folder(tmp_path):
    """Ten good rows and, between them, five bad ones."""
    (tmp_path / "images").mkdir()
    rows = []
    for index in range(10):
        Image.new("RGB", (16, 16), (index * 20, 0, 0)).save(
            tmp_path / f"images/{index}.{'jpg' if index == 4 else 'png'}"
        )
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
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    return tmp_path


def config(folder, **options):
    paths = {
        "rows": str(folder / "rows.jsonl"),
        "images": str(folder / "images"),
        "output": str(folder / "out"),
    }
    return DocumentsConfig(**{**paths, "max_bad_fraction": 0.5, "validation_fraction": 0.0, **options})


def test_bad_rows_are_reported_by_line(folder):
    report = write_documents(config(folder))
    assert report["splits"] == {"train": 10} and (report["rows"], report["rejected"]) == (15, 5)
    reasons = {row["line"]: row["reason"] for row in report["skipped"]}
    assert sorted(reasons) == [3, 5, 7, 9, 11]
    for line, words in (
        (3, "broken image"),
        (5, "no such file"),
        (7, '"caption" is empty'),
        (9, "not JSON"),
        (11, 'no "file"'),
    ):
        assert words in reasons[line]
    rejected = [json.loads(line) for line in (folder / "out.rejected.jsonl").read_text().splitlines()]
    assert [(row["line"], row["reason"]) for row in rejected] == sorted(reasons.items())
    assert rejected[0]["row"] == '{"file": "broken.png", "caption": "x"}'


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
    with pytest.raises(FileNotFoundError, match="rows"):
        write_documents(config(folder, rows=str(folder / "none.jsonl")))
    with pytest.raises(FileNotFoundError, match="images"):
        write_documents(config(folder, images=str(folder / "none")))


@pytest.fixture
def mixed(folder):
    """One row of each form."""
    rows = [
        {"segments": [{"text": "once"}, {"image": "0.png"}, {"text": "twice"}, {"image": "4.jpg"}], "tale": 7},
        {"source": "1.png", "instruction": "darker", "target": "0.png"},
        {"image": "2.png", "question": "which shade?", "answer": "two"},
        {"messages": [{"role": "user", "content": "draw"}, {"role": "assistant", "content": [{"image": "3.png"}]}]},
        {"text": "plain words"},
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_every_form_becomes_a_document(mixed):
    report = write_documents(config(mixed))
    assert report["splits"] == {"train": 5} and not (mixed / "out.rejected.jsonl").exists()
    shard = open_shard(mixed / "out/train/000000.tar")
    segments = [shard.record(key)["segments"] for key in shard.keys]
    assert segments[0] == [{"text": "once"}, {"image": "0.png"}, {"text": "twice"}, {"image": "1.jpg"}]
    assert segments[1] == [{"image": "0.png"}, {"text": "darker"}, {"image": "1.png"}]
    assert segments[2] == [
        {"image": "0.png", "loss": False}, {"text": "which shade?", "loss": False}, {"text": " two"}
    ]  # fmt: skip
    assert segments[3] == [{"text": "User: draw\nAssistant: ", "loss": False}, {"image": "0.png"}]
    assert segments[4] == [{"text": "plain words"}]
    assert shard.record(shard.keys[0])["metadata"] == {"tale": 7}
    assert shard.read(shard.keys[0], "1.jpg") == (mixed / "images/4.jpg").read_bytes()


def test_a_check_reads_everything_and_writes_the_rejected_rows_alone(folder):
    report = check_documents(config(folder, max_bad_fraction=0.0))
    assert (report["rows"], report["rejected"], report["usable"]) == (15, 5, {"text, image": 10})
    assert not (folder / "out").exists() and not (folder / "out.partial").exists()
    assert len((folder / "out.rejected.jsonl").read_text().splitlines()) == 5


def test_images_of_a_few_pixels_are_rejected(mixed):
    Image.new("RGB", (64, 15)).save(mixed / "images/1.png")
    reasons = [row["reason"] for row in write_documents(config(mixed))["skipped"]]
    assert reasons == ["1.png: its 64 x 15 pixels are fewer than `min_side` = 16"]


def test_images_longer_than_the_schedules_ratios_are_rejected(mixed):
    Image.new("RGB", (180, 20)).save(mixed / "images/1.png")
    report = write_documents(config(mixed))
    assert [row["line"] for row in report["skipped"]] == [2]
    assert "1.png: its 180 x 20 pixels are longer than `max_aspect_ratio` = 4 allows" in report["skipped"][0]["reason"]


def test_the_folder_of_the_rows_is_that_of_the_images(mixed):
    (mixed / "rows.jsonl").rename(mixed / "images/rows.jsonl")
    report = write_documents(config(mixed, rows=str(mixed / "images/rows.jsonl"), images=None))
    assert report["splits"] == {"train": 5}


def test_what_an_interrupted_run_left_is_replaced(folder):
    (folder / "out.partial/train").mkdir(parents=True)
    (folder / "out.partial/train/000003.tar").write_bytes(b"half of a shard")
    assert write_documents(config(folder))["splits"] == {"train": 10}
    assert not (folder / "out.partial").exists()
    assert [path.name for path in (folder / "out/train").iterdir()] == ["000000.tar"]


def test_the_command_checks_then_writes(folder):
    command = [sys.executable, "-m", "nextflow.datamodules.documents", "--rows", "rows.jsonl", "--images", "images"]
    command += ["--output", "out"]

    def call(*options):
        return subprocess.run([*command, *options], cwd=folder, capture_output=True, text=True)

    checked = call("--check")
    assert checked.returncode == 1 and "error: more rows are rejected than `max_bad_fraction`" in checked.stderr
    assert "line 5: missing.png: there is no such file in images" in checked.stdout
    assert "5 of 15 rows rejected; all of them: out.rejected.jsonl" in checked.stdout
    written = call("--max_bad_fraction", "0.5", "--validation_fraction", "0")
    assert written.returncode == 0, written.stderr
    assert "out: 10 train" in written.stdout and (folder / "out/report.json").is_file()
