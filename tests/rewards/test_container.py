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
{before}
from dsjax.cli import run
from dsjax.rewards.sandbox import CODE, Sandbox

def main():
    with Sandbox([CODE], 1):
        print("isolated")

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


COLUMN = {"x86_64": 0, "aarch64": 1}[platform.machine()]


def profile(calls: list[int], answer: int) -> str:
    """A filter on system calls that answers these with an error, or 0, and allows all others."""
    code = [(0x20, 0, 0, 0)]
    for number in calls:
        code += [(0x15, 0, 1, number), (0x06, 0, 0, 0x50000 | answer)]
    code.append((0x06, 0, 0, 0x7FFF0000))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code).hex()


@pytest.mark.parametrize("first", [0, 1, 2, 6])
def test_what_dockers_default_profile_refuses_is_one_line_with_the_remedy(first: int) -> None:
    numbers = [int(seccomp._CALLS[name][COLUMN] or 0) for name in REFUSED[first:]]
    done = reward(FILTER.format(code=profile(numbers, errno.EPERM)))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: the reward 'code': this machine refuses isolation (")
    assert f"({REFUSED[first]}" in done.stderr and "Operation not permitted" in done.stderr
    options = "--security-opt seccomp=unconfined --security-opt apparmor=unconfined"
    assert options in done.stderr and "docs/gpu.md" in done.stderr


def test_dockers_default_capabilities_are_enough_without_its_profile() -> None:
    done = reward(DROP.format(kept=CAPABILITIES))
    assert (done.returncode, done.stdout) == (0, "isolated\n"), done.stderr


USER_NAMESPACE = """
import ctypes, os
uid, gid = os.geteuid(), os.getegid()
assert ctypes.CDLL(None).unshare(0x10020000) == 0
for file, text in ("setgroups", "deny"), ("uid_map", f"ROOT {uid} 1"), ("gid_map", f"ROOT {gid} 1"):
    open(f"/proc/self/{file}", "w").write(text)
"""

FAKED = [(117, 147), (119, 149), (116, 159)]
"""setresuid, setresgid and setgroups, which enroot's filter answers with success."""


@pytest.mark.parametrize("user", ["0", "{uid}"], ids=["remapped to root", "as oneself"])
def test_enroots_container_needs_no_option(user: str) -> None:
    """It is made of user namespaces; its own filter only fakes changes of the user."""
    before = USER_NAMESPACE.replace("ROOT", user)
    before += FILTER.format(code=profile([numbers[COLUMN] for numbers in FAKED], 0))
    done = reward(before)
    assert (done.returncode, done.stdout) == (0, "isolated\n"), done.stderr
