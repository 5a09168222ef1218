"""Runs the commands `fila ask`, `fila assemble`, `fila info`, and those of training (`fila.training.commands`).

Exit codes: 0, everything was answered; 2, something was not, with one line on stderr that says what was expected and
what came; 130 after Ctrl-C; 141 if the reader of the output has gone.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import stat
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, NoReturn

from fila import startup, streams
from fila.errors import memory_for, one_line, panics_as_errors, printable
from fila.startup import INTERRUPTED
from fila.training import commands as training

PACKAGES = ("fila", "transformers", "tokenizers", "safetensors", "pillow")
STDIN = "-"
BAD_INPUT, CLOSED_PIPE = 2, 141
LONGEST_NAME = 200  # characters of a picture's name in messages
QUESTION_HELP = """\
The question comes last and is asked of each picture by itself. `-` reads a picture from standard input. Behind `--` all
words are pictures and the question, also those that begin with a dash. A picture that cannot be used does not stop the
others."""
ASSEMBLE_HELP = """\
Sources are local folders of safetensors, as their libraries write them, and are never written to. Every tensor is
copied bit for bit, initialised or left on purpose; whatever does not fit is named before anything is written. OUT gets
its name when it is complete; after an interruption the same command goes on."""
# Of a file on its device: the same for every name that it has.
Identity = tuple[int, int]


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as all errors are here."""

    def error(self, message: str) -> NoReturn:
        hint = "words that begin with a dash go behind --; " if message.startswith("unrecognized arguments") else ""
        raise _UsageError(f"{message} ({hint}see {self.prog} --help)")


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
    ask.add_argument("words", nargs="*", metavar="PICTURE... QUESTION", help="files, or - for standard input; question")
    ask.add_argument("--explain", metavar="OUT.png", help="also draw tiles, seams and gates; out-1.png, ... of several")
    ask.add_argument("--json", action="store_true", help="print one JSON object per picture, each on a line")
    ask.add_argument("--model", metavar="PATH", help="checkpoint folder, or hf:OWNER/NAME (default: fila-nano)")
    ask.add_argument("--backend", help="of the fusion: reference, eager, native, triton (default: the best that runs)")
    ask.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    ask.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, float16 (default: auto)")
    ask.add_argument("--max-new-tokens", type=_positive, default=32, metavar="N", help="longest answer (default: 32)")

    assemble = commands.add_parser(
        "assemble", help="make a checkpoint of trained models: a ViT, a ConvNeXt and a language model, or a LLaVA-NeXT",
        description="Assemble a checkpoint from a LLaVA-NeXT and a ConvNeXt, or from a ViT, a ConvNeXt and a language "
        "model.", epilog=ASSEMBLE_HELP,
    )  # fmt: skip
    assemble.add_argument("--from-llava-next", metavar="FOLDER", help="LLaVA-NeXT of transformers, projector included")
    assemble.add_argument("--vit", metavar="FOLDER", help="CLIP vision tower of transformers or open_clip")
    assemble.add_argument("--llm", metavar="FOLDER", help="causal language model of transformers, with its tokenizer")
    assemble.add_argument("--convnext", metavar="FOLDER", required=True, help="of open_clip, timm or transformers")
    assemble.add_argument("--out", metavar="OUT", required=True, help="the new folder")

    info = commands.add_parser(
        "info", help="versions, devices, and each backend with the reason why it is used or not",
        description="What this installation can do, and why.",
    )  # fmt: skip
    info.add_argument("--json", action="store_true", help="print JSON")
    return parser, {"ask": ask, "assemble": assemble, "info": info} | training.add_parsers(commands, _positive)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code."""
    try:
        # Other packages' warnings are for developers; a user reads ours.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            streams.check_output()
            return _run(list(sys.argv[1:] if arguments is None else arguments))
    except KeyboardInterrupt:
        return INTERRUPTED
    except streams.ReaderGone:
        return CLOSED_PIPE
    except Exception as error:
        return _fail(error)
    finally:
        if arguments is None:
            startup.interrupt_at_once()  # nothing is left to do but to end


def _run(arguments: list[str]) -> int:
    parser, commands = build_parser()
    if arguments[:1] == ["--"]:
        arguments = arguments[1:]
    try:
        if not arguments or arguments[0] not in commands:
            parser.parse_args(arguments)  # --help, or an error
            raise AssertionError("a command that is known was not found")
        end = arguments.index("--") if "--" in arguments else len(arguments)
        # Intermixed, so that options may stand between picture and question.
        options = commands[arguments[0]].parse_intermixed_args(arguments[1:end])
    except SystemExit:  # of --help, which argparse has written
        streams.flush()
        raise
    words = arguments[end + 1 :]
    if arguments[0] == "ask":
        options.words += words
        return _ask(options)
    if words:
        raise _UsageError(f"expected no words behind --, got {words} (see fila {arguments[0]} --help)")
    if arguments[0] == "data":
        return training.check_data(options, streams.write)
    if arguments[0] == "train":
        return training.train(options, streams.write)
    return _assemble(options) if arguments[0] == "assemble" else _info(options)


def _assemble(options: argparse.Namespace) -> int:
    from fila.checkpoints.assemble import assemble

    manifest = assemble(
        options.out, convnext=options.convnext, vit=options.vit, llm=options.llm, llava_next=options.from_llava_next
    )
    for role, source in manifest["sources"].items():
        counts = f"{source['copied']} tensors copied, {len(source['left'])} left ({source['layout']})"
        streams.write(printable(f"{role}: {source['folder']}, {counts}"))
    streams.write(f"new: {len(manifest['new'])} tensors, to be trained")
    return 0


def _info(options: argparse.Namespace) -> int:
    found = report()
    streams.write(json.dumps(found, indent=2) if options.json else format_report(found))
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
    if not options.words:
        raise _UsageError("expected at least one picture and then a question, got none")
    *pictures, question = options.words
    question = _as_utf8(question)
    _check_words(pictures, question)
    sources = _identities(pictures)
    targets = _explain_paths(options.explain, len(pictures), sources)
    model, processor = _load(options, question)
    startup.interrupt_by_exception()

    code = 0
    for picture, target in zip(pictures, targets, strict=True):
        name = "standard input" if picture == STDIN else _shown(picture)
        try:
            record = _answer(model, processor, picture, name, question, options.max_new_tokens, target, sources)
        except Exception as error:  # the other pictures can still be answered
            message = _message(error)
            code = _fail(message if name in message else f"{name}: {message}")
            record = {"question": question, "error": message}
        else:
            for warning in record["warnings"]:
                _say("warning", one_line(warning if warning.startswith(name) else f"{name}: {warning}"))
        record = {"picture": name if picture == STDIN else picture} | record
        if options.json:
            streams.write(json.dumps(record))
        elif "error" not in record:
            several = len(pictures) > 1
            streams.write(f"{name}: {printable(record['text'])}" if several else printable(record["text"], "\n\t"))
    return code


def _as_utf8(text: str) -> str:
    """An argument as its bytes are read in UTF-8, where the locale's encoding could not read them."""
    try:
        return os.fsencode(text).decode() if any("\ud800" <= c <= "\udfff" for c in text) else text
    except UnicodeError:
        return text


def _shown(picture: str) -> str:
    """The name of a picture in messages: one line, of characters that can be shown."""
    name = printable(picture)
    return name if len(name) <= LONGEST_NAME else name[:LONGEST_NAME] + "..."


def _check_words(pictures: Sequence[str], question: str) -> None:
    if not pictures:
        raise _UsageError(f"expected at least one picture and then a question, got only {question!r}")
    if not question.strip():
        raise _UsageError(f"question: expected some text, got {question!r}")
    if question == STDIN or ((os.path.sep in question or "." in question) and os.path.exists(question)):
        raise _UsageError(f"expected the question last, got the file {question!r} there")
    if pictures.count(STDIN) > 1:
        raise _UsageError(f"expected {STDIN} (standard input) at most once, got it {pictures.count(STDIN)} times")


def _identity(file: str | Path | int) -> Identity | None:
    """The regular file that a name or an open file stands for."""
    try:
        found = os.stat(file)
    except (OSError, ValueError):
        return None
    return (found.st_dev, found.st_ino) if stat.S_ISREG(found.st_mode) else None


def _identities(pictures: Sequence[str]) -> dict[Identity, str]:
    """The files that are read or written, with their names in messages: no explaining picture may replace them."""
    found: dict[Identity | None, str] = {_identity(picture): f"the picture {picture!r}" for picture in pictures}
    streams_used = {"standard output": sys.stdout} | ({"standard input": sys.stdin} if STDIN in pictures else {})
    for name, stream in streams_used.items():
        with contextlib.suppress(AttributeError, OSError, ValueError):  # closed, or no file
            found[_identity(stream.fileno())] = name
    return {identity: name for identity, name in found.items() if identity is not None}


def _explain_paths(out: str | None, count: int, sources: Mapping[Identity, str]) -> list[Path | None]:
    """The file of each picture's explanation; a file that cannot be written is refused before any work."""
    if out is None:
        return [None] * count
    path = Path(out)
    if path.suffix.lower() != ".png":
        raise _UsageError(f"--explain: expected a file name ending in .png, got {out!r}")
    if not os.path.isdir(path.parent):
        raise _UsageError(f"--explain: expected an existing folder, got {str(path.parent)!r}")
    paths = [path] if count == 1 else [path.with_name(f"{path.stem}-{i}{path.suffix}") for i in range(1, count + 1)]
    for target in paths:
        # A new file goes beside the target and then takes its place; a link is followed.
        folder = os.path.dirname(os.path.realpath(target))
        writable = os.access(folder, os.W_OK) and (os.access(target, os.W_OK) or not os.path.exists(target))
        too_long = len(os.fsencode(target.name)) > os.pathconf(folder, "PC_NAME_MAX") if writable else False
        if os.path.isdir(target) or not writable or too_long:
            raise _UsageError(f"--explain: expected a file that can be written, got {str(target)!r}")
        _check_target(target, sources)
    return list(paths)


def _check_target(target: Path, sources: Mapping[Identity, str]) -> None:
    if (identity := _identity(target)) in sources:
        assert identity is not None
        raise _UsageError(f"--explain: expected another file than {sources[identity]}, which it would replace")


def _load(options: argparse.Namespace, question: str) -> tuple[Any, Any]:
    from fila.inference import check_question, load
    from fila_kernels import dispatch

    dispatch.resolve(options.backend)
    with memory_for("the model"), panics_as_errors(), streams.without_libraries():
        model, processor = load(options.model, device=options.device, dtype=options.dtype, backend=options.backend)
    check_question(processor, question)
    return model, processor


def _answer(
    model: Any,
    processor: Any,
    picture: str,
    name: str,
    question: str,
    max_new_tokens: int,
    target: Path | None,
    sources: Mapping[Identity, str],
) -> dict[str, Any]:
    """One answer as plain values; `target` is the file of the explaining picture, if there is to be one."""
    from fila import inference, visualize
    from fila.images import read_picture

    with memory_for(f"{name} and its answer"), panics_as_errors(), streams.without_libraries():
        # Read once, for the model and for the drawing.
        read = read_picture(_source(picture), max_side=processor.image_processor.max_image_side, name=name)
        with contextlib.ExitStack() as stack:
            gates = stack.enter_context(visualize.watch_gates(model)) if target else []
            found = inference.answer(model, processor, read, question, max_new_tokens=max_new_tokens)
        record = asdict(found)
        del record["picture"]
        if target is None:
            return record
        drawn = visualize.draw(read.image, read.layout(processor.image_processor.geometry), question, found.text, gates)
    _check_target(target, sources)
    try:
        visualize.save(drawn, target)
    except OSError as error:
        raise ValueError(f"--explain: expected a file that can be written, got: {one_line(error)}") from error
    record["explained"] = {
        "file": str(target),
        "gates": [
            {"vit_layer": g.vit_layer, "convnext_stage": g.convnext_stage, "alpha": g.alpha, "strength": g.strength}
            for g in gates
        ],
    }
    return record


def _source(picture: str) -> str | IO[bytes]:
    if picture != STDIN:
        return picture
    if sys.stdin is None or getattr(sys.stdin, "closed", False):
        raise ValueError("standard input: expected the bytes of a picture, got a closed one")
    if sys.stdin.isatty():
        raise ValueError("standard input: expected the bytes of a picture, got a terminal")
    return sys.stdin.buffer  # read as far as it can be a picture: a pipe may have no end


def _message(error: object) -> str:
    """One line; with the name of its class where the error is none that was foreseen."""
    foreseen = isinstance(error, (str, ValueError, MemoryError, OSError, RuntimeError))
    return one_line(error) if foreseen else f"{type(error).__name__}: {one_line(error)}"


def _fail(error: object) -> int:
    _say("error", _message(error))
    return BAD_INPUT


def _say(kind: str, message: str) -> None:
    streams.say(f"fila: {kind}: {message}")


if __name__ == "__main__":
    sys.exit(main())
