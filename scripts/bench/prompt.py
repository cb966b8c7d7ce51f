"""`bmkit prompt`: how well labels are told, and how many rows a second, beside how others ask.

python scripts/bench/prompt.py --data FOLDER [-m smollm2-135m] [--only NAME]...
python scripts/bench/prompt.py --data FOLDER --trained [--only TASK,TASK] [--only KIND,KIND]
python scripts/bench/prompt.py --data FOLDER --mlm CHECKPOINT [--trained]

FOLDER has sst2, snips and fewglue. What was measured before stays in the file:

quality   accuracy without training: as the model says it, and calibrated in both ways
speed     rows per second on SST-2, in turns in one process, of the same prompts, which are tokens
          already; the labels told must be the same
agreement by how much their log-probabilities of labels differ, on 16 rows
trained   (--trained) a few rows of each label, five draws: soft tokens, LoRA, the whole model where
          bmkit does that; a line is written as soon as it is done, and not done again
mlm       (--mlm) the same of a small masked model, as `scripts/train_small_mlm.py` makes one

Ways to ask, all on one float32 model:

bmkit     what `bmkit prompt` runs
padded    OpenPrompt's: rows in their order, eight together, each padded to 256 tokens, the head at
          all of them, hidden states of all layers kept
choices   lm-evaluation-harness's: a pass for each row and choice, sorted by length, in batches of
          as many tokens as bmkit's, the head everywhere, logits taken at the choice
grouped   as choices, with its cache: choices that differ in their last token alone share a pass
grouped_onednn   the same, with products by oneDNN, as bmkit has them
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import machine
import prompt_trained
import torch
from prompt_tasks import TASKS, ready, test_rows, verbalizer, written
from prompt_ways import MLM_SPEEDS, SPEEDS, agreement, speed
from transformers import AutoModelForMaskedLM

from bmkit import model as models
from bmkit.prompt.ask import Asker
from bmkit.prompt.measure import measure

CALIBRATIONS = ("none", "content_free", "contextual")
Job = Callable[[], dict[str, Any]]


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


class Results:
    """What was measured: read from the file, and written after each part."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        file = machine.ROOT / "scripts" / "bench" / "results" / "prompt.json"
        self.values: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        self.arguments = arguments
        self.before = self.facts()

    def facts(self) -> dict[str, Any]:
        return {
            **machine.facts(),
            "threads": self.arguments.threads,
            "rounds": self.arguments.rounds,
        }

    def save(self, name: str) -> None:
        """Write the file; `name` is what is new in it."""
        facts = self.values.setdefault("facts", {})
        facts[name] = {**self.before, "load_average_after": os.getloadavg()[0]}
        machine.save("prompt", self.values, say=False)
        self.before = self.facts()

    def keep(self, part: str, name: str, job: Job) -> None:
        self.before = self.facts()
        found = job()
        self.values.setdefault(part, {})[name] = found
        print(part, name, json.dumps(found), flush=True)
        self.save(f"{part}: {name}")


def opened(arguments: argparse.Namespace) -> tuple[Any, Asker]:
    """Return the model that is measured: the causal one, or that of --mlm."""
    if arguments.mlm is not None:
        model = AutoModelForMaskedLM.from_pretrained(arguments.mlm, dtype=torch.float32).eval()
        tokenizer = models.load_tokenizer(arguments.mlm)
        return model, Asker(model, "masked", tokenizer.mask_token_id, 32 * 512)
    command = [sys.executable, "-m", "bmkit_cli", "pull", arguments.model, "-q"]
    pulled = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    path = Path(pulled.stdout.strip())
    model = models.load_model(path, device=torch.device("cpu"), dtype="float32").eval()
    return model, Asker(model, "causal", None, 32 * 512)


def jobs(arguments: argparse.Namespace) -> list[tuple[str, str, Job]]:
    """Return what is measured without training, by part and name."""
    model, asker = opened(arguments)
    masked = arguments.mlm is not None
    prefix = "mlm " if masked else ""
    names = list(MLM_SPEEDS if masked else SPEEDS)
    tasks = ["sst2"] if masked else list(TASKS)
    found: list[tuple[str, str, Job]] = []
    found += [(f"{prefix}speed", n, partial(speed, arguments, n, model)) for n in names]
    found += [(f"{prefix}agreement", n, partial(agreement, arguments, n, model)) for n in names]
    told = partial(quality, arguments.data, model=arguments.model, asker=asker)
    found += [(f"{prefix}quality", n, partial(told, n)) for n in tasks]
    return found


def main() -> None:
    """Measure, and write scripts/bench/results/prompt.json after each part."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("-m", "--model", default="smollm2-135m")
    parser.add_argument("--mlm", type=Path, help="a masked model, in the place of the causal one")
    parser.add_argument("--only", action="append", help="a part, or a task or kind of words of it")
    parser.add_argument("--rows", type=int, default=60, help="of SST-2, for speed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--trained", action="store_true")
    parser.add_argument("--steps", type=int, help="fewer steps of training, to try it out")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = Results(arguments)
    if arguments.mlm is not None:
        arguments.model = str(arguments.mlm)
    if arguments.trained:
        part = "trained" if arguments.mlm is None else "mlm trained"
        tasks = list(prompt_trained.LEARNED) if arguments.mlm is None else ["sst2"]
        prompt_trained.run(
            arguments.data,
            arguments.model,
            tasks,
            arguments.only,
            arguments.steps,
            results.values.setdefault(part, {}),
            lambda name: results.save(f"{part}: {name}"),
        )
        return
    for part, name, job in jobs(arguments):
        if arguments.only is None or {name, part} & set(arguments.only):
            results.keep(part, name, job)


if __name__ == "__main__":
    main()
