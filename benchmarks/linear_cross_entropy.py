"""`linear_cross_entropy` against plain cross-entropy on logits: forward and backward, time and peak memory.

    python benchmarks/linear_cross_entropy.py [--tokens 4096] [--vocabulary 168000] [--width 1024] [--rounds 2]

Claims (`kernels/linear_cross_entropy.py`), for one training step of the head: peak memory at least 10 times below plain
cross-entropy, time at most 1.15 times. Sides, each in a process of its own, in turns, the fastest round of each counts:

    plain       cross_entropy((x W^T).float(), target), weighted and summed
    weighted    ours as training calls it: token weights given, gradients made with the loss
    per token   ours as GRPO calls it: gradients from per-token losses, logits made again
    torch       torch.nn.functional.linear_cross_entropy in chunks, without weights, where the installed torch has it

Memory is the peak of resident memory above what was there before the step (x, W and targets), so that it holds the gradients
of x and W, which all sides return; `logits` leaves these out on both sides. Time is of the processor, one thread: other load
on the machine does not count. Afterwards values are compared with Liger's kernel under Triton's interpreter, on a small case,
where liger-kernel is installed. On CUDA (`--device cuda`) times are of the wall clock and memory that of torch's allocator.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.nn import functional as F

SIDES = ("plain", "weighted", "per token", "torch")
DTYPES = ("float32", "bfloat16")


def main() -> None:
    """Run all sides and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=168_000)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="of the matrix products")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--implementation", default="auto")
    parser.add_argument("--side", choices=SIDES, help="run this one alone, in this process, and print JSON")
    parser.add_argument("--values", action="store_true", help="compare values alone")
    options = parser.parse_args()
    if options.side:
        print(json.dumps(step(options.side, options.dtype[0], options)))
        return
    if not options.values:
        options.tokens = affordable(options)
        for dtype in options.dtype:
            table(dtype, options)
    values()


def affordable(options: argparse.Namespace) -> int:
    """Tokens whose plain side fits into the free memory: three float32 copies of the logits, the head and its gradient."""
    if options.device == "cuda":
        return options.tokens
    free = int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024
    head = 3 * 4 * options.vocabulary * options.width
    tokens = options.tokens
    while tokens > 64 and 13 * tokens * options.vocabulary + head > 0.9 * free:
        tokens //= 2
    if tokens < options.tokens:
        print(
            f"{free / 1e9:.1f} GB are free, too little for the plain side: {tokens} tokens instead of {options.tokens}"
        )
    return tokens


def table(dtype: str, options: argparse.Namespace) -> None:
    """All sides in one dtype, in turns."""
    print(f"\n{options.tokens} tokens, {options.vocabulary} entries, width {options.width}, products in {dtype}")
    sides = [side for side in SIDES if side != "torch" or hasattr(torch.nn, "LinearCrossEntropyOptions")]
    rounds: dict[str, list[dict]] = {side: [] for side in sides}
    for _ in range(options.rounds):
        for side in sides:
            rounds[side].append(in_child(side, dtype, options))
    gradients = 4 * (options.vocabulary + options.tokens) * options.width / 1e6
    plain = best(rounds["plain"])
    print(f"{'':10}{'seconds':>9}{'x plain':>9}{'peak MB':>9}{'below':>7}{'logits MB':>11}{'below':>7}{'loss':>12}")
    for side in sides:
        ours = best(rounds[side])
        rest, plain_rest = (max(1.0, value["peak"] - gradients) for value in (ours, plain))
        print(
            f"{side:10}{ours['seconds']:>9.2f}{ours['seconds'] / plain['seconds']:>9.2f}"
            f"{ours['peak']:>9.0f}{plain['peak'] / ours['peak']:>7.1f}"
            f"{rest:>11.0f}{plain_rest / rest:>7.1f}{ours['loss']:>12.3f}"
        )


def best(rounds: list[dict]) -> dict:
    """The smallest of each figure."""
    return {name: min(values[name] for values in rounds) for name in rounds[0]}


def in_child(side: str, dtype: str, options: argparse.Namespace) -> dict:
    """One step in a process of its own, so that each begins with the same memory."""
    arguments = ["--side", side, "--dtype", dtype]
    for name in ("tokens", "vocabulary", "width", "device", "implementation"):
        arguments += [f"--{name}", str(getattr(options, name))]
    result = subprocess.run([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def step(side: str, dtype: str, options: argparse.Namespace) -> dict:
    """Forward and backward of one side: seconds, peak memory in MB, mean loss."""
    from nextflow.kernels.linear_cross_entropy import linear_cross_entropy

    device = options.device
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.randn(options.tokens, options.width, device=device).requires_grad_()
    head = torch.empty(options.vocabulary, options.width, device=device).normal_(std=0.02).requires_grad_()
    target = torch.randint(0, options.vocabulary, (options.tokens,), device=device)
    weight = torch.rand(options.tokens, device=device)
    autocast = torch.autocast(device, torch.bfloat16) if dtype == "bfloat16" else nullcontext()

    def run(tokens: int) -> torch.Tensor:
        rows, targets, weights = x[:tokens], target[:tokens], weight[:tokens]
        with autocast:
            if side == "plain":
                loss = (F.cross_entropy((rows @ head.t()).float(), targets, reduction="none") * weights).sum()
            elif side == "torch":
                chunks = torch.nn.LinearCrossEntropyOptions()
                loss = F.linear_cross_entropy(rows, head, targets, reduction="sum", options=chunks)
            elif side == "weighted":
                name = options.implementation
                loss = linear_cross_entropy(rows, head, targets, -100, weights, implementation=name).total
            else:
                loss = (
                    linear_cross_entropy(rows, head, targets, implementation=options.implementation).loss_N * weights
                ).sum()
        loss.backward()
        return loss.detach()

    if device == "cuda":
        run(options.tokens)  # compiles
    else:
        warm_up()
    x.grad = head.grad = None
    memory = Memory(device)
    since = clock(device)
    loss = run(options.tokens)
    return {"seconds": clock(device) - since, "peak": memory.peak(), "loss": float(loss) / options.tokens}


def warm_up() -> None:
    """Load the libraries of matrix products; what they allocate once is nobody's."""
    for dtype in (torch.float32, torch.bfloat16):
        torch.mm(torch.ones(64, 64, dtype=dtype), torch.ones(64, 64, dtype=dtype))


def clock(device: str) -> float:
    """Seconds of the processor, or of the wall clock on CUDA."""
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


class Memory:
    """Peak above what is in use now, in MB; on a CPU by Linux's accounts of resident memory."""

    def __init__(self, device: str) -> None:
        self.device = device
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            # Begins a new peak: that of drawing x and W was higher than what is in use now.
            Path("/proc/self/clear_refs").write_text("5")
            self.before = resident("VmRSS")

    def peak(self) -> float:
        """Since this object was made."""
        return ((torch.cuda.max_memory_allocated() if self.device == "cuda" else resident("VmHWM")) - self.before) / 1e6


def resident(name: str) -> int:
    """A line of this process's status, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) * 1024


def values() -> None:
    """Losses and gradients of a small case: ours in both implementations, Liger's and plain, under Triton's interpreter."""
    if importlib.util.find_spec("triton") is None or importlib.util.find_spec("liger_kernel") is None:
        print("\nliger-kernel is not installed: values not compared (pip install liger-kernel)")
        return
    if os.environ.get("TRITON_INTERPRET") != "1":
        # Triton reads it when kernels are defined.
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        subprocess.run([sys.executable, __file__, "--values"], env=environment, check=True)
        return
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    from nextflow.kernels.linear_cross_entropy import linear_cross_entropy

    torch.manual_seed(0)
    inputs = torch.randn(61, 48), torch.randn(1003, 48)
    target = torch.randint(0, 1003, (61,))
    sides = {
        "plain": lambda x, head: F.cross_entropy(x @ head.t(), target, reduction="sum"),
        "ours, chunked": lambda x, head: linear_cross_entropy(x, head, target, implementation="chunked").total,
        "ours, triton": lambda x, head: linear_cross_entropy(x, head, target, implementation="triton").total,
        "Liger's": lambda x, head: LigerFusedLinearCrossEntropyLoss(reduction="sum")(head, x, target),
    }
    results = {}
    for name, loss_of in sides.items():
        copies = [value.clone().requires_grad_() for value in inputs]
        loss = loss_of(*copies)
        loss.backward()
        results[name] = [loss.detach(), *(value.grad for value in copies)]
    print("\n61 tokens, 1003 entries, width 48, under Triton's interpreter: largest difference to plain, relative")
    print(f"{'':14}{'loss':>10}{'x':>10}{'W':>10}")
    for name, result in results.items():
        differences = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(result, results["plain"])]
        print(f"{name:14}" + "".join(f"{value:>10.1e}" for value in differences))


if __name__ == "__main__":
    main()
