"""A folder of Qwen2.5-VL in several safetensors files begins a stage; what is missing or too much is an error."""

import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from nextflow.lightning_modules.transformer_checkpoint import initialize
from nextflow.models.transformer.config import TransformerConfig
from nextflow.models.transformer.model import Transformer
from nextflow.models.transformer.state_dict import from_qwen2_5_vl

CONFIG = {
    "text_size": 30, "codebook_size": 7, "code_dim": 4, "start_id": 0, "end_id": 1, "width": 24, "num_layers": 2,
    "num_heads": 3, "num_kv_heads": 1, "head_dim": 8, "mlp_width": 20, "rope_sections": (2, 1, 1), "max_scales": 4,
}  # fmt: skip


def test_a_folder_of_several_files(tmp_path):
    text = {
        "vocab_size": 40, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 3,
        "num_key_value_heads": 1, "bos_token_id": 0, "eos_token_id": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1]},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 24}
    theirs = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
    theirs.save_pretrained(tmp_path, max_shard_size="12KB")
    assert len(list(tmp_path.glob("*.safetensors"))) >= 3
    model = Transformer(TransformerConfig(**CONFIG))
    expected = from_qwen2_5_vl(theirs.state_dict(), {k: v.clone() for k, v in model.state_dict().items()}, model.config)
    initialize(model, tmp_path, "any tokenizer")
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    with pytest.raises(ValueError, match="initialize_weights: 'ema' needs a checkpoint"):
        initialize(model, tmp_path, "any tokenizer", "ema")
    with pytest.raises(ValueError, match=r"num_layers 3: missing \['layers\.2"):
        initialize(Transformer(TransformerConfig(**{**CONFIG, "num_layers": 3})), tmp_path, "any tokenizer")
