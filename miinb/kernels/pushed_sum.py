"""The kernel of `all_reduce.py` for short messages: each rank writes its part into the memory of the others.

A packet of 8 bytes is two numbers and the number of their message. Who reads it sees by the latter that the former have
come: nobody waits for a fence, a flag, or a read across the link, which take most of a short message's time (NCCL calls
this protocol LL). Packets lie in memory of their own, for even and odd messages, which is used again as boards are.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from miinb.kernels.dispatch import fail_after, jit, tl, wait_for_inputs


# Kernels' long parameter lists stay in rows.
# fmt: off
@jit(plain=("rank", "rows"))
def pushed_sum(
    x, residual, weight, bias, y, total, addresses, epochs, rank, rows, hidden, start, limit, eps,
    RANKS: tl.constexpr, PROGRAMS: tl.constexpr, MOST_LOOKS: tl.constexpr, NORM: tl.constexpr, CENTERED: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, HAS_BIAS: tl.constexpr, KEEP: tl.constexpr, BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr, PDL: tl.constexpr,
):
    """A program takes every n-th row. `start` is where packets begin in a rank's memory, `limit` of how many messages'
    bytes one rank's are; a word is two numbers of a row.
    """
    program, programs, words = tl.program_id(0), tl.num_programs(0), hidden // 2
    word = tl.arange(0, BLOCK)
    inside = word < words
    if NORM:
        scale, other_scale = _two(weight, word, inside)
    if HAS_BIAS:
        shift, other_shift = _two(bias, word, inside)
    memories = ()
    for peer in tl.static_range(RANKS):
        memories = memories + (tl.load(addresses + peer) + start,)  # type: ignore[assignment]  # noqa: RUF005
    mine = tl.load(addresses + rank) + start
    wait_for_inputs(PDL)
    epoch = tl.load(epochs + program) + 1
    number = (epoch & 0x7FFFFFFF) + 1  # never 0, which is there before the first message
    half = (epoch & 1) * RANKS
    for row in range(program, rows, programs):
        at = row * words + word
        packet = tl.load(_words(x) + at, mask=inside, other=0).to(tl.int64) & 0xFFFFFFFF | number << 32
        for peer in tl.static_range(RANKS):
            _push(_packets(memories[peer], half + rank, limit) + at, packet, inside, INTERPRETED)
    place = tl.arange(0, PROGRAMS)
    tl.store(epochs + place, epoch, mask=place % programs == program)  # those that this launch lacks count, too
    for row in range(program, rows, programs):
        at = row * words + word
        wide, other_wide = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        if HAS_RESIDUAL:  # on its way while this program waits
            more, other_more = _two(residual + row * hidden, word, inside)
        for source in tl.static_range(RANKS):
            came = _wait(_packets(mine, half + source, limit) + at, inside, number, MOST_LOOKS)
            one, other = _halves(came, x)
            wide += one
            other_wide += other
        if HAS_RESIDUAL:
            wide += more
            other_wide += other_more
        if KEEP:
            wide, other_wide = wide.to(x.dtype.element_ty), other_wide.to(x.dtype.element_ty)
            _write(total, at, wide, other_wide, inside)
            wide, other_wide = wide.to(tl.float32), other_wide.to(tl.float32)
        if NORM:
            wide, other_wide = _normalized(wide, other_wide, inside, hidden, eps, x.dtype.element_ty, CENTERED)
            wide, other_wide = wide * scale, other_wide * other_scale
            if HAS_BIAS:
                wide += shift
                other_wide += other_shift
            _write(y, at, wide.to(x.dtype.element_ty), other_wide.to(x.dtype.element_ty), inside)


@jit
def _normalized(first, second, inside, hidden, eps, dtype: tl.constexpr, CENTERED: tl.constexpr):
    """`norm.normalize` of a row in two halves."""
    if CENTERED:
        mean = (tl.sum(first, 0) + tl.sum(second, 0)) / hidden
        first, second = tl.where(inside, first - mean, 0.0), tl.where(inside, second - mean, 0.0)
    inverse = tl.rsqrt(tl.sum(first * first + second * second, 0) / hidden + eps)
    first, second = first * inverse, second * inverse
    if not CENTERED:
        first, second = first.to(dtype).to(tl.float32), second.to(dtype).to(tl.float32)
    return first, second


@jit
def _words(x):
    """A pointer to numbers of two bytes as one to pairs of them."""
    return tl.multiple_of(x.to(tl.pointer_type(tl.int32)), 16)


@jit
def _packets(memory, of, limit):
    """Where a rank's packets of a half begin: two bytes of packets for each of a message."""
    return tl.multiple_of((memory + of * 2 * limit).to(tl.pointer_type(tl.int64)), 16)


@jit
def _halves(words, x):
    """The two numbers of each word, in fp32."""
    first = (words & 0xFFFF).to(tl.int16).to(x.dtype.element_ty, bitcast=True)
    second = (words >> 16 & 0xFFFF).to(tl.int16).to(x.dtype.element_ty, bitcast=True)
    return first.to(tl.float32), second.to(tl.float32)


@jit
def _two(row, word, inside):
    """The numbers of a row at even places, and at odd ones."""
    return _halves(tl.load(_words(row) + word, mask=inside, other=0), row)


@jit
def _write(row, at, first, second, inside):
    low = first.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    high = second.to(tl.int16, bitcast=True).to(tl.int32) << 16
    tl.store(_words(row) + at, low | high, mask=inside)


@jit
def _push(places, packets, inside, INTERPRETED: tl.constexpr):
    """Each packet at once, whoever looks at it meanwhile."""
    if INTERPRETED:
        tl.store(places, packets, mask=inside)
    else:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $3, 0; @p st.relaxed.sys.global.b64 [$1], $2; mov.b32 $0, 0; }",
            "=r,l,l,r", [places.to(tl.int64), packets, inside.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
        )


@jit
def _wait(places, inside, number, MOST_LOOKS: tl.constexpr):
    """The words of the packets, as soon as all of them are of this message."""
    packets = tl.load(places, mask=inside, other=0, volatile=True)
    looks = 0
    while tl.max(tl.where(inside & (packets >> 32 & 0xFFFFFFFF != number), 1, 0), 0) > 0:
        packets = tl.load(places, mask=inside, other=0, volatile=True)
        looks += 1
        fail_after(looks, MOST_LOOKS)
    return packets.to(tl.int32)
