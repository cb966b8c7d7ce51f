"""`bmkit duplex build`: chats in, dialogues in slices out, row by row."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from bmkit import report
from bmkit.data.slices import cut, ultrachat
from bmkit.data.slices.dialogue import Dialogue
from bmkit.duplex import chats, transitions
from bmkit.duplex.audit import Audit
from bmkit.duplex.chats import Chat, Turn
from bmkit.duplex.interactions import INTERACTIONS
from bmkit.duplex.recipe import DuplexRecipe, HeldOut
from bmkit.duplex.scene import Scene, UnfitError
from bmkit.duplex.speech import Voice
from bmkit.duplex.transitions import SPLITS, Transitions
from bmkit.errors import InputError
from bmkit.plan import Job, Outcome

REMEMBERED = 64
"""Chats of a split that are kept, for interactions of several."""
TRIES = 4
"""Interactions that are drawn for a chat until one suits it."""
EXPORT = "duplex_ultrachat"
"""The folder of rows in the form of Duplex-UltraChat."""


def run(job: Job) -> Outcome:
    """Build the dialogues of a recipe into `train.jsonl`, `dev.jsonl`, `test.jsonl`.

    Memory doesn't grow with the input. Raises InputError for a row that can't be read, or if there
    is nothing to build from.
    """
    recipe = job.recipe
    assert isinstance(recipe, DuplexRecipe)
    builder = Builder(recipe, job.files)
    exports = recipe.export == "duplex_ultrachat"
    if exports:
        (job.out / EXPORT).mkdir()
    with ExitStack() as stack:

        def opened(folder: Path) -> dict[str, IO[str]]:
            return {
                split: stack.enter_context((folder / f"{split}.jsonl").open("w", encoding="utf-8"))
                for split in SPLITS
            }

        files = opened(job.out)
        exported = opened(job.out / EXPORT) if exports else {}
        total = recipe.limit or builder.count()
        bar = stack.enter_context(report.task(job.reporter, "building", total, "dialogues"))
        for split, dialogue in builder.dialogues():
            files[split].write(_line(dialogue.values()))
            if exports:
                exported[split].write(_line(ultrachat.to_row(dialogue)))
            bar.advance()
    for split in SPLITS:  # a split without a row isn't there
        for folder in (job.out, *([job.out / EXPORT] if exports else [])):
            file = folder / f"{split}.jsonl"
            if not file.stat().st_size:
                file.unlink()
    text = json.dumps(builder.audit.values(), indent=1, ensure_ascii=False) + "\n"
    (job.out / "audit.json").write_text(text, encoding="utf-8")
    metrics = builder.audit.metrics()
    if builder.left_over:
        job.reporter.info(f"there are more than {recipe.limit} chats; `-s limit=null` takes all")
    if not metrics["train_dialogues"]:
        job.reporter.warn("no dialogue is in train: there are few chats, and all are held out")
    elif not metrics["dev_dialogues"]:
        job.reporter.warn("no dialogue is in dev: there are few chats, and none is held out for it")
    return Outcome("data", metrics, table=builder.audit.table())


def _line(values: dict[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False) + "\n"


class Builder:
    """Draws interactions for chats as they come by. `audit` counts what it gives."""

    def __init__(self, recipe: DuplexRecipe, files: Mapping[str, Path]) -> None:
        self.recipe = recipe
        self.paths = [files[f"sources.{number}.path"] for number in range(len(recipe.sources))]
        self.transitions = transitions.read(files["transitions"], _share(recipe.held_out))
        self.audit = Audit()
        self.left_over = False
        """Whether there are chats that the limit has kept out."""
        self._recent: dict[str, deque[Chat]] = {split: deque(maxlen=REMEMBERED) for split in SPLITS}
        self._kinds = [kind for kind, share in recipe.mix.items() if share > 0]
        self._shares = [recipe.mix[kind] for kind in self._kinds]

    def count(self) -> int:
        """Return how many lines the sources have, as far as they are read."""
        found = 0
        for source, path in zip(self.recipe.sources, self.paths, strict=True):
            with path.open("rb") as stream:
                found += sum(1 for _ in itertools.islice(stream, source.limit))
        return found

    def dialogues(self) -> Iterator[tuple[str, Dialogue]]:
        """Yield dialogues, each with its split."""
        count = 0
        for again in itertools.count():
            before = count
            for found in self._rows(first=not again):
                if count == self.recipe.limit:
                    self.left_over = not again
                    self.audit.read -= self.left_over
                    return
                split, dialogue, queries = self._made(found, count)
                self.audit.add(split, dialogue, queries)
                yield split, dialogue
                count += 1
            if not count:
                names = ", ".join(map(str, self.paths))
                raise InputError(
                    f"no row of {names} holds a query with its answer",
                    hint="a chat has a message of the user, and one of the assistant behind it",
                )
            if self.recipe.limit in (None, count) or count == before:
                return

    def _rows(self, *, first: bool) -> Iterator[Chat | Dialogue]:
        """Yield what the sources hold, a row of each in turn.

        Dialogues that are in slices already come in the first pass only.
        """
        waiting = deque(
            chats.read(path, source.format, source.limit, kind=source.kind)
            for source, path in zip(self.recipe.sources, self.paths, strict=True)
        )
        while waiting:
            reader = waiting.popleft()
            for found in reader:
                self.audit.read += first
                self.audit.skipped += first and found is None
                waiting.append(reader)
                if isinstance(found, Chat) or (first and found is not None):
                    yield found
                break

    def _made(self, found: Chat | Dialogue, number: int) -> tuple[str, Dialogue, list[str]]:
        if isinstance(found, Dialogue):
            text = "\0".join(f"{one.user}\0{one.agent}" for one in found.slices)
            key = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
            kept = found.slices[: self.recipe.max_slices]
            imported = replace(found, slices=kept, meta={"chats": [key]})
            return split_of(key, self.recipe.held_out), imported, []
        split = split_of(found.id, self.recipe.held_out)
        recent = self._recent[split]
        draw = random.Random(f"{self.recipe.seed}:{number}")
        found = replace(found, turns=tuple(self._that_fit(found)))
        dialogue, used = self._drawn(found, recent, self.transitions[split], draw, number)
        if found not in recent:
            recent.append(found)
        return split, dialogue, [turn.user for chat in used for turn in chat.turns]

    def _that_fit(self, chat: Chat) -> Iterator[Turn]:
        """Yield the first turns, as many as have about `max_slices`, and one at least."""
        slices = 0.0
        words, tokens = self.recipe.slice.user_words, self.recipe.slice.agent_tokens
        for number, turn in enumerate(chat.turns):
            slices += 2 * len(turn.user.split()) / sum(words) + cut.about(turn.agent) / tokens + 2
            if number and slices > self.recipe.max_slices:
                return
            yield turn

    def _drawn(
        self,
        chat: Chat,
        others: Sequence[Chat],
        lists: Transitions,
        draw: random.Random,
        number: int,
    ) -> tuple[Dialogue, list[Chat]]:
        """Return a dialogue of an interaction that suits the chat, and the chats in it."""
        recipe = self.recipe
        punctuated = draw.random() >= recipe.unpunctuated
        voice = Voice(punctuated, recipe.disfluent, draw)
        drawn = draw.choices(self._kinds, self._shares, k=TRIES)
        for kind in dict.fromkeys((*drawn, "basic")):
            lists.used.clear()
            size, words = recipe.slice.agent_tokens, recipe.slice.user_words
            scene = Scene(chat, others, lists, voice, draw, words, size)
            if draw.random() < 0.3:
                scene.quiet(1)
            try:
                INTERACTIONS[kind](scene)
            except UnfitError:
                continue
            scene.quiet(1)
            break
        used = [chat, *scene.used]
        meta: dict[str, Any] = {
            "chats": [one.id for one in used],
            "punctuated": punctuated,
        }
        if lists.used:
            meta["transitions"] = list(lists.used)
        if scene.synthetic:
            meta["synthetic"] = "heuristic"
        slices = tuple(scene.slices[: recipe.max_slices])
        return Dialogue(f"{chat.id}-{number}", kind, slices, meta=meta), used


def split_of(key: str, shares: HeldOut) -> str:
    """Return the split of a chat by its hash: no seed, so that what is held out stays held out."""
    at = int(key, 16) / 16 ** len(key)
    if at < shares.test:
        return "test"
    return "dev" if at < shares.test + shares.dev else "train"


def _share(shares: HeldOut) -> float:
    """Return the share of transitions that are held out: none, if no chat is."""
    return shares.transitions if shares.dev or shares.test else 0.0
