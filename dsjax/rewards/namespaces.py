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
import stat
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
_SYS_PIDFD_OPEN = 434
_SYS_OPEN_TREE, _SYS_MOVE_MOUNT, _SYS_MOUNT_SETATTR = 428, 429, 442
_AT_FDCWD, _AT_EMPTY_PATH, _AT_RECURSIVE = -100, 0x1000, 0x8000
_OPEN_TREE_CLONE, _MOVE_MOUNT_F_EMPTY_PATH = 1, 4
_PR_SET_PDEATHSIG = 1
_CAPABILITIES_V3 = 0x20080522
_LIBRARIES = ("/usr/lib", "/usr/lib64", "/lib", "/lib64")
_NAMES = ("/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf", "/etc/ssl")
"""What turns a machine's name into an address, and certificates."""
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")

_libc = ctypes.CDLL(None, use_errno=True)


@dataclasses.dataclass(frozen=True)
class View:
    """What of the machine can be seen inside: places to read, folders in them that look empty."""

    places: tuple[str, ...]
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
    places = {*_LIBRARIES, f"{base}/lib", paths["stdlib"], paths["platstdlib"]}
    return View(tuple(sorted(filter(os.path.isdir, places))), tuple(sorted(hidden)))


def installed_packages(*more: str, network: bool = False) -> View:
    """The same with all installed packages, and `more` folders; with what finds other machines."""
    installed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *more}
    names = _NAMES if network else ()
    places = {*standard_library().places, *filter(os.path.exists, (*installed, *names))}
    return View(tuple(sorted(places)), network=network)


def _call(step: str, *arguments: object, function: str | None = None) -> None:
    """Call a function of libc; its failure names the step."""
    if getattr(_libc, function or step)(*arguments) != 0:
        _fail(step)


def _fail(step: str) -> NoReturn:
    number = ctypes.get_errno()
    raise OSError(number, f"{step}: {os.strerror(number)}")


def unshare(network: bool) -> None:
    """Leave all namespaces for new ones; a child is the first of a new family of processes."""
    if os.geteuid() == 0 and Path("/proc/self/setgroups").read_text() == "allow\n":
        os.setgroups([])
    flags = sum(_CLONE_NEW[name] for name in _CLONE_NEW if not (network and name == "net"))
    _call("unshare", flags)


def map_user(pid: int) -> None:
    """Say, from outside, who the user INSIDE of process `pid` is: somebody who owns nothing."""
    process = Path("/proc") / str(pid)
    (process / "setgroups").write_text("deny")
    for file, ourselves in (("uid_map", os.geteuid()), ("gid_map", os.getegid())):
        maps = Path(f"/proc/self/{file}").read_text().splitlines()
        known = any(
            int(first) <= NOBODY < int(first) + int(n) for first, _, n in map(str.split, maps)
        )
        outside = NOBODY if os.geteuid() == 0 and known else ourselves
        (process / file).write_text(f"{INSIDE} {outside} 1")


def become_nobody() -> None:
    """Be the user that `map_user` made."""
    os.setresgid(INSIDE, INSIDE, INSIDE)
    os.setresuid(INSIDE, INSIDE, INSIDE)


def take(view: View) -> dict[str, int | str]:
    """What `view` shows, by its place: copies of mounts, and links to what is shown elsewhere.

    Taken before `become_nobody`, who need not be able to walk to them: an interpreter may live in
    somebody's home, of which nothing else is shown then.
    """
    taken: dict[str, int | str] = {}
    places = [*view.places, *_DEVICES]
    shown = {place for place in places if not os.path.islink(place)}
    for place in places:
        real = os.path.realpath(place)
        if place not in shown and _is_shown(real, shown):
            taken[place] = real
        elif not _is_shown(os.path.dirname(place), shown):
            taken[place] = _open_tree(place)
    return taken


def _is_shown(place: str, shown: set[str]) -> bool:
    """Whether it is one of the places, or lies in one."""
    return any(place == other or place.startswith(f"{other}/") for other in shown)


def build_root(view: View, taken: dict[str, int | str]) -> None:
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
        os.makedirs(os.path.dirname(place), exist_ok=True)
        if isinstance(tree, str):
            os.symlink(tree, place)
        else:
            _attach(tree, place)
    for folder in view.hidden:
        if os.path.isdir(folder):
            _mount("tmpfs", folder, "tmpfs", quiet | _MS_RDONLY, "size=4k,mode=555")
    os.mkdir(SCRATCH)
    size = f"size={_SCRATCH_BYTES},nr_inodes={_SCRATCH_FILES},mode=700"
    _mount("tmpfs", SCRATCH, "tmpfs", quiet | _MS_NOEXEC, size)
    _mount("none", "/", None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | quiet)
    os.chdir(SCRATCH)


def _open_tree(place: str) -> int:
    """A copy of what is mounted at a place, and below it, that is mounted nowhere yet."""
    flags = _OPEN_TREE_CLONE | _AT_RECURSIVE
    tree = _libc.syscall(_SYS_OPEN_TREE, _AT_FDCWD, place.encode(), flags)
    if tree < 0:
        _fail(f"open_tree {place}")
    return tree


def _attach(tree: int, place: str) -> None:
    """Mount it there, read-only; a device can be written to all the same."""
    if stat.S_ISDIR(os.fstat(tree).st_mode):
        os.mkdir(place)
    else:
        Path(place).touch()
    attributes = _MS_RDONLY | _MS_NOSUID | (0 if place in _DEVICES else _MS_NODEV)
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


def open_process(pid: int) -> int:
    """A descriptor that can be read from once the process ended.

    `os.pidfd_open` is missing where Python was built on an old system.
    """
    descriptor = _libc.syscall(_SYS_PIDFD_OPEN, pid, 0)
    if descriptor < 0:
        _fail("pidfd_open")
    return descriptor


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
            _, most = resource.getrlimit(bound)
            value = value if most == resource.RLIM_INFINITY else min(value, most)
            resource.setrlimit(bound, (value, value))


def why_not(error: OSError) -> str:
    """The failure of a step, in words: which call, and what the kernel said."""
    name = errno.errorcode.get(error.errno or 0, "")
    return error.strerror if error.strerror and ":" in error.strerror else f"{error} {name}".strip()
