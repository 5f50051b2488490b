"""nearest_code == the distance matrix, whatever the implementation and its tiles; ties; top-k with distances; memory."""

import os
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import nextflow.kernels
from nextflow.kernels import codebook
from nextflow.kernels.codebook import nearest_code, nearest_code_ref, nearest_codes


def _case(num_vectors, num_entries, semantic, pixel, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((num_vectors, semantic), (num_vectors, pixel), (num_entries, semantic), (num_entries, pixel))
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.fixture(params=[1, 2**10, 2**20])
def tile_elements(request, monkeypatch):
    """Tiles of one vector by one window, of several, and one tile for everything."""
    monkeypatch.setattr(codebook, "TILE_ELEMENTS", {"cpu": request.param})
    monkeypatch.setattr(codebook, "TILE_ENTRIES", 128)


@pytest.mark.parametrize(
    "shape", [(1, 1, 3, 2), (37, 101, 5, 3), (64, 257, 0, 8), (13, 50, 32, 8), (130, 128, 17, 0), (0, 5, 3, 3)]
)
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.3, 2.0), (0.0, 1.0)])
@pytest.mark.usefixtures("tile_elements")
def test_equals_reference(shape, weights):
    case = _case(*shape)
    assert torch.equal(nearest_code(*case, *weights), nearest_code_ref(*case, *weights))


@pytest.mark.usefixtures("tile_elements")
def test_lowest_index_wins_ties():
    entries = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 1.0], [2.0, 0.0]] * 50)
    vectors = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    assert nearest_code(torch.empty(3, 0), vectors, torch.empty(200, 0), entries).tolist() == [0, 1, 1]


@pytest.mark.usefixtures("tile_elements")
def test_a_vector_that_is_no_number_spoils_no_other_and_gets_a_code_that_exists():
    case = _case(5, 70, 4, 4)
    expected = nearest_code_ref(*case)
    case[0][1], case[0][3] = torch.nan, torch.inf
    found = nearest_code(*case)
    assert found[[0, 2, 4]].tolist() == expected[[0, 2, 4]].tolist()
    assert (found < 70).all()


def test_computes_in_fp32_under_autocast():
    semantic, pixel, semantic_codebook, pixel_codebook = _case(200, 300, 16, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found = nearest_code(semantic, pixel, semantic_codebook, pixel_codebook)
    assert torch.equal(found, nearest_code_ref(semantic, pixel, semantic_codebook, pixel_codebook))


class _Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("function", [nearest_code, nearest_codes])
def test_never_holds_the_distance_matrix(monkeypatch, function):
    monkeypatch.setattr(codebook, "TILE_ELEMENTS", {"cpu": 2**14})
    case = _case(1000, 2000, 3, 2)
    with _Largest() as largest:
        function(*case)
    assert largest.elements < 1000 * 2000 / 50


TRITON = """
import itertools, torch
from nextflow.kernels import codebook_triton
from nextflow.kernels.codebook import nearest_code, nearest_code_ref

torch.set_num_threads(1)
shapes = [(1, 1, 3, 2), (37, 101, 5, 3), (64, 257, 0, 8), (13, 50, 32, 8), (65, 129, 17, 0), (70, 300, 16, 8), (0, 5, 3, 3)]
# one program for all entries of a vector, two, and one for each block of them
for shape, (programs, weights) in itertools.product(shapes, {1: (1.0, 1.0), 4: (0.3, 2.0), 1024: (0.0, 1.0)}.items()):
    codebook_triton.PROGRAMS = programs
    N, K, S, P = shape
    case = torch.randn(N, S), torch.randn(N, P), torch.randn(K, S), torch.randn(K, P)
    found = nearest_code(*case, *weights, implementation="triton")
    assert found.dtype == torch.int64 and torch.equal(found, nearest_code_ref(*case, *weights)), (shape, programs)

entries = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 1.0], [2.0, 0.0]] * 100)
vectors = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
for codebook_triton.PROGRAMS in (1, 1024):
    found = nearest_code(torch.empty(3, 0), vectors, torch.empty(400, 0), entries, implementation="triton")
    assert found.tolist() == [0, 1, 1], found
"""


def test_triton_kernel_equals_reference_under_its_interpreter(tmp_path):
    pytest.importorskip("triton")
    # A process of its own: Triton reads the variable once, when the kernel is defined.
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    ran = subprocess.run([sys.executable, "-c", TRITON], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("implementation", ["auto", "triton", "chunked"])
def test_cuda_equals_reference(implementation):
    for shape in ((1, 1, 3, 2), (37, 101, 5, 3), (64, 257, 0, 8), (3000, 4096, 32, 8)):
        case = [part.cuda() for part in _case(*shape)]
        found = nearest_code(*case, implementation=implementation)
        # sums in another order may decide a near-tie otherwise
        assert (found == nearest_code_ref(*case)).float().mean() > 0.999


def test_an_implementation_asked_for_by_name_runs_or_raises():
    case = _case(20, 30, 4, 4)
    assert torch.equal(nearest_code(*case, implementation="reference"), nearest_code(*case, implementation="chunked"))
    with pytest.raises(ValueError, match="none of"):
        nearest_code(*case, implementation="fastest")
    if not os.environ.get("TRITON_INTERPRET"):
        pytest.importorskip("triton")
        with pytest.raises(ValueError, match="needs CUDA tensors"):
            nearest_code(*case, implementation="triton")


def test_works_where_triton_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "nextflow.kernels.codebook_triton", raising=False)
    monkeypatch.delattr(nextflow.kernels, "codebook_triton", raising=False)
    codebook._triton.cache_clear()
    case = _case(20, 30, 4, 4)
    assert torch.equal(nearest_code(*case), nearest_code_ref(*case))
    with pytest.raises(ImportError, match="install triton"):
        nearest_code(*case, implementation="triton")


@pytest.mark.usefixtures("tile_elements")
@pytest.mark.parametrize("top_k", [1, 4, 40])
def test_nearest_codes_are_the_smallest_distances(top_k):
    semantic, pixel, semantic_codebook, pixel_codebook = _case(21, 333, 6, 3)
    found = nearest_codes(semantic, pixel, semantic_codebook, pixel_codebook, 0.7, 1.3, top_k)
    distance_NK = 0.7 * torch.cdist(semantic, semantic_codebook).square()
    distance_NK += 1.3 * torch.cdist(pixel, pixel_codebook).square()
    expected = distance_NK.sort(dim=1)
    assert torch.equal(found.index_NT, expected.indices[:, :top_k])
    torch.testing.assert_close(found.distance_NT, expected.values[:, :top_k], rtol=1e-4, atol=1e-4)


def test_every_entry_can_be_asked_for_and_more_is_an_error():
    case = _case(2, 3, 4, 4)
    assert nearest_codes(*case, top_k=3).index_NT.sort().values.tolist() == [[0, 1, 2]] * 2
    with pytest.raises(ValueError, match="top_k"):
        nearest_codes(*case, top_k=4)
