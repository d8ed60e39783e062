"""A world of its own for a process: namespaces, a root with almost nothing in it, no rights.

By unshare(2), mount(2) and pivot_root(2), called through ctypes: no other program is needed, and
no privilege either, where the kernel lets users make namespaces. Inside there are the interpreter's
libraries, read-only, an empty /scratch of bounded size, and three devices. There is no /proc, no
network, no other process, and no user who owns anything.
"""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import os
import resource
import signal
import sys
import sysconfig
from pathlib import Path
from typing import NoReturn

INSIDE = 1000
"""The user and group inside a jail. Not 0: limits on processes do not bind root."""

NOBODY = 65534
"""Who that is outside, when root makes the jail; for anybody else it is themselves."""

SCRATCH = "/scratch"
_SCRATCH_BYTES = 16 << 20
_SCRATCH_FILES = 1024

_CLONE_NEW = {
    "mnt": 0x00020000,
    "uts": 0x04000000,
    "ipc": 0x08000000,
    "user": 0x10000000,
    "pid": 0x20000000,
    "net": 0x40000000,
}
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 1, 2, 4, 8
_MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 32, 4096, 16384, 1 << 18
_MNT_DETACH = 2
# The same numbers on every architecture; the last one came with Linux 5.12.
_SYS_OPEN_TREE, _SYS_MOVE_MOUNT, _SYS_MOUNT_SETATTR = 428, 429, 442
_AT_FDCWD, _AT_EMPTY_PATH, _AT_RECURSIVE = -100, 0x1000, 0x8000
_OPEN_TREE_CLONE, _MOVE_MOUNT_F_EMPTY_PATH = 1, 4
_PR_SET_PDEATHSIG = 1
_CAPABILITIES_V3 = 0x20080522
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")

_libc = ctypes.CDLL(None, use_errno=True)


@dataclasses.dataclass(frozen=True)
class View:
    """What of the machine can be seen inside: folders to read, folders in them that look empty."""

    folders: tuple[str, ...]
    hidden: tuple[str, ...] = ()
    network: bool = False


def standard_library() -> View:
    """The interpreter and the system's libraries, without any installed package.

    A package may carry a benchmark's solutions.
    """
    base = os.path.realpath(sys.base_prefix)
    paths = sysconfig.get_paths(vars={"base": base, "platbase": base})
    packages = {paths["purelib"], paths["platlib"], *map(str, Path("/usr/lib").glob("python3*/*"))}
    hidden = [path for path in packages if path.endswith("-packages") and os.path.isdir(path)]
    folders = {"/usr/lib", "/lib", "/lib64", f"{base}/lib", paths["stdlib"], paths["platstdlib"]}
    return View(tuple(sorted(filter(os.path.isdir, folders))), tuple(sorted(hidden)))


def installed_packages(*more: str, network: bool = False) -> View:
    """The same with all installed packages, and `more` folders."""
    installed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *more}
    folders = {*standard_library().folders, *filter(os.path.isdir, installed)}
    return View(tuple(sorted(folders)), network=network)


def _call(step: str, *arguments: object, function: str | None = None) -> None:
    """Call a function of libc; its failure names the step."""
    if getattr(_libc, function or step)(*arguments) != 0:
        _fail(step)


def _fail(step: str) -> NoReturn:
    number = ctypes.get_errno()
    raise OSError(number, f"{step}: {os.strerror(number)}")


def unshare(network: bool) -> None:
    """Leave all namespaces for new ones; a child is the first of a new family of processes."""
    if os.geteuid() == 0:
        os.setgroups([])
    flags = sum(_CLONE_NEW[name] for name in _CLONE_NEW if not (network and name == "net"))
    _call("unshare", flags)


def map_user(pid: int) -> None:
    """Say, from outside, who the user INSIDE of process `pid` is: somebody who owns nothing."""
    root = os.geteuid() == 0
    user, group = (NOBODY, NOBODY) if root else (os.geteuid(), os.getegid())
    process = Path("/proc") / str(pid)
    (process / "setgroups").write_text("deny")
    (process / "uid_map").write_text(f"{INSIDE} {user} 1")
    (process / "gid_map").write_text(f"{INSIDE} {group} 1")


def become_nobody() -> None:
    """Be the user that `map_user` made."""
    os.setresgid(INSIDE, INSIDE, INSIDE)
    os.setresuid(INSIDE, INSIDE, INSIDE)


def take(view: View) -> dict[str, int]:
    """Copies of the mounts that `view` shows, by their place.

    Taken before `become_nobody`, who need not be able to walk to them: an interpreter may live in
    somebody's home, of which nothing else is shown then.
    """
    places = [*_apart(view.folders), *_DEVICES]
    return {place: _open_tree(place) for place in places}


def build_root(view: View, taken: dict[str, int]) -> None:
    """Exchange the root folder for one that holds `view` alone; the working folder is SCRATCH."""
    quiet = _MS_NOSUID | _MS_NODEV
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", "/tmp", "tmpfs", quiet, "size=1m,nr_inodes=4096,mode=755")
    os.mkdir("/tmp/old")
    _call("pivot_root", b"/tmp", b"/tmp/old")
    os.chdir("/")
    _call("umount2", b"/old", _MNT_DETACH)
    os.rmdir("/old")
    for place, tree in taken.items():
        _attach(tree, place)
    for link in set(view.folders) - taken.keys():
        if not os.path.exists(link):
            os.symlink(f"usr{link}", link)
    for folder in view.hidden:
        if os.path.isdir(folder):
            _mount("tmpfs", folder, "tmpfs", quiet | _MS_RDONLY, "size=4k,mode=555")
    os.mkdir(SCRATCH)
    size = f"size={_SCRATCH_BYTES},nr_inodes={_SCRATCH_FILES},mode=700"
    _mount("tmpfs", SCRATCH, "tmpfs", quiet | _MS_NOEXEC, size)
    _mount("none", "/", None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | quiet)
    os.chdir(SCRATCH)


def _apart(folders: tuple[str, ...]) -> list[str]:
    """Real folders of which none lies in another: with it, it is shown anyway."""
    real = sorted(folder for folder in folders if not os.path.islink(folder))
    return [folder for folder in real if not any(folder.startswith(f"{other}/") for other in real)]


def _open_tree(place: str) -> int:
    """A copy of what is mounted at a place, and below it, that is mounted nowhere yet."""
    flags = _OPEN_TREE_CLONE | _AT_RECURSIVE
    tree = _libc.syscall(_SYS_OPEN_TREE, _AT_FDCWD, place.encode(), flags)
    if tree < 0:
        _fail(f"open_tree {place}")
    return tree


def _attach(tree: int, place: str) -> None:
    """Mount it there, read-only; a device can be written to all the same."""
    if place in _DEVICES:
        os.makedirs("/dev", exist_ok=True)
        Path(place).touch()
        attributes = _MS_RDONLY | _MS_NOSUID
    else:
        os.makedirs(place, exist_ok=True)
        attributes = _MS_RDONLY | _MS_NOSUID | _MS_NODEV
    wanted = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)
    flags = _AT_EMPTY_PATH | _AT_RECURSIVE
    arguments = (tree, b"", flags, wanted, ctypes.sizeof(wanted))
    _call("mount_setattr", _SYS_MOUNT_SETATTR, *arguments, function="syscall")
    moved = (tree, b"", _AT_FDCWD, place.encode(), _MOVE_MOUNT_F_EMPTY_PATH)
    _call(f"move_mount {place}", _SYS_MOVE_MOUNT, *moved, function="syscall")
    os.close(tree)


def _mount(source: str, target: str, kind: str | None, flags: int, data: str = "") -> None:
    names = (source.encode(), target.encode(), kind and kind.encode())
    _call(f"mount {target}", *names, ctypes.c_ulong(flags), data.encode(), function="mount")


def drop_rights() -> None:
    """Give up every capability that the new user namespace came with."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITIES_V3, 0)
    _call("capset", header, (ctypes.c_uint32 * 6)())


def die_with_parent() -> None:
    """Be killed when the process that made this one ends."""
    _call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one run may use. Time is the processor's; three times as much may pass on the clock."""

    seconds: int
    memory_bytes: int
    output_bytes: int = 1 << 20

    @property
    def wall_seconds(self) -> float:
        """How long it may take, asleep or awake."""
        return 3.0 * self.seconds + 1.0

    def apply(self) -> None:
        """Bind this process, for good."""
        bounds = {
            resource.RLIMIT_CPU: self.seconds,
            resource.RLIMIT_AS: self.memory_bytes,
            resource.RLIMIT_FSIZE: _SCRATCH_BYTES,
            resource.RLIMIT_NOFILE: 64,
            resource.RLIMIT_NPROC: 64,
            resource.RLIMIT_CORE: 0,
            resource.RLIMIT_MEMLOCK: 0,
            resource.RLIMIT_MSGQUEUE: 0,
        }
        for bound, value in bounds.items():
            resource.setrlimit(bound, (value, value))


def why_not(error: OSError) -> str:
    """The failure of a step, in words: which call, and what the kernel said."""
    name = errno.errorcode.get(error.errno or 0, "")
    return error.strerror if error.strerror and ":" in error.strerror else f"{error} {name}".strip()
