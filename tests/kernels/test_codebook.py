"""nearest_code == the distance matrix, whatever the chunks; ties; top-k with distances."""

import pytest
import torch

from nextflow.kernels import codebook
from nextflow.kernels.codebook import nearest_code, nearest_code_ref, nearest_codes


def _case(num_vectors, num_entries, semantic, pixel, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((num_vectors, semantic), (num_vectors, pixel), (num_entries, semantic), (num_entries, pixel))
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("shape", [(1, 1, 3, 2), (37, 101, 5, 3), (64, 257, 0, 8), (13, 50, 32, 8)])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.3, 2.0), (0.0, 1.0)])
@pytest.mark.parametrize("chunk_elements", [1, 500, 1 << 24])
def test_equals_reference(monkeypatch, shape, weights, chunk_elements):
    monkeypatch.setattr(codebook, "CHUNK_ELEMENTS", chunk_elements)
    case = _case(*shape)
    assert torch.equal(nearest_code(*case, *weights), nearest_code_ref(*case, *weights))


@pytest.mark.parametrize("chunk_elements", [1, 1 << 24])
def test_lowest_index_wins_ties(monkeypatch, chunk_elements):
    monkeypatch.setattr(codebook, "CHUNK_ELEMENTS", chunk_elements)
    entries = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 1.0], [2.0, 0.0]])
    vectors = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    empty = torch.empty(3, 0), torch.empty(4, 0)
    assert nearest_code(empty[0], vectors, empty[1], entries).tolist() == [0, 1, 1]


def test_computes_in_fp32_under_autocast():
    semantic, pixel, semantic_codebook, pixel_codebook = _case(200, 300, 16, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found = nearest_code(semantic, pixel, semantic_codebook, pixel_codebook)
    assert torch.equal(found, nearest_code_ref(semantic, pixel, semantic_codebook, pixel_codebook))


@pytest.mark.parametrize("chunk_elements", [1, 300, 1 << 24])
@pytest.mark.parametrize("top_k", [1, 4, 40])
def test_nearest_codes_are_the_smallest_distances(monkeypatch, chunk_elements, top_k):
    monkeypatch.setattr(codebook, "CHUNK_ELEMENTS", chunk_elements)
    semantic, pixel, semantic_codebook, pixel_codebook = _case(21, 40, 6, 3)
    found = nearest_codes(semantic, pixel, semantic_codebook, pixel_codebook, 0.7, 1.3, top_k)
    distance_NK = 0.7 * torch.cdist(semantic, semantic_codebook).square()
    distance_NK += 1.3 * torch.cdist(pixel, pixel_codebook).square()
    expected = distance_NK.sort(dim=1)
    assert torch.equal(found.index_NT, expected.indices[:, :top_k])
    torch.testing.assert_close(found.distance_NT, expected.values[:, :top_k], rtol=1e-4, atol=1e-4)


def test_more_neighbours_than_entries_is_an_error():
    with pytest.raises(ValueError, match="top_k"):
        nearest_codes(*_case(2, 3, 4, 4), top_k=4)
