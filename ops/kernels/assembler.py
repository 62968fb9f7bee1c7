"""Machine code for x86-64 with AVX-512: the few instructions the weight-specialised kernels consist of.

Every function writes one instruction to `code[at:]` and returns where the next begins; the caller provides room (no
instruction here is longer than `LONGEST` bytes). They are compiled by Numba, so that a layer of a million weights is assembled
in a fraction of a second. Vector operands are zmm0 to zmm31 by number, addresses are [base + displacement] with the
displacement in bytes and as short as the encoding allows.

Encodings follow the Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2: section 2.7 (EVEX and the
compressed displacement disp8*N) and the instructions' own pages. `tests/ops/test_assembler.py` compares every form with a
disassembler.

Start with `registers`, `vector` and `scalar`, the three kinds of vector instruction.
"""

from __future__ import annotations

import numpy as np

from ops.kernels.vector import jit

__all__ = [
    *("LONGEST", "RAX", "RCX", "RDX", "RSI", "RDI", "R8", "R10"),
    *(
        "ADD",
        "BROADCAST",
        "DIVIDE",
        "FMA213",
        "FMA231",
        "LOAD",
        "MAXIMUM",
        "MINIMUM",
        "MULTIPLY",
        "ROUND",
        "SCALE",
        "STORE",
        "XOR",
    ),
    *(
        "add_immediate",
        "decrement",
        "jump_back",
        "lea",
        "prefetch",
        "prefetch_ahead",
        "registers",
        "return_",
        "scalar",
        "vector",
    ),
]

LONGEST = 11  # bytes
# Constants are numpy's: Numba compiles a function anew for every Python integer it is called with.
RAX, RCX, RDX, RSI, RDI, R8, R10 = map(np.int64, (0, 1, 2, 6, 7, 8, 10))
# Operations on zmm registers: opcode map, the prefix bits pp and opcode in one number.
LOAD, STORE, ADD, MULTIPLY, MINIMUM, DIVIDE, MAXIMUM = map(
    np.int64, (0x10010, 0x10011, 0x10058, 0x10059, 0x1005D, 0x1005E, 0x1005F)
)
XOR, FMA231, FMA213, SCALE, BROADCAST, ROUND = map(np.int64, (0x101EF, 0x201B8, 0x201A8, 0x2012C, 0x20118, 0x30108))

_LEA, _ADD_SHORT, _ADD_LONG, _DECREMENT = map(np.int64, (0x8D, 0x83, 0x81, 0xFF))
_BYTE, _FLOAT_BYTES, _VECTOR_BYTES = map(np.int64, (1, 4, 64))
_NO, _YES, _FOUR, _PREFETCHT1 = map(np.int64, (0, 1, 4, 2))


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
        return little_endian(code, at, displacement // unit, _BYTE)
    return little_endian(code, at, displacement, _FOUR) if mode == 2 else at


@jit
def evex(code, at, operation, register, second, extended, high, is_broadcast):
    """The four EVEX bytes (512 bits, W = 0, no mask) and the opcode. `register` is ModRM.reg, `second` the operand in vvvv,
    `extended` and `high` bits 3 and 4 of ModRM.rm (bit 4 only of a vector register)."""
    code[at] = 0x62
    inverted = (~register >> 3 & 1) << 7 | (~high & 1) << 6 | (~extended & 1) << 5 | (~register >> 4 & 1) << 4
    code[at + 1] = inverted | operation >> 16
    code[at + 2] = (~second & 15) << 3 | 4 | operation >> 8 & 3
    code[at + 3] = 2 << 5 | is_broadcast << 4 | (~second >> 4 & 1) << 3
    code[at + 4] = operation & 0xFF
    return at + 5


@jit
def registers(code, at, operation, register, second, third):
    """<operation> register, second, third

    MINIMUM and MAXIMUM give `third` where either is NaN; XOR of a register with itself clears it; FMA231: register += second ·
    third; FMA213: register = register · second + third; SCALE: second · 2^floor(third); ROUND: the largest whole number not
    above `third` (`second` is 0)."""
    at = evex(code, at, operation, register, second, third >> 3 & 1, third >> 4 & 1, _NO)
    code[at] = 0xC0 | (register & 7) << 3 | third & 7
    if operation == ROUND:
        code[at + 1] = 9  # towards minus infinity, inexact not signalled
        return at + 2
    return at + 1


@jit
def vector(code, at, operation, register, second, base, displacement):
    """<operation> register, second, [base + displacement]; `second` is 0 for LOAD, and for STORE, which writes the register."""
    at = evex(code, at, operation, register, second, base >> 3 & 1, _NO, _NO)
    return memory(code, at, register, base, displacement, _VECTOR_BYTES)


@jit
def scalar(code, at, operation, register, second, base, displacement):
    """<operation> register, second, [base + displacement]{1to16}: the third operand is one float for all lanes; `second` is 0 for
    BROADCAST, which gives that float."""
    at = evex(code, at, operation, register, second, base >> 3 & 1, _NO, np.int64(operation != BROADCAST))
    return memory(code, at, register, base, displacement, _FLOAT_BYTES)


@jit
def rex(code, at, opcode, register, base):
    """REX.W and an opcode of one byte."""
    code[at] = 0x48 | (register >> 3 & 1) << 2 | base >> 3 & 1
    code[at + 1] = opcode
    return at + 2


@jit
def lea(code, at, register, base, displacement):
    """lea register, [base + displacement]"""
    return memory(code, rex(code, at, _LEA, register, base), register, base, displacement, _BYTE)


@jit
def add_immediate(code, at, register, value):
    """add register, value (32 bits with sign)"""
    short = -128 <= value <= 127
    at = rex(code, at, _ADD_SHORT if short else _ADD_LONG, _NO, register)
    code[at] = 0xC0 | register & 7
    return little_endian(code, at + 1, value, _BYTE if short else _FOUR)


@jit
def decrement(code, at, register):
    """dec register"""
    at = rex(code, at, _DECREMENT, _NO, register)
    code[at] = 0xC8 | register & 7
    return at + 1


@jit
def jump_back(code, at, target):
    """jnz target: to `code[target]` while the last counted register is not 0"""
    code[at] = 0x0F
    code[at + 1] = 0x85
    return little_endian(code, at + 2, target - (at + 6), _FOUR)


@jit
def prefetch(code, at, base, displacement):
    """prefetcht1 [base + displacement]"""
    if base >= 8:
        code[at] = 0x41
        at += 1
    code[at] = 0x0F
    code[at + 1] = 0x18
    return memory(code, at + 2, _PREFETCHT1, base, displacement, _BYTE)


@jit
def prefetch_ahead(code, at, distance):
    """prefetcht1 [rip + distance]: code, `distance` bytes after this instruction"""
    code[at] = 0x0F
    code[at + 1] = 0x18
    code[at + 2] = 0x15
    return little_endian(code, at + 3, distance, _FOUR)


@jit
def return_(code, at):
    """vzeroupper; ret"""
    code[at] = 0xC5
    code[at + 1] = 0xF8
    code[at + 2] = 0x77
    code[at + 3] = 0xC3
    return at + 4
