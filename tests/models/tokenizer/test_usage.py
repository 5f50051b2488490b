"""Usage and perplexity on codes counted by hand."""

import torch

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
