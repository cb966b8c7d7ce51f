"""Artifacts: what their digest covers, what damage is noticed, how they come into being."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bmkit import artifact, hashes, place
from bmkit.artifact import InputEntry, Manifest, Step
from bmkit.errors import BmkitError, InputError, OutputTaken, ResourceError

KEY = "a" * 64


def make(path: Path, files: dict[str, bytes], *, key: str = KEY, **more: Any) -> Manifest:
    """Write an artifact of `files` at `path`, as a stage does."""
    with place.create(path) as scratch:
        for name, content in files.items():
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            (scratch / name).write_bytes(content)
        steps = [Step(stage="compress", name="int8", key=key, recipe={"kind": "compress"})]
        kind = more.pop("kind", "model")
        return artifact.write_manifest(scratch, version="0", kind=kind, steps=steps, **more)


def edit(path: Path, **changes: Any) -> None:
    """Change keys of the manifest in `path`, leaving all else as it is."""
    file = path / "bmkit.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def reseal(path: Path, files: dict[str, Any]) -> None:
    """Put `files` into a manifest with the digest that belongs to them."""
    pairs = sorted((name, entry["sha256"]) for name, entry in files.items())
    digest = hashlib.sha256(json.dumps(["model", pairs]).encode()).hexdigest()
    edit(path, files=files, digest=digest)


def listing(folder: Path) -> dict[str, bytes]:
    """Return every file below `folder` with its content, hidden ones included."""
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


# --- digest --------------------------------------------------------------------------------------


def test_the_digest_is_made_of_kind_names_and_content_hashes(tmp_path: Path) -> None:
    manifest = make(tmp_path / "a", {"b.txt": b"two", "a/x.txt": b"one"})
    pairs = [
        [n, hashlib.sha256(c).hexdigest()] for n, c in [("a/x.txt", b"one"), ("b.txt", b"two")]
    ]
    assert manifest.digest == hashlib.sha256(json.dumps(["model", pairs]).encode()).hexdigest()


def test_the_digest_covers_content_only(tmp_path: Path) -> None:
    base = InputEntry(kind="model", digest="b" * 64, path="/somewhere")
    first = make(tmp_path / "a", {"w": b"weights"})
    second = make(
        tmp_path / "elsewhere" / "b",
        {"w": b"weights"},
        key="c" * 64,
        base=base,
        metrics={"loss": 1.5},
        loads_in=["peft"],
    )
    os.utime(tmp_path / "a" / "w", (1, 1))
    assert first.digest == second.digest == artifact.open_artifact(tmp_path / "a").digest


@pytest.mark.parametrize(
    ("files", "kind"),
    [({"w": b"weightz"}, "model"), ({"v": b"weights"}, "model"), ({"w": b"weights"}, "delta")],
)
def test_the_digest_changes_with_content_name_and_kind(
    tmp_path: Path, files: dict[str, bytes], kind: str
) -> None:
    assert (
        make(tmp_path / "a", {"w": b"weights"}).digest
        != make(tmp_path / "b", files, kind=kind).digest
    )


def test_the_key_depends_on_every_part_and_on_no_order(tmp_path: Path) -> None:
    def key(stage: str = "tune", version: int = 1, recipe: Any = None, inputs: Any = None) -> str:
        return artifact.stage_key(
            stage, version, recipe or {"r": 8, "seed": 0}, inputs or {"model": "x", "data": "y"}
        )

    assert key() == key(recipe={"seed": 0, "r": 8}, inputs={"data": "y", "model": "x"})
    others = [
        key("compress"),
        key(version=2),
        key(recipe={"r": 4, "seed": 0}),
        key(inputs={"model": "y", "data": "x"}),
    ]
    assert len({key(), *others}) == 5


# --- manifest ------------------------------------------------------------------------------------


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A small artifact."""
    path = tmp_path / "made"
    make(path, {"model.safetensors": b"weights", "sub/config.json": b"{}"}, metrics={"loss": 0.5})
    return path


def test_an_artifact_opens_with_what_its_manifest_says(made: Path) -> None:
    found = artifact.open_artifact(made)
    assert (found.path, found.kind) == (made, "model")
    assert found.manifest is not None
    assert (found.manifest.key, dict(found.metrics)) == (KEY, {"loss": 0.5})
    assert [s.stage for s in found.steps] == ["compress"]
    assert found.entry().digest == found.digest
    assert set(found.manifest.files) == {"model.safetensors", "sub/config.json"}


@pytest.mark.parametrize(
    "name",
    [
        "../outside",
        "a/../../outside",
        "..",
        "/etc/passwd",
        "//etc/passwd",
        "a\\..\\b",
        ".",
        "",
        "bmkit.json",
        "a\0b",
    ],
)
def test_a_manifest_whose_path_leaves_the_directory_is_refused(made: Path, name: str) -> None:
    (made.parent / "outside").write_bytes(b"secret")
    entry = {"sha256": hashlib.sha256(b"secret").hexdigest(), "bytes": 6}
    reseal(made, {name: entry})
    with pytest.raises(InputError, match=r"bmkit\.json is damaged: files") as caught:
        artifact.open_artifact(made)
    assert caught.value.hint is not None


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"schema": 2}, "schema"),
        ({"schema": "1"}, "schema"),
        ({"kind": "cake"}, "kind"),
        ({"digest": "abc"}, "digest"),
        ({"digest": "A" * 64}, "digest"),
        ({"steps": []}, "steps"),
        ({"files": []}, "files"),
        ({"files": {"w": {"sha256": "0" * 64, "bytes": -1}}}, "files.w.bytes"),
        ({"surprise": 1}, "surprise"),
        ({"base": "somewhere"}, "base"),
    ],
)
def test_a_manifest_with_a_wrong_value_is_refused_and_the_key_named(
    made: Path, changes: dict[str, Any], where: str
) -> None:
    edit(made, **changes)
    with pytest.raises(InputError, match=rf"bmkit\.json is damaged: {where}"):
        artifact.open_artifact(made)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe\x00", b"[" * 100_000])
def test_a_manifest_that_is_cut_off_or_foreign_is_refused_in_one_line(
    made: Path, content: bytes
) -> None:
    (made / "bmkit.json").write_bytes(content)
    with pytest.raises(InputError, match=r"bmkit\.json") as caught:
        artifact.open_artifact(made)
    assert "\n" not in str(caught.value)
    assert ": :" not in str(caught.value), "an empty name of a key"


def test_every_truncation_of_a_manifest_is_refused(made: Path) -> None:
    whole = (made / "bmkit.json").read_bytes().rstrip()
    for size in range(len(whole)):
        (made / "bmkit.json").write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"bmkit\.json"):
            artifact.read_manifest(made)


def test_a_digest_that_does_not_belong_to_the_files_is_refused(made: Path) -> None:
    edit(made, digest="0" * 64)
    with pytest.raises(InputError, match="its digest does not belong"):
        artifact.open_artifact(made)


# --- damaged files -------------------------------------------------------------------------------


def test_a_missing_file_is_named(made: Path) -> None:
    (made / "sub" / "config.json").unlink()
    with pytest.raises(InputError, match=r"sub/config\.json is missing") as caught:
        artifact.open_artifact(made)
    assert caught.value.exit_code == 3


def test_a_file_of_another_size_is_named_with_both_sizes(made: Path) -> None:
    (made / "model.safetensors").write_bytes(b"weight")
    with pytest.raises(InputError, match=r"model\.safetensors has 6 bytes, its manifest says 7"):
        artifact.open_artifact(made)


def test_a_file_changed_within_its_size_is_found_by_its_modification_time(made: Path) -> None:
    artifact.open_artifact(made)  # its hashes are remembered now
    file = made / "model.safetensors"
    before = file.stat()
    file.write_bytes(b"weightz")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    with pytest.raises(InputError, match=r"content of model\.safetensors"):
        artifact.open_artifact(made)


def test_a_file_that_became_a_directory_is_missing(made: Path) -> None:
    (made / "model.safetensors").unlink()
    (made / "model.safetensors").mkdir()
    with pytest.raises(InputError, match=r"model\.safetensors"):
        artifact.open_artifact(made)


def test_a_link_that_leads_out_of_the_artifact_is_refused(made: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"weights")  # the right content, in the wrong place
    (made / "model.safetensors").unlink()
    (made / "model.safetensors").symlink_to(outside)
    with pytest.raises(InputError, match="leads out"):
        artifact.open_artifact(made)


def test_a_folder_that_is_a_link_out_of_the_artifact_is_refused(made: Path, tmp_path: Path) -> None:
    (made / "sub").rename(tmp_path / "sub")
    (made / "sub").symlink_to(tmp_path / "sub")
    with pytest.raises(InputError, match="leads out"):
        artifact.open_artifact(made)


def test_an_artifact_reached_through_a_link_is_whole(made: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(made)
    assert artifact.open_artifact(tmp_path / "link").digest == artifact.open_artifact(made).digest


def test_files_of_the_users_own_are_no_part_of_an_artifact(made: Path) -> None:
    before = artifact.open_artifact(made).digest
    (made / "notes.txt").write_text("mine")
    (made / "report.json").write_text("{}")
    (made / "chat_template.jinja.bak").write_text("{}")
    assert artifact.open_artifact(made).digest == before


@pytest.mark.parametrize(
    "name",
    [
        "generation_config.json",
        "chat_template.jinja",
        "adapter_config.json",
        "extra.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "additional_chat_templates/rag.jinja",
    ],
)
def test_a_file_that_a_loader_would_read_must_be_in_the_manifest(made: Path, name: str) -> None:
    (made / name).parent.mkdir(exist_ok=True)
    (made / name).write_text("{}")
    with pytest.raises(InputError, match=name):
        artifact.open_artifact(made)
    assert artifact.differences(made, artifact.read_manifest(made)) == [
        f"{name} is not in the manifest"
    ]


def test_differences_reads_every_byte_and_names_every_fault(made: Path) -> None:
    make(made.with_name("other"), {"a": b"1", "b": b"22", "c": b"333", "d": b"4444"})
    other = made.with_name("other")
    manifest = artifact.read_manifest(other)
    assert artifact.differences(other, manifest) == []
    (other / "a").unlink()
    (other / "b").write_bytes(b"2")
    before = (other / "c").stat()
    (other / "c").write_bytes(b"334")
    os.utime(other / "c", ns=(before.st_atime_ns, before.st_mtime_ns))
    said = artifact.differences(other, manifest)
    assert [line.split()[0] for line in said] == ["a", "b", "c"]


# --- the hash cache ------------------------------------------------------------------------------


def secretly_change(file: Path, content: bytes) -> None:
    """Change a file, leaving its size and modification time as they were."""
    before = file.stat()
    assert len(content) == before.st_size
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


_opened: list[str] | None = None


def _watch(event: str, args: tuple[object, ...]) -> None:
    if event == "open" and _opened is not None:
        _opened.append(str(args[0]))


sys.addaudithook(_watch)


@contextmanager
def opened() -> Iterator[list[str]]:
    """Give the list of files that are opened in the block."""
    global _opened
    _opened = found = []
    try:
        yield found
    finally:
        _opened = None


def reads_weights(path: Path) -> bool:
    """Open the artifact; tell whether its weights were read for that."""
    with opened() as found:
        artifact.open_artifact(path)
    return str((path / "model.safetensors").resolve()) in found


def test_a_second_open_reads_no_weights(made: Path) -> None:
    assert reads_weights(made)
    assert not reads_weights(made)


def test_an_artifact_that_was_just_written_is_opened_without_reading(made: Path) -> None:
    artifact.remember(made, artifact.read_manifest(made))
    assert not reads_weights(made)


def test_without_remembered_hashes_the_files_are_read(made: Path, home: Path) -> None:
    artifact.open_artifact(made)
    (home / "hashes.sqlite").unlink()
    assert reads_weights(made)


def test_a_change_that_keeps_size_and_time_is_noticed(made: Path) -> None:
    artifact.open_artifact(made)
    secretly_change(made / "model.safetensors", b"WEIGHTS")
    with pytest.raises(InputError, match=r"content of model\.safetensors"):
        artifact.open_artifact(made)


def test_another_file_of_the_same_size_and_time_is_noticed(made: Path, tmp_path: Path) -> None:
    artifact.open_artifact(made)
    (tmp_path / "new").write_bytes(b"WEIGHTS")
    before = (made / "model.safetensors").stat()
    os.utime(tmp_path / "new", ns=(before.st_atime_ns, before.st_mtime_ns))
    (tmp_path / "new").replace(made / "model.safetensors")  # as `mv`, `cp -p` and `rsync -t` do
    with pytest.raises(InputError, match=r"content of model\.safetensors"):
        artifact.open_artifact(made)


def test_a_remembered_hash_is_bound_to_its_path(made: Path, tmp_path: Path, home: Path) -> None:
    artifact.open_artifact(made)
    rows = sqlite3.connect(home / "hashes.sqlite").execute("SELECT path, sha256 FROM seen")
    assert set(rows) == {
        (str(made / name), hashlib.sha256(content).hexdigest())
        for name, content in {"model.safetensors": b"weights", "sub/config.json": b"{}"}.items()
    }


def test_the_cache_is_free_for_others_while_a_file_is_read(made: Path, home: Path) -> None:
    with hashes.HashCache() as first:
        first.sha256(made / "model.safetensors")
        other = sqlite3.connect(home / "hashes.sqlite", timeout=0)
        other.execute("INSERT INTO seen VALUES ('x', 'y', 'z')")  # would fail under a lock
        other.commit()


def test_a_foreign_checkpoint_is_hashed_once_too(checkpoint: Path) -> None:
    digest = artifact.open_artifact(checkpoint).digest
    assert not reads_weights(checkpoint)
    secretly_change(checkpoint / "model.safetensors", b"other00")
    assert artifact.open_artifact(checkpoint).digest != digest


def test_an_artifact_opens_where_bmkit_home_is_a_file(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a directory")
    monkeypatch.setenv("BMKIT_HOME", str(tmp_path / "file"))
    artifact.remember(made, artifact.read_manifest(made))
    assert reads_weights(made)
    assert reads_weights(made)


def test_a_damaged_hash_cache_costs_time_and_nothing_else(made: Path, home: Path) -> None:
    home.mkdir(exist_ok=True)
    (home / "hashes.sqlite").write_bytes(b"this is no database" * 100)
    assert artifact.open_artifact(made).kind == "model"


def test_hashing_equals_hashlib_and_refuses_what_is_no_plain_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x" * 1_000_003)
    assert hashes.hash_file(tmp_path / "f") == hashlib.sha256(b"x" * 1_000_003).hexdigest()
    os.mkfifo(tmp_path / "pipe")
    for odd in ("pipe", ".", "gone"):
        with pytest.raises(InputError):
            hashes.hash_file(tmp_path / odd)


# --- create --------------------------------------------------------------------------------------


def test_out_appears_whole_and_only_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with place.create(out) as scratch:
        (scratch / "a").write_text("1")
        (scratch / "sub").mkdir()
        (scratch / "sub" / "b").write_text("2")
        assert not out.exists()
        assert scratch.parent == out.parent, "on another file system a rename would be a copy"
    assert listing(tmp_path) == {"deep/out/a": b"1", "deep/out/sub/b": b"2"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, InputError])
def test_an_exception_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), place.create(tmp_path / "out") as scratch:
        (scratch / "a").write_text("1")
        raise error("stop")
    assert listing(tmp_path) == {}
    assert [p.name for p in tmp_path.iterdir()] == []


def test_an_exception_leaves_what_was_there_before(tmp_path: Path) -> None:
    make(tmp_path / "out", {"a": b"old"})
    before = listing(tmp_path)
    with pytest.raises(ValueError, match="stop"), place.create(tmp_path / "out") as scratch:
        (scratch / "a").write_text("new")
        raise ValueError("stop")
    assert listing(tmp_path) == before


def test_what_was_there_stays_whole_until_it_is_replaced(tmp_path: Path) -> None:
    make(tmp_path / "out", {"a": b"old", "b": b"old"})
    before = listing(tmp_path / "out")
    with place.create(tmp_path / "out") as scratch:
        (scratch / "a").write_text("new")
        assert listing(tmp_path / "out") == before
    assert listing(tmp_path) == {"out/a": b"new"}


def test_what_came_to_out_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputTaken),
        place.create(tmp_path / "out", key="b" * 64) as scratch,
    ):
        (scratch / "a").write_text("ours")
        make(tmp_path / "elsewhere", {"a": b"theirs"})
        (tmp_path / "elsewhere").rename(tmp_path / "out")
    assert (tmp_path / "out" / "a").read_bytes() == b"theirs"


def test_force_leaves_alone_what_can_not_be_told_from_a_users_files(made: Path) -> None:
    (made / "bmkit.json").write_text("{")
    (made / "thesis.txt").write_text("mine")
    with pytest.raises(OutputTaken, match="your own files"):
        place.occupied(made, KEY, force=True)
    assert (made / "thesis.txt").read_text() == "mine"


def test_a_damaged_artifact_is_passed_over_in_a_scan(made: Path) -> None:
    make(made.with_name("other"), {"a": b"1"})
    (made / "bmkit.json").write_text("{")
    assert [path.name for path, _ in artifact.scan(made.parent)] == ["other"]


def test_an_empty_directory_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with place.create(tmp_path / "out") as scratch:
        (scratch / "a").write_text("1")
    assert listing(tmp_path) == {"out/a": b"1"}


def test_the_working_directory_as_out_is_filled_or_refused_but_never_a_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    try:
        with place.create(Path(".")) as scratch:
            (scratch / "a").write_text("1")
    except BmkitError:
        assert listing(tmp_path) == {}
    else:
        assert listing(tmp_path) == {"empty/a": b"1"}


def test_a_file_in_the_way_of_out_is_an_error_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for out in ("file/out", "file/deep/out"):
        with (
            pytest.raises((ResourceError, OutputTaken), match=r"/file\b"),
            place.create(tmp_path / out),
        ):
            pass
    assert listing(tmp_path) == {"file": b"mine"}


def test_a_name_that_the_file_system_refuses_is_an_error_of_the_machine(tmp_path: Path) -> None:
    with pytest.raises(ResourceError) as caught, place.create(tmp_path / ("x" * 300)):
        pass
    assert caught.value.exit_code == 4


@contextmanager
def umask(mask: int) -> Iterator[None]:
    """Set the process's umask while the block runs."""
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077, 0o002])
def test_modes_are_what_a_plain_open_would_have_given(tmp_path: Path, mask: int) -> None:
    with umask(mask):
        with place.create(tmp_path / "out") as scratch:
            handle = os.open(scratch / "private", os.O_CREAT | os.O_WRONLY, 0o600)
            os.close(handle)
            (scratch / "sub").mkdir(mode=0o700)
            (scratch / "sub" / "plain").write_text("")
        (tmp_path / "file").write_text("")
        (tmp_path / "folder").mkdir()
    modes = {
        name: stat.S_IMODE((tmp_path / name).stat().st_mode)
        for name in ("file", "folder", "out", "out/private", "out/sub", "out/sub/plain")
    }
    assert modes["out/private"] == modes["out/sub/plain"] == modes["file"] == 0o666 & ~mask
    assert modes["out"] == modes["out/sub"] == modes["folder"] == 0o777 & ~mask


def other_process(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Start Python on `code`, with pipes to talk to it."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


KILLED = """
import os, signal, sys
from pathlib import Path
from bmkit import place
with place.create(Path(sys.argv[1])) as scratch:
    (scratch / "half").write_text("half")
    (scratch / "sub").mkdir()
    (scratch / "sub" / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("there", [False, True])
def test_what_a_killed_run_has_left_is_wiped_and_used_again(tmp_path: Path, there: bool) -> None:
    out = tmp_path / "out"
    if there:
        make(out, {"a": b"old"})
    before = listing(out)
    process = other_process(KILLED, out)
    assert process.wait(60) == -9
    assert listing(out) == before, "a killed run has touched its output"
    left = {p for p in tmp_path.iterdir() if p != out}
    assert len(left) == 1
    with place.create(out) as scratch:
        assert scratch in left
        assert list(scratch.iterdir()) == []
        (scratch / "new").write_text("new")
    assert listing(tmp_path) == {"out/new": b"new"}


HOLDS = """
import sys
from pathlib import Path
from bmkit import place
with place.create(Path(sys.argv[1])) as scratch:
    (scratch / "by").write_text("the first")
    print("ready", flush=True)
    sys.stdin.readline()
"""


def test_a_second_writer_is_refused_while_the_first_one_lives(tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = other_process(HOLDS, out)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    with pytest.raises(OutputTaken, match="another bmkit") as caught, place.create(out):
        pass
    assert str(out) in str(caught.value)
    assert caught.value.exit_code == 3
    process.communicate("go on\n", timeout=60)
    assert listing(tmp_path) == {"out/by": b"the first"}, "the second writer disturbed the first"


def test_a_waiting_writer_comes_after_the_first_one(tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = other_process(HOLDS, out)
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == "ready\n"
    seen: list[dict[str, bytes]] = []

    def second() -> None:
        with place.create(out, wait=True) as scratch:
            seen.append(listing(out))
            (scratch / "by").write_text("the second")

    thread = threading.Thread(target=second)
    thread.start()
    thread.join(0.3)
    assert thread.is_alive()
    assert seen == []
    process.communicate("go on\n", timeout=60)
    thread.join(60)
    assert seen == [{"by": b"the first"}]
    assert listing(tmp_path) == {"out/by": b"the second"}


def test_two_outputs_side_by_side_are_written_at_once(tmp_path: Path) -> None:
    with place.create(tmp_path / "a") as one, place.create(tmp_path / "b") as two:
        (one / "x").write_text("1")
        (two / "x").write_text("2")
    assert listing(tmp_path) == {"a/x": b"1", "b/x": b"2"}


# --- occupied ------------------------------------------------------------------------------------


@pytest.mark.parametrize("force", [False, True])
def test_nothing_and_an_empty_directory_are_free(tmp_path: Path, force: bool) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("nothing", "empty", "no/such/parent"):
        assert place.occupied(tmp_path / name, KEY, force=force) is None


@pytest.mark.parametrize("force", [False, True])
def test_a_file_or_a_dangling_link_is_never_replaced(tmp_path: Path, force: bool) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        with pytest.raises(OutputTaken) as caught:
            place.occupied(tmp_path / name, KEY, force=force)
        assert caught.value.exit_code == 3


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("name", ["thesis.tex", ".git", "sub"])
def test_a_directory_that_bmkit_did_not_make_is_never_replaced(
    tmp_path: Path, force: bool, name: str
) -> None:
    (tmp_path / "mine" / name).mkdir(parents=True)
    with pytest.raises(OutputTaken, match="did not make"):
        place.occupied(tmp_path / "mine", KEY, force=force)


def test_a_directory_called_like_a_manifest_does_not_make_an_artifact(tmp_path: Path) -> None:
    (tmp_path / "mine" / "bmkit.json").mkdir(parents=True)
    with pytest.raises(OutputTaken, match="did not make"):
        place.occupied(tmp_path / "mine", KEY, force=True)


def test_the_result_of_the_same_key_is_found(made: Path) -> None:
    found = place.occupied(made, KEY, force=False)
    assert found is not None
    assert found.digest == artifact.open_artifact(made).digest


def test_the_result_of_another_key_is_in_the_way_unless_forced(made: Path) -> None:
    with pytest.raises(OutputTaken, match="another recipe") as caught:
        place.occupied(made, "b" * 64, force=False)
    assert "--force" in str(caught.value.hint)
    assert place.occupied(made, "b" * 64, force=True) is None


def test_force_builds_the_same_key_again(made: Path) -> None:
    assert place.occupied(made, KEY, force=True) is None


def test_a_damaged_result_of_the_same_key_is_told_and_replaced_with_force(made: Path) -> None:
    (made / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model\.safetensors is missing") as caught:
        place.occupied(made, KEY, force=False)
    assert "--force" in str(caught.value.hint)
    assert place.occupied(made, KEY, force=True) is None


# --- what has no manifest ------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """What looks like a checkpoint from outside."""
    path = tmp_path / "checkpoint"
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"weights")
    return path


def test_a_checkpoint_an_adapter_and_a_gguf_file_are_what_they_are(
    checkpoint: Path, tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.safetensors").write_bytes(b"w")
    gguf = tmp_path / "m.gguf"
    gguf.write_bytes(b"GGUF")
    kinds = [artifact.open_artifact(p).kind for p in (checkpoint, adapter, gguf)]
    assert kinds == ["model", "delta", "model"]
    assert all(artifact.open_artifact(p).manifest is None for p in (checkpoint, adapter, gguf))


def test_the_digest_of_a_checkpoint_follows_what_a_loader_reads(
    checkpoint: Path, tmp_path: Path
) -> None:
    before = artifact.open_artifact(checkpoint).digest
    pairs = [
        [n, hashlib.sha256((checkpoint / n).read_bytes()).hexdigest()]
        for n in ("config.json", "model.safetensors")
    ]
    assert before == hashlib.sha256(json.dumps(["model", pairs]).encode()).hexdigest()
    (checkpoint / "README.md").write_text("hello")
    (checkpoint / ".cache.json").write_text("{}")
    (checkpoint / "pytorch_model.bin").write_bytes(b"pickle")
    checkpoint = checkpoint.rename(tmp_path / "moved")
    assert artifact.open_artifact(checkpoint).digest == before
    (checkpoint / "tokenizer.json").write_text("{}")
    assert artifact.open_artifact(checkpoint).digest != before


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_a_checkpoint_of_pickles_only_is_refused_and_says_why(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"pickle")
    with pytest.raises(InputError, match=r"no model\.safetensors") as caught:
        artifact.open_artifact(tmp_path)
    assert name in str(caught.value.hint)
    assert "safetensors" in str(caught.value.hint)


def test_an_adapter_of_pickles_only_is_refused_and_says_why(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(InputError, match=r"adapter_model\.safetensors is missing") as caught:
        artifact.open_artifact(tmp_path)
    assert "adapter_model.bin is a pickle" in str(caught.value.hint)


def test_what_is_no_model_is_refused_with_a_hint(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "notes.txt").write_text("")
    for path, hint in [
        (tmp_path / "folder", "config.json"),
        (tmp_path / "notes.txt", "gguf"),
        (checkpoint / "model.safetensors", str(checkpoint)),
    ]:
        with pytest.raises(InputError, match=path.name) as caught:
            artifact.open_artifact(path)
        assert hint in str(caught.value.hint)
    with pytest.raises(InputError, match="no such file"):
        artifact.open_artifact(tmp_path / "gone")
