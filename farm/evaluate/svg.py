"""A small SVG canvas: elements in user units, colours as CSS classes, texts escaped by the XML writer."""

import math
from collections.abc import Sequence
from typing import Literal
from xml.etree import ElementTree

from markupsafe import Markup

Anchor = Literal["start", "middle", "end"]
Point = tuple[float, float]


class Canvas:
    """One drawing. `classes` are names that the page's style sheet colours for light and dark."""

    def __init__(self, width: float, height: float, label: str) -> None:
        self._root = ElementTree.Element(
            "svg",
            {
                "viewBox": f"0 0 {width:g} {height:g}",
                "width": f"{width:g}",
                "role": "img",
                "aria-label": label,
            },
        )

    def line(self, start: Point, end: Point, classes: str) -> None:
        self._add("line", classes, x1=start[0], y1=start[1], x2=end[0], y2=end[1])

    def rect(self, corner: Point, size: Point, classes: str, hint: str = "") -> None:
        """A filled rectangle; `hint` is shown while the pointer rests on it."""
        element = self._add(
            "rect", classes, x=corner[0], y=corner[1], width=max(size[0], 0.0), height=size[1], rx=2
        )
        if hint:
            ElementTree.SubElement(element, "title").text = hint

    def dot(self, centre: Point, classes: str, hint: str = "") -> None:
        element = self._add("circle", classes, cx=centre[0], cy=centre[1], r=3.2)
        if hint:
            ElementTree.SubElement(element, "title").text = hint

    def polyline(self, points: Sequence[Point], classes: str) -> None:
        if len(points) > 1:
            self._add("polyline", classes, points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points))

    def text(
        self, at: Point, content: str, classes: str = "", anchor: Anchor = "start", limit: int | None = None
    ) -> None:
        """Text at its baseline; longer than `limit` characters it is cut, and the whole is its hint."""
        element = self._add("text", classes, x=at[0], y=at[1])
        element.set("text-anchor", anchor)
        element.text = content
        if limit is not None and len(content) > limit:
            element.text = content[: limit - 1] + "…"
            ElementTree.SubElement(element, "title").text = content

    def markup(self) -> Markup:
        return Markup(ElementTree.tostring(self._root, encoding="unicode"))

    def _add(self, tag: str, classes: str, **numbers: float | str) -> ElementTree.Element:
        attributes = {
            key: value if isinstance(value, str) else f"{value:.2f}" for key, value in numbers.items()
        }
        if classes:
            attributes["class"] = classes
        return ElementTree.SubElement(self._root, tag, attributes)


class Scale:
    """Linear map of [low, high] onto [start, end]; values outside are clamped to the ends."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.high = low, high if high > low else low + 1.0
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, wanted: int = 5) -> list[float]:
        """Round numbers inside [low, high], about `wanted` of them."""
        raw = (self.high - self.low) / max(wanted, 1)
        magnitude = 10.0 ** math.floor(math.log10(raw))
        step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= raw * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]
