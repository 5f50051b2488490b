"""The forms that a row of a user's JSON lines may have, and what each becomes: a list of text and image segments.

    {"segments": [{"text": "..."}, {"image": "a.png"}, {"text": "...", "loss": false}]}     any document
    {"file": "cat.png", "caption": "a cat"}            a caption and its image; also file_name or image, and text
    {"source": "before.png", "instruction": "make it red", "target": "after.png"}           an edit; `source` may be a list
    {"image": "cat.png", "question": "what is it?", "answer": "a cat"}                      a question, answer trained on
    {"messages": [{"role": "user", "content": "draw a cat"}, {"role": "assistant", "content": [{"image": "cat.png"}]}]}
    {"text": "..."}                                                                         text

Other keys of a row are kept as metadata. What is wrong with a row is said in a `BadRow`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


class BadRow(ValueError):
    """A row that cannot be used, and why."""


class Segment(NamedTuple):
    """A text, or the file of an image."""

    text: str | None
    image: str | None
    loss: bool = True


@dataclass(frozen=True, kw_only=True)
class TurnNames:
    """What stands in front of the turns of a conversation."""

    user: str = "User: "
    assistant: str = "Assistant: "


class Row(NamedTuple):
    """A row as a document."""

    segments: list[Segment]
    metadata: dict[str, Any]

    @property
    def images(self) -> list[str]:
        """Files of its images, in order."""
        return [segment.image for segment in self.segments if segment.image is not None]

    @property
    def texts(self) -> list[str]:
        """Its texts, in order."""
        return [segment.text for segment in self.segments if segment.text is not None]


def parse_row(line: str, turns: TurnNames = TurnNames()) -> Row:
    """A line of the file as a document.

    Raises:
        BadRow: it has no known form, or something is missing in it.
    """
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadRow(f"not JSON: {error}") from error
    if not isinstance(values, dict):
        raise BadRow("not a JSON object: a row begins with { and ends with }")
    for key, form in _FORMS.items():
        if key in values:
            segments = form(values, turns)
            break
    else:
        raise BadRow(f"has the keys {', '.join(values) or 'none'}; one of {', '.join(_FORMS)} says what a row is")
    if not any(segment.loss for segment in segments):
        raise BadRow("nothing in it is trained on: every segment says loss: false")
    return Row(
        segments, {name: value for name, value in values.items() if name not in ("segments", "messages", "text")}
    )


def _document(values: Mapping[str, Any], turns: TurnNames) -> list[Segment]:
    segments = values["segments"]
    if not isinstance(segments, list) or not segments:
        raise BadRow('"segments" is no list of texts and images, or an empty one')
    return [_segment(segment, f"segment {number}") for number, segment in enumerate(segments, 1)]


def _caption(values: Mapping[str, Any], turns: TurnNames) -> list[Segment]:
    file = _file(values, *_IMAGE_KEYS)
    return [Segment(_text(values, "caption", "text"), None), Segment(None, file)]


def _edit(values: Mapping[str, Any], turns: TurnNames) -> list[Segment]:
    sources = values.get("source")
    sources = [sources] if isinstance(sources, str) else sources
    if not isinstance(sources, list) or not sources or not all(isinstance(source, str) for source in sources):
        raise BadRow('no "source": an edit names the file it changes, or a list of files')
    instruction = Segment(_text(values, "instruction"), None)
    return [*(Segment(None, source) for source in sources), instruction, Segment(None, _file(values, "target"))]


def _question(values: Mapping[str, Any], turns: TurnNames) -> list[Segment]:
    file = _file(values, *_IMAGE_KEYS)
    question, answer = _text(values, "question"), _text(values, "answer")
    # The answer brings its own space, so that a question can be asked without one.
    return [Segment(None, file, loss=False), Segment(question, None, loss=False), Segment(f" {answer}", None)]


def _conversation(values: Mapping[str, Any], turns: TurnNames) -> list[Segment]:
    messages = values["messages"]
    if not isinstance(messages, list) or not messages:
        raise BadRow('"messages" is no list of messages, or an empty one')
    prefixes = {"system": "", "user": turns.user, "assistant": turns.assistant}
    segments: list[Segment] = []
    for number, message in enumerate(messages, 1):
        where = f"message {number}"
        role = message.get("role") if isinstance(message, dict) else None
        if role not in prefixes:
            raise BadRow(f"{where}: its role is {role!r}, not one of {', '.join(prefixes)}")
        content = message.get("content")
        content = [{"text": content}] if isinstance(content, str) else content
        if not isinstance(content, list) or not content:
            raise BadRow(f'{where}: "content" is neither a text nor a list of texts and images')
        loss = role == "assistant"
        if prefixes[role]:
            segments.append(Segment(prefixes[role], None, loss=False))
        segments += [
            _segment({name: value for name, value in part.items() if name != "type"} if isinstance(part, dict) else part, where)
            ._replace(loss=loss)
            for part in content
        ]  # fmt: skip
        if number < len(messages):  # the end of a turn is learnt, too; that of the last one is the end of the document
            segments.append(Segment("\n", None, loss=loss))
    if messages[-1]["role"] != "assistant":
        raise BadRow("the last message is not the assistant's: nobody answers it")
    return _joined(segments)


def _plain_text(values: Mapping[str, Any], turns: TurnNames) -> list[Segment]:
    return [Segment(_text(values, "text"), None)]


# The names that captioned images have in this and in other tools.
_IMAGE_KEYS = ("file", "file_name", "image")
_FORMS: dict[str, Callable[[Mapping[str, Any], TurnNames], list[Segment]]] = {
    "segments": _document,
    "messages": _conversation,
    "instruction": _edit,
    "question": _question,
    "caption": _caption,
    **dict.fromkeys(_IMAGE_KEYS, _caption),
    "text": _plain_text,
}
"""The key that tells a form, and what reads it; the first that is there counts."""


def _segment(value: Any, where: str) -> Segment:
    if not isinstance(value, dict):
        raise BadRow(f'{where} is no object such as {{"text": "..."}} or {{"image": "a.png"}}')
    unknown = sorted(set(value) - {"text", "image", "loss"})
    if unknown or ("text" in value) == ("image" in value):
        raise BadRow(f"{where} has the keys {', '.join(value) or 'none'}; it needs text or image, and may have loss")
    loss = value.get("loss", True)
    if not isinstance(loss, bool):
        raise BadRow(f"{where}: loss is {loss!r}, not true or false")
    kind = "text" if "text" in value else "image"
    if not isinstance(value[kind], str) or not value[kind].strip():
        raise BadRow(f"{where}: its {kind} is empty, or no string")
    return Segment(value["text"], None, loss) if kind == "text" else Segment(None, value["image"], loss)


def _text(values: Mapping[str, Any], *keys: str) -> str:
    text = _value(values, keys).strip()
    if not text:
        raise BadRow(f'"{next(key for key in keys if key in values)}" is empty')
    return text


def _file(values: Mapping[str, Any], *keys: str) -> str:
    file = _value(values, keys)
    if not file:
        raise BadRow(f'"{next(key for key in keys if key in values)}" is empty')
    return file


def _value(values: Mapping[str, Any], keys: Sequence[str]) -> str:
    """The string under the first of the keys that is there."""
    for key in keys:
        if key in values:
            if not isinstance(values[key], str):
                raise BadRow(f'"{key}" is {json.dumps(values[key])}, not a string')
            return str(values[key])
    raise BadRow(f'no "{keys[0]}"; the row has the keys {", ".join(values)}')


def _joined(segments: Sequence[Segment]) -> list[Segment]:
    """Texts behind each other become one where both are trained on, or neither is."""
    joined: list[Segment] = []
    for segment in segments:
        last = joined[-1] if joined else None
        if last is not None and last.text is not None and segment.text is not None and last.loss == segment.loss:
            joined[-1] = last._replace(text=last.text + segment.text)
        else:
            joined.append(segment)
    return joined
