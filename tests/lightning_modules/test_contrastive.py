"""The contrastive module: the sigmoid loss, equal captions as positives, parity with transformers, the folder it writes."""

from types import SimpleNamespace

import lightning as L
import pytest
import torch
from transformers import Siglip2Model

from nextflow.lightning_modules.contrastive import ContrastiveConfig, ContrastiveModule, sigmoid_loss
from nextflow.lightning_modules.tokenizer import to_signed
from nextflow.models.tokenizer.config import SemanticConfig
from nextflow.models.tokenizer.semantic import SemanticTower, load_tower, patchify, read_semantic_config
from nextflow.sequence.text_tokenizer import train_text_tokenizer

SMALL = ContrastiveConfig(width=16, num_layers=1, num_heads=2, num_patches=4, max_text_length=8)
COLOURS = {"red": 0, "green": 1, "blue": 2}


@pytest.fixture(scope="module")
def text_tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    train_text_tokenizer([f"a {colour} square" for colour in COLOURS] * 4, folder, 280)
    return str(folder)


def _batch(index: int) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(index)
    names = [list(COLOURS)[int(i)] for i in torch.randint(0, 3, (8,), generator=generator)]
    images = torch.randint(0, 60, (8, 3, 16, 16), dtype=torch.uint8, generator=generator)
    for image, name in zip(images, names):
        image[COLOURS[name]] += 180
    return SimpleNamespace(images=images, captions=[f"a {name} square" for name in names])


class _Batches(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 30

    def __getitem__(self, index: int) -> SimpleNamespace:
        return _batch(index)


def _trainer(folder, **options) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )


def test_loss_is_siglips_where_captions_differ(text_tokenizer):
    module = ContrastiveModule(text_tokenizer, SMALL).eval()
    batch = _batch(0)
    images, ids = to_signed(batch.images), module.text_ids(batch.captions)
    theirs = module.siglip.model(
        input_ids=ids,
        pixel_values=patchify(images, 8),
        pixel_attention_mask=torch.ones(8, 4, dtype=torch.int32),
        spatial_shapes=torch.tensor([[2, 2]] * 8),
        return_loss=True,
    )
    logits = module.siglip(images, ids)
    torch.testing.assert_close(logits, theirs.logits_per_image, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sigmoid_loss(logits, torch.eye(8) > 0), theirs.loss, rtol=1e-4, atol=1e-4)


def test_equal_captions_are_positives(text_tokenizer):
    module = ContrastiveModule(text_tokenizer, SMALL).eval()
    batch = _batch(0)
    _, positive = module._logits(batch)
    expected = [[a == b for b in batch.captions] for a in batch.captions]
    assert positive.tolist() == expected and positive.sum() > 8


def test_captions_are_cut_and_padded(text_tokenizer):
    module = ContrastiveModule(text_tokenizer, SMALL)
    short, long = module.text_ids(["a", "a red square " * 20])
    assert short[-1] == module.text_tokenizer.end_id and len(long) == 8


def test_learns_and_writes_the_folder_the_tokenizer_reads(text_tokenizer, tmp_path):
    L.seed_everything(0, verbose=False)
    module = ContrastiveModule(
        text_tokenizer, SMALL, optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2), warmup_steps=2
    )
    loader = torch.utils.data.DataLoader(_Batches(), batch_size=None)
    trainer = _trainer(tmp_path, max_epochs=5, limit_val_batches=4)
    trainer.fit(module, loader, loader)
    assert trainer.callback_metrics["val/image_to_text"] > 0.9
    folder = tmp_path / "siglip2"
    tower = SemanticTower(read_semantic_config(folder, SemanticConfig(hidden_state=-1), 8), 8)
    load_tower(tower, folder)
    source = module.siglip.model.vision_model
    for ours, theirs in zip(tower.layers.parameters(), source.encoder.layers.parameters()):
        assert torch.equal(ours, theirs)
    again = ContrastiveModule(text_tokenizer, pretrained=str(folder))
    for ours, theirs in zip(again.siglip.parameters(), module.siglip.parameters()):
        assert torch.equal(ours, theirs)
    assert isinstance(again.siglip.model, Siglip2Model)


def test_another_vocabulary_is_an_error(text_tokenizer, tmp_path):
    train_text_tokenizer(["other words entirely"] * 4, tmp_path / "other", 270)
    module = ContrastiveModule(text_tokenizer, SMALL)
    module.siglip.model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="pretrained has"):
        ContrastiveModule(str(tmp_path / "other"), pretrained=str(tmp_path / "model"))
