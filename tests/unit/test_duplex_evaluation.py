"""`bmkit duplex eval` from model to report; its decisions against transformers' own code."""

from __future__ import annotations

import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from bmkit.data.chat import encode_file
from bmkit.data.slices import stored, tokens
from bmkit.data.slices.dialogue import Dialogue, Slice, of_values
from bmkit.data.slices.layout import Layout, collapsed, refilled, rendered
from bmkit.data.slices.stored import Stored
from bmkit.duplex import account, figures, timeline
from bmkit.duplex.metrics import Conversation, Moment
from bmkit.duplex.ordinary import Question, chat_loss, choice_accuracy, read_questions
from bmkit.duplex.subject import Subject
from bmkit.errors import GateError, InputError, RecipeError
from bmkit.pipeline import stage
from bmkit.pipeline.stage import Request, run_stage
from bmkit.report import Silent

ROWS: list[dict[str, Any]] = [
    {
        "id": "cats",
        "kind": "pause",
        "slices": [
            {"u": "What do", "a": None, "tag": "mid"},
            {"u": None, "a": None, "tag": "pause"},
            {"u": None, "a": None, "tag": "pause"},
            {"u": "cats eat?", "a": "Mice.", "tag": "end"},
            {"u": None, "a": " And fish, when there is some.", "tag": "cont"},
            {"u": "Stop!", "a": None, "tag": "stop"},
            {"u": None, "a": None, "tag": "quiet"},
            {"u": None, "a": None, "tag": "quiet"},
        ],
    },
    {
        "id": "dogs",
        "kind": "basic",
        "slices": [
            {"u": "Mum, wait.", "a": None, "tag": "noise"},
            {"u": None, "a": None, "tag": "quiet"},
            {"u": "And dogs?", "a": "They eat bones.", "tag": "end"},
            {"u": None, "a": None, "tag": "quiet"},
        ],
    },
]


@pytest.fixture
def duplex(tiny: Path) -> Path:
    """The tiny checkpoint with marks, and a `duplex.json` beside it."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    marked = tokens.mark(tokenizer, "idle", "added")
    model = AutoModelForCausalLM.from_pretrained(tiny)
    torch.manual_seed(1)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(tiny)
    tokenizer.save_pretrained(tiny)
    stored.write(tiny, Stored("idle", marked.layout, slice_ms=500, agent_tokens=4, threshold=0.01))
    return tiny


@pytest.fixture
def dialogues(rows: Callable[..., Path]) -> Path:
    return rows("dialogues.jsonl", *ROWS)


def evaluate(model: Path, data: Path | None, *assign: str, **more: Any) -> Any:
    said = [f"eval.data={data}"] if data else []
    request = Request(
        "duplex", "eval", str(model), assign=(*said, *assign), part="eval", threads=1, **more
    )
    return run_stage(request, Silent())


class WholePlace:
    """Reads everything anew with each token, in transformers' own code."""

    def __init__(self, model: Any) -> None:
        self.model, self.ids, self.last = model, list[int](), None

    def append(self, ids: Any) -> Tensor:
        self.ids += ids
        with torch.inference_mode():
            logits: Tensor = self.model(torch.tensor([self.ids]), use_cache=False).logits[0, -1]
        return logits.float()

    def cut(self, length: int) -> None:
        del self.ids[length:]


@pytest.mark.parametrize("collapse", [True, False])
def test_decisions_are_those_of_one_pass_over_what_a_session_would_have_read(
    duplex: Path, collapse: bool
) -> None:
    from bmkit.duplex.session import DuplexSession
    from bmkit.duplex.settings import Settings

    model = AutoModelForCausalLM.from_pretrained(duplex, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(duplex)
    layout: Layout = stored.read(duplex).layout  # type: ignore[union-attr]
    settings = Settings(agent_tokens=4, collapse_idle=collapse)
    place: Any = WholePlace(model)
    subject = Subject(DuplexSession(place, tokenizer, layout, settings))
    for row in ROWS:
        dialogue = of_values(row)
        found = subject.judge(dialogue)
        pairs = refilled(tokens.pairs_of(tokenizer, dialogue, layout), 4)
        assert [d.tag for d in found] == [p.tag for p in pairs if p.weight]
        for number, (one, pair) in enumerate(zip(found, pairs, strict=True)):
            past = [*pairs[:number], pair]
            read = rendered(layout, list(collapsed(past)) if collapse else past)
            ids = read.ids[: read.decisions[-1].position]
            with torch.inference_mode():
                logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1].float()
            assert one.p_idle == pytest.approx(float(logits.softmax(-1)[layout.idle]), abs=1e-5)
            assert one.wanted == (pair.agent is not None)


def test_a_report_holds_every_figure_and_its_manifest_those_for_gates(
    duplex: Path, dialogues: Path, tmp_path: Path
) -> None:
    out = tmp_path / "report"
    result = evaluate(duplex, dialogues, out=out)
    assert result.artifact.kind == "report"
    values = json.loads((out / "report.json").read_text())
    agents = ["model", "punctuation", "vad_1", "vad_2", "always_idle"]
    for suite in ("decision", "replay", "simulate"):
        for condition in figures.CONDITIONS:
            assert list(values["suites"][suite][condition]) == agents
    assert values["dialogues"]["count"] == 2
    assert values["dialogues"]["tags"]["pause"] == 2
    assert values["slice_ms"] == 500
    idle = values["suites"]["decision"]["punctuated"]["always_idle"]
    assert idle["accuracy"] == pytest.approx(9 / 12, abs=1e-6)
    told = result.artifact.metrics
    own = values["suites"]["simulate"]["unpunctuated"]["model"]
    assert told["simulate_unpunctuated_unanswered_rate"] == own["unanswered_rate"]
    assert set(told) <= set(figures.METRICS)
    best = max(values["suites"]["decision"]["punctuated"][rule]["idle_f1"] for rule in agents[1:])
    mine = values["suites"]["decision"]["punctuated"]["model"]["idle_f1"]
    assert told["decision_punctuated_lead"] == pytest.approx(mine - best, abs=2e-6)
    assert len(values["thresholds"]["punctuated"]) > 3
    assert result.report["slices"] > 0
    assert 0 <= result.report["deadline_miss_rate"] <= 1
    assert "seconds" not in (out / "report.json").read_text()  # nothing of the clock


def test_the_same_command_writes_the_same_bytes(
    duplex: Path, dialogues: Path, tmp_path: Path
) -> None:
    first = evaluate(duplex, dialogues, out=tmp_path / "one")
    second = evaluate(duplex, dialogues, out=tmp_path / "one", force=True)
    assert not second.reused
    assert first.artifact.digest == second.artifact.digest
    assert evaluate(duplex, dialogues, out=tmp_path / "one").reused


def test_what_is_said_is_written_and_drawn(duplex: Path, dialogues: Path, tmp_path: Path) -> None:
    evaluate(duplex, dialogues, out=tmp_path / "r")
    rows = [json.loads(line) for line in (tmp_path / "r/conversations.jsonl").open()]
    assert {(r["suite"], r["condition"]) for r in rows} == {
        (s, c) for s in ("replay", "simulate") for c in figures.CONDITIONS
    }
    bare = next(r for r in rows if r["condition"] == "unpunctuated" and r["id"] == "cats")
    heard = [s["u"] for s in bare["slices"] if s["u"]]
    assert heard[:2] == ["what do", "cats eat"]
    root = ElementTree.parse(tmp_path / "r/timeline.svg").getroot()
    text = [e.text for e in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"cats", "dogs", "user", "agent", "cats eat"} <= set(text)


def test_the_report_in_markdown_has_the_rules_beside_the_model(
    duplex: Path, dialogues: Path, tmp_path: Path
) -> None:
    evaluate(duplex, dialogues, "eval.suites=[decision]", out=tmp_path / "r")
    text = (tmp_path / "r/report.md").read_text()
    assert "|  | better | model | punctuation | vad_1 | vad_2 | always_idle |" in text
    assert re.search(r"\| idle_f1 \| ↑ \| [\d.]+ \| [\d.]+ \|", text)
    assert "| `pause` | 2 |" in text
    rows = [json.loads(line) for line in (tmp_path / "r/decisions.jsonl").open()]
    first = next(r for r in rows if r["condition"] == "unpunctuated" and r["tag"] == "end")
    assert (first["id"], first["u"], first["wanted"]) == ("cats", "cats eat", True)
    right = sum(r["wanted"] == r["speaks"] for r in rows if r["condition"] == "punctuated")
    half = len(rows) // 2
    assert "### thresholds, unpunctuated" in text
    assert not (tmp_path / "r/timeline.svg").exists()  # no conversation was held
    values = json.loads((tmp_path / "r/report.json").read_text())
    assert list(values["suites"]) == ["decision"]
    own = values["suites"]["decision"]["punctuated"]["model"]
    assert own["accuracy"] == pytest.approx(right / half, abs=1e-6)


def test_a_gate_that_is_not_met_ends_with_its_error(
    duplex: Path, dialogues: Path, tmp_path: Path
) -> None:
    gate = "gates={decision_punctuated_idle_f1: {min: 1.0}}"
    result = evaluate(duplex, dialogues, gate, "eval.suites=[decision]", out=tmp_path / "r")
    with pytest.raises(GateError, match="decision_punctuated_idle_f1"):
        stage.require_gates(result)
    with pytest.raises(RecipeError, match="idle_f1"):
        evaluate(duplex, dialogues, "gates={decision_punctuated_idle_f: {min: 1.0}}")


def test_what_a_delta_or_model_has_kept_is_compared_with_what_it_was(
    duplex: Path, tiny_checkpoint: Path, tmp_path: Path, rows: Callable[..., Path]
) -> None:
    chats = rows("chats.jsonl", {"prompt": "Say 1.", "completion": "It is 1."})
    asked = rows("asked.jsonl", {"prompt": "Two", "choices": [" a", " bc"], "answer": " bc"})
    said = (f"eval.chats={chats}", f"eval.questions={asked}", "eval.suites=[retain]")
    with pytest.raises(RecipeError, match=r"eval\.before"):
        evaluate(duplex, None, *said)
    before = shutil.copytree(tiny_checkpoint, tmp_path / "before")
    result = evaluate(duplex, None, *said, f"eval.before={before}", out=tmp_path / "r")
    model = AutoModelForCausalLM.from_pretrained(before, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(duplex)
    (example,) = encode_file(chats, tokenizer, max_length=64, raw=False).examples
    with torch.inference_mode():
        loss = model(
            input_ids=torch.tensor([example["input_ids"]]),
            labels=torch.tensor([example["labels"]]),
        ).loss
    told = result.artifact.metrics
    assert told["retain_loss_before"] == pytest.approx(float(loss), abs=1e-4)
    # its old rows are as they were, but there are more of them to choose from
    assert told["retain_loss_after"] > told["retain_loss_before"]
    change = told["retain_loss_after"] / told["retain_loss_before"] - 1
    assert told["retain_loss_change"] == pytest.approx(change, abs=1e-5)
    assert told["retain_accuracy_before"] in (0, 1)


def test_the_likeliest_choice_by_token_is_that_of_log_probabilities(tiny: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny)

    def mean(prompt: str, choice: str) -> float:
        first = tokenizer(prompt)["input_ids"]
        second = tokenizer(choice, add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            logits = model(torch.tensor([[*first, *second]])).logits[0].float()
        log = logits.log_softmax(-1)
        found = [float(log[len(first) + n - 1, token]) for n, token in enumerate(second)]
        return sum(found) / len(found)

    asked = []
    for prompt in ("Two and two", "The sky", "abc", "It rains"):
        choices = (" four", " a", " blue sky")
        best = max(range(3), key=lambda n: mean(prompt, choices[n]))
        asked.append(Question(prompt, choices, best))
    assert choice_accuracy(model, tokenizer, asked) == 1
    wrong = [Question(q.prompt, q.choices, (q.answer + 1) % 3) for q in asked]
    assert choice_accuracy(model, tokenizer, [*asked, *wrong]) == 0.5


def test_the_loss_of_chats_is_the_mean_over_all_of_their_tokens(
    tiny: Path, rows: Callable[..., Path]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    file = rows(
        "chats.jsonl",
        {"prompt": "Hi.", "completion": "Yes."},
        {"prompt": "And then?", "completion": "It went on for a while."},
    )
    encoded = encode_file(file, tokenizer, max_length=128, raw=False)
    total, count = 0.0, 0
    for one in encoded.examples:
        with torch.inference_mode():
            loss = model(
                torch.tensor([one["input_ids"]]), labels=torch.tensor([one["labels"]])
            ).loss
        number = sum(label != -100 for label in one["labels"])
        total, count = total + float(loss) * number, count + number
    assert chat_loss(model, encoded) == pytest.approx(total / count, abs=1e-5)


def test_bmkit_s_own_questions_can_be_asked() -> None:
    from bmkit import builtin

    found = read_questions(builtin.directory() / "data/duplex-questions.jsonl")
    assert len(found) >= 40
    assert {one.answer for one in found} == {0, 1, 2}  # not always the first


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "a", "choices": ["b"], "answer": "b"}, "two texts"),
        ({"prompt": "a", "choices": ["b", "c"], "answer": "d"}, "none of the"),
        ({"choices": ["b", "c"], "answer": "b"}, "prompt"),
    ],
)
def test_a_question_that_makes_no_sense_is_named(
    rows: Callable[..., Path], row: dict[str, Any], problem: str
) -> None:
    file = rows("q.jsonl", {"prompt": "a", "choices": ["b", "c"], "answer": "c"}, row)
    with pytest.raises(InputError, match=rf"q.jsonl:2: .*{problem}"):
        read_questions(file)


def test_a_model_that_has_not_learned_it_says_how_to_train_it(tiny: Path, dialogues: Path) -> None:
    with pytest.raises(InputError, match=r"duplex\.json") as refused:
        evaluate(tiny, dialogues)
    assert "bmkit tune duplex" in str(refused.value.hint)


def test_a_picture_frames_what_is_said_too_early() -> None:
    moments = (
        Moment("what <is>", " It", "mid", 0.25),
        Moment("it", " is\x1b\x00 " + "so " * 60, "end", 0.0),
        *(Moment(None, None, None, 1.0) for _ in range(12)),
    )
    text = timeline.picture([Conversation("a & b", moments)], 2000)
    root = ElementTree.fromstring(text)
    shapes = list(root.iter("{http://www.w3.org/2000/svg}rect"))
    framed = [s for s in shapes if s.get("stroke")]
    assert len(framed) == 1
    assert "26 s" in text  # the time of the last of 14 slices of 2 seconds
    assert "what &lt;is&gt;" in text


def test_a_table_leaves_out_what_there_is_no_figure_for() -> None:
    found: Any = {"replay": {"punctuated": {"model": {"x": 1.0}, "rule": {}}}}
    text = account.markdown("t", found, sweeps={}, kept={"retain_loss_before": 2.0})
    assert "| x |  | 1.000 | - |" in text
    assert "| retain_loss_before | 2.000 |" in text


def test_slices_without_weight_are_not_judged(duplex: Path) -> None:
    from bmkit.duplex.session import DuplexSession

    model = AutoModelForCausalLM.from_pretrained(duplex, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(duplex)
    place: Any = WholePlace(model)
    layout: Layout = stored.read(duplex).layout  # type: ignore[union-attr]
    subject = Subject(DuplexSession(place, tokenizer, layout))
    row = Dialogue("d", "late", (Slice("why", None, "end", 0.0), Slice(None, "So.", "late")))
    assert [d.tag for d in subject.judge(row)] == ["late"]
