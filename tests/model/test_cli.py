"""The command line: the form of answers, one line per mistake, exit codes."""

import io
import json
import os
import shutil
import struct
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import fila.inference
from fila.cli import BAD_INPUT, INTERRUPTED, main

QUESTION = "What is the total?"


@pytest.fixture
def ask(loaded, monkeypatch, tmp_path, capsys):
    """Runs `fila ask` in `tmp_path` with a model that is loaded already: (exit code, stdout, stderr)."""
    monkeypatch.setattr(fila.inference, "load", lambda *args, **kwargs: loaded)
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)).save("a.png")

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main(["ask", "--max-new-tokens", "2", *arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return run


def one_error(result: tuple[int, str, str], *words: str) -> None:
    """Exit code 2, nothing said but one line of error with all of `words` in it."""
    code, out, err = result
    lines = [line for line in err.splitlines() if "warning" not in line]
    assert code == BAD_INPUT
    assert out == ""
    assert len(lines) == 1, err
    assert lines[0].startswith("fila: error: ")
    assert all(word in lines[0] for word in words), err


# --- answers


def test_one_picture(ask):
    code, out, err = ask("a.png", QUESTION)
    assert code == 0
    assert out.count("\n") == 1
    assert "cut off after 2 tokens" in err


def test_several_pictures_and_one_that_is_none(ask):
    Path("empty.png").touch()
    code, out, err = ask("a.png", "empty.png", "a.png", QUESTION)
    assert code == BAD_INPUT
    assert [line.split(":")[0] for line in out.splitlines()] == ["a.png", "a.png"]
    assert "fila: error: empty.png: expected a picture" in err


def test_json_is_one_object_for_each_picture(ask, loaded):
    code, out, _ = ask("a.png", "none.png", QUESTION, "--json", "--explain", "drawn.png")
    first, second = map(json.loads, out.splitlines())
    layout = loaded[1].image_processor.geometry.layout(90, 120)
    assert code == BAD_INPUT
    assert first["picture"] == "a.png"
    assert first["question"] == QUESTION
    assert first["image_size"] == [90, 120]
    assert first["canvas"] == list(layout.canvas)
    assert first["visual_tokens"] == layout.num_tokens
    assert first["explained"]["file"] == "drawn-1.png"
    assert [gate["alpha"] for gate in first["explained"]["gates"]] == [0.5] * 4
    assert set(first["seconds"]) == {"preprocess", "encode", "generate"}
    assert "No such file" in second["error"]
    assert Image.open("drawn-1.png").width == 1280
    assert not Path("drawn-2.png").exists()


def test_options_may_stand_anywhere(ask):
    code, out, _ = ask("a.png", "--json", QUESTION)
    assert (code, json.loads(out)["question"]) == (0, QUESTION)


def test_standard_input(ask, monkeypatch):
    class Stdin:
        buffer = io.BytesIO(Path("a.png").read_bytes())

        def isatty(self) -> bool:
            return False

    monkeypatch.setattr(sys, "stdin", Stdin())
    code, out, _ = ask("-", QUESTION, "--json")
    assert (code, json.loads(out)["picture"]) == (0, "standard input")
    Stdin.buffer = io.BytesIO()
    one_error(ask("-", QUESTION), "standard input: expected a picture", "empty")


def test_a_terminal_is_no_picture(ask, monkeypatch):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    one_error(ask("-", QUESTION), "standard input: expected the bytes of a picture, got a terminal")


def test_explain(ask):
    code, _, _ = ask("a.png", QUESTION, "--explain", "drawn.png")
    assert code == 0
    assert Image.open("drawn.png").mode == "RGB"


def test_a_very_long_picture(ask):
    Image.new("RGB", (4000, 4)).save("long.png")
    code, out, err = ask("long.png", QUESTION, "--json")
    assert code == 0
    assert json.loads(out)["tiles_reach_llm"] is False
    assert "fila: warning: long.png: the picture is 4000x4 pixels, so long that no tile" in err


# --- pictures of every kind


def save_odd(kind: str) -> str:
    picture = Image.open("a.png")
    if kind == "cmyk":
        picture.convert("CMYK").save("odd.jpg")
        return "odd.jpg"
    if kind == "16-bit":
        Image.fromarray(np.arange(90 * 120, dtype=np.uint16).reshape(90, 120)).save("odd.png")
    elif kind == "palette":
        picture.convert("P").save("odd.png", transparency=0)
    elif kind == "animated":
        picture.save("odd.gif", save_all=True, append_images=[Image.new("RGB", picture.size)])
        return "odd.gif"
    elif kind == "rotated":
        exif = Image.Exif()
        exif[0x0112] = 6
        picture.save("odd.jpg", exif=exif)
        return "odd.jpg"
    return "odd.png"


@pytest.mark.parametrize("kind", ["cmyk", "16-bit", "palette", "animated", "rotated"])
def test_odd_pictures_are_answered(ask, kind):
    code, out, err = ask(save_odd(kind), QUESTION, "--json")
    assert code == 0, err
    assert json.loads(out)["image_size"] == ([120, 90] if kind == "rotated" else [90, 120])
    assert ("only the first is used" in err) == (kind == "animated")


def bomb(height: int, width: int) -> bytes:
    """A PNG that announces a size and holds no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", b"")
    )


@pytest.mark.parametrize(
    "name, make, words",
    [
        ("cut.png", lambda p: p.write_bytes(Path("a.png").read_bytes()[:5000]), ("complete picture", "truncated")),
        ("empty.png", lambda p: p.touch(), ("expected a picture", "empty file")),
        ("text.png", lambda p: p.write_text("hello"), ("expected a picture", "something else")),
        ("folder.png", lambda p: p.mkdir(), ("expected a picture file", "Is a directory")),
        ("none.png", lambda p: None, ("expected a picture file", "No such file")),
        ("wide.png", lambda p: p.write_bytes(bomb(10, 10_001)), ("10000", "10001")),
        ("bomb.png", lambda p: p.write_bytes(bomb(400_000, 400_000)), ("10000",)),
        ("page.svg", lambda p: p.write_text("<svg/>"), ("expected a picture",)),
    ],
)
def test_bad_pictures(ask, name, make, words):
    make(Path(name))
    one_error(ask(name, QUESTION), name, *words)


# --- streams, names and files


def test_words_behind_two_dashes(ask):
    shutil.copy("a.png", "-dash.png")
    assert ask("--", "-dash.png", QUESTION)[0] == 0
    code, out, _ = ask("a.png", "--json", "--", "-dash.png", "-What?")
    assert [json.loads(line)["picture"] for line in out.splitlines()] == ["a.png", "-dash.png"]
    assert code == 0
    one_error(ask("--"), "at least one picture", "got none")
    one_error(ask("-dash.png", QUESTION), "-dash.png", "behind --")
    assert main(["--", "ask", "--max-new-tokens", "2", "a.png", QUESTION]) == 0


@pytest.mark.parametrize("name", ["a\nb.png", "a\x1b[2J.png", "a\udcff.png", "a\u202eb.png", "x" * 300 + ".png"])
def test_names_that_are_hard_to_print(ask, name):
    code, out, err = ask(name, "a.png", name, QUESTION)
    assert (code, out.count("\n")) == (BAD_INPUT, 1)
    lines = [line for line in err.splitlines() if "error" in line]
    assert len(lines) == 2
    assert all(c.isprintable() for line in lines for c in line)
    code, out, _ = ask(name, QUESTION, "--json")
    assert json.loads(out)["picture"] == name


class Stream(io.StringIO):
    """A standard stream that fails as a file does."""

    def __init__(self, error: OSError | None, encoding: str = "utf-8"):
        super().__init__()
        self.error, self.name_of_encoding = error, encoding

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.name_of_encoding

    def write(self, text: str) -> int:
        text.encode(self.encoding)
        return super().write(text)

    def flush(self) -> None:
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("command", [["ask", "a.png", QUESTION], ["info"]])
@pytest.mark.parametrize("output, word", [(None, "closed"), (Stream(OSError(28, "No space left on device")), "space")])
def test_output_that_takes_nothing(ask, monkeypatch, capsys, command, output, word):
    monkeypatch.setattr(sys, "stdout", output)
    assert main(command) == BAD_INPUT
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("fila: error: standard output: expected one that can be written to, got")
    assert word in line


@pytest.mark.parametrize("errors", [None, Stream(OSError(28, "No space left on device"))])
def test_messages_that_nobody_can_get(ask, monkeypatch, errors):
    monkeypatch.setattr(sys, "stderr", errors)
    code, out, _ = ask("none.png", "a.png", QUESTION)
    assert (code, out.count("\n")) == (BAD_INPUT, 1), "a message went among the answers"


def test_output_that_lacks_characters(ask, monkeypatch, loaded):
    said = SimpleNamespace(text="5 €\x1b", warnings=(), picture="")
    monkeypatch.setattr(fila.inference, "answer", lambda *args, **kwargs: said)
    monkeypatch.setattr("fila.cli.asdict", lambda found: dict(vars(found)))
    output = Stream(None, "ascii")
    monkeypatch.setattr(sys, "stdout", output)
    assert main(["ask", "a.png", QUESTION]) == 0
    assert output.getvalue() == "5 \\u20ac\\x1b\n"


def test_closed_input(ask, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    one_error(ask("-", QUESTION), "standard input: expected the bytes of a picture, got a closed one")


def test_an_endless_input(ask, monkeypatch):
    with open("/dev/zero", "rb") as zeros:
        pipe = SimpleNamespace(read=zeros.read, seekable=lambda: False)
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=pipe, isatty=lambda: False))
        one_error(ask("-", QUESTION), "standard input: expected a picture", "something else")


def test_explaining_replaces_no_picture(ask, monkeypatch):
    before = Path("a.png").read_bytes()
    os.link("a.png", "hard.png")
    os.symlink("a.png", "soft.png")
    for name in ("hard.png", "soft.png", "./a.png"):
        one_error(ask("a.png", QUESTION, "--explain", name), "would replace")
    with open("a.png") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        one_error(ask("-", QUESTION, "--explain", "hard.png"), "standard input", "would replace")
    shutil.copy("a.png", "out-2.png")
    one_error(ask("a.png", "out-2.png", QUESTION, "--explain", "out.png"), "'out-2.png'", "would replace")
    assert Path("a.png").read_bytes() == Path("out-2.png").read_bytes() == before


def test_a_full_disk_keeps_the_last_explanation(ask, monkeypatch):
    Path("old.png").write_bytes(b"old")
    os.chmod("old.png", 0o640)
    os.symlink("old.png", "link.png")

    def refuse(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(os, "fsync", refuse)
        one_error(ask("a.png", QUESTION, "--explain", "link.png"), "can be written", "No space left")
    assert Path("old.png").read_bytes() == b"old"
    assert sorted(os.listdir()) == ["a.png", "link.png", "old.png"]
    assert ask("a.png", QUESTION, "--explain", "link.png")[0] == 0
    assert Path("link.png").is_symlink()
    assert Image.open("old.png").width == 1280
    assert os.stat("old.png").st_mode & 0o777 == 0o640
    os.symlink("/dev/full", "full.png")
    one_error(ask("a.png", QUESTION, "--explain", "full.png"), "can be written")
    one_error(ask("a.png", QUESTION, "--explain", "x" * 300 + ".png"), "can be written")
    one_error(ask("a.png", QUESTION, "--explain", "y" * 300 + "/x.png"), "existing folder")


# --- arguments


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["a.png"], ("at least one picture and then a question", "a.png")),
        (["a.png", ""], ("question: expected some text",)),
        (["a.png", "a.png"], ("expected the question last", "a.png")),
        (["-", "-", QUESTION], ("at most once",)),
        (["a.png", "What is <image>?"], ("special token '<image>'", "leave it out")),
        (["a.png", "x" * 2000], ("fit the model's",)),
        (["a.png", QUESTION, "--max-new-tokens", "0"], ("at least 1", "'0'")),
        (["a.png", QUESTION, "--backend", "abacus"], ("backend: expected one of", "abacus")),
        (["a.png", QUESTION, "--explain", "out.jpg"], (".png", "out.jpg")),
        (["a.png", QUESTION, "--explain", "no/out.png"], ("existing folder", "no")),
        (["a.png", QUESTION, "--explain", "a.png"], ("would replace",)),
        (["a.png", QUESTION, "--explain", "d.png"], ("can be written", "d.png")),
        (["a.png", QUESTION, "--frobnicate"], ("--frobnicate", "fila ask --help")),
    ],
)
def test_bad_arguments(ask, arguments, words):
    Path("d.png").mkdir()
    one_error(ask(*arguments), *words)


@pytest.mark.parametrize("words", ["DefaultCPUAllocator:\n can't allocate memory", "std::bad_alloc"])
def test_no_memory_for_an_answer(ask, monkeypatch, words):
    def refuse(*args, **kwargs):
        raise RuntimeError(words)

    monkeypatch.setattr(fila.inference, "answer", refuse)
    one_error(ask("a.png", QUESTION), "expected enough memory for a.png and its answer", words.split()[-1])


def test_an_error_that_nobody_foresaw_is_one_line_and_stops_no_other_picture(ask, monkeypatch):
    answer = fila.inference.answer

    def fail_once(*args, **kwargs):
        monkeypatch.setattr(fila.inference, "answer", answer)
        raise KeyError("x\ny")

    monkeypatch.setattr(fila.inference, "answer", fail_once)
    code, out, err = ask("a.png", "a.png", QUESTION)
    assert (code, out.count("\n")) == (BAD_INPUT, 1)
    assert "fila: error: a.png: KeyError: 'x\\ny'" in err


def test_a_backend_that_cannot_run(ask, monkeypatch):
    from fila_kernels import dispatch

    monkeypatch.setattr(dispatch, "available", lambda backend, *of: (False, "there is no abacus here"))
    one_error(ask("a.png", QUESTION, "--backend", "native"), "'native'", "cannot run", "there is no abacus here")


@pytest.mark.parametrize("arguments", [[], ["abacus"], ["--abacus"]])
def test_bad_commands(arguments, capsys):
    code = main(arguments)
    one_error((code, *capsys.readouterr()))


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--model", "no/folder"], ("checkpoint no/folder: expected a folder",)),
        (["--device", "cuda:99"], ("device: expected one that is here",)),
        (["--dtype", "int8"], ("dtype: expected auto",)),
        (["--dtype", "float16", "--device", "cpu"], ("dtype: expected float32 or bfloat16",)),
    ],
)
def test_models_that_cannot_be_loaded(arguments, words, capsys):
    code = main(["ask", "a.png", QUESTION, *arguments])
    one_error((code, *capsys.readouterr()), *words)


def test_help_and_its_options(capsys):
    for arguments in (["--help"], ["ask", "--help"], ["info", "--help"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 0
    text = capsys.readouterr().out
    assert all(
        option in text for option in ("--explain", "--json", "--model", "--backend", "--device", "--dtype", "info")
    )


def test_interrupted(ask, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(fila.inference, "answer", interrupt)
    assert ask("a.png", QUESTION) == (INTERRUPTED, "", "")


# --- info


def test_info(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for word in ("transformers", "torch", "device", "backend", "reference", "triton", "cuda", "fila-nano"):
        assert word in text
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"versions", "devices", "device", "backend", "backends", "model"} <= set(found)
    assert all(entry["reason"] for entry in found["backends"].values())


def test_a_damaged_checkpoint(checkpoint, tmp_path, capsys):
    damaged = shutil.copytree(checkpoint, tmp_path / "damaged")
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1_000_000])
    code = main(["ask", "a.png", QUESTION, "--model", str(damaged)])
    one_error((code, *capsys.readouterr()), "expected a complete safetensors file")
