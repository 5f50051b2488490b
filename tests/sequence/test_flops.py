"""The FLOPs model against torch's counter on the real transformer, the visibility law, and the paper's own totals."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nextflow.generation.engine import Decoding
from nextflow.generation.requests import GenerationRequest
from nextflow.generation.sampling import SamplingConfig
from nextflow.models.transformer.config import TransformerConfig
from nextflow.models.transformer.model import Transformer
from nextflow.sequence.documents import Document, ImageSegment, TextSegment
from nextflow.sequence.flops import (
    DecoderShape,
    FlopsModel,
    Work,
    document_work,
    generation_work,
    paper_flops,
    paper_generation_flops,
    visible_pairs,
)
from nextflow.sequence.image_layout import LayoutConfig
from nextflow.sequence.layout import lay_out
from nextflow.sequence.packing import document_length
from nextflow.sequence.scales import ScaleSchedule

SQUARE = ((1, 1), (2, 2), (3, 3), (4, 4))
WIDE = ((1, 1), (1, 3), (2, 5))


def tiny(**changes):
    torch.manual_seed(0)
    config = TransformerConfig(
        text_size=30, codebook_size=25, code_dim=6, start_id=0, end_id=1, width=32, num_layers=2, num_heads=4, num_kv_heads=2,
        head_dim=8, mlp_width=48, rope_sections=(2, 1, 1), max_scales=5, **changes,
    )  # fmt: skip
    return Transformer(config)


def flops_of(model):
    return FlopsModel(shape=DecoderShape.of(model.config), vocabulary_size=model.vocabulary.size, code_dim=6)


def image(grids, **changes):
    return ImageSegment(grids=grids, codes=torch.zeros(sum(h * w for h, w in grids), dtype=torch.long), **changes)


def text(length, **changes):
    return TextSegment(ids=[2 + i % 20 for i in range(length)], **changes)


DOCUMENTS = [
    Document(segments=(text(5), image(SQUARE))),
    Document(segments=(image(WIDE, loss=False), text(3))),
    Document(segments=(text(2, loss=False), image(WIDE), text(4), image(SQUARE, loss=False))),
    Document(segments=(image(((1, 1),)),)),
    Document(segments=()),
]


@pytest.mark.parametrize("feed_last_scale", [False, True])
@pytest.mark.parametrize("document", DOCUMENTS)
def test_work_of_a_document_is_what_its_row_holds(document, feed_last_scale):
    rows = lay_out([[document]], tiny().vocabulary, LayoutConfig(feed_last_scale=feed_last_scale))
    work = document_work(document, feed_last_scale=feed_last_scale)
    assert work == Work(
        positions=rows.ids_BL.numel(),
        pairs=int(rows.visible_BLL().sum()),
        cells=rows.input_position_M.numel(),
        targets=int(rows.num_targets),
    )
    assert work.positions == document_length(document, feed_last_scale=feed_last_scale)


def test_works_add_up_in_a_pack():
    rows = lay_out([DOCUMENTS], tiny().vocabulary, LayoutConfig())
    total = sum((document_work(document) for document in DOCUMENTS), Work())
    assert total.pairs == int(rows.visible_BLL().sum())
    assert total.targets == int(rows.num_targets)


def test_visible_pairs_are_those_of_the_law():
    """Rows of different lengths, so one is padded, and padding sees nothing."""
    rows = lay_out([DOCUMENTS, DOCUMENTS[:1], DOCUMENTS[1:3]], tiny().vocabulary, LayoutConfig())
    visible = rows.visible_BLL() & (rows.document_BL >= 0)[:, :, None]
    assert bool((rows.document_BL < 0).any())
    assert int(visible_pairs(rows.document_BL, rows.block_BL)) == int(visible.sum())


@pytest.mark.parametrize(("checkpointing", "blocks_train"), [(False, True), (True, True), (False, False)])
def test_training_flops_are_those_of_torchs_counter(uncounted, checkpointing, blocks_train):
    """Counted on the real model with a dense mask, so with all L x L pairs of the row: exactly equal, forward and backward."""
    model = tiny()
    model.set_attention("sdpa")
    if checkpointing:
        for block in model.blocks:
            checkpoint(block)
    model.blocks.requires_grad_(blocks_train)
    rows = lay_out([DOCUMENTS[:3]], model.vocabulary, LayoutConfig())
    length = rows.ids_BL.shape[1]
    work = sum((document_work(document) for document in DOCUMENTS[:3]), Work(pairs=length**2))
    dense = Work(positions=work.positions, pairs=length**2, cells=work.cells, targets=work.targets)
    # By itself the second forward stops at the last tensor that the backward pass asks for, and saves a product or two.
    forward, rest = (FlopCounterMode(display=False, custom_mapping=uncounted) for _ in range(2))
    with forward, torch.utils.checkpoint.set_checkpoint_early_stop(False):
        hidden_BLW = model(rows)
    with rest:
        model.cross_entropy(hidden_BLW, rows.target_BL, rows.weight_BL).total.backward()
    once = flops_of(model).forward(dense)
    assert forward.get_total_flops() == once.total - once.head
    expected = flops_of(model).training(dense, checkpointing=checkpointing, blocks_train=blocks_train).total
    assert forward.get_total_flops() + rest.get_total_flops() == expected
    # Attention's scores, and blocks that are checkpointed, are computed again: work that a model does not need.
    needless = 0.5 * once.attention + ((once.blocks + once.attention) if checkpointing else 0)
    assert flops_of(model).of_the_model(dense, blocks_train=blocks_train) == expected - needless


def checkpoint(block):
    inner = block.forward
    block.forward = lambda *inputs: torch.utils.checkpoint.checkpoint(inner, *inputs, use_reentrant=False)


def test_visible_pairs_are_a_part_of_the_dense_ones():
    """A caption and a 512 picture alone in a row: 58 % of the L x L pairs are visible; of eight in a pack, 7 %."""
    grids = ScaleSchedule.nextflow().grids(512)
    work = document_work(Document(segments=(text(100), ImageSegment(grids=grids))))
    assert work.pairs / work.positions**2 == pytest.approx(0.58, abs=0.01)
    assert 8 * work.pairs / (8 * work.positions) ** 2 == pytest.approx(0.0725, abs=0.001)


def test_in_positions_is_at_least_the_length():
    flops = FlopsModel(shape=DecoderShape(), vocabulary_size=184_834)
    assert flops.in_positions(Work(positions=7)) == 7
    for document in DOCUMENTS:
        assert flops.in_positions(document_work(document)) > document_length(document)


@pytest.mark.parametrize("guided", [False, True])
def test_generation_flops_are_those_of_the_engine(uncounted, guided):
    model = tiny()
    segments = (text(5),)
    # Another text of the same length: an equal prompt would be fed once.
    guidance = {"guidance": 2.0, "negative": (TextSegment(ids=[9, 8, 7, 6, 5]),)} if guided else {}
    request = GenerationRequest(segments=segments, task="image", grids=SQUARE, seed=0, **guidance)
    decoding = Decoding(model, [request], layout=LayoutConfig(), sampling=SamplingConfig())
    with FlopCounterMode(display=False, custom_mapping=uncounted) as counter, torch.no_grad():
        while decoding.active:
            decoding.step()
    steps = generation_work(SQUARE, prompt=document_length(Document(segments=segments)))
    shape = DecoderShape.of(model.config)
    # The engine takes the head's rows of codes alone.
    flops = FlopsModel(shape=shape, vocabulary_size=model.config.codebook_size, code_dim=6)
    assert len(steps) == len(SQUARE)
    # The prompt's window has a dense mask, all others need none.
    prompt = steps[0]
    steps[0] = Work(positions=prompt.positions, pairs=prompt.positions**2, targets=1)
    expected = sum(flops.forward(step).total for step in steps) * (2 if guided else 1)
    if guided:  # guidance grows from 0 at the first scale, where the unconditional row needs no logits
        expected -= flops.forward(Work(targets=1)).total
    assert counter.get_total_flops() == expected


def test_the_papers_totals():
    """Appendix A.2: 884,736 h^2 + 1,207,959,552 h for an MMDiT; 122,208 h^2 + 256,215,912 h with 10x10 twice."""
    h = 2048
    assert 18 * paper_flops(4096, 4096, width=h) == 884_736 * h**2 + 1_207_959_552 * h
    grids = ScaleSchedule.nextflow().grids(1024)
    twice = (*grids[:9], grids[8], *grids[9:])
    assert grids[8] == (10, 10)
    assert paper_generation_flops(twice, width=h) == 122_208 * h**2 + 256_215_912 * h
    assert paper_generation_flops(grids, width=h) == 12 * 10_084 * h**2 + 4 * 63_035_578 * h
