"""The system calls that are refused inside a jail: a filter in the kernel's own small language.

Resource limits are counted per process, so what bounds memory is that there is one process: threads
may be made, processes and programs not. Memory that no limit counts (memfd, System V) is refused,
and so are sockets: AF_VSOCK reaches a virtual machine's host through any network namespace.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import struct

_CALLS = {
    # name: (x86_64, aarch64); None where the architecture has no such call.
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "execveat": (322, 281),
    "socket": (41, 198),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    "kcmp": (312, 272),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsmount": (432, 432),
    "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "personality": (135, 92),
}
_CLONE = (56, 220)
_CLONE3 = (435, 435)
_CLONE_THREAD = 0x10000
_PRCTL = (157, 167)
_PR_SET_PDEATHSIG = 1
_X32 = 0x40000000
"""Marks the second numbering that x86_64 has of all calls."""

_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""The column above, and what the kernel calls it."""

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERROR, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_NUMBER, _ARCH, _ARGUMENT_0 = 0, 4, 16  # where they lie in the kernel's seccomp_data

_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _FILTER = 22, 38, 2


class _Program(ctypes.Structure):
    """The kernel's sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def program(machine: str, network: bool) -> bytes:
    """The filter for `machine`, as `platform.machine()` names it; `network` allows sockets.

    Raises:
        OSError: no table for this architecture.
    """
    if machine not in _ARCHITECTURES:
        raise OSError(errno.ENOSYS, f"seccomp: no table of system calls for {machine}")
    column, architecture = _ARCHITECTURES[machine]
    refused = [
        numbers[column]
        for name, numbers in _CALLS.items()
        if numbers[column] is not None and not (network and name == "socket")
    ]
    no = _ERROR | errno.EPERM
    code = [
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, _X32),
        (_RETURN, 0, 0, no),
    ]
    for number in refused:
        code += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, no)]
    # The flags of clone3 lie in memory, where a filter cannot look: without it libc uses clone.
    code += [(_EQUAL, 0, 1, _CLONE3[column]), (_RETURN, 0, 0, _ERROR | errno.ENOSYS)]
    # Who could unset this signal would survive the process that watches it.
    code += [
        (_EQUAL, 0, 4, _PRCTL[column]),
        (_LOAD, 0, 0, _ARGUMENT_0),
        (_EQUAL, 0, 1, _PR_SET_PDEATHSIG),
        (_RETURN, 0, 0, no),
        (_RETURN, 0, 0, _ALLOW),
    ]
    code += [
        (_EQUAL, 0, 3, _CLONE[column]),
        (_LOAD, 0, 0, _ARGUMENT_0),
        (_ANY_BIT, 1, 0, _CLONE_THREAD),
        (_RETURN, 0, 0, no),
        (_RETURN, 0, 0, _ALLOW),
    ]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


def restrict(network: bool) -> None:
    """Put this thread, and all that it starts, under the filter, for good.

    Raises:
        OSError: the kernel refuses, or the architecture is unknown.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    code = program(platform.machine(), network)
    described = _Program(len(code) // 8, code)
    for step, arguments in (
        ("no_new_privs", (_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)),
        ("seccomp", (_PR_SET_SECCOMP, _FILTER, ctypes.byref(described), 0, 0)),
    ):
        if libc.prctl(*arguments):
            number = ctypes.get_errno()
            raise OSError(number, f"{step}: {errno.errorcode.get(number, number)}")
