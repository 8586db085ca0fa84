"""Counts the machine code of the kernels, as NVIDIA's compiler makes it for a GPU, without one.

usage: python machine_code.py [--before COMMIT] [--capability 90] [--element 1] [--head-dim 128]

Needs machine_code.txt: NVRTC makes the code, nvdisasm (which Triton's wheel brings) reads it. For every kernel:
registers, bytes of stack (spilled registers), static shared memory, and of the loop that does the work (the smallest with
most products of matrices, or where there are none the longest) its instructions, its products, and instructions per
product. With --before, the same of an older commit stands beside it.
"""
import argparse
import ctypes
import importlib.util
import pathlib
import re
import subprocess
import tempfile

import compile as compiler

ROOT = compiler.KERNELS.parents[3]
# Instructions that multiply matrices.
PRODUCT = re.compile(r"\b(HMMA|IMMA|HGMMA|IGMMA)\b")
INSTRUCTION = re.compile(r"^\s*(?:\.\S+\s+)?/\*([0-9a-f]{4,})\*/\s+(.*?);")


def cubin(text, options):
    """Machine code of a source."""
    nvrtc, program, size = compiler.load(), ctypes.c_void_p(), ctypes.c_size_t()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"strata.cu", 0, None, None)
    array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    if nvrtc.nvrtcCompileProgram(program, len(options), array):
        raise SystemExit(compiler.compile_one(nvrtc, text.encode(), options)[1])
    nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
    code = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetCUBIN(program, code)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return code.raw


def disassembler():
    """nvdisasm of Triton's wheel."""
    found = importlib.util.find_spec("triton")
    if found is None:
        raise SystemExit("triton is not installed: pip install -r tests/gpu/machine_code.txt")
    return pathlib.Path(found.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm"


def sources(commit):
    """The sources of a commit, or of the working tree, in their order."""
    if commit is None:
        return compiler.source()[0]
    read = lambda path: subprocess.run(["git", "-C", ROOT, "show", f"{commit}:{path.relative_to(ROOT)}"], check=True,
                                       capture_output=True, text=True).stdout
    names = re.findall(r'include_str!\("(.*?)"\)', read(compiler.KERNELS / "launch.rs"))
    return "".join(read(compiler.KERNELS / name) for name in names)


def kernels(code):
    """By name: what the compiler says of a kernel, and its instructions (address, text)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        text = subprocess.run([disassembler(), file.name], check=True, capture_output=True, text=True).stdout
    found, name = {}, None
    for line in text.splitlines():
        if section := re.match(r'\s*\.section\s+\.text\.(\w+),"', line):
            name = section[1]
            found[name] = {"code": [], "labels": {}, "registers": 0}
        elif re.match(r"\s*\.section", line):
            name = None
        elif name and (label := re.match(r"^\s*(\.L_x_\d+):", line)):
            found[name]["labels"][label[1]] = len(found[name]["code"])
        elif name and (instruction := INSTRUCTION.match(line)):
            found[name]["code"].append(instruction[2])
        if sized := re.match(r'\s*\.sectioninfo\s+@"SHI_REGISTERS=(\d+)"', line):
            if name:
                found[name]["registers"] = int(sized[1])
    return found


def attributes(code):
    """Registers, bytes of stack and of shared memory by kernel, from the sections and symbols of the machine code."""
    import struct
    (offset,), (size, count, names) = struct.unpack_from("<Q", code, 40), struct.unpack_from("<HHH", code, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", code, offset + i * size) for i in range(count)]
    text = lambda table, at: code[sections[table][4] + at:].split(b"\0", 1)[0].decode()
    found, symbols = {}, []
    for section in sections:
        name = text(names, section[0])
        if name.startswith(".text."):
            found.setdefault(name[6:], {})["registers"] = section[7] >> 24
        if name.startswith(".nv.shared.") and name[11:]:
            found.setdefault(name[11:], {})["shared"] = section[5]
        if section[1] == 2:  # symbols
            for at in range(section[4], section[4] + section[5], 24):
                symbols.append(text(section[6], struct.unpack_from("<I", code, at)[0]))
    for section in sections:
        if text(names, section[0]) != ".nv.info":
            continue
        at, end = section[4], section[4] + section[5]
        while at < end:  # format, attribute, size or value; then the value
            form, attribute, length = struct.unpack_from("<BBH", code, at)
            at += 4
            if form == 4:
                if attribute in (0x11, 0x2f):  # EIATTR_FRAME_SIZE, EIATTR_REGCOUNT
                    symbol, value = struct.unpack_from("<II", code, at)
                    key = "stack" if attribute == 0x11 else "registers"
                    found.setdefault(symbols[symbol], {})[key] = value
                at += length
    return found


def loops(kernel):
    """The instructions of each loop: from where a branch goes back to, to the branch."""
    for at, text in enumerate(kernel["code"]):
        target = re.search(r"\bBRA\b.*?(\.L_x_\d+)", text)
        begin = kernel["labels"].get(target[1]) if target else None
        if begin is not None and begin < at:
            yield [text for text in kernel["code"][begin:at + 1] if "NOP" not in text]


def describe(code):
    """Figures by kernel."""
    facts, table = attributes(code), {}
    for name, kernel in kernels(code).items():
        fact = facts.get(name, {})
        bodies = [(sum(bool(PRODUCT.search(text)) for text in body), len(body)) for body in loops(kernel)]
        # The smallest loop that has all the products that a loop has; without products, the longest.
        most = max((products for products, _ in bodies), default=0)
        lengths = [length for products, length in bodies if products == most]
        length = (min if most else max)(lengths, default=0)
        table[name] = {"instructions": len(kernel["code"]), "registers": fact.get("registers", 0),
                       "stack": fact.get("stack", 0), "shared": fact.get("shared", 0), "loop": length,
                       "products": most}
    return table


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--before", help="a commit to stand beside")
    parser.add_argument("--capability", type=int, default=90)
    parser.add_argument("--element", type=int, default=1, help="0: f32, 1: bf16, 2: f16")
    parser.add_argument("--head-dim", type=int, default=128)
    arguments = parser.parse_args()
    options = [f"--gpu-architecture=sm_{arguments.capability}", *compiler.source()[1],
               f"-DELEMENT={arguments.element}", f"-DHEAD_DIM={arguments.head_dim}"]
    now = describe(cubin(sources(None), options))
    before = describe(cubin(sources(arguments.before), options)) if arguments.before else {}
    columns = ("instructions", "registers", "stack", "shared", "loop", "products")
    print(f"sm_{arguments.capability}, ELEMENT={arguments.element}, HEAD_DIM={arguments.head_dim}"
          + (f"; before: {arguments.before}" if before else ""))
    print(f"{'kernel':32}" + "".join(f"{column:>16}" for column in columns) + f"{'per product':>16}")
    for name in sorted(now | before):
        cells = []
        for column in columns:
            pair = [str(table[name][column]) for table in (before, now) if name in table]
            cells.append(" -> ".join(pair) if len(set(pair)) > 1 else pair[0])
        each = [f"{t[name]['loop'] / t[name]['products']:.1f}" for t in (before, now)
                if name in t and t[name]["products"]]
        print(f"{name:32}" + "".join(f"{cell:>16}" for cell in cells) + f"{' -> '.join(dict.fromkeys(each)) or '-':>16}")


if __name__ == "__main__":
    main()
