"""Qwen2.5-VL weights: both styles of keys, there and back, and errors that name what does not match."""

import pytest
import torch

from nextflow.models.transformer.config import TransformerConfig
from nextflow.models.transformer.model import Transformer
from nextflow.models.transformer.state_dict import from_qwen2_5_vl, to_qwen2_5_vl

CONFIG = {
    "text_size": 30, "codebook_size": 7, "code_dim": 4, "start_id": 0, "end_id": 1, "width": 24, "num_layers": 2,
    "num_heads": 3, "num_kv_heads": 1, "head_dim": 8, "mlp_width": 20, "rope_sections": (2, 1, 1), "max_scales": 4,
}  # fmt: skip


@pytest.fixture
def theirs():
    """A whole Qwen2.5-VL, visual tower included."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "vocab_size": 40, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 3,
        "num_key_value_heads": 1, "bos_token_id": 0, "eos_token_id": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1]},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 24}
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
    return {key: torch.randn_like(value) for key, value in model.state_dict().items()}


@pytest.mark.parametrize("head", ["single", "dual"])
@pytest.mark.parametrize("style", ["v5", "2025"])
def test_round_trip(theirs, style, head):
    if style == "2025":
        theirs = {
            key.replace("model.language_model.", "model.").replace("model.visual.", "visual."): theirs[key]
            for key in theirs
        }
        assert "model.layers.0.self_attn.q_proj.weight" in theirs
    config = TransformerConfig(**CONFIG, head=head)
    model = Transformer(config)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(from_qwen2_5_vl(theirs, model.state_dict(), config))
    back = to_qwen2_5_vl(model.state_dict(), config)
    for key, value in back.items():
        source = theirs[key if style == "v5" else key.replace("model.language_model.", "model.")]
        rows = 30 if key.endswith(("embed_tokens.weight", "lm_head.weight")) else None
        assert torch.equal(value, source[:rows]), key
    assert len(back) == sum("visual" not in key for key in theirs)
    for key in ("boundary_embedding.weight", "code_embedding.weight", "connector.0.weight", "scale_embedding.weight"):
        assert torch.equal(model.state_dict()[key], before[key])
    names = ("head.weight",) if head == "single" else ("head.text.weight", "head.code.weight")
    after = torch.cat([model.state_dict()[name] for name in names])
    old = torch.cat([before[name] for name in names])
    assert torch.equal(after[30:], old[30:]) and not torch.equal(after[:30], old[:30])
    assert all(
        torch.equal(a, b) for a, b in zip(from_qwen2_5_vl(back, before, config).values(), model.state_dict().values())
    )


def test_errors_name_the_key(theirs):
    config = TransformerConfig(**CONFIG)
    ours = Transformer(config).state_dict()
    unknown = {**theirs, "model.language_model.layers.2.mlp.up_proj.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"layers\.2\.mlp\.up_proj"):
        from_qwen2_5_vl(unknown, ours, config)
    missing = {key: value for key, value in theirs.items() if "layers.1.self_attn.k_proj.bias" not in key}
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.k_proj\.bias"):
        from_qwen2_5_vl(missing, ours, config)
    with pytest.raises(ValueError, match="has shape"):
        from_qwen2_5_vl(theirs, ours | {"norm.weight": torch.zeros(3)}, config)
    with pytest.raises(ValueError, match="text_size"):
        from_qwen2_5_vl(theirs, Transformer(TransformerConfig(**{**CONFIG, "text_size": 50})).state_dict(),
                        TransformerConfig(**{**CONFIG, "text_size": 50}))  # fmt: skip
    with pytest.raises(ValueError, match=r"extra\.weight"):
        to_qwen2_5_vl(ours | {"extra.weight": torch.zeros(1)}, config)


def test_seven_billion_on_meta():
    with torch.device("meta"):
        model = Transformer(TransformerConfig.qwen2_5_vl_7b(codebook_size=16384))
    assert next(model.parameters()).is_meta
    qwen = sum(
        p.numel() for name, p in model.named_parameters() if name.startswith(("blocks", "norm", "token_embedding"))
    )
    # Qwen2.5-7B has 7,615,616,512 parameters, 152064 * 3584 of them in its head.
    assert qwen == 7_615_616_512 - 152064 * 3584
    assert model.head.weight.shape == (152064 + 2 + 16384, 3584)


def test_weights_can_be_drawn_after_meta():
    config = TransformerConfig(**CONFIG)
    with torch.device("meta"):
        model = Transformer(config)
    model.to_empty(device="cpu")
    torch.manual_seed(3)
    model.init_weights()
    torch.manual_seed(3)
    plain = Transformer(config)
    plain_seeded = {key: value.clone() for key, value in plain.state_dict().items()}
    torch.manual_seed(3)
    plain.init_weights()
    assert torch.equal(model.num_scales_table, plain.num_scales_table)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values()))
    assert set(plain_seeded) == set(model.state_dict())
