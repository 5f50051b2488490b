"""`python main.py plan -c CONFIG ...`: what a run will need, before it is launched.

Configs and overrides are those of `fit`. Nothing is instantiated but the model's modules, on the meta device: no data, weights
or devices need to be there.
"""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

from jsonargparse import ArgumentParser, set_parsing_settings
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from nextflow.planning.plan import Plan, PlanOptions

USAGE = "main.py plan -c CONFIG [-c CONFIG ...] [--json] [--plan.KEY VALUE ...] [--KEY VALUE ...]"
DESCRIPTION = """What `fit` with the same words would need, before it is launched: parameters by part, bytes on each device,
FLOPs of a batch, an optimiser step and a generated image, codes of each scale and aspect ratio. Nothing of the run has to be
there: no data, weights or devices. What only files know is read from them where they are there, else given by --plan.KEY."""
EPILOG = """Every key of the run can be changed as in `fit`: --trainer.devices 4, --data.budget 32768,
--model.transformer.num_layers 2 (`main.py fit --help`; docs/configs.md has more about planning)."""


class _Parser(LightningCLI):
    """Parses what `fit` parses, and the plan's own options; builds nothing."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        _add_options(parser)
        parser.add_argument("--ckpt_path", type=str | None, default=None, help="Accepted, as in `fit`, and not read.")

    def _set_seed(self) -> None:
        """Nothing is drawn."""

    def instantiate_classes(self) -> None:
        """The plan builds what it needs."""


def main(arguments: list[str]) -> None:
    """Parse, compute and print.

    Raises ValueError naming the key where a size is missing.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    if arguments in ([], ["-h"], ["--help"]):
        parser = ArgumentParser(prog="main.py plan", usage=USAGE, description=DESCRIPTION, epilog=EPILOG)
        parser.add_argument(
            "-c", "--config", metavar="CONFIG", help="A config, as in `fit`; of several, later ones win."
        )
        _add_options(parser)
        parser.print_help()
        return
    config = parse(arguments)
    plan = plan_of(config, PlanOptions(**config.plan.as_dict()))
    if config.json:
        print(
            json.dumps(
                {**asdict(plan), "num_parameters": plan.num_parameters, "num_trained": plan.num_trained}, indent=1
            )
        )
    else:
        from nextflow.planning.tables import show

        show(plan)


def _add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="Print the numbers as JSON instead of tables.")
    parser.add_class_arguments(PlanOptions, "plan")


def parse(arguments: list[str]) -> Any:
    """The config that a command line stands for, with the plan's options under `plan`; classes are named, not built."""
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended to run from within Python")
    return _Parser(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_callback=None,
        seed_everything_default=False,
        parser_kwargs={"usage": USAGE, "prog": "main.py plan"},
        args=arguments,
        run=False,
    ).config


def plan_of(config: Any, options: PlanOptions) -> Plan:
    """The plan of a parsed config.

    Raises ValueError for a model that has none.
    """
    from nextflow.lightning_modules.pretraining import PretrainingModule
    from nextflow.lightning_modules.tokenizer import TokenizerModule

    if config.get("model") is None or config.get("data") is None:
        raise ValueError("plan needs a config with `model` and `data`: give one with -c")
    model = _imported(config.model.class_path)
    settings = config.model.get("init_args")
    if issubclass(model, PretrainingModule):
        from nextflow.planning.transformer import plan_transformer

        return plan_transformer(config, options, _callable(settings.optimizer))
    if issubclass(model, TokenizerModule):
        from nextflow.planning.tokenizer import plan_tokenizer

        return plan_tokenizer(
            config, options, _callable(settings.generator_optimizer), _callable(settings.discriminator_optimizer)
        )
    raise ValueError(
        f"model.class_path {config.model.class_path}: plan knows PretrainingModule and TokenizerModule, and what inherits them"
    )


def _callable(value: Any) -> Callable[..., Any]:
    """What an `OptimizerCallable` of a parsed config stands for."""
    if callable(value):
        return value
    options = value.get("init_args")
    return partial(_imported(value.class_path), **(options.as_dict() if options else {}))


def _imported(path: str) -> Any:
    module, name = path.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)
