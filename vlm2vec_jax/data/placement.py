# SPDX-License-Identifier: Apache-2.0
"""Where the members of an image archive belong, read off the rows that name them.

The inner prefix of the hub's archives is not written down anywhere (`A-OKVQA/1.jpg`,
`images/A-OKVQA/1.jpg`, `MMEB/...`), so it is found: members and image paths with the same ending
vote for what to take off the front of a member's name and what to put there instead.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

_SAMPLE = 400
_SAME_NAME = 40


class Placement(NamedTuple):
    """How a member's name becomes an image path.

    Attributes:
      strip: taken off the front; a member without it belongs nowhere.
      add: put in front of the rest.
    """

    strip: str
    add: str

    def __call__(self, name: str) -> str | None:
        """The image path of a member, None if it belongs nowhere."""
        name = os.path.normpath(name)
        if not name.startswith(self.strip):
            return None
        return self.add + name[len(self.strip) :]


def find_placement(names: Sequence[str], wanted: Iterable[str]) -> Placement | None:
    """The placement under which most members are images that rows name.

    Args:
      names: members of an archive.
      wanted: image paths of the rows.

    Returns:
      The placement with most votes of a sample spread over the archive; None if no member ends
      like any path.
    """
    by_name: defaultdict[str, list[tuple[str, ...]]] = defaultdict(list)
    for path in wanted:
        parts = tuple(os.path.normpath(path).split("/"))
        if len(by_name[parts[-1]]) < _SAME_NAME:
            by_name[parts[-1]].append(parts)
    step = max(1, len(names) // _SAMPLE)
    votes: Counter[Placement] = Counter()
    for name in names[::step]:
        parts = tuple(os.path.normpath(name).split("/"))
        found = [(_common(parts, other), other) for other in by_name.get(parts[-1], ())]
        longest = max((length for length, _ in found), default=0)
        for length, other in found:
            if length == longest:
                strip, add = parts[: len(parts) - length], other[: len(other) - length]
                votes[Placement(_prefix(strip), _prefix(add))] += 1
    if not votes:
        return None
    # Of equally good ones the shortest, so that the answer does not depend on the order of rows.
    return min(votes, key=lambda p: (-votes[p], len(p.strip) + len(p.add), p))


def _prefix(parts: tuple[str, ...]) -> str:
    return "".join(f"{part}/" for part in parts)


def _common(a: tuple[str, ...], b: tuple[str, ...]) -> int:
    """How many parts at the end are the same."""
    count = 0
    for x, y in zip(reversed(a), reversed(b), strict=False):
        if x != y:
            break
        count += 1
    return count
