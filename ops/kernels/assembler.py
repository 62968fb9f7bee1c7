"""Machine code for x86-64 with AVX-512: the few instructions the weight-specialised kernels consist of.

Every function writes one instruction to `code[at:]` and returns where the next begins; the caller provides room (no
instruction here is longer than `LONGEST` bytes). They are compiled by Numba, so that a layer of a million weights is assembled
in a fraction of a second. Vector operands are zmm0 to zmm31 by number, addresses are [base + displacement] with the
displacement in bytes and as short as the encoding allows.

Encodings follow the Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2: section 2.7 (EVEX and the
compressed displacement disp8*N) and the instructions' own pages. `tests/ops/test_assembler.py` compares every form with a
disassembler.

Start with `fma_broadcast`; all vector instructions go through `evex`.
"""

from __future__ import annotations

from ops.kernels.vector import jit

__all__ = [
    *("LONGEST", "RAX", "RCX", "RDX", "RSI", "RDI", "R8", "R10"),
    *("ADD", "DIVIDE", "MAXIMUM", "MINIMUM", "MULTIPLY"),
    *("add_immediate", "broadcast", "clear", "decrement", "fma213_broadcast", "fma_broadcast", "jump_back", "lea"),
    *("load_zmm", "packed", "packed_broadcast", "packed_load", "return_", "round_down", "scale_by_power", "store_zmm"),
]

LONGEST = 11  # bytes
RAX, RCX, RDX, RSI, RDI, R8, R10 = 0, 1, 2, 6, 7, 8, 10
# opcodes of a packed single operation in map 0F
ADD, MULTIPLY, MINIMUM, DIVIDE, MAXIMUM = 0x58, 0x59, 0x5D, 0x5E, 0x5F

_NONE, _66 = 0, 1  # the prefix bits pp
_0F, _0F38, _0F3A = 1, 2, 3  # the opcode map
_VECTOR_BYTES, _FLOAT_BYTES = 64, 4


@jit
def little_endian(code, at, value, count):
    """The lowest `count` bytes of a number, two's complement."""
    for i in range(count):
        code[at + i] = (value >> (8 * i)) & 0xFF
    return at + count


@jit
def memory(code, at, register, base, displacement, unit):
    """ModRM byte, SIB byte where the base needs one, and displacement of [base + displacement], one byte if it is a multiple
    of `unit` that fits."""
    low = base & 7
    short = displacement % unit == 0 and -128 <= displacement // unit <= 127
    if displacement == 0 and low != 5:
        mode = 0
    else:
        mode = 1 if short else 2
    code[at] = mode << 6 | (register & 7) << 3 | low
    at += 1
    if low == 4:
        code[at] = 0x24
        at += 1
    if mode == 1:
        return little_endian(code, at, displacement // unit, 1)
    return little_endian(code, at, displacement, 4) if mode == 2 else at


@jit
def evex(code, at, opcode_map, prefix, opcode, register, second, extended, high, is_broadcast):
    """The four EVEX bytes (512 bits, W = 0, no mask) and the opcode. `register` is ModRM.reg, `second` the operand in vvvv,
    `extended` and `high` bits 3 and 4 of ModRM.rm (bit 4 only of a vector register)."""
    code[at] = 0x62
    inverted = (~register >> 3 & 1) << 7 | (~high & 1) << 6 | (~extended & 1) << 5 | (~register >> 4 & 1) << 4
    code[at + 1] = inverted | opcode_map
    code[at + 2] = (~second & 15) << 3 | 4 | prefix
    code[at + 3] = 2 << 5 | is_broadcast << 4 | (~second >> 4 & 1) << 3
    code[at + 4] = opcode
    return at + 5


@jit
def with_memory(code, at, opcode_map, prefix, opcode, register, second, base, displacement, is_broadcast, unit):
    """An EVEX instruction whose last operand is [base + displacement]."""
    at = evex(code, at, opcode_map, prefix, opcode, register, second, base >> 3 & 1, 0, is_broadcast)
    return memory(code, at, register, base, displacement, unit)


@jit
def with_register(code, at, opcode_map, prefix, opcode, register, second, third):
    """An EVEX instruction whose last operand is a zmm register."""
    at = evex(code, at, opcode_map, prefix, opcode, register, second, third >> 3 & 1, third >> 4 & 1, 0)
    code[at] = 0xC0 | (register & 7) << 3 | third & 7
    return at + 1


@jit
def load_zmm(code, at, register, base, displacement):
    """vmovups register, [base + displacement]"""
    return with_memory(code, at, _0F, _NONE, 0x10, register, 0, base, displacement, 0, _VECTOR_BYTES)


@jit
def store_zmm(code, at, register, base, displacement):
    """vmovups [base + displacement], register"""
    return with_memory(code, at, _0F, _NONE, 0x11, register, 0, base, displacement, 0, _VECTOR_BYTES)


@jit
def broadcast(code, at, register, base, displacement):
    """vbroadcastss register, [base + displacement]"""
    return with_memory(code, at, _0F38, _66, 0x18, register, 0, base, displacement, 0, _FLOAT_BYTES)


@jit
def clear(code, at, register):
    """vpxord register, register, register"""
    return with_register(code, at, _0F, _66, 0xEF, register, register, register)


@jit
def fma_broadcast(code, at, register, second, base, displacement):
    """vfmadd231ps register, second, [base + displacement]{1to16}: register += second · float"""
    return with_memory(code, at, _0F38, _66, 0xB8, register, second, base, displacement, 1, _FLOAT_BYTES)


@jit
def fma213_broadcast(code, at, register, second, base, displacement):
    """vfmadd213ps register, second, [base + displacement]{1to16}: register = register · second + float"""
    return with_memory(code, at, _0F38, _66, 0xA8, register, second, base, displacement, 1, _FLOAT_BYTES)


@jit
def packed(code, at, operation, register, second, third):
    """vaddps and the like: register = second <operation> third; MINIMUM and MAXIMUM give `third` where either is NaN."""
    return with_register(code, at, _0F, _NONE, operation, register, second, third)


@jit
def packed_load(code, at, operation, register, second, base, displacement):
    """The same with a vector in memory as the third operand."""
    return with_memory(code, at, _0F, _NONE, operation, register, second, base, displacement, 0, _VECTOR_BYTES)


@jit
def packed_broadcast(code, at, operation, register, second, base, displacement):
    """The same with a float in memory as the third operand."""
    return with_memory(code, at, _0F, _NONE, operation, register, second, base, displacement, 1, _FLOAT_BYTES)


@jit
def round_down(code, at, register, third):
    """vrndscaleps register, third, 9: the largest whole number not above, inexact not signalled"""
    at = with_register(code, at, _0F3A, _66, 0x08, register, 0, third)
    code[at] = 9
    return at + 1


@jit
def scale_by_power(code, at, register, second, third):
    """vscalefps register, second, third: second · 2^floor(third)"""
    return with_register(code, at, _0F38, _66, 0x2C, register, second, third)


@jit
def rex(code, at, opcode, register, base):
    """REX.W and an opcode of one byte."""
    code[at] = 0x48 | (register >> 3 & 1) << 2 | base >> 3 & 1
    code[at + 1] = opcode
    return at + 2


@jit
def lea(code, at, register, base, displacement):
    """lea register, [base + displacement]"""
    return memory(code, rex(code, at, 0x8D, register, base), register, base, displacement, 1)


@jit
def add_immediate(code, at, register, value):
    """add register, value (32 bits with sign)"""
    at = rex(code, at, 0x83 if -128 <= value <= 127 else 0x81, 0, register)
    code[at] = 0xC0 | register & 7
    return little_endian(code, at + 1, value, 1 if -128 <= value <= 127 else 4)


@jit
def decrement(code, at, register):
    """dec register"""
    at = rex(code, at, 0xFF, 0, register)
    code[at] = 0xC8 | register & 7
    return at + 1


@jit
def jump_back(code, at, target):
    """jnz target: to `code[target]` while the last counted register is not 0"""
    code[at] = 0x0F
    code[at + 1] = 0x85
    return little_endian(code, at + 2, target - (at + 6), 4)


@jit
def return_(code, at):
    """vzeroupper; ret"""
    code[at] = 0xC5
    code[at + 1] = 0xF8
    code[at + 2] = 0x77
    code[at + 3] = 0xC3
    return at + 4
