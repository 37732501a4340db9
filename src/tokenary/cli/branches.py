"""The texts that an answer is made from, on stderr: live on a terminal, as labelled blocks at the end."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from tokenary.cli import output

if TYPE_CHECKING:
    from tokenary.run import Branch, Piece


class Branches:
    """Collects the pieces of every branch; on a terminal, shows the newest lines of each in a block of its own.

    Parameters
    ----------
    console : Console, optional
        That of stderr, if none is given.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(file=sys.stderr)
        self.texts: dict[int | None, str] = {}  # by branch; None is the answer
        self._live: Live | None = None

    def add(self, piece: Piece) -> None:
        """Take a piece of a branch, or of the answer that is made from branches."""
        start = piece.branch if piece.copy_of is None else piece.copy_of
        self.texts[piece.branch] = self.texts.get(start, "") + piece.text
        if self.console.is_terminal:
            if self._live is None:
                self._live = Live(console=self.console, transient=True)
                self._live.start()
            self._live.update(self._blocks())

    def close(self) -> None:
        """Clear the screen of what was shown live."""
        if self._live is not None:
            self._live.stop()

    def _blocks(self) -> Group:
        lines = max(1, (self.console.height - 1) // len(self.texts) - 1)
        shown: list[Text] = []
        for branch, text in sorted(self.texts.items(), key=lambda item: (item[0] is None, item[0])):
            shown.append(Text("answer" if branch is None else f"text {branch + 1}", style="bold"))
            shown += Text(text.strip()).wrap(self.console, self.console.width)[-lines:]
        return Group(*shown)


def print_branches(branches: Sequence[Branch]) -> None:
    """Print every branch under a line that says how it ended and, where it has one, its log-weight."""
    weighted = any(branch.log_weight for branch in branches)
    for number, branch in enumerate(branches, start=1):
        weight = f", log-weight {branch.log_weight:.2f}" if weighted else ""
        output.note(f"[text {number} of {len(branches)}: {branch.finish}{weight}]\n{branch.text.strip()}\n")
