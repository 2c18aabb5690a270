"""Writes what ttnn's mock device needs: a stand-in compiler and descriptions of the cards.

With TT_METAL_MOCK_CLUSTER_DESC_PATH set, ttnn opens a device that is not there: its own validation,
allocation, program construction and program cache run, no kernel does. It still compiles the kernels, with a
RISC-V compiler that its wheel does not hold. The stand-in gives every kernel the same four bytes of code.

    python tools/mock_sfpi.py DIR                          writes DIR, lists the cards
    eval "$(python tools/mock_sfpi.py DIR --env n150)"     writes DIR, then points ttnn at a mock n150

Run it with the Python that has ttnn. Nothing is written outside DIR; a compiler in /opt/tenstorrent/sfpi is
neither needed nor used nor touched.

Good for: illegal program and memory configurations, L1 that overflows, shards on cores that are not there,
programs that are compiled again though they should be cached.
Not for: numbers (every read from the device gives zeros), errors in kernel code (nothing reads it), times,
traces and sub-devices (begin_trace_capture and load_sub_device_manager end the process with a segmentation
fault). A TT_METAL_SLOW_DISPATCH_MODE that is set still counts: no core is then kept for dispatch, the grid
is larger.
"""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

COMPILER = """\
#!/bin/sh
# Stands in for the RISC-V compiler of ttnn's mock device (tools/mock_sfpi.py): every output is one fixed ELF.
set -e
dependencies=
if [ "$1" = --version ]; then echo "pctt stand-in, compiles nothing"; fi
while [ $# -gt 0 ]; do
    case $1 in
    -o) output=$2; cp "${0%/*}/kernel.elf" "$output" ;;
    -MF) dependencies=$2 ;;
    esac
    shift
done
if [ "$dependencies" ]; then echo "$output:" >"$dependencies"; fi
"""


Link = tuple[int, int, int, int]
"""Chip and Ethernet channel at one end, chip and channel at the other."""


@dataclass(frozen=True)
class Card:
    """What ttnn is told about a card, or about several joined by Ethernet.

    arch, board: as the vendor's cluster descriptor spells them.
    code: the kind of board, in its number from bit 36 up; ttnn refuses a number that does not fit `board`.
    harvesting: units switched off, as masks, rows of Tensix cores on Wormhole, columns on Blackhole: of each
        chip of a board, or of all.
    boards: the chips on each.    local: the chips that the host reaches by PCIe.
    """

    arch: str
    board: str
    code: int
    harvesting: tuple[str, ...]
    boards: tuple[tuple[int, ...], ...] = ((0,),)
    local: tuple[int, ...] = (0,)
    links: tuple[Link, ...] = ()

    def descriptor(self) -> str:
        """The cluster descriptor, YAML."""
        places = sorted((chip, place) for board in self.boards for place, chip in enumerate(board))
        links = [f"[{{chip: {a}, chan: {b}}}, {{chip: {c}, chan: {d}}}]" for a, b, c, d in self.links]
        units = [self.harvesting[place % len(self.harvesting)] for _, place in places]
        numbers = [(self.code << 36) + number for number in range(len(self.boards))]
        return "\n".join(
            [
                "arch:",
                *(f"  {chip}: {self.arch}" for chip, _ in places),
                "chips:",
                *(f"  {chip}: [{chip}, 0, 0, 0]" for chip, _ in places),
                "chips_with_mmio:",
                *(f"  - {chip}: {chip}" for chip in self.local),
                f"ethernet_connections: [{', '.join(links)}]",
                "harvesting:",
                *(
                    f"  {chip}: {{noc_translation: true, {off}}}"
                    for (chip, _), off in zip(places, units, strict=True)
                ),
                "asic_locations:",
                *(f"  {chip}: {place}" for chip, place in places),
                "boards:",
                *(
                    f"  - [board_id: {number}, board_type: {self.board}, chips: {list(board)}]"
                    for number, board in zip(numbers, self.boards, strict=True)
                ),
                "",
            ]
        )


def _pairs(*ends: tuple[int, int, int, int]) -> tuple[Link, ...]:
    """Two links each: chip and its first channel at one end, and at the other."""
    return tuple((a, b + n, c, d + n) for a, b, c, d in ends for n in range(2))


# Of 10 rows an n150 has 9 and a chip of an n300 has 8. Of 14 columns a Blackhole has 12: a p100a always, a
# p150 since firmware 19.5.0. A p100a also lacks one DRAM channel and all Ethernet.
CARDS = {
    "n150": Card("Wormhole", "n150", 0x18, ("harvest_mask: 0x1",)),
    "n300": Card("Wormhole", "n300", 0x14, ("harvest_mask: 0x3",), ((0, 1),), links=_pairs((0, 8, 1, 0))),
    "p100a": Card(
        "Blackhole",
        "p100",
        0x43,
        (
            "harvest_mask: 0x3000, dram_harvesting_mask: 0x1, "
            "eth_harvesting_mask: 0x3fff, pcie_harvesting_mask: 0x2",
        ),
    ),
    "p150": Card(
        "Blackhole",
        "p150",
        0x40,
        ("harvest_mask: 0x3000, eth_harvesting_mask: 0x120, pcie_harvesting_mask: 0x2",),
    ),
}

MESHES = {
    "p300": Card(
        "Blackhole",
        "p300",
        0x44,
        tuple(
            f"harvest_mask: 0x3000, eth_harvesting_mask: 0x120, pcie_harvesting_mask: {mask}"
            for mask in ("0x2", "0x1")
        ),
        ((0, 1),),
        (0, 1),
        ((0, 2, 1, 9), (0, 3, 1, 8)),
    ),
    "t3000": Card(  # four n300, two in a row and two in a column
        "Wormhole",
        "n300",
        0x14,
        ("harvest_mask: 0x3",),
        tuple((chip, chip + 4) for chip in range(4)),
        (0, 1, 2, 3),
        _pairs(
            *((chip, 8, chip + 4, 0) for chip in range(4)),
            (0, 6, 2, 6),
            (0, 14, 1, 14),
            (1, 0, 3, 0),
            (2, 14, 3, 14),
            (4, 6, 5, 6),
            (6, 6, 7, 6),
        ),
    ),
}
"""Cards whose chips are for one network together; an n300 is one too."""

SYSTEMS = {**CARDS, **MESHES}


def kernel_elf() -> bytes:
    """The smallest program that ttnn's loader takes.

    It wants a RISC-V executable whose one loadable segment is code, begins at the entry point and lies in a
    section; a table of relocations for that section (here without entries); and a table of symbols.
    """
    code = struct.pack("<I", 0x00008067)  # ret
    names = b"\0.text\0.rela.text\0.symtab\0.shstrtab\0"
    header_size, segment_size, section_size, symbol_size, relocation_size = 52, 32, 40, 16, 12
    address = 0x1000
    code_at = header_size + segment_size
    symbols_at = code_at + len(code)
    names_at = symbols_at + symbol_size
    sections_at = names_at + len(names) + -len(names) % 4

    def section(name: bytes, kind: int, at: int, size: int, *rest: int) -> bytes:
        flags, where, link, info, entry_size = rest or (0, 0, 0, 0, 0)
        return struct.pack(
            "<10I", names.index(name + b"\0"), kind, flags, where, at, size, link, info, 4, entry_size
        )

    identity = b"\x7fELF" + bytes([1, 1, 1])  # 32 bits, little-endian, version 1
    header = struct.pack(
        "<16s2H5I6H",
        identity,
        2,  # an executable
        243,  # for RISC-V
        1,
        address,
        header_size,
        sections_at,
        0,
        header_size,
        segment_size,
        1,
        section_size,
        5,
        4,  # the section that holds the names
    )
    segment = struct.pack("<8I", 1, code_at, address, address, len(code), len(code), 0b101, 4)
    sections = (
        section(b"", 0, 0, 0)
        + section(b".text", 1, code_at, len(code), 0b110, address, 0, 0, 0)
        + section(b".rela.text", 4, symbols_at, 0, 0, 0, 3, 1, relocation_size)
        + section(b".symtab", 2, symbols_at, symbol_size, 0, 0, 4, 1, symbol_size)
        + section(b".shstrtab", 3, names_at, len(names))
    )
    return (header + segment + code + bytes(symbol_size) + names).ljust(sections_at, b"\0") + sections


def find_ttnn() -> Path:
    """The folder of the installed ttnn, without importing it.

    Raises FileNotFoundError where this Python has none.
    """
    spec = importlib.util.find_spec("ttnn")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"{sys.executable} has no ttnn; use the Python that has it, or install it: pip install ttnn"
        )
    return Path(spec.submodule_search_locations[0])


def write(folder: Path) -> None:
    """Puts the stand-in, the descriptors and a root for ttnn into `folder`; may be done again.

    ttnn looks for the compiler under its root, in runtime/sfpi, before it looks in /opt/tenstorrent. The root
    written here is the wheel's folder by links, with the stand-in added.

    Raises:
        ValueError: the folder's path has a space in it.
        FileNotFoundError: this Python has no ttnn.
    """
    if len(str(folder).split()) != 1:
        raise ValueError(
            f"the folder must have no space in its path, got {str(folder)!r}; ttnn splits it there"
        )
    root, ttnn = folder / "root", find_ttnn()
    tools = root / "runtime" / "sfpi" / "compiler" / "bin"
    tools.mkdir(parents=True, exist_ok=True)
    (tools / "kernel.elf").write_bytes(kernel_elf())
    compiler = tools / "riscv-tt-elf-g++"
    compiler.write_text(COMPILER, encoding="utf-8")
    compiler.chmod(0o755)
    for target in (*ttnn.iterdir(), *(ttnn / "runtime").iterdir()):
        link = root / target.relative_to(ttnn)
        if target.name in ("runtime", "sfpi") or (link.is_symlink() and link.readlink() == target):
            continue
        link.unlink(missing_ok=True)
        link.symlink_to(target)
    for name, card in SYSTEMS.items():
        (folder / f"{name}.yaml").write_text(card.descriptor(), encoding="utf-8")


def environment(folder: Path, chip: str) -> dict[str, str]:
    """Writes `folder` and returns the variables under which ttnn opens a mock `chip`, one of `SYSTEMS`.

    They must be set before ttnn is imported.

    Raises:
        ValueError: there is no such chip, or the folder's path has a space in it.
        FileNotFoundError: this Python has no ttnn.
    """
    if chip not in SYSTEMS:
        raise ValueError(f"chip must be one of {', '.join(SYSTEMS)}, got {chip!r}")
    folder = folder.resolve()
    write(folder)
    return {
        "TT_METAL_RUNTIME_ROOT": str(folder / "root"),
        "TT_METAL_MOCK_CLUSTER_DESC_PATH": str(folder / f"{chip}.yaml"),
        # ttnn takes a kernel from its cache whatever compiler made it: a real run must never see this cache.
        "TT_METAL_CACHE": str(folder / "cache" / chip),
        "TT_METAL_LOGS_PATH": str(folder / "logs"),  # otherwise generated/ in the current folder
        "TT_METAL_LOGGER_LEVEL": "FATAL",
        "TT_METAL_SIMULATOR": "",  # a simulator would be preferred to the mock, and would run our kernels
    }


def main(argv: Sequence[str] | None = None) -> int:
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="where to write; made if it is not there")
    parser.add_argument("--env", metavar="CARD", choices=SYSTEMS, help="print shell lines for that card")
    options = parser.parse_args(argv)
    try:
        if options.env is None:
            write(options.folder.resolve())
            print(f"wrote {options.folder}; --env prints the settings for {', '.join(SYSTEMS)}")
        else:
            for key, value in environment(options.folder, options.env).items():
                print(f"export {key}={shlex.quote(value)}")
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
