"""Pictures that another machine draws are those of this one, and none that was drawn otherwise comes in."""

import json

import pytest
from PIL import Image

from training.errors import DamageError, EvaluationError, ModelError
from training.evaluation import elsewhere, prompt_sets, sampling
from training.evaluation_config import SamplingConfig
from training.models.weights import model_digest

SAMPLING = SamplingConfig(num_steps=2, guidance_scale=4.0, batch_size=2, sampler="euler_a", schedule="karras")
ROWS = [
    {"prompt_id": key, "text": text, "negative": "", "group": "g", "height": 32, "width": 48}
    for key, text in (("a", "red cat"), ("b", "a dog"), ("c", "tree"))
]


@pytest.fixture(scope="module")
def prompts():
    return prompt_sets.make_frame(ROWS)


@pytest.fixture(scope="module")
def away(tmp_path_factory, tiny_sdxl, prompts):
    """A folder as the other machine leaves it."""
    folder = tmp_path_factory.mktemp("away")
    elsewhere.write_prompts(folder / "prompts.json", prompts, SAMPLING)
    elsewhere.draw(tiny_sdxl, folder / "prompts.json", folder / "out", device="cpu")
    return folder


def test_the_prompt_file_carries_prompts_seeds_and_how_they_are_drawn(away, prompts, tmp_path):
    read, sampling_config = elsewhere.read_file(away / "prompts.json")
    assert read.equals(prompts)
    assert sampling_config == SAMPLING
    prompt_sets.write_prompts(tmp_path / "plain.csv", prompts)
    read, sampling_config = elsewhere.read_file(tmp_path / "plain.csv")
    assert read.equals(prompts)
    assert sampling_config == SamplingConfig()


def test_pictures_come_home_as_they_would_have_been_drawn_here(away, tiny_sdxl, prompts, tmp_path):
    record = elsewhere.read_record(away / "out")
    assert record.digest == model_digest(tiny_sdxl)
    assert record.checkpoint == f"base.{record.digest[:8]}@0"
    assert record.prompts == prompt_sets.digest(prompts)
    home = elsewhere.bring_home(away / "out", record, tmp_path / "home")
    here = sampling.sample_folder(tiny_sdxl, record.checkpoint, prompts, SAMPLING, tmp_path / "here")
    assert home.equals(here)
    for file in here["file"]:
        pictures = [Image.open(tmp_path / side / file) for side in ("home", "here")]
        assert pictures[0].tobytes() == pictures[1].tobytes()
        assert pictures[0].text == pictures[1].text


def test_finished_pictures_are_not_drawn_over(away, tiny_sdxl):
    with pytest.raises(EvaluationError, match=r"holds the pictures of base\..* already"):
        elsewhere.draw(tiny_sdxl, away / "prompts.json", away / "out", device="cpu")


def test_what_is_damaged_or_unfinished_stays_out(away, tiny_sdxl, tmp_path):
    elsewhere.draw(tiny_sdxl, away / "prompts.json", tmp_path / "out", device="cpu")
    record = elsewhere.read_record(tmp_path / "out")
    file = tmp_path / "out" / elsewhere.PICTURES / sampling.file_name("b")
    Image.new("RGB", (48, 32)).save(file)
    with pytest.raises(DamageError, match="is not the picture that was drawn for prompt 'b'"):
        elsewhere.bring_home(tmp_path / "out", record, tmp_path / "home")
    file.unlink()
    with pytest.raises(EvaluationError, match="cannot be read"):
        elsewhere.bring_home(tmp_path / "out", record, tmp_path / "home")
    path = tmp_path / "out" / elsewhere.RECORD
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 7}))
    with pytest.raises(DamageError, match="has format 7"):
        elsewhere.read_record(tmp_path / "out")
    path.unlink()
    with pytest.raises(DamageError, match="were not drawn to the end"):
        elsewhere.read_record(tmp_path / "out")


@pytest.mark.parametrize(
    "content", ["{", '{"format": 1}', '{"format": 3}', '{"format": 1, "sampling": {}, "prompts": 1}']
)
def test_a_broken_prompt_file_is_named(tmp_path, content):
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(EvaluationError, match=r"p\.json"):
        elsewhere.read_file(tmp_path / "p.json")


def test_a_missing_model_is_named(away, tmp_path):
    with pytest.raises(EvaluationError, match="is neither a model folder nor"):
        elsewhere.draw(tmp_path / "nothing", away / "prompts.json", tmp_path / "out", device="cpu")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError):
        elsewhere.draw(tmp_path / "empty", away / "prompts.json", tmp_path / "out", device="cpu")
