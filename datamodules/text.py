"""Text documents: the texts of each document, trained on from the first id to the end."""

from dataclasses import dataclass

from nextflow.datamodules.arrangements import Arrangement, TextOnly
from nextflow.datamodules.packed import PackedDataModule


@dataclass(kw_only=True, eq=False, repr=False)
class TextDataModule(PackedDataModule):
    """Text, packed, from document or token shards. Images are left out, longer texts than `max_length` are cut."""

    def arrange(self) -> dict[str, Arrangement]:
        return {"": TextOnly()}
