"""The manifest comes back as it was written, or not at all."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from farspan.trainer.checkpoint.manifest import (
    CheckpointError,
    DamagedCheckpointError,
    FileRecord,
    Manifest,
    find_damage,
    fsync_tree,
    hash_file,
    read_manifest,
    write_manifest,
)

STATE = {"tokens": 1000, "mesh": {"context": 2}, "rate": 2e-05, "versions": ["2.13.0", None, True]}
FILES = {"rank_0/model.pt": FileRecord(3, hashlib.sha256(b"abc").hexdigest())}


def written(directory: Path) -> Path:
    write_manifest(directory, step=50, files=FILES, state=STATE)
    return directory / "manifest.json"


def write_by_hand(directory: Path, body: dict[str, Any]) -> None:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    document = body | {"digest": hashlib.sha256(canonical).hexdigest()}
    (directory / "manifest.json").write_text(json.dumps(document))


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    path = written(tmp_path)
    assert read_manifest(tmp_path) == Manifest(50, FILES, STATE)
    assert [path] == list(tmp_path.iterdir())  # no temporary file stays


def test_writing_again_replaces(tmp_path: Path) -> None:
    written(tmp_path)
    write_manifest(tmp_path, step=60, files={}, state={})
    assert read_manifest(tmp_path) == Manifest(60, {}, {})


def test_no_flipped_byte_changes_what_is_read(tmp_path: Path) -> None:
    path = written(tmp_path)
    good, intact = path.read_bytes(), read_manifest(tmp_path)
    refused = 0
    for place in range(len(good)):
        for bit in (1, 16):
            path.write_bytes(good[:place] + bytes([good[place] ^ bit]) + good[place + 1 :])
            try:
                assert read_manifest(tmp_path) == intact, f"byte {place} changed the content unnoticed"
            except CheckpointError:
                refused += 1
    assert refused > len(good)


def test_no_shorter_manifest_is_read(tmp_path: Path) -> None:
    path = written(tmp_path)
    good = path.read_bytes().rstrip()
    for length in range(len(good)):
        path.write_bytes(good[:length])
        with pytest.raises(DamagedCheckpointError):
            read_manifest(tmp_path)


def test_a_missing_manifest_is_damage(tmp_path: Path) -> None:
    with pytest.raises(DamagedCheckpointError, match=r"manifest\.json is missing"):
        read_manifest(tmp_path)


def test_an_unknown_format_is_not_called_damage(tmp_path: Path) -> None:
    write_by_hand(tmp_path, {"format": 2, "step": 1, "state": {}, "files": {}})
    with pytest.raises(CheckpointError, match=r"has format 2.*reads format 1.*run\.dir") as caught:
        read_manifest(tmp_path)
    assert not isinstance(caught.value, DamagedCheckpointError)


@pytest.mark.parametrize(
    "change",
    [
        {"step": "1"},
        {"state": []},
        {"files": []},
        {"extra": 1},
        {"files": {"../model.pt": {"bytes": 1, "sha256": "0" * 64}}},
        {"files": {"/model.pt": {"bytes": 1, "sha256": "0" * 64}}},
        {"files": {"a//b": {"bytes": 1, "sha256": "0" * 64}}},
        {"files": {"model.pt": {"bytes": -1, "sha256": "0" * 64}}},
        {"files": {"model.pt": {"bytes": 1, "sha256": "0"}}},
        {"files": {"model.pt": {"bytes": 1}}},
        {"files": {"model.pt": None}},
    ],
)
def test_a_malformed_manifest_with_a_good_digest_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    good = {"format": 1, "step": 1, "state": {}, "files": {"model.pt": {"bytes": 1, "sha256": "0" * 64}}}
    write_by_hand(tmp_path, good)
    assert read_manifest(tmp_path).step == 1
    write_by_hand(tmp_path, good | change)
    with pytest.raises(DamagedCheckpointError):
        read_manifest(tmp_path)


@pytest.mark.parametrize("document", ["[]", "{}", "null", '{"digest": 1}', '{"step": NaN}', '{"step": 1e999}'])
def test_json_that_is_no_manifest_is_refused(tmp_path: Path, document: str) -> None:
    (tmp_path / "manifest.json").write_text(document)
    with pytest.raises(DamagedCheckpointError):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "state", [{"loss": float("nan")}, {"loss": float("inf")}, {"shape": (1, 2)}, {1: "one"}, {"path": Path("a")}]
)
def test_a_state_that_json_would_alter_is_refused(tmp_path: Path, state: dict[Any, Any]) -> None:
    with pytest.raises(CheckpointError, match="state of step 7"):
        write_manifest(tmp_path, step=7, files={}, state=state)
    assert list(tmp_path.iterdir()) == []


def test_a_file_may_not_take_the_manifests_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"may not be called manifest\.json"):
        write_manifest(tmp_path, step=7, files={"manifest.json": FILES["rank_0/model.pt"]}, state={})


def test_hash_file_gives_size_and_sha256(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000
    (tmp_path / "large").write_bytes(content)
    (tmp_path / "empty").touch()
    assert hash_file(tmp_path / "large") == FileRecord(1_280_000, hashlib.sha256(content).hexdigest())
    assert hash_file(tmp_path / "empty") == FileRecord(0, hashlib.sha256(b"").hexdigest())


def test_find_damage_names_each_kind(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(b"abc")
    record = hash_file(path)
    assert find_damage(path, record) is None
    path.write_bytes(b"abd")
    assert "SHA-256" in str(find_damage(path, record))
    path.write_bytes(b"abcd")
    assert find_damage(path, record) == "has 4 bytes instead of 3"
    path.unlink()
    assert find_damage(path, record) == "is missing"
    path.mkdir()
    assert find_damage(path, record) == "is missing"


def test_fsync_tree_reaches_every_file_and_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "deep").touch()
    (tmp_path / "top").touch()
    synced: list[str] = []
    monkeypatch.setattr(
        "os.fsync", lambda descriptor: synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
    )
    fsync_tree(tmp_path)
    assert {Path(name) for name in synced} == {tmp_path, *tmp_path.rglob("*")}
    assert synced[-1] == str(tmp_path)  # a folder after what it holds
