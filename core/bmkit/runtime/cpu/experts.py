"""The feed-forward of a block that is divided into experts: each token computes those it chooses.

An expert is a slice of neurons: rows of gate and up, and rows of down where that is turned. Only
these rows are read, and each sum goes over a token's own neurons in ascending order. So a token's
numbers are the same bits alone and beside others, whatever they choose.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import float32, njit, prange

from bmkit.runtime.cpu import KEPT
from bmkit.runtime.cpu.block import (
    DOWN,
    GATE,
    M_BIAS,
    M_GROUP,
    M_KIND,
    M_ROW_BYTES,
    M_ROWS,
    M_SCALE_BYTES,
    M_SCALES,
    M_WEIGHTS,
    M_WIDTH,
    UP,
    activate,
    exp,
    grow,
    shrink,
)
from bmkit.runtime.cpu.dots import (
    INT4,
    INT4_ZERO,
    INT8,
    INT8_ZERO,
    call_rows,
    call_rows_then,
    float_of_bits,
    spread_1,
    spread_8,
)

E_SIZE, E_SHARED, E_CHOSEN, E_ACTIVATION = range(4)
"""The numbers of a divided feed-forward: neurons an expert, experts that are always computed, how
many of the others a token chooses, and the activation."""
R_IN, R_OUT = range(2)
"""The matrices of a router, in the order of its table; the first is missing in one of one layer."""

_serial = {"fastmath": True, "nogil": True, "cache": KEPT}
_parallel = {**_serial, "parallel": True}
_TOP = np.uint32(1 << 31)


@njit(**_serial)
def choose(scores: Any, count: int, keys: Any, chosen: Any) -> None:
    """Mark the `count` highest of `scores` [experts] in `chosen` [experts].

    Of equal ones the first are taken. `keys` is scratch, int32 [experts].
    """
    experts = len(chosen)
    bits = scores.view(np.int32)
    for i in range(experts):  # whole numbers in the same order: no sum can round them
        b = bits[i]
        if b == np.int32(-2147483648):  # -0
            b = np.int32(0)
        keys[i] = b if b >= 0 else b ^ np.int32(0x7FFFFFFF)
    # The key of the last one that is chosen, bit by bit.
    bound = np.int64(-(2**31))
    for bit in range(31, -1, -1):
        tried = bound + (np.int64(1) << bit)
        above = 0
        for i in range(experts):
            above += keys[i] >= tried
        if above >= count:
            bound = tried
    left = count
    for i in range(experts):
        chosen[i] = keys[i] > bound
        left -= chosen[i]
    for i in range(experts):
        if keys[i] == bound and left > 0:
            chosen[i] = 1
            left -= 1


@njit(**_serial)
def _wanted(chosen: Any, ids: Any) -> int:
    """Write the experts that any token has chosen into `ids`, ascending; return their number."""
    count = 0
    for e in range(chosen.shape[1]):
        for t in range(len(chosen)):
            if chosen[t, e]:
                ids[count] = e
                count += 1
                break
    return count


@njit(**_serial)
def _alike(chosen: Any, a: int, b: int) -> bool:
    """Tell whether the same tokens have chosen two experts."""
    different = 0
    for t in range(len(chosen)):
        different += chosen[t, a] != chosen[t, b]
    return different == 0


@njit(**_serial)
def _rows(
    address: int,
    slab: Any,
    table: Any,
    first: int,
    last: int,
    then: int,
    x: Any,
    inner: Any,
    delta: Any,
    pairs: Any,
    low_rank: Any,
    begin: int,
    end: int,
) -> None:
    """Compute gate and up from row `first` to `last` for the tokens from `begin` to `end`.

    The rows from `then` on are needed next.
    """
    some, gates, ups = x[begin:end], inner[0, begin:end], inner[1, begin:end]
    call_rows_then(address, slab, table[GATE], first, last, some, gates, 0, 0, then)
    call_rows_then(address, slab, table[UP], first, last, some, ups, 0, 0, then)
    low = low_rank[:, begin:end]
    grow(address, delta, pairs, GATE, first, last, low, gates, 0)
    grow(address, delta, pairs, UP, first, last, low, ups, 0)


@njit(**_serial)
def _activate(chosen: Any, size: int, inner: Any, kind: int) -> None:
    """Put the activated neurons of the chosen experts into `inner[0]`, expert by expert.

    A vector's last bits are not those of single values, so what is done together must not depend on
    what other tokens choose.
    """
    for t in range(len(chosen)):
        for e in range(chosen.shape[1]):
            if chosen[t, e]:
                for i in range(e * size, (e + 1) * size):
                    inner[0, t, i] = activate(inner[0, t, i], kind) * inner[1, t, i]


@njit(**_serial)
def _add_up(
    slab: Any, m: Any, first: int, last: int, then: int, x: Any, y: Any, low: int, high: int
) -> None:
    """Add to `y`, from `low` to `high`, what the inputs `x` from `first` to `last` give.

    The inputs from `then` on are needed next.
    """
    kind, each = _plain(m[M_KIND]), m[M_ROW_BYTES]
    i = first
    while i + 8 <= last:
        ahead = 8 * each if i + 16 <= last else (then - i) * each
        spread_8(kind, slab, m[M_WEIGHTS] + i * each, each, ahead, x, i, y, low, high)
        i += 8
    while i < last:
        spread_1(kind, slab, m[M_WEIGHTS] + i * each, each, (then - i) * each, x, i, y, low, high)
        i += 1


@njit(**_serial)
def _plain(kind: int) -> int:
    """Return the kind whose integers are stored alike, without a zero-point."""
    if kind == INT8_ZERO:
        return INT8
    return INT4 if kind == INT4_ZERO else kind


@njit(**_serial)
def _settle(
    slab: Any, m: Any, group: int, given: Any, sums: Any, totals: Any, low: int, high: int
) -> None:
    """Add a group's `sums` to `totals`, times its scales, and begin them anew.

    Where it has zero-points, they are taken off for all that was `given`: the sum of the inputs.
    """
    start = m[M_SCALES] + group * m[M_SCALE_BYTES]
    kind = m[M_KIND]
    if kind in (INT8_ZERO, INT4_ZERO):
        words = slab[start : start + m[M_SCALE_BYTES]].view(np.uint32)
        for i in range(low, high):
            scale = float_of_bits(words[i] & np.uint32(0xFFFFFF00))
            zero = np.int32(np.int8(words[i] & np.uint32(255)))
            middle = float32(8 - zero if kind == INT4_ZERO else -zero)
            totals[i] += (sums[i] + middle * given) * scale
            sums[i] = float32(0.0)
        return
    scales = slab[start : start + m[M_SCALE_BYTES]].view(np.float32)
    for i in range(low, high):
        totals[i] += sums[i] * scales[i]
        sums[i] = float32(0.0)


@njit(**_serial)
def _turned(
    slab: Any,
    m: Any,
    size: int,
    ids: Any,
    count: int,
    chosen: Any,
    inner: Any,
    sums: Any,
    totals: Any,
    low: int,
    high: int,
    h: Any,
) -> None:
    """Add to the columns of `h` from `low` to `high` what the chosen neurons in `inner` give."""
    tokens, hidden = h.shape
    plain = _plain(m[M_KIND])
    scaled = plain in (INT8, INT4)
    given = np.zeros(tokens, np.float32)
    open_ = np.full(tokens, -1, np.int64)  # the group whose sums a token has begun
    for t in range(tokens):
        sums[t, low:high] = float32(0.0)
        totals[t, low:high] = float32(0.0)
    for j in range(count):
        e = ids[j]
        i, last = e * size, (e + 1) * size
        then = ids[j + 1] * size if j + 1 < count else i
        while i < last:
            group, until = 0, last
            if scaled:
                group = i // m[M_GROUP]
                until = min(last, (group + 1) * m[M_GROUP])
            after = until if until < last else then
            for t in range(tokens):
                if not chosen[t, e]:
                    continue
                if open_[t] >= 0 and open_[t] != group:
                    _settle(slab, m, open_[t], given[t], sums[t], totals[t], low, high)
                    given[t] = float32(0.0)
                open_[t] = group
                for k in range(i, until):
                    given[t] += inner[t, k]
                _add_up(slab, m, i, until, after, inner[t], sums[t], low, high)
            i = until
    bias = m[M_BIAS]
    for t in range(tokens):
        found = sums[t]
        if scaled:
            if open_[t] >= 0:
                _settle(slab, m, open_[t], given[t], sums[t], totals[t], low, high)
            found = totals[t]
        for i in range(low, min(high, hidden)):
            h[t, i] += found[i]
        if bias >= 0:
            offsets = slab[bias : bias + 4 * hidden].view(np.float32)
            for i in range(low, min(high, hidden)):
                h[t, i] += offsets[i]


@njit(**_parallel)
def feed_forward(
    address: int,
    h: Any,
    slab: Any,
    table: Any,
    turned: int,
    n: Any,
    router: Any,
    routes: Any,
    x: Any,
    inner: Any,
    between: Any,
    scores: Any,
    keys: Any,
    chosen: Any,
    ids: Any,
    sums: Any,
    delta: Any,
    pairs: Any,
    low_rank: Any,
    running: int,
) -> None:
    """Add to `h` [tokens, hidden] what the feed-forward of a block gives; see `block.block`.

    `x` [tokens, hidden] is what goes in, behind the norm. Its matrices are those of `table` in
    `slab`, of which the one that goes down is `turned` or not; `n` are its numbers E_*, the
    router's matrices are those of `routes` in the slab `router`. `chosen`, int32 [tokens, experts],
    is written: which experts each token computes.
    Scratch: `inner` [2, tokens, intermediate], `between` [tokens, of the router's inner layer],
    `scores` [tokens, experts], `keys` and `ids` int32 [experts], `sums` [2, tokens, hidden]; the
    widths that go into products are rounded up to 32, the rest zero.
    """
    tokens, hidden = h.shape
    size, shared = n[E_SIZE], n[E_SHARED]
    if routes[R_IN, M_KIND] >= 0:
        m = routes[R_IN]
        for c in prange(running):
            low, high = c * m[M_ROWS] // running, (c + 1) * m[M_ROWS] // running
            call_rows(address, router, m, low, high, x, between, 0, 0)
            for t in range(tokens):
                for i in range(low, high):
                    between[t, i] = float32(1.0) - float32(2.0) / (
                        exp(float32(2.0) * between[t, i]) + float32(1.0)
                    )
        m = routes[R_OUT]
        for c in prange(running):
            low, high = c * m[M_ROWS] // running, (c + 1) * m[M_ROWS] // running
            call_rows(address, router, m, low, high, between, scores, 0, 0)
    else:
        m = routes[R_OUT]
        for c in prange(running):
            low, high = c * m[M_ROWS] // running, (c + 1) * m[M_ROWS] // running
            call_rows(address, router, m, low, high, x, scores, 0, 0)
    for t in range(tokens):
        chosen[t, :shared] = 1
        choose(scores[t], n[E_CHOSEN], keys, chosen[t, shared:])
        inner[0, t] = float32(0.0)
    shrink(address, delta, pairs, GATE, x, low_rank)
    shrink(address, delta, pairs, UP, x, low_rank)
    count = _wanted(chosen, ids)
    for c in prange(running):
        at, end = c * count * size // running, (c + 1) * count * size // running
        while at < end:
            j, past = at // size, at % size
            e = ids[j]
            k = j + 1  # experts side by side go together
            while k * size < end and ids[k] == ids[k - 1] + 1 and _alike(chosen, e, ids[k]):
                k += 1
            until = min(end, k * size)
            first = e * size + past
            then = ids[k] * size if until < end else first
            t = 0
            while t < tokens:
                begin = t
                while t < tokens and chosen[t, e]:
                    t += 1
                if t > begin:
                    _rows(
                        address,
                        slab,
                        table,
                        first,
                        first + until - at,
                        then,
                        x,
                        inner,
                        delta,
                        pairs,
                        low_rank,
                        begin,
                        t,
                    )
                else:
                    t += 1
            at = until
    _activate(chosen, size, inner, n[E_ACTIVATION])
    shrink(address, delta, pairs, DOWN, inner[0], low_rank)
    m = table[DOWN]
    parts = m[M_WIDTH] // 32
    for c in prange(running):
        low, high = c * hidden // running, (c + 1) * hidden // running
        if turned:
            low, high = 32 * (c * parts // running), 32 * ((c + 1) * parts // running)
            _turned(slab, m, size, ids, count, chosen, inner[0], sums[0], sums[1], low, high, h)
            low, high = min(low, hidden), min(high, hidden)
        else:
            call_rows(address, slab, m, low, high, inner[0], h, 0, 1)
        grow(address, delta, pairs, DOWN, low, high, low_rank, h, 0)
