"""Counts the machine code of the kernels, as NVIDIA's compiler makes it for a GPU, without one.

usage: python machine_code.py [--before COMMIT] [--check] [--capability 90] [--element 1] [--head-dim 128]

Needs machine_code.txt: NVRTC makes the code, nvdisasm (which Triton's wheel brings) reads it. For every kernel:
registers, bytes of stack (spilled registers), static shared memory, blocks that a multiprocessor has room for (by registers,
threads and static shared memory; what is asked for at the start comes off), instructions that store or load spilled registers,
and how many of them are in loops. Of the loop that does the work (the one that has, outside of loops within it, most products
of matrices, or where no loop has any, most loads and multiplications) its instructions, its loads, its products, and
instructions per product.
With --before, the same of an older commit stands beside it. With --check, exits with 1 if a kernel exceeds its limits.
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
MULTIPLY = re.compile(r"\b(FFMA|HFMA2|IDP)\b")
NOTHING = re.compile(r"\bNOP\b")
LOAD = re.compile(r"\b(LD|LDG|LDS|LDSM|LDGSTS)\b")
SPILL = re.compile(r"\b(STL|LDL)\b")
# Of a multiprocessor, by capability: registers, threads, bytes of shared memory, blocks (CUDA C++ Programming Guide, "Technical
# Specifications per Compute Capability"). Registers are given to a warp 256 at a time.
ROOM = {80: (65536, 2048, 164 << 10, 32), 86: (65536, 1536, 100 << 10, 16), 89: (65536, 1536, 100 << 10, 24),
        90: (65536, 2048, 228 << 10, 32), 100: (65536, 2048, 228 << 10, 32), 120: (65536, 1536, 100 << 10, 24)}
# Threads of a block of what says nothing of that itself.
THREADS = 256
# Most instructions of a loop, by format of activations and width of heads.
LIMITS = {(1, 128): {"attention_prefill": 900, "attention_decode": 420}}
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
        of = text(names, section[0])
        if of != ".nv.info" and not of.startswith(".nv.info."):
            continue
        at, end = section[4], section[4] + section[5]
        while at < end:  # format, attribute, size or value; then the value
            form, attribute, length = struct.unpack_from("<BBH", code, at)
            at += 4
            if form == 4:
                if attribute == 0x05 and of != ".nv.info":  # EIATTR_MAX_THREADS, of `__launch_bounds__`
                    x, y, z = struct.unpack_from("<III", code, at)
                    found.setdefault(of[9:], {})["threads"] = x * y * z
                if attribute in (0x11, 0x2f) and of == ".nv.info":  # EIATTR_FRAME_SIZE, EIATTR_REGCOUNT
                    symbol, value = struct.unpack_from("<II", code, at)
                    key = "stack" if attribute == 0x11 else "registers"
                    found.setdefault(symbols[symbol], {})[key] = value
                at += length
    return found


def flow(kernel):
    """Blocks of instructions without a branch, as (begin, end), and by block those that may come next."""
    code, labels = kernel["code"], kernel["labels"]
    # Threads that wait for each other go on at a place that was named before.
    meetings = {}
    for text in code:
        if named := re.search(r"\bBSSY\S* (B\d+), .*?(\.L_x_\d+)", text):
            meetings.setdefault(named[1], []).append(labels[named[2]])
    after = []
    for at, text in enumerate(code):
        target = re.search(r"\bBRA\b.*?(\.L_x_\d+)", text)
        meeting = re.search(r"\bBSYNC\S* (B\d+)", text)
        if target and target[1] in labels:
            after.append({labels[target[1]]} | (set() if re.match(r"BRA `?\(", text) else {at + 1}))
        elif meeting:
            after.append({min((to for to in meetings.get(meeting[1], ()) if to > at), default=at + 1)})
        else:
            after.append(set() if re.match(r"(EXIT|RET|BRX|BRA)\b", text) else {at + 1})
    begins = sorted({0} | {to for at, next_ones in enumerate(after) for to in next_ones if next_ones != {at + 1}}
                    | {at + 1 for at, next_ones in enumerate(after) if next_ones != {at + 1}})
    begins = [begin for begin in begins if begin < len(code)]
    number = {begin: index for index, begin in enumerate(begins)}
    spans = list(zip(begins, [*begins[1:], len(code)]))
    return spans, [{number[to] for to in after[end - 1] if to in number} for _, end in spans]


def loops(kernel):
    """The instructions of each loop, as a set of their places. A branch back is one's end if all ways to it go by its target."""
    spans, following = flow(kernel)
    before = [[] for _ in spans]
    for block, next_ones in enumerate(following):
        for one in next_ones:
            before[one].append(block)
    # By block, as bits: those that every way to it goes by.
    everything = (1 << len(spans)) - 1
    passed, changed = [1] + [everything] * (len(spans) - 1), True
    while changed:
        changed = False
        for block in range(1, len(spans)):
            common = everything
            for one in before[block]:
                common &= passed[one]
            common |= 1 << block
            changed, passed[block] = changed or common != passed[block], common
    bodies = {}
    for block, next_ones in enumerate(following):
        for head in next_ones:
            if passed[block] != everything and passed[block] >> head & 1:
                body, ways = bodies.setdefault(head, {head}), [block]
                while ways:
                    one = ways.pop()
                    if one not in body:
                        body.add(one)
                        ways += before[one]
    return [{at for block in body for at in range(*spans[block])} for body in bodies.values()]


def loop(kernel, bodies):
    """Instructions, loads and products of the loop that does the work; nothing if no loop loads or multiplies anything."""
    count = lambda pattern, places: sum(bool(pattern.search(kernel["code"][at])) for at in places)
    best, found = (0, 0), (0, 0, 0)
    for body in bodies:
        own = body.difference(*(other for other in bodies if other < body))
        worth = (count(PRODUCT, own), count(LOAD, own) + count(MULTIPLY, own))
        if worth > best:
            length = len(body) - count(NOTHING, body)
            best, found = worth, (length, count(LOAD, body), count(PRODUCT, body))
    return found


def blocks(fact, capability):
    """How many blocks of a kernel a multiprocessor has room for; nothing if it is not known what it has."""
    if capability not in ROOM:
        return 0
    registers, threads, shared, most = ROOM[capability]
    warps = -(-fact.get("threads", THREADS) // 32)
    each = -(-max(1, fact.get("registers", 0)) * 32 // 256) * 256
    # A block's own registers are given to its warps four by four.
    return min(registers // each // 4 * 4 // warps, threads // (32 * warps), shared // max(1, fact.get("shared", 0)), most)


def describe(code, capability):
    """Figures by kernel."""
    facts, table = attributes(code), {}
    for name, kernel in kernels(code).items():
        fact = facts.get(name, {})
        bodies = loops(kernel)
        length, loads, products = loop(kernel, bodies)
        spills = [at for at, text in enumerate(kernel["code"]) if SPILL.search(text)]
        table[name] = {"instructions": len(kernel["code"]), "registers": fact.get("registers", 0),
                       "stack": fact.get("stack", 0), "shared": fact.get("shared", 0),
                       "blocks": blocks(fact, capability), "spills": len(spills),
                       "in loops": sum(any(at in body for body in bodies) for at in spills),
                       "loop": length, "loads": loads, "products": products}
    return table


def exceeded(table, limits):
    """What is beyond the limits."""
    for name, kernel in sorted(table.items()):
        if kernel["in loops"]:
            yield f"{name}: {kernel['in loops']} instructions of its loops store or load spilled registers; expected none"
        if kernel["loop"] > limits.get(name, kernel["loop"]):
            yield f"{name}: its loop has {kernel['loop']} instructions; expected {limits[name]} at most"
    for name in sorted(limits.keys() - table.keys()):
        yield f"{name}: there is no such kernel; expected one, whose loop has {limits[name]} instructions at most"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--before", help="a commit to stand beside")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a kernel exceeds its limits")
    parser.add_argument("--capability", type=int, default=90)
    parser.add_argument("--element", type=int, default=1, help="0: f32, 1: bf16, 2: f16")
    parser.add_argument("--head-dim", type=int, default=128)
    arguments = parser.parse_args()
    options = [f"--gpu-architecture=sm_{arguments.capability}", *compiler.source()[1],
               f"-DELEMENT={arguments.element}", f"-DHEAD_DIM={arguments.head_dim}"]
    now = describe(cubin(sources(None), options), arguments.capability)
    before = describe(cubin(sources(arguments.before), options), arguments.capability) if arguments.before else {}
    columns = ("instructions", "registers", "stack", "shared", "blocks", "spills", "in loops", "loop", "loads", "products")
    # Wide enough for one figure, or for two with an arrow between them.
    wide = 16 if before else 13
    print(f"sm_{arguments.capability}, ELEMENT={arguments.element}, HEAD_DIM={arguments.head_dim}"
          + (f"; before: {arguments.before}" if before else ""))
    print(f"{'kernel':32}" + "".join(f"{column:>{wide}}" for column in columns) + f"{'per product':>{wide}}")
    for name in sorted(now | before):
        cells = []
        for column in columns:
            pair = [str(table[name][column]) for table in (before, now) if name in table]
            cells.append(" -> ".join(pair) if len(set(pair)) > 1 else pair[0])
        each = [f"{t[name]['loop'] / t[name]['products']:.1f}" for t in (before, now)
                if name in t and t[name]["products"]]
        print(f"{name:32}" + "".join(f"{cell:>{wide}}" for cell in cells)
              + f"{' -> '.join(dict.fromkeys(each)) or '-':>{wide}}")
    if arguments.check and (beyond := list(exceeded(now, LIMITS.get((arguments.element, arguments.head_dim), {})))):
        raise SystemExit("\n".join(beyond))


if __name__ == "__main__":
    main()
