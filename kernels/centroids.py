"""Words of four packed bytes to float16 centroids, for kernels that take them through the tensor cores."""

import torch
import triton
import triton.language as tl
from triton.language import float16

from .bits import FP16_UNIT, codes_per_byte, unpack_asm, unpack_constraints


def asm_for(bits: int, device: torch.device) -> str:
    """`unpack_asm` where there is an instruction that makes e4m3 float16, else nothing."""
    is_nvidia = device.type == "cuda" and torch.version.cuda is not None
    return unpack_asm(bits) if is_nvidia and torch.cuda.get_device_capability(device) >= (8, 9) else ""


@triton.constexpr_function
def unit_of(asm):
    """What `centroids` are divided by: the instruction gives them as they are, shifted bits do not."""
    return 1.0 if asm else FP16_UNIT.value


@triton.jit
def quad(a, b, c, d):
    """Four tensors of one shape, side by side in a new last dimension."""
    x = tl.permute(tl.join(tl.join(a, b), tl.join(c, d)), [0, 1, 3, 2])
    return tl.reshape(x, [a.shape[0], a.shape[1], 4])


@triton.jit
def centroids(
    words, signs, BITS: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr, TABLE: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Words of four packed bytes [A, B] -> [A, B, 4, codes of a byte]: fp16 centroids over `unit_of(ASM)`.

    Of 3 bits the words have the magnitudes, and bits 0, 2, 4, 6 of the bytes of `signs` the signs. `ASM` is
    `unpack_asm`, or empty where there is no instruction for it.
    """
    A: tl.constexpr = words.shape[0]
    B: tl.constexpr = words.shape[1]
    if ASM != "":
        table = tl.full([A, B], TABLE, tl.uint32).to(tl.int32, bitcast=True)
        # The types of the results are written out: Triton 3.9 takes no computed tuple of them.
        if BITS == 8:
            x = tl.inline_asm_elementwise(ASM, unpack_constraints(BITS), [words, table], (
                float16, float16, float16, float16), is_pure=True, pack=1)  # fmt: skip
            return tl.reshape(quad(x[0], x[1], x[2], x[3]), [A, B, 4, 1])
        elif BITS == 4:
            x = tl.inline_asm_elementwise(ASM, unpack_constraints(BITS), [words, table], (
                float16, float16, float16, float16, float16, float16, float16, float16,
            ), is_pure=True, pack=1)  # fmt: skip
            return tl.join(quad(x[0], x[1], x[2], x[3]), quad(x[4], x[5], x[6], x[7]))
        else:
            x = tl.inline_asm_elementwise(ASM, unpack_constraints(BITS), [words, table, signs], (
                float16, float16, float16, float16, float16, float16, float16, float16,
                float16, float16, float16, float16, float16, float16, float16, float16,
            ), is_pure=True, pack=1)  # fmt: skip
            first = tl.join(quad(x[0], x[1], x[2], x[3]), quad(x[4], x[5], x[6], x[7]))
            last = tl.join(quad(x[8], x[9], x[10], x[11]), quad(x[12], x[13], x[14], x[15]))
            return tl.reshape(tl.permute(tl.join(first, last), [0, 1, 2, 4, 3]), [A, B, 4, 4])
    else:
        CODES: tl.constexpr = codes_per_byte(BITS)
        byte = (tl.arange(0, 4) * 8)[None, None, :, None]
        code = tl.arange(0, CODES)[None, None, None, :]
        if BITS == 8:
            bits = words[:, :, None, None] >> byte + 0 * code
            bits = (bits & 0x7F) << 7 | (bits & 0x80) << 8
        else:
            bits = words[:, :, None, None] >> byte + code * (2 if BITS == 3 else BITS)
            sign = signs[:, :, None, None] >> byte + code * 2 if BITS == 3 else bits >> BITS - 1
            magnitude = tl.where(bits & 4 != 0, HI, LO) if BITS == 4 else LO
            magnitude = magnitude >> (bits & (1 if BITS == 2 else 3)) * 8 & 0x7F
            bits = magnitude << 7 | (sign & 1) << 15
        return bits.to(tl.int16).to(tl.float16, bitcast=True)
