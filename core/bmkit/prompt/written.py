"""Templates that a seq2seq model writes from rows and their labels (LM-BFF, arXiv 2012.15723)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bmkit import model as models
from bmkit import report
from bmkit.data.tabular import Record
from bmkit.errors import About, InputError, RecipeError
from bmkit.nn import products
from bmkit.plan import Job
from bmkit.prompt import beams
from bmkit.prompt.kinds import kind_of
from bmkit.prompt.ready import Ready
from bmkit.prompt.rounds import Rows
from bmkit.prompting import forms
from bmkit.prompting.encode import Encoder
from bmkit.prompting.forms import Form, Said
from bmkit.prompting.labelwords import LabelWords
from bmkit.prompting.template import Template, to_text
from bmkit.prompting.wrap import wrap
from bmkit.verbalizers.positions import batches, logits_at, pad_of, padded

KEY = "search.model"
NOTE = "written.json"
BATCH_TOKENS = 2048
"""Tokens of rows that are read together."""


@dataclass(frozen=True)
class WrittenTemplate:
    """A template in the mini-language, and the log-likelihood of its texts over all rows."""

    text: str
    score: float


def templates(job: Job, ready: Ready, rows: Rows, work: Path) -> list[WrittenTemplate]:
    """Return what the recipe's `search.model` writes from rows, the likeliest first.

    A killed run finds it in `work`. Raises InputError for a model without sentinels, or that writes
    nothing. Peak memory: the model, its states of all rows with the keys and values that its
    decoder makes of them, and the logits of one batch.
    """
    note = work / NOTE
    if note.is_file():
        return [WrittenTemplate(**one) for one in json.loads(note.read_text(encoding="utf-8"))]
    found = _written(job, ready, rows)
    work.mkdir(parents=True, exist_ok=True)
    scratch = note.with_suffix(".partial")
    scratch.write_text(json.dumps([vars(one) for one in found]), encoding="utf-8")
    scratch.replace(note)
    return found


def _written(job: Job, ready: Ready, rows: Rows) -> list[WrittenTemplate]:
    spec = ready.recipe.search
    assert spec is not None  # whose model this is
    path = job.models[KEY].path
    wanted = _forms(ready)
    with About(KEY):
        writer = Writer.load(job, path, max(len(form.gaps) for form in wanted))
    labels = [own[0] for own in rows.right]
    scores: dict[str, float] = {}
    total = len(wanted) * spec.max_new_tokens
    with report.task(job.reporter, "write templates", total, "tokens") as bar:
        for form in wanted:
            held = writer.read(form, rows.records, labels, ready.words)
            for said, score in writer.write(
                form, held, spec.beam_width, spec.max_new_tokens, bar.advance
            ):
                text = to_text(form.filled(said))
                scores[text] = max(score, scores.get(text, score))
    if not scores:
        raise InputError(
            f"{KEY}: {path} wrote no template: none was whole after {spec.max_new_tokens} tokens",
            hint="raise search.max_new_tokens or search.beam_width",
        )
    best = sorted(scores.items(), key=lambda pair: (-pair[1], pair[0]))
    return [WrittenTemplate(*pair) for pair in best[: spec.num_templates]]


def _forms(ready: Ready) -> list[Form]:
    spec = ready.recipe.search
    assert spec is not None  # as above
    if spec.forms:
        return [forms.parse(text, f"search.forms.{n}") for n, text in enumerate(spec.forms)]
    template = ready.prompts.template
    if not isinstance(template, Template):
        raise RecipeError(
            "search.model: in a Jinja template nothing says which texts a row has",
            hint="say search.forms",
        )
    with About(KEY):
        return forms.usual(template, ready.kind)


Held = list[tuple[Any, Tensor, Any]]
"""By batch: what the encoder says, the mask of its tokens, and the decoder's keys and values."""


class Writer:
    """A seq2seq model that fills gaps, told by sentinels."""

    def __init__(
        self, model: Any, tokenizer: Any, encoder: Encoder, gaps: int, source: Path
    ) -> None:
        """Take a model in eval mode. Raises InputError for a tokenizer without sentinels."""
        self.model, self.tokenizer, self.encoder = model, tokenizer, encoder
        names = [f"<extra_id_{number}>" for number in range(gaps + 1)]
        known = tokenizer.get_vocab()
        if missing := [name for name in names if name not in known]:
            raise InputError(
                f"{source} can't write templates: its tokenizer has no {missing[0]}",
                hint="take a T5, that was trained to fill gaps",
            )
        self.sentinels = [known[name] for name in names]
        self.banned, self.once = self._barred(int(model.config.vocab_size))

    @classmethod
    def load(cls, job: Job, path: Path, gaps: int) -> Writer:
        """Load a checkpoint for templates of `gaps` gaps. Raises InputError if it can't write."""
        config = models.load_config(path)
        if kind_of(config.to_dict()) != "seq2seq":
            raise InputError(f"{path} is no seq2seq model, as writes templates", hint="take a T5")
        tokenizer = models.load_tokenizer(path)
        spec = job.recipe.template  # type: ignore[attr-defined]
        most = min(spec.max_seq_length, models.context(config) or spec.max_seq_length)
        encoder = Encoder(tokenizer, "seq2seq", most, spec.truncate_method)
        device = models.pick_device(job.recipe.device)
        model = models.load_model(path, device=device, dtype=job.recipe.dtype)
        return cls(model.eval(), tokenizer, encoder, gaps, path)

    @torch.inference_mode()
    def read(
        self, form: Form, records: Sequence[Record], labels: Sequence[int], words: LabelWords
    ) -> Held:
        """Let the encoder read rows, each with the first word of its label at the form's mask."""
        from transformers import DynamicCache

        firsts = [form.with_word(own[0].text.strip()) for own in words.words]
        parts = [
            wrap(firsts[label], record.values, record.line)
            for record, label in zip(records, labels, strict=True)
        ]
        prompts = self.encoder.encode_all(parts, [record.line for record in records])
        lengths = [len(prompt.ids) for prompt in prompts]
        held: Held = []
        for numbers in batches(lengths, [1] * len(prompts), BATCH_TOKENS, len(prompts)):
            rows = [prompts[number].ids for number in numbers]
            ids, mask = padded(rows, pad_of(self.model), self.model.device)
            with products.quick():
                said = self.model.get_encoder()(input_ids=ids, attention_mask=mask)
            held.append((said, mask, DynamicCache()))
        return held

    def write(
        self,
        form: Form,
        held: Held,
        width: int,
        max_new_tokens: int,
        heard: Callable[[], None] = lambda: None,
    ) -> Iterator[tuple[list[Said], float]]:
        """Yield what is written into a form's gaps, the likeliest first, with its score.

        That is the sum over rows of the log-likelihoods of the texts and the sentinels behind them.
        """
        sentinels = self.sentinels[: len(form.gaps) + 1]
        for beam in beams.search(
            lambda said: self.step(held, said),
            sentinels=sentinels,
            end=int(self.tokenizer.eos_token_id),
            width=width,
            max_new_tokens=max_new_tokens,
            banned=self.banned,
            once=self.once,
            heard=heard,
        ):
            yield [self._said(tokens) for tokens in beams.parts(beam, sentinels)], beam.score

    @torch.inference_mode()
    def step(self, held: Held, said: Sequence[int]) -> Tensor:
        """Return log-probabilities of the next token, summed over rows: float64 [vocabulary]."""
        from transformers import DynamicCache, EncoderDecoderCache

        start = int(self.model.config.decoder_start_token_id)
        device = self.model.device
        total: Tensor | None = None
        for states, mask, crossed in held:
            count = len(mask)
            ids = torch.tensor([[start, *said]], device=device).expand(count, -1)
            inputs = {
                "encoder_outputs": states,
                "attention_mask": mask,
                "decoder_input_ids": ids,
                "past_key_values": EncoderDecoderCache(DynamicCache(), crossed),
                "use_cache": True,
            }
            places = torch.arange(count, device=device)
            width = ids.shape[1]
            last = torch.full_like(places, width - 1)
            with products.quick():
                logits = logits_at(self.model, inputs, width, places, last)
            found = logits.float().cpu().double().log_softmax(-1).sum(0)
            total = found if total is None else total + found
        if total is None:
            raise ValueError("there are no rows")
        if not total.isfinite().all():
            raise InputError("the model's output is not a number; its weights are damaged")
        return total

    def _said(self, tokens: Sequence[int]) -> Said:
        if not tokens:
            return Said("")
        first = str(self.tokenizer.convert_ids_to_tokens(tokens[0]))
        return Said(self.tokenizer.decode(tokens).strip(), first.startswith(("▁", "Ġ")))

    def _barred(self, size: int) -> tuple[Tensor, Tensor]:
        """Return which tokens are never written, and which not twice in a row, [vocabulary].

        The first are those that nothing is seen of, special ones, line ends and several dots.
        """
        known = {number: token for token, number in self.tokenizer.get_vocab().items()}
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        special = {*self.tokenizer.all_special_ids, *(n for n, t in added.items() if t.special)}
        banned = torch.ones(size, dtype=torch.bool)
        once = torch.zeros(size, dtype=torch.bool)
        for number in range(size):
            text = "" if number not in known else self.tokenizer.decode([number]).strip()
            dots = len(text) > 1 and not text.strip(".")
            sentinel = known.get(number, "").startswith("<extra_id_")
            banned[number] = (
                not text or dots or "\n" in text or sentinel or number in special or "�" in text
            )
            once[number] = not any(char.isalnum() for char in text)
        return banned, once
