"""Which kernel is reached by which test; an error if one is reached by none, or one of IN_16_BITS not in bf16.

usage: python3 reached.py [--write]

Runs every test that needs the emulator by itself, and compares what it starts with the kernels of the sources. The table in
README.md must have what was seen; `--write` puts it there.
"""
import argparse
import collections
import os
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
SOURCES = ROOT / "worker" / "src" / "kernels" / "cuda" / "source"
README = pathlib.Path(__file__).parent / "README.md"
BEGIN, END = "<!-- reached.py -->\n", "<!-- /reached.py -->\n"
# Arguments of cargo test, and what the tests' names begin with.
SUITES = [(["-p", "strata-worker", "--features", "cuda", "--lib"], "kernels::cuda::"),
          (["-p", "strata-worker", "--features", "cuda", "--lib"], "engine::cuda::"),
          (["--features", "cuda", "--test", "it"], "gpu::")]
ELEMENTS = ("f32", "bf16", "f16")
# Kernels whose work depends on the format of activations, and that models are served with in 16 bits.
IN_16_BITS = re.compile("attention|dequantize|embed$|gate_mul$|matvec_int|norm_rows$|quantize_rows$|rope_store$|tile")


def kernels():
    """Names in the sources, those that macros define too."""
    text = "".join(path.read_text() for path in sorted(SOURCES.glob("*.cu")))
    plain = re.findall(r'extern "C" __global__ void (?:__launch_bounds__\([^)]*\) )?([a-z]\w*)\(', text)
    macros = re.findall(r'#define (\w+)\(NAME[^\n]*\\\n(?:[^\n]*\\\n)*[^\n]*__global__', text)
    return sorted({*plain, *(name for macro in macros for name in re.findall(rf"^{macro}\((\w+)", text, re.MULTILINE))})


def tests(cargo, prefix):
    listed = subprocess.run(["cargo", "test", *cargo, prefix, "--", "--list", "--format", "terse"], cwd=ROOT, check=True,
                            stdout=subprocess.PIPE, text=True).stdout
    return re.findall(rf"^({prefix}\S+): test$", listed, re.MULTILINE)


def started(cargo, test):
    """What a test starts: (kernel, format of activations, width of heads)."""
    with tempfile.TemporaryDirectory() as folder:
        trace = pathlib.Path(folder) / "trace"
        environment = os.environ | {"EMULATOR_TRACE": str(trace)}
        subprocess.run(["cargo", "test", "--quiet", *cargo, test, "--", "--exact"], cwd=ROOT, check=True,
                       env=environment, stdout=subprocess.DEVNULL)
        lines = trace.read_text().splitlines() if trace.exists() else []
    found = (re.fullmatch(r"(\w+) .*-DELEMENT=(\d).*-DHEAD_DIM=(\d+).*", line) for line in lines)
    return {(m[1], ELEMENTS[int(m[2])], int(m[3])) for m in found}


def table(names, by_test):
    rows = ["| kernel | activations | head widths | tests |", "|---|---|---|---|"]
    for name in names:
        seen = [(test, s) for test, all_started in by_test.items() for s in all_started if s[0] == name]
        elements = " ".join(e for e in ELEMENTS if any(s[1] == e for _, s in seen))
        widths = " ".join(map(str, sorted({s[2] for _, s in seen}))) if re.match("attention|rope", name) else "any"
        reached = sorted({number for number, test in enumerate(by_test, 1) if any(t == test for t, _ in seen)})
        rows.append(f"| `{name}` | {elements} | {widths} | {' '.join(map(str, reached))} |")
    listed = [f"{number}. `{test}`" for number, test in enumerate(by_test, 1)]
    return "\n".join([*rows, "", *listed, ""])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into README.md")
    args = parser.parse_args()
    by_test = {}
    for cargo, prefix in SUITES:
        for test in tests(cargo, prefix):
            by_test[test] = started(cargo, test)
            print(f"{test}: {len(by_test[test])}", file=sys.stderr, flush=True)
    by_test = {test: found for test, found in by_test.items() if found}
    names = kernels()
    counted = collections.Counter(name for found in by_test.values() for name in {s[0] for s in found})
    if missed := [name for name in names if name not in counted]:
        sys.exit(f"no test starts {', '.join(missed)}: add one")
    in_bf16 = {kernel for found in by_test.values() for kernel, element, _ in found if element == "bf16"}
    if missed := [name for name in names if IN_16_BITS.match(name) and name not in in_bf16]:
        sys.exit(f"no test starts {', '.join(missed)} with activations in bf16: add one")
    before = README.read_text()
    head, rest = before.split(BEGIN)
    after = head + BEGIN + table(names, by_test) + END + rest.split(END)[1]
    if args.write:
        README.write_text(after)
    elif after != before:
        sys.exit("the table in tests/gpu/README.md is not what was seen: python3 tests/gpu/reached.py --write")


if __name__ == "__main__":
    main()
