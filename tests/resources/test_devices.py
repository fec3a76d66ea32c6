"""A card has one holder at a time, also when a holder is killed; without cards nothing waits."""

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from resources import devices
from resources.devices import hold
from training.config.workspace import DevicesConfig
from training.errors import ConfigError

HOLDER = """
import sys, time
from pathlib import Path
from resources import devices
from training.config.workspace import DevicesConfig
devices.visible_cards = lambda: ["0"]
with devices.hold("annotate", DevicesConfig(), Path("/data/cats")) as name:
    print(name, flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(devices, "POLL_S", 0.02)


def cards(monkeypatch, *names):
    monkeypatch.setattr(devices, "visible_cards", lambda: list(names))


def test_without_a_card_the_answer_is_cpu_and_torch_stays_out():
    code = (
        "import sys; from pathlib import Path; from resources.devices import hold, visible_cards\n"
        "from training.config.workspace import DevicesConfig\n"
        "if visible_cards(): sys.exit()\n"
        "config, home = DevicesConfig(train=(3,)), Path('.')\n"
        "with hold('train', config, home) as one, hold('train', config, home) as two:\n"
        "    assert (one, two) == ('cpu', 'cpu')\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_killed_holder_frees_its_card_and_the_waiter_says_for_whom(monkeypatch):
    cards(monkeypatch, "0")
    holder = subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "cuda:0\n"
    said: list[str] = []
    held = threading.Event()

    def wait() -> None:
        with hold("encode", DevicesConfig(), Path("/data/dogs"), say=said.append) as name:
            assert name == "cuda:0"
            held.set()

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.3)
    assert not held.is_set()
    assert len(said) == 1, "it says so once, not at every look"
    assert said[0].startswith(
        f"encode waits: cuda:0 is held by annotate of /data/cats (pid {holder.pid} since "
    )
    os.kill(holder.pid, signal.SIGKILL)
    assert held.wait(10)
    thread.join()
    holder.communicate()


def test_each_gets_a_card_of_its_own_while_there_are_some(monkeypatch):
    cards(monkeypatch, "0", "1")
    with (
        hold("train", DevicesConfig(), Path("a")) as one,
        hold("train", DevicesConfig(), Path("b")) as two,
    ):
        assert [one, two] == ["cuda:0", "cuda:1"]
    with hold("train", DevicesConfig(), Path("a")) as again:
        assert again == "cuda:0"


def test_an_error_inside_frees_the_card(monkeypatch):
    cards(monkeypatch, "0")
    with pytest.raises(ZeroDivisionError), hold("train", DevicesConfig(), Path("a")):
        raise ZeroDivisionError
    with hold("train", DevicesConfig(), Path("a"), say=pytest.fail) as name:
        assert name == "cuda:0"


def test_the_configuration_says_who_may_hold_which_card(monkeypatch):
    cards(monkeypatch, "0", "1", "2")
    config = DevicesConfig(train=(0, 2), encode=(1,), evaluate=(7,))
    with hold("train", config, Path("a")) as one, hold("train", config, Path("a")) as two:
        assert [one, two] == ["cuda:0", "cuda:2"]
        with hold("encode", config, Path("a"), say=pytest.fail) as three:
            assert three == "cuda:1"
    with pytest.raises(
        ConfigError, match=r"\[devices\] evaluate = \[7\] .* cards \['0', '1', '2'\]"
    ):
        hold("evaluate", config, Path("a")).__enter__()


def test_locks_follow_the_card_and_not_its_place_in_cuda_visible_devices(monkeypatch):
    cards(monkeypatch, "3")
    with hold("train", DevicesConfig(train=(3,)), Path("a")) as name:
        assert name == "cuda:0"
        assert [path.name for path in devices.state_folder().iterdir()] == ["cuda3.lock"]


def test_a_trainer_holds_its_cards_after_its_starter_is_gone(monkeypatch, tmp_path):
    cards(monkeypatch, "0", "1", "2")
    with devices.hold_for_trainer(DevicesConfig(), tmp_path, 2) as (held, locks):
        assert held == ["0", "1"]
        child = subprocess.Popen(
            [sys.executable, "-c", "import time; time.sleep(60)"], pass_fds=locks
        )
    with hold("annotate", DevicesConfig(), tmp_path) as name:
        assert name == "cuda:2"
    child.kill()
    child.wait()
    with hold("annotate", DevicesConfig(), tmp_path) as name:
        assert name == "cuda:0"


def test_more_ranks_than_cards_is_refused(monkeypatch, tmp_path):
    cards(monkeypatch, "0", "1", "2")
    with pytest.raises(ConfigError, match=r"num_processes=3, but \[devices\] train allows 2 cards"):
        devices.hold_for_trainer(DevicesConfig(train=(1, 2)), tmp_path, 3).__enter__()


def test_work_that_gives_way_takes_no_card_that_another_waits_for(monkeypatch):
    cards(monkeypatch, "0")
    home, order, begun = Path("/data/cats"), [], threading.Event()

    def first() -> None:
        with hold("annotate", DevicesConfig(), home):
            begun.set()
            time.sleep(0.3)

    def reencode() -> None:
        with hold("encode", DevicesConfig(), home, gives_way=True, say=said.append):
            order.append("encode")

    def train() -> None:
        with hold("train", DevicesConfig(), home, say=lambda line: None):
            order.append("train")
            time.sleep(0.3)

    said: list[str] = []
    threads = [threading.Thread(target=work) for work in (first, reencode, train)]
    threads[0].start()
    begun.wait(5)
    threads[1].start()  # waits longer, and still goes last
    time.sleep(0.1)
    threads[2].start()
    for thread in threads:
        thread.join(10)
    assert order == ["train", "encode"]
    assert any("held by annotate of /data/cats" in line for line in said)
    with hold("encode", DevicesConfig(), home, gives_way=True):
        pass  # no one waits any more


def test_a_waiter_that_was_killed_is_waited_for_no_longer(monkeypatch):
    cards(monkeypatch, "0")
    command = [sys.executable, "-u", "-c", HOLDER]
    with (
        hold("train", DevicesConfig(), Path("/data/cats")),
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as waiter,
    ):
        assert "annotate waits" in waiter.stdout.readline()
        assert devices._is_wanted(devices.state_folder(), "0")
        waiter.kill()
    with hold("encode", DevicesConfig(), Path("/data/cats"), gives_way=True) as name:
        assert name == "cuda:0"


def test_all_cards_that_are_free_and_that_nobody_waits_for_are_taken(monkeypatch):
    cards(monkeypatch, "0", "1", "2", "3")
    config, home = DevicesConfig(annotate=(1, 2, 3)), Path("/data/dogs")
    with devices.hold_all("annotate", config, home) as held:
        assert held == ("cuda:1", "cuda:2", "cuda:3")
        assert not devices.are_wanted("annotate", config, held)
    with (
        hold("train", DevicesConfig(train=(2,)), home),
        devices.hold_all("annotate", config, home) as held,
    ):
        assert held == ("cuda:1", "cuda:3")
    folder = devices.state_folder()
    with (folder / "cuda3.waiting").open("a") as flag:
        fcntl.flock(flag, fcntl.LOCK_SH)
        assert devices.are_wanted("annotate", config, ["cuda:3"])
        with devices.hold_all("annotate", config, home) as held:
            assert held == ("cuda:1", "cuda:2"), "a waiter gets what comes free"
    with devices.hold_all("annotate", config, home) as held:
        assert held == ("cuda:1", "cuda:2", "cuda:3"), "all were given back"
