"""A decoder with room of a fixed size for keys and values: its forwards are CUDA graphs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from bmkit.deltas import plugged
from bmkit.errors import ResourceError
from bmkit.runtime.speculation.targets import ModelTarget
from bmkit.runtime.speculation.tree import Tree

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192)
"""Tokens of a forward that is recorded; fewer are filled up to the next of them."""
STEP = 256
"""Room grows by so many tokens a row."""
SPARE = 8
"""Places behind all rows: tokens that fill up are written to the first; masks are aligned."""
CHUNK = 512
"""Tokens of a prompt that are read at once."""


class Recorder(Protocol):
    """Takes what computes on tensors at fixed addresses; returns what does so again."""

    def __call__(self, compute: Callable[[], None]) -> Callable[[], None]:
        """Record."""

    def renew(self) -> None:
        """Forget what was recorded: nobody will compute it again."""


def suits(model: Any) -> bool:
    """Tell whether all that a token's keys and values depend on is what it sees, and its place.

    Then several rows, and parts of a prompt, may be read together in any order. It isn't so where
    rotary frequencies follow the longest text that is read (dynamic and longrope scaling), where
    attention goes by the cache's length, and where a state is kept.
    """
    config = model.config.get_text_config()
    if getattr(model, "_is_stateful", False) or model.config.is_encoder_decoder:
        return False
    if getattr(config, "attn_temperature_tuning", None):
        return False
    kinds = getattr(config, "layer_types", None) or []
    if not set(kinds) <= {"full_attention", "sliding_attention"}:
        return False
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    every = [rope, *(v for v in rope.values() if isinstance(v, dict))]
    return not any(r.get("rope_type", r.get("type")) in {"dynamic", "longrope"} for r in every)


class StaticTarget(ModelTarget):
    """Any decoder of transformers that takes masks: several rows and all their guesses at once.

    Keys and values of all rows stand one after the other in one sequence; each token's mask, which
    is made on the device, says what it sees of it. So a forward depends on its number of tokens
    alone: it is recorded once for each of SIZES, and what changes is sent in one piece. Logits stay
    on the device.
    """

    def __init__(self, model: Any, rows: int, *, record: Recorder | None = None) -> None:
        super().__init__(model)
        self.rows = rows
        self.record = record or (Graphs(self.device) if self.device.type == "cuda" else Again())
        self.held: dict[int, int] = {}
        self.slots = 0
        self.groups: dict[tuple[int, ...], Tensor] = {}
        """Keys and values [layers, heads, slots of all rows, width], by heads and width."""
        self.shapes: list[tuple[int, int]] = []
        """Heads and width of each layer's keys and values, in turns."""
        self.cache: Any = None
        self.passes: dict[tuple[int, str | None], _Pass] = {}
        self.dtype = next(self.model.parameters()).dtype
        names = inspect.signature(getattr(model, "get_base_model", lambda: model)().forward)
        self.keeps = "logits_to_keep" in names.parameters

    def check(self) -> bool:
        """Tell whether the model reads trees so as it reads their branches one by one."""
        try:
            return super().check()
        except ResourceError:
            return False

    @torch.inference_mode()
    def begin(
        self, place: int, ids: Sequence[int], *, slots: int, adapter: str | None, known: int = 0
    ) -> Tensor:
        """Read a prompt; see `Target`."""
        self.adapters[place] = adapter
        self._room(len(ids) + min(slots, STEP))  # it grows, as answers do
        self.held[place] = known
        logits = None
        for low in range(known, len(ids), CHUNK):
            part = ids[low : low + CHUNK]
            count = len(part)
            run = _Pass(count, self.rows, self.device, self.keeps)
            sees = np.tril(np.ones((count, count), np.bool_))
            self._fill(run, {place: (part, range(count), sees)})
            run.given.copy_(run.host)
            self._compute(run, adapter)
            self.held[place] += count
            assert run.logits is not None  # it was computed
            logits = run.logits[-1]
        assert logits is not None  # prompts are not empty
        return logits.cpu()

    @torch.inference_mode()
    def forward(self, trees: Mapping[int, Tree]) -> dict[int, Tensor]:
        """Read trees; see `Target`. Those of one adapter go together."""
        self._room(max(self.length(p) + len(tree) for p, tree in trees.items()))
        found: dict[int, Tensor] = {}
        self.recorded = False
        for adapter in dict.fromkeys(self.adapters[p] for p in trees):
            places = [p for p in trees if self.adapters[p] == adapter]
            count = sum(len(trees[p]) for p in places)
            size = next((s for s in SIZES if s >= count), count)
            run = self.passes.get((size, adapter))
            new = run is None
            run = run or _Pass(size, self.rows, self.device)
            self._fill(
                run, {p: (trees[p].tokens, trees[p].depths, trees[p].sees()) for p in places}
            )
            run.given.copy_(run.host, non_blocking=True)
            if new and size in SIZES:
                run.again = self.record(partial(self._compute, run, adapter))
                self.passes[size, adapter] = run
                self.recorded = True
            if run.again is not None:
                run.again()
            else:
                self._compute(run, adapter)
            assert run.logits is not None  # it was computed
            # What another adapter's forward works in may lie where these logits are.
            logits = run.logits.clone() if len(places) < len(trees) else run.logits
            low = 0
            for place in places:
                found[place] = logits[low : low + len(trees[place])]
                low += len(trees[place])
        return found

    @torch.inference_mode()
    def keep(self, place: int, nodes: Sequence[int]) -> None:
        """Move what nodes have left behind the row's tokens to where it belongs."""
        wanted = list(nodes)
        if wanted != list(range(len(wanted))):
            first = self._first(place) + self.length(place)
            moved = torch.tensor([wanted, range(len(wanted))]).to(self.device) + first
            for whole in self.groups.values():
                whole.index_copy_(2, moved[1], whole.index_select(2, moved[0]))
        self.held[place] += len(wanted)

    def length(self, place: int) -> int:
        """Return how many tokens a place holds."""
        return self.held.get(place, 0)

    def cut(self, place: int, length: int) -> None:
        """Forget all tokens of a place from `length` on."""
        assert length <= self.held[place]
        self.held[place] = length

    def _first(self, place: int) -> int:
        return place % self.rows * self.slots

    def _room(self, slots: int) -> None:
        """Make room for so many tokens a row; what is there is kept."""
        if slots <= self.slots:
            return
        shapes = self.shapes or self._shapes()
        old, before = self.groups, self.slots
        slots = max(slots, before * 3 // 2)
        self.shapes, self.slots = shapes, -(-slots // STEP) * STEP
        total = self.rows * self.slots + SPARE
        self.groups = {
            shape: torch.zeros(
                shapes.count(shape), shape[0], total, shape[1], dtype=self.dtype, device=self.device
            )
            for shape in dict.fromkeys(shapes)
        }
        for shape, whole in old.items():
            for row in range(self.rows):
                new = self.groups[shape][:, :, row * self.slots :][:, :, :before]
                new.copy_(whole[:, :, row * before :][:, :, :before])
        taken = dict.fromkeys(self.groups, 0)
        layers = []
        for kinds in zip(shapes[::2], shapes[1::2], strict=True):
            views = []
            for shape in kinds:
                views.append(self.groups[shape][taken[shape]][None])
                taken[shape] += 1
            layers.append(_Layer(*views))
        self.cache = Cache(layers=layers)
        self.passes.clear()
        self.record.renew()
        rows = torch.arange(self.rows, device=self.device).repeat_interleave(self.slots)
        places = torch.arange(self.slots, device=self.device).repeat(self.rows)
        fill = torch.zeros(SPARE, dtype=torch.int64, device=self.device)
        self.owner = torch.cat((rows, fill + self.rows))
        self.column = torch.cat((places, fill))

    def _shapes(self) -> list[tuple[int, int]]:
        """Return heads and width of each layer's keys and values, in turns.

        Raises RuntimeError for models whose layers keep something else.
        """
        cache = DynamicCache()
        ids = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        with self._adapter(0):
            self.model(input_ids=ids, past_key_values=cache, use_cache=True)
        found = []
        for layer in cache.layers:
            for kept in (getattr(layer, "keys", None), getattr(layer, "values", None)):
                if kept is None or kept.ndim != 4 or kept.shape[2] != 1:
                    raise RuntimeError(f"{type(layer).__name__} keeps no keys and values")
                found.append((kept.shape[1], kept.shape[3]))
        return found

    def _fill(
        self, run: _Pass, parts: Mapping[int, tuple[Sequence[int], Sequence[int], np.ndarray]]
    ) -> None:
        """Write tokens, depths and what each sees, by place, to where they are sent from."""
        size, given = run.size, run.parts(run.host.numpy())
        given["ids"][:] = given["positions"][:] = 0
        given["slots"][:] = self.rows * self.slots
        given["place"][:] = self.rows
        given["held"][:] = 0
        given["sees"][:] = 0
        low = 0
        for place, (tokens, depths, sees) in parts.items():
            high, held = low + len(tokens), self.length(place)
            given["ids"][low:high] = tokens
            given["positions"][low:high] = np.asarray(depths) + held
            given["slots"][low:high] = self._first(place) + held + np.arange(len(tokens))
            given["place"][low:high] = place % self.rows
            given["held"][place % self.rows] = held
            given["sees"].reshape(size, size)[low:high, low:high] = sees
            low = high

    def _compute(self, run: _Pass, adapter: str | None) -> None:
        """Read what was sent, at fixed addresses: nothing here may wait for the device."""
        given = run.parts(run.given)
        place, slots, positions = given["place"], given["slots"], given["positions"]
        seen = self.owner[None] == place[:, None]
        seen &= self.column[None] < given["held"][place][:, None]
        seen[:, slots] = given["sees"].view(run.size, run.size).bool()
        seen[:, -SPARE] = place == self.rows  # what fills up sees itself, and nobody sees it
        where = self.column.clone()
        where[slots] = positions
        low = torch.finfo(self.dtype).min
        masks = {}
        for kind, window in (self.windows or {"full_attention": None}).items():
            whole = seen if window is None else seen & (positions[:, None] - where[None] < window)
            mask = torch.zeros(whole.shape, dtype=self.dtype, device=self.device)
            masks[kind] = mask.masked_fill(~whole, low)[None, None]
        for layer in self.cache.layers:
            layer.slots = slots

        with plugged.only(self.model, adapter):
            logits = self.model(
                input_ids=given["ids"][None],
                attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
                position_ids=positions[None],
                past_key_values=self.cache,
                use_cache=True,
                **({"logits_to_keep": 1} if run.last else {}),
            ).logits[0]
        run.logits = logits.float()


class _Pass:
    """A forward of `size` tokens: what is sent, what it computes on, what it leaves."""

    def __init__(self, size: int, rows: int, device: torch.device, last: bool = False) -> None:
        self.size, self.rows, self.last = size, rows, last
        count = sum(self._lengths())
        pin = device.type == "cuda"
        self.host = torch.zeros(count, dtype=torch.int64, pin_memory=pin)
        self.given = torch.zeros(count, dtype=torch.int64, device=device)
        self.again: Callable[[], None] | None = None
        self.logits: Tensor | None = None

    def _lengths(self) -> tuple[int, ...]:
        size = self.size
        return (size, size, size, size, self.rows + 1, size * size)

    def parts(self, whole: Any) -> dict[str, Any]:
        """Return the views of what is sent, by name."""
        found, low = {}, 0
        names = ("ids", "positions", "slots", "place", "held", "sees")
        for name, length in zip(names, self._lengths(), strict=True):
            found[name] = whole[low : low + length]
            low += length
        return found


class _Layer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values [1, heads, slots, width] of a layer; what is new goes to `slots`."""

    is_sliding = False
    slots: Tensor

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: it is there."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write what is new, and return all."""
        if self.dtype == torch.float16:  # an overflow in a wrong guess would be seen by all
            key_states, value_states = key_states.nan_to_num(), value_states.nan_to_num()
        self.keys.index_copy_(2, self.slots, key_states.to(self.dtype))
        self.values.index_copy_(2, self.slots, value_states.to(self.dtype))
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the width of a mask, and where it begins."""
        return self.keys.shape[2], 0

    def get_seq_length(self) -> int:
        """Return nothing that counts: positions are given."""
        return 0

    def get_max_length(self) -> int:
        """Return the room."""
        return int(self.keys.shape[2])


class Again:
    """Records nothing: computes again, as on a CPU."""

    def __call__(self, compute: Callable[[], None]) -> Callable[[], None]:
        """Return what computes."""
        return compute

    def renew(self) -> None:
        """Do nothing."""


class Graphs:
    """Captures CUDA graphs, which share their memory and are captured on one stream of their own.

    What waits for the device can't be captured: from then on all is computed as it is.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.works = True
        self.renew()

    def renew(self) -> None:
        """Take other memory: that of graphs that are gone is given back with them."""
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, compute: Callable[[], None]) -> Callable[[], None]:
        """Capture, if that can be done."""
        with torch.cuda.device(self.device):
            graph = self._capture(compute) if self.works else None
        if graph is None:
            self.works = False
            return compute

        def replay() -> None:
            with torch.cuda.device(self.device):
                graph.replay()

        return replay

    def _capture(self, compute: Callable[[], None]) -> Any:
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        strict = torch.cuda.get_sync_debug_mode()
        try:
            with torch.cuda.stream(self.stream):
                compute()  # libraries make their workspaces
                torch.cuda.set_sync_debug_mode("error")
                compute()  # raises if it waits for the device
                torch.cuda.set_sync_debug_mode(strict)
            current.wait_stream(self.stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(
                graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
            ):
                compute()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            return None
        finally:
            torch.cuda.set_sync_debug_mode(strict)
            torch.cuda.set_stream(current)
        return graph
