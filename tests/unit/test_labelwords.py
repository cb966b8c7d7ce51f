"""Label words: what recipes and files say, and the tokens that tokenizers have for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bmkit.errors import InputError, RecipeError
from bmkit.prompting.labelwords import (
    LabelWords,
    delete_common,
    parse,
    require_distinct,
    resolve,
    token_ids,
)
from bmkit.prompting.wordfiles import read_words

LABELS = ["negative", "positive"]


@pytest.fixture
def wordpiece() -> Any:
    """A WordPiece tokenizer with a few words, as BERT has."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[MASK]", "bad", "good", "great", "terrible", "a", "##ful", "wonder"]
    bare = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    bare.normalizer = normalizers.Lowercase()
    bare.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(
        tokenizer_object=bare, unk_token="[UNK]", pad_token="[PAD]", mask_token="[MASK]"
    )


@pytest.fixture
def pieces() -> Any:
    """A tokenizer that puts a space in front of any text, as those of Llama and T5 do."""
    from tokenizers import Tokenizer, models, normalizers
    from transformers import PreTrainedTokenizerFast

    known = [
        ("<unk>", 0.0),
        ("▁", -2.0),
        ("▁good", -1.0),
        ("▁a", -1.0),
        ("good", -1.5),
        ("▁go", -3.0),
    ]
    bare = Tokenizer(models.Unigram(known, unk_id=0))
    bare.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=bare, unk_token="<unk>")


def found(words: LabelWords) -> list[list[tuple[str, tuple[int, ...]]]]:
    return [[(w.text, w.ids) for w in own] for own in words.words]


def test_a_mapping_is_brought_into_the_order_of_labels_and_a_list_has_it() -> None:
    by_name = parse({"positive": ["good", "great"], "negative": "bad"}, LABELS)
    assert by_name == {"negative": ["bad"], "positive": ["good", "great"]}
    assert list(by_name) == LABELS
    assert parse(["bad", ["good", "great"]], LABELS) == by_name


@pytest.mark.parametrize(
    ("spec", "told", "hint"),
    [
        ({"negativ": "bad"}, "`negativ` is none of the labels", "did you mean `negative`?"),
        ({"negative": "bad"}, "`positive` has none", "each label takes some"),
        ({"negative": [], "positive": "good"}, "`negative` has none", None),
        ({"negative": ["bad", " "], "positive": "good"}, "an empty one", None),
        (["bad"], "1 lists of words for 2 labels", "in this order, negative, positive"),
    ],
)
def test_words_that_do_not_fit_the_labels_are_refused(
    spec: Any, told: str, hint: str | None
) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(spec, LABELS)
    assert told in str(caught.value)
    assert (hint or "") in (caught.value.hint or "")


def test_a_prefix_stands_before_words_unless_they_refuse_it(tokenizer: Any) -> None:
    words = resolve({"a": ["Paris", "<!>Paris"], "b": ["is"]}, tokenizer)
    for (text, ids), own in zip(found(words)[0], (" Paris", "Paris"), strict=True):
        assert text == own
        assert list(ids) == tokenizer(own, add_special_tokens=False)["input_ids"]
    assert words.words[0][0].ids != words.words[0][1].ids
    assert found(resolve({"a": ["Paris"], "b": ["is"]}, tokenizer, prefix=""))[0][0][0] == "Paris"
    ids = [i for word in words.flat for i in word.ids]
    assert list(words.token_ids) == sorted(set(ids))


def test_a_tokenizer_that_adds_a_space_finds_no_second_one(pieces: Any) -> None:
    assert pieces.convert_ids_to_tokens(pieces(" good")["input_ids"]) == ["▁", "▁good"]
    assert token_ids(pieces, "good", " ") == (2,)
    assert pieces.convert_ids_to_tokens(list(token_ids(pieces, "good"))) == ["▁good"]


def test_a_word_that_the_tokenizer_does_not_know_is_told_with_its_tokens(wordpiece: Any) -> None:
    with pytest.raises(InputError) as caught:
        resolve({"negative": ["terribly"], "positive": ["good"]}, wordpiece)
    assert str(caught.value) == (
        "label words: `terribly`, of `negative`, is none to the tokenizer: [UNK]"
    )
    assert caught.value.hint == "the vocabulary has `terrible`"
    with pytest.raises(InputError, match="is none to the tokenizer: nothing"):
        resolve({"a": ["\n"]}, wordpiece)


def test_words_of_several_tokens_are_taken_unless_whole_ones_are_asked_for(wordpiece: Any) -> None:
    spec = {"negative": ["bad"], "positive": ["wonderful"]}
    assert found(resolve(spec, wordpiece))[1] == [(" wonderful", (9, 8))]
    with pytest.raises(InputError, match="is 2 tokens: wonder ##ful") as caught:
        resolve(spec, wordpiece, whole=True)
    assert caught.value.hint == "the vocabulary has `wonder`"


def test_words_of_too_many_tokens_are_left_out(wordpiece: Any) -> None:
    spec = {"negative": ["bad"], "positive": ["wonderful", "good"]}
    assert found(resolve(spec, wordpiece, max_token_split=1))[1] == [(" good", (4,))]
    with pytest.raises(InputError, match="all of `positive` have more than 1 tokens"):
        resolve({**spec, "positive": ["wonderful"]}, wordpiece, max_token_split=1)


def test_words_that_are_the_same_to_the_tokenizer_count_once(wordpiece: Any) -> None:
    words = resolve({"negative": ["bad"], "positive": ["Good", "great", "good"]}, wordpiece)
    assert [word.text for word in words.words[1]] == [" Good", " great"]


def test_two_labels_with_the_same_words_are_refused(wordpiece: Any) -> None:
    same = {"negative": ["good", "great"], "positive": ["Great", "good"]}
    with pytest.raises(InputError, match="`negative` and `positive` have the same words"):
        resolve(same, wordpiece)
    resolve({**same, "positive": ["great"]}, wordpiece)
    firsts = resolve({"negative": ["wonder"], "positive": ["wonderful"]}, wordpiece)
    with pytest.raises(InputError, match="have the same first tokens") as caught:
        require_distinct(firsts, first_only=True)
    assert "multi_token_handler: mean" in (caught.value.hint or "")


def test_words_in_order_may_repeat_and_stand_one_at_each_mask(wordpiece: Any) -> None:
    words = resolve(
        {"x": ["good", "bad", "good"], "y": ["bad", "good", "good"]}, wordpiece, in_order=True
    )
    assert [[w.ids for w in own] for own in words.words] == [[(4,), (3,), (4,)], [(3,), (4,), (4,)]]
    with pytest.raises(InputError, match="`y` has 1, `x` has 2"):
        resolve({"x": ["good", "bad"], "y": ["bad"]}, wordpiece, in_order=True)
    with pytest.raises(InputError, match="the same words"):
        resolve({"x": ["good"], "y": ["Good"]}, wordpiece, in_order=True)


def test_words_come_back_from_json(wordpiece: Any) -> None:
    words = resolve({"y": ["wonderful", "<!>good"], "x": ["bad"]}, wordpiece)
    assert LabelWords.of_values(json.loads(json.dumps(words.values()))) == words


def test_words_of_several_labels_can_be_left_out(wordpiece: Any) -> None:
    words = resolve({"x": ["good", "bad"], "y": ["good", "great"]}, wordpiece)
    assert [[w.ids for w in own] for own in delete_common(words).words] == [[(3,)], [(5,)]]
    with pytest.raises(InputError, match="other labels have all words of `y`"):
        delete_common(resolve({"x": ["good", "bad"], "y": ["good"]}, wordpiece))


def test_files_of_text_have_a_line_for_each_label_and_sets_with_empty_lines(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("bad\n good, great ,\n\n\nterrible\ngreat\n \n", encoding="utf-8")
    assert read_words(path, LABELS) == {"negative": ["bad"], "positive": ["good", "great"]}
    assert read_words(path, LABELS, 1) == {"negative": ["terrible"], "positive": ["great"]}
    with pytest.raises(InputError, match="holds 2 sets of label words: there is no choice 2"):
        read_words(path, LABELS, 2)
    with pytest.raises(InputError, match=r"words.txt: label words: 2 lists of words for 3 labels"):
        read_words(path, [*LABELS, "neutral"])


def test_files_of_json_have_one_mapping_a_list_of_them_or_one_a_line(tmp_path: Path) -> None:
    one = {"positive": ["good"], "negative": "bad"}
    two = {"positive": ["great"], "negative": ["terrible"]}
    for content in (json.dumps([one, two], indent=1), f"{json.dumps(one)}\n{json.dumps(two)}\n"):
        path = tmp_path / "words.jsonl"
        path.write_text(content, encoding="utf-8")
        assert read_words(path, LABELS) == {"negative": ["bad"], "positive": ["good"]}
        assert read_words(path, LABELS, 1)["positive"] == ["great"]
    path.write_text(json.dumps(one, indent=1), encoding="utf-8")
    assert read_words(path, LABELS)["negative"] == ["bad"]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("w.json", "{", "it is not JSON"),
        ("w.json", '["bad", "good"]', "mappings from labels"),
        ("w.json", '{"negative": [1]}', "mappings from labels"),
        ("w.json", '{"negative": "bad", "good": "x"}', "`good` is none of the labels"),
        ("w.txt", "", "holds 0 sets"),
        ("w.yaml", "", "label words are in"),
        ("none.txt", None, "there is no file"),
    ],
)
def test_what_is_wrong_with_a_file_of_words_is_told(
    tmp_path: Path, name: str, content: str | None, told: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        read_words(path, LABELS)
    assert name in str(caught.value)
    assert told in str(caught.value)


def test_a_word_without_a_prefix_goes_on_where_another_ends(wordpiece: Any) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = ["<unk>", "▁", "▁a", "▁good", "good", "a", *"dgo.~"]
    bare = Tokenizer(models.Unigram([(w, -1.0 if len(w) > 1 else -5.0) for w in known], unk_id=0))
    bare.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    pieces = PreTrainedTokenizerFast(tokenizer_object=bare, unk_token="<unk>")
    for prefix, opens, token in ((" ", False, "▁good"), ("", False, "good"), ("", True, "▁good")):
        ids = token_ids(pieces, "good", prefix, opens=opens)
        assert pieces.convert_ids_to_tokens(list(ids)) == [token]
    found = resolve({"a": ["good"], "b": ["<!>good"]}, pieces)
    assert [own[0].ids for own in found.words] == [(3,), (4,)]
    assert token_ids(wordpiece, "good", "") == token_ids(wordpiece, "good", " ")
