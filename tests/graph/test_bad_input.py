"""Each mistake ends with one clear line that names the thing, its value and what to do, and a
non-zero status."""

import json
import os
import shutil
import socket
import subprocess

import pytest
from graph_tools import ROOT, foundry
from PIL import Image


def one_line(done, *words):
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    errors = [line for line in done.stderr.splitlines() if line.startswith("foundry: ")]
    assert len(errors) == 1, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in errors[0], errors[0]


@pytest.fixture
def empty(tmp_path):
    source = tmp_path / "pictures"
    source.mkdir()
    home = tmp_path / "workspace"
    foundry("init", home, "--preset", "demo", "--source", source)
    return home, source


def test_an_empty_folder(empty):
    home, source = empty
    one_line(
        foundry("run", "--home", home, check=False),
        "no image file in any source",
        str(source),
        "add images",
    )
    assert not list((home / "tables").glob("*/*.json"))


def test_a_folder_without_a_usable_image(empty):
    home, source = empty
    for name in ("a.jpg", "b.png"):
        (source / name).write_bytes(b"this is text, whatever its name says")
    done = foundry("run", "--home", home, check=False)
    one_line(done, "none of 2 candidates", "not_an_image", "rejected_images")
    listed = foundry(
        "sql",
        "--home",
        home,
        "--format",
        "csv",
        "select reason, count(*) n from ingest_verdicts group by 1",
    )
    assert listed.stdout.splitlines()[1:] == ["not_an_image,2"]


def test_one_bad_image_costs_one_row(empty):
    home, source = empty
    Image.effect_noise((200, 160), 50).convert("RGB").save(source / "good.png")
    (source / "bad.png").write_bytes((source / "good.png").read_bytes()[:500])
    foundry("run", "--home", home, "--select", "raw_images")
    query = "select source_id, status, reason from ingest_verdicts order by 1"
    rows = foundry("sql", "--home", home, "--format", "csv", query).stdout.splitlines()[1:]
    assert rows == ["bad.png,rejected,truncated", "good.png,accepted,"]


def test_links_that_lead_out_and_words_that_are_not_used_are_said(empty, tmp_path):
    home, source = empty
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for path in (source / "a.png", source / "b.png", elsewhere / "c.png"):
        Image.effect_noise((200, 160), 50).convert("RGB").save(path)
    (source / "concept").symlink_to(elsewhere)
    (source / "a.TXT").write_text("1girl, red_dress\nA girl in a red dress stands in a garden.\n")
    (source / "b.json").write_text("[1]")
    (source / "c.txt").write_text("nobody's")
    done = foundry("run", "--home", home, "--select", "raw_images,captions")
    for words in (
        "words: 1 of 3 image files have tags or a caption beside them",
        "sidecars without an image of their name: 1, such as c.txt",
        "1, such as b.json: must hold an object, holds list", "from rejected_images where stage = 'source_listing'",
    ):  # fmt: skip
        assert words in done.stdout

    def ask(query):
        return foundry("sql", "--home", home, "--format", "csv", query).stdout.splitlines()[1:]

    assert ask("select source_id, status, reason from ingest_verdicts order by 1") == [
        "a.png,accepted,", "b.png,accepted,", "concept,rejected,link_not_followed",
    ]  # fmt: skip
    assert ask("select reason, value from rejected_images where stage = 'source_listing' order by 1") == [
        "sidecar_malformed,b.json", "sidecar_unmatched,c.txt",
    ]  # fmt: skip
    assert ask("select caption from captions where caption is not null") == [
        "A girl in a red dress stands in a garden."
    ]


def test_an_unknown_key(empty):
    home, _ = empty
    path = home / "foundry.toml"
    path.write_text(path.read_text().replace("min_score", "min_scoer"))
    one_line(
        foundry("run", "--home", home, check=False),
        "foundry.toml:",
        "selection.min_scoer",
        "'min_score'",
    )


def test_a_missing_model_folder(empty):
    home, source = empty
    Image.effect_noise((200, 160), 50).convert("RGB").save(source / "good.png")
    path = home / "foundry.toml"
    path.write_text(path.read_text().replace('"demo:models/clip"', '"models/nowhere"'))
    done = foundry("run", "--home", home, check=False)
    one_line(done, "clip = 'models/nowhere'", "missing", "hf download", "--preset demo")


def test_a_workspace_of_a_newer_version(empty):
    home, _ = empty
    path = home / "foundry.toml"
    path.write_text(path.read_text().replace("format = 1", "format = 2"))
    one_line(foundry("run", "--home", home, check=False), "format=2", "this version reads format 1")


def test_no_workspace(tmp_path):
    one_line(foundry("run", "--home", tmp_path, check=False), "is no workspace", "foundry init")


def test_an_existing_workspace_is_not_overwritten(empty):
    home, _ = empty
    one_line(foundry("init", home, "--preset", "demo", check=False), "is a workspace already")


def test_an_unknown_preset(tmp_path):
    one_line(
        foundry("init", tmp_path / "w", "--preset", "dmo", check=False),
        "no recipe is named 'dmo'",
        "demo",
    )


def test_a_source_that_is_not_there(tmp_path):
    done = foundry("init", tmp_path / "w", "--source", tmp_path / "nowhere", check=False)
    one_line(done, "nowhere", "not a folder")
    assert not (tmp_path / "w").exists()


def test_a_selection_that_matches_nothing(empty):
    home, _ = empty
    done = foundry("run", "--home", home, "--select", "lattents", check=False)
    one_line(done, "'lattents'", "did you mean 'latents'?")


def test_a_wrong_query(empty):
    home, _ = empty
    one_line(foundry("sql", "--home", home, "select nothing from nowhere", check=False), "nowhere")


@pytest.fixture
def mounted(tmp_path):
    """`mounted("-t", "tmpfs", ...)`: a folder with that mounted on it."""
    folder = tmp_path / "mounted"
    folder.mkdir()
    done = []

    def mount(*arguments):
        if (
            os.geteuid() != 0
            or subprocess.run(["mount", *arguments, folder], check=False).returncode
        ):
            pytest.skip("needs root to mount a file system")
        done.append(arguments)
        return folder

    yield mount
    for _ in done:
        subprocess.run(["umount", folder], check=True)


def leftovers(home):
    """What looks as if a writer had left it, by its name."""
    return [path for path in home.rglob("*") if ".tmp" in path.name or path.suffix == ".wal"]


@pytest.mark.parametrize("free", [3_000, 250_000, 1_500_000])
def test_a_full_disk(empty, mounted, free):
    """Full at any moment, the first write of a lock or the database of MLflow: one line, and
    nothing left lying."""
    _, source = empty
    Image.effect_noise((200, 160), 50).convert("RGB").save(source / "good.png")
    small = mounted("-t", "tmpfs", "-o", "size=12m", "none")
    home = small / "w"
    foundry("init", home, "--preset", "demo", "--source", source)
    filler = small / "filler"
    filler.write_bytes(b"x" * (os.statvfs(small).f_bavail * os.statvfs(small).f_frsize - free))
    done = foundry("run", "--home", home, "--select", "raw_images", check=False)
    if done.returncode:
        one_line(done, "no space left on device while writing", str(home), "free some space")
    assert free > 1_000_000 or done.returncode
    assert leftovers(home) == []
    filler.write_bytes(
        b"x" * (filler.stat().st_size + os.statvfs(small).f_bavail * os.statvfs(small).f_frsize)
    )
    for command in (("verify",), ("sql", "from source_listing"), ("digest",)):
        foundry(*command, "--home", home)
    filler.unlink()
    foundry("run", "--home", home, "--select", "raw_images")
    assert foundry("verify", "--home", home).stdout.startswith("0 damaged, 0 orphans")


NEW_RUN = (
    "train", "--run", "new", "--recipe", "demo", "--set", "num_samples=32", "--set", "optimizer.warmup_samples=8",
    "--set", "batch.global_batch_size=8", "--set", "batch.micro_batch_size=8", "--set", "prompts.max_chunks=1",
    "--set", "checkpoints.every_samples=8",
)  # fmt: skip
FULL = [
    (("evaluate",), 8_000, ()),
    ((*NEW_RUN, "--bundle", "bundle"), 8_000, ("runs/new/config.toml",)),
    ((*NEW_RUN, "--bundle", "bundle"), 600_000, ("bundle",)),
    (NEW_RUN, 600_000, ("run new failed at", "checkpoints/samples_")),  # the trainer's own process
]


@pytest.mark.slow
def test_a_full_disk_while_work_goes_on(small, mounted):
    """Each command that writes much: one line that names the place, nothing left lying, and it goes on afterwards."""
    disk = mounted("-t", "tmpfs", "-o", "size=400m", "none")
    home, filler = disk / "w", disk / "filler"
    shutil.copytree(small, home, symlinks=True)

    def fill(free):
        filler.write_bytes(b"x" * (os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - free))

    for command, free, words in FULL:
        if command == ("evaluate",):
            shutil.rmtree(home / "tables" / "sample_images")
        here = [str(disk / word) if word == "bundle" else word for word in command]
        fill(free)
        done = foundry(*here, "--home", home, check=False)
        one_line(
            done, "no space left on device while writing", str(disk), "free some space", *words
        )
        assert leftovers(disk) == [], command
        filler.unlink()
    fill(8_000)
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        ports = ("--port", one.getsockname()[1], "--mlflow-port", two.getsockname()[1])
    done = foundry("up", *ports, "--home", home, check=False)
    assert done.returncode == 1
    assert (
        f"so all is stopped: no space left on device while writing {home}; free some space"
        in done.stderr
    )
    assert leftovers(disk) == []
    filler.unlink()
    foundry("run", "--home", home)
    assert foundry("verify", "--home", home).stdout.startswith("0 damaged")


def test_a_workspace_that_cannot_be_written_to(empty, mounted):
    home, source = empty
    Image.effect_noise((200, 160), 50).convert("RGB").save(source / "good.png")
    foundry("run", "--home", home, "--select", "raw_images")
    there = mounted("--bind", home)
    subprocess.run(["mount", "-o", "remount,ro,bind", there], check=True)
    for command in (("verify",), ("sql", "from raw_images"), ("digest",)):
        foundry(*command, "--home", there)
    image_id = "0" * 64
    for command in (
        ("run",),
        ("run", "--select", "latents"),
        ("gc",),
        ("forget", image_id),
        ("train", "--run", "demo"),
    ):
        done = foundry(*command, "--home", there, check=False)
        if command != ("gc",) or done.returncode:  # there may be nothing to remove
            one_line(done, "read-only file system", str(there), "mount it for writing")
    one_line(
        foundry("init", there / "new", "--preset", "demo", check=False),
        "read-only file system",
        str(there),
    )


@pytest.mark.parametrize("name", ["what?", "100%25", "a\\b", "a\nb", os.fsdecode(b"\xff")])
def test_a_path_that_no_workspace_can_have(tmp_path, name):
    from resources.workspace.setup import create
    from training.errors import ConfigError, WorkspaceError

    with pytest.raises(WorkspaceError, match="the path of a workspace must") as refused:
        create(tmp_path / name / "w", sources=[str(tmp_path)], preset=None, tiny=False)
    assert str(refused.value).isprintable()
    with pytest.raises(ConfigError, match=r"--source .*: a path in foundry\.toml must be UTF-8"):
        create(tmp_path / "w", sources=[os.fsdecode(b"\xff")], preset=None, tiny=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["[v1] {a,b} *", 'Bob\'s "q" #1'])
def test_a_workspace_a_source_and_a_model_below_any_path(tmp_path, name):
    folder = tmp_path / name
    source = folder / "what? 100%25 [x]*"
    source.mkdir(parents=True)
    Image.effect_noise((200, 160), 50).convert("RGB").save(source / "good [1]*?.png")
    foundry("init", folder / "w", "--preset", "demo", "--source", source)
    shutil.copytree(ROOT / "demo" / "models" / "clip", source / "clip")
    config = folder / "w" / "foundry.toml"
    text = config.read_text()
    assert 'clip = "demo:models/clip"' in text
    config.write_text(
        text.replace('clip = "demo:models/clip"', f"clip = {json.dumps(str(source / 'clip'))}")
    )
    foundry("run", "--home", folder / "w", "--select", "embeddings")
    asked = (
        "sql",
        "--home",
        folder / "w",
        "--format",
        "csv",
        "select count(*) as n from embeddings",
    )
    assert foundry(*asked).stdout == "n\n1\n"
    assert foundry("verify", "--home", folder / "w").stdout.startswith("0 damaged, 0 orphans")
