"""Faults of the surroundings: network, clock, tracker, numbers."""

import glob
import os
import shutil
import subprocess
import time
from pathlib import Path

from benchmarks.faults.trial import Trial

LINK_DOWN_S = 20
CLOCK_JUMP_S = 3600
FAKETIME = "/usr/lib/*/faketime/libfaketimeMT.so.1"
NAMESPACES = (f"pali-a-{os.getpid()}", f"pali-b-{os.getpid()}")
ADDRESSES, LINKS = ("10.77.7.1", "10.77.7.2"), ("pali-va", "pali-vb")


def wait_for_nan(trial: Trial) -> None:
    """Wait until the job logs the NaN that `benchmarks.faults.nan_job` puts into a gradient."""
    trial.job.until(lambda: trial.job.logged("gradient is not finite"))
    trial.strikes()


def close_wandb(trial: Trial) -> None:
    """Point wandb at an address without a server."""
    trial.job.environment = {"WANDB_MODE": "online", "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40}


def make_two_networks(trial: Trial) -> None:
    """Make two network namespaces joined by one cable, a node in each."""
    for name in NAMESPACES:
        _ip("netns", "add", name)
        trial.undo.callback(_ip, "netns", "delete", name)
    ends = [f"netns {name} type veth".split() for name in NAMESPACES]
    _ip("link", "add", LINKS[0], *ends[0], "peer", "name", LINKS[1], *ends[1][:2])
    for name, address, link in zip(NAMESPACES, ADDRESSES, LINKS, strict=True):
        _ip("-n", name, "address", "add", f"{address}/24", "dev", link)
        _ip("-n", name, "link", "set", link, "up")
        _ip("-n", name, "link", "set", "lo", "up")
    named = [f"GLOO_SOCKET_IFNAME={link}" for link in LINKS]
    trial.job.prefixes = [("ip", "netns", "exec", ns, "env", name) for ns, name in zip(NAMESPACES, named, strict=True)]
    trial.job.address = ADDRESSES[0]


def pull_cable(trial: Trial) -> None:
    """Take the link down for LINK_DOWN_S seconds."""
    trial.strikes()
    _ip("-n", NAMESPACES[0], "link", "set", LINKS[0], "down")
    time.sleep(LINK_DOWN_S)
    trial.step = trial.job.step()
    _ip("-n", NAMESPACES[0], "link", "set", LINKS[0], "up")


def fake_clock(trial: Trial) -> None:
    """Preload libfaketime, with its offset in a file that the trial writes."""
    offset = trial.job.folder.parent / "clock"
    offset.parent.mkdir(parents=True, exist_ok=True)
    offset.write_text("+0\n", encoding="utf-8")
    sleep = offset.with_name("real_sleep.so")
    source = Path(__file__).with_name("real_sleep.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(sleep), str(source)], check=True)
    trial.job.environment = {
        "LD_PRELOAD": f"{sleep}:{glob.glob(FAKETIME)[0]}", "FAKETIME_TIMESTAMP_FILE": str(offset),
        "FAKETIME_NO_CACHE": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }  # fmt: skip


def move_clock(trial: Trial) -> None:
    """Move the clock an hour ahead, and two back after two steps."""
    trial.strikes()
    (trial.job.folder.parent / "clock").write_text(f"+{CLOCK_JUMP_S}\n", encoding="utf-8")
    trial.job.until_step(trial.step + 2)
    (trial.job.folder.parent / "clock").write_text(f"-{CLOCK_JUMP_S}\n", encoding="utf-8")


def needs_root() -> str | None:
    """Return why network namespaces cannot be made here, or None."""
    return None if os.geteuid() == 0 and shutil.which("ip") else "root and iproute2 are needed"


def needs_faketime() -> str | None:
    """Return why the clock cannot be moved here, or None."""
    found = glob.glob(FAKETIME) and shutil.which("cc")
    return None if found else "libfaketime and a C compiler are needed (apt-get install libfaketime gcc)"


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)
