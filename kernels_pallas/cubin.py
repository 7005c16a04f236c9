"""Read the machine code that XLA made for an NVIDIA GPU: registers, stack, spills, tensor-core instructions.

A serialized executable of jax's CUDA plugin is a few headers, then protocol buffers in the Riegeli record format,
compressed with Snappy, and somewhere in those the cubin: an ELF file with a section `.text.<kernel>` for each kernel,
`.nv.info` with what the assembler says about each, and `.nv.shared.<kernel>` as large as its static shared memory.
Formats: google/riegeli doc/riegeli_records_file_format.md, google/snappy format_description.txt, the ELF standard;
the attribute numbers and opcodes are those that nvdisasm prints for sm_90.
"""

import collections
import dataclasses
import struct

import numpy as np

RIEGELI = bytes.fromhex("83af70d10d884a3f")  # the hash that opens each block header of a file's beginning
BLOCK, BLOCK_HEADER, CHUNK_HEADER = 1 << 16, 24, 40

CUDA = 190  # the machine in an ELF header
REGISTERS, FRAME_SIZE = 0x2F, 0x11  # attributes in .nv.info: (symbol, value) pairs

# An instruction of sm_70 and later is 16 bytes; the low 9 bits name it, the next 3 the kind of its operands.
OPCODES = {
    0x03C: "mma",  # HMMA: one warp
    0x1F0: "wgmma",  # HGMMA: four warps, operands in shared memory
    0x183: "local",  # LDL
    0x187: "local",  # STL
}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel as it will run.

    spills: instructions that read or write local memory, in the code (not in time). stack_bytes: per thread.
    wgmma, mma: tensor-core instructions in the code, Hopper's own and the older ones that one warp issues.
    pallas: XLA was handed this kernel, and did not write it.
    """

    name: str
    registers: int
    stack_bytes: int
    spills: int
    shared_bytes: int
    wgmma: int
    mma: int
    instructions: int
    pallas: bool = False


def kernels(executable: bytes) -> list[Kernel]:
    """Those of every cubin in a serialized executable (or in plain bytes that hold one)."""
    data = _records(executable)
    found, at = [], data.find(b"\x7fELF")
    while at >= 0:
        if struct.unpack_from("<H", data, at + 18) == (
            CUDA,
        ):  # Mosaic wraps its own in an object file of the host's
            found += _cubin(data[at:])
        at = data.find(b"\x7fELF", at + 4)
    return found


def _cubin(elf: bytes) -> list[Kernel]:
    (offset,) = struct.unpack_from("<Q", elf, 40)
    size, count, names = struct.unpack_from("<HHH", elf, 58)
    headers = [struct.unpack_from("<IIQQQQIIQQ", elf, offset + i * size) for i in range(count)]

    def text(start: int) -> str:
        return elf[start : elf.index(b"\0", start)].decode()

    titles = [text(headers[names][4] + header[0]) for header in headers]
    body = {title: elf[h[4] : h[4] + h[5]] for title, h in zip(titles, headers, strict=True) if h[1] != 8}
    sizes = {title: header[5] for title, header in zip(titles, headers, strict=True)}
    strings = headers[titles.index(".strtab")][4]
    symbols = [
        text(strings + struct.unpack_from("<I", body[".symtab"], i)[0])
        for i in range(0, len(body[".symtab"]), 24)
    ]
    facts = _facts(body[".nv.info"], symbols)
    return [
        _kernel(title[6:], code, facts[title[6:]], sizes.get(f".nv.shared.{title[6:]}", 0))
        for title, code in body.items()
        if title.startswith(".text.") and title[6:] in facts
    ]


def _facts(info: bytes, symbols: list[str]) -> dict[str, dict[int, int]]:
    """{kernel: {attribute: value}} of the attributes that are pairs of a symbol and a value."""
    facts, at = collections.defaultdict(dict), 0
    while at < len(info):
        kind, attribute, size = struct.unpack_from("<BBH", info, at)
        at += 4
        if kind == 4:  # followed by `size` bytes; the other kinds hold their value in place of the size
            if size == 8:
                symbol, value = struct.unpack_from("<II", info, at)
                facts[symbols[symbol]][attribute] = value
            at += size
    return facts


def _kernel(name: str, code: bytes, facts: dict[int, int], shared: int) -> Kernel:
    words = np.frombuffer(code, "<u8")[::2] & 0x1FF
    counts = collections.Counter()
    for opcode, kind in OPCODES.items():
        counts[kind] += int((words == opcode).sum())
    return Kernel(
        name=name,
        registers=facts.get(REGISTERS, 0),
        stack_bytes=facts.get(FRAME_SIZE, 0),
        spills=counts["local"],
        shared_bytes=shared,
        wgmma=counts["wgmma"],
        mma=counts["mma"],
        instructions=len(words),
    )


def _records(executable: bytes) -> bytes:
    """The decompressed records one after another (newer versions nest them); bytes without records as they are."""
    start = executable.find(RIEGELI)
    if start < 0:
        return executable
    # Every 64 KiB from the start there is a block header in the midst of whatever is being written.
    file = executable[start:]
    file = b"".join(file[i + BLOCK_HEADER : i + BLOCK] for i in range(0, len(file), BLOCK))
    out, at = [], 0
    while at + CHUNK_HEADER <= len(file):
        _, size, _, kind, _ = struct.unpack_from("<QQQQQ", file, at)
        at += CHUNK_HEADER
        if at + size > len(file):
            break  # the file has ended, and something else follows
        if kind & 0xFF == ord("r"):
            out.append(_simple_chunk(file[at : at + size]))
        at += size
    return _records(b"".join(out))


def _simple_chunk(chunk: bytes) -> bytes:
    kind = chunk[:1]
    sizes, at = _varint(chunk, 1)
    values = chunk[at + sizes :]
    if kind == b"\0":
        return values
    if kind != b"s":
        raise ValueError(f"Riegeli compression {kind!r}: expected none or Snappy")
    return snappy(values[_varint(values, 0)[1] :])  # our own size comes before Snappy's


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def snappy(data: bytes) -> bytes:
    """Decompress one raw Snappy stream."""
    size, at = _varint(data, 0)
    out = bytearray()
    while len(out) < size:
        tag = data[at]
        at += 1
        if tag & 3 == 0:  # literal
            length = (tag >> 2) + 1
            if length > 60:
                extra = length - 60
                length = int.from_bytes(data[at : at + extra], "little") + 1
                at += extra
            out += data[at : at + length]
            at += length
            continue
        if tag & 3 == 1:
            length, offset = ((tag >> 2) & 7) + 4, (tag >> 5) << 8 | data[at]
            at += 1
        else:
            extra = 2 if tag & 3 == 2 else 4
            length, offset = (tag >> 2) + 1, int.from_bytes(data[at : at + extra], "little")
            at += extra
        while length:  # a copy may overlap itself
            piece = out[len(out) - offset :][:length]
            out += piece
            length -= len(piece)
    return bytes(out)
