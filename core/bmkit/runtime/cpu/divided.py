"""Feed-forwards that are divided into experts, as the fused decoder runs them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from torch import Tensor

from bmkit.runtime.cpu import block as kernels
from bmkit.runtime.cpu import experts as compiled
from bmkit.runtime.cpu.pack import Layout, empty_slab, lay_out, pack_floats, round_up
from bmkit.runtime.cpu.turned import Turned
from bmkit.runtime.experts import Experts, Router, chosen_mask


class _Block:
    """The router of one block, packed, and the numbers of its experts."""

    def __init__(self, router: Router, numbers: Sequence[int]) -> None:
        self.router = router
        self.numbers = np.array(numbers, np.int64)
        first = None
        if router.inner_weight is not None:
            first = pack_floats(router.inner_weight, router.inner_bias)
        layers = [first, pack_floats(router.weight, router.bias)]
        layout = lay_out([layer.shape if layer else None for layer in layers])
        self.table, self.slab = layout.table, empty_slab(layout.bytes)
        for row, layer in enumerate(layers):
            if layer is not None:
                layout.write(self.slab, row, layer)
        self.between = round_up(len(router.inner_weight)) if router.inner_weight is not None else 0


class Divided:
    """The blocks of a model whose tokens compute only the neurons that they choose.

    Routers are float32, and always in memory.
    """

    def __init__(self, experts: Experts, activation: int) -> None:
        self.experts = experts
        self.blocks: dict[int, _Block] = {}
        for i, (router, count) in enumerate(zip(experts.routers, experts.chosen, strict=True)):
            if router is not None:
                self.blocks[i] = _Block(router, (experts.size, experts.shared, count, activation))

    def __contains__(self, block: object) -> bool:
        """Tell whether a block is divided."""
        return block in self.blocks

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Let every token choose all experts for a while: that is what the dense model computes."""
        before = {i: each.numbers for i, each in self.blocks.items()}
        for each in self.blocks.values():
            each.numbers = each.numbers.copy()
            each.numbers[compiled.E_CHOSEN] = each.router.experts
        try:
            yield
        finally:
            for i, numbers in before.items():
                self.blocks[i].numbers = numbers

    def mask(self, block: int, x: Tensor) -> Tensor:
        """Return which neurons of a block are computed: bool [tokens, neurons]; `x` goes in."""
        each = self.blocks[block]
        return chosen_mask(
            each.router,
            x,
            chosen=int(each.numbers[compiled.E_CHOSEN]),
            shared=self.experts.shared,
            size=self.experts.size,
        )

    def shapes(self, block: int, tokens: int, width: int) -> list[tuple[int, ...]]:
        """Return the shapes of the scratch of `feed_forward`; `width` is the padded hidden size."""
        each = self.blocks[block]
        experts = self.experts.shared + each.router.experts
        return [
            (tokens, each.between),
            (tokens, experts),
            (experts,),
            (tokens, experts),
            (experts,),
            (2, tokens, width),
        ]

    def feed_forward(
        self,
        block: int,
        h: np.ndarray,
        slab: np.ndarray,
        layout: Layout,
        x: np.ndarray,
        inner: np.ndarray,
        space: Sequence[np.ndarray],
        delta: tuple[np.ndarray, np.ndarray, np.ndarray],
        running: int,
    ) -> None:
        """Add to `h` what the feed-forward of a block gives for `x`, on `running` threads.

        `space` are arrays of `shapes`; `delta` are slab, table and scratch of a low-rank update.
        """
        each = self.blocks[block]
        between, scores, keys, chosen, ids, sums = space
        compiled.feed_forward(
            kernels.ADDRESS,
            h,
            slab,
            layout.table,
            int(isinstance(layout.shapes[kernels.DOWN], Turned)),
            each.numbers,
            each.slab,
            each.table,
            x,
            inner,
            between,
            scores,
            keys.view(np.int32),
            chosen.view(np.int32),
            ids.view(np.int32),
            sums,
            *delta,
            running,
        )
