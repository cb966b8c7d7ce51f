"""`bmkit prompt`: how well labels are told, and how many rows a second, beside how others ask.

python scripts/bench/prompt.py --data FOLDER [-m smollm2-135m] [--only NAME]... [--trained]

FOLDER has sst2, snips and fewglue. What was measured before stays in the file:

quality   accuracy without training: as the model says it, and calibrated in both ways
speed     rows per second on SST-2, in turns in one process, of the same prompts, which are tokens
          already; the labels told must be the same
agreement by how much their log-probabilities of labels differ, on 16 rows
--trained 16 rows of each label, five draws, by soft tokens and by LoRA

Ways to ask, all on one float32 model in one thread:

bmkit     what `bmkit prompt` runs
padded    OpenPrompt's: rows in their order, eight together, each padded to 256 tokens, the head at
          all of them, hidden states of all layers kept
choices   lm-evaluation-harness's: a pass for each row and choice, sorted by length, in batches of
          as many tokens as bmkit's, the head everywhere, logits taken at the choice
grouped   as choices, with its cache: choices that differ in their last token alone share a pass
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import machine
import torch
import yaml
from torch import Tensor

from bmkit import model as models
from bmkit.pipeline.stage import Request, prepare
from bmkit.prompt.ask import ON_CPU, Asker
from bmkit.prompt.labels import Verbalizer
from bmkit.prompt.measure import measure
from bmkit.prompt.run import Ready
from bmkit.report import Silent

Rows = list[dict[str, str]]

SNIPS = {  # one word a label, chosen once, as a reader would
    "AddToPlaylist": "playlist",
    "BookRestaurant": "restaurant",
    "GetWeather": "weather",
    "PlayMusic": "music",
    "RateBook": "rating",
    "SearchCreativeWork": "search",
    "SearchScreeningEvent": "cinema",
}
FEELINGS = {"negative": ["bad", "terrible"], "positive": ["good", "great"]}
TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "sst2": ('{"placeholder": "text_a"} It was {"mask"}', FEELINGS),
    "snips": ('{"placeholder": "text_a"} This is about {"mask"}', SNIPS),
    "rte": (
        '{"placeholder": "text_a"}\nQuestion: {"placeholder": "text_b"} True or False?\n'
        'Answer: {"mask"}',
        {"entailment": "True", "not_entailment": "False"},
    ),
    "boolq": (
        '{"placeholder": "text_a"}\nQuestion: {"placeholder": "text_b"}?\nAnswer: {"mask"}',
        {"true": "yes", "false": "no"},
    ),
}
CALIBRATIONS = ("none", "content_free", "contextual")

REVIEW = '{"placeholder": "text_a"} It was {"mask"}'
INSTRUCTION = (
    "Below is a sentence of a film review. Say how the one who wrote it liked the film: say bad if "
    "they did not like it, and good if they did. Don't go by single words alone, and mind irony.\n"
    'Review: {"placeholder": "text_a"}\nThe film was {"mask"}'
)
SEVERAL = {"negative": "a waste of time", "positive": "worth every minute"}
SPEEDS: dict[str, tuple[str, dict[str, Any], str, tuple[str, ...]]] = {
    "words of one token": (
        REVIEW,
        {"negative": "bad", "positive": "good"},
        "first",
        ("bmkit", "padded", "choices", "grouped"),
    ),
    "words of several tokens": (REVIEW, SEVERAL, "likelihood", ("bmkit", "choices", "grouped")),
    "several tokens behind an instruction": (
        INSTRUCTION,
        SEVERAL,
        "likelihood",
        ("bmkit", "choices", "grouped"),
    ),
}
PADDED_TO, PADDED_BATCH = 256, 8
AGREEMENT_ROWS = 16
SEEDS = [13, 21, 42, 87, 100]  # those of LM-BFF (arXiv 2012.15723)
TRAINED: dict[str, dict[str, Any]] = {
    "soft": {"tune": {"mode": "soft"}, "train": {"learning_rate": 1e-2}},
    "lora": {
        "tune": {
            "mode": "delta",
            "deltas": [{"type": "lora", "target_modules": "all-linear", "r": 8}],
        },
        "train": {"learning_rate": 5e-4},
    },
}
EPOCHS = 20


def sst2(file: Path) -> Rows:
    """Return the rows of one of SST-2's files."""
    with file.open(encoding="utf-8", newline="") as stream:
        read = csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [{"text_a": r[0], "label": ("negative", "positive")[int(r[1])]} for r in read]


def snips(folder: Path, split: str, count: int | None = None) -> Rows:
    """Return the first `count` requests of each kind, those of files that are cut left out."""
    found: Rows = []
    for label in SNIPS:
        text = (folder / f"{split}_{label}.json").read_text(encoding="utf-8", errors="replace")
        for row in json.loads(text)[label][:count]:
            said = "".join(part["text"] for part in row["data"]).strip()
            found.append({"text_a": said, "label": label})
    return found


def fewglue(file: Path, first: str, second: str) -> Rows:
    """Return the rows of a task of two texts."""
    rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return [
        {
            "text_a": r[first],
            "text_b": r[second],
            "label": r["label"] if isinstance(r["label"], str) else str(r["label"]).lower(),
        }
        for r in rows
    ]


def test_rows(data: Path, task: str) -> Rows:
    """Return what is measured of a task."""
    if task == "sst2":
        return sst2(data / "sst2" / "dev.tsv")[:300]
    if task == "snips":
        return snips(data / "snips", "validate", 30)
    if task == "rte":
        return fewglue(data / "fewglue" / "RTE_train32.jsonl", "premise", "hypothesis")
    return fewglue(data / "fewglue" / "BoolQ_train32.jsonl", "passage", "question")


def written(folder: Path, values: dict[str, Any], **splits: Rows) -> Path:
    """Write rows and a recipe for them; return the recipe's path."""
    for name, rows in splits.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    recipe = {
        "kind": "prompt",
        "data": {name: f"{name}.jsonl" for name in splits},
        "device": "cpu",
        "dtype": "float32",
        **values,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def ready(recipe: Path, model: str, *assign: str) -> Ready:
    """Return all of a recipe but the weights, as the engine makes it."""
    request = Request("prompt", str(recipe), model, assign=assign)
    return Ready(prepare(request, Silent()).job(recipe.parent, recipe.parent, Silent()))


def verbalizer(made: Ready) -> Verbalizer:
    """Return the verbalizer of a recipe, without its calibration."""
    spec = made.recipe.verbalizer
    return Verbalizer(made.words, spec.multi_token_handler, spec.combine, spec.aggregate)


def quality(data: Path, name: str, model: str, asker: Asker) -> dict[str, Any]:
    """Return accuracy and macro-F1 of one task by way of calibration; its rows are asked once."""
    template, words = TASKS[name]
    rows = test_rows(data, name)
    values = {"template": {"text": template}, "verbalizer": {"label_words": words}}
    with tempfile.TemporaryDirectory() as folder:
        recipe = written(Path(folder), values, test=rows)
        made = {kind: ready(recipe, model, f"calibrate.type={kind}") for kind in CALIBRATIONS}
    plain = made["none"]
    encoded = {"test": plain.prompts.encode(plain.splits["test"].records)}
    right = plain.right()["test"]
    told = verbalizer(plain)
    said = asker.logprobs(encoded["test"], told.question)
    found: dict[str, Any] = {
        "rows": len(rows),
        "tokens": sum(len(one.ids) for one in encoded["test"]),
        "template": template,
        "label_words": words,
        "share_of_the_largest_label": max(map(right.count, right)) / len(right),
    }
    for kind in CALIBRATIONS:
        prior = made[kind].prior_prompts(encoded)
        own = told.calibrated(asker.logprobs(prior, told.question)) if prior else told
        chosen = own.chosen(own.label_logprobs(said))
        figures, _ = measure(chosen, right, told.words.labels)
        found[kind] = {key: figures[key] for key in ("accuracy", "macro_f1")}
    return found


def trained(data: Path, name: str, kind: str, model: str) -> dict[str, Any]:
    """Learn from 16 rows of each label, five times; return what `bmkit prompt` measures."""
    template, words = TASKS[name]
    if kind == "soft":
        template = template.replace("It was", '{"soft": "It was"}')
        template = template.replace("This is about", '{"soft": "This is about"}')
    rows = sst2(data / "sst2" / "train.tsv") if name == "sst2" else snips(data / "snips", "train")
    random.Random(0).shuffle(rows)
    spec = TRAINED[kind]
    values = {
        "template": {"text": template},
        "verbalizer": {"label_words": words},
        "tune": spec["tune"],
        "learning_setting": {"type": "few_shot", "num_examples_per_label": 16, "seeds": SEEDS},
        "train": {"num_train_epochs": EPOCHS, "per_device_train_batch_size": 8, **spec["train"]},
    }
    with tempfile.TemporaryDirectory() as folder:
        recipe = written(Path(folder), values, train=rows, test=test_rows(data, name))
        command = [sys.executable, "-m", "bmkit_cli", "prompt", str(recipe), "-m", model, "--json"]
        command += ["-o", str(Path(folder) / "out")]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout)["metrics"])


@torch.inference_mode()
def padded(model: Any, prompts: Sequence[list[int]], words: Sequence[Sequence[int]]) -> Tensor:
    """Return log-probabilities [rows, labels] in OpenPrompt's way: a token is a label's word."""
    tokens = [own[0] for own in words]
    found = []
    for low in range(0, len(prompts), PADDED_BATCH):
        part = prompts[low : low + PADDED_BATCH]
        ids = torch.zeros(len(part), PADDED_TO, dtype=torch.long)
        mask, asked = torch.zeros_like(ids), torch.zeros_like(ids)
        for row, own in enumerate(part):
            ids[row, : len(own)] = torch.tensor(own)
            mask[row, : len(own)] = 1
            asked[row, len(own) - 1] = 1  # what this place says is the mask's word
        out = model(ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
        logits = out.logits[asked > 0]  # [rows, vocabulary]
        found.append(logits[:, tokens].softmax(-1).log())
    return torch.cat(found)


@torch.inference_mode()
def choices(
    model: Any, prompts: Sequence[list[int]], words: Sequence[Sequence[int]], *, grouped: bool
) -> Tensor:
    """Return log-probabilities [rows, labels] in lm-evaluation-harness's way."""
    shared: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for row, prompt in enumerate(prompts):
        for at, word in enumerate(words):
            shown = (*prompt, *word[:-1])
            key = shown if grouped else (*shown, row, at)  # the numbers part what must not be one
            shared.setdefault(key, []).append((row, at))
    passes = [(key if grouped else key[:-2], asked) for key, asked in shared.items()]
    passes.sort(key=lambda one: (-len(one[0]), one[0]))
    scores = torch.empty(len(prompts), len(words))
    for part in _parts(passes):
        ids = torch.zeros(len(part), len(part[0][0]), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for line, (shown, _) in enumerate(part):
            ids[line, : len(shown)] = torch.tensor(shown)
            mask[line, : len(shown)] = 1
        logits = model(ids, attention_mask=mask, use_cache=False).logits
        for line, (shown, asked) in enumerate(part):
            for row, at in asked:
                tokens = torch.tensor(words[at])
                own = logits[line, len(shown) - len(tokens) : len(shown)].log_softmax(-1)
                scores[row, at] = own.gather(1, tokens[:, None]).sum()
    return scores.log_softmax(-1)


def _parts(passes: Sequence[Any]) -> Iterator[list[Any]]:
    """Yield passes that go together, the longest first: as many tokens as a batch of bmkit's."""
    part: list[Any] = []
    for one in passes:
        if part and len(part[0][0]) * (len(part) + 1) > ON_CPU:
            yield part
            part = []
        part.append(one)
    if part:
        yield part


@dataclass(frozen=True)
class Asked:
    """Prompts and words of a part of speed, and the ways to ask."""

    prompts: list[list[int]]
    texts: list[list[int]]
    """The tokens of each label's word."""
    ways: dict[str, Callable[[], Tensor]]
    """Each returns log-probabilities, [rows, labels]."""


def asked(arguments: argparse.Namespace, name: str, model: Any, count: int) -> Asked:
    """Make the prompts of the first `count` rows of SST-2."""
    template, words, handler, ways = SPEEDS[name]
    spec = {"label_words": words, "multi_token_handler": handler}
    values = {"template": {"text": template}, "verbalizer": spec}
    rows = test_rows(arguments.data, "sst2")[:count]
    with tempfile.TemporaryDirectory() as folder:
        made = ready(written(Path(folder), values, test=rows), arguments.model)
    encoded = made.prompts.encode(made.splits["test"].records)
    prompts = [one.ids for one in encoded]
    told = verbalizer(made)
    texts = [list(word.ids) for word in told.words.flat]
    asker = Asker(model, "causal", None, 32 * 512)
    calls: dict[str, Callable[[], Tensor]] = {
        "bmkit": lambda: told.label_logprobs(asker.logprobs(encoded, told.question)),
        "padded": lambda: padded(model, prompts, texts),
        "choices": lambda: choices(model, prompts, texts, grouped=False),
        "grouped": lambda: choices(model, prompts, texts, grouped=True),
    }
    return Asked(prompts, texts, {way: calls[way] for way in ways})


def agreement(arguments: argparse.Namespace, name: str, model: Any) -> dict[str, Any]:
    """Return by how much log-probabilities of labels differ from bmkit's at most, by way."""
    made = asked(arguments, name, model, AGREEMENT_ROWS)
    ours = made.ways["bmkit"]()
    found = {w: float((ask() - ours).abs().max()) for w, ask in made.ways.items() if w != "bmkit"}
    assert max(found.values()) < 1e-3, f"{name}: {found}"
    return {"rows": AGREEMENT_ROWS, "largest_difference": found}


def speed(arguments: argparse.Namespace, name: str, model: Any) -> dict[str, Any]:
    """Return rows per second of all ways to ask, in turns."""
    made = asked(arguments, name, model, arguments.rows)
    ways, count = list(made.ways), len(made.prompts)
    seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    labels: dict[str, list[int]] = {}
    for turn in range(arguments.rounds):
        for at in range(len(ways)):
            way = ways[(turn + at) % len(ways)]  # whoever begins changes
            wall, own = time.perf_counter(), time.process_time()
            labels[way] = made.ways[way]().argmax(-1).tolist()
            spent = (time.process_time() - own, time.perf_counter() - wall)
            seconds[way].append(spent)
            print(name, turn, way, *(round(s, 2) for s in spent), flush=True)
    for way, labelled in labels.items():
        assert labelled == labels["bmkit"], f"{name}: {way} tells other labels"
    found: dict[str, Any] = {
        "rows": count,
        "tokens": sum(map(len, made.prompts)),
        "words": [len(text) for text in made.texts],
        "negative": labels["bmkit"].count(0),
        "ways": {},
    }
    for way in ways:
        cpu, wall = (statistics.median(s[i] for s in seconds[way]) for i in (0, 1))
        found["ways"][way] = {
            "rows_per_cpu_second": round(count / cpu, 2),
            "rows_per_second": round(count / wall, 2),
            "all_cpu_seconds": [round(s[0], 2) for s in seconds[way]],
            "all_seconds": [round(s[1], 2) for s in seconds[way]],
        }
    ours = found["ways"]["bmkit"]
    for way in ways[1:]:
        theirs = found["ways"][way]
        for of in ("rows_per_cpu_second", "rows_per_second"):
            theirs[f"bmkit_{of}_ratio"] = round(ours[of] / theirs[of], 2)
    return found


def main() -> None:
    """Measure, and write scripts/bench/results/prompt.json after each part."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("-m", "--model", default="smollm2-135m")
    parser.add_argument("--only", action="append", help="a part, or a task or kind of words of it")
    parser.add_argument("--rows", type=int, default=60, help="of SST-2, for speed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trained", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    command = [sys.executable, "-m", "bmkit_cli", "pull", arguments.model, "-q"]
    pulled = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    path = Path(pulled.stdout.strip())
    model = models.load_model(path, device=torch.device("cpu"), dtype="float32").eval()
    asker = Asker(model, "causal", None, 32 * 512)
    file = machine.ROOT / "scripts" / "bench" / "results" / "prompt.json"
    result: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    facts = result.setdefault("facts", {})

    def keep(part: str, name: str, values: dict[str, Any], before: dict[str, Any]) -> None:
        facts[f"{part}: {name}"] = {**before, "load_average_after": os.getloadavg()[0]}
        result.setdefault(part, {})[name] = values
        print(part, name, json.dumps(values), flush=True)
        machine.save("prompt", result, say=False)

    jobs: list[tuple[str, str, Callable[[], dict[str, Any]]]] = []
    if arguments.trained:
        for task, kind in itertools.product(("sst2", "snips"), TRAINED):
            work = partial(trained, arguments.data, task, kind, arguments.model)
            jobs.append(("trained", f"{task} {kind}", work))
    else:
        jobs += [("speed", name, partial(speed, arguments, name, model)) for name in SPEEDS]
        jobs += [("agreement", name, partial(agreement, arguments, name, model)) for name in SPEEDS]
        measured = partial(quality, arguments.data, model=arguments.model, asker=asker)
        jobs += [("quality", name, partial(measured, name)) for name in TASKS]
    for part, name, job in jobs:
        if arguments.only is None or {name, part} & set(arguments.only):
            before = {**machine.facts(), "threads": 1, "rounds": arguments.rounds}
            keep(part, name, job(), before)


if __name__ == "__main__":
    main()
