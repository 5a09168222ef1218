"""Runs all layouts by images, plans and frozen inputs: `python tests/kernels/fuzz_matrix.py SEED [BACKEND ...]`.

For each of these the other factors (widths, dtype, tiles, gate, prefix, alpha) are drawn anew. Backends are those of a
CPU; "triton" is interpreted, in which float16 stands for bfloat16. Prints the seed, and every cell that is wrong.
"""

import itertools
import os
import random
import sys

BACKENDS = ("native", "eager", "triton")
WHOLE = ("layout", "images", "plan", "frozen")


def main(seed: int, backends: tuple[str, ...]) -> int:
    import torch
    from gpu_checks import cell_id, check_cell, matrix

    from fila_kernels import dispatch

    chance, wrong = random.Random(seed), 0
    torch.set_num_threads(1)
    for backend in backends:
        usable, reason = dispatch.available(backend)
        if not usable:
            print(f"{backend}: left out, {reason}")
            continue
        low = torch.float16 if backend == "triton" else torch.bfloat16
        factors = matrix({str(low).removeprefix("torch."): low, "autocast": low, "float32": torch.float32})
        plans = [plan for plan in factors["plan"] if backend == "triton" or plan != "single_pass"]
        product = list(itertools.product(*((factors | {"plan": plans})[name] for name in WHOLE)))
        for values in product:
            rest = {name: chance.choice(of) for name, of in factors.items() if name not in WHOLE}
            cell = dict(zip(WHOLE, values, strict=True)) | rest
            try:
                check_cell(cell, backend)
            except AssertionError as error:
                wrong += 1
                print(f"seed {seed}, {backend} {cell_id(cell)}: {error}")
        print(f"{backend}: {len(product)} cells, seed {seed}, {wrong} wrong so far", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    sys.exit(main(int(sys.argv[1]), tuple(sys.argv[2:]) or BACKENDS))
