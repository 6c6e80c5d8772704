# SPDX-License-Identifier: Apache-2.0
"""Errors that speak to users: one message per failure, listing every problem found."""

from __future__ import annotations

from collections.abc import Sequence

SHOWN_PROBLEMS = 20


class UserError(ValueError):
    """A mistake that the user can mend: entry points print its text and exit with code 2."""


def raise_problems(title: str, problems: Sequence[str], *, advice: str = "") -> None:
    """Raise one `UserError` that lists the first problems and counts the rest.

    Args:
      title: what failed, where; a sentence without a full stop.
      problems: one line each; nothing happens when it is empty.
      advice: what to do, printed last.

    Raises:
      UserError: if there is at least one problem.
    """
    if not problems:
        return
    count = len(problems)
    lines = [f"{title} ({count} problem{'s' if count > 1 else ''}):"]
    lines += [f"  - {problem}" for problem in problems[:SHOWN_PROBLEMS]]
    if count > SHOWN_PROBLEMS:
        lines.append(f"  ... and {count - SHOWN_PROBLEMS} more")
    if advice:
        lines.append(advice)
    raise UserError("\n".join(lines))
