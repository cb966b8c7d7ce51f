"""Prompts in tokens: against what the plain tokenizer makes of the whole text."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from bmkit.errors import InputError, RecipeError
from bmkit.prompting.chat import parse_chat
from bmkit.prompting.encode import Encoded, Encoder, Kind, SoftRow
from bmkit.prompting.template import Template, parse
from bmkit.prompting.truncate import Method
from bmkit.prompting.wrap import show, wrap

CORPUS = [
    "It was a very good film, and the actors were good.",
    "Premise: it is bad. Hypothesis: it was great? Yes, or no.",
    "The answer is a film that is not bad. Question: what is it?",
    'A ("good") answer is good! A very good one.',
]
ROWS = [
    {"a": "A very good film.", "b": "The answer is bad."},
    {"a": "It is not what it was, or is it?", "b": "was"},
    {"a": "é☃ zebra", "b": "(bad)"},
    {"a": "", "b": ""},
]


def bert() -> Any:
    """A WordPiece tokenizer, as BERT's."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bare = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    bare.normalizer = normalizers.BertNormalizer(lowercase=True)
    bare.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    bare.train_from_iterator(
        CORPUS,
        trainers.WordPieceTrainer(vocab_size=120, special_tokens=special, show_progress=False),
    )
    bare.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = ("pad", "unk", "cls", "sep", "mask")
    given = {f"{n}_token": token for n, token in zip(names, special, strict=True)}
    return PreTrainedTokenizerFast(tokenizer_object=bare, **given)


def roberta(*, prefix: bool = False) -> Any:
    """A byte-level BPE tokenizer, as those of RoBERTa and BART; some put a blank in front."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=[*special, AddedToken("<mask>", lstrip=True)],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    bare.train_from_iterator(CORPUS, trainer)
    bare.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    given = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=bare, **given, mask_token="<mask>")


def t5(scheme: str = "always") -> Any:
    """A Unigram tokenizer with sentinels, as T5's."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bare = Tokenizer(models.Unigram())
    bare.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    sentinels = [f"<extra_id_{i}>" for i in range(3)]
    trainer = trainers.UnigramTrainer(
        vocab_size=90,
        special_tokens=["<pad>", "</s>", "<unk>", *sentinels],
        unk_token="<unk>",
        show_progress=False,
    )
    bare.train_from_iterator(CORPUS * 3, trainer)
    bare.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    given = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=bare, **given, additional_special_tokens=sentinels
    )


def llama() -> Any:
    """A BPE tokenizer that falls back to bytes and puts a blank in front, as Llama 2's."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    bare = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    bare.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=360, special_tokens=special, show_progress=False)
    bare.train_from_iterator(CORPUS, trainer)
    bare.pre_tokenizer = None
    bare.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    bare.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    given = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=bare, **given)


MADE: dict[str, Callable[[], Any]] = {
    "bert": bert,
    "roberta": roberta,
    "roberta prefix": lambda: roberta(prefix=True),
    "t5": t5,
    "t5 first": lambda: t5("first"),
    "llama": llama,
}


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    """Every tokenizer, once."""
    return {name: make() for name, make in MADE.items()}


def encode(
    tokenizer: Any,
    kind: Kind,
    text: str | Template,
    row: dict[str, Any],
    length: int = 1000,
    method: Method = "tail",
    **more: int,
) -> Encoded:
    template = parse(text) if isinstance(text, str) else text
    return Encoder(tokenizer, kind, length, method, **more).encode(wrap(template, row, 1), 1)


def plain(tokenizer: Any, text: str, *, ends: bool = True) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=ends)["input_ids"]
    return ids


# Borders with blanks or punctuation, at which no tokenizer joins what is on both sides.
WHOLE = [
    '{"placeholder":"a"}',
    'Premise: {"placeholder":"a"} Hypothesis: {"placeholder":"b"} Yes, or no?',
    'The answer is {"text": "not"} {"placeholder":"a"}',
    '{"placeholder":"a"} {"placeholder":"b"}. It was good',
]


@pytest.mark.parametrize("text", WHOLE)
@pytest.mark.parametrize("row", ROWS[:3], ids=range(3))
@pytest.mark.parametrize("name", MADE)
def test_pieces_make_the_tokens_of_the_whole_text(
    made: dict[str, Any], name: str, text: str, row: dict[str, str]
) -> None:
    parts = wrap(parse(text), row, 1)
    encoder = Encoder(made[name], "causal", 1000)
    wanted = plain(made[name], show(parts))
    if name != "llama":
        wanted = wanted[:-1]  # the end that a causal prompt doesn't have
    assert encoder.encode(parts).ids == wanted


GLUED = '("{"placeholder":"b"}") {"placeholder":"a"}: {"mask"}, or {"mask"}!'


@pytest.mark.parametrize("row", ROWS[:2], ids=range(2))
@pytest.mark.parametrize("name", ["roberta", "roberta prefix", "t5", "t5 first"])
def test_no_blank_comes_in_where_none_is_written(
    made: dict[str, Any], name: str, row: dict[str, str]
) -> None:
    kind: Kind = "seq2seq" if name.startswith("t5") else "masked"
    done = encode(made[name], kind, GLUED, row)
    written = ""
    for token, role in zip(made[name].convert_ids_to_tokens(done.ids), done.roles, strict=True):
        shown = "<mask>" if role == "mask" else token.replace("▁", " ").replace("Ġ", " ")
        written += shown if role != "added" else ""
    # A mask token has no blank before it; some tokenizers put one before any text.
    wanted = show(wrap(parse(GLUED), row, 1)).replace(" <mask>", "<mask>")
    assert written == (f" {wanted}" if name != "roberta" else wanted)


def library(name: str) -> Any:
    """A tokenizer of one of the classes that transformers has, with a small vocabulary."""
    import transformers

    if name == "ByT5Tokenizer":
        return transformers.ByT5Tokenizer()
    known = json.loads((llama if name == "LlamaTokenizer" else t5)().backend_tokenizer.to_str())
    vocabulary = known["model"]["vocab"]
    kind = getattr(transformers, name)
    if name == "LlamaTokenizer":
        return kind(vocab=vocabulary, merges=[tuple(m) for m in known["model"]["merges"]])
    words = [tuple(word) for word in vocabulary[6:]]
    special = ["<pad>", "</s>", "<unk>"] if name == "T5Tokenizer" else ["<pad>", "<unk>", "<mask>"]
    return kind(vocab=[*((token, 0.0) for token in special), *words])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ByT5Tokenizer", "seq2seq"),
        ("T5Tokenizer", "seq2seq"),
        ("XLMRobertaTokenizer", "masked"),
        ("LlamaTokenizer", "causal"),
    ],
)
def test_the_classes_that_transformers_has_are_understood(name: str, kind: Kind) -> None:
    tokenizer = library(name)
    done = encode(tokenizer, kind, GLUED, ROWS[0])
    tokens = tokenizer.convert_ids_to_tokens(done.ids + done.behind)
    written = ""
    for token, role in zip(tokens, done.roles, strict=True):
        shown = "<mask>" if role == "mask" else token.replace("▁", " ")
        written += shown if role != "added" else ""
    wanted = show(wrap(parse(GLUED), ROWS[0], 1))
    wanted = wanted.replace(" <mask>", "" if kind == "causal" else "<mask>")
    assert written.removeprefix(" ") == wanted
    added = [at for at, role in enumerate(done.roles) if role == "added"]
    ends = {"masked": [0, len(tokens) - 1], "seq2seq": [len(tokens) - 1], "causal": []}
    assert added == ends[kind]


def test_an_unknown_character_right_behind_a_piece_stays(made: dict[str, Any]) -> None:
    tokenizer = made["t5"]
    done = encode(tokenizer, "seq2seq", '{"mask"}{"placeholder":"a"}', {"a": "☃☃ it"})
    known = tokenizer.convert_ids_to_tokens(done.ids)
    assert known[:2] == ["<extra_id_0>", "<unk>"]
    assert known[2:-1] == tokenizer.tokenize("it") and known[-1] == "</s>"
    done = encode(made["llama"], "causal", 'it{"placeholder":"a"}', {"a": "☃"})
    assert made["llama"].convert_ids_to_tokens(done.ids[-3:]) == ["<0xE2>", "<0x98>", "<0x83>"]
    assert done.ids[:-3] == plain(made["llama"], "it")


def words_of(tokenizer: Any, ids: list[int]) -> str:
    """Write tokens as text."""
    text = "".join(tokenizer.convert_ids_to_tokens(ids))
    return text.replace("▁", " ").replace("Ġ", " ").replace("<0x41>", "A")


def test_a_masked_prompt_has_its_roles(made: dict[str, Any]) -> None:
    tokenizer = made["bert"]
    text = 'It {"meta":"b"} {"soft"} {"mask"} {"placeholder":"a"} {"special":"<sep>"} {"mask"}'
    done = encode(tokenizer, "masked", text, {"a": "good film", "b": "was"})
    assert tokenizer.convert_ids_to_tokens(done.ids) == [
        *("[CLS]", "it", "was", "[PAD]", "[MASK]", "good", "film", "[SEP]", "[MASK]", "[SEP]")
    ]
    assert done.roles == [
        *("added", "text", "meta", "soft", "mask", "placeholder", "placeholder"),
        *("special", "mask", "added"),
    ]
    assert done.piece == [-1, 0, 1, 2, 3, 4, 4, 5, 6, -1]
    assert done.masks == done.reads == [4, 8]
    assert done.soft == [-1, -1, -1, 0, -1, -1, -1, -1, -1, -1]
    assert (done.behind, done.decoder_ids, done.cut) == ([], [], 0)


def test_a_causal_prompt_ends_where_its_mask_is(made: dict[str, Any]) -> None:
    tokenizer = made["llama"]
    done = encode(tokenizer, "causal", '{"placeholder":"a"} It was {"mask"}. No', ROWS[0])
    before = plain(tokenizer, "A very good film. It was")
    assert done.ids == before
    assert done.masks == [len(before)] and done.reads == [len(before) - 1]
    whole = plain(tokenizer, "A very good film. It was. No")
    assert done.ids + done.behind == whole
    assert len(done.roles) == len(done.piece) == len(done.soft) == len(whole)
    assert done.roles[0] == "added" and done.roles[-1] == "text" and "mask" not in done.roles
    two = encode(tokenizer, "causal", 'It was {"mask"} or {"mask"} bad', {})
    assert two.masks[1] == len(two.ids) + len(plain(tokenizer, "or", ends=False))


def test_a_causal_prompt_that_begins_with_its_mask_gets_a_token_to_begin_with(
    made: dict[str, Any], tokenizer: Any
) -> None:
    llama, text = made["llama"], '{"placeholder":"a"} {"mask"} was it'
    assert encode(llama, "causal", text, {"a": ""}).ids == [llama.bos_token_id]
    done = encode(tokenizer, "causal", text, {"a": ""})
    assert done.ids == [tokenizer.eos_token_id] and done.roles[0] == "added"
    assert done.masks == [1] and done.reads == [0]
    short = encode(tokenizer, "causal", text, {"a": "It is what it is"}, len(done.behind) + 1)
    assert short.ids == plain(tokenizer, "It is what it is")[:1]
    none = encode(
        tokenizer, "causal", text, {"a": "It is what it is"}, len(done.behind) + 1, "head"
    )
    assert len(none.ids) == 1 and none.roles[0] == "placeholder"
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="row 9: nothing is before the mask"):
        Encoder(tokenizer, "causal", 99).encode(wrap(parse(text), {"a": ""}, 9), 9)


def test_a_prompt_cut_to_nothing_begins_with_a_token_within_the_length(tokenizer: Any) -> None:
    text = '{"placeholder":"a"}{"mask"}{"text":" It is","shortenable":False}'
    behind = len(plain(tokenizer, " It is"))
    with pytest.raises(RecipeError, match=f"has {behind + 1} tokens, and max_seq_length is"):
        encode(tokenizer, "causal", text, {"a": "Paris"}, behind)
    done = encode(tokenizer, "causal", text, {"a": "Paris"}, behind + 1)
    assert len(done.ids) == 1 and len(done.behind) == behind


def test_t5_gets_sentinels_and_a_decoder_that_answers_them(made: dict[str, Any]) -> None:
    tokenizer = made["t5"]
    done = encode(tokenizer, "seq2seq", 'It {"mask"} a {"mask"}.', {})
    ids = tokenizer.convert_tokens_to_ids(["<pad>", "<extra_id_0>", "<extra_id_1>", "</s>"])
    assert [done.ids[at] for at in done.masks] == ids[1:3]
    assert done.decoder_ids == ids[:3] and done.reads == [1, 2]
    assert done.ids[-1] == ids[3] and done.roles[-1] == "added"
    assert tokenizer.convert_ids_to_tokens(done.ids[-2]) == "."
    with pytest.raises(RecipeError, match="more masks than the vocabulary's 3"):
        encode(tokenizer, "seq2seq", '{"mask"}' * 4, {})
    assert encode(tokenizer, "seq2seq", '{"mask"}', {}, decoder_start=5).decoder_ids[0] == 5


def test_bart_gets_masks_and_a_decoder_that_says_the_text(made: dict[str, Any]) -> None:
    tokenizer = made["roberta"]
    text = 'It {"mask"} a {"soft"} {"mask"}.'
    done = encode(tokenizer, "seq2seq", text, {}, soft_start=1000)
    assert [done.ids[at] for at in done.masks] == [tokenizer.mask_token_id] * 2
    assert done.decoder_ids == [tokenizer.eos_token_id, *done.ids[: done.masks[-1]]]
    assert 1000 in done.decoder_ids and done.reads == done.masks
    for at in done.reads:  # what the decoder has read is what stands before the mask
        assert done.decoder_ids[1 : at + 1] == done.ids[:at]


def test_soft_tokens_have_rows_in_the_order_of_the_template(made: dict[str, Any]) -> None:
    tokenizer = made["roberta"]
    text = (
        '{"soft":"Question: what","soft_id":1} {"soft"}{"soft":None,"duplicate":2,"same":True} '
        '{"placeholder":"a"} {"soft":"bad","duplicate":2} {"mask"} {"soft_id":1}'
    )
    template = parse(text)
    encoder = Encoder(tokenizer, "masked", 1000, soft_start=500)
    rows = encoder.soft_rows(template)
    question, bad = (plain(tokenizer, t, ends=False) for t in ("Question: what", " bad"))
    q, b = len(question), len(bad)
    assert rows == [
        *(SoftRow(0, token, "Question: what", True) for token in question),
        SoftRow(1, None, None, False),
        SoftRow(2, None, None, True),
        *(SoftRow(3, token, "bad", False) for token in bad),
        *(SoftRow(4, token, "bad", False) for token in bad),
    ]
    done = encoder.encode(wrap(template, {"a": "It"}, 1))
    stand = [*range(q), q, q + 1, q + 1, *range(q + 2, q + 2 + 2 * b), *range(q)]
    assert [row for row in done.soft if row >= 0] == stand
    assert [i for i, r in zip(done.ids, done.soft, strict=True) if r >= 0] == [
        500 + row for row in stand
    ]
    assert all((role == "soft") == (r >= 0) for role, r in zip(done.roles, done.soft, strict=True))


def test_a_soft_word_begins_as_the_tokens_that_it_has_in_its_place(made: dict[str, Any]) -> None:
    tokenizer = made["t5"]
    template = parse('{"soft":"it"} {"soft":"it"}{"soft":"it"}{"soft":"it","duplicate":2}{"mask"}')
    rows = Encoder(tokenizer, "seq2seq", 99).soft_rows(template)
    behind_a_blank = tokenizer.tokenize("it")
    assert behind_a_blank[0].startswith("▁")
    told = [[r.token for r in rows if r.span == span] for span in range(5)]
    words = [words_of(tokenizer, ids) for ids in told]
    assert words == [" it", " it", "it", "it", "it"]


def test_special_tokens_go_by_role_or_by_name(made: dict[str, Any], tokenizer: Any) -> None:
    for name in ("<sep>", "<eos>", "[SEP]"):
        done = encode(made["bert"], "masked", f'{{"special":"{name}"}}', {})
        assert done.ids == [2, 3, 3]
    assert encode(made["bert"], "masked", '{"special":"<bos>"}{"special":"<mask>"}', {}).masks == []
    with pytest.raises(RecipeError, match="no special token `<mask>`"):
        encode(tokenizer, "causal", '{"special":"<mask>"}', {})
    with pytest.raises(RecipeError, match="no special token `<end>`") as caught:
        encode(tokenizer, "causal", '{"special":"<end>"}', {})
    assert "<|im_end|>" in str(caught.value.hint)


def test_a_tokenizer_without_a_mask_token_can_not_be_masked(made: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="no mask token"):
        Encoder(made["llama"], "masked", 10)
    with pytest.raises(RecipeError, match="no mask token"):
        Encoder(made["llama"], "seq2seq", 10)


LONG = '{"placeholder":"a"} is {"placeholder":"b"} {"meta":"m"} {"mask"}'
WORDS = {"a": "it is bad it is bad", "b": "good film", "m": "film film"}


@pytest.mark.parametrize(
    ("method", "length", "left"),
    [
        ("tail", 14, ["it is bad it is bad", "good film"]),
        ("tail", 13, ["it is bad it is bad", "good"]),
        ("tail", 11, ["it is bad it is", ""]),
        ("head", 13, ["is bad it is bad", "good film"]),
        ("head", 7, ["", "film"]),
        ("balanced", 13, ["it is bad it is", "good film"]),
        ("balanced", 10, ["it is bad", "good"]),
        ("balanced", 6, ["", ""]),
        ("head", 6, ["", ""]),
    ],
)
def test_only_what_may_be_shortened_is_shortened(
    made: dict[str, Any], method: Method, length: int, left: list[str]
) -> None:
    tokenizer = made["bert"]
    full = encode(tokenizer, "masked", LONG, WORDS)
    assert len(full.ids) == 14 and full.cut == 0
    done = encode(tokenizer, "masked", LONG, WORDS, length, method)
    assert len(done.ids) == length and done.cut == 14 - length
    assert len(done.roles) == len(done.piece) == len(done.soft) == length
    for piece, words in ((0, left[0]), (2, left[1]), (1, "is"), (3, "film film")):
        ids = [i for i, p in zip(done.ids, done.piece, strict=True) if p == piece]
        assert tokenizer.convert_ids_to_tokens(ids) == words.split()
    assert [done.ids[at] for at in done.masks] == [tokenizer.mask_token_id]
    assert [done.roles[at] for at in done.masks] == ["mask"]


def test_a_template_that_is_too_long_by_itself_tells_both_lengths(made: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=r"row 4: .* has 6 tokens, and max_seq_length is 5"):
        Encoder(made["bert"], "masked", 5).encode(wrap(parse(LONG), WORDS, 4), 4)


def counted(tokenizer: Any, calls: list[list[str]]) -> Any:
    """Return a tokenizer of a class that writes down the lists of texts that it gets."""
    kind = type(tokenizer)

    class Counted(kind):  # type: ignore[misc, valid-type]
        def __call__(self, texts: Any, *given: Any, **more: Any) -> Any:
            calls.append(texts)
            return super().__call__(texts, *given, **more)

    return Counted(tokenizer_object=tokenizer.backend_tokenizer, **tokenizer.special_tokens_map)


def test_many_rows_are_tokenised_at_once_and_as_one_by_one(made: dict[str, Any]) -> None:
    template = parse('{"placeholder":"a"} {"soft":"It was"} {"placeholder":"b"}. {"mask"}!')
    parts = [wrap(template, row, n) for n, row in enumerate(ROWS * 5)]
    for name, kind in (("bert", "masked"), ("t5", "seq2seq"), ("llama", "causal")):
        calls: list[list[str]] = []
        encoder = Encoder(counted(made[name], calls), kind, 40)  # type: ignore[arg-type]
        encoder.encode(parts[0])
        calls.clear()
        together = encoder.encode_all(parts)
        texts = [text for call in calls for text in call]
        assert len(calls) <= 3 and len(texts) == len(set(texts)) <= 11
        assert together == [encoder.encode(p) for p in parts]


@pytest.mark.parametrize("name", list(MADE))
def test_what_looks_like_a_special_token_in_a_row_is_text(made: dict[str, Any], name: str) -> None:
    tokenizer = made[name]
    special = next(t for t in tokenizer.all_special_tokens if t != tokenizer.unk_token)
    number = tokenizer.convert_tokens_to_ids(special)
    template = '{"placeholder":"a"} is {"meta":"b"} {"special":"' + special + '"} x'
    kind: Kind = "causal"  # whose prompts have no masks of their own
    row = {"a": f"good {special} film", "meta": {"b": special}}
    found = encode(tokenizer, kind, template + ' {"mask"}', row)
    places = [at for at, token in enumerate(found.ids) if token == number]
    roles = {found.roles[at] for at in places}
    assert "special" in roles and not roles & {"placeholder", "meta"}
    if not name.startswith("t5"):  # where it is a piece of the vocabulary, it is left out
        assert found.roles.count("placeholder") > len(plain(tokenizer, "good film", ends=False))


def test_no_rows_are_no_prompts(made: dict[str, Any]) -> None:
    assert Encoder(made["t5"], "seq2seq", 40).encode_all([]) == []


SCAFFOLDS = [
    (
        "{{ '<s>' }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] "
        "+ ' [/INST]' }}{% else %}{{ ' ' + m['content'] + '</s>' }}{% endif %}{% endfor %}",
        "<s>[INST] A very good film. Is it good? [/INST] It is",
    ),
    (
        "{{ '<s>' }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] | trim + '</s>' }}"
        "{% endfor %}",
        "<s>user: A very good film. Is it good?</s>assistant: It is",
    ),
]


@pytest.mark.parametrize(("chat_template", "text"), SCAFFOLDS)
@pytest.mark.parametrize("name", ["llama", "roberta"])
def test_a_chat_has_the_tokens_of_the_chat_template_and_no_others(
    made: dict[str, Any], name: str, chat_template: str, text: str
) -> None:
    tokenizer = made[name]
    tokenizer.chat_template = chat_template
    chat = parse_chat(
        [
            {"role": "user", "content": '{"placeholder":"a"} Is it good?'},
            {"role": "assistant", "content": 'It is {"mask"}'},
        ]
    )
    done = encode(tokenizer, "causal", chat.template(tokenizer), ROWS[0])
    assert done.ids == plain(tokenizer, text, ends=False)
    assert done.behind == []
    own = [i for i, role in zip(done.ids, done.roles, strict=True) if role == "placeholder"]
    assert words_of(tokenizer, own) == " A very good film."
