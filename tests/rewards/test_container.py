"""What the sandbox says under a container's default profile, and that the documented one suffices.

Docker's default seccomp profile (moby's profiles/seccomp/default.json) allows these calls with
CAP_SYS_ADMIN only, which a container has not, and pivot_root never.
"""

from __future__ import annotations

import errno
import platform
import struct
import subprocess
import sys

import pytest

from dsjax.rewards import seccomp

REFUSED = ("unshare", "open_tree", "mount", "umount2", "move_mount", "mount_setattr", "pivot_root")

CAPABILITIES = 0xA80425FB
"""What /proc/self/status says of a container with Docker's default capabilities: 14 of them."""

REWARD = """
import sys
from dsjax.cli import run
from dsjax.rewards.sandbox import CODE, Sandbox

def main():
    with Sandbox([CODE], 1):
        print("isolated")

{before}
run(main)
"""

FILTER = """
import ctypes
code = bytes.fromhex("{code}")
class Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))
libc = ctypes.CDLL(None)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(Program(len(code) // 8, code)), 0, 0) == 0
"""


DROP = """
import ctypes
for capability in range(41):
    if not {kept} >> capability & 1:
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # a user has none to drop
"""


def reward(before: str) -> subprocess.CompletedProcess:
    """Start the sandbox in a process of its own, after `before`."""
    command = [sys.executable, "-c", REWARD.format(before=before)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def profile(refused: tuple[str, ...]) -> bytes:
    """A filter on system calls that answers these with EPERM, and allows all others."""
    column = {"x86_64": 0, "aarch64": 1}[platform.machine()]
    code = [(0x20, 0, 0, 0)]
    for name in refused:
        code += [(0x15, 0, 1, seccomp._CALLS[name][column]), (0x06, 0, 0, 0x50000 | errno.EPERM)]
    code.append((0x06, 0, 0, 0x7FFF0000))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


@pytest.mark.parametrize("first", [0, 1, 2, 6])
def test_what_dockers_default_profile_refuses_is_one_line_with_the_remedy(first: int) -> None:
    done = reward(FILTER.format(code=profile(REFUSED[first:]).hex()))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: the reward 'code': this machine refuses isolation (")
    assert f"({REFUSED[first]}" in done.stderr and "Operation not permitted" in done.stderr
    options = "--security-opt seccomp=unconfined --security-opt apparmor=unconfined"
    assert options in done.stderr and "docs/gpu.md" in done.stderr


def test_dockers_default_capabilities_are_enough_without_its_profile() -> None:
    done = reward(DROP.format(kept=CAPABILITIES))
    assert (done.returncode, done.stdout) == (0, "isolated\n"), done.stderr
