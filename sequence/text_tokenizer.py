"""Text tokenizer: any Hugging Face tokenizer folder, behind the four things the sequence needs of it.

Ids are the folder's own; special ids are never added by `encode`, the layout puts start and end of a document itself.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

START = "<|startoftext|>"
END = "<|endoftext|>"


class TextTokenizer:
    """Wraps a fast Hugging Face tokenizer. Make it with `load_text_tokenizer` or `TextTokenizer.from_json`.

    Attributes:
        size: number of text ids, including specials and added tokens.
        start_id: begins a document (the tokenizer's bos, else its eos).
        end_id: ends a document (its eos).
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast"):
        self._tokenizer = tokenizer
        # Holes in the ids of added tokens count: an id must be below the size.
        self.size: int = max(tokenizer.get_vocab().values()) + 1
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "the text tokenizer has no end-of-text token: set `eos_token` in its tokenizer_config.json "
                "(`bos_token` too, if a document should begin with another token)"
            )
        self.end_id: int = tokenizer.eos_token_id
        self.start_id: int = self.end_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without specials."""
        return list(self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; start and end tokens are dropped."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def fingerprint(self) -> str:
        """16 hex digits of everything that decides the ids of a text."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """The whole tokenizer as one string, so that it can travel inside a checkpoint."""
        return json.dumps(
            {
                "tokenizer": json.loads(self._tokenizer.backend_tokenizer.to_str()),
                "start": self._tokenizer.bos_token,
                "end": self._tokenizer.eos_token,
            },
            ensure_ascii=False,
            sort_keys=True,
        )

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write it as a Hugging Face tokenizer folder, which `load_text_tokenizer` reads."""
        self._tokenizer.save_pretrained(str(folder))

    @classmethod
    def from_json(cls, text: str) -> "TextTokenizer":
        """Inverse of `to_json`."""
        from tokenizers import Tokenizer
        from transformers import PreTrainedTokenizerFast

        stored: dict[str, Any] = json.loads(text)
        specials = {"bos_token": stored["start"], "eos_token": stored["end"]}
        return cls(
            PreTrainedTokenizerFast(
                tokenizer_object=Tokenizer.from_str(json.dumps(stored["tokenizer"])),
                **{name: token for name, token in specials.items() if token is not None},
            )
        )

    # A tokenizer goes to loader workers as its JSON: the wrapped object is slow and version-dependent to pickle.
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return TextTokenizer.from_json, (self.to_json(),)


def load_text_tokenizer(folder: str | os.PathLike[str]) -> TextTokenizer:
    """Loads a Hugging Face tokenizer folder; never downloads.

    Raises:
        FileNotFoundError: there is no such folder, or it holds no tokenizer.json.
        ValueError: the tokenizer has no end-of-text token.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not (Path(folder) / "tokenizer.json").is_file():
        raise FileNotFoundError(
            f"no tokenizer.json in {folder} (key `text_tokenizer`): name a local Hugging Face tokenizer folder, "
            "such as the text_tokenizer folder that `python -m nextflow.datamodules.openmoji` writes"
        )
    if _tokenizer_class(folder) in ("PreTrainedTokenizerFast", "TokenizersBackend"):  # transformers 4 and 5
        # AutoTokenizer asks for a model config beside it; our own folders and many published ones have none.
        return TextTokenizer(PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True))
    tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, use_fast=True)
    return TextTokenizer(tokenizer)


def train_text_tokenizer(texts: Iterable[str], folder: str | os.PathLike[str], size: int) -> TextTokenizer:
    """Trains a byte-level BPE on the texts and saves it in Hugging Face form. It can encode any text, whatever it saw.

    Args:
        texts: what to train on.
        folder: written: tokenizer.json and tokenizer_config.json.
        size: number of ids at most (a small corpus gives fewer); at least 256 bytes + 2 specials.

    Raises:
        ValueError: size is too small.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if size < len(alphabet) + 2:
        raise ValueError(f"text tokenizer size {size} is too small: bytes and specials alone are {len(alphabet) + 2}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[START, END], initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=START, eos_token=END).save_pretrained(str(folder))
    return load_text_tokenizer(folder)


def _tokenizer_class(folder: str | os.PathLike[str]) -> str:
    path = Path(folder) / "tokenizer_config.json"
    return json.loads(path.read_text()).get("tokenizer_class", "") if path.is_file() else ""
