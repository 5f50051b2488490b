"""apply_rope == its reference; rope_cos_sin == Hugging Face's Qwen2.5-VL, fractional positions included."""

import pytest
import torch

from nextflow.kernels.rope import apply_rope, apply_rope_ref, rope_cos_sin


@pytest.mark.parametrize(
    ("B", "H", "L", "sections"), [(2, 4, 16, (2, 3, 3)), (1, 3, 7, (1, 1, 1)), (3, 1, 1, (5, 2, 4))]
)
def test_equals_reference_forward_and_backward(B, H, L, sections):
    D = 2 * sum(sections)
    position_3BL = torch.rand(3, B, L) * 30
    rotation = rope_cos_sin(position_3BL, D, 1e4, sections)
    # Strides as in the model: heads transposed, a slice of a larger projection.
    storage = torch.randn(B, L, H + 2, D)
    x = storage.transpose(1, 2)[:, :H].detach().requires_grad_()
    y = x.detach().clone().requires_grad_()
    weight = torch.randn(B, H, L, D)
    out, ref = apply_rope(x, *rotation), apply_rope_ref(y, *rotation)
    torch.testing.assert_close(out, ref)
    (out * weight).sum().backward()
    (ref * weight).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_angles_equal_hugging_face():
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding

    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    config = Qwen2_5_VLTextConfig(hidden_size=256, num_attention_heads=2, rope_parameters=rope)
    position_3BL = torch.rand(3, 2, 9) * 20
    cos, sin = Qwen2_5_VLRotaryEmbedding(config)(torch.zeros(1), position_3BL)
    ours = rope_cos_sin(position_3BL, 128)
    torch.testing.assert_close(torch.cat((ours.cos_BLE, ours.cos_BLE), -1), cos)
    torch.testing.assert_close(torch.cat((ours.sin_BLE, ours.sin_BLE), -1), sin)


def test_scores_depend_on_position_differences_alone():
    q, k = torch.randn(2, 1, 1, 1, 16)
    a, b = torch.rand(2, 3, 1, 1) * 10

    def score(shift):
        rotated = [apply_rope(x, *rope_cos_sin(p + shift, 16, 1e4, (2, 3, 3))) for x, p in ((q, a), (k, b))]
        return (rotated[0] * rotated[1]).sum()

    torch.testing.assert_close(score(0.0), score(7.5), rtol=1e-4, atol=1e-4)


def test_wrong_sections_name_the_key():
    with pytest.raises(ValueError, match="rope_sections"):
        rope_cos_sin(torch.zeros(3, 1, 1), 16, 1e4, (2, 2, 2))
