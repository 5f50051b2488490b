"""One rank of `test_two_processes.py`: `python quantizer_ranks.py FOLDER`, with its rank in the environment.

Rank r takes its share of the global batch of every step. What it saw and what became of the quantiser comes back.
"""

import os
import sys

import torch
import torch.distributed as dist

from nextflow.models.tokenizer.quantizer import DualCodebookQuantizer
from nextflow.models.tokenizer.row_draw import best_row_of_each, best_rows, draw_keys

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
SQUARE, WIDE, LARGE = ((1, 1), (2, 2), (4, 4)), ((1, 1), (1, 3), (2, 5)), ((1, 1), (2, 2), (4, 4), (6, 6))
ENTRIES, SEMANTIC, PIXEL = 64, 4, 3
UPDATES = {"gradient": {}, "ema": {"codebook_update": "ema", "ema_decay": 0.8}}


def make(**options):
    torch.manual_seed(0)
    options = {"revive_interval": 2, "revive_below": 0.6, "usage_decay": 0.5, **options}
    return DualCodebookQuantizer(ENTRIES, SEMANTIC, PIXEL, **options).train()


def features(step, images, grid):
    noise = torch.randn(images, SEMANTIC + PIXEL, *grid, generator=torch.Generator().manual_seed(step))
    return noise + torch.tensor([2.0, 0, 0, 0, 0, 1.0, 0])[:, None, None]  # few directions: some entries die


def train(quantizer, steps, batch_of):
    """Steps of training; the optimiser averages gradients over ranks, as DDP does. Returns what each step saw."""
    parameters = [parameter for parameter in quantizer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1.0) if parameters else None
    seen = []
    for step in range(steps):
        features_BCHW, grids, keep = batch_of(step)
        features_BCHW.requires_grad_()
        before = quantizer.entries_KC().detach().clone()
        output = quantizer(features_BCHW, grids, keep, entropy=True)
        entries = quantizer.entries_KC().detach().clone()
        quantizer.zero_grad()
        loss = output.codebook_loss + output.commitment_loss + output.residual_loss + 0.1 * output.entropy_loss
        loss.backward()
        for parameter in parameters:
            if RANKS > 1:
                dist.all_reduce(parameter.grad)
            parameter.grad /= RANKS
        if optimizer is not None:
            optimizer.step()
        losses = [output.codebook_loss, output.commitment_loss, output.residual_loss, output.entropy_loss]
        seen.append(
            {
                "codes": output.indices,
                "losses": torch.stack(losses).detach(),
                "gradient": features_BCHW.grad / RANKS,
                "entries": entries,
                "changed": (entries != before).any(dim=1),
                "usage": quantizer.health.usage_K.clone(),
            }
        )
    return {"steps": seen, "state": {name: value.clone() for name, value in quantizer.state_dict().items()}}


def share(step):
    """Half of the batch each, or all of it."""
    keep = [True, step % 3 != 2, True]
    return features(step, 12, (4, 4)).chunk(RANKS)[RANK], SQUARE, keep


def bucket(step):
    """Other grids and another batch size on every rank; after the first step, one rank has a single image."""
    images, grids = ((5, WIDE), (2, LARGE))[(RANK + step) % 2]
    return features(10 * step + RANK, images if step < 2 else images - 1, grids[-1]), grids, None


def draw():
    """Draws from rows that are bitwise equal, dealt out unevenly: 5 images and 7, or all 12."""
    rows = torch.randn(12, 9, 3, generator=torch.Generator().manual_seed(0))
    weight = torch.rand(12, 9, generator=torch.Generator().manual_seed(1)) + 0.01
    entry = torch.randint(0, 40, (12, 9), generator=torch.Generator().manual_seed(2))
    mine = [slice(0, 12)] if RANKS == 1 else [slice(0, 5), slice(5, 12)]
    rows, weight, entry = (tensor[mine[RANK]].flatten(0, 1) for tensor in (rows, weight[..., None], entry[..., None]))
    key = draw_keys(weight.view(-1, 9), seed=3)
    return {
        "keys": key,
        "best": best_rows(key, rows, 20),
        "more than there are": best_rows(key, rows, 150),
        "of each": best_row_of_each(key, entry.flatten(), rows, torch.full((50, 3), 7.0)),
    }


def main():
    results = {"draw": draw()}
    for update, options in UPDATES.items():
        results[f"{update}, first entries"] = train(make(**options), 1, share)
        results[update] = train(make(**options), 6, share)
        kept = make(**options)
        kept.health.pixel_ready.fill_(True)
        results[f"{update}, kept pixel codebook"] = train(kept, 4, share)
        results[f"{update}, buckets"] = train(make(**options), 5, bucket)
    return results


if __name__ == "__main__":
    dist.init_process_group("gloo")
    torch.save(main(), f"{sys.argv[1]}/{RANK}.pt")
    dist.destroy_process_group()
