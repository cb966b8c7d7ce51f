"""How likely words of several tokens are where a masked language model fills them in.

A word takes the place of a mask, so that there are as many masks as it has tokens. They are filled
in this order:

* `confident`: at each step that token of the word which the model is surest of (PET, arXiv
  2009.07118, as it predicts);
* `left_to_right`: one after the other;
* `at_once`: none sees another (PET, as it trains): words of equal length share one pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from bmkit.verbalizers.packed import Line, read
from bmkit.verbalizers.positions import batches, logits_at, logprobs, pad_of, padded

Order = Literal["confident", "left_to_right", "at_once"]
Key = tuple[int, tuple[int | None, ...]]
"""A row, and what is filled in: None where there is a mask."""


class Filling:
    """Words that are being filled in, one in each row for each choice."""

    def __init__(
        self, prompts: Sequence[Sequence[int]], masks: Sequence[int], mask_token: int, order: Order
    ) -> None:
        self.prompts, self.masks, self.mask_token, self.order = prompts, masks, mask_token, order
        self.filled: dict[int, list[int | None]] = {}
        self.word: dict[int, Sequence[int]] = {}
        self.row: dict[int, int] = {}

    def add(self, cell: int, row: int, word: Sequence[int]) -> None:
        """Begin with a word that is all masks; `cell` names it."""
        self.filled[cell], self.word[cell], self.row[cell] = [None] * len(word), word, row

    def asks(self) -> tuple[list[Line], dict[tuple[int, int], int]]:
        """Return what to run, and the slot of each word's token that is asked for now."""
        wanted: dict[Key, dict[tuple[int, int], int]] = {}
        slots: dict[tuple[int, int], int] = {}
        count = 0
        for cell, filled in self.filled.items():
            open_ = [place for place, token in enumerate(filled) if token is None]
            for place in open_[:1] if self.order == "left_to_right" else open_:
                there = wanted.setdefault((self.row[cell], tuple(filled)), {})
                ask = (place, self.word[cell][place])
                if ask not in there:
                    there[ask] = count
                    count += 1
                slots[cell, place] = there[ask]
        return [self._line(key, there) for key, there in wanted.items()], slots

    def fill(
        self, slots: Mapping[tuple[int, int], int], found: Sequence[float]
    ) -> list[tuple[int, int]]:
        """Put tokens in; return which, by word and place, and forget words that are whole."""
        best: dict[int, int] = {}
        done: list[tuple[int, int]] = []
        for (cell, place), slot in slots.items():
            if self.order != "confident":
                done.append((cell, place))
            elif cell not in best or found[slot] > found[slots[cell, best[cell]]]:
                best[cell] = place
        done += best.items()
        for cell, place in done:
            self.filled[cell][place] = self.word[cell][place]
        for cell in {cell for cell, _ in done}:
            if None not in self.filled[cell]:
                del self.filled[cell]
        return done

    def _line(self, key: Key, there: Mapping[tuple[int, int], int]) -> Line:
        row, filled = key
        prompt, at = self.prompts[row], self.masks[row]
        said = [self.mask_token if token is None else token for token in filled]
        places = {place: n for n, place in enumerate(dict.fromkeys(place for place, _ in there))}
        return Line(
            [*prompt[:at], *said, *prompt[at + 1 :]],
            0,
            None,
            [at + place for place in places],
            [(places[place], token) for place, token in there],
            list(there.values()),
        )


def answers(
    model: Any, filling: Filling, batch_tokens: int, most_reads: int
) -> tuple[list[int], Tensor]:
    """Return the words of all tokens that were filled in, and their log-probabilities [n]."""
    cells: list[int] = []
    values: list[Tensor] = []
    while filling.filled:
        lines, slots = filling.asks()
        found = _run(model, lines, batch_tokens, most_reads)
        done = filling.fill(slots, found.detach().tolist())
        cells += [cell for cell, _ in done]
        values.append(found[[slots[one] for one in done]])
    return cells, torch.cat(values)


def _run(model: Any, lines: Sequence[Line], batch_tokens: int, most_reads: int) -> Tensor:
    """Return the log-probabilities of what the lines ask, by their slots."""
    slots: list[int] = []
    found: list[Tensor] = []
    lengths, reads = [len(line.ids) for line in lines], [len(line.columns) for line in lines]
    for batch in batches(lengths, reads, batch_tokens, most_reads):
        part = [lines[number] for number in batch]
        ids, mask = padded([line.ids for line in part], pad_of(model), model.device)
        rows, columns, places, tokens = read(part, model.device)
        inputs = {"input_ids": ids, "attention_mask": mask}
        logits = logits_at(model, inputs, ids.shape[1], rows, columns)
        slots += [slot for line in part for slot in line.slots]
        found.append(logprobs(logits, places, tokens))
    return torch.cat(found)[torch.tensor(slots).argsort()]
