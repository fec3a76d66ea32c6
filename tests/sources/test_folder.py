"""Listing real folders with odd names, links and sidecars, and opening what was listed."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.config.workspace import DecodeConfig, SourceConfig
from training.errors import DataError
from training.images import decoding
from training.sources import folder
from training.sources.folder import FolderSource
from training.sources.source import LISTED

SOURCE = SourceConfig(name="photos", path="photos", tags=("Photo (medium)",))


def opened(root, source=SOURCE):
    return FolderSource(source, root, DecodeConfig())


def listing(root, source=SOURCE):
    return opened(root, source).list()


def content(root, locator):
    """The bytes of a candidate, as a worker reads them."""
    return decoding.read_file(opened(root).open(locator), DecodeConfig())


def write(root: Path, names, content=b"x"):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def test_candidates_are_what_claims_to_be_an_image_in_the_order_of_their_bytes(tmp_path):
    write(
        tmp_path,
        [
            "b/a.JPG",
            "b.png",
            "a.webp",
            "LICENCES.md",
            "notes.txt",
            "t.csv",
            "B.gif",
            "z.heic",
            "noname",
        ],
    )
    frame, problems = listing(tmp_path)
    assert frame["source_id"].to_list() == ["B.gif", "a.webp", "b.png", "b/a.JPG", "z.heic"]
    assert frame["locator"].to_list() == frame["source_id"].to_list()
    assert frame["bytes"].to_list() == [1] * 5
    assert frame["tags"].to_list() == [[{"name": "photo_(medium)", "category": "general"}]] * 5
    assert [(p.path, p.reason, p.source_id) for p in problems] == [
        ("notes.txt", "sidecar_unmatched", "")
    ]


def test_odd_names_are_listed_once_and_found_again(tmp_path):
    names = [
        b"plain name.jpg", b"100%.jpg", b"a%20b.jpg", b"a b.jpg", b"caf\xc3\xa9.jpg", b"cafe\xcc\x81.jpg",
        b"\xff\xfe.jpg", b"new\nline.jpg", b"-rf.jpg", b"$(touch x).jpg", b"<img src=x>.jpg", b"\xe2\x80\xaertl.jpg",
        b"l" * 251 + b".jpg", b"%FF%FE.jpg", b"%.jpg", b"%%41.jpg",
    ]  # fmt: skip
    for number, name in enumerate(names):
        (tmp_path / os.fsdecode(name)).write_bytes(bytes([number]))
    frame, problems = listing(tmp_path)
    assert problems == []
    assert frame.height == len(names) == frame["source_id"].n_unique()
    assert all(text.isprintable() for text in frame["source_id"])
    contents = {folder.locate(tmp_path, locator).read_bytes()[0] for locator in frame["locator"]}
    assert contents == set(range(len(names)))
    assert "100%.jpg" in frame["source_id"].to_list()


@given(st.binary(min_size=1, max_size=40).filter(lambda n: b"\0" not in n))
def test_encoding_a_name_is_reversible_and_printable(name):
    text = folder.encode_name(name)
    assert text.isprintable()
    if not any(part in (b"", b".", b"..") for part in name.split(b"/")):
        assert os.fsencode(folder.locate(Path("/root"), text)) == b"/root/" + name


@pytest.mark.parametrize(
    "locator", ["", "/etc/passwd", "../a.jpg", "a/%2E%2E/b.jpg", "a//b.jpg", "a%00.jpg"]
)
def test_a_locator_never_leads_out_of_its_folder(locator):
    with pytest.raises(DataError, match="inside its folder"):
        folder.locate(Path("/root"), locator)


def test_links_that_lead_out_are_named_and_no_file_is_opened_that_is_none(tmp_path):
    outside = tmp_path / "outside"
    write(outside, ["secret.jpg"])
    root = tmp_path / "root"
    write(root, ["real.jpg", "folder.jpg/inside.png"])
    (root / "link.jpg").symlink_to(outside / "secret.jpg")
    (root / "elsewhere").symlink_to(outside)
    (root / "loop").symlink_to(root)
    (root / "nowhere.jpg").symlink_to(tmp_path / "none")
    (root / "unmounted").symlink_to(tmp_path / "none")
    (root / ".#notes.txt").symlink_to("someone@host.123")
    os.mkfifo(root / "pipe.jpg")
    os.mkfifo(root / "real.txt")
    frame, problems = listing(root)
    links = ["elsewhere", "link.jpg", "loop", "nowhere.jpg", "unmounted"]
    assert frame["source_id"].to_list() == sorted(
        ["folder.jpg/inside.png", "pipe.jpg", "real.jpg", *links]
    )
    matched = [(p.path, p.reason, p.source_id, p.detail) for p in problems if p.source_id]
    assert matched == [("real.txt", "sidecar_unreadable", "real.jpg", "not a regular file")]
    for name in links:
        with pytest.raises(decoding.Unusable, match="link_not_followed"):
            content(root, name)


def test_links_that_stay_inside_are_followed(tmp_path):
    root = tmp_path / "root"
    write(root, ["real/a.png", "real/deep/b.png"], b"bytes")
    write(root, ["words/a.txt"], b"red_star")
    (root / "again").symlink_to("real")
    (root / "real" / "deep" / "up").symlink_to("..")
    (root / "c.png").symlink_to(root / "real" / "a.png")
    (root / "c.txt").symlink_to("words/a.txt")
    (tmp_path / "by_link").symlink_to(root)
    for top in (root, tmp_path / "by_link"):
        frame, problems = listing(top)
        found = dict(frame.select("source_id", "bytes").rows())
        followed = ["again/a.png", "again/deep/b.png", "c.png", "real/a.png", "real/deep/b.png"]
        assert [name for name, size in found.items() if size == 5] == followed
        assert all(content(top, name) == b"bytes" for name in followed)
        assert set(found) - set(followed) == {"real/deep/up", "again/deep/up"}
        (tags,) = frame.filter(source_id="c.png")["tags"].to_list()
        assert [tag["name"] for tag in tags] == ["photo_(medium)", "red_star"]
        assert [p.path for p in problems] == ["words/a.txt"]


def test_folders_that_link_to_each_other_come_to_an_end(tmp_path):
    for name in "abcd":
        write(tmp_path, [f"{name}/{name}.png"])
        for other in "abcd".replace(name, ""):
            (tmp_path / name / f"to_{other}").symlink_to(tmp_path / other)
    frame, _ = listing(tmp_path)
    assert {f"{name}/{name}.png" for name in "abcd"} <= set(frame["source_id"])
    assert frame.height < 100
    assert frame.equals(listing(tmp_path)[0])


def test_a_link_that_is_bent_after_the_listing_shows_nothing_from_outside(tmp_path):
    root = tmp_path / "root"
    write(root, ["real/deep/a.png"])
    write(tmp_path, ["outside/deep/a.png"], b"secret")
    (root / "again").symlink_to("real")
    (root / "b.png").symlink_to("real/deep/a.png")
    for name in ("again/deep/a.png", "b.png"):
        assert content(root, name) == b"x"
    for name, outside in [("again", "outside"), ("b.png", "outside/deep/a.png")]:
        (root / name).unlink()
        (root / name).symlink_to(tmp_path / outside)
    for name in ("again/deep/a.png", "b.png"):
        with pytest.raises(decoding.Unusable, match=r"link_not_followed.*leads to .*outside"):
            content(root, name)


def tags_of(frame, name):
    (tags,) = frame.filter(source_id=name)["tags"].to_list()
    return [tag["name"] for tag in tags if tag["name"] != "photo_(medium)"]


@pytest.mark.parametrize(
    ("image", "sidecar"),
    [("a.png", "a.txt"), ("a.png", "a.TXT"), ("a.PNG", "a.Txt"), ("a.png", "a.png.txt"), ("a.png", "a.png.TXT"),
     ("dots.v1.2.png", "dots.v1.2.txt"), ("e\u0301toile.png", "\u00e9toile.txt"),
     ("\u00e9toile.png", "e\u0301toile.png.txt")],
)  # fmt: skip
def test_a_sidecar_is_found_whatever_its_case_form_and_suffixes(tmp_path, image, sidecar):
    write(tmp_path, [image])
    write(tmp_path, [sidecar], b"red_star")
    frame, problems = listing(tmp_path)
    assert (tags_of(frame, image), problems) == (["red_star"], [])


def test_a_sidecar_of_the_very_name_wins_and_the_other_is_named(tmp_path):
    write(tmp_path, ["a.png", "b.png"])
    write(tmp_path, ["a.TXT", "c.txt", "metadata.json"], b"blue")
    write(tmp_path, ["a.txt"], b"red")
    write(tmp_path, ["b.json"], b"[1]")
    frame, problems = listing(tmp_path)
    assert tags_of(frame, "a.png") == ["red"]
    assert [(p.path, p.reason, p.source_id) for p in problems] == [
        ("a.TXT", "sidecar_unmatched", ""), ("b.json", "sidecar_malformed", "b.png"),
        ("c.txt", "sidecar_unmatched", ""), ("metadata.json", "sidecar_unmatched", ""),
    ]  # fmt: skip


def test_a_source_says_what_its_files_hold(tmp_path):
    write(tmp_path, ["a.png"])
    write(tmp_path, ["a.txt"], b"sks_dog running outside")
    captions = {}
    for words in ("auto", "tags", "captions"):
        source = SourceConfig(name="photos", path="photos", words=words)
        captions[words] = listing(tmp_path, source)[0].select("caption", "tags").row(0)
    assert captions["captions"] == ("sks_dog running outside", [])
    assert captions["tags"] == (None, [{"name": "sks_dog_running_outside", "category": "general"}])
    digests = {
        opened(tmp_path, SourceConfig(name="p", path="p", words=words)).fingerprint()
        for words in captions
    }
    assert len(digests) == 3


def test_a_correction_of_equal_size_and_time_is_seen(tmp_path):
    write(tmp_path, ["a.png"])
    path = tmp_path / "a.txt"
    path.write_text("cat, red")
    before, times = (
        opened(tmp_path).fingerprint(),
        (path.stat().st_atime_ns, path.stat().st_mtime_ns),
    )
    path.write_text("dog, red")
    os.utime(path, ns=times)
    in_place = opened(tmp_path).fingerprint()
    assert in_place != before
    (tmp_path / "new").write_text("cow, red")
    os.utime(tmp_path / "new", ns=times)
    (tmp_path / "new").replace(path)
    assert opened(tmp_path).fingerprint() not in (before, in_place)


def test_a_sidecar_that_appears_or_vanishes_is_seen_though_no_image_has_its_name(tmp_path):
    write(tmp_path, ["a.png"])
    before = opened(tmp_path).fingerprint()
    write(tmp_path, ["b.txt"])
    assert opened(tmp_path).fingerprint() != before


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match=r"source 'photos': .*nowhere is not a folder"):
        listing(tmp_path / "nowhere")


def test_an_empty_folder_has_no_candidates_and_the_right_columns(tmp_path):
    frame, problems = listing(tmp_path)
    assert (frame.height, frame.columns, problems) == (0, list(LISTED), [])


def test_the_scan_digest_changes_with_whatever_a_listing_reads(tmp_path):
    write(tmp_path, ["a.jpg", "a.txt", "unrelated.txt"])
    seen = [opened(tmp_path).fingerprint()]
    (tmp_path / "unrelated.txt").write_text(
        "longer than before"
    )  # No image's: only its name counts.
    assert opened(tmp_path).fingerprint() == seen[0]

    def changed():
        seen.append(opened(tmp_path).fingerprint())
        return len(set(seen)) == len(seen)

    (tmp_path / "a.txt").write_text("another text")
    assert changed()
    os.utime(tmp_path / "a.jpg", ns=(1, 1))
    assert changed()
    (tmp_path / "a.json").write_text("{}")
    assert changed()
    write(tmp_path, ["b.jpg"])
    assert changed()
    (tmp_path / "b.jpg").rename(tmp_path / "c.jpg")
    assert changed()
    assert (
        opened(tmp_path, SourceConfig(name="photos", path="x", tags=("other",))).fingerprint()
        not in seen
    )
