"""Our transformer == Hugging Face's Qwen2.5-VL text tower, through our own conversion of its weights."""

import pytest
import torch

from nextflow.models.transformer.config import TransformerConfig
from nextflow.models.transformer.model import Transformer
from nextflow.models.transformer.state_dict import from_qwen2_5_vl
from nextflow.sequence.documents import Document, ImageSegment, TextSegment
from nextflow.sequence.image_layout import LayoutConfig
from nextflow.sequence.layout import lay_out

SQUARE = ((1, 1), (2, 2), (3, 3), (5, 5))
WIDE = ((1, 1), (1, 3), (2, 5))


def theirs_model():
    from transformers import Qwen2_5_VLTextConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

    config = Qwen2_5_VLTextConfig(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        bos_token_id=0,
        eos_token_id=1,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        attn_implementation="eager",
    )
    model = Qwen2_5_VLTextModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too, so that nothing is tested at zero or one
            parameter.normal_(std=0.3).add_(1.0 if parameter.ndim == 1 and parameter.shape[0] == 64 else 0.0)
    return model


def ours_model(theirs, **changes):
    config = TransformerConfig(
        text_size=50, codebook_size=20, code_dim=6, start_id=0, end_id=1, width=64, num_layers=3, num_heads=4,
        num_kv_heads=2, head_dim=16, mlp_width=96, rope_theta=1e4, rope_sections=(2, 3, 3), **changes,
    )  # fmt: skip
    model = Transformer(config)
    state = {f"model.language_model.{key}": value for key, value in theirs.state_dict().items()}
    state["lm_head.weight"] = torch.randn(50, 64)
    model.load_state_dict(from_qwen2_5_vl(state, model.state_dict(), config))
    return model


def packed_rows(vocabulary):
    def image(grids):
        return ImageSegment(grids=grids, codes=torch.randint(0, 20, (sum(h * w for h, w in grids),)))

    def text(length):
        return TextSegment(ids=torch.randint(2, 50, (length,)).tolist())

    documents = [
        Document(segments=(text(5), image(SQUARE), text(2), image(WIDE))),
        Document(segments=(image(WIDE), text(3))),
        Document(segments=(text(4),)),
    ]
    return lay_out([documents[:2], documents[2:]], vocabulary, LayoutConfig(alpha=0.9))


@pytest.mark.parametrize("seed", [0, 1])
def test_hidden_states_equal_hugging_face(seed):
    """Image-block mask, packs, padding, grouped heads, fractional positions on three axes."""
    torch.manual_seed(seed)
    theirs = theirs_model()
    ours = ours_model(theirs)
    rows = packed_rows(ours.vocabulary)
    assert (rows.position_3BL % 1 != 0).any() and (rows.document_BL == -1).any()
    mask = torch.zeros_like(rows.visible_BLL()[:, None], dtype=torch.float32)
    mask.masked_fill_(~rows.visible_BLL()[:, None], float("-inf"))
    with torch.no_grad():
        ours_BLW = ours(rows)
        theirs_BLW = theirs(
            inputs_embeds=ours.embed(rows),
            attention_mask={"full_attention": mask},
            position_ids=rows.position_3BL,
            use_cache=False,
        ).last_hidden_state
    difference = (ours_BLW - theirs_BLW).abs().max().item()
    print(f"largest difference to Hugging Face's hidden states: {difference:.2e} of {theirs_BLW.abs().max():.1f}")
    torch.testing.assert_close(ours_BLW, theirs_BLW, rtol=1e-4, atol=1e-4)


def test_text_equals_hugging_face_from_ids():
    """Plain text through embedding, causal mask and integer positions."""
    torch.manual_seed(2)
    theirs = theirs_model()
    ours = ours_model(theirs)
    ids = torch.randint(2, 50, (9,)).tolist()
    rows = lay_out([[Document(segments=(TextSegment(ids=ids),))]], ours.vocabulary, LayoutConfig())
    with torch.no_grad():
        theirs_BLW = theirs(input_ids=torch.tensor([[0, *ids]]), use_cache=False).last_hidden_state
        torch.testing.assert_close(ours(rows), theirs_BLW, rtol=1e-4, atol=1e-4)
