"""The engine is the trained model: cached decoding gives the numbers of training, and a sample depends on its request alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nextflow.generation.engine import Decoding, GenerationRequest, generate, stream
from nextflow.generation.rollouts import action_rows
from nextflow.generation.sampling import SamplingConfig, guidance_scale, guide
from nextflow.models.transformer.config import TransformerConfig
from nextflow.models.transformer.model import Transformer
from nextflow.sequence.documents import Document, ImageSegment, TextSegment
from nextflow.sequence.image_layout import LayoutConfig
from nextflow.sequence.layout import IGNORE, lay_out
from nextflow.sequence.scales import num_codes_of

LAYOUT = LayoutConfig()
LAYOUTS = {
    "paper": LAYOUT,
    "accumulated and last scale": LayoutConfig(features="accumulated", feed_last_scale=True),
    "grid and last scale": LayoutConfig(positions="grid", feed_last_scale=True),
    "shifted and accumulated": LayoutConfig(positions="shifted_grid", features="accumulated"),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@torch.no_grad()
def test_cached_logprobs_are_those_of_teacher_forcing(studio, transformer, layout):
    """Every task in one batch, one layout of training at a time: the learner's function scores the same actions the same."""
    results = generate(transformer, studio.requests(), layout=layout, logprobs=True)
    rows = action_rows(results, transformer.vocabulary, layout)
    score_BL = transformer.cross_entropy(transformer(rows), rows.target_BL).log_prob_N.view_as(rows.target_BL)
    for row, result in enumerate(results):
        expected_A = score_BL[row][rows.target_BL[row] != IGNORE]
        assert result.logprobs is not None and result.logprobs.shape == expected_A.shape
        difference = (result.logprobs - expected_A).abs().max().item()
        assert difference <= 1e-4, f"request {row} ({result.request.task}): {difference}"


@torch.no_grad()
def test_what_is_drawn_from_is_the_guided_tempered_model(studio, transformer):
    """Guided log-probabilities of every picture code, from the training path."""
    requests = studio.requests()
    offset = transformer.vocabulary.code_offset
    for result in generate(transformer, requests, layout=LAYOUT, sampling=SamplingConfig(temperature=0.7)):
        request, first = result.request, 0
        prompts = [request.segments, request.unconditional] if request.guided else [request.segments]
        before: list = []
        for segment in result.segments:
            if isinstance(segment, TextSegment):
                first += len(segment.ids)
                before.append(segment)
                continue
            first += 1  # <boi>
            sides = []
            for side, prompt in enumerate(prompts):
                shown = before if side == 0 else [part for part in before if isinstance(part, ImageSegment)]
                rows = lay_out([[Document(segments=(*prompt, *shown, segment))]], transformer.vocabulary, LAYOUT)
                position_N = rows.code_position_N[-len(segment.codes) :]
                sides.append(transformer.logits(transformer(rows))[0][position_N, offset:])
            logits_NV = sides[0]
            if request.guided:
                K = len(request.grids)
                cells = torch.tensor([h * w for h, w in request.grids])
                t_N = torch.tensor([guidance_scale(request.guidance, k, K) for k in range(K)]).repeat_interleave(cells)
                logits_NV = guide(*sides, t_N)
            expected_N = (logits_NV / 0.7).log_softmax(-1).gather(1, segment.codes[:, None])[:, 0]
            drawn_N = result.is_action[first : first + len(expected_N)]
            at = int(result.is_action[:first].sum())
            actual_A = result.sampled_logprobs[at : at + int(drawn_N.sum())]
            torch.testing.assert_close(actual_A, expected_N[drawn_N], atol=1e-3, rtol=0)
            first += len(expected_N)
            before.append(segment)
        assert first + result.ended == len(result.is_action)


SAMPLINGS = [
    SamplingConfig(),
    SamplingConfig(top_k=[0, 8, 4], top_p=0.9, text_top_k=5, text_temperature=0.8),
    SamplingConfig(greedy=True),
]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["plain", "top-k, top-p", "greedy"])
def test_a_sample_does_not_depend_on_its_batch(studio, sampling):
    transformer = studio.transformer()
    requests = studio.requests()
    together = generate(transformer, requests, layout=LAYOUT, sampling=sampling)
    halves = [requests[:3:-1], requests[3::-1]]
    others = [result for half in halves for result in generate(transformer, half, layout=LAYOUT, sampling=sampling)]
    for request, a, b in zip(requests, together, others[::-1]):
        (alone,) = generate(transformer, [request], layout=LAYOUT, sampling=sampling)
        assert torch.equal(alone.codes, a.codes) and torch.equal(alone.codes, b.codes)
        assert alone.text_ids == a.text_ids == b.text_ids
        assert torch.equal(alone.is_action, a.is_action)


def test_each_scale_and_text_is_drawn_by_its_own_rule(studio, transformer):
    """What the most likely id alone may be has the probability 1, and whatever is drawn freely has less."""
    picture = studio.requests()[1]
    first = SamplingConfig(top_k=[1, 0, 1])
    later = SamplingConfig(temperature=[1.0, 1e-4], top_p=[1.0, 0.01])
    cells = [height * width for height, width in picture.grids]
    for sampling, is_free in ((first, lambda scale: scale == 1), (later, lambda scale: scale == 0)):
        (result,) = generate(transformer, [picture], layout=LAYOUT, sampling=sampling)
        for scale, logprob_N in enumerate(result.sampled_logprobs.split(cells)):
            assert (logprob_N < 0).all() if is_free(scale) else (logprob_N == 0).all(), scale
    caption = studio.requests()[7]
    for rule in ({"text_top_k": 1}, {"text_top_p": 1e-3}, {"text_temperature": 1e-5}):
        (fixed,) = generate(transformer, [caption], layout=LAYOUT, sampling=SamplingConfig(**rule))
        assert (fixed.sampled_logprobs == 0).all(), rule
    (free,) = generate(transformer, [caption], layout=LAYOUT, sampling=SamplingConfig(top_k=1))
    assert (free.sampled_logprobs < 0).all()


def test_seeds_matter_and_greedy_ignores_them(studio, transformer):
    request = studio.requests()[0]
    twins = [request, replace(request, seed=99)]
    first, second = generate(transformer, twins, layout=LAYOUT)
    assert not torch.equal(first.codes, second.codes)
    first, second = generate(transformer, twins, layout=LAYOUT, sampling=SamplingConfig(greedy=True))
    assert torch.equal(first.codes, second.codes)


def test_guidance_without_effect_is_the_conditional_model(studio, transformer):
    request = replace(studio.requests()[0], guidance=0.0)
    tiny = replace(request, guidance=1e-9)  # two rows, but no effect
    listed = replace(request, guidance=(0.0, 0.0, 1e-9))
    results = generate(transformer, [request, tiny, listed], layout=LAYOUT)
    assert all(torch.equal(result.codes, results[0].codes) for result in results)


def test_a_ramp_is_the_list_of_its_values(studio, transformer):
    request = studio.requests()[0]
    K = len(request.grids)
    listed = replace(request, guidance=tuple(guidance_scale(3.0, k, K) for k in range(K)))
    ramp, values = generate(transformer, [request, listed], layout=LAYOUT)
    assert torch.equal(ramp.codes, values.codes)


def test_pictures_hold_codes_and_texts_hold_text_ids_even_when_the_model_prefers_the_others(studio):
    transformer = studio.transformer()
    vocabulary = transformer.vocabulary
    with torch.no_grad():
        transformer.head.weight[vocabulary.eoi] *= 50  # would win or lose everywhere
        transformer.head.weight[vocabulary.code_offset] *= -50
    for result in generate(transformer, studio.requests(), layout=LAYOUT):
        for segment in result.segments:
            if isinstance(segment, ImageSegment):
                assert len(segment.codes) == num_codes_of(result.request.grids)
                assert int(segment.codes.min()) >= 0 and int(segment.codes.max()) < studio.codes
            else:
                assert 0 < len(segment.ids) <= result.request.max_text_tokens
                assert all(0 <= id < studio.text_size for id in segment.ids)


def shape(result) -> str:
    return "".join("t" if isinstance(segment, TextSegment) else "i" for segment in result.segments)


def test_stories_alternate_until_their_end_or_limit(studio, transformer):
    story = studio.requests()[9]
    results = generate(transformer, [replace(story, seed=seed) for seed in range(40)], layout=LAYOUT)
    shapes = [shape(result) for result in results]
    assert all("tt" not in one and one.count("i") <= 3 for one in shapes)
    assert any(one.count("i") >= 2 for one in shapes) and any(result.ended for result in results), shapes
    assert all(len(segment.ids) <= 4 for result in results for segment in result.segments if shape(result) == "t")
    for result in results:
        assert result.finished
        if not result.ended:  # only the last text may run into the limit, when no picture is left
            assert shape(result).count("i") == 3 and len(result.segments[-1].ids) == 4


def test_a_thought_always_ends_in_a_picture(studio, transformer):
    thought = studio.requests()[11]
    results = generate(transformer, [replace(thought, seed=seed) for seed in range(30)], layout=LAYOUT)
    assert {shape(result) for result in results} <= {"ti", "i"}
    full = [result for result in results if len(result.text_ids) == 6]
    assert full, "no thought ran into its limit"
    for result in full:
        assert not result.is_action[6], "the <boi> behind a full thought is put, not drawn"
        assert len(result.sampled_logprobs) == len(result.is_action) - 1


def test_captions_end_at_the_end_id(studio, transformer):
    request = GenerationRequest(segments=(studio.picture(32),), task="text", max_text_tokens=40)
    results = generate(transformer, [replace(request, seed=seed) for seed in range(24)], layout=LAYOUT, logprobs=True)
    assert any(result.ended for result in results), "no caption ended by itself: the test needs a model that ends"
    for result in results:
        assert transformer.vocabulary.end_id not in result.text_ids
        assert result.ended == (len(result.text_ids) < 40)
        assert len(result.logprobs) == len(result.text_ids) + result.ended


class Painter(torch.nn.Module):
    """A tokenizer whose picture is the mean of the codes so far, so that a preview can be told from the final picture."""

    def __init__(self, num_codes: int) -> None:
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        self.num_codes = num_codes

    def decode(self, codes_BN, grids, num_scales=None):
        assert codes_BN.shape[1] == num_codes_of(grids[:num_scales])
        height, width = grids[-1]
        mean_B = codes_BN.float().mean(dim=1) / self.num_codes * 2 - 1
        return mean_B[:, None, None, None].expand(-1, 3, height * 8, width * 8)


def test_stream_shows_every_scale_and_ends_as_generate(studio, transformer):
    requests, painter = studio.requests(), Painter(studio.codes)
    final = generate(transformer, requests, layout=LAYOUT, tokenizer=painter)
    shown: dict[int, list] = {}
    for result in stream(transformer, requests, layout=LAYOUT, tokenizer=painter):
        shown.setdefault(result.index, []).append(result)
    for expected, results in zip(final, (shown[index] for index in range(len(requests)))):
        assert [result.finished for result in results] == [False] * (len(results) - 1) + [True]
        assert torch.equal(results[-1].codes, expected.codes) and results[-1].text_ids == expected.text_ids
        assert len(results[-1].images) == shape(expected).count("i")
        assert all(torch.equal(a, b) for a, b in zip(results[-1].images, expected.images, strict=True))
        if expected.request.task == "image" and expected.request.given is None:
            assert [result.num_scales for result in results] == list(range(1, len(expected.request.grids) + 1))
            for result in results:
                assert torch.equal(result.codes, expected.codes[: num_codes_of(result.done_grids)])
                height, width = expected.request.grids[-1]
                assert result.image.shape == (height * 8, width * 8, 3) and result.image.dtype == torch.uint8


def test_equal_prompts_of_a_batch_are_fed_once(studio, transformer):
    request = studio.requests()[4]
    group = [replace(request, seed=seed) for seed in range(5)]
    decoding = Decoding(transformer, group, layout=LAYOUT, sampling=SamplingConfig())
    fed: list[int] = []
    hook = transformer.norm.register_forward_hook(lambda module, inputs, output: fed.append(len(output)))
    with torch.no_grad():
        decoding.step()
        decoding.step()
    hook.remove()
    assert fed == [2, 10]  # prompt and source alone, then five rows of each side
    alone = generate(transformer, group[3:4], layout=LAYOUT)
    assert torch.equal(generate(transformer, group, layout=LAYOUT)[3].codes, alone[0].codes)


def test_given_codes_are_kept_and_the_rest_is_drawn(studio, transformer):
    for request in studio.requests():
        if request.given is None:
            continue
        kept_N = request.given >= 0
        results = generate(transformer, [replace(request, seed=seed) for seed in range(8)], layout=LAYOUT)
        for result in results:
            assert torch.equal(result.codes[kept_N], request.given[kept_N])
            assert torch.equal(result.is_action, torch.cat([torch.tensor([False]), ~kept_N]))
        drawn_SN = torch.stack([result.codes[~kept_N] for result in results])
        assert (drawn_SN != drawn_SN[:1]).any(dim=0).float().mean() > 0.9


def test_half_precision_on_a_cpu_runs_the_same_code(studio):
    transformer = studio.transformer().bfloat16()
    requests = studio.requests()
    for request, result in zip(requests, generate(transformer, requests, layout=LAYOUT, logprobs=True)):
        assert result.request is request and result.logprobs.isfinite().all()


def test_wrong_requests_say_what_to_change(studio, transformer):
    text = studio.text(3)
    grids = studio.schedule.grids(32)
    with pytest.raises(ValueError, match="grids"):
        GenerationRequest(segments=(text,))
    with pytest.raises(ValueError, match="task 'text' has none"):
        GenerationRequest(segments=(text,), task="text", guidance=1.0)
    with pytest.raises(ValueError, match="guidance above 0"):
        GenerationRequest(segments=(text,), grids=grids, negative=(text,))
    with pytest.raises(ValueError, match="guidance must be at least 0"):
        GenerationRequest(segments=(text,), grids=grids, guidance=(1.0, -1.0))
    with pytest.raises(ValueError, match="max_images must be at least 1"):
        GenerationRequest(segments=(text,), task="interleaved", grids=grids, max_images=0)
    with pytest.raises(ValueError, match="encode it"):
        GenerationRequest(segments=(ImageSegment(grids=((1, 1),)),), task="text")
    with pytest.raises(ValueError, match="the picture's grids hold 30 codes"):
        GenerationRequest(segments=(text,), grids=grids, given=torch.full((3,), -1))
    with pytest.raises(ValueError, match="nothing to draw"):
        GenerationRequest(segments=(text,), grids=grids, given=torch.zeros(30, dtype=torch.int64))
    small = Transformer(TransformerConfig.from_dict({**transformer.config.to_dict(), "max_scales": 4}))
    with pytest.raises(ValueError, match=r"7 scales.*at most 4 \(transformer.max_scales\)"):
        generate(small, [GenerationRequest(segments=(text,), grids=studio.schedule.grids(64))], layout=LAYOUT)
    assert generate(transformer, [], layout=LAYOUT) == []
