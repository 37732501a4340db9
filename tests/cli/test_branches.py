"""Several texts of a prompt on a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from tokenary.cli.branches import Branches
from tokenary.run import Piece


def piece(text, branch, copy_of=None):
    return Piece(0, text, [1], [False], None, branch, copy_of)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_block_for_each_text_with_its_newest_lines(terminal):
    screen = io.StringIO()
    branches = Branches(Console(file=screen, force_terminal=terminal, width=20, height=9))
    for text, branch, copy_of in (("one", 0, None), ("two", 1, None), (" more", 0, None), (" fork", 1, 0)):
        branches.add(piece(text, branch, copy_of))
    branches.add(piece(" 1 2 3 4 5 6 7 8 9 0" * 4, 0))
    branches.add(piece("joined", None))
    assert branches.texts[1] == "one more fork" and branches.texts[None] == "joined"
    shown = [line for block in branches._blocks().renderables for line in block.plain.splitlines()]
    assert shown[0] == "text 1" and shown[-4:] == ["text 2", "one more fork", "answer", "joined"] and len(shown) <= 8
    branches.close()
    assert ("one more fork" in screen.getvalue()) == terminal and bool(screen.getvalue()) == terminal
