"""The kernel of `all_reduce.py` for short messages: each rank writes its part into the memory of the others."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from miinb.kernels.dispatch import jit, tl, wait_for_inputs
from miinb.kernels.packets import count_on, number_of, packets_of, push, wait_for_packets


# Kernels' long parameter lists stay in rows.
# fmt: off
@jit(plain=("rank", "rows"))
def pushed_sum(
    x, residual, weight, bias, y, total, addresses, epochs, rank, rows, hidden, start, limit, eps,
    RANKS: tl.constexpr, PROGRAMS: tl.constexpr, MOST_LOOKS: tl.constexpr, NORMS: tl.constexpr, CENTERED: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, HAS_BIAS: tl.constexpr, KEEP: tl.constexpr, BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr, PDL: tl.constexpr,
):
    """A program takes every n-th row. `start` is where packets begin in a rank's memory, `limit` of how many messages'
    bytes one rank's are; a place is four numbers of a row, which two packets carry.
    """
    program, programs, places = tl.program_id(0), tl.num_programs(0), hidden // 4
    place = tl.max_contiguous(tl.arange(0, BLOCK), 1)  # 8 bytes of each lane: more would pull their packets apart
    inside = place < places
    scales, shifts, memories = (), (), ()
    for i in tl.static_range(NORMS):
        scales = scales + (_four(weight, i * places + place, inside),)  # type: ignore[assignment]  # noqa: RUF005
        if HAS_BIAS:
            shifts = shifts + (_four(bias, i * places + place, inside),)  # type: ignore[assignment]  # noqa: RUF005
    for peer in tl.static_range(RANKS):
        memories = memories + (tl.load(addresses + peer) + start,)  # type: ignore[assignment]  # noqa: RUF005
    mine = tl.load(addresses + rank) + start
    wait_for_inputs(PDL)
    epoch = tl.load(epochs + program) + 1
    number = number_of(epoch)
    half = (epoch & 1) * RANKS
    for row in range(program, rows, programs):
        at = row * places + place
        numbers = tl.load(_quads(x) + at, mask=inside, other=0)
        for peer in tl.static_range(RANKS):
            if peer != rank:
                push(packets_of(memories[peer], half + rank, limit) + 2 * at, numbers, number, inside, INTERPRETED)
    count_on(epochs, epoch, program, programs, PROGRAMS)
    for row in range(program, rows, programs):
        at = row * places + place
        own = tl.load(_quads(x) + at, mask=inside, other=0)
        if HAS_RESIDUAL:  # on its way while this program waits
            more = _four(residual, at, inside)
        wide = _zeros(BLOCK)
        for source in tl.static_range(RANKS):
            came = own
            if source != rank:
                packets = packets_of(mine, half + source, limit) + 2 * at
                came = wait_for_packets(packets, number, inside, MOST_LOOKS, INTERPRETED)
            wide = _sum(wide, _numbers(came, x))
        if HAS_RESIDUAL:
            wide = _sum(wide, more)
        if KEEP:
            kept = _bits(wide, x)
            tl.store(_quads(total) + at, kept, mask=inside)
            wide = _numbers(kept, x)
        if NORMS > 0:
            wide = _normalized(wide, inside, hidden, eps, CENTERED)
            if not CENTERED:
                wide = _numbers(_bits(wide, x), x)  # as `norm.rms_norm` rounds
        for i in tl.static_range(NORMS):
            result = _product(wide, scales[i])
            if HAS_BIAS:
                result = _sum(result, shifts[i])
            tl.store(_quads(y) + i * rows * places + at, _bits(result, x), mask=inside)


@jit
def _normalized(wide, inside, hidden, eps, CENTERED: tl.constexpr):
    """`norm.normalize` of a row in four parts."""
    if CENTERED:
        mean = tl.sum(wide[0] + wide[1] + wide[2] + wide[3], 0) / hidden
        wide = (
            tl.where(inside, wide[0] - mean, 0.0), tl.where(inside, wide[1] - mean, 0.0),
            tl.where(inside, wide[2] - mean, 0.0), tl.where(inside, wide[3] - mean, 0.0),
        )
    squares = _product(wide, wide)
    inverse = tl.rsqrt(tl.sum(squares[0] + squares[1] + squares[2] + squares[3], 0) / hidden + eps)
    return wide[0] * inverse, wide[1] * inverse, wide[2] * inverse, wide[3] * inverse


@jit
def _zeros(BLOCK: tl.constexpr):
    zeros = tl.zeros([BLOCK], tl.float32)
    return zeros, zeros, zeros, zeros


@jit
def _sum(a, b):
    return a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3]


@jit
def _product(a, b):
    return a[0] * b[0], a[1] * b[1], a[2] * b[2], a[3] * b[3]


@jit
def _quads(x):
    """A pointer to numbers of two bytes as one to four of them."""
    return tl.multiple_of(x.to(tl.pointer_type(tl.int64)), 16)


@jit
def _four(row, at, inside):
    return _numbers(tl.load(_quads(row) + at, mask=inside, other=0), row)


@jit
def _numbers(quads, like):
    """The four numbers of each place, in fp32."""
    dtype: tl.constexpr = like.dtype.element_ty
    return (
        quads.to(tl.int16).to(dtype, bitcast=True).to(tl.float32),
        (quads >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32),
        (quads >> 32).to(tl.int16).to(dtype, bitcast=True).to(tl.float32),
        (quads >> 48).to(tl.int16).to(dtype, bitcast=True).to(tl.float32),
    )


@jit
def _bits(wide, like):
    """Four numbers a place, rounded, as they lie in memory."""
    dtype: tl.constexpr = like.dtype.element_ty
    quads = wide[3].to(dtype).to(tl.int16, bitcast=True).to(tl.int64)
    for i in tl.static_range(3):
        quads = quads << 16 | wide[2 - i].to(dtype).to(tl.int16, bitcast=True).to(tl.int64) & 0xFFFF
    return quads
