"""Memory of beginning with a Qwen2.5-VL folder of several safetensors files, on two processes.

    python benchmarks/qwen_load.py

A folder with random weights of Qwen2.5-VL's names, in files of up to 20 MB, is read by two processes (gloo), in two ways:

    sharded     as a run under FSDP2 begins: built on the meta device, sharded, drawn and read by rows
    whole       each process builds the model, loads all files and copies them

Peak: the highest resident memory from before the model is built to when it is filled, less what was resident before. Pages of
mapped files count while they are mapped.

Claim: a process never holds the model twice; the peak stays below the size of the model, near the process' half.
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from nextflow.models.transformer.config import TransformerConfig

WAYS = ("sharded", "whole")
FILE_BYTES = 20_000_000
TEXT_SIZE = 16_384
CONFIG = TransformerConfig(
    text_size=TEXT_SIZE, codebook_size=1024, code_dim=40, start_id=0, end_id=1, width=512, num_layers=8, num_heads=8,
    num_kv_heads=2, head_dim=64, mlp_width=2048, rope_sections=(8, 12, 12), max_scales=18,
)  # fmt: skip


def write(folder: Path) -> int:
    """The folder; returns its bytes."""
    width, mlp, kv = CONFIG.width, CONFIG.mlp_width, CONFIG.num_kv_heads * CONFIG.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (TEXT_SIZE, width)}
    for layer in range(CONFIG.num_layers):
        start = f"model.layers.{layer}."
        for name, rows in (("q", width), ("k", kv), ("v", kv)):
            shapes[f"{start}self_attn.{name}_proj.weight"] = (rows, width)
            shapes[f"{start}self_attn.{name}_proj.bias"] = (rows,)
        shapes[f"{start}self_attn.o_proj.weight"] = (width, width)
        shapes[f"{start}mlp.gate_proj.weight"] = shapes[f"{start}mlp.up_proj.weight"] = (mlp, width)
        shapes[f"{start}mlp.down_proj.weight"] = (width, mlp)
        shapes[f"{start}input_layernorm.weight"] = shapes[f"{start}post_attention_layernorm.weight"] = (width,)
    shapes |= {"model.norm.weight": (width,), "lm_head.weight": (TEXT_SIZE, width)}
    files: list[dict[str, torch.Tensor]] = [{}]
    for name, shape in shapes.items():
        tensor = torch.randn(shape)
        if sum(held.nbytes for held in files[-1].values()) + tensor.nbytes > FILE_BYTES:
            files.append({})
        files[-1][name] = tensor
    for number, held in enumerate(files, start=1):
        save_file(held, folder / f"model-{number:05}-of-{len(files):05}.safetensors")
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def memory(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def load(folder: Path, way: str) -> None:
    """One process of two: prints the bytes of its parameters and its peak."""
    from torch.distributed import barrier, destroy_process_group, init_process_group
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    from nextflow.lightning_modules.transformer_checkpoint import initialize
    from nextflow.models.transformer.model import Transformer
    from nextflow.models.transformer.state_dict import from_qwen2_5_vl

    init_process_group("gloo")
    barrier()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    if way == "sharded":
        with torch.device("meta"):
            model = Transformer(CONFIG)
        for unit in (*model.blocks, model.head, model):
            fully_shard(unit)
        model.to_empty(device="cpu")
        model.init_weights(0)
        initialize(model, folder, "none")
    else:
        model = Transformer(CONFIG, 0)
        theirs = {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}
        model.load_state_dict(from_qwen2_5_vl(theirs, model.state_dict(), CONFIG))
    peak = memory("VmHWM") - before
    values = [value.to_local() if isinstance(value, DTensor) else value for value in model.parameters()]
    print(sum(value.nbytes for value in values), peak)
    barrier()
    destroy_process_group()


def on_two_processes(folder: Path, way: str) -> list[list[int]]:
    """What both processes print. Raises RuntimeError where one fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, __file__, "--folder", str(folder), "--way", way]
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo", "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(command, env={**os.environ, **where, "RANK": rank}, stdout=subprocess.PIPE, text=True)
        for rank in "01"
    ]
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError(f"loading {way} failed")
    return [[int(word) for word in output.split()] for output in outputs]


def main() -> int:
    """Print the table; the exit code is 1 where the claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way is not None:
        load(arguments.folder, arguments.way)
        return 0
    whole, worst = 0, 0.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write(folder)
        print(f"folder: {size / 1e6:.0f} MB in {len(list(folder.iterdir()))} files")
        print(f"{'way':<10}{'process':<9}{'parameters (MB)':>17}{'peak (MB)':>11}{'of the model':>14}")
        for way in reversed(WAYS):
            printed = on_two_processes(folder, way)
            whole = max(whole, *(parameters for parameters, _ in printed))  # of the first way
            for rank, (parameters, peak) in enumerate(printed):
                print(f"{way:<10}{rank:<9}{parameters / 1e6:>17.0f}{peak / 1e6:>11.0f}{peak / whole:>14.2f}")
            worst = max(peak for _, peak in printed) / whole
    return int(worst >= 1)


if __name__ == "__main__":
    sys.exit(main())
