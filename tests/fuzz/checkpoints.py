"""Throws mutated checkpoint folders at the loader: `python -m tests.fuzz.checkpoints [COUNT [SEED]]`.

Each folder is loaded right or refused with a `CheckpointError`, or with a `MemoryError` of the project's own. Anything
else is a failure: another error, numbers that differ from those stored, code of the folder that ran, more than
`MOST_SECONDS`, a crash. Every folder has a process of its own, forked from one that has loaded the whole checkpoint,
and may take `MEMORY` more than that. The seed is printed and makes a run repeatable.
"""

import copy
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from fila.checkpoints.check import GENERATION, SHIPPED, WEIGHTS, WEIGHTS_INDEX, CheckpointError
from fila.checkpoints.load import load
from tests.fuzz import hostile_folders

MOST_SECONDS = 30  # of the processor's time
MEMORY = 1 << 30  # of address space, beyond the warmed process: some ten copies of the model
FILES = ("config.json", "processor_config.json", "tokenizer_config.json", "tokenizer.json", GENERATION)
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 64.0, 0.5, -0.0, 10**5, 10**9, 2**31, 2**63, 10**30, -(10**9), "", "64",
    "fila", "../config.json", "/etc/passwd", "kernels-community/flash-attn", "evil.Evil", "eager", "float16",
    "x" * 1000, "\0\n",
    [], {}, [[]], [0] * 1000, [10**9, 10**9], {"": 0}, {"model_type": "llama"}, ["evil.Evil", "evil.Evil"],
)  # fmt: skip
# Names that lead transformers elsewhere, and absurd numbers under names that it reads.
NAMES = (
    "_name_or_path", "attn_implementation", "auto_map", "base_model_name_or_path", "chat_template", "custom_generate",
    "dtype", "experts_implementation", "fast_tokenizer_files", "fusion_config", "head_dim", "layer_types", "num_labels",
    "num_local_experts", "per_layer_config", "processor_class", "quantization_config", "tie_word_embeddings",
    "tokenizer_class", "tokenizer_file", "transformers_weights", "use_kernels", "vocab_file",
)  # fmt: skip
TEXT_MODELS = ("gpt2", "mixtral", "qwen2", "gemma2", "mamba", "bert", "t5", "llava", "opt", "rwkv", "fila", "phi3")


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The paths of all values within a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value[:20]) if isinstance(value, list) else ()
    return [path, *(inner for key, item in items for inner in places(item, (*path, key)))]


def edit_json(draw: random.Random, folder: Path) -> str:
    """Up to three values of one file replaced, removed or added."""
    file = folder / draw.choices(FILES, (8, 4, 3, 1, 1))[0]
    whole = json.loads(file.read_text())
    done = []
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        *path, key = draw.choice([path for path in places(whole) if path] or [("a",)])
        owner = whole
        for part in path:
            owner = owner[part]
        value = copy.deepcopy(draw.choice(VALUES))
        how = draw.randrange(6)
        if how == 0 and key != "a":
            del owner[key]
        elif how == 1 and isinstance(owner, dict):
            key = draw.choice(NAMES)
            owner[key] = value
        elif how == 2 and isinstance(owner[key], (int, float)):
            owner[key] = value = owner[key] * draw.choice((2, -1, 0, 1000, 0.5, 10**6))
        else:
            owner[key] = value
        done.append(f"{'.'.join(map(str, (*path, key)))} {how} {str(value)[:40]}")
    if draw.randrange(10) == 0 and file.name == "config.json" and isinstance(whole.get("text_config"), dict):
        whole["text_config"]["model_type"] = kind = draw.choice(TEXT_MODELS)
        done.append(f"text model {kind}")
    file.write_text(json.dumps(whole))
    return f"{file.name}: {'; '.join(done)}"


def edit_bytes(draw: random.Random, folder: Path) -> str:
    """Bytes of one file flipped, cut off, doubled or replaced."""
    file = draw.choice(sorted(path for path in folder.iterdir() if path.is_file()))
    data = bytearray(file.read_bytes())
    how = draw.choice(("flip", "cut", "double", "noise", "head", "empty"))
    if how == "flip":
        for _ in range(draw.choice((1, 3, 30))):
            data[draw.randrange(min(len(data), 40_000))] ^= 1 << draw.randrange(8)
    elif how == "cut":
        del data[draw.randrange(len(data)) :]
    elif how == "double":
        data = data * 2
    elif how == "noise":
        data = bytearray(draw.randbytes(draw.choice((1, 8, 1000))))
    elif how == "head":
        data[:8] = draw.choice((0, 1, 8, 2**20, 2**32, 2**62, 2**64 - 1)).to_bytes(8, "little")
    else:
        data.clear()
    file.unlink()
    file.write_bytes(data)
    return f"{file.name}: {how}"


def edit_tensors(draw: random.Random, folder: Path) -> str:
    """One tensor gone, renamed, reshaped, of another dtype, not finite, or beside what it is tied to."""
    tensors = load_file(folder / WEIGHTS)
    name = draw.choice(sorted(tensors))
    tensor = tensors[name]
    how = draw.choice(("gone", "renamed", "flat", "empty", "int", "float8", "double", "nan", "inf", "head", "shift"))
    if how in ("gone", "renamed"):
        del tensors[name]
    if how == "renamed":
        tensors[draw.choice((name + "x", "", "\x1b[2J\n", "x" * 5000, name.replace("model.", "", 1)))] = tensor
    elif how == "head":
        embedding = tensors["model.language_model.embed_tokens.weight"]
        tensors["lm_head.weight"] = embedding + draw.randrange(2)
    elif how != "gone":
        tensors[name] = {
            "flat": tensor.flatten(), "empty": tensor.flatten()[:0], "int": tensor.int(), "double": tensor.double(),
            "float8": tensor.to(torch.float8_e4m3fn), "nan": tensor * torch.nan, "inf": tensor + torch.inf,
            "shift": tensor + 1,
        }[how].contiguous()  # fmt: skip
    (folder / WEIGHTS).unlink()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return f"{WEIGHTS}: {name} {how}"


def edit_layout(draw: random.Random, folder: Path) -> str:
    """Two files and an index that may lie, a second layout, a link, a folder or a pipe in a file's place."""
    how = draw.choice(("shards", "twice", "lie", "outside", "both", "pickle", "link", "folder", "pipe", "gone"))
    file = draw.choice([*FILES, WEIGHTS, "chat_template.jinja"])
    if how in ("shards", "twice", "lie", "outside", "both"):
        tensors = load_file(folder / WEIGHTS)
        homes = {name: f"model-0000{draw.choice('12')}-of-00002.safetensors" for name in tensors}
        lost = draw.choice(sorted(homes))
        for home in set(homes.values()):
            both = {lost} if how == "twice" else set()
            stored = {name: tensors[name] for name in homes if homes[name] == home or name in both}
            save_file(stored, folder / home, metadata={"format": "pt"})
        if how == "lie":
            homes[lost] = draw.choice(("model-00001-of-00002.safetensors", "none.safetensors", "", "config.json"))
        if how == "outside":
            homes[lost] = draw.choice((f"../{WEIGHTS}", str(SHIPPED / WEIGHTS), "a/b.safetensors", "~/x.safetensors"))
        (folder / WEIGHTS_INDEX).write_text(json.dumps({"weight_map": homes}))
        if how != "both":
            (folder / WEIGHTS).unlink()
    elif how == "pickle":
        torch.save({}, folder / draw.choice(("pytorch_model.bin", "adapter_model.bin", "training_args.bin")))
    else:
        (folder / file).unlink()
        if how == "link":
            (folder / file).symlink_to(draw.choice((SHIPPED / file, Path("/dev/zero"), Path(file), Path("README.md"))))
        elif how == "folder":
            (folder / file).mkdir()
        elif how == "pipe":
            os.mkfifo(folder / file)
    return f"{how}: {file}"


EDITS = (edit_json, edit_json, edit_json, edit_bytes, edit_tensors, edit_layout)


def attempt(folder: Path) -> str:
    """Loads a folder and says "refused", "right" or what is wrong."""
    try:
        model, _ = load(folder, device="cpu")
    except CheckpointError as error:
        message = str(error)
        if not message.isprintable() or not message.startswith("checkpoint "):
            return f"WRONG: {message!r:.300}"
        return "refused"
    except MemoryError as error:
        return "no memory" if str(error).startswith("expected enough memory") else f"WRONG: MemoryError {error}"
    except BaseException:
        return f"WRONG: {traceback.format_exc()}"
    state = dict(model.state_dict())
    files = folder.glob("model*.safetensors")
    wrong = [
        name
        for file in files
        for name, tensor in load_file(file).items()
        if not torch.equal(state[name], tensor.float())
    ]
    return f"WRONG: loaded other numbers than are stored: {wrong}" if wrong else "right"


def in_child(folder: Path) -> str:
    """What `attempt` says in a process of its own, with limits on time and memory; how that process ended otherwise."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        code = 1
        try:
            os.close(read)
            resource.setrlimit(resource.RLIMIT_CPU, (MOST_SECONDS, MOST_SECONDS + 1))
            taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
            signal.alarm(10 * MOST_SECONDS)  # a process that waits takes no time of the processor
            said = attempt(folder)
            said = "WRONG: code of the folder ran" if any(folder.rglob("ran")) else said
            os.write(write, said.encode(errors="replace")[:60_000])
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return said if said and code == 0 else f"WRONG: the process ended with {code}: {said}"


def main(count: int = 1000, seed: int | None = None, hostile: bool = True) -> int:
    """Throws `count` folders, those of `hostile_folders` first; the number of failures."""
    seed = random.SystemRandom().randrange(10**6) if seed is None else seed
    print(f"checkpoints: {count} folders, seed {seed}", flush=True)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    load(device="cpu")
    found: Counter[str] = Counter()
    written = list(hostile_folders.folders()) if hostile else []
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as room, open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
        for number in range(count):
            draw = random.Random(f"{seed} {number}")
            folder = Path(room, "checkpoint")
            shutil.copytree(SHIPPED, folder, ignore=shutil.ignore_patterns("training"))
            (folder / "evil.py").write_text(
                "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\nclass Evil: pass\n"
            )
            if number < len(written):
                what, write = written[number]
                write(folder)
            else:
                what = draw.choice(EDITS)(draw, folder)
            said = in_child(folder)
            found[said.split(":")[0]] += 1
            if said.startswith("WRONG"):
                print(f"{seed} {number}: {what}\n{said}", flush=True)
            shutil.rmtree(folder)
            if number % 100 == 99:
                print(f"checkpoints: {number + 1}: {dict(found)}", flush=True)
    print(f"checkpoints: {dict(found)} in {time.perf_counter() - start:.0f} s", flush=True)
    return found["WRONG"]


if __name__ == "__main__":
    sys.exit(bool(main(*(int(argument) for argument in sys.argv[1:]))))
