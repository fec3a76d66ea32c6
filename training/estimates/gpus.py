"""What cards can do at best, by the name that they give themselves: for MFU and for estimates of
time."""

import re
from dataclasses import dataclass

from training.config.run import Precision
from training.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A card's data sheet: dense products with fp32 accumulation, without sparsity."""

    name: str
    """What people call it."""
    pattern: str
    """Regular expression that finds it in the name that the driver reports."""
    half: float
    """Operations per second in fp16 or bf16."""
    single: float
    """In fp32, without TF32."""
    memory_bytes: float
    """Of the usual version."""
    has_bf16: bool = True
    """Whether bf16 runs at that rate."""


# The first that matches decides: narrower patterns stand before wider ones.
# Sources: NVIDIA's data sheets of H100, H200, A100, L40S, L4, A40, RTX 6000 Ada and V100, whose
# figures "with sparsity" are halved; white papers of the GA102 (3090, A6000), AD102 (4090) and
# GB202 (5090) architectures, appendices A.
GPUS = (
    Gpu(name="H200-NVL", pattern=r"\bH200 NVL\b", half=835e12, single=60e12, memory_bytes=150.8e9),
    Gpu(name="H200", pattern=r"\bH200\b", half=989.4e12, single=66.9e12, memory_bytes=150.8e9),
    Gpu(name="H100-PCIE", pattern=r"\bH100 PCIe\b", half=756e12, single=51e12, memory_bytes=85.5e9),
    Gpu(name="H100-NVL", pattern=r"\bH100 NVL\b", half=835e12, single=60e12, memory_bytes=100e9),
    Gpu(name="H100", pattern=r"\bH100\b", half=989.4e12, single=66.9e12, memory_bytes=85.5e9),
    Gpu(name="A100", pattern=r"\bA100\b", half=312e12, single=19.5e12, memory_bytes=85.1e9),
    Gpu(name="L40S", pattern=r"\bL40S\b", half=362e12, single=91.6e12, memory_bytes=47.7e9),
    Gpu(name="L4", pattern=r"\bL4\b", half=121e12, single=30.3e12, memory_bytes=23.7e9),
    Gpu(name="A40", pattern=r"\bA40\b", half=149.7e12, single=37.4e12, memory_bytes=47.7e9),
    Gpu(
        name="6000-ADA",
        pattern=r"\bRTX 6000 Ada\b",
        half=364e12,
        single=91.1e12,
        memory_bytes=50.9e9,
    ),
    Gpu(name="A6000", pattern=r"\bA6000\b", half=154.8e12, single=38.7e12, memory_bytes=50.9e9),
    Gpu(name="5090", pattern=r"\bRTX 5090$", half=209.5e12, single=104.8e12, memory_bytes=34e9),
    Gpu(name="4090", pattern=r"\bRTX 4090$", half=165.2e12, single=82.6e12, memory_bytes=25.4e9),
    Gpu(name="3090", pattern=r"\bRTX 3090$", half=71e12, single=35.6e12, memory_bytes=25.4e9),
    Gpu(
        name="V100",
        pattern=r"\bV100\b",
        half=125e12,
        single=15.7e12,
        memory_bytes=34e9,
        has_bf16=False,
    ),
)


def find_gpu(name: str) -> Gpu:
    """The card that a user names, in either case.

    Raises:
        ConfigError: it is not in the table.
    """
    for gpu in GPUS:
        if gpu.name == name.upper():
            return gpu
    raise ConfigError(
        f"no data sheet of GPU {name!r} is known; there are: {', '.join(gpu.name for gpu in GPUS)}"
    )


def detect_gpu(device_name: str) -> Gpu | None:
    """The card behind a driver's name such as `NVIDIA H100 80GB HBM3`.

    None for one that is not in the table, and for a MIG slice, which is a part of a card.
    """
    if "MIG" in device_name:
        return None
    return next((gpu for gpu in GPUS if re.search(gpu.pattern, device_name)), None)


def peak_flops(gpu: Gpu | None, precision: Precision) -> float | None:
    """Operations per second at best in a run's arithmetic; None where that is not known."""
    if gpu is None or (precision in ("tf32", "bf16", "bf16_amp") and not gpu.has_bf16):
        return None
    if precision == "tf32":
        return gpu.half / 2  # on every card of the table
    return gpu.single if precision == "fp32" else gpu.half
