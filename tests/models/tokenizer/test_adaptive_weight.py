"""The adaptive weight == the ratio of the last layer's gradients that autograd gives, in one process and in two."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from nextflow.models.tokenizer.adaptive_weight import AdaptiveWeight
from nextflow.models.tokenizer.config import PixelConfig
from nextflow.models.tokenizer.pixel import PixelDecoder

LAYOUTS = {
    "vqgan": PixelConfig(width=8, multipliers=(1, 1, 2), num_blocks=1, latent_width=8, groups=4),
    "patchified": PixelConfig(
        layout="patchified", width=8, multipliers=(1, 2), num_blocks=1, stem=4, latent_width=8, groups=4
    ),
}


def _pass(layout, rows=slice(None)) -> SimpleNamespace:
    """A watched pass of a fixed decoder over some rows of a fixed batch, with a reconstruction and an adversarial loss."""
    torch.manual_seed(0)
    decoder, critic = PixelDecoder(LAYOUTS[layout], 4), nn.Conv2d(3, 1, 5)
    codes = torch.randn(4, 4, 3, 2)[rows]
    images = torch.rand(4, 3, 3 * LAYOUTS[layout].stride, 2 * LAYOUTS[layout].stride)[rows]
    with AdaptiveWeight(decoder) as weight:
        output = decoder(codes)
    reconstruction = (output - images).square().mean() + 0.2 * (output - images).abs().mean()
    adversarial = -critic(output).mean()
    return SimpleNamespace(
        decoder=decoder, weight=weight, output=output, reconstruction=reconstruction, adversarial=adversarial
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_is_the_ratio_of_the_last_layers_gradients(layout):
    run = _pass(layout)
    norms = [
        torch.autograd.grad(loss, run.decoder.to_pixels.weight, retain_graph=True)[0].norm()
        for loss in (run.reconstruction, run.adversarial)
    ]
    weight = run.weight(run.reconstruction, run.adversarial, run.output)
    torch.testing.assert_close(weight, norms[0] / (norms[1] + 1e-4), rtol=1e-4, atol=1e-6)
    assert not weight.requires_grad
    (run.reconstruction + weight * run.adversarial).backward()  # the graph is still there
    assert all(parameter.grad is not None for parameter in run.decoder.parameters())


def test_leaves_gradients_and_hooks_alone():
    run = _pass("vqgan")
    run.weight(run.reconstruction, run.adversarial, run.output)
    assert all(parameter.grad is None for parameter in run.decoder.parameters())
    assert not run.decoder.to_pixels._forward_pre_hooks


def test_is_clamped_where_the_discriminator_says_nothing():
    run = _pass("vqgan")
    assert run.weight(run.reconstruction * 1e6, run.adversarial * 0, run.output) == 1e4
    assert run.weight(run.reconstruction * 0, run.adversarial, run.output) == 0


def test_two_processes_have_the_weight_of_one_with_the_whole_batch(tmp_path):
    run = _pass("vqgan")
    expected = run.weight(run.reconstruction, run.adversarial, run.output)
    ranks = [subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), expected, rtol=1e-5, atol=0)


def _on_rank(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    run = _pass("vqgan", slice(2 * rank, 2 * rank + 2))
    torch.save(run.weight(run.reconstruction, run.adversarial, run.output), folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    _on_rank(int(sys.argv[1]), Path(sys.argv[2]))
