"""Train a prompt: its soft tokens, deltas beside the model, a verbalizer on states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bmkit import artifact
from bmkit.deltas import attachment, compose, soft_files, soft_rows, soft_words
from bmkit.deltas.held import base_of
from bmkit.deltas.recipe import names
from bmkit.errors import RecipeError
from bmkit.nn.zeros import keep_zeros
from bmkit.plan import Job
from bmkit.prompt import kept, states, whole
from bmkit.prompt.ask import Asker
from bmkit.prompt.labels import Verbalizer
from bmkit.prompt.measure import measure
from bmkit.prompt.ready import Ready
from bmkit.prompt.rounds import Round, Rows
from bmkit.prompt.states import States
from bmkit.prompt.stored import SOFT
from bmkit.prompt.texts import Writer
from bmkit.train.dev import Dev
from bmkit.train.dropout import replace_dropout
from bmkit.train.fused_lora import fuse
from bmkit.train.ranks import Ranks
from bmkit.train.rates import Rates
from bmkit.train.trainer import steps_of, train

PEFT_TASKS = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM", "masked": None}
NEAREST = 5
"""How many words are told to be near a trained row."""


def attach(job: Job, ready: Ready, asker: Asker, seed: int) -> None:
    """Put the recipe's deltas and the template's rows on the asker's model.

    All else is frozen, unless the whole model is trained, of which pruned weights stay zero.
    Raises RecipeError for what the model can't have.
    """
    spec = ready.recipe.tune
    asker.model.requires_grad_(spec.mode == "full")
    keep_zeros(asker.model.parameters())
    if ready.kind == "masked" and any(delta.PROMPT for delta in spec.deltas):
        raise RecipeError(
            "tune.deltas: a model that fills in masks has nothing in front of what it reads",
            hint='put {"soft": …} into the template, or take another delta',
        )
    if spec.deltas:
        asker.model = attachment.attach(
            asker.model,
            dict(zip(names(spec.deltas), spec.deltas, strict=True)),
            seed=seed,
            tokenizer=ready.tokenizer,
            tokenizer_path=job.checkpoint,
            task_type=PEFT_TASKS[ready.kind],
        )
    if ready.soft:
        _require_patched(asker.model)
        rows = soft_rows.add(asker.model, ready.soft, seed=seed, way=spec.encoder)
        rows.requires_grad_(spec.mode != "none")
        if rows.start != ready.soft_start:
            raise RecipeError(
                f"soft tokens: the model has {rows.start} tokens, and its config says "
                f"{ready.soft_start}"
            )
    asker.model.eval()


def _require_patched(model: Any) -> None:
    """Raise RecipeError if PEFT looks tokens up in a table that soft tokens aren't behind."""
    config = getattr(model, "active_peft_config", None)
    if getattr(config, "peft_type", None) in ("PROMPT_TUNING", "P_TUNING"):
        looked = getattr(model, "word_embeddings", None)
        if all(looked is not table for table in soft_rows.tables_of(model)):
            raise RecipeError(
                "tune.deltas: in this model, vectors in front don't go with soft tokens",
                hint="take prefix, or soft tokens alone",
            )


def learn(
    job: Job,
    ready: Ready,
    asker: Asker,
    told: Verbalizer | States | Writer,
    one: Round,
    work: Path,
) -> dict[str, Any]:
    """Train what is attached on a run's rows by the loss of their labels; return the figures.

    Checkpoints go to `work`, from which a killed run goes on. Peak memory: the model, and the
    activations of one batch.
    """
    recipe, model = ready.recipe, asker.model
    base = base_of(model)
    if (module := told.module) is not None:
        base.add_module(states.NAME, module.to(base.device).requires_grad_(True))
    examples: list[Any] = [
        {"input_ids": [*prompt.ids, *prompt.behind, *prompt.decoder_ids], "row": number}
        for number, prompt in enumerate(one.train.prompts)
    ]
    targets = told.targets(one.train.right)

    def collate(part: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        numbers = torch.tensor([example["row"] for example in part])
        return {"row": numbers, "labels": targets[numbers]}

    replace_dropout(model)
    fuse(model)
    ranks = [Ranks(t, steps_of(recipe.train, len(examples))) for t in compose.tuners(model)]

    def loss(_: Any, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        prompts = [one.train.prompts[number] for number in batch["row"].tolist()]
        right = batch["labels"].cpu()
        found = told.loss(told.said(asker, prompts), right).to(model.device)
        count = right.numel()
        for each in ranks:
            found = found + count * each.penalty()
        return found, count

    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    done = train(
        model,
        examples,
        collate,
        recipe.train,
        seed=one.seed,
        work=work / "train",
        device=model.device,
        reporter=job.reporter,
        loss=loss,
        dev=_dev(ready, asker, told, one.measured.get("dev")),
        callbacks=ranks,
        rates=_rates(ready, model, told),
    )
    if module is not None:
        delattr(base, states.NAME)
        module.eval().requires_grad_(False)
    if recipe.tune.mode == "full":
        whole.as_stored(model, job.checkpoint)
    if (rows := soft_rows.of(model)) is not None:
        rows.settle()
    model.eval()
    found = {
        "train_loss": round(done.loss, 6),
        "steps": done.steps,
        "trainable_parameters": trained,
    }
    return found if done.best_step is None else {**found, "best_step": done.best_step}


def _rates(ready: Ready, model: Any, told: Verbalizer | States | Writer) -> Rates:
    found: list[tuple[Any, float]] = []
    rows, spec = soft_rows.of(model), ready.recipe
    if rows is not None and spec.tune.learning_rate is not None:
        found.append((rows, spec.tune.learning_rate))
    if told.module is not None and spec.verbalizer.learning_rate is not None:
        found.append((told.module, spec.verbalizer.learning_rate))
    return found


def _dev(
    ready: Ready, asker: Asker, told: Verbalizer | States | Writer, rows: Rows | None
) -> Dev | None:
    """Return what is measured while training; None without held-out rows, or if nobody asked."""
    spec = ready.recipe.train
    best = spec.load_best_model_at_end or spec.early_stopping_patience is not None
    if rows is None or not (best or spec.eval_steps):
        return None
    held = rows
    name = spec.metric_for_best_model or "dev_loss"
    targets = told.targets(held.right)

    @torch.no_grad()
    def figures() -> dict[str, float]:
        said = told.ask(asker, held.prompts)
        loss = float(told.loss(said, targets)) / targets.numel()
        if isinstance(told, Writer):
            return {"dev_loss": loss}
        chosen = told.chosen(told.label_logprobs(said))
        measured, _ = measure(chosen, held.right, told.labels, ready.recipe.data.none)
        return {
            "dev_loss": loss,
            "dev_accuracy": measured["accuracy"],
            "dev_f1": measured["macro_f1"],
        }

    return Dev(
        figures,
        spec.eval_steps,
        name if best else None,
        greater_is_better=name != "dev_loss",
        patience=spec.early_stopping_patience,
    )


def write(
    ready: Ready, asker: Asker, told: Verbalizer | States | None, folder: Path
) -> dict[str, Any]:
    """Write what was trained into an artifact's directory; return what its file says of that."""
    found: dict[str, Any] = {}
    if (rows := soft_rows.of(asker.model)) is not None:
        soft_files.save(asker.model, folder / SOFT)
        table = soft_rows.table_of(asker.model).weight.detach()
        near = soft_words.nearest(rows().detach(), table, ready.tokenizer, NEAREST)
        tokens = ready.tokenizer.convert_ids_to_tokens
        found["soft"] = [
            {
                "begun": None if row.token is None else tokens(row.token),
                "near": {one.word: round(one.cosine, 4) for one in own},
            }
            for row, own in zip(ready.soft, near, strict=True)
        ]
    called = names(ready.recipe.tune.deltas)
    for name in called:
        compose.save(asker.model, name, folder / artifact.DELTAS / name)
    if called:
        found["adapters"] = called
    if told is not None:
        told.save(folder)
    if ready.recipe.tune.mode == "full":
        whole.write(asker.model, ready.job.checkpoint, folder / kept.WHOLE)
    return found
