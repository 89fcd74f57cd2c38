"""What limits a large cluster follows from measured rates and their laws."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lorat.errors import UserError
from lorat_platform.scale import blocks, limits
from lorat_platform.scale.benchmark import powers
from lorat_platform.scale.claims import measure_claims
from lorat_platform.scale.fits import fit
from lorat_platform.scale.frames import check_room, measure_index
from lorat_platform.scale.limits import Capacity, demand
from lorat_platform.scale.measured import PAIRS_PER_S, pairs_per_s

CAPACITY = Capacity(loop_ms=8.0, gcs_ms=0.25, records_per_s=160.0)


def test_a_law_is_found_again_and_said_with_how_far_it_is_off() -> None:
    sizes = [1, 2, 4, 8, 16, 32]
    linear = fit(sizes, [3 + 0.5 * n for n in sizes])
    assert (linear.law, linear.a, linear.b) == ("linear", pytest.approx(3), pytest.approx(0.5))
    power = fit(sizes, [2 * n**0.7 for n in sizes])
    assert (power.law, power.a, power.b) == ("power law", pytest.approx(2), pytest.approx(0.7))
    assert power(64) == pytest.approx(2 * 64**0.7)
    noisy = fit(sizes, [2 * n**0.7 * (1.1 if n == 8 else 1.0) for n in sizes])
    assert 0.02 < noisy.error < 0.1
    assert noisy.text.startswith("power law 2") and noisy.text.endswith(
        f"within {100 * noisy.error:.0f} % of what was measured"
    )


def test_sizes_go_from_one_to_the_largest() -> None:
    assert powers(2, 32) == [1, 2, 4, 8, 16, 32]
    assert powers(4, 20) == [1, 4, 16, 20]
    assert powers(4, 2) == [1, 2]


def test_what_was_not_measured_follows_from_the_work_beside_what_was() -> None:
    assert pairs_per_s("B-224") == PAIRS_PER_S["B-224"]
    assert PAIRS_PER_S["L-224"] / 4 < pairs_per_s("L-378") < PAIRS_PER_S["L-224"] / 2.8


def test_a_demand_by_hand() -> None:
    """B-224 on 256 GPUs: blocks of 512 pairs, 4 workers per control loop."""
    row = demand("B-224", 256, CAPACITY)
    pairs = 256 * PAIRS_PER_S["B-224"]
    assert row.cores == pytest.approx(pairs / 467)
    assert row.read_bytes_per_s == pytest.approx(pairs * 110_000)
    assert row.loops == 64
    assert row.blocks_per_s == pytest.approx(pairs / 512 / 64)
    assert row.loop_use == pytest.approx(pairs / 512 / 64 * 0.008)
    assert row.gcs_use == pytest.approx(pairs / 512 * 0.00025)
    assert row.records_use == pytest.approx(pairs / 128 / 50 / 160)
    assert row.claims_use == pytest.approx(256 / 10 * 3 / 3500)
    first, *_ = row.uses().items()
    assert first == ("MLflow", row.records_use)


def test_every_cell_of_the_table_says_whether_it_is_measured_or_computed() -> None:
    for line in limits.table(CAPACITY).splitlines()[2:]:
        cells = line.strip("| ").split(" | ")[1:]
        assert all(cell.endswith(("(m)", "(c)")) for cell in cells), line


def test_an_index_costs_a_process_what_it_looks_at() -> None:
    (cost,) = measure_index([30_000])
    assert 90 < cost.disk_bytes / 30_000 < 110
    assert cost.open_s > 0 and cost.first_us > 0 and cost.again_us > 0
    assert cost.shared_bytes > 30_000 * 20  # boxes and frame numbers, at least


def test_an_index_that_has_no_place_is_refused_before_it_is_made(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no folder .*nowhere; make it"):
        check_room(1000, tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"takes 130000\.0 GB .* give fewer --frames"):
        check_room(10**12, tmp_path)


def test_claims_of_many_drivers_are_counted_and_leave_nothing(tmp_path: Path) -> None:
    one, three = measure_claims([1, 3], str(tmp_path))
    assert (one.drivers, three.drivers) == (1, 3)
    assert min(one.claims_per_s, three.renewals_per_s, three.checks_per_s) > 1
    assert list(tmp_path.iterdir()) == []


def test_a_tiny_block_is_one_row() -> None:
    block = blocks.TinyDecoder()({"block": np.array([7])})
    assert block["index"].tolist() == [[7]]
