"""Models that verify: forwards of a tree of guesses, and keeping what was right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from bmkit.deltas import plugged
from bmkit.errors import ResourceError
from bmkit.runtime.cpu.decoder import Cache, Decoder
from bmkit.runtime.speculation.tree import Tree


class Target(Protocol):
    """A model with a cache for several prompts, each at a place of its own."""

    trees: bool
    """Whether a guess may have two continuations; else only chains are verified."""
    vocabulary: int
    said: Tensor | None
    """The tokens that logits are of, ascending; None: all of the vocabulary."""
    start: list[int] | None
    """What an answer begins with, where that is not the prompt: of an encoder-decoder."""
    recorded: bool
    """Whether the last forward was the first of its kind, which takes longer than others."""

    def begin(
        self, place: int, ids: Sequence[int], *, slots: int, adapter: str | None, known: int = 0
    ) -> Tensor:
        """Read a prompt; return the logits [vocabulary] of what follows.

        `slots` is how many tokens may come, guesses included. The first `known` of `ids`, not all,
        are what the place holds already.
        """

    def forward(self, trees: Mapping[int, Tree]) -> dict[int, Tensor]:
        """Read trees, each after what its place holds; return logits [nodes, vocabulary] of each.

        Nothing is kept until `keep` is called.
        """

    def keep(self, place: int, nodes: Sequence[int]) -> None:
        """Keep nodes of the tree that was read last, in order, each the child of the one before."""

    def length(self, place: int) -> int:
        """Return how many tokens a place holds."""

    def cut(self, place: int, length: int) -> None:
        """Forget all tokens of a place from `length` on."""


class DecoderTarget:
    """The fused decoder on the CPU."""

    trees = True
    start: list[int] | None = None
    recorded = False

    def __init__(self, decoder: Decoder, rows: int, most: int | None = None) -> None:
        self.decoder, self.rows, self.most = decoder, rows, most
        self.vocabulary = int(decoder.config.vocab_size)
        self.said = None if decoder.said is None else torch.tensor(list(decoder.said))
        self.least = 0
        """Tokens a row that room is made for at first."""
        self.cache: Cache | None = None
        self.adapters: dict[int, str | None] = {}

    def begin(
        self, place: int, ids: Sequence[int], *, slots: int, adapter: str | None, known: int = 0
    ) -> Tensor:
        """Read a prompt; see `Target`."""
        cache = self.cache = self._room(len(ids) + slots)
        cache.done[place] = known
        self.adapters[place] = adapter
        self.decoder.choose(adapter)
        return torch.from_numpy(self.decoder.chain(cache, place, ids[known:])[0])

    def _room(self, slots: int) -> Cache:
        old = self.cache
        if old is not None and old.slots >= slots:
            return old
        if self.most is not None:
            if slots > self.most:
                raise ResourceError(
                    f"--cpu-memory was planned for {self.most} tokens a row, this one has {slots}",
                    hint="lower --max-new-tokens, or run without the budget",
                )
            slots = self.most  # so that it never grows: two caches at once would be too much
        slots = max(slots, self.least)
        larger = self.decoder.cache(self.rows, -(-slots // 64) * 64)
        if old is not None:
            larger.keys[:, :, :, : old.slots] = old.keys
            larger.values[:, :, :, : old.slots] = old.values
            larger.done[:] = old.done
        return larger

    def forward(self, trees: Mapping[int, Tree]) -> dict[int, Tensor]:
        """Read trees; see `Target`. Those of one adapter go together."""
        assert self.cache is not None  # `begin` was called
        needed = max(self.length(p) + len(tree) for p, tree in trees.items())
        self.cache = self._room(needed)  # a draft may have more to read than was planned for
        found: dict[int, Tensor] = {}
        for adapter in dict.fromkeys(self.adapters[p] for p in trees):
            places = [p for p in trees if self.adapters[p] == adapter]
            self.decoder.choose(adapter)
            count = sum(len(trees[p]) for p in places)
            sees = np.zeros((count, count), np.bool_)
            tokens: list[int] = []
            sequences: list[int] = []
            depths: list[int] = []
            for place in places:
                tree, low = trees[place], len(tokens)
                sees[low : low + len(tree), low : low + len(tree)] = tree.sees()
                tokens += tree.tokens
                depths += tree.depths
                sequences += [place] * len(tree)
            logits = self.decoder.step(self.cache, tokens, sequences, depth=depths, sees=sees)
            copied = torch.from_numpy(logits).clone() if len(trees) > len(places) else None
            whole = torch.from_numpy(logits) if copied is None else copied
            low = 0
            for place in places:
                found[place] = whole[low : low + len(trees[place])]
                low += len(trees[place])
        return found

    def keep(self, place: int, nodes: Sequence[int]) -> None:
        """Move what nodes have left in the cache to where it belongs."""
        cache = self.cache
        assert cache is not None  # as above
        done = int(cache.done[place])
        wanted = list(nodes)
        if wanted != list(range(len(wanted))):
            slots = [done + n for n in wanted]
            low, high = done, done + len(wanted)
            cache.keys[:, place, :, low:high] = cache.keys[:, place][:, :, slots]
            cache.values[:, place, :, low:high] = cache.values[:, place][:, :, slots]
        cache.done[place] = done + len(wanted)

    def length(self, place: int) -> int:
        """Return how many tokens a place holds."""
        return 0 if self.cache is None else int(self.cache.done[place])

    def cut(self, place: int, length: int) -> None:
        """Forget all tokens of a place from `length` on."""
        assert self.cache is not None and length <= self.cache.done[place]
        self.cache.done[place] = length


CHECKED = -1
"""The place at which a model is tried out."""


class ModelTarget:
    """Any decoder of transformers, in its own code: masks and positions say what a guess sees.

    Raises ResourceError if the model's cache can't be cut back, as that of a state-space model.
    """

    recorded = False

    def __init__(self, model: Any, *, chunk: int | None = None) -> None:
        self.model, self.chunk = model, chunk
        self.config = model.config.get_text_config()
        self.vocabulary = int(self.config.vocab_size)
        self.said: Tensor | None = None
        self.device = model.device
        self.caches: dict[int, Any] = {}
        self.read: dict[int, int] = {}  # nodes of the tree that a place has read last
        self.encoded: dict[int, Any] = {}
        self.adapters: dict[int, str | None] = {}
        if getattr(model, "_is_stateful", False):
            raise ResourceError(
                f"{type(model).__name__} keeps one state of all that it has read: guesses can't be "
                "taken back",
                hint="`bmkit infer` runs it",
            )
        self.windows = _windows(self.config)
        self.encoder_decoder = bool(model.config.is_encoder_decoder)
        self.trees = not self.encoder_decoder
        self.start: list[int] | None = None
        if self.encoder_decoder:
            first = model.generation_config.decoder_start_token_id
            self.start = [model.config.pad_token_id or 0 if first is None else first]

    @torch.inference_mode()
    def check(self) -> bool:
        """Tell whether the model reads trees as it reads their branches one by one.

        If it doesn't, chains are verified from now on. Raises ResourceError if those can't be
        either: then nothing can be verified without changing answers.
        """
        if self.encoder_decoder:
            return False
        top = max(self.vocabulary - 1, 1)
        prefix = [1 + (7 * i) % top for i in range(9)]
        branches = [[2 % top, 5 % top, 3 % top], [4 % top, 6 % top]]
        wanted = []
        for branch in branches:
            whole = torch.tensor([[*prefix, *branch]], device=self.device)
            with self._adapter(CHECKED):
                logits = self.model(input_ids=whole, use_cache=False).logits[0]
            wanted.append(logits[-len(branch) - 1 :].float().cpu())
        for trees in (True, False):
            self.trees = trees
            if self._reads(prefix, branches if trees else branches[:1], wanted):
                return trees
        raise ResourceError(
            f"{type(self.model).__name__} reads several tokens at a time otherwise than one by "
            "one: guesses can't be verified",
            hint="`bmkit infer` runs it",
        )

    def _reads(
        self, prefix: list[int], branches: list[list[int]], wanted: Sequence[Tensor]
    ) -> bool:
        """Tell whether a tree of `branches` gives the logits that are wanted of each."""
        self.adapters[CHECKED] = None
        try:
            self.begin(CHECKED, prefix[:-1], slots=16, adapter=None)
            tree = Tree.of(prefix[-1])
            nodes = [tree.add(branch, "", [1.0] * len(branch)) for branch in branches]
            found = self.forward({CHECKED: tree})[CHECKED].cpu()
        except torch.OutOfMemoryError:
            raise  # it says nothing about the model
        except (ValueError, RuntimeError, IndexError, TypeError):
            return False  # the model's own code can't take such a mask
        finally:
            self.caches.pop(CHECKED, None)
        limit = 1e-3 if self.model.dtype == torch.float32 else 0.1
        for path, right in zip(nodes, wanted, strict=False):
            difference = (found[[0, *path]] - right).abs().max()
            if not difference <= limit * right.abs().max():
                return False
        return True

    @torch.inference_mode()
    def begin(
        self, place: int, ids: Sequence[int], *, slots: int, adapter: str | None, known: int = 0
    ) -> Tensor:
        """Read a prompt; see `Target`. An encoder-decoder begins its answer with a start token."""
        from transformers import DynamicCache, EncoderDecoderCache

        self.adapters[place] = adapter
        if self.encoder_decoder:
            given = torch.tensor([list(ids)], device=self.device)
            self.caches[place] = EncoderDecoderCache(DynamicCache(), DynamicCache())
            with self._adapter(place):
                self.encoded[place] = self.model.get_encoder()(input_ids=given)
            start = torch.tensor([self.start], device=self.device)
            return self._read(place, start, None, None)[-1]
        if known:
            self.cut(place, known)
        else:
            self.caches[place] = DynamicCache()
        given = torch.tensor([list(ids[known:])], device=self.device)
        size = self.chunk or given.shape[1]
        logits = None
        for low in range(0, given.shape[1], size):
            part = given[:, low : low + size]
            tree = Tree.of(int(part[0, 0]))
            if part.shape[1] > 1:
                tree.add(part[0, 1:].tolist(), "", [1.0] * (part.shape[1] - 1))
            logits = self._tree(place, tree)
        assert logits is not None  # prompts are not empty
        return logits[-1]

    def _adapter(self, place: int) -> Any:

        return plugged.only(self.model, self.adapters.get(place))

    def _read(self, place: int, ids: Tensor, mask: Any, positions: Tensor | None) -> Tensor:
        options: dict[str, Any] = {"past_key_values": self.caches[place], "use_cache": True}
        if self.encoder_decoder:
            options |= {"decoder_input_ids": ids, "encoder_outputs": self.encoded[place]}
        else:
            options |= {"input_ids": ids}
            if mask is not None:
                options["attention_mask"] = mask
            if positions is not None:
                options["position_ids"] = positions
        with self._adapter(place):
            logits: Tensor = self.model(**options).logits[0]
        return logits.float().cpu()

    def _tree(self, place: int, tree: Tree) -> Tensor:
        held = self.length(place)
        ids = torch.tensor([tree.tokens], device=self.device)
        if not self.trees or (tree.is_chain and not self.windows):
            return self._read(place, ids, None, None)
        depths = torch.tensor(tree.depths)
        positions = held + depths
        sees = torch.from_numpy(tree.sees())
        masks = {}
        dtype = next(self.model.parameters()).dtype
        if not dtype.is_floating_point:
            dtype = torch.float32
        for kind, window in (self.windows or {"full_attention": None}).items():
            whole = torch.cat((torch.ones(len(tree), held, dtype=torch.bool), sees), 1)
            if window is not None:
                columns = torch.cat((torch.arange(held), positions))
                whole &= positions[:, None] - columns[None] < window
            low = torch.finfo(dtype).min
            masks[kind] = torch.where(whole, 0.0, low).to(dtype)[None, None].to(self.device)
        mask = masks if len(masks) > 1 else next(iter(masks.values()))
        return self._read(place, ids, mask, positions[None].to(self.device))

    @torch.inference_mode()
    def forward(self, trees: Mapping[int, Tree]) -> dict[int, Tensor]:
        """Read trees, one after the other; see `Target`."""
        self.read = {place: len(tree) for place, tree in trees.items()}
        return {place: self._tree(place, tree) for place, tree in trees.items()}

    def keep(self, place: int, nodes: Sequence[int]) -> None:
        """Keep nodes of the tree that was read last: its keys and values stand at the end."""
        cache = self.caches[place]
        own = cache.self_attention_cache if self.encoder_decoder else cache
        wanted = list(nodes)
        read = self.read[place]
        held = own.get_seq_length() - read
        if wanted == list(range(len(wanted))):
            if len(wanted) < read:
                own.crop(len(wanted) - read)
            return
        index = torch.tensor([held + n for n in wanted])
        for layer in own.layers:
            index = index.to(layer.keys.device)
            for name in ("keys", "values"):
                whole = getattr(layer, name)
                kept = torch.cat((whole[:, :, :held], whole.index_select(2, index)), 2)
                setattr(layer, name, kept)

    def length(self, place: int) -> int:
        """Return how many tokens a place holds."""
        cache = self.caches.get(place)
        return 0 if cache is None else int(cache.get_seq_length())

    def cut(self, place: int, length: int) -> None:
        """Forget all tokens of a place from `length` on."""
        more = self.length(place) - length
        if more > 0:
            self.caches[place].crop(-more)


def _windows(config: Any) -> dict[str, int | None]:
    """Return the window of each kind of layer, if a model has layers that don't see everything."""
    window = getattr(config, "sliding_window", None)
    if not window or not getattr(config, "use_sliding_window", True):
        return {}
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return {"sliding_attention": int(window)}
    found: dict[str, int | None] = {}
    for kind in kinds:
        found[kind] = int(window) if kind == "sliding_attention" else None
    return found if any(found.values()) else {}
