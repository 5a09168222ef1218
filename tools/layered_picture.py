"""Draws layers of boxes with arrows that lead down, as SVG: tools/architecture.py's picture.

The method is Sugiyama's. An arrow that other arrows imply is left out. An arrow that passes rows gets a lane in each of
them, and arrows to the same target share lanes. Each row is ordered by the means of its neighbours; positions then
minimise the squared sideways distances in that order. Everything is sorted: equal graphs give equal text.
"""

import itertools
from dataclasses import dataclass, field
from html import escape

FONT = "font-family=\"system-ui, 'Segoe UI', Helvetica, Arial, sans-serif\""
TEXT, MUTED, LINE, BOX = "#1f2937", "#6b7280", "#94a3b8", "#ffffff"
MARGIN, LABELS, GAP, LANE = 24, 104, 22, 14
TITLE, ROW_GAP, NAME_HEIGHT, FILE_HEIGHT = 48, 27, 32, 15
FILES_PER_LINE = 3


@dataclass
class Box:
    """A room: its name, and the files within it if it is a package."""

    name: str
    files: list[str] = field(default_factory=list)

    @property
    def lines(self) -> list[str]:
        starts = range(0, len(self.files), FILES_PER_LINE)
        return [" · ".join(self.files[start : start + FILES_PER_LINE]) for start in starts]

    @property
    def width(self) -> float:
        return max(7.6 * len(self.name), *(5.8 * len(line) for line in self.lines), 34) + 24

    @property
    def height(self) -> float:
        return NAME_HEIGHT + (FILE_HEIGHT * len(self.lines) + 4 if self.files else 0)


@dataclass
class Panel:
    """A package: its title and a sentence, its colour, labelled rows of boxes, and arrows between boxes by name."""

    title: str
    sentence: str
    colour: str
    rows: list[tuple[str, list[Box]]]
    edges: set[tuple[str, str]]


Node = tuple[str, int]  # a box's name with row -1, or a lane to it in a row


def without_implied(edges: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The arrows that no path of several others replaces."""
    below: dict[str, set[str]] = {}
    for above, target in edges:
        below.setdefault(above, set()).add(target)

    def reached(start: str) -> set[str]:
        found: set[str] = set()
        waiting = list(below.get(start, ()))
        while waiting:
            name = waiting.pop()
            if name not in found:
                found.add(name)
                waiting += below.get(name, ())
        return found

    beyond = {name: reached(name) for name in below}
    return {
        (a, b) for a, b in edges if not any(b in beyond.get(c, ()) for c in below[a] if c != b)
    }  # fmt: skip


class Layout:
    """The order of a panel's boxes and lanes, and `x`, the middle of each, from the left edge of the leftmost."""

    def __init__(self, panel: Panel):
        self.boxes = {box.name: box for _, row in panel.rows for box in row}
        row_of = {box.name: i for i, (_, row) in enumerate(panel.rows) for box in row}
        self.rows: list[list[Node]] = [[(box.name, -1) for box in row] for _, row in panel.rows]
        self.links: set[tuple[Node, Node]] = set()
        for above, target in sorted(without_implied(panel.edges)):
            last: Node = (above, -1)
            for i in range(row_of[above] + 1, row_of[target]):
                lane = (target, i)
                if lane not in self.rows[i]:
                    self.rows[i].append(lane)
                self.links.add((last, lane))
                last = lane
            self.links.add((last, (target, -1)))
        self.order()
        self.x = self.positions()
        left = min(self.x[node] - self.width(node) / 2 for node in self.x)
        self.x = {node: x - left for node, x in self.x.items()}
        self.span = max(self.x[node] + self.width(node) / 2 for node in self.x)

    def width(self, node: Node) -> float:
        return self.boxes[node[0]].width if node[1] < 0 else LANE

    def neighbours(self, node: Node, above: bool) -> list[Node]:
        return sorted((a if above else b) for a, b in self.links if (b if above else a) == node)

    def crossings(self) -> int:
        place = {node: i for row in self.rows for i, node in enumerate(row)}
        count = 0
        for upper in self.rows:
            links = [(place[a], place[b]) for a, b in self.links if a in upper]
            count += sum((a - c) * (b - d) < 0 for a, b in links for c, d in links)
        return count

    def order(self) -> None:
        best, fewest = [list(row) for row in self.rows], self.crossings()
        for sweep in range(40):
            down = sweep % 2 == 0
            for i in range(1, len(self.rows)) if down else range(len(self.rows) - 2, -1, -1):
                other = {node: j / max(len(self.rows[i + (-1 if down else 1)]) - 1, 1) for j, node in
                         enumerate(self.rows[i + (-1 if down else 1)])}  # fmt: skip
                here = {node: j / max(len(self.rows[i]) - 1, 1) for j, node in enumerate(self.rows[i])}

                def mean(node: Node, other=other, here=here, down=down) -> float:
                    near = self.neighbours(node, above=down)
                    return sum(other[n] for n in near) / len(near) if near else here[node]

                self.rows[i].sort(key=mean)
            if self.crossings() < fewest:
                best, fewest = [list(row) for row in self.rows], self.crossings()
        self.rows = best

    def positions(self) -> dict[Node, float]:
        x: dict[Node, float] = {}
        for row in self.rows:
            total = sum(self.width(node) + GAP for node in row) - GAP
            edge = -total / 2
            for node in row:
                x[node] = edge + self.width(node) / 2
                edge += self.width(node) + GAP
        for sweep in range(60):
            for row in self.rows if sweep % 2 == 0 else self.rows[::-1]:
                wanted = []
                for node in row:
                    near = self.neighbours(node, True) + self.neighbours(node, False)
                    wanted.append(sum(x[n] for n in near) / len(near) if near else x[node])
                x.update(zip(row, self.spread(row, wanted), strict=True))
        return x

    def spread(self, row: list[Node], wanted: list[float]) -> list[float]:
        """The positions nearest to those wanted that keep order and distance (isotonic regression)."""
        offsets = [0.0]
        for left, right in itertools.pairwise(row):
            offsets.append(offsets[-1] + (self.width(left) + self.width(right)) / 2 + GAP)
        blocks: list[list[float]] = []  # sum and number of merged entries
        for want, offset in zip(wanted, offsets, strict=True):
            blocks.append([want - offset, 1])
            while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] >= blocks[-1][0] / blocks[-1][1]:
                total, number = blocks.pop()
                blocks[-1][0] += total
                blocks[-1][1] += number
        flat = [total / number for total, number in blocks for _ in range(int(number))]
        return [value + offset for value, offset in zip(flat, offsets, strict=True)]


def text(
    x: float, y: float, words: str, size: int, colour: str = TEXT, anchor: str = "middle", weight: int = 400
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{colour}" text-anchor="{anchor}" '
        f'font-weight="{weight}">{escape(words)}</text>'
    )


def arrow(points: list[tuple[float, float]], head: bool = True, colour: str = LINE) -> str:
    """A smooth line through the points, vertical at each."""
    path = f"M{points[0][0]:.1f},{points[0][1]:.1f}"
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        middle = (y0 + y1) / 2
        path += f" C{x0:.1f},{middle:.1f} {x1:.1f},{middle:.1f} {x1:.1f},{y1:.1f}"
    end = ' marker-end="url(#head)"' if head else ""
    return f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.4"{end}/>'


def draw_panel(panel: Panel, layout: Layout, top: float, width: float) -> tuple[list[str], float]:
    """The panel's elements, and the height of its lower edge."""
    left = MARGIN + LABELS + (width - 2 * MARGIN - LABELS - layout.span) / 2
    tops, heights, y = [], [], top + TITLE
    for _, row in panel.rows:
        tops.append(y)
        heights.append(max(box.height for box in row))
        y += heights[-1] + ROW_GAP
    bottom = y - ROW_GAP + 20
    out = [
        f'<rect x="{MARGIN / 2}" y="{top:.1f}" width="{width - MARGIN}" height="{bottom - top:.1f}" rx="12" '
        f'fill="{panel.colour}" fill-opacity="0.07" stroke="{panel.colour}" stroke-opacity="0.45"/>',
        text(MARGIN + 4, top + 27, panel.title, 18, panel.colour, "start", 700),
        text(MARGIN + 18 + 9.6 * len(panel.title), top + 27, panel.sentence, 13, MUTED, "start"),
    ]
    for (label, _), y, height in zip(panel.rows, tops, heights, strict=True):
        out.append(text(MARGIN + 4, y + height / 2 + 4, label, 12, MUTED, "start"))

    row_of = {node: i for i, row in enumerate(layout.rows) for node in row}

    def y_of(node: Node, lower: bool) -> float:
        i = row_of[node]
        return tops[i] + (heights[i] if lower else 0) if node[1] >= 0 else middle_top(node) + (
            layout.boxes[node[0]].height if lower else 0)  # fmt: skip

    def middle_top(node: Node) -> float:
        i = row_of[node]
        return tops[i] + (heights[i] - layout.boxes[node[0]].height) / 2

    for a, b in sorted(layout.links, key=lambda link: (row_of[link[0]], layout.x[link[0]], layout.x[link[1]])):
        leaving = sorted((n for m, n in layout.links if m == a), key=lambda n: layout.x[n])
        room = 0 if a[1] >= 0 else min(layout.width(a) - 24, 16 * (len(leaving) - 1))
        port = room * (leaving.index(b) / (len(leaving) - 1) - 0.5) if len(leaving) > 1 else 0
        start = left + layout.x[a] + port, y_of(a, lower=True)
        end = left + layout.x[b], y_of(b, lower=False) - (3 if b[1] < 0 else 0)
        points = [start, end] if b[1] < 0 else [start, end, (end[0], y_of(b, lower=True))]
        out.append(arrow(points, head=b[1] < 0))
    for name, box in layout.boxes.items():
        node = (name, -1)
        x, y = left + layout.x[node], middle_top(node)
        out.append(
            f'<rect x="{x - box.width / 2:.1f}" y="{y:.1f}" width="{box.width:.1f}" height="{box.height:.1f}" rx="6" '
            f'fill="{BOX}" stroke="{panel.colour}" stroke-width="1.2"/>'
        )
        out.append(text(x, y + 21, name, 14, TEXT, weight=600))
        for i, line in enumerate(box.lines):
            out.append(text(x, y + 21 + FILE_HEIGHT * (i + 1), line, 11, MUTED))
    return out, bottom


def render(panels: list[Panel], caption: str, between: dict[str, str]) -> str:
    """The picture: panels from top to bottom; `between` labels the arrow to each panel, by its title."""
    layouts = [Layout(panel) for panel in panels]
    width = max(layout.span for layout in layouts) + LABELS + 2 * MARGIN + 16
    out: list[str] = []
    y = float(MARGIN / 2)
    for panel, layout in zip(panels, layouts, strict=True):
        if out:
            out.append(arrow([(width / 2, y), (width / 2, y + 33)]))
            out.append(text(width / 2 + 12, y + 22, between.get(panel.title, ""), 12, MUTED, "start"))
            y += 36
        drawn, y = draw_panel(panel, layout, y, width)
        out += drawn
    out.append(text(MARGIN + 4, y + 26, caption, 12, MUTED, "start"))
    height = y + 40
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" {FONT}>',
        f'<defs><marker id="head" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0,0 L8,4 L0,8 z" fill="{LINE}"/></marker></defs>',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        *out,
        "</svg>",
    ]) + "\n"  # fmt: skip
