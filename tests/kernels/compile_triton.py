"""Compiles every Triton kernel for a GPU, on a machine that need not have one; run by test_triton.

Prints a line for each: its name, its bytes of shared memory, and the bytes of memory that its
registers did not suffice for.
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
NUMBERS = {"begin", "end", "steps", "rows", "H", "t"}
HALVES = {"gates", "recurrent", "hidden", "operand", "operand_second", "operand_gated", "operands",
          "operands_second", "dz", "grad_hidden"}  # fmt: skip
CELLS = {
    "rnn": (rnn, 1, 1, "none"), "simple-gru": (simple_gru, 2, 1, "none"),
    "gru": (gru, 3, 1, "none"), "lstm": (lstm, 4, 2, "none"),
    "diagonal": (lstm, 4, 2, "diagonal"), "full": (lstm, 4, 2, "full"),
}  # fmt: skip


def compiled(function, constants, *, is_half, **options):
    """Bytes of shared memory of a program, and of memory that its registers did not suffice for."""
    kinds = {}
    for name in function.arg_names:
        if name in constants:
            kinds[name] = "constexpr"
        elif name in NUMBERS:
            kinds[name] = "i32"
        elif name in ("counters", "lengths"):
            kinds[name] = "*i32"
        else:
            is_operand = name in HALVES or (name == "peephole" and constants["PEEPHOLE"] == "full")
            kinds[name] = "*bf16" if is_half and is_operand else "*fp32"
    places = {name: (i,) for i, name in enumerate(function.arg_names)}
    aligned = {places[n]: [["tt.divisibility", 16]] for n, kind in kinds.items() if kind[0] == "*"}
    source = ASTSource(
        fn=function, signature=kinds, attrs=aligned,
        constexprs={places[name]: value for name, value in constants.items()},
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


def alternating(name, page, form):
    """The kernels between two products."""
    for kind in ("forward", "backward"):
        constants = {"CELL": getattr(page, kind), "LENGTHS": True, "COUNT": form["GATES"], **form,
                     "BLOCK": 256}  # fmt: skip
        show(name, kind, compiled(getattr(steps, kind), constants, is_half=True))
    if name == "gru":
        for kind in ("prepare", "finish"):
            constants = {"CELL": getattr(page, kind), "BLOCK": 256}
            show(name, kind, compiled(getattr(steps, kind), constants, is_half=True))


def all_at_once(name, page, form):
    """The kernels of all steps, small, and large as far as there are any."""
    large = {"lstm": ((16, 16, 512), (16, 32, 1024), (32, 32, 512)), "gru": ((16, 32, 1024),),
             "full": ((8, 16, 1024),)}  # fmt: skip
    for kind in ("forward", "backward"):
        for units, rows, width in ((8, 16, 256), *large.get(name, ())):
            function, own = getattr(persistent, kind), form
            if name == "gru":
                other = "prepare" if kind == "forward" else "finish"
                function, own = getattr(persistent_gru, kind), {other.upper(): getattr(page, other)}
            constants = {"CELL": getattr(page, kind), **own, "REVERSE": False, "PRECISION": "ieee",
                         "ROWS": rows, "UNITS": units, "K": width, "SPLIT": 8}  # fmt: skip
            ways = ((True, False), (True, True), (False, False))  # of bf16; with lengths
            for is_half, constants["LENGTHS"] in ways if width == 256 else ways[:1]:
                if "AHEAD" in function.arg_names:
                    constants["AHEAD"] = scan._reads_ahead(rows, width, 2 if is_half else 4)
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
    for name, (page, gates, parts, peephole) in CELLS.items():
        form = {"GATES": gates, "PARTS": parts, "PEEPHOLE": peephole, "OTHER": False}
        alternating(name, page, form)
        all_at_once(name, page, form)


if __name__ == "__main__":
    main()
