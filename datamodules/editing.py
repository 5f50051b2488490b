"""Edits: source images and an instruction, then the result (NextFlow figure 5). Sources are read, the result is learnt."""

from dataclasses import dataclass

from nextflow.datamodules.arrangements import Arrangement, SourceThenResult
from nextflow.datamodules.packed import PackedDataModule


@dataclass(kw_only=True, eq=False, repr=False)
class EditingDataModule(PackedDataModule):
    """Source, instruction -> result, packed, from document or token shards."""

    source_loss: bool = False
    """Whether the codes of source images are trained on; the paper does not say."""
    text_loss: bool = True
    """Whether instructions are trained on; false for supervised fine-tuning, which trains on responses alone."""
    instruction_dropout: float = 0.1
    """Fraction of documents that lose their instruction in training, for guidance."""

    def arrange(self) -> dict[str, Arrangement]:
        return {
            "": SourceThenResult(
                source_loss=self.source_loss, text_loss=self.text_loss, instruction_dropout=self.instruction_dropout
            )
        }
