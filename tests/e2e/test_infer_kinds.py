"""`bmkit infer` beyond one Llama: other kinds of models, scores, adapters a row, a chat."""

from __future__ import annotations

import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

Run = Callable[..., subprocess.CompletedProcess[str]]
Rows = Callable[..., Path]
IDS = {"vocab_size": 259, "eos_token_id": 2, "pad_token_id": 0, "bos_token_id": None}
PROMPTS = ["Hi", "Tell me a story about a fox, and a long one.", "1 2 3"]


def rows_of(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def make(tiny_checkpoint: Path, tmp_path: Path) -> Callable[..., Path]:
    """Save a random model with the tiny checkpoint's tokenizer: `make(Class, config)`."""

    def write(kind: Any, config: Any) -> Path:
        import torch

        path = tmp_path / config.model_type
        shutil.copytree(tiny_checkpoint, path)
        (path / "chat_template.jinja").unlink(missing_ok=True)
        torch.manual_seed(0)
        model = kind(config)
        for parameter in model.parameters():
            parameter.data += torch.randn_like(parameter) * 0.1
        model.to(torch.bfloat16).save_pretrained(path)
        return path

    return write


@pytest.fixture
def t5(make: Callable[..., Path]) -> Path:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 3, "num_heads": 4}
    return make(T5ForConditionalGeneration, T5Config(**IDS, **sizes, decoder_start_token_id=0))


@pytest.fixture
def gpt2(make: Callable[..., Path]) -> Path:
    from transformers import GPT2Config, GPT2LMHeadModel

    return make(GPT2LMHeadModel, GPT2Config(**IDS, n_embd=64, n_layer=4, n_head=4, n_positions=256))


@pytest.mark.parametrize("budget", [None, "250MiB"])
def test_an_encoder_decoder_answers_as_transformers_does(
    bmkit: Run, t5: Path, budget: str | None
) -> None:
    import torch
    from transformers import AutoTokenizer, T5ForConditionalGeneration

    plain = T5ForConditionalGeneration.from_pretrained(t5, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(t5)
    more = ("--cpu-memory", budget) if budget else ()
    prompts = [word for p in PROMPTS for word in ("-p", p)]
    found = rows_of(bmkit("infer", "-m", t5, *prompts, "--json", "--max-new-tokens", "9", *more))
    for row, prompt in zip(found, PROMPTS, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        wanted = plain.generate(ids, max_new_tokens=9, do_sample=False)[0, 1:].tolist()
        assert row["token_ids"] == wanted, prompt


def test_another_family_under_a_budget_keeps_it_and_its_tokens(
    bmkit: Run, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """A Gemma of 200 MB in 190 MiB: streamed, with what the process took measured by itself."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    path = tmp_path / "gemma"
    shutil.copytree(tiny_checkpoint, path)
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 10}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 128}
    config = Gemma3TextConfig(**IDS, **sizes, **heads, sliding_window=64)
    torch.manual_seed(0)
    Gemma3ForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    words = ("infer", "-m", path, "-p", "Hello there", "--max-new-tokens", "6", "--json")
    free = rows_of(bmkit(*words))
    refused = bmkit(*words, "--cpu-memory", "20MiB")
    assert refused.returncode == 4
    least = refused.stderr.split("--cpu-memory ")[-1].split()[0]
    tight = bmkit(*words, "--cpu-memory", least, "--report", "r.json")
    assert rows_of(tight)[0]["token_ids"] == free[0]["token_ids"]
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["peak_rss_bytes"] - report["rss_before_bytes"] <= report["budget_bytes"]["cpu"]
    assert report["budget_bytes"]["cpu"] < 250 * 2**20
    assert "0 of " in report["plan"]["steps"][0]


def test_quant_of_any_family(bmkit: Run, gpt2: Path) -> None:
    words = ("infer", "-m", gpt2, "-p", "Hello", "--max-new-tokens", "6", "--json")
    for quant in ("int8", "int4"):
        assert len(rows_of(bmkit(*words, "--quant", quant))[0]["token_ids"]) == 6


def test_a_static_cache_gives_the_same_tokens(bmkit: Run, gpt2: Path) -> None:
    words = ("infer", "-m", gpt2, "-p", "Hello", "-p", "there, you", "--max-new-tokens", "6")
    found = [rows_of(bmkit(*words, "--json", "-s", f"cache={c}")) for c in ("dynamic", "static")]
    assert [r["token_ids"] for r in found[0]] == [r["token_ids"] for r in found[1]]


def test_w8a8_is_refused_on_a_cpu(bmkit: Run, gpt2: Path) -> None:
    refused = bmkit("infer", "-m", gpt2, "-p", "x", "--quant", "w8a8", "--device", "cpu")
    assert refused.returncode == 2
    assert "w8a8 needs a GPU" in refused.stderr


@pytest.mark.parametrize("kind", ["classify", "embed"])
def test_encoders_give_labels_and_embeddings(
    bmkit: Run, make: Callable[..., Path], rows: Rows, kind: str
) -> None:
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, BertModel

    sizes = {"hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 64}
    config = BertConfig(
        **IDS,
        **sizes,
        num_hidden_layers=3,
        num_attention_heads=4,
        id2label={0: "good", 1: "bad", 2: "so so"},
    )
    own = BertForSequenceClassification if kind == "classify" else BertModel
    path = make(own, config)
    plain = own.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    file = rows("p.jsonl", *({"prompt": p} for p in PROMPTS), {"prompt": "x" * 70})
    done = bmkit("infer", "-m", path, "-i", file, "--json")
    assert done.returncode == 3
    assert "p.jsonl:4: the prompt has 70 tokens, the model reads 64; 3 others were done" in (
        done.stderr
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    for row, prompt in zip(found, PROMPTS, strict=True):
        with torch.no_grad():
            out = plain(**tokenizer(prompt, return_tensors="pt"))
        if kind == "classify":
            wanted = out.logits[0].softmax(-1).tolist()
            assert row["label"] == config.id2label[wanted.index(max(wanted))]
            assert list(row["probabilities"].values()) == pytest.approx(wanted, abs=1e-5)
        else:
            mean = torch.nn.functional.normalize(out.last_hidden_state[0].mean(0), dim=0)
            assert row["embedding"] == pytest.approx(mean.tolist(), abs=1e-5)
    refused = bmkit("infer", "-m", path, "-p", "x", "--score")
    assert refused.returncode == 2


@pytest.mark.parametrize("which", ["tiny", "gpt2"])
def test_a_score_is_what_transformers_says(
    bmkit: Run, tiny: Path, gpt2: Path, tmp_path: Path, which: str
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = tmp_path / which
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(path)(PROMPTS[1], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        loss = float(plain(input_ids=ids, labels=ids).loss)
    words = ("infer", "-m", path, "--score", "-p", PROMPTS[1], "--json", "--report", "r.json")
    (row,) = rows_of(bmkit(*words))
    assert row["tokens"] == ids.shape[1] - 1 == len(row["token_logprobs"])
    assert row["logprob"] == pytest.approx(-loss * row["tokens"], rel=1e-4)
    assert row["perplexity"] == pytest.approx(torch.tensor(loss).exp().item(), rel=1e-4)
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["perplexity"] == pytest.approx(row["perplexity"], rel=1e-5)
    assert rows_of(bmkit(*words, "--cpu-memory", "250MiB"))[0]["logprob"] == pytest.approx(
        row["logprob"], rel=1e-5
    )


def test_the_score_of_a_completion_sees_its_prompt(bmkit: Run, tiny: Path, rows: Rows) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = rows("p.jsonl", {"prompt": "Hi", "completion": "there"}, {"prompt": "H"})
    done = bmkit("infer", "-m", "tiny", "--score", "-i", file, "--json")
    assert done.returncode == 3
    assert "p.jsonl:2: there is nothing to score: it has one token" in done.stderr
    row = json.loads(done.stdout)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text)["input_ids"] + tokenizer("there")["input_ids"]
    plain = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    with torch.no_grad():
        logprobs = plain(torch.tensor([ids])).logits[0].log_softmax(-1)
    wanted = [float(logprobs[i - 1, ids[i]]) for i in range(len(ids) - 5, len(ids))]
    assert row["token_logprobs"] == pytest.approx(wanted, abs=1e-4)


def test_a_text_longer_than_the_context_is_scored_in_windows(bmkit: Run, tiny: Path) -> None:
    (row,) = rows_of(bmkit("infer", "-m", "tiny", "--score", "-p", "abc " * 400, "--json"))
    assert row["tokens"] == 1599


@pytest.mark.parametrize("which", ["tiny", "gpt2"])
def test_logprobs_are_the_models_own(bmkit: Run, tiny: Path, gpt2: Path, which: str) -> None:
    words = ("infer", "-m", which, "--raw", "--max-new-tokens", "5", "--json")
    (row,) = rows_of(bmkit(*words, "-p", "Hi", "--logprobs", "2"))
    assert len(row["token_logprobs"]) == len(row["token_ids"])
    for token, logprob, top in zip(
        row["token_ids"], row["token_logprobs"], row["top_logprobs"], strict=True
    ):
        assert top[0] == [token, logprob]  # greedy takes the likeliest
        assert len(top) == 2 and top[1][1] <= logprob


@pytest.mark.parametrize("which", ["tiny", "gpt2"])
def test_each_row_chooses_its_adapter(
    bmkit: Run, tiny: Path, gpt2: Path, rows: Rows, tmp_path: Path, which: str
) -> None:
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(tmp_path / which, dtype=torch.float32)

    targets = ["q_proj", "down_proj"] if which == "tiny" else ["c_attn", "c_proj"]
    for seed, name in enumerate(["a", "b"]):
        torch.manual_seed(seed)
        made = get_peft_model(load(), LoraConfig(r=4, target_modules=targets))
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(0, 0.3)
        made.save_pretrained(tmp_path / name)
    chosen = ["a", "b", None, "a", "b"]
    file = rows(
        "p.jsonl",
        *({"prompt": f"Hello {i}", "adapter": name} for i, name in enumerate(chosen)),
        {"prompt": "x", "adapter": "c"},
    )
    done = bmkit(
        *("infer", "-m", which, "--adapter", "a", "--adapter", "b", "-i", file, "--raw"),
        *("--json", "--max-new-tokens", "6"),
    )
    assert done.returncode == 3
    assert "p.jsonl:6: `c` is no adapter of this run: a, b" in done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / which)
    for row, name in zip(found, chosen, strict=True):
        model = load() if name is None else PeftModel.from_pretrained(load(), tmp_path / name)
        ids = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
        wanted = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
        assert row["token_ids"] == wanted[0, ids.shape[1] :].tolist(), (row["prompt"], name)


def test_a_recipe_names_budget_and_adapters(bmkit: Run, tiny: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("kind: infer\nmax_new_tokens: 4\ncpu_memory: 300MiB\n")
    done = bmkit("infer", recipe, "-m", "tiny", "-p", "Hi", "--report", "r.json")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["budget_bytes"]["cpu"] == 300 * 2**20
    recipe.write_text("kind: infer\ncpu_memory: lots\ngpu_memory: 0\n")
    bad = bmkit("validate", recipe)
    assert bad.returncode == 2
    assert "`lots` is not a size" in bad.stderr
    assert "`0` is not a size" in bad.stderr


class Terminal:
    """`bmkit infer` behind a pseudo-terminal."""

    def __init__(self, *words: object, cwd: Path) -> None:
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bmkit_cli", *map(str, words)],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=cwd,
            env={**os.environ, "TERM": "dumb"},
            start_new_session=True,
        )
        os.close(slave)
        self.seen = ""

    def until(self, text: str, seconds: float = 90) -> str:
        """Read until `text` has come; return all that was read, and begin anew."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < end, self.seen
            if select.select([self.master], [], [], 0.2)[0]:
                try:
                    self.seen += os.read(self.master, 4096).decode("utf-8", "replace")
                except OSError:  # the other end is closed
                    assert text in self.seen, self.seen
        found, self.seen = self.seen, ""
        return found

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self.master, text.encode())


def test_a_chat_remembers_and_forgets(tiny: Path, bmkit: Run, tmp_path: Path, rows: Rows) -> None:
    terminal = Terminal("infer", "-m", "tiny", "--max-new-tokens", "6", cwd=tmp_path)
    terminal.until("> ")
    answers = []
    for text in ("Hello", "And now?", "/reset", "And now?", "/nothing"):
        terminal.type(text + "\n")
        answers.append(terminal.until("\n> ").replace("\r", "").split("\n", 1)[1])
    terminal.type("\x04")
    assert terminal.process.wait(30) == 0
    os.close(terminal.master)
    first = bmkit("infer", "-m", "tiny", "-p", "Hello", "--max-new-tokens", "6").stdout
    assert answers[0].removesuffix("> ").strip() == first.strip()
    history = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": first.removesuffix("\n")},
        {"role": "user", "content": "And now?"},
    ]
    file = rows("h.jsonl", {"messages": history})
    second = bmkit("infer", "-m", "tiny", "-i", file, "--max-new-tokens", "6").stdout
    assert answers[1].removesuffix("> ").strip() == second.strip()
    alone = bmkit("infer", "-m", "tiny", "-p", "And now?", "--max-new-tokens", "6").stdout
    assert answers[3].removesuffix("> ").strip() == alone.strip()
    assert "`/nothing` is nothing that is known here" in answers[4]


def test_a_chat_goes_on_after_an_answer_was_stopped(tiny: Path, tmp_path: Path) -> None:
    terminal = Terminal("infer", "-m", "tiny", "--max-new-tokens", "400", cwd=tmp_path)
    terminal.until("> ")
    terminal.type("Hello\n")
    terminal.until("Hello")
    time.sleep(0.05)
    os.killpg(terminal.process.pid, signal.SIGINT)
    terminal.until("> ")
    time.sleep(1.5)  # a stop that is over must not come again
    terminal.type("/help\n")
    said = terminal.until("Ctrl-C ends an answer.")
    assert "interrupted" not in said
    assert said.count("> ") <= 1
    time.sleep(0.5)  # the prompt is there now
    terminal.type("\x04")
    assert terminal.process.wait(30) == 0
    os.close(terminal.master)


def test_a_chat_of_spec_decode_says_what_infer_says_and_keeps_it_once(
    tiny: Path, bmkit: Run, tmp_path: Path
) -> None:
    refused = Terminal("spec-decode", "-m", "tiny", "--verify-exact", cwd=tmp_path)
    refused.until("--verify-exact is not for a chat")
    assert refused.process.wait(30) == 2
    os.close(refused.master)
    said = []
    for words in (("infer",), ("spec-decode", "--phrases", "pool")):
        terminal = Terminal(*words, "-m", "tiny", "--max-new-tokens", "6", cwd=tmp_path)
        terminal.until("> ")
        answers = []
        for text in ("Hello", "And now?"):
            terminal.type(text + "\n")
            answers.append(terminal.until("\n> ").replace("\r", "").split("\n", 1)[1])
        terminal.type("\x04")
        assert terminal.process.wait(30) == 0
        os.close(terminal.master)
        said.append(answers)
    assert said[0] == said[1]
    with safe_open(tmp_path / "pool" / "phrases.safetensors", "np") as file:
        tokens = file.get_tensor("tokens").tolist()
    assert tokens.count(-1) == 1, tokens  # the second question's prompt holds the first


def test_tuning_under_a_budget_is_the_same_training(
    bmkit: Run, tiny_checkpoint: Path, rows: Rows, tmp_path: Path
) -> None:
    """A model of 70 MB, its base streamed there and back each step."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    path = tmp_path / "wide"
    shutil.copytree(tiny_checkpoint, path)
    config = AutoConfig.from_pretrained(path)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 512, 1536, 10
    config.head_dim, config.initializer_range = 128, 0.05
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    data = rows("d.jsonl", *({"prompt": f"{i}?", "completion": f"{i}!"} for i in range(12)))
    words = ("tune", "lora", "-m", path, "--data", data, "-s", "train.max_steps=3", "--json")
    words = (*words, "-s", f"data.dev={data}")
    free = json.loads(bmkit(*words, "-o", "free").stdout)["metrics"]
    refused = bmkit(*words, "--cpu-memory", "20MiB")
    assert refused.returncode == 4
    least = refused.stderr.split("--cpu-memory ")[-1].split()[0]
    tight = bmkit(*words, "-o", "tight", "--cpu-memory", least, "--report", "r.json")
    assert tight.returncode == 0, tight.stderr
    assert "0 of 1" in tight.stderr
    found = json.loads(tight.stdout)["metrics"]
    for name in ("dev_loss_before", "dev_loss", "train_loss"):
        assert found[name] == pytest.approx(free[name], rel=1e-4)
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["peak_rss_bytes"] - report["rss_before_bytes"] <= report["budget_bytes"]["cpu"]
    merged = bmkit(*words, "--cpu-memory", "2GiB", "-s", "merge=true")
    assert merged.returncode == 2
    assert "never whole in memory" in merged.stderr


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_a_row_beyond_what_a_budget_was_planned_for_is_refused_alone(
    bmkit: Run, make: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8192}
    config = AutoConfig.for_model(kind, **IDS, **sizes)
    path = make(AutoModelForCausalLM.from_config, config)
    lines = [json.dumps({"prompt": text}) for text in ("a b " * 150, "Hi", "word " * 1000)]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    words = ("infer", "-m", path, "--json", "--max-new-tokens", "8", "--cpu-memory")
    said = bmkit(*words, "1MiB", "-i", "p.jsonl")  # the longest row is counted: a token a byte
    least = said.stderr.rpartition("--cpu-memory ")[2].split()[0]
    assert said.returncode == 4
    told = bmkit(*words, least, "-i", "p.jsonl")
    assert told.returncode == 0, told.stderr
    assert len(told.stdout.splitlines()) == 3
    text = "\n".join(lines)
    unknown = bmkit(*words, "1MiB", "-i", "-", stdin=text)  # rows that come are not known before
    least = unknown.stderr.rpartition("--cpu-memory ")[2].split()[0]
    piped = bmkit(*words, least, "-i", "-", stdin=text)
    assert piped.returncode == 3
    assert "-:3: it takes 5008 tokens, the memory budget was planned for" in piped.stderr
    assert 1 in [json.loads(line)["id"] for line in piped.stdout.splitlines()]
