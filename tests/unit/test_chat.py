"""Chat, prompts and text to token ids, and which of them bear loss."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bmkit.data.batch import Padding
from bmkit.data.chat import Encoded, encode_file
from bmkit.errors import InputError

IGNORED = -100
END = "<|im_end|>"

Chat = list[dict[str, str]]

ONE_TURN: Chat = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "It is Paris."},
]
SYSTEM: Chat = [{"role": "system", "content": "You answer in one word."}, *ONE_TURN]
TWO_TURNS: Chat = [
    *SYSTEM,
    {"role": "user", "content": "And what is 2 + 2?\n\n"},
    {"role": "assistant", "content": "\n\nIt is 4."},
]
UNANSWERED: Chat = [*TWO_TURNS, {"role": "user", "content": "Thanks."}]
TWO_ANSWERS: Chat = [*ONE_TURN, {"role": "assistant", "content": "The answer is Paris."}]


def write(path: Path, *rows: object) -> Path:
    """Write JSON lines."""
    file = path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture
def encode(tmp_path: Path, tokenizer: Any) -> Callable[..., Encoded]:
    """Encode rows with the small tokenizer."""

    def run(*rows: object, max_length: int = 1000, raw: bool = False) -> Encoded:
        file = write(tmp_path, *rows)
        return encode_file(file, tokenizer, max_length=max_length, raw=raw)

    return run


def pieces(messages: Chat) -> list[tuple[str, bool]]:
    """Write the chat as ChatML in pieces: what is read, and what is said with its end."""
    found: list[tuple[str, bool]] = []
    text = ""
    for message in messages:
        text += f"<|im_start|>{message['role']}\n"
        if message["role"] == "assistant":
            found += [(text, False), (f"{message['content']}{END}", True)]
            text = "\n"
        else:
            text += f"{message['content']}{END}\n"
    return found


def expected(parts: list[tuple[str, bool]], tokenizer: Any) -> dict[str, list[int]]:
    """Tokenise pieces of text with the bare tokenizer; learned pieces bear their own labels."""
    example: dict[str, list[int]] = {"input_ids": [], "labels": []}
    for text, learn in parts:
        ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        example["input_ids"] += ids
        example["labels"] += ids if learn else [IGNORED] * len(ids)
    return example


@pytest.mark.parametrize(
    "messages", [ONE_TURN, SYSTEM, TWO_TURNS, TWO_ANSWERS], ids=["one", "system", "two", "twice"]
)
def test_loss_falls_on_assistant_turns_and_their_ends_only(
    encode: Callable[..., Encoded], tokenizer: Any, messages: Chat
) -> None:
    encoded = encode({"messages": messages})
    assert encoded.examples == [expected(pieces(messages), tokenizer)]
    [example] = encoded.examples
    learned = [i for i, label in zip(*example.values(), strict=True) if label != IGNORED]
    said = "".join(m["content"] + END for m in messages if m["role"] == "assistant")
    assert tokenizer.decode(learned) == said
    assert encoded.tokens == len(example["input_ids"])
    assert encoded.labelled == len(learned)


def test_what_the_model_reads_is_what_the_template_writes(
    encode: Callable[..., Encoded], tokenizer: Any
) -> None:
    [example] = encode({"messages": TWO_TURNS}).examples
    whole = tokenizer.apply_chat_template(TWO_TURNS, tokenize=False)
    assert tokenizer.decode(example["input_ids"]) == whole.rstrip("\n")


def test_an_answer_is_tokenised_as_it_is_when_the_model_generates_it(
    encode: Callable[..., Encoded], tokenizer: Any
) -> None:
    [example] = encode({"messages": TWO_TURNS}).examples
    asked = tokenizer.apply_chat_template(
        TWO_TURNS[:-1], tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert example["input_ids"][: len(asked)] == asked
    whole = tokenizer(tokenizer.apply_chat_template(TWO_TURNS, tokenize=False))["input_ids"]
    assert whole[: len(asked)] != asked, "the case is too easy: nothing merges over the border"


def test_a_user_turn_after_the_last_answer_is_left_out_or_not_learned(
    encode: Callable[..., Encoded], tokenizer: Any
) -> None:
    [example] = encode({"messages": UNANSWERED}).examples
    wanted = expected(pieces(TWO_TURNS), tokenizer)
    size = len(wanted["input_ids"])
    assert example["input_ids"][:size] == wanted["input_ids"]
    assert example["labels"][:size] == wanted["labels"]
    assert set(example["labels"][size:]) <= {IGNORED}


def test_an_answer_that_holds_the_end_token_is_learned_to_its_last_end(
    encode: Callable[..., Encoded], tokenizer: Any
) -> None:
    chat: Chat = [ONE_TURN[0], {"role": "assistant", "content": f"One{END}two"}]
    assert encode({"messages": chat}).examples == [expected(pieces(chat), tokenizer)]


def test_prompt_and_completion_go_through_the_template(
    encode: Callable[..., Encoded], tokenizer: Any
) -> None:
    row = {"prompt": "What is the capital of France?", "completion": " It is Paris.\n"}
    assert encode(row).examples == [expected(pieces(ONE_TURN), tokenizer)]


RAW = {"prompt": "2 + 2 is", "completion": " 4."}
RAW_PIECES = [("2 + 2 is", False), (f" 4.{END}", True)]


def test_raw_prompt_and_completion_stay_as_they_are_and_end(
    encode: Callable[..., Encoded], tokenizer: Any
) -> None:
    assert encode(RAW, raw=True).examples == [expected(RAW_PIECES, tokenizer)]


def test_a_tokenizer_without_template_makes_prompts_raw(
    encode: Callable[..., Encoded], tokenizer: Any
) -> None:
    tokenizer.chat_template = None
    assert encode(RAW).examples == [expected(RAW_PIECES, tokenizer)]


def test_a_begin_token_of_the_tokenizer_stands_before_the_prompt_only(
    encode: Callable[..., Encoded], tokenizer: Any
) -> None:
    from tokenizers.processors import TemplateProcessing

    wanted = expected([("<|endoftext|>", False), *RAW_PIECES], tokenizer)
    marks = [("<|endoftext|>", 0), (END, 2)]
    for template in ("<|endoftext|> $A", f"<|endoftext|> $A {END}"):
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=template, special_tokens=marks
        )
        assert encode(RAW, raw=True).examples == [wanted], template
        chat = encode({"messages": ONE_TURN}).examples
        assert chat == [expected(pieces(ONE_TURN), tokenizer)], "the template writes its own marks"


def test_all_of_a_text_but_its_first_token_is_learned(
    encode: Callable[..., Encoded], tokenizer: Any
) -> None:
    text = "The answer is the answer."
    for raw in (False, True):
        [example] = encode({"text": text}, raw=raw).examples
        ids = tokenizer.backend_tokenizer.encode(text + END).ids
        assert example == {"input_ids": ids, "labels": [IGNORED, *ids[1:]]}


@pytest.mark.parametrize("max_length", [8, 9, 16, 50])
def test_a_long_text_is_cut_into_pieces_and_none_of_it_is_lost(
    encode: Callable[..., Encoded], tokenizer: Any, max_length: int
) -> None:
    text = "The answer is the answer, and what is not the answer is not. " * 4
    ids = tokenizer.backend_tokenizer.encode(text + END).ids
    cuts = [ids[i : i + max_length] for i in range(0, len(ids), max_length)]
    encoded = encode({"text": text}, max_length=max_length)
    wanted = [{"input_ids": c, "labels": [IGNORED, *c[1:]]} for c in cuts if len(c) > 1]
    assert encoded.examples == wanted
    assert encoded.truncated == 0
    assert sum(len(c) for c in cuts) == len(ids)


def test_a_text_whose_last_piece_is_one_token_is_not_counted_as_a_dropped_row(
    encode: Callable[..., Encoded], tokenizer: Any
) -> None:
    text = "The answer is the answer."
    size = len(tokenizer.backend_tokenizer.encode(text + END).ids)
    encoded = encode({"text": text}, max_length=size - 1)
    assert (len(encoded.examples), encoded.dropped) == (1, 0)


def test_a_long_chat_is_cut_and_counted(encode: Callable[..., Encoded], tokenizer: Any) -> None:
    wanted = expected(pieces(TWO_TURNS), tokenizer)
    size = len(wanted["input_ids"])
    encoded = encode({"messages": TWO_TURNS}, {"messages": ONE_TURN}, max_length=size - 2)
    assert (encoded.truncated, encoded.dropped) == (1, 0)
    assert encoded.examples[0] == {k: v[: size - 2] for k, v in wanted.items()}
    assert encoded.examples[1] == expected(pieces(ONE_TURN), tokenizer)
    whole = encode({"messages": TWO_TURNS}, max_length=size)
    assert (whole.truncated, whole.examples) == (0, [wanted])


def test_a_chat_whose_answer_is_cut_off_entirely_is_dropped_and_counted(
    encode: Callable[..., Encoded], tokenizer: Any
) -> None:
    asked = len(expected(pieces(ONE_TURN)[:1], tokenizer)["input_ids"])
    encoded = encode({"messages": ONE_TURN}, {"text": "It is 4."}, max_length=asked)
    assert (encoded.truncated, encoded.dropped, len(encoded.examples)) == (1, 1, 1)
    kept = encode({"messages": ONE_TURN}, max_length=asked + 1)
    assert (kept.dropped, kept.labelled) == (0, 1)


def test_an_empty_text_is_dropped_and_counted(
    encode: Callable[..., Encoded], tokenizer: Any
) -> None:
    assert encode({"text": ""}, {"text": "It is 4."}).dropped == 1
    tokenizer.eos_token = None
    assert encode({"text": ""}, {"text": "It is 4."}).dropped == 1


def test_a_tokenizer_without_end_token_learns_the_answer_alone(
    encode: Callable[..., Encoded], tokenizer: Any
) -> None:
    tokenizer.eos_token = None
    [example] = encode(RAW, raw=True).examples
    assert example == expected([("2 + 2 is", False), (" 4.", True)], tokenizer)


def test_a_file_in_which_nothing_can_be_learned_is_refused(
    encode: Callable[..., Encoded],
) -> None:
    with pytest.raises(InputError, match=r"rows\.jsonl.*8 tokens") as caught:
        encode({"messages": ONE_TURN}, max_length=8)
    assert "max_length" in str(caught.value.hint)


def test_a_template_that_rewrites_earlier_turns_is_refused(
    encode: Callable[..., Encoded], tokenizer: Any
) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{% if loop.last or m['role'] != 'assistant' %}"
        "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    assert encode({"messages": ONE_TURN}).dropped == 0  # with one answer there is nothing earlier
    with pytest.raises(InputError, match=r"rows\.jsonl:2: .*rewrites"):
        encode({"messages": ONE_TURN}, {"messages": TWO_TURNS})


def test_a_template_that_refuses_a_role_is_told_with_its_words(
    encode: Callable[..., Encoded], tokenizer: Any
) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}"
        "{{ raise_exception('no system please') }}{% endif %}{{ m['content'] }}{% endfor %}"
    )
    with pytest.raises(InputError, match=r"rows\.jsonl:1: .*no system please"):
        encode({"messages": SYSTEM})


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"mesages": ONE_TURN}, "did you mean `messages`"),
        ({"prompt": "x"}, "`completion`"),
        ({"prompt": "x", "completion": 4}, "must be text"),
        ({"prompt": None, "completion": "x"}, "must be text"),
        ({"text": 7}, "`text`"),
        ({}, "`messages`"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": ONE_TURN[:1]}, "assistant"),
        ({"messages": [{"role": "assitant", "content": "x"}]}, "did you mean `assistant`"),
    ],
    ids=str,
)
def test_a_malformed_row_is_named_with_file_and_line(
    tmp_path: Path, tokenizer: Any, row: object, said: str
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(f'{{"text": "fine"}}\n\n{json.dumps(row)}\n')
    with pytest.raises(InputError, match=re.escape(f"{file}:3: ")) as caught:
        encode_file(file, tokenizer, max_length=100, raw=False)
    assert said in str(caught.value)
    assert caught.value.exit_code == 3


def test_messages_without_a_chat_template_are_refused(
    encode: Callable[..., Encoded], tokenizer: Any
) -> None:
    tokenizer.chat_template = None
    with pytest.raises(InputError, match=r"rows\.jsonl:1: .*chat template"):
        encode({"messages": ONE_TURN})


def test_a_batch_is_padded_on_the_right_and_padding_bears_no_loss() -> None:
    examples = [
        {"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7]},
        {"input_ids": [8], "labels": [IGNORED]},
    ]
    batch = Padding(0)(examples)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, 0, 0]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "labels": [[IGNORED, 6, 7], [IGNORED, IGNORED, IGNORED]],
    }


def test_batches_can_be_of_few_lengths() -> None:
    rows = [{"input_ids": [5] * n, "labels": [5] * n, "weights": [1.0] * n} for n in (3, 18)]
    batch = Padding(0, ("weights",), 16, 40)(rows)
    assert {name: tuple(value.shape) for name, value in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels", "weights"), (2, 32)
    )
    assert batch["weights"].sum() == 21 and batch["attention_mask"].sum() == 21
    assert (batch["labels"][1, 18:] == -100).all()
    assert Padding(0, (), 16, 20)(rows)["input_ids"].shape == (2, 20)
    assert Padding(0, (), 16, 10)(rows)["input_ids"].shape == (2, 18)
