"""Imports the libraries of a training process in two thirds of the time: what a run does not use is
not executed.

diffusers and transformers execute whole families of models on the way to one of them. A deferred
module is there under its name, and its submodules can be imported, but its own code runs when
somebody first asks it for something: whatever needs it finds it, only later.
"""

import contextlib
import functools
import gc
import importlib.abc
import importlib.machinery
import sys
import threading
import types
from collections.abc import Iterator, Sequence
from typing import Any

DEFERRED: dict[str, tuple[str, ...]] = {
    "diffusers.models.autoencoders": (),  # every autoencoder; the submodule of AutoencoderKL is asked for directly
    "diffusers.models.transformers": (),  # every diffusion transformer, for the one that dual attention could have
    "diffusers.models.unets": (),
    "scipy.integrate": (),  # for the LMS sampler
    "scipy.optimize": ("linear_sum_assignment",),  # for losses of detectors
    "scipy.stats": (),  # for samplers with beta schedules
    "transformers.models": (),  # reads the source of all 400 models to list their classes
}
"""Modules of which neither the trainer nor what it uses of the libraries calls anything; and
functions of theirs that are imported by name all the same, which run the module when they are
called."""

_lock = threading.RLock()


@contextlib.contextmanager
def quick_imports(*, freeze: bool = False) -> Iterator[None]:
    """Imports inside of the context defer the modules above and are not interrupted by the garbage
    collector.

    Args:
        freeze: Never look for garbage among what was imported, which is half a second each time;
            for a process of which that is the beginning.
    """
    finder = _Finder()
    was_enabled = gc.isenabled()
    sys.meta_path.insert(0, finder)
    gc.disable()  # it would look through all that was imported so far again and again, and find nothing
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        if freeze:
            gc.freeze()
        if was_enabled:
            gc.enable()


class _Deferred(types.ModuleType):
    """A module whose code has not run yet."""

    def __getattr__(self, name: str) -> Any:
        """Asked for what is not there: run the module's code, once."""
        if name in DEFERRED.get(self.__name__, ()) and "_loader" in self.__dict__:
            return functools.partial(self._call, name)
        return self._run(name)

    def _call(self, name: str, /, *arguments: Any, **keywords: Any) -> Any:
        return self._run(name)(*arguments, **keywords)

    def _run(self, name: str) -> Any:
        with _lock:
            if (loader := self.__dict__.pop("_loader", None)) is not None:
                loader.exec_module(self)
        # Lazy packages put another object in their place.
        module = sys.modules.get(self.__name__, self)
        if module is not self:
            return getattr(module, name)
        return types.ModuleType.__getattribute__(self, name)


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Deferred(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        module.__dict__["_loader"] = self._loader


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in DEFERRED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec
