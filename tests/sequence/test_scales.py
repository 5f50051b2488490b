"""The paper's schedule: 41 ratios by 18 scales, and the errors for what does not exist."""

import pytest

from nextflow.sequence.scales import ScaleSchedule

SIDES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 48, 64)
# Grids at scale 12 for ratios below one, as printed in the paper's Table 14; above one they are the transposes.
WIDE_AT_SCALE_12 = {
    "1:4": (8, 32), "13:50": (8, 31), "4:15": (8, 30), "10:36": (8, 29), "11:37": (9, 28), "9:29": (9, 26), "1:3": (9, 27),
    "10:29": (10, 25), "5:12": (10, 24), "11:23": (11, 23), "1:2": (11, 22), "11:21": (11, 21), "4:7": (12, 21),
    "3:5": (12, 20), "13:19": (13, 19), "13:18": (13, 18), "25:32": (14, 18), "14:17": (14, 17), "15:17": (15, 17),
    "15:16": (15, 16),
}  # fmt: skip


def _half_to_even(numerator: int, denominator: int) -> int:
    """Rounding in whole numbers, written apart from Python's `round`."""
    quotient, rest = divmod(numerator, denominator)
    if 2 * rest > denominator or (2 * rest == denominator and quotient % 2 == 1):
        quotient += 1
    return quotient


def test_every_grid_of_the_papers_table() -> None:
    schedule = ScaleSchedule.nextflow()
    wide = list(WIDE_AT_SCALE_12.values())
    base_grids = [*wide, (16, 16), *((width, height) for height, width in wide)]
    assert sorted(schedule.base_grids) == sorted(base_grids)
    assert len(set(schedule.base_grids)) == 41
    for height, width in base_grids:
        # Base pairs at side 32 are twice those at scale 12: h_k = max(1, round(H32 * s_k / 32)), the first scale 1x1.
        expected = [(1, 1)]
        for side in SIDES[1:]:
            expected.append((max(1, _half_to_even(2 * height * side, 32)), max(1, _half_to_even(2 * width * side, 32))))
        assert schedule.grids(1024, height / width) == tuple(expected)
        assert schedule.grids(512, height / width) == tuple(expected[:16])
        assert schedule.grids(256, height / width) == tuple(expected[:12])


def test_one_row_as_printed() -> None:
    row = "1,1 1,3 2,4 3,6 3,7 4,8 5,10 6,11 7,14 8,16 10,19 11,22 14,28 16,33 19,38 22,44 33,66 44,88"
    expected = tuple(tuple(map(int, pair.split(","))) for pair in row.split())
    assert ScaleSchedule.nextflow().grids(1024, 0.5) == expected


def test_token_counts() -> None:
    schedule = ScaleSchedule.nextflow()
    assert [schedule.num_codes(level) for level in (256, 512, 1024)] == [900, 3684, 10084]
    for level, lowest, highest in ((256, 815, 905), (512, 3318, 3689), (1024, 9093, 10089)):
        counts = [schedule.num_codes(level, height / width) for height, width in schedule.base_grids]
        assert (min(counts), max(counts)) == (lowest, highest)


def test_every_base_grid_is_chosen_by_its_own_ratio() -> None:
    schedule = ScaleSchedule.nextflow()
    for height, width in schedule.base_grids:
        assert schedule.base_grid(height / width) == (height, width)
    assert schedule.pixels(1024, 0.5) == (44 * 16, 88 * 16)


@pytest.mark.parametrize("ratio", [0.2, 4.5, float("nan"), float("inf"), 0.0, -1.0])
def test_ratio_outside_the_range_names_the_range(ratio: float) -> None:
    with pytest.raises(ValueError, match=r"ratios from 0\.25 to 4"):
        ScaleSchedule.nextflow().grids(256, ratio)


def test_unknown_level_names_the_levels() -> None:
    with pytest.raises(ValueError, match="level 300 does not exist; the schedule has 256, 512, 1024"):
        ScaleSchedule.nextflow().grids(300)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sides": (2, 4), "levels": {}}, "grow strictly from 1"),
        ({"sides": (1, 4, 4), "levels": {}}, "grow strictly from 1"),
        ({"levels": {256: 11}}, "stride x side of its last scale"),
        ({"levels": {256: 19}}, "asks for 19 of 18"),
        ({"base_grids": ((8, 16), (16, 8))}, "exactly one square grid"),
    ],
)
def test_a_wrong_schedule_names_its_key(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScaleSchedule(**change)


def test_round_trip_and_fingerprint() -> None:
    schedule = ScaleSchedule(sides=(1, 2, 4), levels={32: 3}, stride=8)
    again = ScaleSchedule.from_dict(schedule.to_dict())
    assert again == schedule
    assert again.fingerprint() == schedule.fingerprint() != ScaleSchedule.nextflow().fingerprint()


OPENMOJI = ScaleSchedule(sides=tuple(range(1, 9)), levels={32: 4, 64: 8}, stride=8)


@pytest.mark.parametrize("schedule", [ScaleSchedule.nextflow(), OPENMOJI], ids=["nextflow", "openmoji"])
def test_a_buckets_size_has_the_grids_of_the_bucket(schedule: ScaleSchedule) -> None:
    for level in schedule.levels:
        buckets: dict[tuple[int, int], list] = {}
        for height, width in schedule.base_grids:
            grids = schedule.grids(level, height / width)
            buckets.setdefault(schedule.pixels(level, height / width), []).append(grids)
        for size, candidates in buckets.items():  # at small levels several base grids share their last grid
            assert schedule.native_grids(*size) in candidates
            assert schedule.nearest_level(*size) == level
            assert len(candidates) == 1 or schedule is OPENMOJI


@pytest.mark.parametrize("schedule", [ScaleSchedule.nextflow(), OPENMOJI], ids=["nextflow", "openmoji"])
def test_grids_of_any_size_grow_to_the_images_own(schedule: ScaleSchedule) -> None:
    stride = schedule.stride
    for height, width in [(1, 1), (1, 9), (40, 3), (7, 7), (33, 21), (48, 31), (64, 65), (200, 150)]:
        grids = schedule.native_grids(height * stride, width * stride)
        assert len(grids) == schedule.num_scales(schedule.nearest_level(height * stride, width * stride))
        assert grids[0] == (1, 1) and grids[-1] == (height, width)
        for axis in (0, 1):
            sides = [grid[axis] for grid in grids]
            assert sides == sorted(sides) and sides[0] >= 1


def test_grids_of_any_size_by_the_rule() -> None:
    # 30 x 50 cells: 1,500 of them, nearest to the 32 x 32 of level 512. Scale k: half to even of 30 * s / 32, 50 * s / 32.
    grids = ScaleSchedule.nextflow().native_grids(480, 800)
    sides = SIDES[1:16]
    expected = [(1, 1)] + [(_half_to_even(30 * side, 32), _half_to_even(50 * side, 32)) for side in sides]
    assert grids == tuple(expected)
    assert grids[1:4] == ((2, 3), (3, 5), (4, 6))  # 30 * 4 / 32 = 3.75, 50 * 4 / 32 = 6.25


@pytest.mark.parametrize("size", [(250, 256), (256, 8), (0, 16), (256, 257)])
def test_a_size_beside_the_stride_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="multiples of the stride 16"):
        ScaleSchedule.nextflow().native_grids(*size)
