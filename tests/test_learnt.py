"""What earlier searches measured shortens the next one, never replaces its measurement, and is forgotten where it no longer holds."""

import numpy as np
import pytest
import torch
from clocks import X, net, own_cache  # noqa: F401 (a fixture)
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import graphprune
from graphprune.budget.targets import Aims
from graphprune.timing.latency import Timing, _clear, _name
from graphprune.timing.learnt import AGREE, COUNTED, KEPT, TOLERANCE, Learnt, Point, guess
from graphprune.timing.table import Table


def candidates(overhead, speedup=1.5):
    """A search on a clock with a constant overhead: how many models it timed, and how fast the last one is."""
    clock = lambda model: overhead + 1e-9 * sum(p.numel() for p in model.parameters())  # noqa: E731
    timed = []
    small = graphprune.shrink(net(), X, speedup=speedup, measure=lambda m: timed.append(m) or clock(m), threads=1)
    return len({id(m) for m in timed}) - 1, clock(net()) / clock(small)


def test_a_second_search_measures_once_and_one_on_a_changed_machine_starts_anew():
    first, reached = candidates(4e-5)
    assert first > 1 and reached == pytest.approx(1.5, rel=0.02)  # control: nothing was known
    assert candidates(4e-5) == (1, reached)  # it is timed again, whatever is known
    slower, reached = candidates(8e-6)  # what is known is wrong now: measured, and corrected
    assert slower > 1 and reached == pytest.approx(1.5, rel=0.02)
    assert candidates(8e-6) == (1, reached)


def test_a_clock_that_drifts_less_than_processes_differ_is_taken_at_its_word():
    clock = lambda slower: lambda model: (1 + slower * (model[0].out_features < 256)) * (4e-5 + 1e-9 * sum(p.numel() for p in model.parameters()))  # noqa: E731
    for _ in range(3):
        graphprune.shrink(net(), X, speedup=1.5, measure=clock(0.0), threads=1)
    small = graphprune.shrink(net(), X, speedup=1.5, measure=clock(0.0295), threads=1)
    assert clock(0.0295)(net()) / clock(0.0295)(small) == pytest.approx(1.5, rel=TOLERANCE + 0.001)


@pytest.mark.parametrize("asked", [{"speedup": 1}, {"latency": 1.0}, {"latency": "10 s"}, {"speedup": 1, "macs": 0.5}])
def test_no_faster_than_the_original_is_met_by_little_or_nothing(asked):
    clock = lambda model: 4e-5 + 1e-9 * sum(p.numel() for p in model.parameters())  # noqa: E731
    small = graphprune.shrink(net(), X, measure=clock, threads=1, **asked)
    assert clock(small) <= clock(net()) * 1.001
    assert "macs" in asked or sum(p.numel() for p in small.parameters()) > 0.9 * sum(p.numel() for p in net().parameters())


def test_models_of_other_dtypes_kernels_and_inputs_have_points_of_their_own():
    nets = [nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1).double()]
    graphs = [graphprune.trace(one, torch.zeros(1, 4, 8, 8, dtype=next(one.parameters()).dtype)) for one in nets]
    graphs.append(graphprune.trace(nets[0], torch.zeros(2, 4, 8, 8)))
    aims = Aims(speedup=2.0)
    assert len({_name(graph, aims, "optimal") for graph in graphs}) == 4
    assert _name(graphs[0], aims, "optimal") == _name(graphprune.trace(nn.Conv2d(4, 4, 1), torch.zeros(1, 4, 8, 8)), aims, "optimal")


def test_searches_that_overlap_keep_each_others_points_and_a_damaged_table_is_only_a_cold_one():
    one, two = Table(torch.device("cpu")), Table(torch.device("cpu"))
    one.known["search a"], two.known["search b"] = [[-0.5, -0.5]], [[-0.4, -0.4]]
    one.save()
    two.save()
    known = Table(torch.device("cpu")).known
    assert known["search a"] == [[-0.5, -0.5]] and known["search b"] == [[-0.4, -0.4]]
    for text in ("[1]", '{"search a": [1], "aten": null, "facts": {}}', "{", "null"):
        one.path.write_text(text)
        assert candidates(4e-5)[1] == pytest.approx(1.5, rel=0.02)


share = st.floats(-1.5, -0.05)


@given(st.lists(st.tuples(share, share), max_size=20), share, share)
def test_a_measurement_is_pooled_with_those_that_agree_and_overrules_those_that_do_not(told, predicted, measured):
    learnt = Learnt()
    for point in told:
        learnt = learnt.told(Point(*point))
    assert len(learnt.points) <= KEPT and len({round(p.predicted, 9) for p in learnt.points}) == len(learnt.points)
    fresh = learnt.told(Point(predicted, measured))
    assert fresh.pooled(predicted, measured + AGREE * 1.01) == Point(predicted, measured + AGREE * 1.01)
    near = fresh.pooled(predicted, measured + AGREE / 2)
    assert near.searches == 2 and near.measured == pytest.approx(measured + AGREE / 4)
    assert fresh.pooled(predicted - 1, measured) == Point(predicted - 1, measured)  # other widths know nothing of these


def test_many_searches_never_outweigh_the_new_one_for_ever():
    learnt = Learnt((Point(-0.5, -0.5, 1000),))
    moved = learnt.pooled(-0.5, -0.5 + AGREE / 2).measured + 0.5
    assert moved == pytest.approx(AGREE / 2 / (COUNTED + 1)) and moved > 0


@given(st.lists(st.tuples(share, share), min_size=1, max_size=6, unique_by=(lambda p: round(p[0], 3), lambda p: round(p[1], 3))), share)
def test_a_guess_lies_between_the_neighbours_of_what_is_wanted(points, wanted):
    points = sorted([(0.0, 0.0), *zip(sorted(p for p, _ in points), sorted(m for _, m in points), strict=True)])  # faster predicted is faster measured
    x = guess(points, wanted)
    below, above = [p for p, m in points if m <= wanted], [p for p, m in points if m > wanted]
    assert x <= min(above) + 1e-9 and (not below or x >= max(below) - 1e-9)


@given(st.floats(0.2, 0.9), st.floats(0.2, 0.9), st.floats(1e-4, 0.2), st.floats(0.05, 1))
def test_what_is_clear_stays_clear_with_a_narrower_band(found, target, width, less):
    wide = Timing(1.0, found, (found * (1 - width), found * (1 + width)), 1.0)
    tight = Timing(1.0, found, (found * (1 - width * less), found * (1 + width * less)), 1.0)
    assert _clear(tight, target) or not _clear(wide, target)
    if abs(found / target - 1) > TOLERANCE and _clear(wide, target) and wide.noise > TOLERANCE / 3:
        assert not wide.band[0] <= target <= wide.band[1]  # told from the target


def test_a_wide_band_around_the_target_is_not_clear():
    assert not _clear(Timing(1.0, 0.5, (0.48, 0.52), 1.0), 0.5) and _clear(Timing(1.0, 0.5, (0.497, 0.503), 1.0), 0.5)


def test_nonsense_on_disk_is_left_out():
    rows = [[-0.5, -0.4], [float("nan"), -0.1], [0.1, -0.1], [-0.6, -0.4, -1], [-0.6, -0.4, 0], "x", [1], [-0.3, None], [-0.2, -0.2, 3]]
    assert Learnt.read(rows).points == (Point(-0.5, -0.4), Point(-0.2, -0.2, 3)) and Learnt.read(None).points == Learnt.read({"a": 1}).points == ()
    assert np.isfinite(Learnt.read(rows).first(-0.3))
