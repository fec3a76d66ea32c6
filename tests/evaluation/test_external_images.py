"""Images made anywhere: both layouts, tables and summary, what is skipped, and input that is
broken."""

import numpy as np
import pandas as pd
import polars as pl
import pytest
import scipy.stats
from PIL import Image

from training.annotators.aesthetic import Aesthetic
from training.annotators.clip import Clip
from training.config.workspace import DecodeConfig
from training.errors import EvaluationError
from training.evaluation import clip_score, external_images, summary
from training.evaluation.clip_score import Networks

TEXTS = ["red cat", 'a "small" dog, sitting', "tree"]
DIGESTS = {"clip": "c", "aesthetic": "a"}
DECODE = DecodeConfig(num_workers=1)


@pytest.fixture(scope="module")
def networks(clip_folder, aesthetic_folder):
    return Networks(
        clip=Clip.load(clip_folder, "cpu"), aesthetic=Aesthetic.load(aesthetic_folder, "cpu")
    )


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.csv"
    pd.DataFrame({"index": range(3), "Prompts": TEXTS}).to_csv(path, index=False)
    return external_images.read_prompts(path)


def draw(path, seed=0, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    """Two models with two images of each of three prompts."""
    root = tmp_path / "pictures"
    for place, model in enumerate(("sdxl-1.0", "mine")):
        for number in range(6):
            draw(root / model / f"{number % 3:05d}-{number}.png", seed=10 * place + number)
    (root / "notes.txt").write_text("no image")
    (root / ".hidden").mkdir()
    return root


def score(folder, prompts, out, networks, **changes):
    options = {"digests": DIGESTS, "decode": DECODE, "batch_size": 4} | changes
    return list(
        external_images.score_models(
            external_images.find_models(folder, prompts), prompts, out, networks, **options
        )
    )


def test_scores_are_those_of_our_own_images(folder, prompts, networks, tmp_path):
    done = score(folder, prompts, tmp_path / "out", networks)
    assert [(one.name, one.num_images, one.num_failed, one.skipped) for one in done] == [
        ("mine", 6, 0, False), ("sdxl-1.0", 6, 0, False)
    ]  # fmt: skip
    found = pl.read_parquet(tmp_path / "out" / "pictures" / "mine.parquet")
    assert found["prompt"].to_list() == [TEXTS[row] for row in (0, 0, 1, 1, 2, 2)]
    assert found["file"].to_list()[:2] == ["mine/00000-0.png", "mine/00000-3.png"]
    images = [np.asarray(Image.open(folder / file)) for file in found["file"]]
    expected = clip_score.look(images, found["prompt"].to_list(), networks, batch_size=1)
    for name in ("clip_score", "aesthetic", "saturation"):
        assert found[name].to_numpy() == pytest.approx(expected.scores[name], abs=1e-5)
    table = pd.read_csv(tmp_path / "out" / "pictures" / "mine.csv")
    assert table["clip_score"].to_numpy() == pytest.approx(found["clip_score"].to_numpy())


def test_the_summary_is_the_guides_of_the_images_table(folder, prompts, networks, tmp_path):
    score(folder, prompts, tmp_path / "out", networks)
    found = pd.read_csv(tmp_path / "out" / "summary.csv")
    assert list(found.columns) == ["Model", *summary.COLUMNS]
    assert found["Model"].to_list() == ["mine", "sdxl-1.0"]
    for _, row in found.iterrows():
        rows = pd.read_csv(tmp_path / "out" / "pictures" / f"{row['Model']}.csv")
        expected = rows["aesthetic"].describe().to_dict() | {
            "skew": scipy.stats.skew(rows["aesthetic"]), "kurtosis": scipy.stats.kurtosis(rows["aesthetic"])
        }  # fmt: skip
        for name, value in expected.items():
            assert row[f"{name}_LAIONScore"] == pytest.approx(value, rel=1e-9)
        assert row["Clipscore_mean"] == pytest.approx(rows["clip_score"].mean())
        assert row["Clipscore_std"] == pytest.approx(np.std(rows["clip_score"]))


def test_ghostreviews_folders_are_known_by_its_csv(tmp_path):
    path = tmp_path / "prompts.csv"
    rows = [
        (index, text, model)
        for model in ("Mix-V2.0", "real_v6")
        for index, text in enumerate(TEXTS)
    ]
    pd.DataFrame(rows, columns=["index", "Prompts", "sd_model_checkpoint"]).to_csv(
        path, index=False
    )
    prompts = external_images.read_prompts(path)
    root = tmp_path / "pictures"
    for name in ("Mix-V2.0-0", "Mix-V2.0-2", "real_v6-1"):
        draw(root / name / "00007-99999.png")
    draw(
        root / "new-mix-1" / "2.png"
    )  # its script reads the number after the last hyphen, whatever the model
    draw(root / "own" / "own-2.png")  # and a folder without one is a model's
    models = external_images.find_models(root, prompts)
    assert [(model.name, [prompts.texts[row] for row in model.rows]) for model in models] == [
        ("Mix-V2.0", [TEXTS[0], TEXTS[2]]), ("new-mix", [TEXTS[1]]), ("own", [TEXTS[2]]), ("real_v6", [TEXTS[1]]),
    ]  # fmt: skip


def test_models_that_are_done_are_skipped_without_loading_anything(
    folder, prompts, networks, tmp_path
):
    out = tmp_path / "out"
    score(folder, prompts, out, networks)
    before = {path: path.read_bytes() for path in out.rglob("*.*") if path.is_file()}

    def refuse():
        raise AssertionError("nothing is to be loaded")

    models = external_images.find_models(folder, prompts)
    options = {"digests": DIGESTS, "decode": DECODE, "batch_size": 4}
    again = list(external_images.score_models(models, prompts, out, refuse, **options))
    assert [one.skipped for one in again] == [True, True]
    assert {path: path.read_bytes() for path in before} == before
    draw(folder / "mine" / "2-new.png", seed=99)
    assert [one.skipped for one in score(folder, prompts, out, networks)] == [False, True]
    other = score(folder, prompts, out, networks, digests={"clip": "another"})
    assert not any(one.skipped for one in other)


def test_a_stopped_run_goes_on_with_the_next_model(folder, prompts, networks, tmp_path):
    out, options = tmp_path / "out", {"digests": DIGESTS, "decode": DECODE, "batch_size": 4}
    run = external_images.score_models(
        external_images.find_models(folder, prompts), prompts, out, networks, **options
    )
    next(run)
    run.close()
    assert pl.read_csv(out / "summary.csv")["Model"].to_list() == ["mine"]
    assert [one.skipped for one in score(folder, prompts, out, networks)] == [True, False]


def test_a_image_that_cannot_be_read_is_counted_and_never_averaged(
    folder, prompts, networks, tmp_path
):
    whole = score(folder, prompts, tmp_path / "whole", networks)
    (folder / "mine" / "00000-0.png").write_bytes(b"no image at all")
    done = score(folder, prompts, tmp_path / "out", networks)
    assert (whole[0].num_failed, done[0].num_failed) == (0, 1)
    rows = pl.read_parquet(tmp_path / "out" / "pictures" / "mine.parquet")
    assert rows["failed"][0].startswith("not_an_image")
    assert rows["clip_score"].null_count() == rows["aesthetic"].null_count() == 1
    summed = pl.read_csv(tmp_path / "out" / "summary.csv").row(0, named=True)
    assert summed["count_LAIONScore"] == 5
    assert summed["mean_LAIONScore"] == pytest.approx(rows["aesthetic"].mean())


def test_a_model_of_which_nothing_can_be_read_has_an_empty_row(tmp_path, prompts, networks):
    (tmp_path / "pictures" / "bad").mkdir(parents=True)
    (tmp_path / "pictures" / "bad" / "1.png").write_bytes(b"")
    done = score(tmp_path / "pictures", prompts, tmp_path / "out", networks)
    assert (done[0].num_images, done[0].num_failed) == (1, 1)
    assert pl.read_csv(tmp_path / "out" / "summary.csv").row(0, named=True)["count_LAIONScore"] == 0


@pytest.mark.parametrize("mode", ["P", "L", "RGBA", "I;16"])
def test_images_of_any_mode_become_rgb_before_anything_is_resized(
    mode, tmp_path, prompts, networks
):
    path = tmp_path / "pictures" / "m" / "0.png"
    if mode == "I;16":
        path.parent.mkdir(parents=True)
        grey = np.random.default_rng(1).integers(0, 256, (40, 56), dtype=np.uint16)
        Image.fromarray(grey * 257).save(path)
        rgb = np.repeat(grey[..., None], 3, axis=2).astype(np.uint8)
    else:
        draw(path, mode=mode)
        rgb = np.asarray(Image.open(path).convert("RGB"))
    score(tmp_path / "pictures", prompts, tmp_path / "out", networks)
    expected = clip_score.look([rgb], [TEXTS[0]], networks, batch_size=1)
    found = pl.read_parquet(tmp_path / "out" / "pictures" / "m.parquet")
    assert found["aesthetic"][0] == pytest.approx(expected.scores["aesthetic"][0], abs=1e-5)
    assert found["saturation"][0] == pytest.approx(expected.scores["saturation"][0], abs=1e-6)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"prompts\.csv:1: no column 'Prompts', only nothing"),
        (b"index,Prompt\n0,cat\n", r"prompts\.csv:1: no column 'Prompts', only index, Prompt"),
        (
            b"index,Prompts\n0,cat\n1,a dog, sitting\n",
            r"prompts\.csv:3: 3 fields, but the header has 2",
        ),
        (b"index,Prompts\n0,cat\n\n1\n", r"prompts\.csv:4: 1 fields"),
        (b'index,Prompts\n0,"cat\n1,dog\n', r"prompts\.csv:3: no valid CSV"),
        (b"index,Prompts\n0,cat\n1,  \n", r"prompts\.csv:3: column 'Prompts' is empty"),
        (b"index,Prompts\n0,cat\n1,d\xffg\n", r"prompts\.csv:3: not UTF-8"),
        (b"index,Prompts\n", r"prompts\.csv holds no prompt"),
    ],
)
def test_a_broken_line_is_named(content, message, tmp_path):
    path = tmp_path / "prompts.csv"
    path.write_bytes(content)
    with pytest.raises(EvaluationError, match=message):
        external_images.read_prompts(path)


def test_prompts_may_begin_with_a_byte_order_mark_and_hold_line_breaks(tmp_path):
    path = tmp_path / "prompts.csv"
    path.write_bytes(b'\xef\xbb\xbfPrompts\n"a cat\nin a hat"\n\ndog\n')
    assert external_images.read_prompts(path).texts == ["a cat\nin a hat", "dog"]


@pytest.mark.parametrize(
    ("name", "message"),
    [("cat.png", r"cat\.png: its name is no prompt's id, .* number of its name must be that of a row, 0 to 2$"),
     ("3.png", "0 to 2, not 3"), ("00012-1.png", "0 to 2, not 12")],
)  # fmt: skip
def test_a_image_without_its_prompt_is_named_before_anything_is_scored(
    name, message, folder, prompts
):
    draw(folder / "mine" / name)
    with pytest.raises(EvaluationError, match=message):
        external_images.find_models(folder, prompts)


def test_folders_without_images_are_an_error(tmp_path, prompts):
    with pytest.raises(EvaluationError, match="is no folder"):
        external_images.find_models(tmp_path / "gone", prompts)
    (tmp_path / "empty" / "model").mkdir(parents=True)
    with pytest.raises(EvaluationError, match="holds no folder with images"):
        external_images.find_models(tmp_path / "empty", prompts)


def test_the_command_scores_with_the_workspaces_networks(
    folder, tmp_path, clip_folder, aesthetic_folder
):
    from jobs.scoring import score_folder
    from resources.workspace.store import Store

    home = tmp_path / "workspace"
    home.mkdir()
    (home / "foundry.toml").write_text(
        f'format = 1\n[models]\nclip = "{clip_folder}"\naesthetic = "{aesthetic_folder}"\npickscore = "{clip_folder}"\n'
        '[evaluation.scoring]\nscorers = ["pickscore"]\n[decode]\nnum_workers = 1\n'
    )
    csv = tmp_path / "prompts.csv"
    pd.DataFrame({"Prompts": TEXTS}).to_csv(csv, index=False)
    done = list(score_folder(Store(home), folder, csv, tmp_path / "out"))
    assert [(one.name, one.num_failed) for one in done] == [("mine", 0), ("sdxl-1.0", 0)]
    assert "pickscore" in pl.read_parquet(tmp_path / "out" / "pictures" / "mine.parquet").columns
    assert all(one.skipped for one in score_folder(Store(home), folder, csv, tmp_path / "out"))
