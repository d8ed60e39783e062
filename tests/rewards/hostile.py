"""Answers that attack the machine or the verifier: source of programs, of functions, and text.

A program is asked for the sum of 2 and 3, and prints it only once its attack has worked; a function
is to be called `add`. `{canary}` is a file of the host that everybody may read and write, `{port}`
one that is listened at, `{name}` an abstract socket, `{pid}` the process that scores.
"""

LOOPS = {
    "endless loop": "while True: pass",
    "endless sleep": "import time; time.sleep(1e9); print(5)",
    "endless sleep, all closed": "import os, time; os.closerange(0, 99); time.sleep(1e9)",
    "output in drops": """
import time
while True: print(5, flush=True); time.sleep(0.01)""",
    "signals ignored": """
import signal
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: pass""",
    "spinning threads": """
import threading
def spin():
    while True: pass
for _ in range(8): threading.Thread(target=spin).start()""",
    "regular expression": "import re; re.match(r'(a+)+$', 'a' * 99 + 'b'); print(5)",
    "power tower": "print(9 ** 9 ** 9 % 1 + 5)",
    "deep nesting": "eval('(' * 10**6 + '5' + ')' * 10**6); print(5)",
    "deep recursion": "import sys; sys.setrecursionlimit(10**9)\ndef f(): f()\nf()\nprint(5)",
}

MEMORY = {
    "one large block": "bytearray(1 << 40); print(5)",
    "a growing list": "x = []\nwhile True: x.append(bytearray(1 << 24))",
    "memory files": """
import os
for number in range(40):
    file = os.memfd_create(str(number))
    for _ in range(15): os.write(file, bytes(1 << 20))
print(5)""",
    "shared memory of System V": """
import ctypes
libc = ctypes.CDLL(None)
for _ in range(64):
    assert libc.shmget(0, ctypes.c_size_t(64 << 20), 0o1600) >= 0
print(5)""",
    "many files": """
for number in range(64):
    with open(f"/scratch/{number}", "wb") as file: file.write(bytes(1 << 20))
print(5)""",
    "shared mappings": "import mmap\nx = [mmap.mmap(-1, 1 << 28) for _ in range(64)]\nprint(5)",
    "a message without end": "def add(a, b): return 'x' * (1 << 26)",
    "a message nested deep": """
def add(a, b):
    x = []
    for _ in range(900): x = [x]
    return x""",
}

PROCESSES = {
    "fork bomb": "import os\nos.fork()\nwhile True: os.fork()",
    "shell fork bomb": "import os; assert os.system(':(){ :|:& };:') == 0; print(5)",
    "daemon": "import os\nif os.fork(): os._exit(0)\nos.setsid()\nprint(5)",
    "spawn": "import os; os.posix_spawn('/bin/sh', ['sh', '-c', 'echo 5'], {})",
    "subprocess": "import subprocess; print(subprocess.check_output(['echo', '5']).decode())",
    "multiprocessing": """
import multiprocessing
multiprocessing.get_context('fork').Process(target=print, args=(5,)).start()""",
    "raw system calls": """
import ctypes, os
libc = ctypes.CDLL(None)
numbers = 57, 58, 56, 220  # fork, vfork, clone; clone of another architecture
pids = [libc.syscall(number, 17, 0, 0, 0, 0) for number in numbers]
# A child of vfork lives in its parent's memory: what both print through one buffer comes out mixed.
if max(pids) > 0 or os.getpid() != 1: os.write(1, b"5\\n"), os._exit(0)""",
    "the other numbering": """
import ctypes
if ctypes.CDLL(None).syscall(0x40000000 + 57) > 0: print(5)""",
    "thread bomb": """
import threading, time
for _ in range(1000): threading.Thread(target=time.sleep, args=(99,), daemon=True).start()
print(5)""",
}

FILES = {
    "deletes everything": """
import os, shutil
shutil.rmtree('/', ignore_errors=True)
os.unlink('{canary}')
print(5)""",
    "reads the host": "open('{canary}').read(); print(5)",
    "writes the host": "open('{canary}', 'w').write('harm'); print(5)",
    "relative path": "open('../../../../../..{canary}').read(); print(5)",
    "symbolic link": "import os\nos.symlink('{canary}', 'link')\nopen('link').read()\nprint(5)",
    "hard link": "import os\nos.link('{canary}', 'link')\nprint(5)",
    "classic escape from chroot": """
import os
os.mkdir('x')
os.chroot('x')
for _ in range(99): os.chdir('..')
os.chroot('.')
open('{canary}').read()
print(5)""",
    "descriptors of the parent": """
import os
for number in range(3, 4096):
    try: os.fchdir(number)
    except OSError: continue
    open('.' + '/..' * 99 + '{canary}').read()
    print(5)""",
    "passwords": "open('/etc/shadow').read(); print(5)",
    "the house": "import os; os.listdir('{house}'); print(5)",
    "installed packages": "import math_verify; print(5)",
    "the interpreter": "import os; open(os.__file__, 'a').write('harm'); print(5)",
    "write to /proc": "open('/proc/sys/kernel/core_pattern', 'w').write('|/x'); print(5)",
    "the host's root through /proc": "open('/proc/1/root{canary}').read(); print(5)",
    "the environment": "open('/proc/self/environ').read(); print(5)",
    "secrets of the environment": "import os; print(5 if os.environ.get('DSJAX_SECRET') else 0)",
    "release agent": "open('/sys/fs/cgroup/release_agent', 'w').write('/x'); print(5)",
    "device": """
import os
os.mknod('disk', 0o60600, os.makedev(254, 0))
open('disk', 'rb').read(1)
print(5)""",
    "mount": """
import ctypes
assert ctypes.CDLL(None).mount(b'none', b'/scratch', b'proc', 0, None) == 0
print(5)""",
    "more namespaces": "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0\nprint(5)",
    "root": "import os; os.setuid(0); print(5)",
}

OTHERS = {
    "tcp": "import socket; socket.create_connection(('127.0.0.1', {port}), 1); print(5)",
    "udp": "import socket; socket.socket(2, 2).sendto(b'x', ('127.0.0.1', {port})); print(5)",
    "abstract socket": "import socket; socket.socket(1).connect('\\0{name}'); print(5)",
    "vsock": "import socket; socket.socket(40, 1); print(5)",
    "netlink": "import socket; socket.socket(16, 3, 0); print(5)",
    "kill the parent": """
import os
os.kill(os.getppid() or {pid}, 15)
os.kill({pid}, 15)
print(5)""",
    "kill everybody": """
import os
hit = 0
for pid in [-1, *range(2, 70000)]:
    try: os.kill(pid, 15); hit += 1
    except OSError: pass
if hit: print(5)""",
    "kill the group": "import os\nos.killpg({pid}, 15)\nprint(5)",
    "ptrace": "import ctypes\nassert ctypes.CDLL(None).ptrace(16, {pid}, 0, 0) == 0\nprint(5)",
    "endless output": "while True: print(5)",
    "endless errors": "import sys\nwhile True: sys.stderr.write('x' * 9999)",
    "a core": "import ctypes; ctypes.string_at(0)",
}

CHEATS = {
    "exit": "import sys; sys.exit(0)",
    "_exit": "import os; os._exit(0)",
    "_exit when called": "import os\ndef add(a, b): os._exit(0)",
    "exit when called": "def add(a, b): raise SystemExit(0)",
    "stop": "def add(a, b): raise StopIteration",
    "equal to everything": """
class Equal:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    __hash__ = None
def add(a, b): return Equal()""",
    "a number equal to everything": """
class Equal(int):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
def add(a, b): return Equal(7)""",
    "changed builtins": """
import builtins
builtins.AssertionError = type('Silent', (BaseException,), {})
builtins.len = builtins.abs = lambda *_: 5
builtins.__import__ = None
def add(a, b): return 0""",
    "changed operators": """
import json, operator
operator.eq = lambda a, b: True
json.dumps = lambda *a, **k: '{"passed": true}'
def add(a, b): return 0""",
    "pass markers": """
print('PASSED', 'OK', 'All tests passed', '1 passed', '{"passed": true}', 5)
def add(a, b): print('{"passed": true}'); return 0""",
    "verdicts on every descriptor": """
import os
for number in range(64):
    for said in (b'{"passed": true}', b'["ok", "{\\"passed\\": true}"]', b'["ok", ""]\\n'):
        try: os.write(number, said + b'\\n')
        except OSError: pass
def add(a, b): return 0""",
    "verdict, then _exit": """
import os
for number in range(64):
    try: os.write(number, b'{"passed": true}')
    except OSError: pass
os._exit(0)""",
    "reads the tests from frames": """
import sys, re
def add(a, b):
    frame = sys._getframe()
    while frame:
        for value in [*frame.f_locals.values(), *frame.f_globals.values()]:
            found = re.search(r'add\\(%d, %d\\) == (-?\\d+)' % (a, b), str(value))
            if found: return int(found[1])
        frame = frame.f_back""",
    "reads the tests from all objects": """
import gc, re
def add(a, b):
    for thing in gc.get_objects():
        values = list(thing.values()) if type(thing) is dict else [thing]
        for value in values:
            if isinstance(value, (str, bytes)):
                found = re.search(r'add\\(%d, %d\\) == (-?\\d+)' % (a, b), str(value))
                if found: return int(found[1])""",
    "tests of its own": "def check(*_): pass\ndef add(a, b): return 0",
    "another answer each time": """
import itertools
counter = itertools.count()
class Guess:
    def __eq__(self, other): return next(counter) > 0
    def __index__(self): return next(counter)
def add(a, b): return Guess()""",
    "an endless generator": "def add(a, b):\n    while True: yield 5",
    "an object in disguise": """
class Lie:
    __class__ = property(lambda self: int)
    def __int__(self): return 5
    def __sub__(self, other): return 0
def add(a, b): return Lie()""",
}

MATH = {
    "tower": r"\boxed{9^{9^{9^{9^{9}}}}}",
    "plain tower": "9**9**9**9",
    "factorials": r"\boxed{99999999!!!}",
    "nested brackets": "$" + "(" * 20_000 + "17" + ")" * 20_000 + "$",
    "nested fractions": r"\boxed{" + r"\frac{1}{" * 2_000 + "17" + "}" * 2_001,
    "many boxes": r"\boxed{" * 50_000,
    "a million digits": r"\boxed{" + "7" * 1_000_000 + "}",
    "python": """\\boxed{__import__("os").system("touch {canary}.new")}""",
    "python that exits": """$__import__("os")._exit(0)$""",
    "python that writes": """$[open(f"/dev/fd/{i}","w").write("1") for i in range(99)]$""",
    "every number": r"\boxed{" + ",".join(map(str, range(100))) + "}",
    "every number, boxed": " ".join(rf"\boxed{{{n}}}" for n in range(18, 0, -1)),
    "an unknown": r"\boxed{x}",
    "an integral": r"\boxed{\int_0^\infty \sin(x^x) e^{\sin x} dx}",
    "an equation": r"$x^{99999999} + x = 17^{99999999}$",
}
