"""Deferred modules behave as themselves, only later; and the trainer's imports leave them alone."""

import gc
import importlib
import subprocess
import sys

import pytest

from training.loop import quick_imports


@pytest.fixture
def package(tmp_path, monkeypatch):
    """`package(init, **submodules)`: write a package, defer it, and import one of its
    submodules."""
    made = []

    def write(name, init, functions=(), **submodules):
        folder = tmp_path / name
        folder.mkdir()
        for stem, text in {"__init__": init, **submodules}.items():
            (folder / f"{stem}.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(quick_imports, "DEFERRED", {name: functions})
        made.append(name)
        with quick_imports.quick_imports():
            return importlib.import_module(f"{name}.part")

    yield write
    for name in list(sys.modules):
        if name.partition(".")[0] in made:
            del sys.modules[name]


def test_a_deferred_package_runs_when_it_is_asked_for_something_and_once(package):
    part = package(
        "deferred_a",
        "RUNS = []\nRUNS.append(__name__)\nfrom deferred_a.part import VALUE\n",
        part="VALUE = 7",
    )
    import deferred_a

    assert part.VALUE == 7
    assert "RUNS" not in vars(deferred_a)
    assert deferred_a.part is part
    assert "RUNS" not in vars(deferred_a), "a submodule that was imported is no reason"
    assert deferred_a.VALUE == 7
    assert deferred_a.RUNS == ["deferred_a"]
    from deferred_a import RUNS

    assert RUNS == ["deferred_a"]
    with pytest.raises(AttributeError, match=r"module 'deferred_a' has no attribute 'nothing'"):
        _ = deferred_a.nothing
    assert deferred_a.__spec__.loader.get_filename("deferred_a").endswith("deferred_a/__init__.py")


def test_a_package_that_puts_another_object_in_its_place_is_that_object(package):
    lazy = "import sys, types\nnew = types.ModuleType(__name__)\nnew.WORD = 'lazy'\nnew.__path__ = __path__\n"
    package(
        "deferred_b", lazy + "sys.modules[__name__] = new\n", part="VALUE = 1", other="VALUE = 2"
    )
    import deferred_b as before

    assert before.WORD == "lazy"
    from deferred_b import WORD

    assert WORD == "lazy"
    import deferred_b.other

    assert deferred_b.other.VALUE == 2


def test_a_named_function_can_be_imported_and_runs_the_package_when_it_is_called(package):
    package(
        "deferred_e",
        "def add(a, b=1):\n    return a + b\nOTHER = 3\n",
        functions=("add",),
        part="VALUE = 1",
    )
    from deferred_e import add

    assert "OTHER" not in vars(sys.modules["deferred_e"])
    assert (add(2), add(2, b=5)) == (3, 7)
    from deferred_e import OTHER, add

    assert (OTHER, add.__name__) == (3, "add")


def test_an_error_in_a_deferred_package_reaches_whoever_asked(package):
    package("deferred_c", "raise ValueError('broken')", part="VALUE = 1")
    import deferred_c

    with pytest.raises(ValueError, match="broken"):
        _ = deferred_c.anything


def test_outside_of_the_context_nothing_is_deferred_and_garbage_is_collected(tmp_path, monkeypatch):
    (tmp_path / "deferred_d.py").write_text("VALUE = 3")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(quick_imports, "DEFERRED", {"deferred_d": ()})
    with quick_imports.quick_imports():
        assert not gc.isenabled()
    assert gc.isenabled()
    import deferred_d

    assert vars(deferred_d)["VALUE"] == 3


def test_the_trainer_needs_none_of_what_is_deferred():
    """Or the list would cost time and save none; and what it holds is there for whoever asks."""
    code = """
import sys
from training.loop.quick_imports import DEFERRED, _Deferred, quick_imports
with quick_imports():
    import training.loop.trainer
run = [name for name in DEFERRED if "_loader" not in vars(sys.modules[name])]
assert not run, run
import scipy.optimize, scipy.stats, transformers.models, diffusers.models.unets, diffusers.models.transformers
import diffusers.models.autoencoders
assert scipy.stats.norm.cdf(0) == 0.5
from transformers.loss.loss_for_object_detection import linear_sum_assignment
assert linear_sum_assignment([[2, 1], [1, 2]])[1].tolist() == [1, 0]
assert scipy.optimize.linear_sum_assignment([[2, 1], [1, 2]])[1].tolist() == [1, 0]
assert transformers.models.bert.BertConfig().model_type == "bert"
assert diffusers.models.unets.UNet2DModel is diffusers.UNet2DModel
assert diffusers.models.transformers.DiTTransformer2DModel is diffusers.DiTTransformer2DModel
assert diffusers.models.autoencoders.AutoencoderTiny is diffusers.AutoencoderTiny
from diffusers import EulerDiscreteScheduler
EulerDiscreteScheduler(use_beta_sigmas=True).set_timesteps(4)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
