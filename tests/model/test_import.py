"""`import fila` brings in little beside `transformers.modeling_utils`, which every model class needs."""

import json
import subprocess
import sys

# The families that FILA's classes inherit from, and what those import. The Auto classes register a class, not a name,
# so `import fila` has to import the model classes; their files are small.
EXPECTED = {"PIL", "fila", "fila_kernels", "torch", "transformers"}
FAMILIES = {"auto", "clip", "convnext", "encoder_decoder", "llava_next"}


def imported_beside_modeling_utils(root) -> set[str]:
    code = (
        "import json, sys, torch, transformers.modeling_utils; before = set(sys.modules); import fila; "
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def test_importing_fila_adds_nothing_heavy(root):
    added = imported_beside_modeling_utils(root)
    assert {name.partition(".")[0] for name in added} <= EXPECTED
    heavy = ("torch._dynamo", "torch._inductor", "torch._functorch", "torch.distributed", "torch.export", "triton")
    assert not [name for name in added if name.startswith(heavy)]
    families = {name.split(".")[2] for name in added if name.startswith("transformers.models.")}
    assert families <= FAMILIES
    # Ours replaces the image processors of those families.
    assert not [name for name in added if "llava_next.image_processing" in name or "clip.image_processing" in name]
    # Pillow's other formats wait for the first picture; of these two the project reads the headers itself.
    plugins = {name for name in added if name.startswith("PIL.") and name.endswith("ImagePlugin")}
    assert plugins <= {"PIL.JpegImagePlugin", "PIL.TiffImagePlugin"}
    # Commands, answers, loading and export wait for their user.
    rooms = ("fila.cli", "fila.inference", "fila.checkpoints", "fila.visualize", "fila.aot")
    assert not [name for name in added if name.startswith((*rooms, "fila_kernels.backends.triton"))]
