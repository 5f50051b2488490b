"""Usage, perplexity and errors on codes counted by hand."""

import torch

from nextflow.models.tokenizer.quantizer import DualCodebookQuantizer
from nextflow.models.tokenizer.usage import CodebookUsage


def test_shares_and_perplexities():
    usage = CodebookUsage(num_scales=3, codebook_size=8)
    usage.update(torch.tensor([[0, 1, 2, 3, 1], [0, -1, -1, -1, -1]]), ((1, 1), (2, 2)))
    result = usage.compute()
    torch.testing.assert_close(result.share, torch.tensor(4 / 8))
    torch.testing.assert_close(result.share_S, torch.tensor([1 / 8, 3 / 8, 0.0]))
    torch.testing.assert_close(result.perplexity_S[0], torch.tensor(1.0))
    expected = torch.tensor([0.5, 0.25, 0.25])
    torch.testing.assert_close(result.perplexity_S[1], (-(expected * expected.log()).sum()).exp())
    torch.testing.assert_close(result.perplexity_S[2], torch.tensor(1.0))


def test_errors_are_those_of_the_search_averaged_over_codes():
    torch.manual_seed(0)
    quantizer = DualCodebookQuantizer(30, 4, 2).eval()
    grids, shorter = ((1, 1), (2, 2), (3, 3)), ((1, 1), (2, 2))
    usage, distances = CodebookUsage(num_scales=4, codebook_size=30), [[], [], []]
    for features, of_image in ((torch.randn(5, 6, 3, 3), grids), (torch.randn(2, 6, 2, 2), shorter)):
        encoding = quantizer.encode(features, of_image)
        usage.update(encoding.target_codes_BN, of_image, encoding.error_S2)
        for scale, step in quantizer.scales(features, of_image):
            distances[scale].append((step.vectors_NC - step.entries_NC).square().detach())
    result = usage.compute()
    for scale, of_scale in enumerate(torch.cat(values) for values in distances):
        torch.testing.assert_close(result.error_semantic_S[scale], of_scale[:, :4].sum(1).mean())
        torch.testing.assert_close(result.error_pixel_S[scale], of_scale[:, 4:].sum(1).mean())
    assert result.error_pixel_S[3].isnan()


def test_there_is_no_semantic_error_without_a_semantic_part():
    encoding = DualCodebookQuantizer(30, 0, 2).eval().encode(torch.randn(5, 2, 2, 2), ((1, 1), (2, 2)))
    assert encoding.error_S2[:, 0].isnan().all() and (encoding.error_S2[:, 1] > 0).all()
