"""Short messages between GPUs: a rank writes packets into the memory of the others.

A packet of 8 bytes is 4 of the message and the message's number. Who reads it sees by the latter that the former have
come: nobody waits for a fence, a flag, or a read across the link, which take most of a short message's time (NCCL calls
this protocol LL). Packets lie in memory of their own, for even and odd messages, which is used again as boards are
(`all_reduce.py`).

A place is 8 bytes of a message, two packets that one thread writes at once. Neighbors write side by side, so that whole
lines go across the link, and each waits for its own packets alone.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from miinb.kernels.dispatch import fail_after, jit, tl


@jit
def number_of(epoch):
    """What the packets of a message carry: never 0, which is there before the first."""
    return ((epoch & 0x7FFFFFFF) + 1).to(tl.int32)


@jit
def count_on(epochs, epoch, program, programs, PROGRAMS: tl.constexpr):
    """Note the number of this message, for the programs that a launch lacks as well."""
    tl.debug_barrier()  # every warp has read the number before one of them counts on
    place = tl.arange(0, PROGRAMS)
    tl.store(epochs + place, epoch, mask=place % programs == program)


@jit
def packets_of(memory, of, limit):
    """Where a rank's packets of a half (even or odd messages) begin: two bytes of packets for each of a message."""
    return tl.multiple_of((memory + of * 2 * limit).to(tl.pointer_type(tl.int64)), 16)


@jit
def push(packets, numbers, message, inside, INTERPRETED: tl.constexpr):
    """Two packets a place: each is there at once, whoever looks at it meanwhile."""
    mark = message.to(tl.int64) << 32
    first, second = numbers & 0xFFFFFFFF | mark, numbers >> 32 & 0xFFFFFFFF | mark
    if INTERPRETED:
        tl.store(packets, first, mask=inside)
        tl.store(packets + 1, second, mask=inside)
    else:
        tl.inline_asm_elementwise(
            """{
            .reg .pred there;
            setp.ne.s32 there, $4, 0;
            @there st.relaxed.sys.global.v2.b64 [$1], {$2, $3};
            mov.b32 $0, 0;
            }""",
            "=r,l,l,l,r",
            [packets.to(tl.int64), first, second, inside.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@jit
def wait_for_packets(packets, message, inside, MOST_LOOKS: tl.constexpr, INTERPRETED: tl.constexpr):
    """The 8 bytes of each place, as soon as its two packets are of this message."""
    if INTERPRETED:
        mark = message.to(tl.int64) << 32
        first, second = tl.load(packets, mask=inside, other=0), tl.load(packets + 1, mask=inside, other=0)
        looks = 0
        while tl.max(tl.where(inside & (((first ^ mark) | (second ^ mark)) >> 32 != 0), 1, 0), 0) > 0:
            first, second = tl.load(packets, mask=inside, other=0), tl.load(packets + 1, mask=inside, other=0)
            looks += 1
            fail_after(looks, MOST_LOOKS)
        return first & 0xFFFFFFFF | second << 32
    return tl.inline_asm_elementwise(
        """{
        .reg .pred go_on;
        .reg .b32 first, second, first_mark, second_mark, looks;
        .reg .b64 packet, next;
        mov.b32 looks, $4;
        mov.b32 first, 0;
        mov.b32 second, 0;
        setp.eq.s32 go_on, $3, 0;
        @go_on bra CAME;
        LOOK:
        ld.relaxed.sys.global.v2.b64 {packet, next}, [$1];
        mov.b64 {first, first_mark}, packet;
        mov.b64 {second, second_mark}, next;
        sub.s32 looks, looks, 1;
        setp.eq.s32 go_on, looks, 0;
        @go_on trap;
        setp.ne.s32 go_on, first_mark, $2;
        @go_on bra LOOK;
        setp.ne.s32 go_on, second_mark, $2;
        @go_on bra LOOK;
        CAME:
        mov.b64 $0, {first, second};
        }""",
        "=l,l,r,r,r",
        [packets.to(tl.int64), message, inside.to(tl.int32), MOST_LOOKS],
        dtype=tl.int64,
        is_pure=False,
        pack=1,
    )
