"""One decoder block, the head and packed products, as compiled functions over slabs of weights.

A slab is a contiguous uint8 array; a matrix in it is a row of `int64` numbers, by the names M_*.
Everything here works on a few tokens at once, of one or several sequences, each with its own cache;
inside a forward pass a token sees those that `sees` says: a causal chain, or a tree of guesses.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
import torch
from numba import carray, cfunc, float32, njit, prange

from bmkit.runtime.cpu import KEPT
from bmkit.runtime.cpu.dots import (
    AHEAD,
    BFLOAT16,
    FLOAT32,
    INT4_ZERO,
    INT8,
    INT8_ZERO,
    LANES,
    ROWS,
    call_rows,
    dot_1x1,
    dot_2x3,
    dot_2x4,
    dot_4x1,
    dot_4x2,
    dot_4x4,
    float_of_bits,
    mix_1,
    mix_2,
)

M_KIND, M_WEIGHTS, M_SCALES, M_BIAS, M_ROWS, M_WIDTH, M_GROUP, M_ROW_BYTES, M_SCALE_BYTES = range(9)
MATRIX_NUMBERS = 9
"""A matrix: kind, byte offsets of weights, scales and bias (-1: none), rows, inputs (a multiple of
32), inputs a scale, bytes of a row, bytes of a row's scales."""

SILU, GELU, GELU_TANH, RELU = range(4)

_serial = {"fastmath": True, "nogil": True, "cache": KEPT}
_parallel = {**_serial, "parallel": True}


@njit(**_serial)
def _put(y: Any, at: int, value: float, add: int) -> None:
    """Write a product where it belongs, or add it to what is there."""
    y[at] = value + (y[at] if add else float32(0.0))


@cfunc(ROWS, cache=KEPT, fastmath=True)
def _rows(
    slab: Any,
    m: Any,
    low: int,
    high: int,
    x: Any,
    tokens: int,
    y: Any,
    stride: int,
    column: int,
    add: int,
    then: int,
) -> None:
    """Put x · Wᵀ into `y` [tokens, stride], or add it, for the rows from `low` to `high`.

    All arrays are pointers; `x` is [tokens, M_WIDTH], and the matrix's first row goes to `column`.
    The rows from `then` on are needed next.
    """
    kind, weights, scales, group = m[M_KIND], m[M_WEIGHTS], m[M_SCALES], m[M_GROUP]
    width = m[M_WIDTH]
    bias = carray(slab, (m[M_BIAS] + 4 * m[M_ROWS],), np.uint8)
    one, scale = m[M_ROW_BYTES], m[M_SCALE_BYTES]
    # Four rows at a time, so that they are still in the first cache when more tokens come.
    whole = low + (high - low) // 4 * 4
    for i in range(low, whole, 4):
        w, s = weights + i * one, scales + i * scale
        ahead = (AHEAD if i + AHEAD < high else then - high + AHEAD) * one
        t = 0
        while t < tokens:
            rest = tokens - t
            if rest == 1:
                d1 = dot_4x1(kind, slab, w, one, s, scale, x, width, t, group, ahead)
                for u in range(4):
                    _put(y, t * stride + column + i + u, d1[u], add)
                t += 1
            elif rest == 2:
                d2 = dot_4x2(kind, slab, w, one, s, scale, x, width, t, group, ahead)
                for u in range(8):
                    _put(y, (t + u % 2) * stride + column + i + u // 2, d2[u], add)
                t += 2
            elif rest == 3:
                for r in range(0, 4, 2):
                    d3 = dot_2x3(
                        kind,
                        slab,
                        w + r * one,
                        one,
                        s + r * scale,
                        scale,
                        x,
                        width,
                        t,
                        group,
                        ahead,
                    )
                    for u in range(6):
                        _put(y, (t + u % 3) * stride + column + i + r + u // 3, d3[u], add)
                t += 3
            elif LANES == 16:
                d16 = dot_4x4(kind, slab, w, one, s, scale, x, width, t, group, ahead)
                for u in range(16):
                    _put(y, (t + u % 4) * stride + column + i + u // 4, d16[u], add)
                t += 4
            else:  # more than eight sums at a time don't stay in registers
                for r in range(0, 4, 2):
                    d4 = dot_2x4(
                        kind,
                        slab,
                        w + r * one,
                        one,
                        s + r * scale,
                        scale,
                        x,
                        width,
                        t,
                        group,
                        ahead,
                    )
                    for u in range(8):
                        _put(y, (t + u % 4) * stride + column + i + r + u // 4, d4[u], add)
                t += 4
    for i in range(whole, high):
        w, s = weights + i * one, scales + i * scale
        for t in range(tokens):
            d = dot_1x1(kind, slab, w, one, s, scale, x, width, t, group, 0)
            _put(y, t * stride + column + i, d[0], add)
    if m[M_BIAS] >= 0:
        for i in range(low, high):
            at = m[M_BIAS] + 4 * i
            b = bias[at : at + 4].view(np.float32)[0]
            for t in range(tokens):
                y[t * stride + column + i] += b


ADDRESS: int = _rows.address
"""Where the compiled products are in this process: what the functions below are given."""


def use_threads(count: int) -> None:
    """Let what this thread calls run on `count` threads: others would only be waited for.

    torch keeps its own number: the first call begins numba's team, by which OpenMP's default, and
    torch's with it, becomes the number of cores.
    """
    before = torch.get_num_threads()
    numba.set_num_threads(max(1, min(count, numba.config.NUMBA_NUM_THREADS)))
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)


@njit(**_parallel)
def product(address: int, slab: Any, m: Any, x: Any, y: Any, column: int, threads: int) -> None:
    """Put x · Wᵀ (+ bias) into `y` from `column` on: x [tokens, M_WIDTH], y [tokens, columns]."""
    count = m[M_ROWS]
    for c in prange(threads):
        call_rows(
            address, slab, m, c * count // threads, (c + 1) * count // threads, x, y, column, 0
        )


@njit(**_serial)
def unpack(slab: Any, m: Any, row: int, out: Any) -> None:
    """Write one row of a matrix into `out` [at most M_WIDTH], as float32."""
    kind, start = m[M_KIND], m[M_WEIGHTS] + row * m[M_ROW_BYTES]
    raw = slab[start : start + m[M_ROW_BYTES]]
    first = m[M_SCALES] + row * m[M_SCALE_BYTES]
    scales = slab[first : first + m[M_SCALE_BYTES]].view(np.float32)
    words = slab[first : first + m[M_SCALE_BYTES]].view(np.uint32)
    width = len(out)
    if kind == FLOAT32:
        out[:] = raw.view(np.float32)[:width]
    elif kind == BFLOAT16:
        halves = raw.view(np.uint16)
        bits = out.view(np.uint32)
        for i in range(width):
            bits[i] = np.uint32(halves[i]) << np.uint32(16)
    elif kind == INT8:
        group = m[M_GROUP]
        signed = raw.view(np.int8)
        for g in range(len(scales)):
            scale = scales[g]
            for i in range(g * group, min((g + 1) * group, width)):
                out[i] = float32(signed[i]) * scale
    elif kind == INT8_ZERO:
        group = m[M_GROUP]
        signed = raw.view(np.int8)
        for g in range(len(words)):
            scale = float_of_bits(words[g] & np.uint32(0xFFFFFF00))
            zero = np.int32(np.int8(words[g] & np.uint32(255)))
            for i in range(g * group, min((g + 1) * group, width)):
                out[i] = float32(np.int32(signed[i]) - zero) * scale
    else:
        for b in range((width + 31) // 32):
            scale, zero = scales[32 * b // m[M_GROUP]], np.int32(8)
            if kind == INT4_ZERO:
                word = words[32 * b // m[M_GROUP]]
                scale = float_of_bits(word & np.uint32(0xFFFFFF00))
                zero = np.int32(word & np.uint32(255))
            for i in range(min(16, width - 32 * b)):
                out[32 * b + i] = float32(np.int32(raw[16 * b + i] & 15) - zero) * scale
            for i in range(min(16, width - 32 * b - 16)):
                high = np.int32(raw[16 * b + i] >> 4) - zero
                out[32 * b + 16 + i] = float32(high) * scale


@njit(**_parallel)
def unpack_rows(slab: Any, m: Any, low: int, out: Any, threads: int) -> None:
    """Write the rows from `low` on into `out` [rows, inputs], as float32."""
    count = out.shape[0]
    for c in prange(threads):
        for i in range(c * count // threads, (c + 1) * count // threads):
            unpack(slab, m, low + i, out[i])


@njit(**_serial)
def regroup(raw: Any, out: Any) -> None:
    """Turn int4 values of compressed-tensors, which follow each other, into blocks of 32.

    Both are uint8 of the same length: two values a byte, 8 added; in `out` the first 16 of a block
    are the low halves.
    """
    for b in range(len(raw) // 16):
        for k in range(8):
            first, second = raw[16 * b + k], raw[16 * b + 8 + k]
            out[16 * b + 2 * k] = (first & 15) | ((second & 15) << 4)
            out[16 * b + 2 * k + 1] = (first >> 4) | (second & 240)


@njit(**_serial)
def exp(x: Any) -> Any:
    """Return e^x of a float32, within 2e-7 of it, in a form that loops can vectorise."""
    x = min(max(x, float32(-87.0)), float32(88.0))
    n = np.floor(x * float32(1.4426950408889634) + float32(0.5))
    r = x - n * float32(0.693359375) + n * float32(2.12194440e-4)
    p = float32(1.9875691500e-4)
    p = p * r + float32(1.3981999507e-3)
    p = p * r + float32(8.3334519073e-3)
    p = p * r + float32(4.1665795894e-2)
    p = p * r + float32(1.6666665459e-1)
    p = p * r + float32(5.0000001201e-1)
    p = p * r * r + r + float32(1.0)
    return p * float_of_bits(np.uint32((np.int32(n) + np.int32(127)) << np.int32(23)))


@njit(**_serial)
def activate(x: Any, kind: int) -> Any:
    """Return the activation of one float32."""
    if kind == SILU:
        return x / (float32(1.0) + exp(-x))
    if kind == GELU_TANH:
        inner = float32(0.7978845608028654) * (x + float32(0.044715) * x * x * x)
        return x / (float32(1.0) + exp(float32(-2.0) * inner))
    if kind == GELU:
        return float32(0.5) * x * (float32(1.0) + float32(math.erf(x * float32(0.70710678))))
    return max(x, float32(0.0))


@njit(**_serial)
def normalise(x: Any, slab: Any, m: Any, eps: float, out: Any) -> None:
    """Write the RMS norm of `x` [hidden] into `out`, with the weights of matrix `m` (one row)."""
    count = len(x)
    weights = slab[m[M_WEIGHTS] : m[M_WEIGHTS] + 4 * count].view(np.float32)
    total = float32(0.0)
    for i in range(count):
        total += x[i] * x[i]
    scale = float32(1.0) / np.sqrt(total / float32(count) + float32(eps))
    for i in range(count):
        out[i] = x[i] * scale * weights[i]


Q, K, V, OUT, GATE, UP, DOWN, NORM_1, NORM_2, NORM_Q, NORM_K = range(11)
"""The matrices of a block, in the order of its table; the norms are FLOAT32 with one row."""
N_HEADS, N_KV, N_DIM, N_ROTARY, N_WINDOW, N_ACTIVATION, N_EXPERTS = range(7)
"""The numbers of a block: heads, key-value heads, their width, how much of it is rotated, the
sliding window (0: none), the activation, and whether the feed-forward is divided into experts: then
what goes into it is left in `x`."""


@njit(**_serial)
def _rotate(x: Any, cos: Any, sin: Any, count: int) -> None:
    """Rotate the first `count` values of a head, the first half with the second."""
    half = count // 2
    for i in range(half):
        a, b = x[i], x[i + half]
        x[i] = a * cos[i] - b * sin[i]
        x[i + half] = b * cos[i + half] + a * sin[i + half]


SPAN = 64
"""Cache slots that are attended to at a time: their keys and values stay in the second cache. They
begin at multiples of it, and which thread takes them doesn't depend on how many there are: sums
must not change when more tokens come."""
_NEVER = float32(-1e30)
"""The score of what isn't seen (no infinity: the compiler may assume that there is none)."""


@njit(**_serial)
def _members(sequence: Any, t: int, out: Any) -> int:
    """Write the tokens of t's sequence into `out`, and return their number: 0 if one is before."""
    count = 0
    for u in range(len(sequence)):
        if sequence[u] == sequence[t]:
            if u < t:
                return 0
            out[count] = u
            count += 1
    return count


@njit(**_serial)
def _attend(
    address: int,
    keys: Any,
    values: Any,
    thread: int,
    threads: int,
    queries: Any,
    above: Any,
    begin: Any,
    depth: Any,
    done: int,
    mine: int,
    per: int,
    scaling: float,
    scores: Any,
    branch: Any,
    mixed: Any,
    peaks: Any,
    sums: Any,
) -> None:
    """Attend from `queries` [n, width] to one key-value head's cache, to a thread's share of it.

    `keys` and `values` are [slots, width]. Query r belongs to token r // per of this pass, of which
    there are `mine`: it sees the places from `begin` of its token on. Those before `done` are
    slots; the one that is d after it is slot `above[token, d]`, up to d = `depth[token]`.
    Writes the mix of values [n, width], yet to be divided by `sums` [n]: of e to the score minus
    `peaks` [n], the greatest score. `scores` [n, SPAN] and `branch` [n, mine] are scratch.
    """
    n = len(queries)
    matrix = np.zeros(MATRIX_NUMBERS, np.int64)
    width = queries.shape[1]
    matrix[M_KIND], matrix[M_BIAS], matrix[M_WIDTH], matrix[M_GROUP] = FLOAT32, -1, width, width
    matrix[M_ROW_BYTES] = 4 * width
    mixed[:n] = float32(0.0)
    peaks[:n] = _NEVER
    sums[:n] = float32(0.0)
    first, last = done, done
    for token in range(mine):
        first = min(first, begin[token])
        last = max(last, done + depth[token])
    known = False  # whether `branch` holds the scores of this pass's own tokens
    for span in range(first // SPAN, last // SPAN + 1):
        if span % threads != thread:
            continue
        start = span * SPAN
        cached = max(min(start + SPAN, done) - start, 0)
        if cached:
            matrix[M_WEIGHTS] = 4 * width * start
            call_rows(address, keys, matrix, 0, cached, queries, scores, 0, 0)
        if cached < SPAN and not known:
            matrix[M_WEIGHTS] = 4 * width * done
            call_rows(address, keys, matrix, 0, mine, queries, branch, 0, 0)
            known = True
        for r in range(n):
            row, token = scores[r], r // per
            count = min(start + SPAN, done + depth[token] + 1) - start
            for j in range(cached, count):
                row[j] = branch[r, above[token, start + j - done] - done]
            for j in range(count):
                row[j] *= float32(scaling)
            for j in range(min(begin[token] - start, count)):
                row[j] = _NEVER
            peak = _NEVER
            for j in range(count):
                peak = max(peak, row[j])
            if peak > peaks[r]:
                less = exp(peaks[r] - peak)
                peaks[r] = peak
                sums[r] *= less
                for i in range(width):
                    mixed[r, i] *= less
            peak, whole = peaks[r], float32(0.0)
            for j in range(count):
                row[j] = exp(row[j] - peak) if row[j] > _NEVER else float32(0.0)
                whole += row[j]
            sums[r] += whole
        r = 0
        while r + 2 <= n:
            mix_2(values, start, cached, scores, r, 0, mixed)
            r += 2
        if r < n:
            mix_1(values, start, cached, scores, r, 0, mixed)
        if cached == SPAN:
            continue
        for r in range(n):
            token = r // per
            j = cached
            count = min(start + SPAN, done + depth[token] + 1) - start
            while j < count:  # as many at a time as lie in a row
                slot = above[token, start + j - done]
                run = 1
                while j + run < count and above[token, start + j + run - done] == slot + run:
                    run += 1
                mix_1(values, slot, run, scores, r, j, mixed)
                j += run


@njit(**_serial)
def _merge(parts: Any, peaks: Any, sums: Any, out: Any, dim: int) -> None:
    """Put together what each thread found with its part of the slots: `parts` [threads, width]."""
    peak = _NEVER
    for c in range(len(parts)):
        peak = max(peak, peaks[c])
    whole = float32(0.0)
    for c in range(len(parts)):
        whole += exp(peaks[c] - peak) * sums[c]
    for i in range(dim):
        out[i] = float32(0.0)
    for c in range(len(parts)):
        share = exp(peaks[c] - peak) / whole
        for i in range(dim):
            out[i] += share * parts[c, i]


@njit(**_serial)
def shrink(address: int, delta: Any, pairs: Any, which: int, x: Any, low: Any) -> None:
    """Put A · x of a projection's low-rank update into `low[which]`, if it has one."""
    m = pairs[2 * which]
    if m[M_KIND] >= 0:
        call_rows(address, delta, m, 0, m[M_ROWS], x, low[which], 0, 0)


@njit(**_serial)
def grow(
    address: int,
    delta: Any,
    pairs: Any,
    which: int,
    first: int,
    last: int,
    low: Any,
    y: Any,
    column: int,
) -> None:
    """Add B · `low[which]` to the outputs from `first` to `last` of a projection."""
    m = pairs[2 * which + 1]
    if m[M_KIND] >= 0:
        call_rows(address, delta, m, first, last, low[which], y, column, 1)


@njit(**_parallel)
def block(
    address: int,
    h: Any,
    slab: Any,
    table: Any,
    small: Any,
    norms: Any,
    n: Any,
    eps: float,
    scaling: float,
    keys: Any,
    values: Any,
    sequence: Any,
    slot: Any,
    done: Any,
    position: Any,
    sees: Any,
    cos: Any,
    sin: Any,
    x: Any,
    heads: Any,
    mixed: Any,
    inner: Any,
    queries: Any,
    scores: Any,
    branch: Any,
    parts: Any,
    peaks: Any,
    delta: Any,
    pairs: Any,
    low_rank: Any,
    threads: int,
    running: int,
) -> None:
    """Run one decoder block on `h` [tokens, hidden], in place.

    Its matrices are those of `table` in `slab`, its norms those of `norms` in the slab `small`.
    `keys` and `values` are [sequences, kv heads, slots, width], the heads' dim rounded up to 32;
    token t belongs to `sequence[t]`, goes to slot `slot[t]` of it, which is among the first after
    those that are done, and stands at `position[t]`. It sees the first `done[sequence]` slots, and
    the tokens u of this pass with `sees[t, u]`: one at each position up to its own. `cos` and
    `sin` are [tokens, rotary].
    Scratch: `x` [tokens, hidden], `heads` [tokens, all of q, k, v], `mixed` [tokens, q],
    `inner` [2, tokens, intermediate] (widths rounded up to 32, the rest zero), and of each thread,
    for rows = tokens * heads a kv head: `queries` [threads, rows, width], `scores` [threads, rows,
    SPAN], `branch` [threads, rows, tokens], `parts` [threads, kv heads, rows, width] and `peaks`
    [threads, 2, kv heads, rows]. `pairs` are the matrices A and B, in the slab `delta`, of a
    low-rank update of each projection (kind -1: none); `low_rank` is scratch [7, tokens, rank].
    Slots are dealt out to `threads` parts, on whose number the last bits depend, matrices to
    `running`, as many as there are threads.
    """
    tokens, hidden = h.shape
    dim, kv, count, rotary, window = n[N_DIM], n[N_KV], n[N_HEADS], n[N_ROTARY], n[N_WINDOW]
    for t in range(tokens):
        normalise(h[t], small, norms[NORM_1], eps, x[t, :hidden])
    for which in range(3):
        shrink(address, delta, pairs, which, x, low_rank)
    for c in prange(running):
        at = 0
        for which in range(3):
            m = table[which]
            low, high = c * m[M_ROWS] // running, (c + 1) * m[M_ROWS] // running
            call_rows(address, slab, m, low, high, x, heads, at, 0)
            grow(address, delta, pairs, which, low, high, low_rank, heads, at)
            at += m[M_ROWS]
    for t in range(tokens):
        for i in range(count + kv):
            head = heads[t, i * dim : (i + 1) * dim]
            norm = norms[NORM_Q if i < count else NORM_K]
            if norm[M_KIND] >= 0:
                normalise(head, small, norm, eps, head)
            _rotate(head, cos[t], sin[t], rotary)
        for i in range(kv):
            k, v = (count + i) * dim, (count + kv + i) * dim
            keys[sequence[t], i, slot[t], :dim] = heads[t, k : k + dim]
            values[sequence[t], i, slot[t], :dim] = heads[t, v : v + dim]
    per = count // kv
    # Each thread takes a part of the slots, for all heads: so each key and value is read once.
    for c in prange(threads):
        members = np.empty(tokens, np.int64)
        above = np.empty((tokens, tokens), np.int64)
        begin = np.empty(tokens, np.int64)
        depth = np.empty(tokens, np.int64)
        for t in range(tokens):
            mine = _members(sequence, t, members)
            if mine == 0:
                continue
            s = sequence[t]
            until = done[s]
            for a in range(mine):
                u = members[a]
                begin[a] = max(position[u] - window + 1, 0) if window > 0 else 0
                depth[a] = position[u] - until
                for other in range(mine):
                    o = members[other]
                    if sees[u, o]:
                        above[a, position[o] - until] = slot[o]
            for g in range(kv):
                for a in range(mine):
                    for e in range(per):
                        at = (g * per + e) * dim
                        queries[c, a * per + e, :dim] = heads[members[a], at : at + dim]
                place = t * per
                _attend(
                    address,
                    keys[s, g],
                    values[s, g],
                    c,
                    threads,
                    queries[c, : mine * per],
                    above,
                    begin,
                    depth,
                    until,
                    mine,
                    per,
                    scaling,
                    scores[c],
                    branch[c],
                    parts[c, g, place : place + mine * per],
                    peaks[c, 0, g, place : place + mine * per],
                    peaks[c, 1, g, place : place + mine * per],
                )
    members = np.empty(tokens, np.int64)
    for t in range(tokens):
        mine = _members(sequence, t, members)
        for g in range(kv):
            for r in range(mine * per):
                _merge(
                    parts[:, g, t * per + r],
                    peaks[:, 0, g, t * per + r],
                    peaks[:, 1, g, t * per + r],
                    mixed[members[r // per], (g * per + r % per) * dim :],
                    dim,
                )
    shrink(address, delta, pairs, OUT, mixed, low_rank)
    for c in prange(running):
        low, high = c * hidden // running, (c + 1) * hidden // running
        call_rows(address, slab, table[OUT], low, high, mixed, h, 0, 1)
        grow(address, delta, pairs, OUT, low, high, low_rank, h, 0)
    for t in range(tokens):
        normalise(h[t], small, norms[NORM_2], eps, x[t, :hidden])
    if n[N_EXPERTS]:
        return
    shrink(address, delta, pairs, GATE, x, low_rank)
    shrink(address, delta, pairs, UP, x, low_rank)
    width = table[UP, M_ROWS]
    for c in prange(running):
        low, high = c * width // running, (c + 1) * width // running
        call_rows(address, slab, table[GATE], low, high, x, inner[0], 0, 0)
        call_rows(address, slab, table[UP], low, high, x, inner[1], 0, 0)
        grow(address, delta, pairs, GATE, low, high, low_rank, inner[0], 0)
        grow(address, delta, pairs, UP, low, high, low_rank, inner[1], 0)
        for t in range(tokens):
            for i in range(low, high):
                inner[0, t, i] = activate(inner[0, t, i], n[N_ACTIVATION]) * inner[1, t, i]
    shrink(address, delta, pairs, DOWN, inner[0], low_rank)
    for c in prange(running):
        low, high = c * hidden // running, (c + 1) * hidden // running
        call_rows(address, slab, table[DOWN], low, high, inner[0], h, 0, 1)
        grow(address, delta, pairs, DOWN, low, high, low_rank, h, 0)
