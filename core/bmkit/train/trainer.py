"""One trainer for every engine, on transformers.Trainer: progress, resume, divergence."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, TrainerState
from transformers.trainer_utils import SaveStrategy

from bmkit import env, place
from bmkit.data.chat import Example
from bmkit.errors import (
    DivergedError,
    InputError,
    RecipeError,
    ResourceError,
    first_line,
    machine_refusal,
)
from bmkit.nn import products
from bmkit.report import Reporter, Task
from bmkit.train import checkpointing
from bmkit.train import head as heads
from bmkit.train.dev import Dev, Progress
from bmkit.train.learned import load_learned, save_learned
from bmkit.train.loss import next_token_loss
from bmkit.train.order import Dated, Order
from bmkit.train.rates import Rates, apart
from bmkit.train.recipe import Train
from bmkit.train.replay import noted
from bmkit.train.together import Learner

Loss = Callable[[Any, dict[str, Tensor]], tuple[Tensor, int]]
WHOLE = "bmkit-whole"  # marks a checkpoint whose every file has been written


@dataclass(frozen=True)
class Trained:
    """What a training run has measured."""

    steps: int
    losses: list[float]
    resumed_from: int
    history: list[dict[str, float]] = field(default_factory=list)
    """What was measured, step by step: `step` with `loss` and others, or with what `Dev` says."""
    best_step: int | None = None
    """The step whose weights the model has by now, if the best were to be kept."""

    @property
    def loss(self) -> float:
        """Return the mean loss of all steps, those before a resume included."""
        return sum(self.losses) / max(len(self.losses), 1)


def train(
    model: Any,
    examples: Sequence[Example],
    collate: Callable[[Sequence[Example]], dict[str, Tensor]],
    spec: Train,
    *,
    seed: int,
    work: Path,
    device: torch.device,
    reporter: Reporter,
    loss: Loss | None = None,
    dev: Dev | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    replay: bool = True,
    rates: Rates = (),
    recomputes: bool = False,
) -> Trained:
    """Train what is trainable in `model`, in place.

    Checkpoints go to `work`; if a killed run has left one there, training goes on from it, with
    the same batches, random draws and final loss as if it had never stopped. `loss` takes the model
    and a batch, and returns the sum and what it is divided by; if there is none, it is that of
    `default_loss`. `dev` measures in between. With `replay`, activations that are cheap to make
    aren't kept (`train.replay`). `rates` are modules with learning rates of their own.
    `recomputes` says that the loss computes activations again by itself. Raises
    DivergedError when a loss is not a number, leaving the last good checkpoint in `work`.
    """
    with _as_asked(device):
        plain = loss or default_loss(model)
        batch = _longest(examples, collate, device)
        # What is computed again has to be what it was: quick products are for models that keep
        # all, and for those whose blocks are known (`products.again`).
        for quick in (True, False) if replay and not recomputes else (False,):
            with (
                products.quick() if quick else nullcontext(),
                noted(model, plain, batch) if replay else nullcontext(plain) as loss,
            ):
                again = _again(model, examples, collate, spec, device, loss)
                if quick and again is None:
                    continue
                return _train(
                    *(model, examples, collate, spec, seed, work, device, reporter, loss, again),
                    *(dev, callbacks, rates),
                )
    raise AssertionError  # the last way returns


def _longest(
    examples: Sequence[Example],
    collate: Callable[[Sequence[Example]], dict[str, Tensor]],
    device: torch.device,
) -> Callable[[], dict[str, Tensor]]:
    """Return what makes a batch of the longest row."""

    def make() -> dict[str, Tensor]:
        row = max(examples, key=lambda e: len(e["input_ids"]))
        return {name: value.to(device) for name, value in collate([row]).items()}

    return make


def default_loss(model: Any) -> Loss:
    """Return the cross-entropy of the next token, with the model's head apart if it can be."""
    return partial(next_token_loss, head=heads.find(model))


def _train(
    model: Any,
    examples: Sequence[Example],
    collate: Callable[[Sequence[Example]], dict[str, Tensor]],
    spec: Train,
    seed: int,
    work: Path,
    device: torch.device,
    reporter: Reporter,
    loss: Loss,
    again: list[Any] | None,
    dev: Dev | None,
    callbacks: Sequence[TrainerCallback],
    rates: Rates,
) -> Trained:
    rank, world = env.process()
    together = world > 1
    last = _last_whole_checkpoint(work, clean=rank == 0)
    if again and spec.gradient_checkpointing is not True:
        reporter.info(f"{len(again)} blocks compute their activations again, to fit in memory")
    total = steps_of(spec, len(examples))
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=spec.max_steps,
        num_train_epochs=spec.num_train_epochs,
        learning_rate=spec.learning_rate,
        lr_scheduler_type=spec.lr_scheduler_type,
        warmup_steps=spec.warmup_steps if total > 1 else 0,  # the first step's rate is 0
        per_device_train_batch_size=spec.per_device_train_batch_size,
        gradient_accumulation_steps=spec.gradient_accumulation_steps,
        gradient_checkpointing=again is None,
        weight_decay=spec.weight_decay,
        max_grad_norm=spec.max_grad_norm,
        train_sampling_strategy="group_by_length",
        save_strategy=SaveStrategy.STEPS,
        save_steps=spec.save_steps,
        save_total_limit=2,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        use_cpu=device.type == "cpu",
        seed=seed,
        data_seed=seed,
        ddp_backend="gloo" if together and device.type == "cpu" else None,
        ddp_find_unused_parameters=False,
    )
    arguments._setup_devices  # noqa: B018 - a cached property: it takes the first GPU
    if not together:
        vars(arguments)["_setup_devices"] = device
        if device.type == "cuda":
            torch.cuda.set_device(device.index or 0)
        arguments._n_gpu = min(arguments.n_gpu, 1)  # one process, one device
    set_seed(seed)
    trainer = _Trainer(
        model=Learner(model, loss) if together else model,
        args=arguments,
        train_dataset=list(examples),
        data_collator=collate,
    )
    if getattr(collate, "epochs", False):
        trainer.train_dataset = Dated(trainer)
    trainer.loss_of, trainer.rates = loss, rates
    trainer._loss_shifts_labels = False  # every label that a batch has counts
    trainer.model_accepts_loss_kwargs = True  # our loss takes the number of labelled tokens
    start = int(last.name.rpartition("-")[2]) if last else 0
    if last is not None:
        reporter.info(f"going on from step {start}, where the last run was stopped")
    watch = _Watch(reporter, total, work, start, trainer)
    trainer.remove_callback(PrinterCallback)
    for callback in callbacks:
        trainer.add_callback(callback)
    progress = None if dev is None else Progress(dev, model, work, watch.start, reporter)
    if progress is not None:
        trainer.add_callback(progress)
    trainer.add_callback(watch)
    try:
        disk = "free some there, or let BMKIT_HOME be on another disk"
        kept = "the same command goes on from the last whole checkpoint"
        with place.refusals(work, kept, disk), checkpointing.recomputed(model, again or []):
            if progress is not None and progress.out_of_patience and last is not None:
                trainer.state = TrainerState.load_from_json(str(last / "trainer_state.json"))
            else:
                trainer.train(resume_from_checkpoint=str(last) if last else None)
    except (torch.OutOfMemoryError, RuntimeError) as exc:
        if machine_refusal(exc) != "out of memory":
            raise
        raise ResourceError(
            f"training ran out of memory: {first_line(exc)}",
            hint="lower train.per_device_train_batch_size, or set train.gradient_checkpointing",
        ) from None
    finally:
        watch.close()
    history = [_measured(entry) for entry in trainer.state.log_history if "loss" in entry]
    losses = [entry["loss"] for entry in history]
    best = None
    if progress is not None:
        history = sorted([*history, *progress.history], key=lambda entry: entry["step"])
        best = progress.take_best()
    return Trained(trainer.state.global_step, losses, watch.start, history, best)


def _measured(entry: dict[str, Any]) -> dict[str, float]:
    """Return what a step's log says that is the same in each run: no times."""
    names = ("step", "epoch", "loss", "grad_norm", "learning_rate")
    return {name: float(entry[name]) for name in names if name in entry}


def _again(
    model: Any,
    examples: Sequence[Example],
    collate: Callable[[Sequence[Example]], dict[str, Tensor]],
    spec: Train,
    device: torch.device,
    loss: Loss,
) -> list[Any] | None:
    """Return the blocks that compute their activations again; None: transformers finds them."""
    longest = _longest(examples, collate, device)
    rows = spec.per_device_train_batch_size
    if heads.prompted(model) and model.active_peft_config.peft_type == "PREFIX_TUNING":
        if spec.gradient_checkpointing is True:
            raise RecipeError(
                "train.gradient_checkpointing: with a prefix, blocks can't compute again",
                hint="leave it at auto",
            )
        return []  # each block would put its keys into the same cache twice
    model.train()
    try:
        return checkpointing.again(model, spec.gradient_checkpointing, longest, loss, rows=rows)
    except InputError:
        return None if spec.gradient_checkpointing is True else []


@contextmanager
def _as_asked(device: torch.device) -> Iterator[None]:
    """Let the trainer do as it is told on `device`, whatever accelerate's launcher has exported.

    Without this the environment, which no recipe and no key knows, could change precision or
    accumulation; and a process that is alone would train on the first GPU.
    """
    launched = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR"}
    launched = launched if env.process()[1] == 1 else set()
    foreign = [n for n in os.environ if n in launched or n.startswith(("ACCELERATE_", "FSDP_"))]
    saved = {name: os.environ.pop(name) for name in foreign}
    os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    try:
        yield
    finally:
        del os.environ["ACCELERATE_TORCH_DEVICE"]
        os.environ.update(saved)


def steps_of(spec: Train, rows: int) -> int:
    """Return how many optimizer steps so many rows make."""
    if spec.max_steps > 0:
        return spec.max_steps
    batches = math.ceil(rows / (spec.per_device_train_batch_size * env.process()[1]))
    return math.ceil(
        max(math.ceil(batches / spec.gradient_accumulation_steps), 1) * spec.num_train_epochs
    )


def _last_whole_checkpoint(work: Path, *, clean: bool = True) -> Path | None:
    """Return the newest checkpoint that is whole; with `clean`, remove those that aren't."""
    found = []
    for folder in work.glob("checkpoint-*"):
        if (folder / WHOLE).is_file():
            found.append(folder)
        elif clean:
            shutil.rmtree(folder)
    return max(found, key=lambda f: int(f.name.rpartition("-")[2]), default=None)


class _Trainer(Trainer):  # type: ignore[misc]
    """transformers' trainer with the loss of `train.loss`."""

    loss_is_scaled_for_ga = True  # it is divided by the labels of the whole accumulated step
    loss_of: Loss
    rates: Rates = ()
    tokens = 0
    """Read in this run, of all processes."""

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Return the optimizer, in which some modules have learning rates of their own."""
        return apart(super().create_optimizer(*args, **kwargs), self.rates)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write what is trained, not the frozen base; of several processes, the first does."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_learned(_inner(self.model), folder / "learned.safetensors")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        file = Path(resume_from_checkpoint) / "learned.safetensors"
        load_learned(_inner(model or self.model), file)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Return an order of the rows that the seed and the epoch decide, for all processes."""
        rows = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return Order(self, rows * self.args.world_size)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Return the loss of one batch: a mean over the labelled tokens of the whole step."""
        world = self.args.world_size
        self.tokens += world * _tokens(inputs)
        if world > 1:  # the mean of all processes' gradients is taken
            loss, counted = model(inputs)
            items = counted if num_items_in_batch is None else num_items_in_batch
            scaled: Tensor = world * loss / items
            return scaled
        loss, count = self.loss_of(model, inputs)
        items = count if num_items_in_batch is None else num_items_in_batch
        return loss / items


def _tokens(batch: dict[str, Tensor]) -> int:
    """Return how many tokens a batch has, without padding; 0 if it has none by that name."""
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if ids is None:
        return 0
    return ids.numel() if mask is None or mask.shape != ids.shape else int(mask.sum())


def _inner(model: Any) -> Any:
    return model.model if isinstance(model, Learner) else model


class _Watch(TrainerCallback):  # type: ignore[misc]
    """Show progress, mark whole checkpoints, stop when the loss is not a number."""

    def __init__(
        self, reporter: Reporter, total: int, work: Path, start: int, trainer: _Trainer
    ) -> None:
        self.reporter, self.work, self.start, self.trainer = reporter, work, start, trainer
        self.begun = time.monotonic()
        self.task: Task | None = reporter.begin("train", total, "steps")
        if start:
            self.task.advance(start)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Advance the bar by a step, with its loss."""
        if not logs or "loss" not in logs or self.task is None:
            return
        loss, norm = float(logs["loss"]), float(logs.get("grad_norm") or 0.0)
        if not math.isfinite(loss) or not math.isfinite(norm):
            what = "the loss" if not math.isfinite(loss) else "the gradient"
            last = _last_whole_checkpoint(self.work)
            kept = f"the last good checkpoint is {last}" if last else "no checkpoint was due yet"
            raise DivergedError(
                f"{what} is not a number at step {state.global_step}; {kept}",
                hint="lower train.learning_rate, or look for NaN in the model",
            )
        read = self.trainer.tokens / max(time.monotonic() - self.begun, 1e-9)
        self.task.advance(1, loss=loss, **({"tokens_per_second": read} if read else {}))

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Mark the checkpoint that was just written as whole."""
        folder = self.work / f"checkpoint-{state.global_step}"
        if args.world_size > 1:
            torch.distributed.barrier()  # each has a file of its own there
        if folder.is_dir() and state.is_world_process_zero:
            (folder / WHOLE).touch()

    def close(self) -> None:
        """End the progress display."""
        if self.task is not None:
            self.reporter.end(self.task)
            self.task = None
