"""Contrastive scores: of our own models equal to the module's, of a CLIP folder equal to transformers' own."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    PreTrainedTokenizerFast,
)

from nextflow.lightning_modules.contrastive import ContrastiveConfig, ContrastiveModule
from nextflow.lightning_modules.tokenizer import to_signed
from nextflow.rewards.contrastive import ContrastiveReward
from nextflow.sequence.text_tokenizer import train_text_tokenizer

PROMPTS = ["a red dog", "two blue cats", "a red dog of many many many words"]


def pictures(*sizes):
    return [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in sizes]


def test_our_own_model(tmp_path):
    train_text_tokenizer(PROMPTS, tmp_path / "text", size=300)
    config = ContrastiveConfig(width=32, num_layers=2, num_heads=2, patch_size=8, num_patches=16, max_text_length=6)
    module = ContrastiveModule(str(tmp_path / "text"), config).eval()
    module.siglip.model.save_pretrained(tmp_path / "siglip2")
    reward = ContrastiveReward(str(tmp_path / "siglip2"), str(tmp_path / "text"), batch_size=2)
    images = pictures((32, 32), (16, 64), (32, 32))
    scores = reward(images, PROMPTS, [{}] * 3)
    with torch.no_grad():
        texts = module.siglip.text_features(module.text_ids(PROMPTS))
        pairs = [module.siglip.image_features(to_signed(image[None]))[0] @ text for image, text in zip(images, texts)]
    torch.testing.assert_close(scores, torch.stack(pairs), rtol=1e-4, atol=1e-5)
    assert reward(images, ["", " ", "a"], [{}] * 3).isnan().tolist() == [True, True, False]
    scaled = ContrastiveReward(str(tmp_path / "siglip2"), str(tmp_path / "text"), scaled=True)
    torch.testing.assert_close(
        scaled(images, PROMPTS, [{}] * 3), scores * module.siglip.model.logit_scale.exp().item(), rtol=1e-4, atol=1e-5
    )
    with pytest.raises(ValueError, match="patches of 8 pixels"):
        reward(pictures((30, 32)), PROMPTS[:1], [{}])


def test_a_clip_folder(tmp_path):
    """PickScore is one: CLIP weights with their processor."""
    words = {word: index for index, word in enumerate(["<pad>", "<end>", "a", "red", "blue", "dog"])}
    tokens = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", eos_token="<end>", model_max_length=6
    )
    size = {"height": 16, "width": 16}
    images = CLIPImageProcessor(size=size, crop_size=size)
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(
            text_config={**tower, "vocab_size": 6, "max_position_embeddings": 6, "eos_token_id": 1},
            vision_config={**tower, "image_size": 16, "patch_size": 8},
            projection_dim=8,
        )
    ).eval()
    model.save_pretrained(tmp_path / "clip")
    processor = CLIPProcessor(images, tokenizer)
    processor.save_pretrained(tmp_path / "clip")
    prompts, (image, other) = ["a red dog", "blue dog"], pictures((16, 16), (16, 16))
    scores = ContrastiveReward(str(tmp_path / "clip"), scaled=True)([image, other], prompts, [{}, {}])
    given = processor(images=[image, other], text=prompts, padding="max_length", return_tensors="pt")
    with torch.no_grad():
        expected = model(**given).logits_per_image.diag()
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)


def test_a_missing_folder_names_its_key(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"ContrastiveReward\.model"):
        ContrastiveReward(str(tmp_path / "none"))
