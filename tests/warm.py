"""Starts Python scripts as processes of their own that need not import torch again.

Most of a short run of generate_embeddings.py is importing packages. A server (this file as a
program) imports them once for all processes of the tests, and forks for each run. The script itself
begins anew in each, as `__main__`, with arguments, environment, folder and output of its own; it
can be signalled and killed as any process.
"""

import gc
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

PACKAGES = ("torch", "numpy", "PIL.Image", "requests", "supabase", "tqdm", "dotenv", "safetensors")
# What Python, glibc and OpenMP read when a process starts: a fork would not heed them.
READ_AT_START = ("PYTHON", "MALLOC_", "LD_PRELOAD", "OMP_", "LANG", "LC_")
ADDRESS = "TESTS_WARM_SERVER"  # in the environment: the path of its socket
REQUEST_BYTES = 2**17


@cache
def start():
    """Starts the server, for this process and those that it starts; it ends with this one."""
    if ADDRESS in os.environ or sys.platform != "linux":
        return None
    folder = tempfile.mkdtemp(prefix="warm-")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(f"{folder}/socket")
    listener.listen(64)  # whoever asks before it has imported all waits
    read = tuple(set(READ_AT_START) - {"LANG", "LC_"})
    kept = {name: text for name, text in os.environ.items() if not name.startswith(read)}
    os.environ[ADDRESS] = f"{folder}/socket"
    return subprocess.Popen(
        [sys.executable, __file__, str(listener.fileno()), folder],
        pass_fds=[listener.fileno()],
        stdin=subprocess.PIPE,  # closes with this process
        stdout=subprocess.PIPE,  # sys.stdout of a file would seek, also in a fork's terminal
        env=kept | {"OPENBLAS_NUM_THREADS": "1"},  # numpy's threads would be in no fork
    )


def needs_cold(environment):
    """Whether a process with this environment has to be started anew."""
    read = {name for name in environment if name.startswith(READ_AT_START)}
    changed = any(os.environ.get(name) != environment[name] for name in read)
    return changed or sys.platform != "linux"  # macOS's own libraries may crash in a fork


class Run:
    """A process that the server starts, with what is needed here of subprocess.Popen."""

    def __init__(self, argv, folder, environment, files):
        start()
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._server.connect(os.environ[ADDRESS])
        request = json.dumps([argv, str(folder), environment]).encode()
        assert len(request) < REQUEST_BYTES
        socket.send_fds(self._server, [request], files)
        self.returncode = None
        self.pid = int(self._server.recv(16))

    def poll(self, timeout=0):
        if self.returncode is None and select.select([self._server], [], [], timeout)[0]:
            self.returncode = int(self._server.recv(16))
            self._server.close()
        return self.returncode

    def wait(self, timeout=None):
        if self.poll(timeout) is None:
            raise subprocess.TimeoutExpired("the run", timeout)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def serve(listener, folder):
    """Forks for each request until the tests are over; returns in each run's process."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those in between
    while 0 not in select.select([listener, 0], [], [])[0]:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return stand_between(connection)
        connection.close()
    shutil.rmtree(folder)
    sys.exit()


def stand_between(connection):
    """Forks the run's process, where it returns, and says how that process ends."""
    request, files, _, _ = socket.recv_fds(connection, REQUEST_BYTES, 2)
    pid = os.fork()
    if pid:
        for file in files:
            os.close(file)
        connection.send(str(pid).encode())
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        connection.send(str(code).encode())
        os._exit(0)
    connection.close()
    for number, file in enumerate([os.open(os.devnull, os.O_RDONLY), *files]):
        os.dup2(file, number)
        os.close(file)
    sys.argv[:], folder, environment = json.loads(request)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)


if __name__ == "__main__":
    for package in PACKAGES:
        __import__(package)
    gc.freeze()  # else each fork copies what its garbage collector looks at
    serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2])
    sys.path[0] = str(Path(sys.argv[0]).parent)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        sys.stdout.flush()
        os._exit(end.code)  # Python's own end takes seconds where torch was imported
