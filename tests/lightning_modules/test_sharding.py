"""Training on two processes == on one, under DDP and under FSDP2: losses, clipping, codebooks, checkpoints, resuming."""

import runpy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import Siglip2Config, Siglip2Model

from nextflow.lightning_modules.sharding import clip_gradients, optimizer_groups
from nextflow.lightning_modules.tokenizer import load_tokenizer

SCRIPT = Path(__file__).with_name("tokenizer_ranks.py")
# Sums over a batch are added up in another order: the last digits of fp32, and what a few steps make of them.
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


@pytest.fixture(scope="module")
def runs(two_ranks, tmp_path_factory):
    """The folder with checkpoints; results of one process; results of ranks 0 and 1."""
    folder = tmp_path_factory.mktemp("runs")
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    siglip = Siglip2Config(
        text_config={**tower, "vocab_size": 20, "bos_token_id": None, "eos_token_id": None},
        vision_config={**tower, "patch_size": 8, "num_patches": 4},
    )
    Siglip2Model(siglip).save_pretrained(folder / "siglip2")
    with ThreadPoolExecutor() as pool:
        two = pool.submit(two_ranks, SCRIPT, folder)
        one = runpy.run_path(str(SCRIPT))["main"](folder)
    return folder, one, two.result()


def _state(path):
    return torch.load(path, weights_only=True)["state_dict"]


@pytest.mark.parametrize("stage", ["joint", "pixel"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_equal_one(runs, strategy, stage):
    _, one, two = runs
    one, ranks = one[f"auto_{stage}"], [rank[f"{strategy}_{stage}"] for rank in two]
    assert len(one["steps"]) == {"joint": 4, "pixel": 3}[stage]
    for step, logged in enumerate(one["steps"]):
        assert {"train/loss", "train/loss_mse", "train/loss_commitment"} <= set(logged)
        for name, value in logged.items():
            mean = torch.stack([rank["steps"][step][name] for rank in ranks]).mean()
            torch.testing.assert_close(mean, value, **CLOSE, msg=lambda m, n=name, s=step: f"{n} in step {s}: {m}")
    assert ("train/loss_discriminator" in one["steps"][-1]) == (stage == "joint")
    assert torch.equal(torch.cat([rank["codes"] for rank in ranks]), one["codes"])
    torch.testing.assert_close(torch.cat([rank["decoded"] for rank in ranks]), one["decoded"], **CLOSE)
    assert torch.equal(ranks[0]["entries"], ranks[1]["entries"])
    for name, value in one["validation"].items():
        torch.testing.assert_close(ranks[1]["validation"][name], value, rtol=1e-3, atol=1e-4)
    assert "val/psnr" in one["validation"]


@pytest.mark.parametrize("stage", ["joint", "pixel"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_checkpoints_equal_those_of_one_process_and_load(runs, strategy, stage):
    folder, one, _ = runs
    ours, theirs = _state(folder / f"1_auto_{stage}.ckpt"), _state(folder / f"2_{strategy}_{stage}.ckpt")
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")
    tokenizer = load_tokenizer(folder / f"2_{strategy}_{stage}.ckpt")
    grids = tokenizer.schedule.grids(32)
    torch.testing.assert_close(
        tokenizer.decode(one[f"auto_{stage}"]["codes"], grids), one[f"auto_{stage}"]["decoded"], **CLOSE
    )


def test_a_run_resumed_from_a_file_and_from_shards_equals_a_straight_one(runs):
    folder, _, _ = runs
    straight, end, early = (_state(folder / f"2_{name}.ckpt") for name in ("straight", "end", "file"))
    for name, value in straight.items():
        assert torch.equal(end[name], value), name
    assert not torch.equal(early["tokenizer.quantizer.pixel_codebook"], straight["tokenizer.quantizer.pixel_codebook"])
    with pytest.raises(ValueError, match="save_distributed_checkpoint"):
        load_tokenizer(folder / "2_shards.ckpt")


def test_bfloat16_shards_train_a_float32_quantiser(runs):
    folder, _, two = runs
    assert all(torch.isfinite(value) for step in two[0]["bfloat16"]["steps"] for value in step.values())
    assert all(value.dtype != torch.bfloat16 for value in _state(folder / "2_bfloat16.ckpt").values())
    assert torch.equal(two[0]["bfloat16"]["entries"], two[1]["bfloat16"]["entries"])
    assert two[0]["bfloat16"]["decoded"].dtype == torch.bfloat16


@pytest.mark.parametrize("max_norm", [0.1, 1e6])
def test_clipping_is_torchs_on_one_process(max_norm):
    ours, theirs = ([torch.nn.Parameter(torch.zeros(size)) for size in (3, 70, 1)] for _ in range(2))
    for parameters in (ours, theirs):
        torch.manual_seed(0)
        for parameter in parameters[:2]:  # the third has no gradient
            parameter.grad = torch.randn_like(parameter)
    norm = clip_gradients(ours, max_norm)
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(theirs, max_norm))
    for a, b in zip(ours[:2], theirs[:2]):
        torch.testing.assert_close(a.grad, b.grad)
    assert clip_gradients(ours[2:], max_norm) == 0


def test_parameters_of_one_kind_stay_one_group():
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    assert optimizer_groups(iter(parameters)) == parameters
