"""Every form of a row becomes the segments it stands for; what is wrong is said."""

import json

import pytest

from nextflow.datamodules.document_rows import BadRow, Segment, TurnNames, parse_row


def text(words, loss=True):
    return Segment(words, None, loss)


def image(file, loss=True):
    return Segment(None, file, loss)


@pytest.mark.parametrize(
    ("row", "segments"),
    [
        ({"file": "a.png", "caption": " a cat "}, [text("a cat"), image("a.png")]),
        ({"image": "a.png", "caption": "a cat"}, [text("a cat"), image("a.png")]),
        (
            {"source": "a.png", "instruction": "make it red", "target": "b.png"},
            [image("a.png"), text("make it red"), image("b.png")],
        ),
        (
            {"source": ["a.png", "b.png"], "instruction": "put both together", "target": "c.png"},
            [image("a.png"), image("b.png"), text("put both together"), image("c.png")],
        ),
        (
            {"image": "a.png", "question": "what is it?", "answer": "a cat"},
            [image("a.png", False), text("what is it?", False), text(" a cat")],
        ),
        ({"text": "plain"}, [text("plain")]),
        (
            {"segments": [{"text": "once "}, {"image": "a.png", "loss": False}, {"text": "and then"}]},
            [text("once "), image("a.png", False), text("and then")],
        ),
        (
            {"messages": [
                {"role": "system", "content": "Be kind."},
                {"role": "user", "content": [{"type": "text", "text": "draw a cat"}]},
                {"role": "assistant", "content": [{"type": "image", "image": "a.png"}]},
                {"role": "user", "content": "what is it?"},
                {"role": "assistant", "content": "a cat"},
            ]},
            [
                text("Be kind.\nUser: draw a cat\nAssistant: ", False), image("a.png"), text("\n"),
                text("User: what is it?\nAssistant: ", False), text("a cat"),
            ],
        ),
    ],
)  # fmt: skip
def test_forms(row, segments):
    assert parse_row(json.dumps(row)).segments == segments


def test_turns_have_the_names_of_the_config_and_other_keys_are_metadata():
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}], "licence": "CC0"}
    parsed = parse_row(json.dumps(row), TurnNames(user="U:", assistant="A:"))
    assert parsed.segments == [text("U:hi\nA:", False), text("ho")]
    assert parsed.metadata == {"licence": "CC0"}
    captioned = parse_row(json.dumps({"file": "a.png", "caption": "a cat", "shade": 3}))
    assert captioned.metadata == {"file": "a.png", "caption": "a cat", "shade": 3} and captioned.images == ["a.png"]


@pytest.mark.parametrize("image", ["file", "file_name", "image"])
@pytest.mark.parametrize("caption", ["caption", "text"])
def test_captioned_images_of_other_tools_are_read(image, caption):
    """Such as metadata.jsonl of Hugging Face's image folders: file_name and text."""
    assert parse_row(json.dumps({image: "a.png", caption: " a cat "})).segments == [
        text("a cat"),
        Segment(None, "a.png"),
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{not json", "not JSON"),
        ("[1]", "not a JSON object"),
        ({"words": "a", "picture": "b"}, "has the keys words, picture; one of segments, messages, instruction"),
        ({"caption": "a cat", "fil": "a.png"}, 'no "file"; the row has the keys caption, fil'),
        ({"file": "", "caption": "a cat"}, '"file" is empty'),
        ({"file": "a.png", "caption": " "}, '"caption" is empty'),
        ({"file": "a.png", "caption": 7}, '"caption" is 7, not a string'),
        ({"file": "a.png"}, 'no "caption"'),
        ({"instruction": "red", "target": "b.png"}, 'no "source"'),
        ({"source": "a.png", "instruction": "red"}, 'no "target"'),
        ({"source": "a.png", "instruction": "", "target": "b.png"}, '"instruction" is empty'),
        ({"question": "what?", "answer": "a", "image": 3}, '"image" is 3, not a string'),
        ({"question": "what?", "image": "a.png"}, 'no "answer"'),
        ({"text": 3}, '"text" is 3, not a string'),
        ({"segments": []}, '"segments" is no list'),
        ({"segments": ["a"]}, "segment 1 is no object"),
        ({"segments": [{"text": "a"}, {"img": "a.png"}]}, "segment 2 has the keys img; it needs text or image"),
        ({"segments": [{"text": "a", "image": "a.png"}]}, "segment 1 has the keys text, image"),
        ({"segments": [{"text": "a", "loss": "no"}]}, "segment 1: loss is 'no'"),
        ({"segments": [{"image": ""}]}, "segment 1: its image is empty"),
        ({"segments": [{"text": "a", "loss": False}]}, "nothing in it is trained on"),
        ({"messages": []}, '"messages" is no list'),
        (
            {"messages": [{"role": "bot", "content": "a"}]},
            "message 1: its role is 'bot', not one of system, user, assistant",
        ),
        ({"messages": [{"role": "user", "content": "a"}]}, "the last message is not the assistant's"),
        ({"messages": [{"role": "assistant", "content": []}]}, 'message 1: "content" is neither'),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "video", "video": "a"}]}]},
            "message 1 has the keys video",
        ),
    ],
)
def test_what_is_wrong_is_said(row, reason):
    with pytest.raises(BadRow) as bad:
        parse_row(row if isinstance(row, str) else json.dumps(row))
    assert reason in str(bad.value)
