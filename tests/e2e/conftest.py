"""What end-to-end tests share: rows, small models of other kinds, one that listens, a server."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, BertConfig

from bmkit.data.slices import stored
from bmkit.data.slices.layout import Layout, Pair, Rendered, collapsed, rendered
from bmkit.data.slices.stored import Stored

COLOURS = ("red", "green", "blue")


def splits(folder: Path, rows: list[dict[str, Any]], first: int) -> Path:
    """Write the first rows as `train.jsonl`, the others as `dev.jsonl`."""
    folder.mkdir()
    for name, part in (("train", rows[:first]), ("dev", rows[first:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


@pytest.fixture
def with_tokenizer(tiny: Path) -> Callable[[Path], None]:
    """Copy the tiny checkpoint's tokenizer to another one."""

    def copy(to: Path) -> None:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tiny / name, to / name)

    return copy


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder of rows to say: `train.jsonl` and `dev.jsonl`."""
    rows = [{"prompt": f"Number {i}?", "completion": f"It is {i}."} for i in range(48)]
    return splits(tmp_path / "say", rows, 32)


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """A folder of texts with one of three labels, which their first word tells."""
    rows = [{"text": f"{COLOURS[i % 3]} {i}", "label": COLOURS[i % 3]} for i in range(72)]
    return splits(tmp_path / "tell", rows, 48)


@pytest.fixture
def bert(with_tokenizer: Callable[[Path], None], tmp_path: Path) -> Path:
    """A random BERT with a head that fills gaps, and the tiny tokenizer with a mask token."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = BertConfig(vocab_size=400, num_attention_heads=4, **sizes)  # type: ignore[arg-type]
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path / "bert")
    with_tokenizer(tmp_path / "bert")
    file = tmp_path / "bert" / "tokenizer_config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, "mask_token": "<|im_start|>"}))
    return tmp_path / "bert"


SILENT = Pair(None, None)
LAYOUT = Layout((250,), (251,), 252, 2)


@pytest.fixture(scope="session")
def trained(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, trained to answer `dede…` whenever the user says anything, and not else."""
    draw = random.Random(0)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32).train()
    for weight in model.parameters():
        if weight.ndim > 1:  # it has large ones, which would have to be unlearned
            torch.nn.init.normal_(weight, std=0.05)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)

    def row() -> Rendered:
        pairs: list[Pair] = []
        while sum(len(p.user or ()) + len(p.agent or ()) for p in pairs) < 90:
            words = tuple(draw.randrange(3, 240) for _ in range(draw.randint(1, 12)))
            speaks = draw.random() < 0.5
            pairs.append(Pair(words, (70, 71) * draw.randint(2, 20)) if speaks else SILENT)
        return rendered(LAYOUT, list(collapsed(pairs)))

    for _ in range(150):
        rows = [row() for _ in range(8)]
        length = min(len(r.ids) for r in rows)
        ids = torch.tensor([r.ids[:length] for r in rows])
        weights = torch.tensor([r.learned[1:length] for r in rows])
        logits = model(input_ids=ids).logits[:, :-1]
        losses = functional.cross_entropy(
            logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
        )
        loss = (losses.view_as(weights) * weights).sum() / weights.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    path = tmp_path_factory.mktemp("trained") / "listener"
    shutil.copytree(tiny_checkpoint, path)
    model.to(torch.bfloat16).save_pretrained(path)
    stored.write(path, Stored("idle", LAYOUT, 100, agent_tokens=6))
    return path


@pytest.fixture
def listener(trained: Path, tmp_path: Path) -> Path:
    """A copy of it, the test's own."""
    return Path(shutil.copytree(trained, tmp_path / "listener"))


@contextmanager
def _served(model: Path, home: Path, *words: str) -> Iterator[tuple[dict[str, str], Any]]:
    """Run a server on a free port; give its addresses and its process."""
    command = [sys.executable, "-m", "bmkit_cli", "duplex", "serve", "-m", str(model)]
    with (home / "err").open("w") as errors:
        process = subprocess.Popen(
            [*command, "--port", "0", "--json", "--threads", "1", *words],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=home,
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, (home / "err").read_text()
        yield json.loads(line), process
    finally:
        process.terminate()
        process.wait(20)
        process.stdout.close()  # type: ignore[union-attr]


@pytest.fixture
def server() -> Callable[..., Any]:
    """Run a server on a free port: `with server(model, folder, *options) as (where, process)`."""
    return _served


WORDS = (
    *("person", "city", "place", "parent", "child", "lives", "born", "of", "in", "nothing", "the"),
    *("Ann", "Bob", "Rome", "Oslo", "visits", "near", "is", "was", "it", "x", ",", "."),
)
SENTINELS = ("<extra_id_0>", "<extra_id_1>", "<extra_id_2>")
SPECIAL = ("<pad>", "</s>", "<s>", "<unk>", "<mask>", *SENTINELS)
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}


def _tokenizer(kind: str) -> Any:
    """A tokenizer with one token for each word of WORDS."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate((*SPECIAL, *WORDS))}
    bare = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = {"masked": "<s> $A </s>", "t5": "$A </s>", "causal": "$A"}[kind]
    bare.post_processor = processors.TemplateProcessing(
        single=ends, special_tokens=[("</s>", 1), ("<s>", 2)]
    )
    given = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "bos_token": "<s>"}
    given |= {"mask_token": "<mask>"} if kind == "masked" else {}
    more = list(SENTINELS) if kind == "t5" else []
    return PreTrainedTokenizerFast(tokenizer_object=bare, **given, extra_special_tokens=more)


@pytest.fixture
def promptable(tmp_path: Path) -> Callable[[str], Path]:
    """Make a random model of a kind (masked, causal, t5), whose tokens are words."""
    return lambda kind: _promptable(kind, tmp_path / "asked")


def _promptable(kind: str, path: Path) -> Path:
    import transformers

    torch.manual_seed(3)
    known = _tokenizer(kind)
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "vocab_size": len(known)}
    if kind == "t5":
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
        config: Any = transformers.T5Config(**sizes, **ids, decoder_start_token_id=0)
        made: Any = transformers.T5ForConditionalGeneration
    else:
        wide = {"num_attention_heads": 4, "initializer_range": 0.3}
        built = "Llama" if kind == "causal" else "Bert"
        config = getattr(transformers, f"{built}Config")(**SIZES, **ids, **wide)
        made = getattr(transformers, f"{built}For{'CausalLM' if kind == 'causal' else 'MaskedLM'}")
    made(config).save_pretrained(path)
    known.save_pretrained(path)
    return path
