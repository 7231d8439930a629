from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from pyrite.report.charts import span, split, spread


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=10), st.floats(0.01, 0.9))
def test_labels_keep_their_order_their_distance_and_the_range(wanted, step):
    placed = spread(wanted, step, -5.0, 5.0)
    ranked = [placed[i] for i in sorted(range(len(wanted)), key=lambda i: wanted[i])]
    assert all(b - a >= step * (1 - 1e-9) for a, b in pairwise(ranked))
    assert ranked[0] >= -5 + step / 2 - 1e-9 and ranked[-1] <= 5 - step / 2 + 1e-9


def test_labels_with_room_stay_where_they_are():
    assert spread([3.0, -1.0, 1.0], 0.5, -9.0, 9.0) == [3.0, -1.0, 1.0]


def test_equal_labels_are_set_around_their_place():
    assert spread([2.0, 2.0, 2.0], 1.0, -9.0, 9.0) == [1.0, 2.0, 3.0]


def test_span_counts_the_bands_and_leaves_a_margin():
    low, high = span([{"value": 1.0, "lo": 0.0, "hi": None}, {"value": 2.0}])
    assert (low, high) == (-0.1, 2.1)
    assert span([{"value": 1.0}]) == (0.5, 1.5)


def test_split_by_line_in_order_of_appearance():
    points = [{"line": "b", "value": 1}, {"line": "a", "value": 2}, {"line": "b", "value": 3}]
    assert [[p["value"] for p in line] for line in split(points)] == [[1, 3], [2]]
