"""Runs the commands `fila ask` and `fila info`.

Exit codes: 0, everything was answered; 2, something that the user can put right, with one line on stderr that says what
was expected and what came; 130 after Ctrl-C; 141 if the reader of the output has gone.
"""

import argparse
import importlib.metadata
import json
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from fila.errors import memory_for, one_line

PACKAGES = ("fila", "transformers", "tokenizers", "safetensors", "pillow")
STDIN = "-"
BAD_INPUT, INTERRUPTED, CLOSED_PIPE = 2, 130, 141
QUESTION_HELP = """\
The question comes last and is asked of each picture by itself. `-` reads a picture from standard input. A picture that
cannot be used does not stop the others."""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as all errors are here."""

    def error(self, message: str) -> NoReturn:
        raise _UsageError(f"{message} (see {self.prog} --help)")


class _UsageError(ValueError):
    """Arguments that cannot be used."""


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def build_parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser, and those of the commands by name."""
    parser = _Parser(prog="fila", description="Ask questions about pictures.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    ask = commands.add_parser(
        "ask", help="answer a question about one picture or several", description="Answer a question about pictures.",
        epilog=QUESTION_HELP,
    )  # fmt: skip
    ask.add_argument("words", nargs="+", metavar="PICTURE... QUESTION", help="files, or - for standard input; question")
    ask.add_argument("--explain", metavar="OUT.png", help="also draw tiles, seams and gates; out-1.png, ... of several")
    ask.add_argument("--json", action="store_true", help="print one JSON object a line and picture")
    ask.add_argument("--model", metavar="PATH", help="checkpoint folder, or hf:OWNER/NAME (default: fila-nano)")
    ask.add_argument("--backend", help="of the fusion: reference, eager, native, triton (default: the best that runs)")
    ask.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    ask.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, float16 (default: auto)")
    ask.add_argument("--max-new-tokens", type=_positive, default=32, metavar="N", help="longest answer (default: 32)")

    info = commands.add_parser(
        "info", help="versions, devices, and each backend with the reason why it is used or not",
        description="What this installation can do, and why.",
    )  # fmt: skip
    info.add_argument("--json", action="store_true", help="print JSON")
    return parser, {"ask": ask, "info": info}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except _UsageError as error:
        return _fail(error)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # What is still buffered goes nowhere; else Python complains at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED_PIPE


def _run(arguments: list[str]) -> int:
    parser, commands = build_parser()
    if not arguments or arguments[0] not in commands:
        parser.parse_args(arguments)  # --help, or an error
        raise AssertionError("a command that is known was not found")
    # Intermixed, so that options may stand between picture and question.
    options = commands[arguments[0]].parse_intermixed_args(arguments[1:])
    return _ask(options) if arguments[0] == "ask" else _info(options)


def _info(options: argparse.Namespace) -> int:
    found = report()
    print(json.dumps(found, indent=2) if options.json else format_report(found))
    return 0


def report() -> dict[str, Any]:
    """Versions, devices, backends with reasons, and the shipped model, as plain values that `json.dumps` takes."""
    from fila.checkpoints.check import SHIPPED, WEIGHTS
    from fila.checkpoints.load import resolve_device
    from fila_kernels import info

    found, weights, device = info.report(), SHIPPED / WEIGHTS, resolve_device("auto")
    return found | {
        "versions": {package: _version(package) for package in PACKAGES} | found["versions"],
        "device": {
            "choice": str(device),
            "why": "a CUDA device is here" if device.type == "cuda" else "no CUDA device is here",
        },
        "model": {
            "folder": str(SHIPPED),
            "bytes": weights.stat().st_size if weights.is_file() else None,
        },
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def format_report(found: dict[str, Any]) -> str:
    """The report as lines of text."""
    from fila_kernels import info

    device, model = found["device"], found["model"]
    state = f"{model['bytes'] / 1e6:.1f} MB" if model["bytes"] else "absent"
    return "\n".join(
        [
            info.format_report(found),
            f"default    device {device['choice']} ({device['why']})",
            f"model      {model['folder']} ({state})",
        ]
    )


def _ask(options: argparse.Namespace) -> int:
    *pictures, question = options.words
    _check_words(pictures, question)
    explained = _explain_paths(options.explain, pictures)
    model, processor = _load(options, question)

    code = 0
    for picture, path in zip(pictures, explained, strict=True):
        name = "standard input" if picture == STDIN else picture
        try:
            record = _answer(model, processor, picture, name, question, options.max_new_tokens, path)
        except (ValueError, MemoryError) as error:
            code = _fail(error)
            record = {"picture": name, "question": question, "error": one_line(error)}
            if options.json:
                print(json.dumps(record), flush=True)
            continue
        for warning in record["warnings"]:
            _say("warning", warning if warning.startswith(name) else f"{name}: {warning}")
        if options.json:
            print(json.dumps(record), flush=True)
        else:
            print(record["text"] if len(pictures) == 1 else f"{name}: {record['text']}", flush=True)
    return code


def _check_words(pictures: Sequence[str], question: str) -> None:
    if not pictures:
        raise _UsageError(f"expected at least one picture and then a question, got only {question!r}")
    if not question.strip():
        raise _UsageError(f"question: expected some text, got {question!r}")
    if question == STDIN or ((os.path.sep in question or "." in question) and os.path.exists(question)):
        raise _UsageError(f"expected the question last, got the file {question!r} there")
    if pictures.count(STDIN) > 1:
        raise _UsageError(f"expected {STDIN} (standard input) at most once, got it {pictures.count(STDIN)} times")


def _explain_paths(out: str | None, pictures: Sequence[str]) -> list[Path | None]:
    """The file of each picture's explanation; a file that cannot be written is refused before any work."""
    if out is None:
        return [None] * len(pictures)
    path = Path(out)
    if path.suffix.lower() != ".png":
        raise _UsageError(f"--explain: expected a file name ending in .png, got {out!r}")
    if not path.parent.is_dir():
        raise _UsageError(f"--explain: expected an existing folder, got {str(path.parent)!r}")
    paths = [path] if len(pictures) == 1 else [
        path.with_name(f"{path.stem}-{i}{path.suffix}") for i in range(1, len(pictures) + 1)
    ]  # fmt: skip
    for target in paths:
        if target.is_dir() or not os.access(target if target.exists() else target.parent, os.W_OK):
            raise _UsageError(f"--explain: expected a file that can be written, got {str(target)!r}")
        for picture in pictures:
            if picture != STDIN and target.exists() and os.path.exists(picture) and target.samefile(picture):
                raise _UsageError(
                    f"--explain: expected another file than the picture {picture!r}, which it would replace"
                )
    return list(paths)


def _load(options: argparse.Namespace, question: str) -> tuple[Any, Any]:
    # Other packages' warnings are for developers; a user reads ours.
    warnings.filterwarnings("ignore", module=r"(transformers|torch|huggingface_hub)\b")
    from fila.inference import check_question, load
    from fila_kernels import dispatch

    try:
        dispatch.resolve(options.backend)
    except (ValueError, RuntimeError) as error:
        raise _UsageError(one_line(error)) from error
    try:
        model, processor = load(options.model, device=options.device, dtype=options.dtype, backend=options.backend)
        check_question(processor, question)
    except (ValueError, MemoryError) as error:
        raise _UsageError(one_line(error)) from error
    return model, processor


def _answer(
    model: Any, processor: Any, picture: str, name: str, question: str, max_new_tokens: int, explained: Path | None
) -> dict[str, Any]:
    """One answer as plain values; `explained` names the file of the explaining picture, if there is to be one."""
    from fila import inference, visualize
    from fila.images import read_picture

    # Read once, for the model and for the drawing.
    read = read_picture(_source(picture), max_side=processor.image_processor.max_image_side, name=name)
    with visualize.watch_gates(model) as gates, memory_for(f"{name} and its answer"):
        found = inference.answer(model, processor, read, question, max_new_tokens=max_new_tokens)
    record = asdict(found)
    if explained is not None:
        layout = read.layout(processor.image_processor.geometry)
        try:
            visualize.draw(read.image, layout, question, found.text, gates).save(explained)
        except OSError as error:
            raise ValueError(f"--explain: expected a file that can be written, got: {one_line(error)}") from error
        record["explained"] = {
            "file": str(explained),
            "gates": [
                {"vit_layer": g.vit_layer, "convnext_stage": g.convnext_stage, "alpha": g.alpha, "strength": g.strength}
                for g in gates
            ],
        }
    return record


def _source(picture: str) -> str | bytes:
    if picture != STDIN:
        return picture
    if sys.stdin.isatty():
        raise ValueError("standard input: expected the bytes of a picture, got a terminal")
    return sys.stdin.buffer.read()


def _fail(error: object) -> int:
    _say("error", one_line(error))
    return BAD_INPUT


def _say(kind: str, message: str) -> None:
    print(f"fila: {kind}: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
