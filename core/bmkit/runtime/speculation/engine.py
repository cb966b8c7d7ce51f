"""Answer prompts by guessing and verifying: the answers are those of the target alone."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bmkit.runtime.ahead import Ahead
from bmkit.runtime.generate import Answer, Generation
from bmkit.runtime.row import Row, likeliest, require_finite
from bmkit.runtime.speculation.draft import Chooser, Draft, Drafted, agreement
from bmkit.runtime.speculation.phrases import LONGEST, Phrases
from bmkit.runtime.speculation.policy import Bet, Costs, Experience, Pace, choose
from bmkit.runtime.speculation.targets import Target
from bmkit.runtime.speculation.tree import Tree
from bmkit.runtime.speculation.window import Window

MOST_NODES = 64
LONG = 4
"""How many times as long a phrase is where as much of the context agrees as is looked at."""
SOURCES = ("prompt", "answers", "history")
"""A prompt with its answer, what was said after wrong guesses, and earlier prompts and answers."""
PROBE = 0.02
"""Of the time, what goes into trying a draft again that doesn't pay."""


@dataclass(frozen=True)
class Settings:
    """What may be set by hand; None: chosen in every round."""

    draft_length: int | None = None
    topk: int = 3
    """Phrases that are looked up at a place, of each source."""
    phrase_length: int = 8
    """Tokens of a phrase, if not all of the context that is looked at agrees."""
    adaptive: bool = True
    """Whether guesses that don't pay are left out."""
    window: int = 0
    """Places ahead that are iterated over; 0: none."""
    levels: int = 4
    harvest: bool = True
    """Whether what the target says after wrong guesses is kept."""
    sources: tuple[str, ...] = SOURCES
    """Where phrases are looked up."""


ALONE = Settings(draft_length=0, topk=0, harvest=False, sources=())
"""No guesses: the target says one token a forward."""


@dataclass
class Stats:
    """What a run did."""

    target_forwards: int = 0
    row_forwards: int = 0
    """Forwards, each counted once for every row in it."""
    prompts: int = 0
    tokens: int = 0
    steps_tokens: int = 0
    """Tokens but for each answer's first, which reading the prompt gives."""
    draft_seconds: float = 0.0
    seconds: float = 0.0
    """Of decoding: reading prompts is left out."""
    verify_seconds: float = 0.0
    verified: Counter[str] = field(default_factory=Counter)
    accepted: Counter[str] = field(default_factory=Counter)
    depth_tried: Counter[int] = field(default_factory=Counter)
    depth_right: Counter[int] = field(default_factory=Counter)
    rounds: list[int] = field(default_factory=list)
    """Tokens that each forward gave, over all rows."""
    nodes: int = 0
    drafted: Counter[int] = field(default_factory=Counter)
    """How often so many tokens were drafted for a row; 0 where the draft wasn't asked."""
    sizes: Counter[int] = field(default_factory=Counter)
    """How often so many tokens were in a forward."""

    def forwards(self) -> int:
        """Return how often the target was run for a row, to read its prompt or to verify."""
        return self.prompts + self.row_forwards


@dataclass
class _Active:
    row: Row
    said: list[int]
    """Prompt and answer; the last one hasn't been read."""
    log: Phrases
    bets: list[Bet] = field(default_factory=list)
    origins: list[str] = field(default_factory=list)
    drafted: Drafted | None = None
    window: Window | None = None


class Speculator:
    """A target, what guesses for it, and what was learned of both."""

    def __init__(
        self,
        target: Target,
        tokenizer: Any,
        eos: Collection[int],
        how: Generation,
        *,
        rows: int,
        context: int | None,
        draft: Draft | None = None,
        history: Phrases | None = None,
        settings: Settings | None = None,
        costs: Costs | None = None,
    ) -> None:
        self.target, self.tokenizer, self.eos, self.how = target, tokenizer, set(eos), how
        self.rows, self.context, self.draft = rows, context, draft
        self.settings = settings or Settings()
        self.history = history if history is not None else Phrases()
        self.harvested = Phrases(limit=2**16)
        self.costs = costs or Costs()
        self.experience = Experience()
        self.stats = Stats()
        self.asked_at = 0.0  # of `stats.seconds`, when the draft was last asked
        self.pace = Pace()
        self.reuse = False
        """Whether a prompt is read on from where it agrees with the one before it, as in a chat."""
        self.known: tuple[str | None, list[int]] | None = None  # what place 0 holds then
        self.said: list[list[int]] | None = None
        """Prompts with their answers, as far as they came, where somebody wants them."""
        self.asked = 0  # tokens of the last one's prompt

    def answer(
        self, prompts: Iterable[Any], *, write: Callable[[str], None] | None = None
    ) -> Generator[tuple[Any, Answer | None, list[str]], None, None]:
        """Answer prompts (with `number`, `ids`, `adapter`), each as soon as it is done.

        Yields the prompt, its answer, and where each token came from: `target`, `draft`, `prompt`,
        `answers`, `history` or `window`. Items that have no `ids` are handed through. `write` gets
        the text while it is made; use one row then.
        """
        source = Ahead(prompts, 2 * self.rows)
        active: dict[int, _Active] = {}
        try:
            yield from self._answer(source, active, write)
        finally:
            source.stop()
            for left in active.values():  # stopped in the middle
                self._remember(left)

    def _answer(
        self, source: Ahead, active: dict[int, _Active], write: Callable[[str], None] | None
    ) -> Iterator[tuple[Any, Answer | None, list[str]]]:
        while True:
            while len(active) < self.rows:
                prompt = source.next(wait=not active)
                if prompt is None:
                    break
                if not hasattr(prompt, "ids"):
                    yield prompt, None, []
                    continue
                place = next(i for i in range(self.rows) if i not in active)
                begun, answer = self._begin(place, prompt, write)
                if answer is not None:
                    self._end(place, begun)
                    yield prompt, answer, begun.origins[: len(answer.token_ids)]
                else:
                    active[place] = begun
            if not active:
                if source.over:
                    return
                continue
            start = time.perf_counter()
            before = self.stats.tokens
            done = self._round(active)
            seconds = time.perf_counter() - start
            self.stats.seconds += seconds
            self.pace.learn(self.stats.tokens - before, seconds)
            for place, answer in done.items():
                over = active.pop(place)
                self._end(place, over)
                yield over.row.prompt, answer, over.origins[: len(answer.token_ids)]

    def _begin(
        self, place: int, prompt: Any, write: Callable[[str], None] | None
    ) -> tuple[_Active, Answer | None]:
        row = Row(
            prompt,
            self.how,
            self.tokenizer,
            self.eos,
            context=self.context,
            write=write,
            before=self.target.start,
        )
        slots = row.limit + MOST_NODES + self.settings.window * self.settings.levels
        known, self.known = self.known, None
        if place or known is None or known[0] != prompt.adapter:
            known = (prompt.adapter, [])
        logits = self.target.begin(
            place,
            prompt.ids,
            slots=slots,
            adapter=prompt.adapter,
            known=agreement(known[1], prompt.ids),
        )
        self.stats.prompts += 1
        log = Phrases()
        log.extend(prompt.ids)
        found = _Active(row, list(prompt.ids), log)
        if self.settings.window and self.draft is None and self.target.trees:
            found.window = Window(self.settings.window, self.settings.levels, prompt.ids)
        token = row.choose(logits)
        answer = self._say(found, token, logits, "target")
        if answer is None and self.draft is not None:
            self.draft.begin(place, prompt.ids, slots=slots)
        return found, answer

    def _say(self, active: _Active, token: int, scores: Tensor, origin: str) -> Answer | None:
        active.said.append(token)
        active.log.extend([token])
        active.origins.append(origin)
        self.stats.tokens += 1
        return active.row.take(token, scores)

    def _end(self, place: int, active: _Active) -> None:
        """Let later prompts find what was said in this one."""
        if self.reuse and place == 0 and self.target.start is None:
            held = self.target.length(place)
            self.known = (active.row.prompt.adapter, active.said[:held])
        for bet in active.bets:
            bet.settle(active.row.made)
        self._remember(active)
        self.history.extend(active.said)
        self.history.end()
        self.history.trim()

    def _remember(self, active: _Active) -> None:
        """Note what was said; of a chat, whose prompts hold all that came before, the last turn."""
        if self.said is None:
            return
        if self.reuse and self.said and active.said[: self.asked] == self.said[-1][: self.asked]:
            self.said.pop()
        self.said.append(active.said)
        self.asked = len(active.said) - len(active.row.made)

    def _round(self, active: dict[int, _Active]) -> dict[int, Answer]:
        """Guess, verify in one forward, and keep what was right."""
        start = time.perf_counter()
        self._ask_draft(active)
        self.stats.draft_seconds += time.perf_counter() - start
        full = [self._tree(a) for a in active.values()]
        if self.settings.adaptive:
            trees = choose(full, self.costs, most=MOST_NODES)
        else:
            each = MOST_NODES // len(full)
            trees = [tree.kept(tree.best_first()[: each - 1]) for tree in full]
        for tree, one in zip(trees, active.values(), strict=True):
            ahead = len(one.said) + self.settings.window + self.settings.levels
            if self.context is not None and ahead > self.context:
                one.window = None  # it would read on behind what the model can read
            if one.window is not None:
                one.window.add(tree, 0)
        given = dict(zip(active, trees, strict=True))
        start = time.perf_counter()
        read = self._chosen(active, self.target.forward(given))
        seconds = time.perf_counter() - start
        count = sum(map(len, trees))
        self.stats.sizes[count] += 1
        if self.draft is not None:
            self.stats.drafted.update(
                len(a.drafted.tokens) if a.drafted else 0 for a in active.values()
            )
        if not self.target.recorded:
            self.costs.learn(count, seconds)
        self.stats.verify_seconds += seconds
        self.stats.target_forwards += 1
        self.stats.row_forwards += len(trees)
        self.stats.nodes += count
        before = self.stats.tokens
        done = {}
        for place, tree in given.items():
            answer = self._verify(place, active[place], tree, read[place])
            if answer is not None:
                done[place] = answer
        self.stats.rounds.append(self.stats.tokens - before)
        self.stats.steps_tokens += self.stats.tokens - before
        return done

    def _chosen(
        self, active: dict[int, _Active], logits: dict[int, Tensor]
    ) -> dict[int, tuple[Tensor, list[int], list[float]]]:
        """Return each row's logits, with the likeliest tokens and their scores if it is greedy.

        Logits stay on their device if nothing else is asked of them.
        """
        greedy = {p: own for p, own in logits.items() if not active[p].row.steps}
        found: dict[int, tuple[Tensor, list[int], list[float]]] = {}
        tokens: list[int] = []
        scores: list[float] = []
        if greedy:
            tokens, scores = likeliest(
                torch.cat([*greedy.values()]) if len(greedy) > 1 else next(iter(greedy.values()))
            )
        low = 0
        for place, own in logits.items():
            row = active[place].row
            held = own.cpu() if row.steps or row.how.logprobs is not None else own
            high = low + len(own) if place in greedy else low
            found[place] = (held, tokens[low:high], scores[low:high])
            low = high
        return found

    def _verify(
        self,
        place: int,
        active: _Active,
        tree: Tree,
        read: tuple[Tensor, list[int], list[float]],
    ) -> Answer | None:
        """Say what the target says, as far as it has read it already."""
        node, nodes = 0, [0]
        logits, greedy, best = read
        while True:
            scores = logits[node]
            if greedy:
                token = greedy[node]
                require_finite(best[node])
            else:
                token = active.row.choose(scores)
            below = tree.children[node].get(token)
            origin = "target" if below is None else tree.sources[below]
            answer = self._say(active, token, scores, origin)
            for child in tree.children[node].values():
                self.stats.verified[tree.sources[child]] += 1
                self.stats.depth_tried[tree.depths[child]] += child == below or below is None
            if below is None:
                break
            self.stats.accepted[tree.sources[below]] += 1
            self.stats.depth_right[tree.depths[below]] += 1
            if answer is not None:
                break
            node = below
            nodes.append(below)
        self.target.keep(place, nodes)
        self._settle(active, tree, nodes)
        if active.window is not None:
            said = greedy or likeliest(logits)[0]
            for phrase in active.window.learn(said, len(nodes)):
                self.harvested.extend(phrase)
                self.harvested.end()
        if greedy and self.settings.harvest:
            self._harvest(tree, nodes, greedy)
        return answer

    def _settle(self, active: _Active, tree: Tree, nodes: list[int]) -> None:
        made = active.row.made
        if active.drafted is not None and self.draft is not None:
            said = made[-len(nodes) :]
            tokens = active.drafted.tokens[: len(said)]
            right = next(
                (i for i, (a, b) in enumerate(zip(tokens, said, strict=False)) if a != b),
                len(tokens),
            )
            self.draft.learn(active.drafted, right, len(tokens))
            active.drafted = None
        left = []
        for bet in active.bets:
            if len(made) >= bet.start + len(bet.tokens):
                bet.settle(made)
            else:
                left.append(bet)
        active.bets = left

    def _harvest(self, tree: Tree, right: list[int], greedy: Sequence[int]) -> None:
        """Keep what the target said after guesses that were wrong: as phrases for later."""
        kept = set(right)
        for leaf in tree.leaves():
            path = [n for n in tree.path(leaf) if n not in kept]
            if not path or tree.sources[path[0]] == "window":
                continue
            for node, then in zip(path, [*path[1:], -1], strict=True):
                self.harvested.extend([tree.tokens[node]])
                if then < 0 or tree.tokens[then] != greedy[node]:
                    self.harvested.extend([greedy[node]])
                    self.harvested.end()
        self.harvested.trim()

    def _tree(self, active: _Active) -> Tree:
        """Return all guesses at what follows: the draft's, phrases after it, phrases instead."""
        tree = Tree.of(active.said[-1])
        most = min(active.row.left - 1, MOST_NODES - 1)
        if most < 1:
            return tree
        ends = [(0, active.said)]
        if active.drafted is not None and active.drafted.tokens:
            tokens = active.drafted.tokens[:most]
            nodes = tree.add(tokens, "draft", active.drafted.chances[: len(tokens)])
            ends.append((nodes[-1], [*active.said, *tokens]))
        for node, said in ends:
            self._look_up(active, tree, node, said, min(most - tree.depths[node], most))
        return tree

    def _look_up(self, active: _Active, tree: Tree, node: int, said: list[int], most: int) -> None:
        if most < 1 or self.settings.topk < 1:
            return
        for name, log in self._sources(active):
            for rank, (place, agree) in enumerate(log.find(said, self.settings.topk)):
                length = self.settings.phrase_length * (LONG if agree >= LONGEST else 1)
                tokens = log.phrase(place, min(length, most))
                first, then = self.experience.records(name, agree, rank)
                chances = [first.chance, *[then.chance] * (len(tokens) - 1)]
                if (tokens and self.target.trees) or not tree.children[node]:
                    tree.add(tokens, name, chances, node)
                if node == 0:  # further ones could be judged only where the draft was right
                    active.bets.append(Bet(len(active.row.made), tokens, first, then))

    def _sources(self, active: _Active) -> Iterator[tuple[str, Phrases]]:
        logs = (active.log, self.harvested, self.history)
        for name, log in zip(SOURCES, logs, strict=True):
            if name in self.settings.sources:
                yield name, log

    def _ask_draft(self, active: dict[int, _Active]) -> None:
        """Let the draft guess, as long as another token of it is worth its time."""
        draft, fixed = self.draft, self.settings.draft_length
        if draft is None or fixed == 0:
            return
        free = fixed is None and self.settings.adaptive
        if free and not self._draft_pays(active, draft.overall.chance):
            unread = sum(draft.unread(p, a.said) for p, a in active.items())
            since = self.stats.seconds - self.asked_at
            if draft.costs.of(unread) > PROBE * since or not self._draft_pays(active, 1.0):
                return
        rows = len(active)
        most = min(a.row.left - 1 for a in active.values())
        asked = {p: a for p, a in active.items() if a.row.left > 1}
        if most < 1 or not asked:
            return
        self.asked_at = self.stats.seconds
        step = draft.costs.of(rows)

        def more(count: int, chance: float) -> bool:
            if fixed is not None:
                return count < min(fixed, most)
            if count >= most or count >= MOST_NODES // rows - 1:
                return False
            rise = self.costs.of(rows * (count + 2)) - self.costs.of(rows * (count + 1))
            return rows * chance / (step + max(rise, 0.0)) > self._rate(rows)

        found = draft.guess(
            {p: a.said for p, a in asked.items()},
            {p: _chooser(a.row) for p, a in asked.items()},
            more,
            {p: [log for _, log in self._sources(a)] for p, a in asked.items()},
        )
        for place, drafted in found.items():
            asked[place].drafted = drafted

    def _rate(self, rows: int) -> float:
        """Return the tokens a second that another guess has to beat: the most known to be possible.

        Of a ratio of sums, as tokens to seconds over many rounds, what raises it is what has a
        better ratio by itself.
        """
        return max(rows / self.costs.of(rows), self.pace.tokens / max(self.pace.seconds, 1e-9))

    def _draft_pays(self, active: dict[int, _Active], chance: float) -> bool:
        """Tell whether any number of draft tokens is expected to be quicker than none.

        Each is right with `chance`, if those before it were. A prompt that the draft hasn't read
        has to be worth reading for what is left of the answers.
        """
        draft, rows = self.draft, len(active)
        assert draft is not None  # the caller has one
        if not draft.costs.seconds or not self.costs.seconds:
            return True
        step = draft.costs.of(rows)
        new = sum(draft.unread(p, a.said) for p, a in active.items() if p in draft.waiting)
        left = max(a.row.left for a in active.values())
        once = draft.costs.of(new) / max(left, 1) if new else 0.0
        expected, alone = 1.0, self.costs.of(rows)
        for count in range(1, 17):
            expected += chance**count
            if (self.costs.of(rows * (count + 1)) + count * step) / expected + once < alone:
                return True
        return False


def _chooser(row: Row) -> Chooser | None:
    """Return how a draft chooses, as its target would: with the noise that will be drawn there.

    Where both models' distributions are alike, the same noise makes them choose the same token.
    """
    if not row.steps:
        return None

    def pick(scores: Tensor, drafted: Sequence[int]) -> int:
        seen = torch.tensor([[*row.before, *row.made, *drafted]])
        return int(row.steps(seen, scores[None].clone())[0].argmax())

    return pick
