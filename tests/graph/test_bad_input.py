"""Each mistake ends with one clear line that names the thing, its value and what to do, and a non-zero status."""

import pytest
from graph_tools import foundry
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
    one_line(foundry("run", "--home", home, check=False), "no image file in any source", str(source), "add pictures")
    assert not list((home / "tables").glob("*/*.json"))


def test_a_folder_without_a_usable_picture(empty):
    home, source = empty
    for name in ("a.jpg", "b.png"):
        (source / name).write_bytes(b"this is text, whatever its name says")
    done = foundry("run", "--home", home, check=False)
    one_line(done, "none of 2 candidates", "not_an_image", "rejected_images")
    listed = foundry(
        "sql", "--home", home, "--format", "csv", "select reason, count(*) n from ingest_verdicts group by 1"
    )
    assert listed.stdout.splitlines()[1:] == ["not_an_image,2"]


def test_one_bad_picture_costs_one_row(empty):
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
    one_line(foundry("run", "--home", home, check=False), "foundry.toml:", "selection.min_scoer", "'min_score'")


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
    one_line(foundry("init", tmp_path / "w", "--preset", "dmo", check=False), "no recipe is named 'dmo'", "demo")


def test_a_source_that_is_not_there(tmp_path):
    done = foundry("init", tmp_path / "w", "--source", tmp_path / "nowhere", check=False)
    one_line(done, "nowhere", "not a folder")
    assert not (tmp_path / "w").exists()


def test_a_selection_that_matches_nothing(empty):
    home, _ = empty
    one_line(foundry("run", "--home", home, "--select", "lattents", check=False), "'lattents'")


def test_a_wrong_query(empty):
    home, _ = empty
    one_line(foundry("sql", "--home", home, "select nothing from nowhere", check=False), "nowhere")


def test_a_full_disk(empty, tmp_path):
    """A size limit on files stands in for a full disk where no small file system can be mounted."""
    import os
    import subprocess

    _, source = empty
    Image.effect_noise((200, 160), 50).convert("RGB").save(source / "good.png")
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1500k", "none", small]
    if os.geteuid() != 0 or subprocess.run(mount, check=False).returncode:
        pytest.skip("needs root to mount a small file system")
    try:
        foundry("init", small / "w", "--preset", "demo", "--source", source)
        filler = small / "filler"
        size = os.statvfs(small).f_bavail * os.statvfs(small).f_frsize - 330_000
        filler.write_bytes(b"x" * max(size, 0))
        done = foundry("run", "--home", small / "w", "--select", "raw_images", check=False)
        assert done.returncode != 0
        assert "no space left" in done.stderr.lower() or "disk" in done.stderr.lower(), done.stderr
        filler.unlink()
        foundry("verify", "--home", small / "w")
    finally:
        subprocess.run(["umount", small], check=True)
