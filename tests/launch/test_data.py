"""`farspan prepare`, `farspan data` and `farspan tokenizer`, as a user types them."""

import json
from pathlib import Path

import numpy as np
import pytest

from farspan.launch.command import main

CONFIG = """
run: {dir: run}
model: {preset: tiny}
train: {steps: 1, tokens_per_step: 128, sequence_length: 128}
data:
  directory: tokens
  vocabulary_size: 320
  heldout_fraction: 0.1
  sources:
    - path: books.jsonl
      text_key: body
    - path: code
      name: program
      as_one_document: true
      suffixes: [.c]
    - notes
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    lines = (json.dumps({"body": f"book {number} has words. " * (number + 1)}) for number in range(60))
    Path("books.jsonl").write_text("\n".join(lines))
    for folder, names in (("code", ("a.c", "b.c")), ("notes", ("one.md", "two.txt"))):
        Path(folder).mkdir()
        for name in names:
            Path(folder, name).write_text(f"this is {name}\n" * 20)
    Path("a.yaml").write_text(CONFIG)
    return Path("a.yaml")


def test_from_files_to_statistics(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "a.yaml"]) == 0
    assert "source" in capsys.readouterr().out
    report = json.loads(Path("tokens/report.json").read_text())
    assert list(report["sources"]) == ["books.jsonl", "program", "notes"]
    assert [counts["documents"] for counts in report["sources"].values()] == [60, 1, 2]

    assert main(["data", "verify", "a.yaml"]) == 0
    assert capsys.readouterr().out == "tokens: good\n"

    assert main(["data", "stats", "tokens", "--shortest", "16", "--longest", "64"]) == 0
    shown = capsys.readouterr().out
    assert all(words in shown for words in ("program", "tokens a document", "of documents up to", "discarded"))
    assert main(["data", "stats", "tokens", "--source", "program", "--shortest", "16", "--longest", "64"]) == 0
    assert "train of program: 1 documents" in capsys.readouterr().out

    assert main(["data", "show", "tokens", "--document", "0", "--tokens", "10000"]) == 0
    assert "=== document 0 of train, from books.jsonl: tokens 0 to" in capsys.readouterr().out
    assert main(["data", "show", "tokens", "--source", "program"]) == 0
    assert "from program: tokens 0 to" in capsys.readouterr().out.splitlines()[0]
    whole = json.loads(Path("tokens/dataset.json").read_text())["splits"]["train"]["tokens"]
    assert main(["data", "show", "tokens", "--tokens", str(whole)]) == 0
    shown = capsys.readouterr().out
    assert "this is a.c\n" * 20 + "this is b.c\n" * 20 in shown
    assert (
        shown.count("=== document")
        == json.loads(Path("tokens/dataset.json").read_text())["splits"]["train"]["documents"]
    )

    assert main(["tokenizer", "train", "a.yaml", "--output", "same.model"]) == 0
    assert Path("same.model").read_bytes() == Path("tokens/tokenizer.model").read_bytes()


def test_a_tokenizer_is_trained_on_files(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tokenizer", "train", "code", "notes", "--vocabulary-size", "290", "--output", "b.model"]) == 2
    assert "no .txt or .md or .py file" in capsys.readouterr().err
    assert main(["tokenizer", "train", "notes", "--vocabulary-size", "290", "--output", "b.model"]) == 0
    assert capsys.readouterr().out == "b.model is ready: 290 pieces\n"
    assert main(["prepare", "a.yaml", "data.tokenizer=b.model"]) == 0


@pytest.mark.parametrize("damage", ["byte", "id", "end", "cut"])
def test_verify_finds_damage(config: Path, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    main(["prepare", "a.yaml"])
    capsys.readouterr()
    path = Path("tokens/train.bin")
    tokens = np.fromfile(path, "<u2")
    if damage == "cut":
        tokens = tokens[:-1]
    else:
        tokens[{"byte": 5, "id": 5, "end": -1}[damage]] = {"byte": tokens[4], "id": 60_000, "end": tokens[5]}[damage]
    tokens.tofile(path)
    assert main(["data", "verify", "tokens"]) == 1
    expected = {
        "byte": "train.bin is not as written",
        "id": "train.bin has token ids from",
        "end": "1 documents of train do not end",
        "cut": "damaged (train.bin",
    }
    assert expected[damage] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["data", "stats", "nowhere"], "There is no prepared data in nowhere"),
        (["data", "verify", "nowhere"], "There is no prepared data in nowhere"),
        (["data", "stats", "tokens", "--source", "x"], "--source x: tokens has books.jsonl, program, notes"),
        (["data", "stats", "tokens", "--shortest", "512", "--longest", "64"], "--shortest 512 is more than"),
        (["data", "show", "tokens", "--document", "99"], "has documents 0 to"),
        (["data", "show", "tokens", "--source", "none"], "--source none: tokens has "),
        (
            ["data", "show", "tokens", "--source", "program", "--split", "heldout"],
            "--source program has no document in the heldout split",
        ),
        (["data", "show", "tokens", "--start", "9999999"], "has tokens 0 to"),
        (["prepare", "a.yaml", "data.end_of_document=</s>"], "set data.tokenizer as well"),
        (
            ["prepare", "a.yaml", "data.sources=[{path: notes, textkey: x}]"],
            "no key data.sources.0.textkey, did you mean",
        ),
        (["prepare", "a.yaml", "data.sources=[{name: x}]"], "data.sources.0.path is required"),
    ],
)
def test_errors_are_one_line(config: Path, capsys: pytest.CaptureFixture[str], words: list[str], error: str) -> None:
    main(["prepare", "a.yaml"])
    capsys.readouterr()
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("farspan: ")
    assert said.count("\n") == 1
    assert error in said


def test_what_an_older_version_prepared_is_to_be_prepared_again(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["prepare", "a.yaml"])
    description = json.loads(Path("tokens/dataset.json").read_text())
    Path("tokens/dataset.json").write_text(json.dumps({**description, "format_version": 1}))
    for words in (["prepare", "a.yaml"], ["data", "stats", "tokens"], ["train", "a.yaml"]):
        assert main(words) == 2
        assert "format version 1; this Farspan reads 2. Remove the directory and run" in capsys.readouterr().err


def test_a_picture_of_the_lengths(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    main(["prepare", "a.yaml"])
    assert Path("tokens/lengths.png").read_bytes().startswith(b"\x89PNG")
    assert main(["data", "stats", "tokens", "--plot", "b.png"]) == 0
    assert Path("b.png").read_bytes().startswith(b"\x89PNG")
    assert main(["data", "stats", "tokens", "--plot", "b.txt"]) == 2


def test_ways_of_making_rows_are_compared(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "a.yaml"]) == 0
    capsys.readouterr()
    assert main(["data", "compare", "a.yaml", "data.overlong=truncate", "data.method=best_fit"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("rows of 128")
    methods = ("concat ", "concat, across documents ", "best_fit, truncate ", "padded, truncate ")
    assert all(line.startswith(method) for line, method in zip(lines[2:], methods))


def test_conversations_are_prepared(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = (json.dumps({"prompt": f"{number} words of a prompt. " * 9, "response": "yes"}) for number in range(40))
    Path("chats.jsonl").write_text("\n".join(lines))
    source = "data.sources=[{path: chats.jsonl, chat_template: chatml}]"
    assert main(["prepare", "a.yaml", "data.vocabulary_size=310", source]) == 0
    assert Path("tokens/train_answers.idx").is_file()
    assert main(["data", "verify", "a.yaml"]) == 0
    assert "tokens: good" in capsys.readouterr().out
    assert main(["data", "show", "tokens", "--document", "0"]) == 0
    shown = capsys.readouterr().out
    assert "with loss between ⟦ and ⟧ ===" in shown
    assert shown.endswith("<|im_start|>assistant\n⟦yes<|im_end|>\n⟧\n")
    assert main(["prepare", "a.yaml", "data.directory=other", source.replace("chatml", "chatm")]) == 2
    assert "chat_template of data.sources is 'chatm', which is none of chatml, plain" in capsys.readouterr().err
