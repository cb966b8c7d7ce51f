"""Which layer gets how many bits, so that what all lose together is least."""

from __future__ import annotations

import heapq
from collections.abc import Mapping


def allocate(
    costs: Mapping[str, Mapping[int, float]], weights: Mapping[str, int], average: float
) -> dict[str, int]:
    """Return the bits of each layer, at most `average` a weight over all.

    `costs[layer][bits]` is what a layer loses at so many bits, `weights[layer]` how many weights it
    has. Layers begin with the fewest bits; one after the other gets more, where that takes away the
    most for a bit of storage, several sizes at once if the next one alone doesn't pay. Raises
    ValueError if `average` is less than the fewest bits.
    """
    found = {layer: min(known) for layer, known in costs.items()}
    left = average * sum(weights.values()) - sum(found[n] * weights[n] for n in found)
    if left < -1e-6:
        raise ValueError(f"{average} bits are fewer than the fewest that a layer may have")
    heap: list[tuple[float, str, int, int]] = []

    def offer(layer: str) -> None:
        now = found[layer]
        best = None
        for bits, cost in costs[layer].items():
            if bits > now:
                gain = (costs[layer][now] - cost) / ((bits - now) * weights[layer])
                if best is None or gain > best[0]:
                    best = gain, bits
        if best is not None and best[0] > 0:
            heapq.heappush(heap, (-best[0], layer, now, best[1]))

    for layer in costs:
        offer(layer)
    while heap:
        _, layer, before, bits = heapq.heappop(heap)
        if found[layer] != before:
            continue
        extra = (bits - before) * weights[layer]
        if extra > left + 1e-6:  # a smaller step may still have room
            steps = [b for b in sorted(costs[layer]) if before < b < bits]
            room = [b for b in steps if (b - before) * weights[layer] <= left + 1e-6]
            if not room or costs[layer][room[-1]] >= costs[layer][before]:
                continue
            bits = room[-1]
            extra = (bits - before) * weights[layer]
        found[layer] = bits
        left -= extra
        offer(layer)
    return found
