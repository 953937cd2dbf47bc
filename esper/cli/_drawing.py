"""A graph of operations, drawn in text.

Each node is a line; values run downwards in lanes until their last reader. The lanes are those of
`git log --graph`, drawn from the first node to the last.
"""

from esper.tezzeret import Graph, GraphNode

_INPUT = "x"


def draw_graph(graph: Graph) -> list[tuple[str, str, str]]:
    """The graph, one row a line: lanes, node, and what it makes."""
    readers = {_INPUT: 0} | {node.name: 0 for node in graph.nodes}
    for node in graph.nodes:
        for source in node.op.inputs:
            readers[source] += 1
    lanes: list[str | None] = [_INPUT]
    rows = [("○", _INPUT, _shape(graph.signature.input_shape))]
    for node in graph.nodes:
        read = dict.fromkeys(node.op.inputs)
        for source in node.op.inputs:
            readers[source] -= 1
        own = _place(lanes, read, readers)
        rows.append((_lanes(lanes, own, read, readers), _label(node), _made(node)))
        for i, value in enumerate(lanes):
            if value in read and not readers[value]:
                lanes[i] = None
        lanes[own] = node.name
        while lanes and lanes[-1] is None:
            lanes.pop()
    return rows


def _place(lanes: list[str | None], read: dict[str, None], readers: dict[str, int]) -> int:
    """The lane of a node: that of an input it is the last to read, or one that is free."""
    for i, value in enumerate(lanes):
        if value in read and not readers[value]:
            return i
    if None in lanes:
        return lanes.index(None)
    lanes.append(None)
    return len(lanes) - 1


def _lanes(
    lanes: list[str | None], own: int, read: dict[str, None], readers: dict[str, int]
) -> str:
    joined = [i for i, value in enumerate(lanes) if value in read]
    first, last = min([own, *joined]), max([own, *joined])
    text = ""
    for i, value in enumerate(lanes):
        inside = first <= i <= last
        if i == own:
            text += "●"
        elif i in joined:
            goes_on = readers[value or ""] > 0
            ends = "╰" if i == first else "╯" if i == last else "┴"
            on = "├" if i == first else "┤" if i == last else "┼"
            text += on if goes_on else ends
        elif value is not None:
            text += "┼" if inside else "│"
        else:
            text += "─" if inside else " "
        text += "─" if first <= i < last else " "
    return text.rstrip()


def _label(node: GraphNode) -> str:
    op = node.op
    plain = op.model_dump(exclude={"name", "op", "inputs"}, exclude_defaults=True)
    attributes = ", ".join(f"{key} {value}" for key, value in plain.items())
    return f"{op.name}: {op.kind}{f' ({attributes})' if attributes else ''}"


def _made(node: GraphNode) -> str:
    return _shape(node.output_shape)


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def mermaid(graph: Graph) -> str:
    """The graph in the language of Mermaid, which Markdown pages draw."""
    lines = ["graph TD", f'  {_INPUT}(["x {_shape(graph.signature.input_shape)}"])']
    for node in graph.nodes:
        lines.append(f'  n_{node.name}["{_label(node)} {_shape(node.output_shape)}"]')
        for source in node.op.inputs:
            start = _INPUT if source == _INPUT else f"n_{source}"
            lines.append(f"  {start} --> n_{node.name}")
    return "\n".join(lines)
