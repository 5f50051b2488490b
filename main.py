"""The command line, installed as `nextflow`: `python main.py fit | validate | test | predict | plan | export -c CONFIG ...`,
and `python main.py doctor RUN_FOLDER ...`.

It holds no model code: configs name everything by its import path. `docs/configs.md` explains how they compose.
"""

import os
import sys
import warnings
from importlib import import_module
from pathlib import Path
from traceback import walk_tb
from typing import Any

if __name__ == "__main__":
    # `python main.py` puts this folder on sys.path, where our `kernels` would shadow Hugging Face's package of that name.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

from jsonargparse import set_parsing_settings
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import ArgsType, LightningCLI

DESCRIPTION = "Trains and runs NextFlow: python main.py fit -c configs/quickstart/7_transformer.yaml"
USAGE = "%(prog)s -c CONFIG [-c CONFIG ...] [--KEY VALUE ...]"  # Lightning's own fills a screen above every error
MODELS = (
    "contrastive.ContrastiveModule",
    "tokenizer.TokenizerModule",
    "pretraining.PretrainingModule",
    "grpo.GRPOModule",
    "evaluating.EvaluationModule",
)
DATA = (
    "text.TextDataModule",
    "text_to_image.TextToImageDataModule",
    "image_to_text.ImageToTextDataModule",
    "editing.EditingDataModule",
    "interleaved.InterleavedDataModule",
    "mixture.MixtureDataModule",
    "images.ImageDataModule",
    "image_folder.ImageFolderDataModule",
    "prompts.PromptDataModule",
    "suite.SuiteDataModule",
)
CLASSES = f"""Models (--model) of nextflow.lightning_modules: {", ".join(MODELS)}. Data (--data) of nextflow.datamodules:
{", ".join(DATA)}. Their options: --model.help CLASS, --data.help CLASS, such as --data.help nextflow.datamodules.{DATA[0]}.
docs/configs.md says how configs compose."""
# Options are given in full: a misspelt one would otherwise be taken for what it begins.
OPTIONS = {"usage": USAGE, "epilog": CLASSES, "allow_abbrev": False}
MORE = {
    "plan": "nextflow.planning.command",
    "export": "nextflow.lightning_modules.export",
    "doctor": "nextflow.diagnosis.command",
}
EPILOG = """Further subcommands, each with its own --help: plan (what a run will need, before it is launched), export (a
folder that NextFlowPipeline loads), doctor (what looks wrong with a run). README.md and docs/ lead from here."""


class NextFlowCLI(LightningCLI):
    """LightningCLI whose config alone decides the hyper-parameters and which explains a missing checkpoint."""

    def _parse_ckpt_path(self) -> None:
        # Lightning would let the checkpoint's hyper-parameters replace those of the config and of the command line here.
        subcommand = self.config.get("subcommand")
        path = str((self.config[subcommand].get("ckpt_path") if subcommand else None) or "")
        if not path or "://" in path or Path(path).exists() or (subcommand == "fit" and path in ("last", "hpc")):
            return
        hint = "`fit` writes last.ckpt into the logger's folder, or into the `dirpath` of LastCheckpoint"
        hint += "; `--ckpt_path last` resumes if there is one, else starts anew" if subcommand == "fit" else ""
        raise FileNotFoundError(f"--ckpt_path: there is no checkpoint {path!r}. {hint}.")


def cli(args: ArgsType = None, run: bool = True) -> NextFlowCLI:
    """Parse a command line (default `sys.argv`) and, with `run`, execute it."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)  # --help shows the literal under each field
    # Advice that slows runs on few cores down, and a deprecation inside Lightning.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*|.*isinstance.treespec, LeafSpec.*")
    parsers: dict[str, Any] = dict.fromkeys(LightningCLI.subcommands(), OPTIONS)
    parsers |= {"description": DESCRIPTION, "epilog": EPILOG, "allow_abbrev": False}
    return NextFlowCLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_kwargs={"overwrite": True},
        parser_kwargs=parsers if run else None,
        args=args,
        run=run,
    )


def main(args: ArgsType = None) -> None:
    """Entry point. A mistake of the user ends with one line; NEXTFLOW_TRACEBACK=1 shows where it was found."""
    words = sys.argv[1:] if args is None else args
    try:
        if isinstance(words, list) and words and words[0] in MORE:
            import_module(MORE[words[0]]).main(words[1:])
        else:
            cli(args)
    except (ValueError, FileNotFoundError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # jsonargparse wraps what a constructor raises
            cause = cause.__cause__
        *_, (frame, _) = walk_tb(cause.__traceback__)
        module = str(frame.f_globals.get("__name__"))
        ours = isinstance(cause, FileNotFoundError) or module.split(".")[0] in ("nextflow", "__main__")
        if not ours or os.environ.get("NEXTFLOW_TRACEBACK") == "1":
            raise
        sys.exit(f"error: {cause}\n(NEXTFLOW_TRACEBACK=1 shows the traceback)")


if __name__ == "__main__":
    main()
