"""What `main.py --help` costs beside a bare LightningCLI's, both measured in this run.

    python benchmarks/help_time.py [--repeats 5]

Interleaved processes, best of the repeats on each side (imports dominate, and other load only ever adds). The claim that
tests and documentation make: at most 1.3 times the bare one, for `--help` and for `fit --help`.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BARE = """
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
LightningCLI(LightningModule, LightningDataModule, subclass_mode_model=True, subclass_mode_data=True)
"""
LIMIT = 1.3


def seconds(command: list[str]) -> float:
    """Wall time of one process."""
    started = time.perf_counter()
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - started


def main() -> int:
    """Print the table; the exit code is 1 where the limit is passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    print(f"{'arguments':<12}{'bare (s)':>10}{'main.py (s)':>13}{'ratio':>8}")
    worst = 0.0
    for arguments in (["--help"], ["fit", "--help"]):
        bare, ours = [sys.executable, "-c", BARE, *arguments], [sys.executable, "main.py", *arguments]
        pairs = [(seconds(bare), seconds(ours)) for _ in range(repeats + 1)][1:]  # the first fills the disk cache
        best_bare, best_ours = (min(side) for side in zip(*pairs))
        worst = max(worst, best_ours / best_bare)
        print(f"{' '.join(arguments):<12}{best_bare:>10.2f}{best_ours:>13.2f}{best_ours / best_bare:>8.2f}")
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
