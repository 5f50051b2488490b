"""The quantiser == a plain loop written from the paper's text; scale dropout; look-up; self-correction."""

import pytest
import torch
import torch.nn.functional as F

from nextflow.models.tokenizer.quantizer import Correction, DualCodebookQuantizer
from nextflow.sequence.scales import num_codes_of

SQUARE = ((1, 1), (2, 2), (3, 3), (5, 5), (8, 8))
WIDE = ((1, 1), (1, 3), (2, 5), (4, 9))
SEMANTIC, PIXEL, ENTRIES = 6, 4, 50


def _quantizer(semantic_dim=SEMANTIC, **options) -> DualCodebookQuantizer:
    torch.manual_seed(0)
    return DualCodebookQuantizer(ENTRIES, semantic_dim, PIXEL, **options).eval()


def _features(grids, semantic_dim=SEMANTIC, images=3):
    height, width = grids[-1]
    return torch.randn(images, semantic_dim + PIXEL, height, width, generator=torch.Generator().manual_seed(1))


def _by_the_paper(quantizer, features, grids, keep, w_sem, w_pix, beta=0.25):
    """Image by image, scale by scale, cell by cell."""
    split = quantizer.semantic_dim
    semantic = F.normalize(quantizer.semantic_codebook.detach(), dim=1) if split else torch.zeros(ENTRIES, 0)
    pixel = F.normalize(quantizer.pixel_codebook.detach(), dim=1)
    sums, codes = [], []
    squared = {scale: [] for scale in range(len(grids)) if keep[scale]}
    for image in features:
        residual, total, image_codes = image.clone(), torch.zeros_like(image), []
        for scale, (height, width) in enumerate(grids):
            if not keep[scale]:
                image_codes += [-1] * (height * width)
                continue
            small = F.interpolate(residual[None], size=(height, width), mode="area")[0]
            chosen = torch.zeros_like(small)
            for row in range(height):
                for column in range(width):
                    z_sem, z_pix = small[:split, row, column], small[split:, row, column]
                    z_sem = z_sem / z_sem.norm() if split else z_sem
                    z_pix = z_pix / z_pix.norm()
                    distance = [
                        w_sem * ((z_sem - semantic[i]) ** 2).sum() + w_pix * ((z_pix - pixel[i]) ** 2).sum()
                        for i in range(ENTRIES)
                    ]
                    code = int(torch.stack(distance).argmin())
                    image_codes.append(code)
                    chosen[:, row, column] = torch.cat([semantic[code], pixel[code]])
                    squared[scale].append((torch.cat([z_sem, z_pix]) - chosen[:, row, column]) ** 2)
            large = F.interpolate(chosen[None], size=grids[-1], mode="bicubic")[0]
            total, residual = total + large, residual - large
        sums.append(total)
        codes.append(image_codes)
    loss = torch.stack([torch.cat(values).mean() for values in squared.values()]).mean()
    return torch.stack(sums), torch.tensor(codes), loss, beta * loss


@pytest.mark.parametrize("grids", [SQUARE, WIDE], ids=["square", "wide"])
@pytest.mark.parametrize("semantic_dim", [SEMANTIC, 0])
@pytest.mark.parametrize("dropped", [(), (1, 3)])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, 2.0)])
def test_equals_the_plain_loop(grids, semantic_dim, dropped, weights):
    quantizer = _quantizer(semantic_dim, semantic_weight=weights[0], pixel_weight=weights[1])
    features = _features(grids, semantic_dim)
    keep = [scale not in dropped for scale in range(len(grids))]
    output = quantizer(features, grids, keep)
    quantized, codes, codebook_loss, commitment_loss = _by_the_paper(quantizer, features, grids, keep, *weights)
    assert torch.equal(output.indices, codes)
    torch.testing.assert_close(output.quantized, quantized, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output.codebook_loss, codebook_loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.commitment_loss, commitment_loss, rtol=1e-4, atol=1e-5)


def test_the_first_scale_is_never_dropped():
    quantizer, features = _quantizer(), _features(SQUARE)
    nothing_kept = quantizer(features, SQUARE, [False] * 5)
    first_kept = quantizer(features, SQUARE, [True, False, False, False, False])
    assert torch.equal(nothing_kept.quantized, first_kept.quantized)
    assert (nothing_kept.indices[:, 0] >= 0).all() and (nothing_kept.indices[:, 1:] == -1).all()


@pytest.mark.parametrize("grids", [SQUARE, WIDE], ids=["square", "wide"])
@pytest.mark.parametrize("normalize", [True, False])
def test_codes_reconstruct_what_forward_returns(grids, normalize):
    quantizer, features = _quantizer(normalize=normalize), _features(grids)
    output = quantizer(features, grids)
    encoding = quantizer.encode(features, grids)
    assert torch.equal(encoding.target_codes_BN, output.indices)
    assert torch.equal(encoding.input_codes_BN, output.indices)
    torch.testing.assert_close(quantizer.reconstruct(output.indices, grids), output.quantized, rtol=1e-4, atol=1e-5)
    first_two = quantizer(features, grids, [True, True] + [False] * (len(grids) - 2)).quantized
    torch.testing.assert_close(quantizer.reconstruct(output.indices, grids, 2), first_two, rtol=1e-4, atol=1e-5)


def test_lookup_gives_the_normalised_entries_semantic_first():
    quantizer = _quantizer()
    codes = torch.tensor([[3, 7], [0, 49]])
    vectors = quantizer.lookup(codes)
    torch.testing.assert_close(vectors[..., :SEMANTIC], F.normalize(quantizer.semantic_codebook[codes], dim=-1))
    torch.testing.assert_close(vectors[..., SEMANTIC:], F.normalize(quantizer.pixel_codebook[codes], dim=-1))


def test_gradients_pass_straight_through_and_reach_both_codebooks():
    quantizer, features = _quantizer(), _features(WIDE).requires_grad_()
    output = quantizer(features, WIDE)
    weight = torch.randn_like(features)
    (gradient,) = torch.autograd.grad((output.quantized * weight).sum(), features, retain_graph=True)
    torch.testing.assert_close(gradient, weight)
    output.codebook_loss.backward(retain_graph=True)
    assert features.grad is None
    assert quantizer.semantic_codebook.grad.abs().sum() > 0 and quantizer.pixel_codebook.grad.abs().sum() > 0
    quantizer.zero_grad()
    output.commitment_loss.backward()
    assert quantizer.semantic_codebook.grad is None and features.grad.abs().sum() > 0


def test_residual_loss_is_what_the_scales_leave_and_pulls_features_alone():
    quantizer, features = _quantizer(), _features(SQUARE).requires_grad_()
    output = quantizer(features, SQUARE)
    left = features - quantizer.reconstruct(output.indices, SQUARE)
    torch.testing.assert_close(output.residual_loss, left.square().mean())
    (gradient,) = torch.autograd.grad(output.residual_loss, features, retain_graph=True)
    torch.testing.assert_close(gradient, 2 * left.detach() / left.numel())  # the quantised sum is a constant target
    assert torch.autograd.grad(output.residual_loss, quantizer.pixel_codebook, allow_unused=True) == (None,)


def test_residual_loss_keeps_features_within_reach_of_unit_entries():
    """Features thirty times an entry's length make every scale choose alike; a few steps on the loss bring them back."""
    quantizer = _quantizer()
    features = (30 * F.normalize(_features(SQUARE), dim=1)).requires_grad_()
    optimizer = torch.optim.SGD([features], lr=0.2 * features.numel())
    for _ in range(20):
        optimizer.zero_grad()
        quantizer(features, SQUARE).residual_loss.backward()
        optimizer.step()
    assert features.norm(dim=1).mean() < len(SQUARE) * 2**0.5  # the longest sum of entries of two unit parts


def test_fp32_under_autocast():
    quantizer, features = _quantizer(), _features(SQUARE)
    plain = quantizer(features, SQUARE, entropy=True)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = quantizer(features, SQUARE, entropy=True)
    assert mixed.quantized.dtype == torch.float32
    for a, b in zip(plain, mixed):
        assert torch.equal(a, b)


@pytest.mark.parametrize("correction", [Correction(fraction=0.0), Correction(probability=0.0), Correction(top_k=1)])
def test_correction_that_changes_nothing(correction):
    quantizer, features = _quantizer(), _features(SQUARE)
    plain = quantizer.encode(features, SQUARE)
    corrected = quantizer.encode(features, SQUARE, correction, correction.seeds(range(len(features))))
    assert torch.equal(plain.input_codes_BN, corrected.input_codes_BN)
    assert torch.equal(plain.target_codes_BN, corrected.target_codes_BN)


def test_the_residual_follows_the_fed_codes_and_targets_stay_nearest():
    quantizer, features = _quantizer(), _features(SQUARE)
    correction = Correction(fraction=0.6, top_k=5, temperature=10.0)
    seed_B = correction.seeds(range(len(features)))
    encoding = quantizer.encode(features, SQUARE, correction, seed_B)
    alone = quantizer.encode(features[1:], SQUARE, correction, seed_B[1:])
    assert torch.equal(encoding.input_codes_BN[1:], alone.input_codes_BN)  # an image's draws are its own
    with pytest.raises(ValueError, match="a seed for each image"):
        quantizer.encode(features, SQUARE, correction)

    residual, start = features.clone(), 0
    for height, width in SQUARE:
        small = F.interpolate(residual, size=(height, width), mode="area").permute(0, 2, 3, 1).flatten(1, 2)
        z = torch.cat([F.normalize(part, dim=-1) for part in small.split([SEMANTIC, PIXEL], dim=-1)], dim=-1)
        distance = (z[:, :, None] - quantizer.entries_KC()).square().sum(-1)
        target = encoding.target_codes_BN[:, start : start + height * width]
        fed = encoding.input_codes_BN[:, start : start + height * width]
        assert torch.equal(distance.argmin(-1), target)
        rank = (distance < distance.gather(-1, fed[..., None])).sum(-1)
        assert (rank < 5).all()
        assert ((fed != target).sum(1) <= round(0.6 * height * width)).all()
        chosen = quantizer.lookup(fed).mT.unflatten(-1, (height, width))
        residual = residual - F.interpolate(chosen, size=SQUARE[-1], mode="bicubic")
        start += height * width
    changed = (encoding.input_codes_BN != encoding.target_codes_BN).float().mean()
    assert 0.3 < changed < 0.6


def test_sizes_that_do_not_fit_are_errors():
    quantizer = _quantizer()
    with pytest.raises(ValueError, match="last grid"):
        quantizer(_features(WIDE), SQUARE)
    with pytest.raises(ValueError, match="do not fill"):
        quantizer.reconstruct(torch.zeros(1, 3, dtype=torch.int64), SQUARE)
    with pytest.raises(ValueError, match="too many"):
        quantizer.reconstruct(torch.zeros(1, num_codes_of(SQUARE) + 1, dtype=torch.int64), SQUARE)
