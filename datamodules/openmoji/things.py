"""Drawings that can be named with an article, counted and placed: the things of composed scenes.

OpenMoji's names are not all nouns that one can count ("three spaghetti", "two surfing"), so the list is written by hand.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from nextflow.datamodules.openmoji.catalogue import Drawing

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "brown", "black", "white")

# Names of the package `emoji`, by the word for their kind.
_NAMES = {
    "animal": "rat ox cow tiger leopard rabbit cat crocodile whale snail snake horse ram goat monkey "
    "rooster dog pig boar elephant octopus bug ant honeybee lady_beetle fish blowfish turtle hatching_chick "
    "baby_chick bird penguin koala poodle camel dolphin frog hamster wolf bear panda chipmunk dove "
    "spider crab lion scorpion turkey unicorn eagle duck bat shark owl fox butterfly deer gorilla lizard rhinoceros shrimp "
    "squid giraffe zebra hedgehog cricket kangaroo llama peacock hippopotamus parrot raccoon lobster mosquito badger swan "
    "mammoth sloth otter orangutan skunk flamingo beaver bison seal fly worm beetle jellyfish goose moose donkey",
    "plant": "seedling evergreen_tree deciduous_tree palm_tree cactus tulip rose sunflower mushroom potted_plant",
    "food": "taco chestnut tomato eggplant melon tangerine lemon banana pineapple red_apple green_apple pear peach strawberry "
    "hamburger pizza doughnut cookie lollipop birthday_cake croissant avocado cucumber potato carrot egg pretzel sandwich "
    "mango bagel cupcake onion waffle bell_pepper olive coconut pie hot_dog",
    "vehicle": "rocket helicopter locomotive tram bus minibus ambulance fire_engine police_car taxi automobile tractor "
    "delivery_truck speedboat bicycle motor_scooter canoe flying_saucer skateboard pickup_truck airplane motorcycle racing_car "
    "sailboat",
    "object": "crown necktie t-shirt dress handbag ring light_bulb bomb laptop scroll camera television radio candle key "
    "umbrella chair bed door window hammer wrench magnet bell balloon guitar trumpet violin drum basketball volleyball "
    "soccer_ball trophy kite anchor gear envelope pencil watch bucket broom basket ladder mirror toothbrush backpack "
    "teddy_bear megaphone wrapped_gift microphone scarf coat house hut castle tent",
}
_SHAPES = {
    "circle": {colour: f"{colour}_circle" for colour in COLOURS},
    "square": {colour: f"{colour}_square" for colour in COLOURS[:7]}
    | {"black": "black_large_square", "white": "white_large_square"},
    "heart": {colour: f"{colour}_heart" for colour in COLOURS} | {"pink": "pink_heart", "grey": "grey_heart"},
    "book": {colour: f"{colour}_book" for colour in ("green", "blue", "orange")} | {"red": "closed_book"},
    "apple": {"red": "red_apple", "green": "green_apple"},
}


@dataclass(frozen=True, kw_only=True)
class Thing:
    """A drawing and the words for it."""

    drawing: Drawing
    noun: str
    """What it is called: cat, red circle."""
    kind: str
    """animal, plant, food, vehicle, object or shape."""
    colour: str = ""
    """Where its colour is part of its name."""

    @property
    def plain_noun(self) -> str:
        """The noun without its colour: circle."""
        return self.noun.removeprefix(f"{self.colour} ")


def things_of(drawings: Sequence[Drawing]) -> list[Thing]:
    """The things among some drawings, in a fixed order."""
    by_name = {drawing.name: drawing for drawing in drawings}
    coloured = {
        name: Thing(
            drawing=by_name[name],
            noun=f"{colour} {noun}",
            kind={"apple": "food", "book": "object"}.get(noun, "shape"),
            colour=colour,
        )
        for noun, names in _SHAPES.items()
        for colour, name in names.items()
        if name in by_name
    }
    plain = [
        Thing(drawing=by_name[name], noun=name.replace("_", " "), kind=kind)
        for kind, names in _NAMES.items()
        for name in names.split()
        if name in by_name and name not in coloured
    ]
    return plain + list(coloured.values())
