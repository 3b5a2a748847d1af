"""Whether a program can run on a board, told from the first bytes of its file. The numbers are those of the ELF specification (e_machine)."""
from __future__ import annotations

import struct
from pathlib import Path

from edgekd.errors import EdgekdError

MACHINES = {3: "i386", 8: "mips", 20: "ppc", 21: "ppc64", 22: "s390x", 40: "arm", 62: "x86_64", 183: "aarch64", 243: "riscv", 258: "loongarch"}
OTHER = {b"\xcf\xfa\xed\xfe": "macOS", b"\xce\xfa\xed\xfe": "macOS", b"\xca\xfe\xba\xbe": "macOS", b"MZ": "Windows"}
FAMILIES = (("x86_64", "x86_64"), ("amd64", "x86_64"), ("aarch64", "aarch64"), ("arm64", "aarch64"), ("armv8l", "arm"), ("arm", "arm"), ("i386", "i386"), ("i486", "i386"),
            ("i586", "i386"), ("i686", "i386"), ("riscv", "riscv"), ("ppc64", "ppc64"), ("ppc", "ppc"), ("mips", "mips"), ("s390x", "s390x"), ("loongarch", "loongarch"))


def machine_of(path: Path) -> tuple[str, int] | None:
    """(machine, bits) that an ELF file was built for; None for any other file. A machine that is not in the table is `machine N`."""
    with open(path, "rb") as f:
        head = f.read(20)
    if len(head) < 20 or head[:4] != b"\x7fELF" or head[5] not in (1, 2):
        return None
    (number,) = struct.unpack_from("<H" if head[5] == 1 else ">H", head, 18)
    return MACHINES.get(number, f"machine {number}"), 64 if head[4] == 2 else 32


def check_arch(path: Path, arch: str, bits: int | None = None) -> None:
    """Refuse a program that this board cannot run. Scripts and data pass, and so does what an unknown `arch` would make a guess.

    Args:
        path: the file.
        arch: what `uname -m` says on the board.
        bits: of the board's own programs, where known: a 64-bit kernel may carry a 32-bit system.

    Raises:
        EdgekdError: it was built for another processor or system.
    """
    with open(path, "rb") as f:
        head = f.read(4)
    system = next((name for magic, name in OTHER.items() if head.startswith(magic)), None)
    if system:
        raise EdgekdError(f"the program is built for {system} and the board is a Linux {arch}", where=path, hint=f"get its build for Linux {arch}")
    built = machine_of(path)
    wanted = next((family for prefix, family in FAMILIES if arch.startswith(prefix)), None)
    if built is None or wanted is None:
        return
    machine, size = built
    # the older 32-bit siblings usually run there, and a board that lacks their libraries says so itself
    sibling = (machine, wanted) in (("i386", "x86_64"), ("arm", "aarch64"))
    if not (machine == wanted or sibling):
        raise EdgekdError(f"the program is built for {machine} and the board is {arch}", where=path, hint=f"get or build it for {arch}")
    if bits is not None and size > bits:
        raise EdgekdError(f"the program is a {size}-bit one and the board's system has {bits} bits", where=path, hint=f"get or build it for {bits}-bit {wanted}")
