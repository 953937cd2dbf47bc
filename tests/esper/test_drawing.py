"""The drawing of a graph: every node once, and every value from its maker to its readers."""

import itertools

import pytest

from esper.cli._drawing import draw_graph
from esper.tezzeret import blueprint_names, load_blueprint, resolve
from tests.esper.claims import claimed

_DOWN = set("○●│├┤┼")
"""What goes on into the next row."""
_UP = set("●│├┤┼╰╯┴")
"""What comes from the row before, or begins there."""


@pytest.mark.parametrize("name", blueprint_names())
def test_every_node_has_a_row_and_every_lane_that_ends_was_there(name):
    graph = resolve(load_blueprint(name), claimed(name)[0])
    rows = draw_graph(graph)
    assert [label.split(":")[0] for _, label, _ in rows] == ["x", *(n.name for n in graph.nodes)]
    shapes = [graph.signature.input_shape, *(n.output_shape for n in graph.nodes)]
    assert [made for _, _, made in rows] == ["x".join(map(str, shape)) for shape in shapes]
    for (above, _, _), (lanes, _, _) in itertools.pairwise(rows):
        assert lanes.count("●") == 1
        for place in range(0, max(len(above), len(lanes)), 2):
            before = above[place] if place < len(above) else " "
            here = lanes[place] if place < len(lanes) else " "
            # A lane that goes on is met below; one that comes from above was there.
            assert before not in "○●│├┤" or here in _UP, (above, lanes)
            assert here not in "│├┤╰╯┴" or before in _DOWN, (above, lanes)


def test_a_graph_with_two_branches_is_drawn_so():
    graph = resolve(load_blueprint("gated"), claimed("gated")[0])
    assert [lanes for lanes, _, _ in draw_graph(graph)] == ["○", "├─●", "│ ●", "● │", "●─╯", "●"]
