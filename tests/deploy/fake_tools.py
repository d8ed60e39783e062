"""Stand-ins for gcloud, docker, xpk, srun and scontrol, which behave as documented.

A stand-in is a few lines of bash that ask this process, by a socket, what to say: starting Python
for each of some hundred calls would take the tests a minute. They take the flags of the documents
and no others. What a host's shell is told by ssh, bash does, with `sudo` and `docker` as functions.
"""

from __future__ import annotations

import os
import socketserver
import subprocess
import threading
from pathlib import Path
from typing import Any, NamedTuple, Self

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"

ASK = """\
exec 3<>/dev/tcp/127.0.0.1/{port}
printf '%s\\n' "{name}" "${{HOST:-}}" "$#" "$@" >&3
read -r code <&3
read -r error <&3
while IFS= read -r line <&3; do echo "$line"; done
[[ -z "$error" ]] || echo "$error" >&2
"""

REMOTE = """\
sudo() {{ [[ "$1" == gcloud ]] || "$@"; }}
docker() {{
{ask}
return "$code"; }}
touch() {{ command touch "{folder}/${{1##*/}}"; }}
{command}
"""

COMMON = {"zone", "project", "quiet"}
CREATE = (
    "accelerator-type runtime-version node-id node-count node-prefix spot reserved network "
    "subnetwork service-account internal-ips"
)
FLAGS = {
    "create": set(CREATE.split()),
    "list": {"filter", "format"},
    "delete": {"force"},
    "ssh": {"node", "worker", "batch-size", "ssh-flag", "command", "tunnel-through-iap"},
}
"""Flags of `gcloud compute tpus queued-resources` and `tpu-vm`: a part of its reference."""


class Reply(NamedTuple):
    """What a command leaves with and prints."""

    code: int = 0
    out: str = ""
    error: str = ""


class Container(NamedTuple):
    """A host's container, as `docker inspect` shows it."""

    run: str
    status: str = "running"
    code: int = 0


GONE = "gone"
"""A host out of reach."""


class World:
    """A request for TPUs, slices, and hosts; and what happens while a log is followed."""

    port: int
    """Where stand-ins ask what to say."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.calls: list[str] = []
        self.leaves: dict[str, int] = {}
        self.play()

    def play(
        self,
        *story: dict[str, Any],
        states: tuple[str, ...] = (),
        granted: tuple[str, ...] = ("ACTIVE",),
        hosts: tuple[Any, ...] = (None, None),
        refuse: bool = False,
        pulls_that_fail: int = 0,
    ) -> None:
        """Set the scene.

        Args:
            story: one event for each time that a log is followed. `ends` has an exit code, `GONE`
                or None for each host's container, `ssh` an exit code of ssh's own, `stop` is what
                `tpu-vm.sh stop` leaves; the rest are new values of what is set here.
            states: of the request, at each look; the last one stays; without any it is missing.
            granted: the same after a request.
            hosts: their containers; two of them are a slice.
            refuse: refuse a request.
            pulls_that_fail: of images, before one works.
        """
        self.story, self.states, self.granted = list(story), list(states), list(granted)
        self.hosts: list[Any] = list(hosts)
        self.refuse, self.pulls_that_fail = refuse, pulls_that_fail
        self.slices = [["READY"] * (len(hosts) // 2)]

    def answer(self, name: str, host: str, words: list[str]) -> Reply:
        """What a command says."""
        place = f"{host} " if host else ""
        self.calls.append(f"{place}{name} {' '.join(words)}")
        if name == "gcloud":
            return self._gcloud(words)
        if name == "docker":
            return self._docker(int(host[4:]), words)
        return Reply(self.leaves.get(name, 0))

    def _gcloud(self, words: list[str]) -> Reply:
        _, _, kind, verb, *rest = words
        flags = dict(word[2:].partition("=")[::2] for word in rest if word.startswith("--"))
        if unknown := flags.keys() - COMMON - FLAGS[verb]:
            return Reply(2, error=f"ERROR: (gcloud) unrecognized arguments: {unknown}")
        if verb == "ssh":
            return self._ssh(flags)
        if verb == "list":
            found = _turn(self.states if kind == "queued-resources" else self.slices)
            if found == "OFFLINE":
                return Reply(1, error="ERROR: gcloud crashed (ConnectionError)")
            lines = (
                [found or ""] if kind == "queued-resources" else [f"{s}\t2" for s in found or []]
            )
            return Reply(out="".join(f"{line}\n" for line in lines if line))
        if verb == "create" and self.refuse:
            return Reply(1, error="ERROR: (gcloud) RESOURCE_EXHAUSTED: quota")
        count = int(flags.get("node-count", 1)) if verb == "create" else 0
        self.states = list(self.granted) if count else []
        self.slices, self.hosts = [["READY"] * count], [None] * (2 * count)
        return Reply()

    def _ssh(self, flags: dict[str, str]) -> Reply:
        """As command_lib/compute/tpus/tpu_vm/ssh.py of the SDK.

        Slices that are gone are skipped, and it leaves with 0 all the same; with 255 for a host out
        of reach; else with the status of a host that is not 0.
        """
        event = self.story.pop(0) if "docker logs" in flags["command"] and self.story else {}
        every = flags["worker"] == "all"
        code, out, error = 0, "", ""
        for host in range(len(self.hosts)) if every else [int(flags["worker"])]:
            if self.slices[0][host // 2] == "PREEMPTED":
                continue
            if self.hosts[host] == GONE:
                code = code or 255
                continue
            done = self._on_host(host, flags["command"])
            out, error = out + done.stdout, error or done.stderr.strip()
            code = code or done.returncode
        for host, end in enumerate(event.get("ends", ())):
            if end is not None:
                had = self.hosts[host]
                self.hosts[host] = GONE if end == GONE else had._replace(status="exited", code=end)
        if event.get("stop"):
            (self.home / "host0/dsjax-stop").touch()
        self.states = list(event.get("states", self.states))
        self.slices = list(event.get("slices", self.slices))
        self.pulls_that_fail = event.get("pulls_that_fail", self.pulls_that_fail)
        return Reply(event.get("ssh", code), out, error)

    def _on_host(self, host: int, command: str) -> subprocess.CompletedProcess:
        folder = self.home / f"host{host}"
        folder.mkdir(exist_ok=True)
        ask = ASK.format(name="docker", port=self.port)
        command = command.replace("/run/", f"{folder}/")
        script = REMOTE.format(ask=ask, folder=folder, command=command)
        environment = os.environ | {"HOST": folder.name}
        return subprocess.run(
            ["bash", "-c", script], env=environment, capture_output=True, text=True
        )

    def _docker(self, host: int, words: list[str]) -> Reply:
        verb, container = words[0], self.hosts[host]
        if verb == "pull" and self.pulls_that_fail:
            self.pulls_that_fail -= 1
            return Reply(1, error="Cannot connect to the Docker daemon. Is it running?")
        if verb == "run" and container:
            return Reply(125, error='Conflict. The container name "/dsjax" is already in use.')
        if verb == "run":
            assert {"--detach", "--name"} <= set(words)
            self.hosts[host] = Container(next(w[4:] for w in words if w.startswith("run=")))
        elif verb in ("inspect", "logs", "stop") and not container:
            return Reply(1, "\n", "Error: No such object: dsjax")
        elif verb == "inspect":
            return Reply(out=f"{container.status} {container.code} {container.run}\n")
        elif verb == "rm":
            self.hosts[host] = None
        elif verb == "stop":
            self.hosts[host] = container._replace(status="exited", code=143)
        return Reply()


def _turn(values: list[Any]) -> Any:
    """The first of them, while there are several; the last one stays."""
    return values.pop(0) if len(values) > 1 else values[0] if values else None


class Stage(World):
    """A home in which a script of deploy/ runs, with stand-ins for what it calls."""

    def __init__(self, home: Path) -> None:
        super().__init__(home)
        world = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                name, host, count = (self._line() for _ in range(3))
                reply = world.answer(name, host, [self._line() for _ in range(int(count))])
                self.wfile.write(f"{reply.code}\n{reply.error}\n{reply.out}".encode())

            def _line(self) -> str:
                return self.rfile.readline().decode().rstrip("\n")

        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        (home / "bin").mkdir()
        for name in ("gcloud", "xpk", "srun", "scontrol"):
            text = ASK.format(name=name, port=self.port)
            (home / "bin" / name).write_text(f'#!/usr/bin/env bash\n{text}exit "$code"\n')
            (home / "bin" / name).chmod(0o755)

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def run(self, script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
        """Run a script of deploy/ with these variables and no others."""
        path = f"{self.home / 'bin'}:{os.environ['PATH']}"
        quick = {"POLL_SECONDS": "0", "LOST_SECONDS": "0"}
        return subprocess.run(
            [DEPLOY / script, *arguments],
            env={"PATH": path, "HOME": str(self.home), **quick, **variables},
            capture_output=True,
            text=True,
            timeout=60,
        )

    def deeds(self) -> list[str]:
        """What changed something: requests and deletions, and containers that were started."""
        found = []
        for call in self.calls:
            words = call.split()
            if words[0] == "gcloud" and words[4] in ("create", "delete"):
                found.append(words[4])
            elif words[1] == "docker" and words[2] in ("run", "stop"):
                found.append(f"{words[2]} {words[0]}")
        return found
