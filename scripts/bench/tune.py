"""A training step of `bmkit tune` beside PEFT with transformers.Trainer: speed, memory, loss.

python scripts/bench/tune.py MODEL --rows GSM8K.jsonl [--rounds 3] [--steps 5] [--only NAME]...
    [--device cuda] [--dtype bfloat16] [--batch 4]

Each way runs in processes of its own, in turns. Tokens per second are told twice: by the clock, and
by the processor's seconds, which other work on the machine disturbs less. MODEL is SmolLM2-135M
(`bmkit pull smollm2-135m`), the rows are those of gsm8k's train split. Ways:

peft      peft's LoRA and transformers.Trainer with the model's own loss, as their docs have it
bmkit     bmkit's trainer, its loss, its dropout
forward   the frozen model's forward pass alone by bmkit's products, without LoRA or gradient: no
          step is faster
packed    as bmkit, with rows packed to 256 tokens
cached    as bmkit, with the states of frozen blocks kept; timed from the second epoch on
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import machine
import torch

from bmkit import env
from bmkit import model as models
from bmkit.data.batch import Padding
from bmkit.data.chat import Example, encode_file
from bmkit.nn import products
from bmkit.report import Silent
from bmkit.train import head as heads
from bmkit.train.activations import counted
from bmkit.train.dropout import replace_dropout
from bmkit.train.frozen import FrozenPrefix, numbered, with_rows
from bmkit.train.fused_lora import fuse
from bmkit.train.loss import next_token_loss
from bmkit.train.order import Order
from bmkit.train.packing import Packing, pack, way
from bmkit.train.recipe import Train
from bmkit.train.replay import noted
from bmkit.train.trainer import default_loss, train

TOKENS = 256
INSTRUCTIONS = machine.ROOT / "configs" / "data" / "instructions-train.jsonl"
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SPEEDS = ("tokens_per_second", "tokens_per_cpu_second")

WORKLOADS = {
    "answers": "gsm8k: the answer is learned, the question masked",
    "last lines": "gsm8k: the last line of the answer is learned, all before it masked",
    "text": "gsm8k: all of question and answer is learned",
    "instructions": "bmkit's own instructions, which are short; the answer is learned",
}


Instant = tuple[float, float]


def now() -> Instant:
    """Return the clock's seconds and this process's, of work that is done."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
    return time.monotonic(), time.process_time()


def examples(spec: dict[str, Any], tokenizer: Any) -> list[Example]:
    """Return the rows that are nearest below 256 tokens; of the instructions, the first ones."""
    if spec["workload"] == "instructions":
        return encode_file(INSTRUCTIONS, tokenizer, max_length=TOKENS, raw=False).examples
    lines = Path(spec["rows"]).read_text(encoding="utf-8").splitlines()
    made = []
    for row in map(json.loads, lines):
        question, answer = row["question"], row["answer"]
        steps, _, last = answer.rpartition("\n")
        made.append(
            {
                "answers": {"prompt": question, "completion": answer},
                "last lines": {"prompt": f"{question}\n{steps}", "completion": last},
                "text": {"text": f"{question}\n{answer}"},
            }[spec["workload"]]
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
        encoded = encode_file(path, tokenizer, max_length=2**16, raw=False).examples
    fit = [e for e in encoded if len(e["input_ids"]) <= TOKENS]
    return sorted(fit, key=lambda e: -len(e["input_ids"]))


def model_of(spec: dict[str, Any]) -> Any:
    """Return SmolLM2 with LoRA on all linear layers, or on those of some blocks."""
    from peft import LoraConfig, get_peft_model

    base = models.load_model(Path(spec["model"]), device=spec["device"], dtype=spec["dtype"])
    torch.manual_seed(0)
    config = LoraConfig(
        r=8,
        lora_alpha=16,
        lora_dropout=spec["dropout"],
        target_modules=LINEAR,
        layers_to_transform=spec.get("layers"),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(base, config)


def on(spec: dict[str, Any], batch: Any) -> Any:
    """Return a batch on the device."""
    return {name: values.to(spec["device"]) for name, values in batch.items()}


def by_peft(spec: dict[str, Any], model: Any, rows: list[Example], work: Path) -> dict[str, Any]:
    """Train with transformers.Trainer; the same batches as bmkit's."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    starts: list[Instant] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            starts.append(now())

    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=spec["steps"],
        per_device_train_batch_size=spec["batch"],
        learning_rate=5e-4,
        warmup_steps=0.05,
        train_sampling_strategy="group_by_length",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=spec["device"].type == "cpu",
        bf16=spec["dtype"] == "bfloat16",
        seed=0,
        data_seed=0,
    )
    collate = Padding(0)

    class InOurOrder(Trainer):  # type: ignore[misc]
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return Order(self, spec["batch"])  # the same batches, so that losses can be compared

    trainer = InOurOrder(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=collate,
        callbacks=[Clock()],
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    with counted(model) as kept:
        model(**on(spec, collate(rows[: spec["batch"]])))
    return {"starts": [*starts, now()], "losses": losses, "kept": kept.total}


def by_bmkit(spec: dict[str, Any], model: Any, rows: list[Example], work: Path) -> dict[str, Any]:
    """Train with bmkit."""
    replace_dropout(model)
    fuse(model)
    collate: Any = Padding(0)
    loss = default_loss(model)
    if spec["way"] == "packed":
        rows, collate = pack(rows, TOKENS), Packing(0, way(model) or "positions")
    prefix = None
    if spec["way"] == "cached":
        prefix = FrozenPrefix(model, work / "states")
        rows, collate, loss = numbered(rows), with_rows(collate), prefix.around(loss)
    starts: list[Instant] = []

    def clocked(model: Any, batch: dict[str, torch.Tensor]) -> Any:
        if len(batch["input_ids"]) > 1:  # a single row is for trying things out
            starts.append(now())
        return loss(model, batch)

    trained = train(
        model,
        rows,
        collate,
        Train(
            max_steps=spec["steps"],
            per_device_train_batch_size=spec["batch"],
            save_steps=10**6,
        ),
        seed=0,
        work=work,
        device=spec["device"],
        reporter=Silent(),
        loss=clocked,
    )
    starts.append(now())
    with noted(model, loss, lambda: on(spec, collate(rows[:1]))) as lean, counted(model) as kept:
        lean(model, on(spec, collate(rows[: spec["batch"]])))
    found = {"starts": starts, "losses": trained.losses, "kept": kept.total}
    if prefix is not None:
        found |= {"states": prefix.states.bytes, "skipped": prefix.skipped}
        prefix.close()
    return found


def forward(spec: dict[str, Any], model: Any, rows: list[Example]) -> dict[str, Any]:
    """Run the frozen model's forward pass, logits at the labels only."""
    head = heads.find(model)
    starts: list[Instant] = []
    with torch.no_grad(), model.disable_adapter(), products.quick():
        for step in range(spec["steps"]):
            low = step * spec["batch"] % (len(rows) - spec["batch"] + 1)
            starts.append(now())
            batch = on(spec, Padding(0)(rows[low : low + spec["batch"]]))
            next_token_loss(model, batch, head=head)
    return {"starts": [*starts, now()], "losses": [], "kept": 0}


def child(spec: dict[str, Any]) -> dict[str, Any]:
    """Train once, in this process; return tokens per second of the steps that count, and bytes."""
    torch.set_num_threads(spec["threads"])
    spec = {**spec, "device": models.pick_device(spec["device"])}
    tokenizer = models.load_tokenizer(Path(spec["model"]))
    rows = examples(spec, tokenizer)[: spec["take"]]
    model = model_of(spec)
    lengths: list[int] = []
    before = env.rss_bytes()
    env.forget_peak_rss()
    ways = {"peft": by_peft, "forward": lambda s, m, r, _: forward(s, m, r)}
    with tempfile.TemporaryDirectory() as folder:
        run = ways.get(spec["way"], by_bmkit)
        watched = partial(_note, lengths)
        handle = model.get_base_model().get_input_embeddings().register_forward_hook(watched)
        found = run(spec, model, rows, Path(folder))
        handle.remove()
    starts = found.pop("starts")
    steps = len(starts) - 1
    behind = {"forward": 0, "peft": 1}.get(
        spec["way"], 2
    )  # forward passes that bytes are counted in
    tokens = lengths[-steps - behind :][:steps]
    first = spec["warm"]
    wall, cpu = (starts[-1][i] - starts[first][i] for i in (0, 1))
    return {
        **found,
        "tokens_per_second": sum(tokens[first:]) / wall,
        "tokens_per_cpu_second": sum(tokens[first:]) / cpu,
        "rss_growth": env.peak_rss_bytes() - before,
        "labelled": sum(x != -100 for e in rows for x in e["labels"])
        / sum(len(e["input_ids"]) for e in rows),
    }


def _note(lengths: list[int], _: Any, args: Any, __: Any) -> None:
    """Note how many tokens of a batch aren't padding (token 0, which no row holds inside)."""
    lengths.append(int((args[0] != 0).sum()))


def in_child(spec: dict[str, Any]) -> dict[str, Any]:
    """Run `child` in a process of its own."""
    command = [sys.executable, __file__, "--child", json.dumps(spec)]
    done = subprocess.run(
        command,
        check=True,
        capture_output=True,
        text=True,
        env={"GOMP_SPINCOUNT": "3000", **os.environ},
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps({k: spec[k] for k in ("workload", "way", "dropout")}), flush=True)
    return found


def compared(specs: dict[str, dict[str, Any]], rounds: int) -> dict[str, Any]:
    """Run all of `specs` in turns, `rounds` times; return medians, and ratios to `peft`."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in specs}
    for _ in range(rounds):
        for name, spec in specs.items():
            runs[name].append(in_child(spec))
    found: dict[str, Any] = {}
    for name, each in runs.items():
        found[name] = {
            **{of: round(statistics.median(r[of] for r in each), 1) for of in SPEEDS},
            "all_tokens_per_second": [round(r["tokens_per_second"], 1) for r in each],
            "kept_bytes": each[0]["kept"],
            "rss_growth_bytes": int(statistics.median(r["rss_growth"] for r in each)),
            "losses": [round(x, 7) for x in each[0]["losses"]],
        }
        found[name] |= {k: each[0][k] for k in ("states", "skipped") if k in each[0]}
    for name, values in found.items():
        twin = f"peft {name.partition(' ')[2]}".strip()
        if name == twin or twin not in found:
            continue
        for of in SPEEDS:
            values[f"{of}_ratio"] = round(values[of] / found[twin][of], 3)
        if values["losses"]:
            values["kept_ratio"] = round(values["kept_bytes"] / found[twin]["kept_bytes"], 3)
            if name.startswith("packed"):
                continue  # other batches
            pairs = zip(values["losses"], found[twin]["losses"], strict=True)
            values["loss_difference"] = round(max(abs(a - b) for a, b in pairs), 7)
    return {"labelled": round(runs[next(iter(specs))][0]["labelled"], 3), **found}


def name_of(device: str) -> str:
    """Return the name of the results."""
    return "tune" if device == "cpu" else f"tune_{device}"


def known(name: str) -> dict[str, Any]:
    """Return the groups that were run before."""
    file = machine.ROOT / "scripts" / "bench" / "results" / f"{name}.json"
    found: dict[str, Any] = json.loads(file.read_text())["results"] if file.is_file() else {}
    return found


def main() -> None:
    """Compare, and write results/tune.json, or tune_cuda.json."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?")
    parser.add_argument("--rows")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", action="append")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--child")
    given = parser.parse_args()
    if given.child:
        print(json.dumps(child(json.loads(given.child))))
        return
    facts = machine.facts()
    common = {"model": given.model, "rows": given.rows, "threads": given.threads, "warm": 1}
    common |= {"steps": given.steps, "batch": given.batch, "take": given.batch * given.steps}
    common |= {"dropout": 0.0, "device": given.device, "dtype": given.dtype}
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for workload in ("answers", "last lines", "text"):
        specs: dict[str, dict[str, Any]] = {}
        for kind in ("peft", "bmkit"):
            for dropout in (0.0, 0.05):
                specs[f"{kind} {dropout}"] = {**common, "way": kind, "dropout": dropout}
        specs["forward 0.0"] = {**common, "way": "forward"}
        for spec in specs.values():
            spec["workload"] = workload
        groups[workload] = specs
    short = {**common, "workload": "instructions", "batch": 16, "take": 16 * given.steps}
    packed = {**short, "way": "packed", "batch": 4, "take": 260}
    groups["instructions"] = {
        **{kind: {**short, "way": kind} for kind in ("peft", "bmkit")},
        "packed": packed,
    }
    for workload in ("answers", "last lines"):
        top = {**common, "workload": workload, "layers": list(range(20, 30))}
        top |= {"take": 8, "warm": 2, "steps": 2 + given.steps}  # two batches are an epoch
        ways = ("peft", "bmkit", "cached")
        groups[f"top 10 blocks, {workload}"] = {kind: {**top, "way": kind} for kind in ways}
    chosen = given.only or groups
    file = name_of(given.device)
    results = known(file) if given.only else {}  # groups that aren't run again stay
    settings = {"rounds": given.rounds, "steps": given.steps, "threads": given.threads}
    facts |= {**settings, "batch": [given.batch, TOKENS], "workloads": WORKLOADS}
    for name in chosen:  # each is saved when it is done
        load = os.getloadavg()[0]
        results[name] = compared(groups[name], given.rounds)
        after = os.getloadavg()[0]
        results[name] |= {"load_average_before": load, "rounds": given.rounds}
        results[name] |= {"batch": given.batch, "dtype": given.dtype, "commit": facts["commit"]}
        machine.save(file, {**facts, "load_average_after": after, "results": results})


if __name__ == "__main__":
    main()
