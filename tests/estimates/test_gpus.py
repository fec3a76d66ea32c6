"""Which data sheet belongs to which name."""

import pytest

from training.errors import ConfigError
from training.estimates.gpus import detect_gpu, find_gpu, peak_flops


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("NVIDIA H200", "H200"), ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H100 PCIe", "H100-PCIE"),
        ("NVIDIA H100 NVL", "H100-NVL"), ("NVIDIA A100-SXM4-80GB", "A100"), ("NVIDIA GeForce RTX 4090", "4090"),
        ("NVIDIA GeForce RTX 3090", "3090"), ("NVIDIA L40S", "L40S"), ("NVIDIA L4", "L4"),
        ("Tesla V100-SXM2-32GB", "V100"), ("NVIDIA RTX A6000", "A6000"),
    ],
)  # fmt: skip
def test_cards_are_found_by_the_drivers_names(reported, name):
    assert detect_gpu(reported) == find_gpu(name.lower())


@pytest.mark.parametrize(
    "reported",
    [
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA RTX A1000",
        "NVIDIA L40",
        "NVIDIA GeForce RTX 4090 D",
        "AMD MI300X",
    ],
)
def test_what_only_resembles_a_card_has_no_data_sheet(reported):
    assert detect_gpu(reported) is None
    assert peak_flops(detect_gpu(reported), "bf16") is None


def test_peaks_follow_the_precision():
    assert peak_flops(find_gpu("H200"), "bf16") == 989.4e12
    assert peak_flops(find_gpu("H200"), "fp32") == 66.9e12
    assert peak_flops(find_gpu("V100"), "fp16_amp") == 125e12
    assert peak_flops(find_gpu("V100"), "bf16_amp") is None


def test_an_unknown_card_is_named_with_those_that_are_known():
    with pytest.raises(ConfigError, match=r"'TPU'.*H200"):
        find_gpu("TPU")
