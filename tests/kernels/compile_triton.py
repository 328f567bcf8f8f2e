"""Compiles every Triton kernel for a GPU, without needing one; run by test_triton.

Prints a line for each kernel: its name, its bytes of shared memory, and its bytes of stack memory
(spilled registers).
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lmtrain.kernels.triton import (
    gru,
    lstm,
    persistent,
    persistent_gru,
    rnn,
    scan,
    simple_gru,
    steps,
)

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INTEGERS = {"begin", "end", "steps", "rows", "H", "t"}
HALF_PRECISION = {
    "gates", "recurrent", "hidden", "operand", "operand_second", "operand_gated", "operands",
    "operands_second", "dz", "grad_hidden",
}  # fmt: skip
CELLS = {
    "rnn": (rnn, 1, 1, "none"), "simple-gru": (simple_gru, 2, 1, "none"),
    "gru": (gru, 3, 1, "none"), "lstm": (lstm, 4, 2, "none"),
    "diagonal": (lstm, 4, 2, "diagonal"), "full": (lstm, 4, 2, "full"),
}  # fmt: skip


def compiled(function, constants, *, is_half, **options):
    """Bytes of shared memory and of stack memory of a program."""
    types = {}
    for name in function.arg_names:
        if name in constants:
            types[name] = "constexpr"
        elif name in INTEGERS:
            types[name] = "i32"
        elif name in ("counters", "lengths"):
            types[name] = "*i32"
        else:
            is_operand = name in HALF_PRECISION or (
                name == "peephole" and constants["PEEPHOLE"] == "full"
            )
            types[name] = "*bf16" if is_half and is_operand else "*fp32"
    paths = {name: (i,) for i, name in enumerate(function.arg_names)}
    aligned = {paths[n]: [["tt.divisibility", 16]] for n, kind in types.items() if kind[0] == "*"}
    source = ASTSource(
        fn=function, signature=types, attrs=aligned,
        constexprs={paths[name]: value for name, value in constants.items()},
    )  # fmt: skip
    code = triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": True, **options}
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "--dump-resource-usage", file.name],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    return f"{code.metadata.shared} {re.search(r'STACK:([0-9]+)', usage)[1]}"


def show(*words: object) -> None:
    sys.stdout.write(" ".join(map(str, words)) + "\n")


def alternating(name, module, form):
    """The kernels of the alternating schedule."""
    for kind in ("forward", "backward"):
        constants = {"CELL": getattr(module, kind), "LENGTHS": True, "COUNT": form["GATES"], **form,
                     "BLOCK": 256}  # fmt: skip
        show(name, kind, compiled(getattr(steps, kind), constants, is_half=True))
    if name == "gru":
        for kind in ("prepare", "finish"):
            constants = {"CELL": getattr(module, kind), "BLOCK": 256}
            show(name, kind, compiled(getattr(steps, kind), constants, is_half=True))


def persistent_schedule(name, module, form):
    """The kernels of the persistent schedule: small programs, and large ones of some cells."""
    large = {"lstm": ((16, 16, 512), (16, 32, 1024), (32, 32, 512)), "gru": ((16, 32, 1024),),
             "full": ((8, 16, 1024),)}  # fmt: skip
    for kind in ("forward", "backward"):
        for units, rows, width in ((8, 16, 256), *large.get(name, ())):
            function, options = getattr(persistent, kind), form
            if name == "gru":
                other = "prepare" if kind == "forward" else "finish"
                function = getattr(persistent_gru, kind)
                options = {other.upper(): getattr(module, other)}
            constants = {"CELL": getattr(module, kind), **options, "REVERSE": False,
                         "PRECISION": "ieee",
                         "ROWS": rows, "UNITS": units, "K": width, "SPLIT": 8}  # fmt: skip
            cases = ((True, False), (True, True), (False, False))  # is bf16, has lengths
            for is_half, constants["LENGTHS"] in cases if width == 256 else cases[:1]:
                if "PREFETCH" in function.arg_names:
                    constants["PREFETCH"] = scan._can_prefetch(rows, width, 2 if is_half else 4)
                sizes = compiled(
                    function,
                    constants,
                    is_half=is_half,
                    num_warps=8,
                    num_stages=1,
                    launch_cooperative_grid=True,
                )
                show(name, "persistent", kind, units, rows, width, 2 if is_half else 4, sizes)


def main() -> None:
    for name, (module, gates, parts, peephole) in CELLS.items():
        form = {"GATES": gates, "PARTS": parts, "PEEPHOLE": peephole, "TANH": True}
        alternating(name, module, form)
        persistent_schedule(name, module, form)


if __name__ == "__main__":
    main()
