"""Every instruction the assembler writes, as two disassemblers read it."""

import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("numba")

from ops.kernels import assembler as asm
from ops.kernels.vector import jit

REGISTERS = {
    asm.RAX: "rax",
    asm.RDX: "rdx",
    4: "rsp",
    5: "rbp",
    asm.RDI: "rdi",
    asm.R8: "r8",
    asm.R10: "r10",
    12: "r12",
    13: "r13",
}
DISPLACEMENTS = (0, 4, 64, -4, -64, 508, 512, -512, -516, 8128, 8192, -8192, -8256, 2**31 - 64, -(2**31))
ZMM = ((0, 31, 5), (7, 8, 16), (8, 15, 31), (15, 16, 8), (16, 7, 0), (31, 0, 23))
VECTOR_FORMS = {
    "load_zmm": ("vmovups", "{a}, [{m}]"),
    "store_zmm": ("vmovups", "[{m}], {a}"),
    "broadcast": ("vbroadcastss", "{a}, [{m}]"),
    "clear": ("vpxord", "{a}, {a}, {a}"),
    "fma_broadcast": ("vfmadd231ps", "{a}, {b}, [{m}]{{1to16}}"),
    "fma213_broadcast": ("vfmadd213ps", "{a}, {b}, [{m}]{{1to16}}"),
    "round_down": ("vrndscaleps", "{a}, {c}, 9"),
    "scale_by_power": ("vscalefps", "{a}, {b}, {c}"),
}
OPERATIONS = {
    asm.ADD: "vaddps",
    asm.MULTIPLY: "vmulps",
    asm.MINIMUM: "vminps",
    asm.MAXIMUM: "vmaxps",
    asm.DIVIDE: "vdivps",
}
FORMS = [
    *VECTOR_FORMS,
    "packed",
    "packed_load",
    "packed_broadcast",
    "lea",
    "add_immediate",
    "decrement",
    "return_",
    "jump_back",
]


@jit
def write(code, at, form, operation, a, b, c, base, displacement):
    """One instruction of the form with that number in FORMS."""
    if form == 0:
        return asm.load_zmm(code, at, a, base, displacement)
    if form == 1:
        return asm.store_zmm(code, at, a, base, displacement)
    if form == 2:
        return asm.broadcast(code, at, a, base, displacement)
    if form == 3:
        return asm.clear(code, at, a)
    if form == 4:
        return asm.fma_broadcast(code, at, a, b, base, displacement)
    if form == 5:
        return asm.fma213_broadcast(code, at, a, b, base, displacement)
    if form == 6:
        return asm.round_down(code, at, a, c)
    if form == 7:
        return asm.scale_by_power(code, at, a, b, c)
    if form == 8:
        return asm.packed(code, at, operation, a, b, c)
    if form == 9:
        return asm.packed_load(code, at, operation, a, b, base, displacement)
    if form == 10:
        return asm.packed_broadcast(code, at, operation, a, b, base, displacement)
    if form == 11:
        return asm.lea(code, at, a, base, displacement)
    if form == 12:
        return asm.add_immediate(code, at, base, displacement)
    if form == 13:
        return asm.decrement(code, at, base)
    if form == 14:
        return asm.return_(code, at)
    return asm.jump_back(code, at, at + displacement)


def _memory(base: int, displacement: int) -> str:
    sign = "-" if displacement < 0 else "+"
    return REGISTERS[base] + (f" {sign} {abs(displacement)}" if displacement else "")


def _cases() -> list[tuple[tuple[int, ...], str]]:
    """(arguments of `write` after the position, the text a disassembler should print)"""
    cases = []
    places = list(itertools.product(REGISTERS, DISPLACEMENTS))
    for form, (name, (mnemonic, operands)) in enumerate(VECTOR_FORMS.items()):
        for (a, b, c), (base, displacement) in itertools.product(ZMM, places if "{m}" in operands else places[:1]):
            text = operands.format(a=f"zmm{a}", b=f"zmm{b}", c=f"zmm{c}", m=_memory(base, displacement))
            cases.append(((FORMS.index(name), 0, a, b, c, base, displacement), f"{mnemonic} {text}"))
            assert form == FORMS.index(name)
    for operation, mnemonic in OPERATIONS.items():
        for a, b, c in ZMM:
            cases.append(((8, operation, a, b, c, 0, 0), f"{mnemonic} zmm{a}, zmm{b}, zmm{c}"))
            for base, displacement in places[:: len(DISPLACEMENTS) - 1]:
                place = _memory(base, displacement)
                cases.append(((9, operation, a, b, c, base, displacement), f"{mnemonic} zmm{a}, zmm{b}, [{place}]"))
                text = f"{mnemonic} zmm{a}, zmm{b}, [{place}]{{1to16}}"
                cases.append(((10, operation, a, b, c, base, displacement), text))
    for register, (base, displacement) in itertools.product((asm.RAX, asm.R10), places):
        text = f"lea {REGISTERS[register]}, [{_memory(base, displacement)}]"
        cases.append(((11, 0, register, 0, 0, base, displacement), text))
    for register in REGISTERS:
        cases += [
            ((12, 0, 0, 0, 0, register, v), f"add {REGISTERS[register]}, {v}")
            for v in (1, 127, -128, 128, -129, 2**31 - 1)
        ]
        cases.append(((13, 0, 0, 0, 0, register, 0), f"dec {REGISTERS[register]}"))
    return cases


def _plain(text: str) -> str:
    """A disassembler's line without its habits: sizes of operands, spaces, hexadecimal and unsigned numbers."""
    text = re.sub(r"#.*|\b(zmmword|dword|qword|ptr|bcst)\b", "", text.lower()).replace("{1to16}", "")
    text = re.sub(r"0x[0-9a-f]+", lambda m: str(int(m[0], 16)), text)
    # "add r, imm" with a negative number is printed as the unsigned 64-bit number by some
    text = re.sub(r"\b(\d{19,20})\b", lambda m: str(int(m[1]) - 2**64), text)
    return re.sub(r"\s+", "", text).replace("+0]", "]")


def _by_capstone(code: bytes, folder: Path) -> list[tuple[int, str]]:
    capstone = pytest.importorskip("capstone", reason="capstone is not installed (it comes with the dev extra)")
    engine = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    return [(i.address, f"{i.mnemonic} {i.op_str}") for i in engine.disasm(code, 0)]


def _by_objdump(code: bytes, folder: Path) -> list[tuple[int, str]]:
    if shutil.which("objdump") is None:
        pytest.skip("objdump is not installed")
    file = folder / "code.bin"
    file.write_bytes(code)
    command = ["objdump", "-D", "-b", "binary", "-m", "i386:x86-64", "-M", "intel", "--no-show-raw-insn", str(file)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        pytest.skip(f"this objdump does not disassemble x86-64: {run.stderr.strip()}")
    found = re.findall(r"^\s*([0-9a-f]+):\s*(.+)$", run.stdout, re.MULTILINE)
    return [(int(address, 16), text) for address, text in found]


@pytest.mark.parametrize("disassembler", [_by_capstone, _by_objdump])
def test_every_instruction_reads_back_as_written(disassembler, tmp_path):
    cases = _cases()
    code, at, starts = np.zeros(len(cases) * asm.LONGEST + 16, np.uint8), 0, []
    for arguments, _ in cases:
        starts.append(at)
        following = write(code, at, *arguments)
        assert 0 < following - at <= asm.LONGEST
        at = following
    starts.append(at)
    at = write(code, at, FORMS.index("jump_back"), 0, 0, 0, 0, 0, -1000)
    starts.append(at)
    at = write(code, at, FORMS.index("return_"), 0, 0, 0, 0, 0, 0)
    read = disassembler(code[:at].tobytes(), tmp_path)
    texts = [text for _, text in cases] + [f"jne {starts[-2] - 1000}", "vzeroupper", "ret"]
    for (address, found), expected, start in zip(read, texts, [*starts, starts[-1] + 3]):
        assert (address, _plain(found)) == (start, _plain(expected)), f"{found!r} is not {expected!r}"
    assert len(read) == len(texts)


@pytest.mark.parametrize("name", ["fma_broadcast", "load_zmm", "store_zmm", "broadcast"])
def test_near_displacements_take_one_byte(name):
    unit = 64 if "zmm" in name else 4
    code, form, base = np.zeros(32, np.uint8), FORMS.index(name), asm.RAX
    for steps, length in ((0, 6), (1, 7), (127, 7), (-128, 7), (128, 10), (-129, 10)):
        assert write(code, 0, form, 0, 1, 2, 3, base, steps * unit) == length, steps


def test_the_assembler_gives_the_same_bytes_without_compilation():
    """The compiled encoder against its own Python source: integer arithmetic behaves alike in both."""
    script = (
        "import numpy as np\nfrom ops.kernels import assembler as a\ncode = np.zeros(64, np.uint8)\n"
        "at = a.fma_broadcast(code, 0, 17, 31, a.R10, -516)\nat = a.load_zmm(code, at, 31, a.RDI, -64)\n"
        "print(code[:at].tobytes().hex())\n"
    )
    environment = dict(os.environ, NUMBA_DISABLE_JIT="1")
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    code = np.zeros(64, np.uint8)
    at = write(code, 0, FORMS.index("fma_broadcast"), 0, 17, 31, 0, asm.R10, -516)
    at = write(code, at, FORMS.index("load_zmm"), 0, 31, 0, 0, asm.RDI, -64)
    assert run.stdout.strip() == code[:at].tobytes().hex()
