"""rFID with a local file in torch-fidelity's format (random weights): the formula, no download, errors that name the file."""

import socket
from pathlib import Path

import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from nextflow.evaluation.inception import load_inception
from nextflow.evaluation.reconstruction import ReconstructionMetrics
from nextflow.models.tokenizer.usage import CodebookUsage

GRIDS = ((1, 1),)


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights under the names of torch-fidelity's network."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    with pytest.MonkeyPatch.context() as patch:
        # the constructor has no way to leave weights out: hand it its own
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        torch.save({}, path)
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(path))
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)


def _metrics(inception: torch.nn.Module) -> ReconstructionMetrics:
    metrics = ReconstructionMetrics(CodebookUsage(2, 4), 4)
    metrics.inception = inception
    return metrics


def _add(metrics: ReconstructionMetrics, images_BCHW: torch.Tensor, decoded_BCHW: torch.Tensor, split: str) -> None:
    """Adds reconstructions given as bytes."""
    codes_BN = torch.zeros(len(images_BCHW), 1, dtype=torch.int64)
    metrics.update(
        images_BCHW=images_BCHW,
        decoded_BCHW=decoded_BCHW / 127.5 - 1,
        codes_BN=codes_BN,
        grids=GRIDS,
        split=split,
        level=32,
    )


def _frechet(a_ND: torch.Tensor, b_ND: torch.Tensor) -> float:
    """The formula; with centred features as rows, tr sqrt(cov_a cov_b) is the sum of the singular values of A B^T."""
    mean = (a_ND.mean(0) - b_ND.mean(0)).square().sum()
    a_ND, b_ND = ((x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (a_ND, b_ND))
    return float(mean + a_ND.square().sum() + b_ND.square().sum() - 2 * torch.linalg.svdvals(a_ND @ b_ND.T).sum())


def test_features_are_torch_fidelitys_and_nothing_is_downloaded(inception_file, no_network):
    images = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(inception_file))
    inception = load_inception(inception_file)
    assert torch.equal(inception(images), network(images)[0]) and inception.num_features == 2048
    assert not inception.train(True).training and not any(p.requires_grad for p in inception.parameters())


class _Pixels(torch.nn.Module):
    """A network with few features, for which distances are quick."""

    num_features = 12

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        assert images_BCHW.dtype == torch.uint8
        return torch.nn.functional.adaptive_avg_pool2d(images_BCHW.float(), 2).flatten(1)


def test_rfid_is_the_formula_over_all_batches_of_a_split():
    images = torch.randint(0, 256, (40, 3, 16, 16), dtype=torch.uint8)
    darker = (images * 0.9).byte()
    metrics = _metrics(_Pixels())
    _add(metrics, images, images, "equal")
    _add(metrics, images[:30], darker[:30], "darker")
    _add(metrics, images[30:], darker[30:], "darker")
    _add(metrics, images[:1], images[:1], "single")
    with pytest.warns(UserWarning) as caught:
        result = metrics.compute("cpu")
    assert [group.split for group in result.groups] == ["darker", "equal", "single"]
    network = _Pixels()
    expected = _frechet(network(images).double(), network(darker).double())
    assert result.groups[0].rfid == pytest.approx(expected, rel=1e-4) and expected > 1
    assert result.groups[1].rfid == pytest.approx(0, abs=1e-3)
    assert result.groups[2].rfid is None
    warned = " ".join(str(warning.message) for warning in caught)
    assert "darker, level 32 comes from 40 images, fewer than its 2048 features" in warned
    assert "single, level 32 is left out: it needs two images, there is 1" in warned
    assert result.levels[0].rfid is None  # of three splits together it is not measured
    assert "test/rfid/32/darker" in result.logged("test") and "test/rfid/32" not in result.logged("test")


def test_a_single_split_gives_the_levels_rfid():
    images = torch.randint(0, 256, (20, 3, 16, 16), dtype=torch.uint8)
    metrics = _metrics(_Pixels())
    _add(metrics, images, (images * 0.9).byte(), "mine")
    with pytest.warns(UserWarning, match="20 images"):
        result = metrics.compute("cpu")
    assert result.logged("test")["test/rfid/32"] == result.groups[0].rfid > 1


def test_errors_name_the_key_and_the_file(inception_file, tmp_path, no_network):
    names = r"model.evaluation.inception_weights: .*weights-inception-2015-12-05-6726825d.pth"
    for path in (None, tmp_path / "nothing.pth"):
        with pytest.raises(FileNotFoundError, match=names):
            load_inception(path)
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "other.pth")
    (tmp_path / "broken.pth").write_bytes(b"no weights")
    torch.save(Path("code"), tmp_path / "code.pth")  # an object that unpickling would have to build
    for name in ("other.pth", "broken.pth", "code.pth"):
        with pytest.raises(ValueError, match=names):
            load_inception(tmp_path / name)
