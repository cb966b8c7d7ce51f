"""Inner products of one packed weight row with a few activation rows, as vector code.

numba's own loops leave half of the memory bus unused for bytes, and more for nibbles; these are
built instruction by instruction through its IR, for the vector width of AVX2. A row is read once
for up to eight activation rows. The functions
`dot_1`, `dot_4` and `dot_8` are for as many activation rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils
from numba.core import types as numba_types
from numba.extending import intrinsic

types: Any = numba_types
LANES = 8
FLOAT32, BFLOAT16, INT8, INT4 = KINDS = range(4)
"""How a matrix is stored. INT8 and INT4 are symmetric, with a float32 scale per group of inputs."""

INT4_BLOCK = 32
"""Inputs whose nibbles share 16 bytes: byte i holds input i low and input i + 16 high."""

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_F32 = ir.FloatType()
_V = ir.VectorType(_F32, LANES)
_ZERO = ir.Constant(_V, [0.0] * LANES)
_FAST = ("fast",)


def _load(b: Any, base: Any, byte: Any, kind: ir.VectorType) -> Any:
    """Load a vector from `base` plus `byte` bytes, aligned or not."""
    return b.load(b.bitcast(b.gep(base, [byte]), kind.as_pointer()), align=1)


def _floats(b: Any, base: Any, at: Any, width: int) -> Any:
    """Return the LANES weights at element `at`, of 4-, 2- or 1-byte values, as float32."""
    byte = b.mul(at, ir.Constant(_I64, width))
    if width == 4:
        return _load(b, base, byte, _V)
    if width == 1:
        raw = _load(b, base, byte, ir.VectorType(_I8, LANES))
        return b.sitofp(b.sext(raw, ir.VectorType(_I32, LANES)), _V)
    raise AssertionError


def _halves(b: Any, base: Any, at: Any) -> Any:
    """Return the LANES bfloat16 weights at element `at`, as float32."""
    wide = ir.VectorType(_I32, LANES)
    raw = _load(b, base, b.mul(at, ir.Constant(_I64, 2)), ir.VectorType(_I16, LANES))
    return b.bitcast(b.shl(b.zext(raw, wide), ir.Constant(wide, [16] * LANES)), _V)


def _nibbles(b: Any, base: Any, at: Any) -> list[Any]:
    """Return the INT4_BLOCK weights from element `at` as four vectors, in order."""
    half = INT4_BLOCK // 2
    raw_type, wide = ir.VectorType(_I8, half), ir.VectorType(_I32, LANES)
    raw = _load(b, base, b.lshr(at, ir.Constant(_I64, 1)), raw_type)
    low = b.and_(raw, ir.Constant(raw_type, [15] * half))
    high = b.lshr(raw, ir.Constant(raw_type, [4] * half))
    found = []
    for part in (low, high):
        signed = b.sub(part, ir.Constant(raw_type, [8] * half))
        for first in (0, LANES):
            lanes = ir.Constant(ir.VectorType(_I32, LANES), list(range(first, first + LANES)))
            eight = b.shuffle_vector(signed, ir.Constant(raw_type, ir.Undefined), lanes)
            found.append(b.sitofp(b.sext(eight, wide), _V))
    return found


def _sum(b: Any, vector: Any) -> Any:
    """Add up the lanes."""
    for width in (4, 2, 1):
        lanes = [i + width if i < width else i for i in range(LANES)]
        other = b.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(_I32, LANES), lanes))
        vector = b.fadd(vector, other, flags=_FAST)
    return b.extract_element(vector, ir.Constant(_I32, 0))


def _product(
    b: Any,
    kind: int,
    data: Any,
    weights: Any,
    scales: Any,
    inputs: list[Any],
    width: Any,
    group: Any,
) -> list[Any]:
    """Emit the code of one kind: return the products of a row with each of `inputs`."""
    tokens = len(inputs)
    scaled = kind in {INT8, INT4}
    chunks = 4 if kind == INT4 or tokens <= 2 else 2 if tokens == 4 else 1
    apart = 4 if tokens == 1 else 2 if tokens <= 4 else 1  # sums a token: all must fit in registers
    step = chunks * LANES
    base = b.gep(data, [weights])
    total = [cgutils.alloca_once_value(b, _ZERO) for _ in range(tokens)]
    # Several sums a token, so that one addition doesn't wait for the one before.
    sums = [[cgutils.alloca_once_value(b, _ZERO) for _ in range(apart)] for _ in range(tokens)]
    for place in total:
        b.store(_ZERO, place)
    span = group if scaled else width
    with cgutils.for_range(b, b.udiv(width, span)) as outer:
        begin = b.mul(outer.index, span)
        for place in (place for mine in sums for place in mine):
            b.store(_ZERO, place)
        with cgutils.for_range(b, b.udiv(span, ir.Constant(_I64, step))) as inner:
            at = b.add(begin, b.mul(inner.index, ir.Constant(_I64, step)))
            four = _nibbles(b, base, at) if kind == INT4 else []
            for c in range(chunks):
                here = b.add(at, ir.Constant(_I64, c * LANES))
                if kind == INT4:
                    w = four[c]
                elif kind == BFLOAT16:
                    w = _halves(b, base, here)
                else:
                    w = _floats(b, base, here, 1 if kind == INT8 else 4)
                for t in range(tokens):
                    place = b.bitcast(b.gep(inputs[t], [here]), _V.as_pointer())
                    product = b.fmul(w, b.load(place, align=4), flags=_FAST)
                    sum_ = sums[t][c % apart]
                    b.store(b.fadd(product, b.load(sum_), flags=_FAST), sum_)
        if scaled:
            byte = b.add(scales, b.mul(outer.index, ir.Constant(_I64, 4)))
            scale = _scale(b, data, byte)
        for t in range(tokens):
            found = b.load(sums[t][0])
            for place in sums[t][1:]:
                found = b.fadd(found, b.load(place), flags=_FAST)
            if scaled:
                found = b.fmul(found, scale, flags=_FAST)
            b.store(b.fadd(found, b.load(total[t]), flags=_FAST), total[t])
    return [_sum(b, b.load(place)) for place in total]


def _scale(b: Any, data: Any, byte: Any) -> Any:
    """Load a float32 into every lane."""
    place = b.bitcast(b.gep(data, [byte]), _F32.as_pointer())
    nothing = ir.Constant(_V, ir.Undefined)
    lane = b.insert_element(nothing, b.load(place, align=1), ir.Constant(_I32, 0))
    lanes = ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES)
    return b.shuffle_vector(lane, nothing, lanes)


def _make(tokens: int) -> Callable[..., Any]:
    """Build `dot(kind, slab, weights, scales, x, width, first, group)` for `tokens` rows of `x`.

    `weights` and `scales` are byte offsets of the weight row from the pointer `slab`; `x` points to
    float32 [rows, width], its rows from `first` on are taken; `group` inputs share a scale. Width
    and group are multiples of 32. Returns the products as a tuple of float32.
    """

    @intrinsic
    def dot(
        typingctx: Any,
        kind: Any,
        slab: Any,
        weights: Any,
        scales: Any,
        x: Any,
        width: Any,
        first: Any,
        group: Any,
    ) -> Any:
        result = types.UniTuple(types.float32, tokens)
        whole = types.int64
        signature = result(whole, BYTES, whole, whole, FLOATS, whole, whole, whole)

        def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
            kind, data, weights, scales, x, width, first, group = args
            start = b.gep(x, [b.mul(first, width)])
            inputs = [b.gep(start, [b.mul(ir.Constant(_I64, t), width)]) for t in range(tokens)]
            found = [cgutils.alloca_once(b, _F32) for _ in range(tokens)]
            done = b.append_basic_block("done")
            switch = b.switch(kind, done)
            for each in KINDS:
                block = b.append_basic_block(f"kind{each}")
                switch.add_case(ir.Constant(_I64, each), block)
                b.position_at_end(block)
                values = _product(b, each, data, weights, scales, inputs, width, group)
                for value, place in zip(values, found, strict=True):
                    b.store(value, place)
                b.branch(done)
            b.position_at_end(done)
            return cgutils.pack_array(b, [b.load(place) for place in found])

        return signature, generate

    return dot  # type: ignore[no-any-return]


BYTES, FLOATS, WHOLES = (types.CPointer(t) for t in (types.uint8, types.float32, types.int64))
dot_1, dot_4, dot_8 = (_make(tokens) for tokens in (1, 4, 8))

ROWS = types.void(
    BYTES, WHOLES, types.int64, types.int64, FLOATS, types.int64, FLOATS, *3 * (types.int64,)
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
        address, _, _, low, high, _, _, column, add = args
        kinds = signature.args
        arrays = [context.make_array(kinds[i])(context, b, args[i]) for i in (1, 2, 5, 6)]
        tokens = cgutils.unpack_tuple(b, arrays[2].shape)[0]
        stride = cgutils.unpack_tuple(b, arrays[3].shape)[1]
        given = [arrays[0].data, arrays[1].data, low, high, arrays[2].data, tokens]
        given += [arrays[3].data, stride, column, add]
        kind = ir.FunctionType(ir.VoidType(), [value.type for value in given])
        b.call(b.inttoptr(address, kind.as_pointer()), given)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def float_of_bits(typingctx: Any, bits: Any) -> Any:
    """Return the float32 that a uint32 holds."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.bitcast(args[0], _F32)

    return types.float32(types.uint32), generate
