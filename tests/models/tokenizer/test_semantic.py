"""The semantic branch == transformers' SigLIP 2 NaFlex, from its processor's patches to a saved folder."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Siglip2Config, Siglip2ImageProcessor, Siglip2Model, Siglip2VisionModel

from nextflow.models.tokenizer.config import SemanticConfig
from nextflow.models.tokenizer.semantic import (
    SemanticEncoder,
    SemanticTower,
    load_tower,
    naflex_embeddings,
    patchify,
    read_semantic_config,
)

PATCH = 8
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
CONFIG = SemanticConfig(
    width=32, mlp_width=48, num_layers=3, num_heads=2, num_patches=16, decoder_width=32, decoder_heads=2
)


def _siglip(**vision) -> Siglip2Model:
    torch.manual_seed(0)
    text = {**TOWER, "vocab_size": 50, "bos_token_id": None, "eos_token_id": None}
    vision = {**TOWER, "patch_size": PATCH, "num_patches": 16, **vision}
    return Siglip2Model(Siglip2Config(text_config=text, vision_config=vision)).eval()


@pytest.fixture(params=["model", "vision"])
def folder(request, tmp_path):
    model = _siglip()
    (model if request.param == "model" else model.vision_model).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("grid", [(4, 4), (2, 7), (5, 3)])
def test_patches_equal_the_processor(grid):
    height, width = grid[0] * PATCH, grid[1] * PATCH
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    processor = Siglip2ImageProcessor(patch_size=PATCH, max_num_patches=grid[0] * grid[1])
    theirs = processor(Image.fromarray(pixels), return_tensors="pt")
    ours = patchify(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1, PATCH)
    assert theirs["spatial_shapes"].tolist() == [list(grid)]
    torch.testing.assert_close(ours, theirs["pixel_values"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grid", [(4, 4), (2, 7), (6, 5)])
@pytest.mark.parametrize("hidden_state", [-2, -1, 0, 2])
def test_tower_is_the_hidden_state_of_the_saved_model(folder, grid, hidden_state):
    base = SemanticConfig(hidden_state=hidden_state, num_layers=3)
    tower = SemanticTower(read_semantic_config(folder, base, PATCH), PATCH).eval()
    load_tower(tower, folder)
    images = torch.rand(2, 3, grid[0] * PATCH, grid[1] * PATCH) * 2 - 1
    theirs = Siglip2VisionModel.from_pretrained(folder).eval()(
        pixel_values=patchify(images, PATCH),
        pixel_attention_mask=torch.ones(2, grid[0] * grid[1], dtype=torch.int32),
        spatial_shapes=torch.tensor([grid, grid]),
        output_hidden_states=True,
    )
    torch.testing.assert_close(tower(images), theirs.hidden_states[hidden_state], rtol=1e-4, atol=1e-5)


def test_embeddings_equal_transformers_per_image_loop():
    embeddings = _siglip().vision_model.embeddings
    images = torch.rand(3, 3, 3 * PATCH, 5 * PATCH)
    theirs = embeddings(patchify(images, PATCH), torch.tensor([[3, 5]] * 3))
    torch.testing.assert_close(naflex_embeddings(embeddings, images), theirs)


def test_features_keep_the_images_layout():
    encoder = SemanticEncoder(CONFIG, 8, PATCH).eval()
    images = torch.rand(1, 3, 2 * PATCH, 3 * PATCH)
    features = encoder(images)
    assert features.shape == (1, 8, 2, 3)
    rows = encoder.project(encoder.tower(images))
    torch.testing.assert_close(features[0, :, 1, 0], rows[0, 3])


def test_missing_and_unexpected_vision_weights_are_errors(folder):
    path = folder / "model.safetensors"
    state = load_file(path)
    tower = SemanticTower(CONFIG, PATCH)
    name = next(key for key in state if "layers.0.mlp.fc1.weight" in key and not key.startswith("text_model"))
    save_file({key: value for key, value in state.items() if key != name}, path)
    with pytest.raises(ValueError, match=r"semantic_encoder.*missing.*layers.0.mlp.fc1.weight"):
        load_tower(tower, folder)
    save_file({**state, "vision_model.embeddings.surprise": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"semantic_encoder.*unexpected.*embeddings.surprise"):
        load_tower(tower, folder)


def test_folder_of_another_patch_size_or_none_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="semantic_encoder"):
        read_semantic_config(tmp_path / "nowhere", CONFIG, PATCH)
    _siglip(patch_size=16).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"semantic_encoder.*stride"):
        read_semantic_config(tmp_path, CONFIG, PATCH)
