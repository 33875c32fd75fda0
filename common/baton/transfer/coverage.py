"""Which part of a hand-over's KV is there: disjoint boxes, joined as they touch, so that there are few of them."""

from baton.transfer.wire import Box


class Coverage:
    """Of `wanted`. Whoever adds a box has checked that it lies inside and overlaps nothing."""

    def __init__(self, wanted: Box) -> None:
        self.wanted = wanted
        self._boxes: list[Box] = []

    def overlaps(self, box: Box) -> bool:
        return any(map(box.overlaps, self._boxes))

    def add(self, box: Box) -> None:
        if not box.volume:
            return
        for other in reversed(self._boxes):
            if (union := _joined(other, box)) is not None:
                self._boxes.remove(other)
                self.add(union)
                return
        self._boxes.append(box)

    @property
    def share(self) -> float:
        return self._volume / self.wanted.volume if self.wanted.volume else 1.0

    @property
    def is_complete(self) -> bool:
        """Disjoint boxes inside another one fill it when their volumes add up to its own."""
        return self._volume == self.wanted.volume

    @property
    def _volume(self) -> int:
        return sum(box.volume for box in self._boxes)


def _joined(a: Box, b: Box) -> Box | None:
    """One box, where they touch along one axis and are equal in the others."""
    for start in (0, 2, 4):
        end = start + 2
        if (
            a[:start] == b[:start]
            and a[end:] == b[end:]
            and (a[start + 1] == b[start] or b[start + 1] == a[start])
        ):
            span = (min(a[start], b[start]), max(a[start + 1], b[start + 1]))
            return Box._make((*a[:start], *span, *a[end:]))
    return None
