"""The Hadamard transform of the sums of `decode_warp`, in the registers of a warp."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


def hadamard_asm() -> str:
    """PTX: the Hadamard transform of each column of sums [16, 8], of which a lane has 4.

    Lane 4r + c has rows r and r + 8 of two columns, so a step pairs registers or lanes 4, 8, 16 apart.
    """
    lines = [
        ".reg .f32 x0, x1, x2, x3, y, s; .reg .b32 t; .reg .pred p;",
        "add.f32 x0, $4, $6; add.f32 x1, $5, $7; sub.f32 x2, $4, $6; sub.f32 x3, $5, $7;",
    ]
    for step in (4, 8, 16):
        lines.append(f"mov.u32 t, %laneid; and.b32 t, t, {step};")
        lines.append("setp.eq.u32 p, t, 0; selp.f32 s, 1.0, -1.0, p;")
        for i in range(4):
            lines.append(f"shfl.sync.bfly.b32 y, x{i}, {step}, 31, -1; fma.rn.f32 x{i}, x{i}, s, y;")
    lines += [f"mov.f32 ${i}, x{i};" for i in range(4)]
    return "{" + "\n".join(lines) + "}"


HADAMARD_16 = gl.constexpr(hadamard_asm())


@gluon.jit
def butterflies(x, COUNT: gl.constexpr, END: gl.constexpr):
    """Sums and differences of the COUNT tensors whose numbers differ in a bit, for the bits below END."""
    for bit in gl.static_range(4):
        if 1 << bit < END:
            y = ()
            for i in gl.static_range(COUNT):
                if i >> bit & 1:
                    y += (x[i - (1 << bit)] - x[i],)
                else:
                    y += (x[i] + x[i + (1 << bit)],)
            x = y
    return x


@gluon.jit
def hadamard(tiles, COUNT: gl.constexpr):
    """The Hadamard transform over the 16 * COUNT dims of sums, COUNT tiles [16, N] in any order of bits."""
    x = ()
    for i in gl.static_range(COUNT):
        y = gl.inline_asm_elementwise(HADAMARD_16, "=f,=f,=f,=f,f,f,f,f", [tiles[i]], gl.float32, True, 4)
        x += (y,)
    return butterflies(x, COUNT, COUNT)
