"""The engine is the trained model: cached decoding gives the logits of training, and a sample depends on its request alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nextflow.generation.engine import Decoding, GenerationRequest, generate, stream
from nextflow.generation.sampling import SamplingConfig, guidance_scale, guide
from nextflow.models.transformer.config import TransformerConfig
from nextflow.models.transformer.model import Transformer
from nextflow.sequence.documents import Document, ImageSegment, TextSegment
from nextflow.sequence.image_layout import LayoutConfig
from nextflow.sequence.layout import lay_out
from nextflow.sequence.scales import ScaleSchedule, num_codes_of

SCHEDULE = ScaleSchedule(
    sides=(1, 2, 3, 4, 5, 6, 8), levels={32: 4, 64: 7}, stride=8, base_grids=((6, 11), (8, 8), (11, 6))
)
LAYOUT = LayoutConfig()
TEXT_SIZE, CODES = 20, 24


@pytest.fixture(scope="module", params=["single", "dual"])
def transformer(request) -> Transformer:
    torch.manual_seed(0)
    config = TransformerConfig(
        text_size=TEXT_SIZE, codebook_size=CODES, start_id=0, end_id=1, code_dim=6, width=32, num_layers=3, num_heads=4,
        num_kv_heads=2, head_dim=16, mlp_width=48, rope_sections=(2, 3, 3), head=request.param, init_std=0.2,
    )  # fmt: skip
    return Transformer(config).eval()


def text(*ids: int) -> TextSegment:
    return TextSegment(ids=list(ids))


def picture(level: int, ratio: float = 1.0, seed: int = 0) -> ImageSegment:
    grids = SCHEDULE.grids(level, ratio)
    codes = torch.randint(0, CODES, (num_codes_of(grids),), generator=torch.Generator().manual_seed(seed))
    return ImageSegment(grids=grids, codes=codes)


def mixed_requests() -> list[GenerationRequest]:
    """Prompts of many lengths, both levels, square, wide and tall, with and without guidance, an image prompt, a caption."""
    square, wide, tall, small = (SCHEDULE.grids(*key) for key in ((64, 1.0), (64, 0.55), (64, 1.8), (32, 1.0)))
    return [
        GenerationRequest(segments=(text(5, 6, 7),), grids=square, seed=1, guidance=3.0),
        GenerationRequest(segments=(text(8),), grids=wide, seed=2),
        GenerationRequest(segments=(text(*range(4, 15)),), grids=small, seed=3, guidance=1.5, negative=(text(3, 4),)),
        GenerationRequest(grids=tall, seed=4),
        GenerationRequest(segments=(picture(32, 0.55), text(9, 2)), grids=tall, seed=5, guidance=2.0),
        GenerationRequest(segments=(picture(64), text(4)), task="text", seed=6, max_text_tokens=9),
        GenerationRequest(segments=(picture(32, 1.8, 1),), task="text", seed=7, max_text_tokens=5),
    ]


class Recorder(Decoding):
    """Keeps the logits of both sides of every job, at each of its scales or text ids."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.seen: dict[int, list[torch.Tensor]] = {}

    def _draw(self, task, scale, jobs, hidden_BND):
        for job in jobs:
            for row in job.rows:
                self.seen.setdefault(row, []).append(self._logits(task, hidden_BND, [row], [job.num_predicted]))
        super()._draw(task, scale, jobs, hidden_BND)


@torch.no_grad()
def teacher_forced(
    transformer: Transformer,
    request: GenerationRequest,
    segments: tuple,
    drawn: torch.Tensor,
    layout: LayoutConfig = LAYOUT,
):
    """Logits of the training path, [M, V], at the positions that predict what was drawn."""
    vocabulary = transformer.vocabulary
    if request.task == "image":
        rows = lay_out(
            [[Document(segments=(*segments, ImageSegment(grids=request.grids, codes=drawn)))]], vocabulary, layout
        )
        logits_LV = transformer.logits(transformer(rows))[0]
        return logits_LV[rows.code_position_N[-len(drawn) :], vocabulary.code_offset :]
    rows = lay_out([[Document(segments=(*segments, text(*drawn.tolist())))]], vocabulary, layout)
    length = rows.ids_BL.shape[1]
    return transformer.logits(transformer(rows))[0, length - len(drawn) - 1 : length - 1, :TEXT_SIZE]


@pytest.mark.parametrize(
    ("layout", "reuse_cache"),
    [
        (LAYOUT, True),
        (LAYOUT, False),
        (LayoutConfig(features="accumulated", feed_last_scale=True), True),
        (LayoutConfig(positions="grid", feed_last_scale=True), True),
        (LayoutConfig(positions="shifted_grid", features="accumulated"), True),
    ],
    ids=["paper", "paper, no cache", "accumulated and last scale", "grid and last scale", "shifted and accumulated"],
)
def test_cached_logits_equal_teacher_forced_logits(transformer, layout, reuse_cache):
    requests = mixed_requests()
    with torch.no_grad():
        decoding = Recorder(transformer, requests, layout=layout, sampling=SamplingConfig(), reuse_cache=reuse_cache)
        while decoding.active:
            decoding.step()
    worst = 0.0
    for job in decoding.jobs:
        drawn = torch.cat(job.drawn)
        for row, segments in zip(job.rows, (job.request.segments, job.request.negative)):
            expected_MV = teacher_forced(transformer, job.request, segments, drawn, layout)
            first = 0
            for scale, cached_MV in enumerate(decoding.seen[row]):
                difference = (cached_MV - expected_MV[first : first + len(cached_MV)]).abs().max().item()
                assert difference <= 1e-4, f"request {job.index}, row {row}, scale {scale}: {difference}"
                worst = max(worst, difference)
                first += len(cached_MV)
            assert first == len(drawn)
    print(f"largest difference of logits: {worst:.2e} (logits up to {expected_MV.abs().max():.1f})")


def test_logprobs_are_those_of_the_model_and_of_the_sampler(transformer):
    requests = mixed_requests()
    for result in generate(transformer, requests, layout=LAYOUT, sampling=SamplingConfig(temperature=0.7)):
        request = result.request
        ids = result.codes if request.task == "image" else torch.tensor(result.text_ids)
        if not len(ids):
            continue
        logits_MV = teacher_forced(transformer, request, request.segments, ids)
        expected_M = logits_MV.log_softmax(-1).gather(1, ids[:, None])[:, 0]
        torch.testing.assert_close(result.logprobs[: len(ids)], expected_M, atol=1e-4, rtol=0)
        if request.task == "image":
            if request.guidance:
                other_MV = teacher_forced(transformer, request, request.negative, ids)
                K = len(request.grids)
                cells = torch.tensor([h * w for h, w in request.grids])
                t_M = torch.tensor([guidance_scale(request.guidance, k, K) for k in range(K)]).repeat_interleave(cells)
                logits_MV = guide(logits_MV, other_MV, t_M)
            expected_M = (logits_MV / 0.7).log_softmax(-1).gather(1, ids[:, None])[:, 0]
            torch.testing.assert_close(result.sampled_logprobs, expected_M, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "sampling", [SamplingConfig(), SamplingConfig(top_k=[0, 8, 4], top_p=0.9), SamplingConfig(greedy=True)]
)
def test_a_sample_does_not_depend_on_its_batch(transformer, sampling):
    requests = mixed_requests()
    together = generate(transformer, requests, layout=LAYOUT, sampling=sampling)
    backwards = generate(transformer, requests[::-1], layout=LAYOUT, sampling=sampling)[::-1]
    for request, a, b in zip(requests, together, backwards):
        (alone,) = generate(transformer, [request], layout=LAYOUT, sampling=sampling)
        assert torch.equal(alone.codes, a.codes) and torch.equal(alone.codes, b.codes)
        assert alone.text_ids == a.text_ids == b.text_ids


def test_seeds_matter_and_greedy_ignores_them(transformer):
    request = mixed_requests()[0]
    twins = [request, replace(request, seed=99)]
    first, second = generate(transformer, twins, layout=LAYOUT)
    assert not torch.equal(first.codes, second.codes)
    first, second = generate(transformer, twins, layout=LAYOUT, sampling=SamplingConfig(greedy=True))
    assert torch.equal(first.codes, second.codes)


def test_guidance_of_zero_is_the_conditional_model(transformer):
    request = replace(mixed_requests()[0], guidance=0.0)
    tiny = replace(request, guidance=1e-9)  # two rows, but no effect
    alone, guided = generate(transformer, [request, tiny], layout=LAYOUT)
    assert torch.equal(alone.codes, guided.codes)


def test_images_hold_codes_and_texts_hold_text_ids_even_when_the_model_prefers_the_others(transformer):
    requests = mixed_requests()
    head = transformer.head.weight if isinstance(transformer.head, torch.nn.Linear) else transformer.head.text.weight
    saved = head.detach().clone()
    with torch.no_grad():
        head[transformer.vocabulary.boi] *= 50  # <boi>, <eoi> would win everywhere
        head[transformer.vocabulary.eoi] *= -50
    results = generate(transformer, requests, layout=LAYOUT)
    with torch.no_grad():
        head.copy_(saved)
    for request, result in zip(requests, results):
        if request.task == "image":
            assert len(result.codes) == num_codes_of(request.grids) == len(result.logprobs)
            assert int(result.codes.min()) >= 0 and int(result.codes.max()) < CODES
        else:
            assert len(result.text_ids) <= request.max_text_tokens
            assert all(0 <= id < TEXT_SIZE for id in result.text_ids)


def test_captions_end_at_the_end_id(transformer):
    request = GenerationRequest(segments=(picture(32),), task="text", max_text_tokens=40)
    results = generate(transformer, [replace(request, seed=seed) for seed in range(24)], layout=LAYOUT)
    lengths = [len(result.text_ids) for result in results]
    assert min(lengths) < 40, "no caption ended by itself: the test needs a model that ends"
    for result in results:
        assert transformer.vocabulary.end_id not in result.text_ids
        ended = len(result.text_ids) < 40
        assert len(result.logprobs) == len(result.text_ids) + ended


class Painter(torch.nn.Module):
    """A tokenizer whose picture is the mean of the codes so far, so that a preview can be told from the final picture."""

    def __init__(self) -> None:
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1))

    def decode(self, codes_BN, grids, num_scales=None):
        assert codes_BN.shape[1] == num_codes_of(grids[:num_scales])
        height, width = grids[-1]
        mean_B = codes_BN.float().mean(dim=1) / CODES * 2 - 1
        return mean_B[:, None, None, None].expand(-1, 3, height * 8, width * 8)


def test_stream_shows_every_scale_and_ends_as_generate(transformer):
    requests = mixed_requests()
    final = generate(transformer, requests, layout=LAYOUT, tokenizer=Painter())
    shown: dict[int, list] = {}
    for result in stream(transformer, requests, layout=LAYOUT, tokenizer=Painter()):
        shown.setdefault(result.index, []).append(result)
    for expected, results in zip(final, (shown[index] for index in range(len(requests)))):
        assert [result.finished for result in results] == [False] * (len(results) - 1) + [True]
        assert torch.equal(results[-1].codes, expected.codes) and results[-1].text_ids == expected.text_ids
        if expected.request.task == "image":
            assert [result.num_scales for result in results] == list(range(1, len(expected.request.grids) + 1))
            for result in results:
                assert torch.equal(result.codes, expected.codes[: num_codes_of(result.done_grids)])
                height, width = expected.request.grids[-1]
                assert result.image.shape == (height * 8, width * 8, 3) and result.image.dtype == torch.uint8
            assert torch.equal(results[-1].image, expected.image)


def test_source_images_that_feed_their_last_scale(transformer):
    layout = replace(LAYOUT, feed_last_scale=True)
    request = mixed_requests()[4]
    (result,) = generate(transformer, [request], layout=layout)
    document = Document(segments=(*request.segments, ImageSegment(grids=request.grids, codes=result.codes)))
    rows = lay_out([[document]], transformer.vocabulary, layout)
    with torch.no_grad():
        logits_LV = transformer.logits(transformer(rows))[0]
    logits_NV = logits_LV[rows.code_position_N[-len(result.codes) :], transformer.vocabulary.code_offset :]
    expected_N = logits_NV.log_softmax(-1).gather(1, result.codes[:, None])[:, 0]
    torch.testing.assert_close(result.logprobs, expected_N, atol=1e-4, rtol=0)


def test_wrong_requests_say_what_to_change(transformer):
    with pytest.raises(ValueError, match="grids"):
        GenerationRequest(segments=(text(3),))
    with pytest.raises(ValueError, match="guidance"):
        GenerationRequest(segments=(text(3),), task="text", guidance=1.0)
    with pytest.raises(ValueError, match="encode it"):
        GenerationRequest(segments=(ImageSegment(grids=((1, 1),)),), task="text")
    assert generate(transformer, [], layout=LAYOUT) == []
