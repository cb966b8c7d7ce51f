"""Inner products of one packed weight row with a few activation rows, as vector code.

numba's own loops leave half of the memory bus unused for bytes, and more for nibbles; these are
built instruction by instruction through its IR, for the vectors of AVX-512 or AVX2. `dot_RxT`
multiplies R weight rows with T activation rows at a time, so that one token or four cost about the
same: what is read from memory. `mix_1` and `mix_2` add up the values that attention weighs,
`spread_1` and `spread_8` what single inputs of a matrix add to its outputs.

Every sum is taken in one order, the inputs', whatever R and T are: a token's numbers are the same
bits alone, beside others, and in a tree of guesses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import binding as llvm
from llvmlite import ir
from numba.core import cgutils, config
from numba.core import types as numba_types
from numba.extending import intrinsic

types: Any = numba_types
_FEATURES: str = config.CPU_FEATURES or llvm.get_host_cpu_features().flatten()
LANES = 16 if "+avx512f" in _FEATURES.split(",") else 8
"""Floats in a vector: 16 where the processor that numba compiles for has registers for as many."""
PART = 32
"""Inputs whose vectors are a whole number, whatever LANES are: rows are a multiple of it."""
FLOAT32, BFLOAT16, INT8, INT4, FLOAT16, INT8_ZERO, INT4_ZERO = range(7)
"""How a matrix is stored.

INT8 and INT4 are symmetric, with a float32 scale per group of inputs. The others have a zero-point
too: the lowest byte of the scale's 32 bits (so scales keep 15 bits behind the point), signed for 8
bits, from 0 to 15 for 4. FLOAT16 is for GPUs: no kernel here reads it.
"""
KINDS = (FLOAT32, BFLOAT16, INT8, INT4, INT8_ZERO, INT4_ZERO)
BITS = {FLOAT32: 32, BFLOAT16: 16, FLOAT16: 16, INT8: 8, INT4: 4, INT8_ZERO: 8, INT4_ZERO: 4}
EIGHTS, FOURS = (INT8, INT8_ZERO), (INT4, INT4_ZERO)
WITH_ZERO = (INT8_ZERO, INT4_ZERO)

AHEAD = 8
"""Weight rows that are asked for before they are needed: into the second cache, since the first is
taken up by activations. Rows are too short for the processor to see by itself what comes next."""

INT4_BLOCK = 32
"""Inputs whose nibbles share 16 bytes: byte i holds input i low and input i + 16 high."""

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_F32 = ir.FloatType()
_V = ir.VectorType(_F32, LANES)
_ZERO = ir.Constant(_V, [0.0] * LANES)
_FUSED = ("contract",)
"""A product and a sum may be rounded once; nothing else may be changed, the order of sums least."""


def _load(b: Any, base: Any, byte: Any, kind: ir.VectorType) -> Any:
    """Load a vector from `base` plus `byte` bytes, aligned or not."""
    return b.load(b.bitcast(b.gep(base, [byte]), kind.as_pointer()), align=1)


def _prefetch(b: Any, base: Any, byte: Any) -> None:
    """Ask for the cache line at `base` plus `byte`, which may lie outside of what is mapped."""
    place = b.gep(base, [byte])
    kind = ir.FunctionType(ir.VoidType(), [place.type, _I32, _I32, _I32])
    call = b.module.declare_intrinsic("llvm.prefetch", [place.type], kind)
    b.call(call, [place, *(ir.Constant(_I32, value) for value in (0, 2, 1))])


def _floats(b: Any, base: Any, at: Any, width: int, zero: Any = None) -> Any:
    """Return the LANES weights at element `at`, of 4- or 1-byte values, as float32.

    `zero`, an int8, is taken off.
    """
    byte = b.mul(at, ir.Constant(_I64, width))
    if width == 4:
        return _load(b, base, byte, _V)
    if width == 1:
        raw = _load(b, base, byte, ir.VectorType(_I8, LANES))
        wide = b.sext(raw, ir.VectorType(_I32, LANES))
        if zero is not None:
            wide = b.sub(wide, _everywhere(b, b.sext(zero, _I32)))
        return b.sitofp(wide, _V)
    raise AssertionError


def _halves(b: Any, base: Any, at: Any) -> Any:
    """Return the LANES bfloat16 weights at element `at`, as float32."""
    wide = ir.VectorType(_I32, LANES)
    raw = _load(b, base, b.mul(at, ir.Constant(_I64, 2)), ir.VectorType(_I16, LANES))
    return b.bitcast(b.shl(b.zext(raw, wide), ir.Constant(wide, [16] * LANES)), _V)


def _nibbles(b: Any, base: Any, at: Any, zero: Any) -> list[Any]:
    """Return the INT4_BLOCK weights from element `at` as four vectors, in order.

    `zero`, an int8, is taken off.
    """
    half = INT4_BLOCK // 2
    raw_type, wide = ir.VectorType(_I8, half), ir.VectorType(_I32, LANES)
    raw = _load(b, base, b.lshr(at, ir.Constant(_I64, 1)), raw_type)
    low = b.and_(raw, ir.Constant(raw_type, [15] * half))
    high = b.lshr(raw, ir.Constant(raw_type, [4] * half))
    found = []
    middle = _everywhere(b, zero, half)
    for part in (low, high):
        signed = b.sub(part, middle)
        for first in range(0, half, LANES):
            lanes = ir.Constant(ir.VectorType(_I32, LANES), list(range(first, first + LANES)))
            eight = b.shuffle_vector(signed, ir.Constant(raw_type, ir.Undefined), lanes)
            found.append(b.sitofp(b.sext(eight, wide), _V))
    return found


def _sum(b: Any, vector: Any) -> Any:
    """Add up the lanes."""
    for width in (8, 4, 2, 1):
        if width >= LANES:
            continue
        lanes = [i + width if i < width else i for i in range(LANES)]
        other = b.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(_I32, LANES), lanes))
        vector = b.fadd(vector, other, flags=_FUSED)
    return b.extract_element(vector, ir.Constant(_I32, 0))


def _product(
    b: Any,
    kind: int,
    data: Any,
    weights: list[Any],
    scales: list[Any],
    inputs: list[Any],
    width: Any,
    group: Any,
    ahead: Any,
) -> list[Any]:
    """Emit the code of one kind: return the products of `weights` rows with each of `inputs`.

    All that is summed stays in registers: each weight is widened once for all inputs, each input
    loaded once for all weight rows. The result has the first weight row's products first.
    """
    rows, tokens = len(weights), len(inputs)
    pairs = [(r, t) for r in range(rows) for t in range(tokens)]
    scaled = kind in EIGHTS + FOURS
    most = PART // LANES
    chunks = most if kind in FOURS or len(pairs) <= 2 else min(2, most) if len(pairs) <= 4 else 1
    step = chunks * LANES
    bases = [b.gep(data, [row]) for row in weights]
    total = [cgutils.alloca_once_value(b, _ZERO) for _ in pairs]
    sums = [cgutils.alloca_once_value(b, _ZERO) for _ in pairs]
    for place in total:
        b.store(_ZERO, place)
    span = group if scaled else width
    with cgutils.for_range(b, b.udiv(width, span)) as outer:
        begin = b.mul(outer.index, span)
        for place in sums:
            b.store(_ZERO, place)
        words, zeros = [], [ir.Constant(_I8, 8) if kind in FOURS else None] * rows
        if kind in WITH_ZERO:
            after = b.mul(outer.index, ir.Constant(_I64, 4))
            words = [_word(b, data, b.add(row, after)) for row in scales]
            zeros = [b.trunc(word, _I8) for word in words]
        with cgutils.for_range(b, b.udiv(span, ir.Constant(_I64, step))) as inner:
            at = b.add(begin, b.mul(inner.index, ir.Constant(_I64, step)))
            if rows > 1:
                byte = b.lshr(b.mul(at, ir.Constant(_I64, BITS[kind])), ir.Constant(_I64, 3))
                for base in bases:
                    _prefetch(b, base, b.add(byte, ahead))
            if kind in FOURS:
                pairs_of = zip(bases, zeros, strict=True)
                four = [_nibbles(b, base, at, zero) for base, zero in pairs_of]
            for c in range(chunks):
                here = b.add(at, ir.Constant(_I64, c * LANES))
                if kind in FOURS:
                    w = [each[c] for each in four]
                elif kind == BFLOAT16:
                    w = [_halves(b, base, here) for base in bases]
                else:
                    size = 1 if kind in EIGHTS else 4
                    pairs_of = zip(bases, zeros, strict=True)
                    w = [_floats(b, base, here, size, zero) for base, zero in pairs_of]
                for t in range(tokens):
                    place = b.bitcast(b.gep(inputs[t], [here]), _V.as_pointer())
                    x = b.load(place, align=4)
                    for r in range(rows):
                        sum_ = sums[r * tokens + t]
                        product = b.fmul(w[r], x, flags=_FUSED)
                        b.store(b.fadd(product, b.load(sum_), flags=_FUSED), sum_)
        scale = [_everywhere(b, _cut(b, word)) for word in words]
        if scaled and not words:
            after = b.mul(outer.index, ir.Constant(_I64, 4))
            scale = [_scale(b, data, b.add(row, after)) for row in scales]
        for i, (r, _) in enumerate(pairs):
            found = b.load(sums[i])
            if scaled:
                found = b.fmul(found, scale[r], flags=_FUSED)
            b.store(b.fadd(found, b.load(total[i]), flags=_FUSED), total[i])
    return [_sum(b, b.load(place)) for place in total]


def _scale(b: Any, data: Any, byte: Any) -> Any:
    """Load a float32 into every lane."""
    place = b.bitcast(b.gep(data, [byte]), _F32.as_pointer())
    return _everywhere(b, b.load(place, align=1))


def _word(b: Any, data: Any, byte: Any) -> Any:
    """Load the 32 bits of a scale and its zero-point."""
    return b.load(b.bitcast(b.gep(data, [byte]), _I32.as_pointer()), align=1)


def _cut(b: Any, word: Any) -> Any:
    """Return the scale that is left of a word without its zero-point."""
    return b.bitcast(b.and_(word, ir.Constant(_I32, -256)), _F32)


def _everywhere(b: Any, value: Any, lanes: int = LANES) -> Any:
    """Put a number into every lane."""
    nothing = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    lane = b.insert_element(nothing, value, ir.Constant(_I32, 0))
    first = ir.Constant(ir.VectorType(_I32, lanes), [0] * lanes)
    return b.shuffle_vector(lane, nothing, first)


def _make(rows: int, tokens: int) -> Callable[..., Any]:
    """Build `dot` for `rows` weight rows and `tokens` rows of `x`.

    It is called as dot(kind, slab, weights, row_bytes, scales, scale_bytes, x, width, first,
    group, ahead). `weights` and `scales` are byte offsets of the first weight row from the pointer
    `slab`, `row_bytes` and `scale_bytes` what leads to the next one; `x` points to float32 [..,
    width], its rows from `first` on are taken; `group` inputs share a scale; what lies `ahead`
    bytes behind a weight is asked for. Width and group are multiples of 32. Returns the products
    as a tuple of float32, all tokens of the first weight row first.
    """

    @intrinsic
    def dot(
        typingctx: Any,
        kind: Any,
        slab: Any,
        weights: Any,
        row_bytes: Any,
        scales: Any,
        scale_bytes: Any,
        x: Any,
        width: Any,
        first: Any,
        group: Any,
        ahead: Any,
    ) -> Any:
        result = types.UniTuple(types.float32, rows * tokens)
        whole = types.int64
        signature = result(whole, BYTES, *4 * (whole,), FLOATS, *4 * (whole,))

        def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
            kind, data, weights, row_bytes, scales, scale_bytes, x, width, first = args[:9]
            group, ahead = args[9:]
            start = b.gep(x, [b.mul(first, width)])
            inputs = [b.gep(start, [b.mul(ir.Constant(_I64, t), width)]) for t in range(tokens)]
            firsts, first_scales = [weights], [scales]
            for _ in range(rows - 1):
                firsts.append(b.add(firsts[-1], row_bytes))
                first_scales.append(b.add(first_scales[-1], scale_bytes))
            found = [cgutils.alloca_once(b, _F32) for _ in range(rows * tokens)]
            done = b.append_basic_block("done")
            switch = b.switch(kind, done)
            for each in KINDS:
                block = b.append_basic_block(f"kind{each}")
                switch.add_case(ir.Constant(_I64, each), block)
                b.position_at_end(block)
                values = _product(b, each, data, firsts, first_scales, inputs, width, group, ahead)
                for value, place in zip(values, found, strict=True):
                    b.store(value, place)
                b.branch(done)
            b.position_at_end(done)
            return cgutils.pack_array(b, [b.load(place) for place in found])

        return signature, generate

    return dot  # type: ignore[no-any-return]


BYTES, FLOATS, WHOLES = (types.CPointer(t) for t in (types.uint8, types.float32, types.int64))
dot_1x1, dot_4x1, dot_4x2, dot_2x3, dot_2x4 = (
    _make(*tile) for tile in ((1, 1), (4, 1), (4, 2), (2, 3), (2, 4))
)
"""Weight rows x activation rows: as many as sixteen vector registers can sum up at a time."""
dot_4x4 = _make(4, 4) if LANES == 16 else dot_2x4
"""With AVX-512 there are 32 registers."""


def _make_mix(rows: int) -> Callable[..., Any]:
    """Build `mix(values, first, count, shares, row, column, out)` for `rows` rows of `shares`.

    Adds to each of the `rows` rows of `out` [.., width] from `row` on the sum of the `count` rows
    of `values` [.., width] from `first` on, each times its share, from `column` on: shares [..,
    at least column + count]. All are contiguous float32, the width a multiple of 32.
    """

    @intrinsic
    def mix(
        typingctx: Any,
        values: Any,
        first: Any,
        count: Any,
        shares: Any,
        row: Any,
        column: Any,
        out: Any,
    ) -> Any:
        whole = types.int64
        signature = types.void(values, whole, whole, shares, whole, whole, out)

        def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
            kinds = signature.args
            arrays = [context.make_array(kinds[i])(context, b, args[i]) for i in (0, 3, 6)]
            width = cgutils.unpack_tuple(b, arrays[0].shape)[1]
            stride = cgutils.unpack_tuple(b, arrays[1].shape)[1]
            first, count, row, column = args[1], args[2], args[4], args[5]
            values = b.gep(arrays[0].data, [b.mul(first, width)])
            numbers = [b.add(row, ir.Constant(_I64, r)) for r in range(rows)]
            shares = [b.gep(arrays[1].data, [b.add(b.mul(n, stride), column)]) for n in numbers]
            outs = [b.gep(arrays[2].data, [b.mul(n, width)]) for n in numbers]
            part = ir.Constant(_I64, PART)
            with cgutils.for_range(b, b.udiv(width, part)) as outer:
                begin = b.mul(outer.index, part)
                at = [b.add(begin, ir.Constant(_I64, c * LANES)) for c in range(PART // LANES)]
                places = [[b.bitcast(b.gep(out, [a]), _V.as_pointer()) for a in at] for out in outs]
                sums = [[cgutils.alloca_once_value(b, _ZERO) for _ in at] for _ in outs]
                for r in range(rows):
                    for place, sum_ in zip(places[r], sums[r], strict=True):
                        b.store(b.load(place, align=4), sum_)
                with cgutils.for_range(b, count) as inner:
                    start = b.gep(values, [b.mul(inner.index, width)])
                    mine = [_everywhere(b, b.load(b.gep(s, [inner.index]))) for s in shares]
                    for c, a in enumerate(at):
                        v = b.load(b.bitcast(b.gep(start, [a]), _V.as_pointer()), align=4)
                        for r in range(rows):
                            product = b.fmul(v, mine[r], flags=_FUSED)
                            sum_ = sums[r][c]
                            b.store(b.fadd(product, b.load(sum_), flags=_FUSED), sum_)
                for r in range(rows):
                    for place, sum_ in zip(places[r], sums[r], strict=True):
                        b.store(b.load(sum_), place, align=4)
            return context.get_dummy_value()

        return signature, generate

    return mix  # type: ignore[no-any-return]


mix_1, mix_2 = (_make_mix(rows) for rows in (1, 2))


def _make_spread(rows: int) -> Callable[..., Any]:
    """Build `spread` for `rows` packed weight rows: what that many inputs add to all outputs.

    It is called as spread(kind, slab, weights, row_bytes, ahead, shares, first, out, low, high):
    adds to the columns of `out` from `low` to `high`, multiples of 32, the weight rows that begin
    `weights` bytes behind the start of `slab`, each times its share: `shares` from `first` on.
    Integers are added as they are, unscaled. What lies `ahead` bytes behind is asked for. `slab` is
    uint8, `shares` and `out` are float32, all of one dimension and contiguous.
    """

    @intrinsic
    def spread(
        typingctx: Any,
        kind: Any,
        slab: Any,
        weights: Any,
        row_bytes: Any,
        ahead: Any,
        shares: Any,
        first: Any,
        out: Any,
        low: Any,
        high: Any,
    ) -> Any:
        whole = types.int64
        signature = types.void(whole, slab, *3 * (whole,), shares, whole, out, *2 * (whole,))

        def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
            kind, _, weights, row_bytes, ahead, _, first, _, low, high = args
            kinds = signature.args
            arrays = [context.make_array(kinds[i])(context, b, args[i]).data for i in (1, 5, 7)]
            data, shares, out = arrays
            numbers = [b.add(first, ir.Constant(_I64, r)) for r in range(rows)]
            mine = [_everywhere(b, b.load(b.gep(shares, [n]))) for n in numbers]
            bases = [b.gep(data, [weights])]
            for _ in range(rows - 1):
                bases.append(b.gep(bases[-1], [row_bytes]))
            done = b.append_basic_block("done")
            switch = b.switch(kind, done)
            for each in (FLOAT32, BFLOAT16, INT8, INT4):
                block = b.append_basic_block(f"kind{each}")
                switch.add_case(ir.Constant(_I64, each), block)
                b.position_at_end(block)
                _spread(b, each, bases, ahead, mine, out, low, high)
                b.branch(done)
            b.position_at_end(done)
            return context.get_dummy_value()

        return signature, generate

    return spread  # type: ignore[no-any-return]


def _spread(
    b: Any,
    kind: int,
    bases: list[Any],
    ahead: Any,
    shares: list[Any],
    out: Any,
    low: Any,
    high: Any,
) -> None:
    """Emit the code of one kind: 32 columns at a time, sums in registers, rows in their order."""
    parts = range(PART // LANES)
    with cgutils.for_range_slice(b, low, high, ir.Constant(_I64, PART)) as (at, _):
        byte = b.lshr(b.mul(at, ir.Constant(_I64, BITS[kind])), ir.Constant(_I64, 3))
        columns = [b.add(at, ir.Constant(_I64, c * LANES)) for c in parts]
        places = [b.bitcast(b.gep(out, [column]), _V.as_pointer()) for column in columns]
        sums = [b.load(place, align=4) for place in places]
        for base, share in zip(bases, shares, strict=True):
            _prefetch(b, base, b.add(byte, ahead))
            if kind == INT4:
                w = _nibbles(b, base, at, ir.Constant(_I8, 8))
            elif kind == BFLOAT16:
                w = [_halves(b, base, column) for column in columns]
            else:
                w = [_floats(b, base, column, 1 if kind == INT8 else 4) for column in columns]
            for c in parts:
                sums[c] = b.fadd(b.fmul(w[c], share, flags=_FUSED), sums[c], flags=_FUSED)
        for place, found in zip(places, sums, strict=True):
            b.store(found, place, align=4)


spread_1, spread_8 = (_make_spread(rows) for rows in (1, 8))

ROWS = types.void(
    BYTES, WHOLES, types.int64, types.int64, FLOATS, types.int64, FLOATS, *4 * (types.int64,)
)
"""The C signature of the function that `call_rows` calls."""


@intrinsic
def call_rows(
    typingctx: Any,
    address: Any,
    slab: Any,
    matrix: Any,
    low: Any,
    high: Any,
    x: Any,
    y: Any,
    column: Any,
    add: Any,
) -> Any:
    """Call the function of signature ROWS at `address`.

    A call by address keeps the many kernels out of every function that uses them: compiling these
    takes a fifth of the time.
    """
    whole = types.int64
    signature = types.void(whole, slab, matrix, whole, whole, x, y, whole, whole)

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return _call_rows(context, b, signature, (*args, args[4]))

    return signature, generate


@intrinsic
def call_rows_then(
    typingctx: Any,
    address: Any,
    slab: Any,
    matrix: Any,
    low: Any,
    high: Any,
    x: Any,
    y: Any,
    column: Any,
    add: Any,
    then: Any,
) -> Any:
    """Do as `call_rows` does, where the rows from `then` on, not those behind, are needed next."""
    whole = types.int64
    signature = types.void(whole, slab, matrix, whole, whole, x, y, whole, whole, whole)
    return signature, _call_rows


def _call_rows(context: Any, b: Any, signature: Any, args: Any) -> Any:
    address, _, _, low, high, _, _, column, add, then = args
    kinds = signature.args
    arrays = [context.make_array(kinds[i])(context, b, args[i]) for i in (1, 2, 5, 6)]
    tokens = cgutils.unpack_tuple(b, arrays[2].shape)[0]
    stride = cgutils.unpack_tuple(b, arrays[3].shape)[1]
    given = [arrays[0].data, arrays[1].data, low, high, arrays[2].data, tokens]
    given += [arrays[3].data, stride, column, add, then]
    kind = ir.FunctionType(ir.VoidType(), [value.type for value in given])
    b.call(b.inttoptr(address, kind.as_pointer()), given)
    return context.get_dummy_value()


@intrinsic
def float_of_bits(typingctx: Any, bits: Any) -> Any:
    """Return the float32 that a uint32 holds."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.bitcast(args[0], _F32)

    return types.float32(types.uint32), generate
