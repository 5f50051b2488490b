"""The semantic branch == transformers' SigLIP 2 NaFlex, from its processor's patches to a saved folder."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    Siglip2Config,
    Siglip2ImageProcessor,
    Siglip2ImageProcessorPil,
    Siglip2Model,
    Siglip2VisionModel,
    SiglipVisionConfig,
)

from nextflow.lightning_modules.tokenizer import to_signed
from nextflow.models.tokenizer.config import PixelConfig, SemanticConfig, TokenizerConfig
from nextflow.models.tokenizer.model import Tokenizer
from nextflow.models.tokenizer.semantic import (
    SemanticEncoder,
    SemanticTower,
    load_tower,
    naflex_embeddings,
    patchify,
    read_semantic_config,
)
from nextflow.sequence.scales import ScaleSchedule

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


@pytest.fixture(params=["model", "model in shards", "vision model"])
def folder(request, tmp_path):
    """A folder of random weights in Hugging Face's own format, with the processor's configuration."""
    model = _siglip()
    model = model.vision_model if request.param == "vision model" else model
    model.save_pretrained(tmp_path, max_shard_size="20KB" if request.param == "model in shards" else "1GB")
    assert (tmp_path / "model.safetensors.index.json").is_file() == (request.param == "model in shards")
    return tmp_path


@pytest.mark.parametrize("processor", [Siglip2ImageProcessor, Siglip2ImageProcessorPil])
@pytest.mark.parametrize("grid", [(4, 4), (2, 7), (5, 3), (1, 9)])
def test_features_of_a_uint8_image_equal_the_processor_and_the_model(grid, processor, tmp_path):
    _siglip().save_pretrained(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (grid[0] * PATCH, grid[1] * PATCH, 3), dtype=np.uint8)
    inputs = processor(patch_size=PATCH, max_num_patches=grid[0] * grid[1])(
        Image.fromarray(pixels), return_tensors="pt"
    )
    assert inputs["spatial_shapes"].tolist() == [list(grid)]
    theirs = Siglip2VisionModel.from_pretrained(tmp_path).eval()(**inputs, output_hidden_states=True)
    images = to_signed(torch.from_numpy(pixels).permute(2, 0, 1)[None])
    torch.testing.assert_close(patchify(images, PATCH), inputs["pixel_values"], rtol=1e-5, atol=1e-5)
    tower = SemanticTower(read_semantic_config(tmp_path, SemanticConfig(), PATCH), PATCH).eval()
    load_tower(tower, tmp_path)
    torch.testing.assert_close(tower(images), theirs.hidden_states[-2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grid", [(4, 4), (2, 7), (6, 5)])
@pytest.mark.parametrize("hidden_state", [-4, -2, -1, 0, 1, 2, 3])
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
    # the last one is read behind the last norm, as transformers' own `last_hidden_state` is
    last = hidden_state in (-1, 3)
    expected = theirs.last_hidden_state if last else theirs.hidden_states[hidden_state]
    torch.testing.assert_close(tower(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("aspect_ratio", [0.25, 0.6, 1.0, 2.0, 4.0])
def test_semantic_and_pixel_grid_are_one_at_stride_16(aspect_ratio):
    schedule = ScaleSchedule.nextflow()
    pixel = PixelConfig(width=4, multipliers=(1, 1, 1, 1, 1), num_blocks=1, latent_width=4, groups=2, attention=False)
    config = TokenizerConfig(codebook_size=8, semantic_dim=6, pixel_dim=2, pixel=pixel, semantic=CONFIG)
    tokenizer = Tokenizer(config).eval()
    grids, pixels = schedule.grids(256, aspect_ratio), schedule.pixels(256, aspect_ratio)
    with torch.no_grad():
        output = tokenizer(torch.rand(1, 3, *pixels) * 2 - 1, grids)
    assert output.quantizer.quantized.shape == (1, 8, *grids[-1])
    assert output.tower_BND.shape == output.semantic_BND.shape == (1, grids[-1][0] * grids[-1][1], 32)


def test_a_state_dict_is_all_that_a_tokenizer_holds():
    """`generation.folder` builds it without memory and reads its state dict: a buffer outside of that would stay empty."""
    pixel = PixelConfig(width=4, multipliers=(1, 2, 2, 2, 2), num_blocks=1, groups=2)
    with torch.device("meta"):
        tokenizer = Tokenizer(
            TokenizerConfig(codebook_size=8, semantic_dim=6, pixel_dim=2, pixel=pixel, semantic=CONFIG)
        )
    held = {name for name, _ in [*tokenizer.named_parameters(), *tokenizer.named_buffers()]}
    assert held == tokenizer.state_dict().keys()


def test_embeddings_equal_transformers_per_image_loop():
    embeddings = _siglip().vision_model.embeddings
    images = torch.rand(3, 3, 3 * PATCH, 5 * PATCH)
    theirs = embeddings(patchify(images, PATCH), torch.tensor([[3, 5]] * 3))
    torch.testing.assert_close(naflex_embeddings(embeddings, images), theirs)


def test_features_keep_the_images_layout():
    encoder = SemanticEncoder(CONFIG, 8, PATCH).eval()
    images = torch.rand(1, 3, 2 * PATCH, 3 * PATCH)
    features = encoder(images)
    assert features.code_BSHW.shape == (1, 8, 2, 3)
    rows = encoder.project(encoder.tower(images))
    torch.testing.assert_close(features.code_BSHW[0, :, 1, 0], rows[0, 3])


def test_weights_that_do_not_fit_are_named(tmp_path):
    _siglip().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state, tower = load_file(path), SemanticTower(CONFIG, PATCH)
    name = "vision_model.encoder.layers.0.mlp.fc1.weight"
    save_file({key: value for key, value in state.items() if key != name}, path)
    with pytest.raises(ValueError, match=r"semantic_encoder.*missing: layers.0.mlp.fc1.weight"):
        load_tower(tower, tmp_path)
    save_file({**state, "vision_model.embeddings.surprise": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"semantic_encoder.*unexpected: embeddings.surprise"):
        load_tower(tower, tmp_path)
    save_file({**state, name: torch.zeros(48, 31)}, path)
    with pytest.raises(ValueError, match=r"of another shape: layers.0.mlp.fc1.weight \(48, 31\) for \(48, 32\)"):
        load_tower(tower, tmp_path)
    save_file({key: value for key, value in state.items() if key.startswith("text_model")}, path)
    with pytest.raises(ValueError, match=r"semantic_encoder.*missing: embeddings.patch_embedding.bias"):
        load_tower(tower, tmp_path)


def test_damaged_files_are_named(tmp_path):
    tower = SemanticTower(CONFIG, PATCH)
    _siglip().save_pretrained(tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    shard = tmp_path / max(json.loads(index.read_text())["weight_map"].values())
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=rf"semantic_encoder: .*{shard.name} is no safetensors file"):
        load_tower(tower, tmp_path)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=rf"semantic_encoder: .*{shard.name} does not exist"):
        load_tower(tower, tmp_path)
    index.write_text("{")
    with pytest.raises(ValueError, match=r"semantic_encoder: .*index.json is not JSON"):
        load_tower(tower, tmp_path)
    index.unlink()
    with pytest.raises(FileNotFoundError, match=r"semantic_encoder: .*model.safetensors does not exist"):
        load_tower(tower, tmp_path)


def test_folders_of_other_models_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="semantic_encoder"):
        read_semantic_config(tmp_path / "nowhere", CONFIG, PATCH)
    _siglip(patch_size=16).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"semantic_encoder.*16 pixels.*stride is 8"):
        read_semantic_config(tmp_path, CONFIG, PATCH)
    _siglip(layer_norm_eps=1e-5).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"semantic_encoder.*layer_norm_eps"):
        read_semantic_config(tmp_path, CONFIG, PATCH)
    SiglipVisionConfig().save_pretrained(tmp_path)  # published SigLIP 2 models of one resolution are of this type
    with pytest.raises(ValueError, match=r"semantic_encoder.*siglip_vision_model.*naflex"):
        read_semantic_config(tmp_path, CONFIG, PATCH)
    (tmp_path / "config.json").write_text("not json")
    with pytest.raises(ValueError, match=r"semantic_encoder.*config.json is not JSON"):
        read_semantic_config(tmp_path, CONFIG, PATCH)
