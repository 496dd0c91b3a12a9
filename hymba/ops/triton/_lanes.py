"""Sums over the channels of a one-warp tile, by halves: 16 shuffles for 16 sums instead of 80.

The compiler's own reduction sends every value through five exchanges. Here each exchange also halves what a lane is
responsible for, so that 8 + 4 + 2 + 1 + 1 exchanges leave one finished sum per pair of lanes. PTX, because a tile
expression cannot say which lane holds what.
"""

from __future__ import annotations

import triton
import triton.language as tl


def _halving() -> str:
    """In: 16 floats ($8..$23), their lane eight times ($24..$31) and their rows, 0 to 7 ($32..$39).

    Out: $0, the warp's sum of number lane >> 1, the rest unset. NaN if lanes or rows say that the layout is another
    than this is written for; where they do not, the question folds to one comparison.
    """
    lines = [".reg .pred p, wrong;", ".reg .b32 bit, keep, send, other, differs;"]
    lines += ["mov.u32 differs, %laneid;", "xor.b32 differs, differs, $24;"]
    for got, expected in [(24 + i, "$24") for i in range(1, 8)] + [(32 + i, i) for i in range(8)]:
        lines += [f"xor.b32 other, ${got}, {expected};", "or.b32 differs, differs, other;"]
    lines += ["setp.ne.u32 wrong, differs, 0;"]
    lines += [".reg .f32 v<16>;"] + [f"mov.f32 v{i}, ${8 + i};" for i in range(16)]
    for half, mask in ((8, 16), (4, 8), (2, 4), (1, 2)):
        lines += [f"and.b32 bit, $24, {mask};", "setp.ne.u32 p, bit, 0;"]
        for i in range(half):
            lines += [
                f"selp.b32 keep, v{i + half}, v{i}, p;",
                f"selp.b32 send, v{i}, v{i + half}, p;",
                f"shfl.sync.bfly.b32 other, send, {mask}, 31, 0xffffffff;",
                f"add.f32 v{i}, keep, other;",
            ]
    lines += ["shfl.sync.bfly.b32 other, v0, 1, 31, 0xffffffff;", "add.f32 v0, v0, other;"]
    lines += ["selp.f32 $0, 0f7FFFFFFF, v0, wrong;"]
    return "{\n" + "\n".join(lines) + "\n}"


HALVING = tl.constexpr(_halving())
HALVING_REGISTERS = tl.constexpr(",".join(["=f"] * 8 + ["f"] * 16 + ["r"] * 16))


@triton.jit
def sum_lanes(first, second, t, BD: tl.constexpr, V: tl.constexpr):
    """Two tiles (8, BD) of one warp, V neighbouring channels to a lane, summed over channels.

    Number i of 32 is the sum of row (i >> 1) & 7 of tile i >> 4.
    """
    first = tl.sum(tl.sum(tl.reshape(first, [8, BD // (32 * V), 32, V]), 3), 1)
    second = tl.sum(tl.sum(tl.reshape(second, [8, BD // (32 * V), 32, V]), 3), 1)
    lane = tl.broadcast_to(tl.arange(0, 32)[None, :], [8, 32])
    step = tl.broadcast_to(tl.arange(0, 8)[:, None], [8, 32])
    operands = [first, second, lane, step]
    out = tl.inline_asm_elementwise(HALVING, HALVING_REGISTERS, operands, dtype=tl.float32, is_pure=True, pack=8)
    bits = out.to(tl.int32, bitcast=True)
    return tl.sum(tl.where((t == 0)[:, None], bits, 0), 0).to(tl.float32, bitcast=True)
