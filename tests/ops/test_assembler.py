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
OPERATIONS = {
    asm.ADD: "vaddps", asm.MULTIPLY: "vmulps", asm.MINIMUM: "vminps", asm.MAXIMUM: "vmaxps", asm.DIVIDE: "vdivps",
    asm.FMA231: "vfmadd231ps", asm.FMA213: "vfmadd213ps", asm.SCALE: "vscalefps", asm.XOR: "vpxord",
}  # fmt: skip
FORMS = [
    "registers",
    "vector",
    "scalar",
    "lea",
    "add_immediate",
    "decrement",
    "jump_back",
    "return_",
    "prefetch",
    "prefetch_ahead",
]


@jit
def write(code, at, form, operation, a, b, c, base, displacement):
    """One instruction of the form with that number in FORMS."""
    if form == 0:
        return asm.registers(code, at, operation, a, b, c)
    if form == 1:
        return asm.vector(code, at, operation, a, b, base, displacement)
    if form == 2:
        return asm.scalar(code, at, operation, a, b, base, displacement)
    if form == 3:
        return asm.lea(code, at, a, base, displacement)
    if form == 4:
        return asm.add_immediate(code, at, base, displacement)
    if form == 5:
        return asm.decrement(code, at, base)
    if form == 6:
        return asm.jump_back(code, at, at + displacement)
    if form == 7:
        return asm.return_(code, at)
    if form == 8:
        return asm.prefetch(code, at, base, displacement)
    return asm.prefetch_ahead(code, at, displacement)


def _memory(base: int, displacement: int) -> str:
    sign = "-" if displacement < 0 else "+"
    return REGISTERS[base] + (f" {sign} {abs(displacement)}" if displacement else "")


def _cases() -> list[tuple[tuple[int, ...], str]]:
    """(arguments of `write` after the position, the text a disassembler should print)"""
    cases = []

    def case(
        form: str,
        text: str,
        operation: int = 0,
        a: int = 0,
        b: int = 0,
        c: int = 0,
        base: int = 0,
        displacement: int = 0,
    ):
        numbers = (FORMS.index(form), operation, a, b, c, base, displacement)
        cases.append((tuple(np.int64(n) for n in numbers), text))

    places = list(itertools.product(REGISTERS, DISPLACEMENTS))
    for (a, b, c), (operation, name) in itertools.product(ZMM, OPERATIONS.items()):
        case("registers", f"{name} zmm{a}, zmm{b}, zmm{c}", operation, a, b, c)
        for base, displacement in places if operation in (asm.ADD, asm.FMA231) else places[::7]:
            place = _memory(base, displacement)
            case("vector", f"{name} zmm{a}, zmm{b}, [{place}]", operation, a, b, 0, base, displacement)
            case("scalar", f"{name} zmm{a}, zmm{b}, [{place}]{{1to16}}", operation, a, b, 0, base, displacement)
    for (a, _, c), (base, displacement) in itertools.product(ZMM, places):
        place = _memory(base, displacement)
        case("vector", f"vmovups zmm{a}, [{place}]", asm.LOAD, a, base=base, displacement=displacement)
        case("vector", f"vmovups [{place}], zmm{a}", asm.STORE, a, base=base, displacement=displacement)
        case("scalar", f"vbroadcastss zmm{a}, [{place}]", asm.BROADCAST, a, base=base, displacement=displacement)
        case("registers", f"vrndscaleps zmm{a}, zmm{c}, 9", asm.ROUND, a, 0, c)
    for base, displacement in places:
        place = _memory(base, displacement)
        case("prefetch", f"prefetcht1 [{place}]", base=base, displacement=displacement)
        for register in (asm.RAX, asm.R10):
            case("lea", f"lea {REGISTERS[register]}, [{place}]", a=register, base=base, displacement=displacement)
    for register, name in REGISTERS.items():
        for value in (1, 127, -128, 128, -129, 2**31 - 1):
            case("add_immediate", f"add {name}, {value}", base=register, displacement=value)
        case("decrement", f"dec {name}", base=register)
    for value in (64, 32768):
        case("prefetch_ahead", f"prefetcht1 [rip + {value}]", displacement=value)
    return cases


def _plain(text: str) -> str:
    """A disassembler's line without its habits: sizes of operands, spaces, hexadecimal and unsigned numbers."""
    text = re.sub(r"#.*|\b(zmmword|dword|qword|byte|ptr|bcst)\b", "", text.lower()).replace("{1to16}", "")
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
    for form in ("jump_back", "return_"):
        starts.append(at)
        at = write(code, at, *(np.int64(n) for n in (FORMS.index(form), 0, 0, 0, 0, 0, -1000)))
    read = disassembler(code[:at].tobytes(), tmp_path)
    texts = [text for _, text in cases] + [f"jne {starts[-2] - 1000}", "vzeroupper", "ret"]
    for (address, found), expected, start in zip(read, texts, [*starts, starts[-1] + 3]):
        assert (address, _plain(found)) == (start, _plain(expected)), f"{found!r} is not {expected!r}"
    assert len(read) == len(texts)


@pytest.mark.parametrize(("form", "operation", "unit"), [(1, asm.LOAD, 64), (1, asm.STORE, 64), (2, asm.FMA231, 4)])
def test_near_displacements_take_one_byte(form, operation, unit):
    code = np.zeros(32, np.uint8)
    for steps, length in ((0, 6), (1, 7), (127, 7), (-128, 7), (128, 10), (-129, 10)):
        numbers = (0, form, operation, 1, 0, 0, asm.RAX, steps * unit)
        assert write(code, *(np.int64(n) for n in numbers)) == length, steps


def test_the_assembler_gives_the_same_bytes_without_compilation():
    """The compiled encoder against its own Python source: integer arithmetic behaves alike in both."""
    script = (
        "import numpy as np\nfrom ops.kernels import assembler as a\ncode = np.zeros(64, np.uint8)\n"
        "at = a.scalar(code, 0, a.FMA231, 17, 31, a.R10, -516)\nat = a.vector(code, at, a.LOAD, 31, 0, a.RDI, -64)\n"
        "print(code[:at].tobytes().hex())\n"
    )
    environment = dict(os.environ, NUMBA_DISABLE_JIT="1")
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    code, at = np.zeros(64, np.uint8), 0
    for numbers in ((2, asm.FMA231, 17, 31, 0, asm.R10, -516), (1, asm.LOAD, 31, 0, 0, asm.RDI, -64)):
        at = write(code, at, *(np.int64(n) for n in numbers))
    assert run.stdout.strip() == code[:at].tobytes().hex()
