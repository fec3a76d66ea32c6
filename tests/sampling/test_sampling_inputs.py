"""Digests of what images follow from move with it, and with nothing else."""

import itertools
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import get_args

import pytest
from tiny_sampling import CONFIG, changed

from assets.sample_images import sample_images
from resources.workspace.store import Store
from training import toml
from training.config.evaluation import (
    LoraConfig,
    PromptEnds,
    PromptSyntax,
    PromptTimes,
    Sampler,
    SamplingConfig,
    SamplingPrecision,
    Schedule,
)
from training.errors import ConfigError
from training.runs import run_folder
from training.sampling.prompt_schedules import parse, schedule, text_at
from training.sampling.sampling_inputs import input_digests, model_folder


def loras(*paths):
    return changed(loras=tuple(LoraConfig(path=path) for path in paths))


def test_nothing_used_is_nothing_digested(unbroken):
    checkpoint = run_folder.checkpoints(unbroken.folder)[-1]
    assert input_digests(checkpoint, CONFIG, checkpoint) == {}


def test_averages_count_where_they_are_drawn_with(unbroken, tiny_sdxl):
    first, *_, last = run_folder.checkpoints(unbroken.folder)
    ema = changed(weights="ema")
    assert model_folder(last, ema) == last / "ema"
    digests = [input_digests(folder, ema, last)["ema"] for folder in (first, last)]
    assert digests[0] != digests[1]
    assert input_digests(tiny_sdxl, ema, tiny_sdxl) == {}
    assert model_folder(tiny_sdxl, ema) == tiny_sdxl


def test_lora_files_count_by_content(tmp_path):
    config = loras("a.safetensors", "sub/b.safetensors")
    assert input_digests(tmp_path, config, tmp_path) == {
        "lora:a.safetensors": "absent", "lora:sub/b.safetensors": "absent",
    }  # fmt: skip
    (tmp_path / "a.safetensors").write_bytes(b"one")
    before = input_digests(tmp_path, config, tmp_path)["lora:a.safetensors"]
    (tmp_path / "a.safetensors").write_bytes(b"two, longer")
    assert input_digests(tmp_path, config, tmp_path)["lora:a.safetensors"] not in (before, "absent")
    (tmp_path / "a.safetensors").write_bytes(b"one")
    assert input_digests(tmp_path, config, tmp_path)["lora:a.safetensors"] == before


def test_the_config_beside_a_file_of_peft_counts(tmp_path):
    config = loras("ink/adapter_model.safetensors")
    assert config.loras[0].name == "ink"
    (tmp_path / "ink").mkdir()
    (tmp_path / "ink" / "adapter_model.safetensors").write_bytes(b"one")
    digests = []
    for alpha in (None, 4, 16):
        if alpha:
            (tmp_path / "ink" / "adapter_config.json").write_text(json.dumps({"lora_alpha": alpha}))
        digests += input_digests(tmp_path, config, tmp_path).values()
    assert len(set(digests)) == 3


def test_the_precision_is_part_of_what_images_follow_from(tmp_path):
    sections = []
    for precision in get_args(SamplingPrecision):
        text = f'format = 1\nsources = []\n[evaluation.sampling]\nprecision = "{precision}"\n'
        (tmp_path / "foundry.toml").write_text(text)
        sections.append(sample_images.section(Store(tmp_path).config, "base"))
    assert all(one != other for one, other in itertools.combinations(sections, 2))
    with pytest.raises(ConfigError, match=r"precision"):
        toml.build(SamplingConfig, {"precision": "fp16"})


def test_how_prompts_are_read_is_part_of_what_images_follow_from(tmp_path):
    sections = []
    for line in ("", 'prompt_syntax = "strict"', 'prompt_times = "old"', 'prompt_ends = "exact"'):
        (tmp_path / "foundry.toml").write_text(
            f"format = 1\nsources = []\n[evaluation.sampling]\n{line}\n"
        )
        sections.append(sample_images.section(Store(tmp_path).config, "base"))
    assert all(one != other for one, other in itertools.combinations(sections, 2))
    for key in ("prompt_syntax", "prompt_times", "prompt_ends"):
        with pytest.raises(ConfigError, match=key):
            toml.build(SamplingConfig, {key: "comfy"})


def test_names_of_loras_must_differ():
    with pytest.raises(ConfigError, match=r"names \['x', 'x'\] must differ"):
        loras("a/x.safetensors", "x.safetensors")


def test_asking_does_not_load_torch():
    modules = "training.sampling.sampling_inputs, training.sampling.schedulers, training.sampling.png_parameters"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_example_of_the_documentation_is_a_configuration():
    page = (Path(__file__).parents[2] / "docs" / "sampling.md").read_text("utf-8")
    values = tomllib.loads(page.split("```toml\n")[1].split("```")[0])["evaluation"]["sampling"]
    config = toml.build(SamplingConfig, values)
    assert (config.sampler, config.loras[0].name, config.second_pass.num_steps) == (
        "dpmpp_3m_sde",
        "ink",
        15,
    )
    choices = (Sampler, Schedule, SamplingPrecision, PromptSyntax, PromptTimes, PromptEnds)
    for name in itertools.chain.from_iterable(map(get_args, choices)):
        assert name in page


def test_the_table_of_the_documentation_is_what_is_drawn():
    """Each row: a prompt, and the calls of 20 that each text has."""
    page = (Path(__file__).parents[2] / "docs" / "sampling.md").read_text("utf-8")
    rows = [
        [cell.strip().strip("`") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in page.splitlines()
        if line.startswith("| `") and " calls" in line
    ]
    assert len(rows) >= 12
    for prompt, shown in rows:
        texts = schedule(parse(prompt.replace("\\|", "|")), 20)
        runs = itertools.groupby(text_at(texts, call, "a1111") for call in range(20))
        counts = [(len(list(members)), text) for text, members in runs]
        drawn = ", ".join(f"{count} call{'s' * (count > 1)} “{text}”" for count, text in counts)
        assert shown.replace("\\|", "|").split(" …")[0] in drawn, prompt
