"""`python main.py export -c CONFIG --ckpt_path CHECKPOINT --output FOLDER`: a checkpoint as a folder for `NextFlowPipeline`.

The config is one of `predict` or `fit`: it names the image tokenizer, which checkpoints of the transformer know by its
fingerprint alone, and how to draw by default.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, set_parsing_settings
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

USAGE = (
    "main.py export -c CONFIG [-c CONFIG ...] --ckpt_path CHECKPOINT --output FOLDER [--weights ema] [--KEY VALUE ...]"
)
DESCRIPTION = """Writes everything that generation needs (architecture, schedule, layout, both tokenizers, weights as
safetensors, a model card) to a folder that `NextFlowPipeline.from_pretrained` loads without lightning."""


class _Parser(LightningCLI):
    """Parses what `predict` parses, and where to write; builds nothing."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        _add_options(parser)

    def _set_seed(self) -> None:
        """Nothing is drawn."""

    def instantiate_classes(self) -> None:
        """The checkpoint says what to build."""


def _add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--ckpt_path", type=str | None, default=None, help="File or folder that `fit` saved.")
    parser.add_argument("--output", type=str | None, default=None, help="Folder to write to.")
    parser.add_argument("--weights", type=str, default="trained", help="'trained', or 'ema' for their average.")


def main(arguments: list[str]) -> None:
    """Parse and write.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: an option is missing, or the config's tokenizer is not the checkpoint's.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    if arguments in ([], ["-h"], ["--help"]):
        parser = ArgumentParser(prog="main.py export", usage=USAGE, description=DESCRIPTION)
        parser.add_argument("-c", "--config", metavar="CONFIG", help="A config of `predict` or `fit`.")
        _add_options(parser)
        parser.print_help()
        return
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended to run from within Python")
    config: Any = _Parser(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_callback=None,
        seed_everything_default=False,
        parser_kwargs={"usage": USAGE, "prog": "main.py export"},
        args=arguments,
        run=False,
    ).config
    for name in ("ckpt_path", "output"):
        if not config.get(name):
            raise ValueError(f"export needs --{name}")
    model = config.model.get("init_args")
    folder = export(
        config.ckpt_path,
        config.output,
        tokenizer=model.tokenizer,
        weights=config.weights,
        sampling=model.get("sampling"),
        guidance=model.get("guidance", 0.0),
    )
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(
        f"{folder}: {size / 2**20:.1f} MiB. NextFlowPipeline.from_pretrained({str(folder)!r}) loads it.",
        file=sys.stderr,
    )


def export(
    checkpoint: str | Path,
    output: str | Path,
    *,
    tokenizer: str | Path,
    weights: Any = "trained",
    sampling: Any = None,
    guidance: float = 0.0,
) -> Path:
    """Write the folder.

    Args:
        checkpoint: file or folder that Lightning saved, on any number of processes.
        output: folder to write.
        tokenizer: checkpoint of the TokenizerModule that the transformer was trained with.
        weights: "trained" or "ema".
        sampling: a SamplingConfig, or its fields; the pipeline's default.
        guidance: the pipeline's default.

    Raises ValueError when the tokenizer is another one than the checkpoint's.
    """
    from nextflow.generation.pipeline import NextFlowPipeline
    from nextflow.generation.sampling import SamplingConfig
    from nextflow.lightning_modules.tokenizer_checkpoint import load_tokenizer
    from nextflow.lightning_modules.transformer_checkpoint import load_transformer

    loaded = load_transformer(checkpoint, "ckpt_path", weights)
    image_tokenizer = load_tokenizer(tokenizer, "model.tokenizer")
    if image_tokenizer.fingerprint() != loaded.tokenizer_fingerprint:
        raise ValueError(
            f"the checkpoint was trained with tokenizer {loaded.tokenizer_fingerprint}, but model.tokenizer ({tokenizer}) is "
            f"{image_tokenizer.fingerprint()}: name the tokenizer it was trained with"
        )
    if not isinstance(sampling, SamplingConfig):
        sampling = SamplingConfig(**vars(sampling)) if sampling is not None else SamplingConfig()
    NextFlowPipeline(
        transformer=loaded.transformer,
        tokenizer=image_tokenizer,
        text_tokenizer=loaded.text_tokenizer,
        layout=loaded.layout,
        sampling=sampling,
        guidance=guidance,
        levels=loaded.levels,
    ).save_pretrained(output)
    return Path(output)
