"""A model's tree on a terminal: a mark, a name, a role, a shape and figures a line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bmkit.deltas.view import Branch, State, Tree
from bmkit.env import format_bytes

if TYPE_CHECKING:
    from rich.text import Text
    from rich.tree import Tree as RichTree

MARKS: dict[State, str] = {"delta": "+", "trainable": "*", "frozen": "·"}
WIDTH = 200
STYLES: dict[State, str] = {"delta": "green", "trainable": "yellow", "frozen": "dim"}


def render(tree: Tree) -> RichTree:
    """Return a model's tree for rich to print, its summary above; marks say what colours do."""
    from rich.text import Text
    from rich.tree import Tree as RichTree

    head = Text.assemble((tree.root.type, "bold"), "\n", summary(tree), "\n", (legend(), "dim"))
    root = RichTree(head, guide_style="dim")
    _add(root, tree.root)
    return root


def text(tree: Tree, *, colours: bool) -> str:
    """Return a model's tree as lines of text, with codes for colours if a terminal reads it."""
    import io

    from rich.console import Console

    stream = io.StringIO()
    console = Console(
        file=stream, force_terminal=colours, no_color=not colours, width=WIDTH, highlight=False
    )
    console.print(render(tree), soft_wrap=True)
    return stream.getvalue()


def summary(tree: Tree) -> str:
    """Say in a line how much is trained, and what storing it takes."""
    trained = f"{tree.trained:,} of {tree.parameters:,} parameters are trained"
    stored, whole = format_bytes(tree.delta_bytes), format_bytes(tree.bytes)
    return f"{trained} ({100 * tree.share:.3g} %); the delta takes {stored}, all of it {whole}"


def legend() -> str:
    """Explain the marks."""
    words = {"delta": "delta", "trainable": "trained, of the base", "frozen": "frozen"}
    return "   ".join(f"{MARKS[state]} {words[state]}" for state in MARKS)


def _add(parent: RichTree, branch: Branch) -> None:
    for child in branch.children:
        _add(parent.add(_line(child)), child)


def _line(branch: Branch) -> Text:
    from rich.text import Text

    style = STYLES[branch.state]
    parts: list[tuple[str, str]] = [(f"{MARKS[branch.state]} ", style), (branch.name, "bold")]
    if branch.roles:
        parts.append((f"  {' '.join(branch.roles)}", "cyan"))
    parts.append((f"  {branch.type}", ""))
    if branch.shape:
        parts.append((f" {list(branch.shape)}", ""))
    parts.append((f"  {_figures(branch)}", style))
    return Text.assemble(*parts)


def _figures(branch: Branch) -> str:
    if branch.shared:
        return "shared"
    times = f"{branch.count} x " if branch.count > 1 else ""
    inside = [f"{times}{branch.parameters:,}"]
    whole = branch.parameters
    if branch.delta and branch.delta < whole:
        inside.append(f"delta {branch.delta:,}")
    if branch.trainable and branch.trainable < whole:
        inside.append(f"trained {branch.trainable:,}")
    return f"{', '.join(inside)}  {format_bytes(branch.count * branch.bytes)}"
