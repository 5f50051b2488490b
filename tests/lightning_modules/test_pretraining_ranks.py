"""Pretraining on two processes == on one: losses, gradient norms, average, checkpoints, export, resuming on another number."""

import runpy
from pathlib import Path

import pytest
import torch

from nextflow.generation.pipeline import NextFlowPipeline
from nextflow.lightning_modules.export import export
from nextflow.lightning_modules.transformer_checkpoint import initialize, load_transformer
from nextflow.models.transformer.model import Transformer

SCRIPT = Path(__file__).with_name("pretraining_ranks.py")
# Sums over a batch are added up in another order. Seen: 1e-6 in losses of about 5, 3e-8 in weights.
CLOSE = {"rtol": 1e-6, "atol": 1e-6}


@pytest.fixture(scope="module")
def runs(two_ranks, tmp_path_factory):
    """The folder with checkpoints; the script; results of one process; results of ranks 0 and 1."""
    folder = tmp_path_factory.mktemp("runs")
    script = runpy.run_path(str(SCRIPT))
    script["prepare"](folder)
    script["fit"](folder, "start", script["make"](folder, seed=7), "auto", 1)
    one = script["main"](folder)
    return folder, script, one, two_ranks(SCRIPT, folder)


def load(path):
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("part", ["all", "alignment"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_equal_one(runs, strategy, part):
    """Uneven packs, texts without a picture on one rank, accumulation, clipping, two validations with the average."""
    folder, _, one, two = runs
    one, ranks = one[f"auto_{part}"], [rank[f"{strategy}_{part}"] for rank in two]
    assert len(one["steps"]) == {"all": 8, "alignment": 2}[part] and "train/gradient_norm" in one["steps"][1]
    assert one["steps"][1]["train/gradient_norm"] > 0.5  # above the clipping
    for rank in ranks:
        assert rank["sharded"] == (strategy == "fsdp")
        for step, (theirs, ours) in enumerate(zip(rank["steps"], one["steps"], strict=True)):
            for name, value in ours.items():
                torch.testing.assert_close(theirs[name], value, **CLOSE, msg=lambda m, n=name, s=step: f"{n}, {s}: {m}")
        for theirs, ours in zip(rank["validations"], one["validations"], strict=True):
            torch.testing.assert_close(theirs, ours, **CLOSE)
    assert len(set(map(float, one["validations"]))) == {"all": 4, "alignment": 1}[part]
    ours = load(folder / f"1_auto_{part}.ckpt")["state_dict"]
    theirs = load(folder / f"2_{strategy}_{part}.ckpt")["state_dict"]
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")
    moved = not torch.equal(
        ours["transformer.blocks.0.mlp.down_proj.weight"], ours["ema.blocks.0.mlp.down_proj.weight"]
    )
    assert moved == (part == "all")  # frozen weights are their own average


def same(ours, theirs, **tolerance):
    """Two checkpoints: weights, average, and the moments of each parameter."""
    for name, value in ours["state_dict"].items():
        torch.testing.assert_close(theirs["state_dict"][name], value, **tolerance, msg=lambda m, n=name: f"{n}: {m}")
    (a,), (b,) = ours["optimizer_states"], theirs["optimizer_states"]
    assert [group["params"] for group in a["param_groups"]] == [group["params"] for group in b["param_groups"]]
    assert set(a["state"]) == set(b["state"])
    for key, state in a["state"].items():
        for name, value in state.items():
            torch.testing.assert_close(
                b["state"][key][name], value, **tolerance, msg=lambda m, k=(key, name): f"{k}: {m}"
            )


def test_resumed_from_a_file_and_from_shards_is_exact(runs):
    folder, _, _, two = runs
    same(load(folder / "2_straight.ckpt"), load(folder / "2_end.ckpt"), rtol=0, atol=0)
    for rank in two:
        parts = rank["file"]["steps"] + rank["shards"]["steps"] + rank["end"]["steps"]
        assert all(torch.equal(a[name], b[name]) for a, b in zip(parts, rank["straight"]["steps"]) for name in a)


# Adam divides small gradients by their own size: what is 1e-8 in a gradient is more in a weight.
ADAM = {"rtol": 1e-5, "atol": 2e-6}


def test_resumed_on_another_number_of_processes(runs):
    """One process' file under FSDP2 on two; two processes' file on one; two processes' shards on one, under FSDP2, which need
    no file of initial weights any more."""
    folder, script, _, _ = runs
    straight = load(folder / "1_straight.ckpt")
    same(straight, load(folder / "2_from_one.ckpt"), **ADAM)
    script["resumed"](folder, "1_from_file", "auto", 2, 6, folder / "2_file.ckpt")
    same(straight, load(folder / "1_from_file.ckpt"), **ADAM)
    script["resumed"](
        folder, "1_from_shards", "fsdp", 4, 6, folder / "2_shards" / "last.ckpt", initialize_from="gone.ckpt"
    )
    torch.distributed.destroy_process_group()
    same(straight, load(folder / "1_from_shards.ckpt"), **ADAM)


@pytest.mark.parametrize("weights", ["trained", "ema"])
def test_a_folder_of_shards_reads_as_a_file_does(runs, weights):
    folder, script, _, _ = runs
    shards = folder / "2_shards" / "last.ckpt"
    assert (shards / ".metadata").is_file()
    loaded = load_transformer(shards, weights=weights)
    whole = load_transformer(folder / "2_straight.ckpt", weights=weights)
    assert loaded.text_tokenizer.encode("a red dog") == whole.text_tokenizer.encode("a red dog")
    begun = Transformer(loaded.transformer.config)
    initialize(begun, shards, loaded.tokenizer_fingerprint, weights)
    differ = 0
    for (name, ours), theirs in zip(loaded.transformer.state_dict().items(), begun.state_dict().values()):
        assert torch.equal(ours, theirs), name
        differ += not torch.equal(ours, whole.transformer.state_dict()[name])
    assert differ > 10  # two steps lie between them
    assert torch.equal(loaded.transformer.num_scales_table, whole.transformer.num_scales_table)
    exported = export(shards, folder / f"hub_{weights}", tokenizer=folder / "tokenizer.ckpt", weights=weights)
    pipeline = NextFlowPipeline.from_pretrained(exported)
    for (name, ours), theirs in zip(
        loaded.transformer.state_dict().items(), pipeline.transformer.state_dict().values()
    ):
        assert torch.equal(ours, theirs), name
    script["resumed"](folder, "1_again", "fsdp", 4, 4, shards)
    torch.distributed.destroy_process_group()
    prefix = {"trained": "transformer.", "ema": "ema."}[weights]
    state = load(folder / "1_again.ckpt")["state_dict"]
    assert all(torch.equal(value, state[prefix + name]) for name, value in loaded.transformer.state_dict().items())
