"""Workers for the engine's tests: they import nothing heavy, and die when they are told to."""

import os
import signal
from pathlib import Path

from training.errors import ModelError


class Closable:
    """Starts nothing."""

    def close(self) -> None:
        """Nothing to end."""


class Squares(Closable):
    """Squares numbers; each worker writes a file when it is made, and one when it is closed."""

    def __init__(self, folder: Path, device: str) -> None:
        self.folder, self.device = folder, device
        (folder / f"made-{os.getpid()}-{len(list(folder.glob('made-*')))}").touch()

    def __call__(self, number: int) -> tuple[int, int]:
        return number, number * number

    def close(self) -> None:
        (self.folder / f"closed-{os.getpid()}").touch()


class Mortal(Squares):
    """Dies by SIGKILL at each number in `deadly`, as often as that says; counted in files."""

    def __init__(self, folder: Path, deadly: dict[int, int], device: str) -> None:
        super().__init__(folder, device)
        self.deadly = deadly

    def __call__(self, number: int) -> tuple[int, int]:
        deaths = len(list(self.folder.glob(f"death-{number}-*")))
        if deaths < self.deadly.get(number, 0):
            (self.folder / f"death-{number}-{deaths}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(number)


class Unmakeable(Closable):
    """Cannot be made: its model is missing."""

    def __init__(self, device: str) -> None:
        raise ModelError("[models] clip: folder /models/clip is missing")


class Stillborn(Closable):
    """Ends its process before it is made."""

    def __init__(self, device: str) -> None:
        os._exit(3)


class Refuses(Closable):
    """Raises for one number."""

    def __init__(self, number: int, device: str) -> None:
        self.number = number

    def __call__(self, number: int) -> int:
        if number == self.number:
            raise RuntimeError(f"CUDA out of memory at {number}")
        return number


class Echo(Closable):
    """Returns what it is given."""

    def __init__(self, device: str) -> None:
        self.device = device

    def __call__(self, data: bytes) -> bytes:
        return data
