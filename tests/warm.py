"""Starts Python scripts as processes of their own that need not import torch again.

Most of a short run of generate_embeddings.py is importing packages, which the tests would pay some
hundreds of times. A server imports them once and forks for each run. The script itself begins anew
in each, as `__main__`, with arguments, environment, folder and output of its own; it can be
signalled and killed as any process.

Used as a program this is the server.
"""

import array
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
from functools import cache
from pathlib import Path

PACKAGES = ("torch", "numpy", "PIL.Image", "requests", "supabase", "tqdm", "dotenv", "safetensors")
# What Python, glibc and OpenMP read when a process starts: a fork would not heed them.
READ_AT_START = ("PYTHON", "MALLOC_", "LD_PRELOAD", "OMP_", "LANG", "LC_")


class Server:
    """A process that has the packages. It ends with this one."""

    def __init__(self):
        self._lock = threading.Lock()
        self._control, theirs = socket.socketpair()
        command = [sys.executable, __file__, str(theirs.fileno())]
        kept = {
            name: text
            for name, text in os.environ.items()
            if name.startswith(("LANG", "LC_")) or not name.startswith(READ_AT_START)
        }
        # numpy would start threads, which no fork takes along
        environment = kept | {"OPENBLAS_NUM_THREADS": "1"}
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment)
        theirs.close()

    def start(self, argv, folder, environment, out, err):
        """Runs a script with its arguments; its Run."""
        request = {"argv": argv, "folder": str(folder), "environment": environment}
        events, theirs = os.pipe()
        files = array.array("i", [out.fileno(), err.fileno(), theirs])
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)]
        data = json.dumps(request).encode()
        with self._lock:
            self._control.sendmsg([len(data).to_bytes(4, "big")], rights)
            self._control.sendall(data)
        os.close(theirs)
        return Run(events)


@cache
def server():
    """This process's Server."""
    return Server()


def needs_cold(environment):
    """Whether a process with this environment has to be started anew."""
    if sys.platform != "linux":  # macOS's own libraries may crash in a fork
        return True
    return any(
        name.startswith(READ_AT_START) and os.environ.get(name) != value
        for name, value in environment.items()
    )


class Run:
    """A process that a Server started, with what is needed here of subprocess.Popen."""

    def __init__(self, events):
        self._events = os.fdopen(events, "rb", buffering=0)
        self.returncode = None
        self.pid = self._event()

    def _event(self):
        event = self._events.read(4)
        assert len(event) == 4, "the process between this one and the run's is gone"
        return int.from_bytes(event, "big", signed=True)

    def poll(self):
        return self._look(0)

    def wait(self, timeout=None):
        if self._look(timeout) is None:
            raise subprocess.TimeoutExpired("the run", timeout)
        return self.returncode

    def _look(self, timeout):
        if self.returncode is None and select.select([self._events], [], [], timeout)[0]:
            self.returncode = self._event()
            self._events.close()
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def serve(control):
    """Forks for each request until the tests are over; returns what to run, in a forked process."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those in between
    while True:
        head, rights, _, _ = control.recvmsg(4, socket.CMSG_SPACE(3 * array.array("i").itemsize))
        if not head:
            sys.exit()
        data = b""
        length = int.from_bytes(head, "big")
        while len(data) < length:
            data += control.recv(length - len(data))
        files = array.array("i")
        files.frombytes(rights[0][2])
        if os.fork() == 0:
            control.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return stand_between(json.loads(data), *files)
        for file in files:
            os.close(file)


def stand_between(request, out, err, events):
    """Forks the run's process, where it returns the request, and says how that process ends."""
    pid = os.fork()
    if pid == 0:
        os.close(events)
        for number, file in ((1, out), (2, err)):
            os.dup2(file, number)
            os.close(file)
        return request
    os.write(events, pid.to_bytes(4, "big", signed=True))
    for file in (0, 1, 2, out, err):
        os.close(file)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.write(events, code.to_bytes(4, "big", signed=True))
    os._exit(0)


if __name__ == "__main__":
    for package in PACKAGES:
        __import__(package)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    request = serve(socket.socket(fileno=int(sys.argv[1])))
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.argv[:] = request["argv"]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
