"""A release holds copies of all that it names, and the licence of its base goes with it."""

import pytest

from training import commit
from training.config.run import RunConfig
from training.runs import release


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    for name in ("LICENSE.md", "licence-old.txt", "NOTICE", "README.md", "model_index.json"):
        (folder / name).write_text(f"text of {name}\n")
    (folder / "license-folder").mkdir()
    return folder


def test_texts_of_the_licence_are_found_beside_folders_and_single_files(base):
    found = release.licence_files(base)
    assert list(found) == ["LICENSE.md", "NOTICE", "licence-old.txt"]
    assert release.licence_files(base.with_suffix(".safetensors")) == found
    assert release.licence_files(base / "none") == {}


def test_a_release_names_every_file_and_keeps_nothing_of_an_older_one(base, tmp_path):
    folder = tmp_path / "release" / "run"
    image = tmp_path / "p.png"
    image.write_bytes(b"png")
    arguments = {"model": base, "model_files": ["model_index.json"]}
    release.assemble(folder, **arguments, texts={"old.txt": "old"}, copies={})
    texts = {
        release.CARD: "card",
        release.TAGS: "tag\n",
        release.NO_LICENCE: release.missing_licence("b", "mit"),
    }
    release.assemble(
        folder,
        **arguments,
        texts=texts,
        copies={"LICENSE": base / "LICENSE.md", "pictures/1.png": image},
    )
    found = {
        row["file"]: row
        for row in release.table(folder, RunConfig(encoding="sdxl")).iter_rows(named=True)
    }
    assert {name: row["about"] for name, row in found.items()} == {
        "LICENSE": "licence of the base model, which holds for this one",
        release.NO_LICENCE: "the base model came without the text of its licence",
        "README.md": "model card",
        "model/model_index.json": "model in diffusers layout",
        "pictures/1.png": "sample image of the card",
        "tags.csv": "every tag with its images and aliases",
    }
    assert found["pictures/1.png"]["bytes"] == 3
    assert found["pictures/1.png"]["sha256"] == commit.sha256_file(image)


def test_an_edited_licence_of_the_base_does_not_reach_an_older_release(base, tmp_path):
    folder = tmp_path / "release" / "run"
    release.assemble(
        folder, model=base, model_files=[], texts={}, copies={"LICENSE": base / "LICENSE.md"}
    )
    with (base / "LICENSE.md").open("a") as file:
        file.write("more")
    assert (folder / "LICENSE").read_text() == "text of LICENSE.md\n"
