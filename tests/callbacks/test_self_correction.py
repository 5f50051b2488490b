"""Self-correction in training: settings are functions of the step, draws of the image; from pixels and from stored codes."""

import lightning as L
import pytest
import torch

from nextflow.callbacks.self_correction import Ramp, SelfCorrection
from nextflow.datamodules.batches import PackedBatch
from nextflow.datamodules.packs import Filling, Item, Packs
from nextflow.datamodules.streams import Place, Read
from nextflow.lightning_modules.encoding import rows_with_codes
from nextflow.lightning_modules.pretraining import PretrainingModule
from nextflow.lightning_modules.tokenizer import TokenizerModule, to_signed
from nextflow.models.tokenizer.config import PixelConfig, TokenizerConfig
from nextflow.models.transformer.config import DecoderConfig
from nextflow.sequence.correction import CorrectedCodes, Correction
from nextflow.sequence.documents import Document, ImageSegment
from nextflow.sequence.image_layout import LayoutConfig
from nextflow.sequence.scales import ScaleSchedule
from nextflow.sequence.text_tokenizer import train_text_tokenizer

SCHEDULE = ScaleSchedule(sides=(1, 2, 4), levels={16: 2, 32: 3}, stride=8, base_grids=((2, 8), (4, 4), (8, 2)))
DECODER = DecoderConfig(
    width=32, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=48, rope_sections=(2, 1, 1), max_scales=4
)
WIDE = SelfCorrection(probability=0.5, fraction=0.6, temperature=10.0, seed=5)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def module(tmp_path_factory) -> PretrainingModule:
    """A transformer over a tokenizer that was never trained."""
    folder = tmp_path_factory.mktemp("self_correction")
    train_text_tokenizer(["a red dog"], folder / "text", size=260)
    torch.manual_seed(0)
    pixel = PixelConfig(width=8, multipliers=(1, 1, 1, 1), num_blocks=1, latent_width=8, groups=4, attention=False)
    config = TokenizerConfig(schedule=SCHEDULE, codebook_size=64, pixel_dim=4, semantic=None, pixel=pixel)
    run = L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", max_steps=1)
    run.strategy.connect(TokenizerModule(config, stage="pixel"))
    run.save_checkpoint(folder / "tokenizer.ckpt")
    return PretrainingModule(
        transformer=DECODER,
        tokenizer=str(folder / "tokenizer.ckpt"),
        text_tokenizer=str(folder / "text"),
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1),
    )


PIXELS = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


def batch(module: PretrainingModule, pictures: range | list[int], stored: str = "") -> PackedBatch:
    """Documents of two pictures, of which the first is not trained on: as pixels, or as plain or corrected codes."""
    grids = SCHEDULE.grids(32)
    packs = Packs(
        Filling(packing="padded", batch_size=len(pictures)),
        vocabulary=module.config.vocabulary,
        layout=LayoutConfig(),
        level=32,
        split="train",
    )
    made = None
    for number in pictures:
        pixels = [PIXELS[number], PIXELS[number].flip(-1)]
        segments = [ImageSegment(grids=grids, loss=loss) for loss in (False, True)]
        if stored:
            codes = module.encode(pixels, [grids] * 2)
            pair = CorrectedCodes(codes[1] * 0 + 7, codes[1] * 0 + 9) if stored == "corrected" else None
            segments = [
                ImageSegment(grids=grids, codes=codes[0], loss=False),
                ImageSegment(grids=grids, codes=codes[1], corrected=pair),
            ]
            pixels = []
        item = Item(Document(segments=tuple(segments)), pixels, 45, 0.0, f"d{number}", "drawings")
        made = packs.add(Read(Place(0, 0, number), item)) or made
    assert made is not None
    return made


def filled(module: PretrainingModule, made: PackedBatch, correction: Correction | None):
    """Codes fed and target codes [documents, 2, N]."""
    rows = rows_with_codes(made, module.tokenizer, module.config.vocabulary.code_offset, correction, CPU)
    shape = (made.num_documents, 2, -1)
    return rows, rows.input_code_N.view(shape), rows.code_N.view(shape)


def test_ramps_are_functions_of_the_step() -> None:
    ramp = Ramp(start=0.2, end=0.8, first_step=10, num_steps=4)
    assert [ramp.at(step) for step in (0, 10, 11, 13, 14, 99)] == pytest.approx([0.2, 0.2, 0.35, 0.65, 0.8, 0.8])
    callback = SelfCorrection(
        probability=Ramp(start=0, end=1, first_step=2, num_steps=2), top_k=Ramp(start=1, end=9), seed=3
    )
    assert callback.correction_at(2) is None
    assert callback.correction_at(3).probability == 0.5 and callback.correction_at(9).top_k == 9
    again = SelfCorrection(probability=callback.probability, top_k=callback.top_k, seed=3)
    assert callback.correction_at(3) == again.correction_at(3)
    assert callback.correction_at(4).seed != callback.correction_at(5).seed
    with pytest.raises(ValueError, match="between 0 and 1"):
        SelfCorrection(fraction=Ramp(start=0.5, end=1.5))


def test_pixels_are_corrected_where_they_are_trained_on(module) -> None:
    correction = WIDE.correction_at(3)
    rows, fed, target = filled(module, batch(module, range(8)), correction)
    plain = filled(module, batch(module, range(8)), None)[1]
    assert torch.equal(fed[:, 0], plain[:, 0]) and torch.equal(target[:, 0], plain[:, 0])  # `loss: false`
    corrected = (fed[:, 1] != plain[:, 1]).any(-1)
    assert 0 < corrected.sum() < 8  # probability 0.5
    assert torch.equal(fed[~corrected, 1], target[~corrected, 1])
    # The first target is the image's; a later one is the nearest to what the fed codes before it leave.
    assert torch.equal(target[:, 1, :1], plain[:, 1, :1]) and (target[corrected, 1] != plain[corrected, 1]).any()
    offset = module.config.vocabulary.code_offset
    assert torch.equal(rows.target_BL.flatten()[rows.code_position_N].view(8, 2, -1)[:, 1], target[:, 1] + offset)


def test_draws_do_not_depend_on_the_batch(module) -> None:
    """Half batches, as accumulation and ranks make them, and any order."""
    correction = WIDE.correction_at(3)
    _, whole, _ = filled(module, batch(module, range(8)), correction)
    for part in ([0, 1, 2, 3], [7, 4, 6, 5]):
        assert torch.equal(filled(module, batch(module, part), correction)[1], whole[part])
    assert not torch.equal(filled(module, batch(module, range(8)), WIDE.correction_at(4))[1], whole)
    # And are those of the tokenizer for this name.
    names = [f"drawings/d{number}.1" for number in range(8)]
    images = to_signed(PIXELS.flip(-1))
    encoding = module.tokenizer.encode(images, SCHEDULE.grids(32), correction, correction.seeds(names))
    assert torch.equal(encoding.input_codes_BN, whole[:, 1])


def test_stored_codes_are_used_with_the_probability(module) -> None:
    made = batch(module, range(8), "corrected")
    plain = filled(module, made, None)[1]
    assert (plain != 7).any()  # without the callback nothing changes
    shares = []
    for probability in (0.25, 0.5, 1.0):
        correction = Correction(probability=probability, seed=1)
        _, fed, target = filled(module, made, correction)
        corrected = (fed[:, 1] == 7).all(-1)
        assert torch.equal(corrected, (target[:, 1] == 9).all(-1))
        assert torch.equal(fed[:, 0], plain[:, 0]) and torch.equal(fed[~corrected, 1], plain[~corrected, 1])
        shares.append(int(corrected.sum()))
    assert 0 < shares[0] <= shares[1] < shares[2] == 8
    with pytest.raises(ValueError, match=r"model\.correction"):
        filled(module, batch(module, range(2), "plain"), correction)


def fit(module, folder, max_steps: int, ckpt_path=None, loader=None, accumulate: int = 1):
    torch.manual_seed(0)
    module.transformer = None
    trainer = L.Trainer(
        max_steps=max_steps, accelerator="cpu", logger=False, enable_checkpointing=False, log_every_n_steps=1,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, num_sanity_val_steps=0,
        accumulate_grad_batches=accumulate, callbacks=[SelfCorrection(temperature=10.0)],
    )  # fmt: skip
    module.total_steps = 3
    loader = torch.utils.data.DataLoader(loader, batch_size=None)
    trainer.fit(module, loader, loader if ckpt_path is None else None, ckpt_path=ckpt_path)
    return trainer


def test_interrupted_accumulated_and_straight_runs_are_equal(module, tmp_path) -> None:
    whole = [batch(module, range(first, first + 2)) for first in (0, 2, 4)]
    straight = fit(module, tmp_path, 3, loader=whole)
    weights = {key: value.clone() for key, value in module.transformer.state_dict().items()}
    assert 0.2 < straight.callback_metrics["train/corrected_codes"] < 0.6
    assert module.correction is None  # validation, behind it, is not corrected

    halves = [batch(module, [number]) for number in range(6)]
    fit(module, tmp_path, 3, loader=halves, accumulate=2)
    for key, value in module.transformer.state_dict().items():
        torch.testing.assert_close(value, weights[key], rtol=1e-5, atol=1e-6)

    fit(module, tmp_path, 2, loader=whole).save_checkpoint(tmp_path / "half.ckpt")
    fit(module, tmp_path, 3, tmp_path / "half.ckpt", loader=whole[2:])
    assert all(torch.equal(value, weights[key]) for key, value in module.transformer.state_dict().items())
