"""Train a small masked language model from scratch, in some minutes on two cores.

python scripts/train_small_mlm.py --data FOLDER -o OUT [--steps N] [--seed N] [--threads N]

FOLDER has sst2, snips, gsm8k and fewglue: some 400 000 words, without SST-2's dev rows and SNIPS's
validation rows, which are tested on. The model is BERT's architecture with 4 layers of 192, its
tokenizer a WordPiece of 6000; OUT is a checkpoint that `transformers` loads. It has seen a
ten-thousandth of what BERT has: it shows that masked models work, and how quick they are, not what
such models know.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch import Tensor
from torch.nn import functional
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PAD, UNK, CLS, SEP, MASK = range(len(SPECIAL))
VOCABULARY, MOST_TOKENS = 6000, 64
BATCH_TOKENS = 3072
SHARE = 0.2
"""Of tokens that are hidden: more than BERT's 15 %, as small models learn quicker with (arXiv
2202.08005)."""
HELD = 500
"""Texts that are not trained on: the loss is told of them."""
FIELDS = ("premise", "hypothesis", "passage", "question", "paragraph", "text", "sentence1")


def texts(folder: Path) -> list[str]:
    """Return the texts of all four data sets, each once, in a fixed order."""
    found: dict[str, None] = {}
    for name in ("train", "test"):
        with (folder / "sst2" / f"{name}.tsv").open(encoding="utf-8", newline="") as stream:
            for row in csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE):
                found[row[0]] = None
    for file in sorted((folder / "snips").glob("train_*.json")):
        for rows in json.loads(file.read_text(encoding="utf-8", errors="replace")).values():
            for row in rows:
                found["".join(part["text"] for part in row["data"]).strip()] = None
    for line in lines(folder / "gsm8k" / "train_2000.jsonl"):
        found[line["question"]] = None
        found[line["answer"]] = None
    for file in sorted((folder / "fewglue").glob("*.jsonl")):
        for line in lines(file):
            for name in FIELDS:
                if isinstance(line.get(name), str):
                    found[line[name]] = None
    return [text for text in found if text]


def lines(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file of JSON lines."""
    yield from map(json.loads, file.read_text(encoding="utf-8").splitlines())


def tokenizer_of(corpus: list[str]) -> PreTrainedTokenizerFast:
    """Train BERT's kind of tokenizer, without case."""
    bare = Tokenizer(models.WordPiece(unk_token=SPECIAL[UNK]))
    bare.normalizer = normalizers.BertNormalizer(lowercase=True)
    bare.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    bare.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, show_progress=False
    )
    bare.train_from_iterator(corpus, trainer)
    bare.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)],
    )
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return PreTrainedTokenizerFast(tokenizer_object=bare, **dict(zip(names, SPECIAL, strict=True)))


def rows_of(tokenizer: PreTrainedTokenizerFast, corpus: list[str]) -> list[list[int]]:
    """Return texts as tokens, those that are too long in parts."""
    found = []
    for ids in tokenizer(corpus, add_special_tokens=False)["input_ids"]:
        for low in range(0, len(ids), MOST_TOKENS - 2):
            part = ids[low : low + MOST_TOKENS - 2]
            if len(part) > 3:
                found.append([CLS, *part, SEP])
    return found


def batches(rows: list[list[int]], draw: random.Random) -> Iterator[list[list[int]]]:
    """Yield batches of rows of like length without end, in an order drawn anew each time."""
    while True:
        order = sorted(rows, key=lambda row: (len(row), draw.random()))
        cut: list[list[list[int]]] = []
        batch: list[list[int]] = []
        for row in order:
            if batch and len(row) * (len(batch) + 1) > BATCH_TOKENS:
                cut.append(batch)
                batch = []
            batch.append(row)
        cut.append(batch)
        draw.shuffle(cut)
        yield from cut


def loss_of(model: BertForMaskedLM, rows: list[list[int]], draw: torch.Generator) -> Tensor:
    """Return the mean loss of the tokens that are hidden; the head runs at these alone."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[PAD] * (longest - len(row))] for row in rows])
    there = ids != PAD
    hidden = (torch.rand(ids.shape, generator=draw) < SHARE) & (ids >= len(SPECIAL))
    hidden[:, 1] |= ~hidden.any(1)  # one at least
    chance = torch.rand(ids.shape, generator=draw)
    drawn = torch.randint(len(SPECIAL), model.config.vocab_size, ids.shape, generator=draw)
    seen = torch.where(hidden & (chance < 0.8), MASK, ids)
    seen = torch.where(hidden & (chance >= 0.9), drawn, seen)
    states = model.bert(seen, attention_mask=there.long()).last_hidden_state
    return functional.cross_entropy(model.cls(states[hidden]), ids[hidden])


def train(
    model: BertForMaskedLM, rows: list[list[int]], held: list[list[int]], steps: int, seed: int
) -> float:
    """Train with AdamW and a rate that rises and falls; return the loss on held rows."""
    draw, shuffle = torch.Generator().manual_seed(seed), random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.5e-3, weight_decay=0.01)
    warm = max(steps // 10, 1)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda at: min((at + 1) / warm, (steps - at) / max(steps - warm, 1))
    )
    start, total = time.monotonic(), 0.0
    for step, batch in zip(range(1, steps + 1), batches(rows, shuffle), strict=False):
        loss = loss_of(model.train(), batch, draw)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        total += loss.item()
        if step % max(steps // 20, 1) == 0:
            count = max(steps // 20, 1)
            print(f"{step}/{steps} loss {total / count:.3f}, {time.monotonic() - start:.0f} s")
            total = 0.0
    fixed = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        parts = [held[low : low + 50] for low in range(0, len(held), 50)]
        return sum(loss_of(model.eval(), part, fixed).item() for part in parts) / len(parts)


def main() -> None:
    """Train, and write the checkpoint with what was done, as `training.json`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    corpus = texts(arguments.data)
    tokenizer = tokenizer_of(corpus)
    rows = rows_of(tokenizer, corpus)
    random.Random(arguments.seed).shuffle(rows)
    held, rows = rows[:HELD], rows[HELD:]
    model = BertForMaskedLM(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=768,
            max_position_embeddings=256,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            pad_token_id=PAD,
        )
    )
    start = time.monotonic()
    loss = train(model, rows, held, arguments.steps, arguments.seed)
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    done = {
        "texts": len(corpus),
        "tokens": sum(map(len, rows)),
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": arguments.steps,
        "seed": arguments.seed,
        "seconds": round(time.monotonic() - start),
        "held_loss": round(loss, 4),
    }
    (arguments.out / "training.json").write_text(json.dumps(done, indent=1) + "\n")
    print(json.dumps(done))


if __name__ == "__main__":
    main()
