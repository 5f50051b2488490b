"""The whole pipeline on a CPU, stage by stage: `make quickstart` or `python quickstart.py`.

Every stage is one plain command, printed before it runs. Finished stages are skipped, an interrupted training goes on
from its last checkpoint, and a stage whose config (or whose input) changed runs again, its old result kept beside it
as NAME.previous. `RUN/timing.json` holds the seconds each stage took, those before an
interruption included.
"""

import argparse
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

ROOT = Path(__file__).resolve().parent
DEFAULT_RUN = "runs/quickstart"
"""The run folder that the configs name; for another one they are copied with this replaced."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of the pipeline: one command, or one per entry of `arguments`."""

    name: str
    """Also the key in timing.json and the name that `needs` and --only refer to."""
    title: str
    """What it does, for the reader of the terminal."""
    kind: Literal["fit", "validate", "test", "predict", "module"]
    """A subcommand of main.py, or `module`: `python -m MODULE --config CONFIG`."""
    config: str | None
    """File in the config folder; None for a module that is steered by `arguments` alone."""
    minutes: float
    """Expected time on two CPU cores."""
    needs: tuple[str, ...] = ()
    """Stages whose results it reads: it runs again when one of them did."""
    module: str = ""
    """Import path, for kind `module`."""
    arguments: tuple[tuple[str, ...], ...] = ((),)
    """Further arguments, one command per entry; RUN stands for the run folder."""
    shows: str = ""
    """What to look at, relative to the run folder, where that is not the stage's own folder RUN/NAME."""


STAGES = (
    Stage(
        name="data",
        title="draw the OpenMoji data set, write its shards, train the text tokenizer",
        kind="module",
        module="nextflow.datamodules.openmoji",
        config="1_data.yaml",
        minutes=0.1,
    ),
    Stage(
        name="contrastive",
        title="pre-train the semantic encoder on images and captions",
        kind="fit",
        config="2_contrastive.yaml",
        minutes=1.0,
        needs=("data",),
    ),
    Stage(
        name="tokenizer_pixel",
        title="tokenizer, stage 1: the pixel branch alone",
        kind="fit",
        config="3_tokenizer_pixel.yaml",
        minutes=1.7,
        needs=("data",),
    ),
    Stage(
        name="tokenizer_joint",
        title="tokenizer, stage 2: both branches and the dual codebook",
        kind="fit",
        config="4_tokenizer_joint.yaml",
        minutes=1.3,
        needs=("data", "contrastive", "tokenizer_pixel"),
    ),
    Stage(
        name="tokenizer_decoder",
        title="tokenizer, stage 3: a pixel decoder of twice the capacity, alone",
        kind="fit",
        config="5_tokenizer_decoder.yaml",
        minutes=0.9,
        needs=("data", "tokenizer_joint"),
    ),
    Stage(
        name="codes",
        title="turn the images into token shards, and write the reconstructions",
        kind="predict",
        config="6_codes.yaml",
        minutes=0.3,
        needs=("data", "tokenizer_decoder"),
    ),
    Stage(
        name="transformer",
        title="pre-train the transformer on text and images, through its resolution curriculum",
        kind="fit",
        config="7_transformer.yaml",
        minutes=4.2,
        needs=("data", "codes"),
    ),
    Stage(
        name="generate",
        title="draw images from captions",
        kind="predict",
        config="8_generate.yaml",
        minutes=0.4,
        needs=("data", "transformer"),
    ),
    Stage(
        name="caption",
        title="describe images in words",
        kind="predict",
        config="9_caption.yaml",
        minutes=0.3,
        needs=("data", "transformer"),
    ),
    Stage(
        name="evaluate",
        title="measure the results and write the summary and its picture",
        kind="module",
        module="nextflow.evaluation.summary",
        config=None,
        arguments=(("--run", "RUN"),),
        minutes=0.1,
        needs=("codes", "generate", "caption"),
        shows="results.png",
    ),
)


class StageError(Exception):
    """A stage that failed or cannot start; the message says which one and how to go on."""


def run_stages(
    stages: Sequence[Stage], *, config_dir: Path, run: Path, only: str | None = None, force: bool = False
) -> None:
    """Run the stages in order, skipping finished ones; `only` (a name or a number from 1) picks one of them.

    Raises:
        StageError: when a stage fails, or `only` names a stage that does not exist or whose inputs are not there.
    """
    pipeline = _Pipeline(stages, config_dir=config_dir, run=run)
    selected = list(stages) if only is None else [_find(stages, only)]
    print(
        f"{len(stages)} stages, about {sum(stage.minutes for stage in stages):.0f} minutes on two CPU cores, in {run}/"
    )
    for stage in selected:
        pipeline.run_stage(stage, force=force)
    print(f"\ndone: {_duration(sum(pipeline.timing.values()))} in all. Result: {_where(run, selected[-1])}")


class _Pipeline:
    """Decides which stages run, runs them and keeps the markers. Paths are relative to ROOT where they lie in it."""

    def __init__(self, stages: Sequence[Stage], *, config_dir: Path, run: Path) -> None:
        self.stages = {stage.name: stage for stage in stages}
        self.run = run
        (ROOT / run).mkdir(parents=True, exist_ok=True)
        self.config_dir = config_dir if run == Path(DEFAULT_RUN) else self._redirected(config_dir)
        self.timing: dict[str, float] = _read_json(ROOT / run / "timing.json")

    def run_stage(self, stage: Stage, *, force: bool) -> None:
        """Skip, resume or start one stage."""
        label = f"{list(self.stages).index(stage.name) + 1}/{len(self.stages)} {stage.name}"
        fingerprint = self._fingerprint(stage)
        result = ROOT / self.run / stage.name
        done, started = result / "done.json", ROOT / self.run / "stages" / f"{stage.name}.json"
        reason = "--force" if force else _difference(_read_json(done), fingerprint) if done.exists() else ""
        if done.exists() and not reason:
            print(
                f"\n== {label}: done already in {_duration(self.timing.get(stage.name, 0.0))} ({_where(self.run, stage)})"
            )
            return
        checkpoint = result / "last.ckpt"
        interrupted = not done.exists() and started.exists() and not _difference(_read_json(started), fingerprint)
        resume = stage.kind == "fit" and interrupted and checkpoint.exists() and not force
        print(f"\n== {label}: {stage.title} (about {stage.minutes:g} min)")
        if resume:
            print("   goes on from its last checkpoint")
        elif result.exists() and any(result.iterdir()):
            reason = reason or ("it was interrupted" if interrupted else "it did not finish with this config")
            print(f"   runs from the beginning ({reason}); the old result is kept in {self.run / stage.name}.previous/")
            shutil.rmtree(result.with_name(result.name + ".previous"), ignore_errors=True)
            result.rename(result.with_name(result.name + ".previous"))
        if not resume:
            self.timing.pop(stage.name, None)
        _write_json(started, fingerprint)
        for arguments in stage.arguments:
            command = self._command(stage, arguments)
            if resume:
                command += ["--ckpt_path", str(self.run / stage.name / "last.ckpt")]
            self._execute(stage, label, command)
        result.mkdir(parents=True, exist_ok=True)
        _write_json(done, {**fingerprint, "finished": time.strftime("%Y-%m-%dT%H:%M:%S"), "run_id": time.time_ns()})

    def _command(self, stage: Stage, arguments: Sequence[str]) -> list[str]:
        if stage.kind == "module":
            command = [sys.executable, "-m", stage.module]
            command += [] if stage.config is None else ["--config", str(self.config_dir / stage.config)]
        else:
            command = [sys.executable, "main.py", stage.kind, "-c", str(self.config_dir / str(stage.config))]
        return command + [argument.replace("RUN", str(self.run)) for argument in arguments]

    def _execute(self, stage: Stage, label: str, command: Sequence[str]) -> None:
        shown = shlex.join([_shorten(command[0]), *command[1:]])
        print(f"   command: {shown}\n   result:  {_where(self.run, stage)}", flush=True)
        before = time.monotonic()
        try:
            code = _call(command)
        finally:
            self.timing[stage.name] = self.timing.get(stage.name, 0.0) + time.monotonic() - before
            _write_json(ROOT / self.run / "timing.json", self.timing)
        if code:
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            raise StageError(
                f"stage {label} {how}; its own messages stand above. Run it alone with\n  {shown}\n"
                "or start the quickstart again: finished stages are skipped."
            )

    def _fingerprint(self, stage: Stage) -> dict[str, Any]:
        """What the result depends on: the config's content (comments may change), the arguments and the inputs."""
        config = None
        if stage.config is not None:
            path = ROOT / self.config_dir / stage.config
            if not path.exists():
                raise StageError(f"stage {stage.name} has no config {self.config_dir / stage.config}: see --config-dir")
            config = yaml.safe_load(path.read_text())
        content = {"config": config, "kind": stage.kind, "module": stage.module, "arguments": stage.arguments}
        inputs = {}
        for name in stage.needs:
            done = ROOT / self.run / name / "done.json"
            if not done.exists():
                raise StageError(f"stage {stage.name} needs the result of stage {name}: run that first (--only {name})")
            inputs[name] = hashlib.sha256(done.read_bytes()).hexdigest()[:16]
        return {"config": hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()[:16], "inputs": inputs}

    def _redirected(self, config_dir: Path) -> Path:
        """Copy the configs into the run folder, with the run folder that they name replaced by this one."""
        target = self.run / "configs"
        shutil.rmtree(ROOT / target, ignore_errors=True)
        shutil.copytree(ROOT / config_dir, ROOT / target)
        for path in (ROOT / target).rglob("*.yaml"):
            path.write_text(path.read_text().replace(DEFAULT_RUN, str(self.run)))
        return target


def _call(command: Sequence[str]) -> int:
    # PYTHONSAFEPATH: `python -m` in this folder would put our `kernels` before Hugging Face's package of that name.
    quiet = {
        "PYTHONSAFEPATH": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "HF_HUB_OFFLINE": "1",
    }
    child = subprocess.Popen(command, cwd=ROOT, env={**quiet, **os.environ})
    stopped: list[int] = []

    def pass_on(number: int, _: object) -> None:
        stopped.append(number)
        child.terminate()

    handler = signal.signal(signal.SIGTERM, pass_on)
    try:
        code = child.wait()
        return code if code or not stopped else -stopped[0]  # Lightning ends on SIGTERM with exit code 0
    except KeyboardInterrupt:  # the terminal interrupted the child as well: let it finish writing its checkpoint
        child.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, handler)


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Why an old fingerprint no longer holds; empty when it does."""
    if old.get("config") != new["config"]:
        return "its config changed"
    changed = [name for name, marker in new["inputs"].items() if old.get("inputs", {}).get(name) != marker]
    return f"stage {', '.join(changed)} ran again" if changed else ""


def _find(stages: Sequence[Stage], only: str) -> Stage:
    for number, stage in enumerate(stages, start=1):
        if only in (stage.name, str(number)):
            return stage
    raise StageError(f"--only {only}: choose 1 to {len(stages)} or one of {', '.join(s.name for s in stages)}")


def _where(run: Path, stage: Stage) -> str:
    return str(run / stage.shows) if stage.shows else f"{run / stage.name}/"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 60 else f"{seconds / 60:.1f} min"


def _shorten(path: str | Path) -> str:
    """Relative to ROOT where the path lies in it, as the commands run there; absolute otherwise."""
    absolute = Path(path).absolute()
    return str(absolute.relative_to(ROOT)) if absolute.is_relative_to(ROOT) else str(absolute)


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=2) + "\n")
    part.replace(path)  # an interruption leaves the old file or the new one, never half of one


def main(arguments: Sequence[str] | None = None, stages: Sequence[Stage] = STAGES) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-dir", default=ROOT / "configs" / "quickstart", help="folder of the stages' configs")
    parser.add_argument("--run", default=ROOT / DEFAULT_RUN, help="folder for everything that is made")
    parser.add_argument("--only", metavar="N", help="run this stage alone: its number or its name")
    parser.add_argument("--force", action="store_true", help="run finished stages again")
    options = parser.parse_args(arguments)
    config_dir, run = Path(_shorten(options.config_dir)), Path(_shorten(options.run))
    try:
        run_stages(stages, config_dir=config_dir, run=run, only=options.only, force=options.force)
    except StageError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted: start the quickstart again to go on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
