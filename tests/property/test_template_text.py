"""Templates are written as text that is read back equal, whatever they say."""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st

from bmkit.errors import RecipeError
from bmkit.prompting import truncate
from bmkit.prompting.filters import FILTERS
from bmkit.prompting.pieces import Again, Mask, Meta, Piece, Placeholder, Soft, Special, Text
from bmkit.prompting.template import Template, parse, to_text
from bmkit.prompting.wrap import show, wrap

ODD = st.sampled_from([*"{}\"'\\ \n\r\t#\x00\x07\x85\u2028é\U0001f600", "{{", "}}", " {"])
WORDS = st.lists(st.characters(exclude_categories=["Cs"]) | ODD, max_size=8).map("".join)
NAMES = WORDS.filter(bool)
FLAGS = st.booleans()
USED = st.lists(st.sampled_from(sorted(FILTERS)), max_size=3).map(tuple)
SOFT = st.builds(
    Soft,
    st.none() | WORDS.filter(lambda word: bool(word.strip())),
    FLAGS,
    st.integers(1, 4),
    FLAGS,
    st.none(),
).map(lambda soft: soft if soft.duplicate > 1 else Soft(soft.word, soft.space))
PIECES = (
    st.builds(Text, WORDS, FLAGS, FLAGS)
    | st.builds(Placeholder, NAMES, FLAGS, FLAGS, USED)
    | st.builds(Meta, NAMES, FLAGS, FLAGS, USED)
    | st.builds(Mask, FLAGS)
    | SOFT
    | st.builds(Special, NAMES, FLAGS)
)


@st.composite
def templates(draw: st.DrawFn) -> Template:
    """Any pieces; some soft ones get a `soft_id`, and are used again behind."""
    pieces: list[Piece] = []
    known = 0
    for piece in draw(st.lists(PIECES, max_size=8)):
        if isinstance(piece, Soft) and draw(FLAGS):
            known += 1
            piece = Soft(piece.word, piece.space, piece.duplicate, piece.same, known)
        pieces.append(piece)
        if known and draw(FLAGS):
            pieces.append(Again(draw(st.integers(1, known)), draw(FLAGS)))
    return Template(tuple(pieces))


@given(templates())
@settings(max_examples=400, deadline=None)
@example(Template((Text("}"), Text("a\n"))))
def test_what_is_written_is_read_back_equal(template: Template) -> None:
    assert parse(to_text(template)) == template


@given(WORDS)
@settings(max_examples=200, deadline=None)
def test_doubled_braces_are_the_characters(words: str) -> None:
    text = words.replace("{", "{{").replace("}", "}}")
    assert show(wrap(parse(text), {}, 1)).strip(" ") == words.rstrip(" \r\n").strip(" ")


@given(st.lists(ODD | st.sampled_from(['"mask"', '"soft"', ": None", ", ", "lambda"])).map("".join))
@settings(max_examples=400, deadline=None)
def test_any_text_is_read_or_refused_in_words(text: str) -> None:
    try:
        template = parse(text)
    except RecipeError as exc:
        assert "column" in str(exc)
    else:
        assert parse(to_text(template)) == template


@given(
    st.lists(st.integers(0, 9), max_size=6),
    st.data(),
    st.sampled_from(["tail", "head", "balanced"]),
)
def test_just_as_many_tokens_go_as_are_too_many(
    lengths: list[int], data: st.DataObject, method: truncate.Method
) -> None:
    excess = data.draw(st.integers(0, sum(lengths)))
    kept = truncate.keep(lengths, excess, method)
    left = [len(range(n)[part]) for n, part in zip(lengths, kept, strict=True)]
    assert sum(left) == sum(lengths) - excess
    joined = [(place, at) for place, n in enumerate(lengths) for at in range(n)]
    stay = [(place, at) for place, part in enumerate(kept) for at in range(lengths[place])[part]]
    if method == "tail":
        assert stay == joined[: len(joined) - excess]
    elif method == "head":
        assert stay == joined[excess:]
    else:
        assert all(part.start == 0 for part in kept)
        for length, n in zip(lengths, left, strict=True):
            assert abs((length - n) - length * excess / max(sum(lengths), 1)) < 1
