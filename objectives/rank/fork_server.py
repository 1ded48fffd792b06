"""A process that has imported what ranks need and forks them: imports take 4 to 16 s at each start, a fork takes none.

`objectives.running.local_launcher` starts it with two arguments: the module whose `main()` a rank runs, and the
descriptor of a Unix socket. Each message there asks for one rank: a JSON document `{"process_group": …,
"environment": {…}}`, where the environment is what the rank has beside this process's own, and the descriptors that
`DESCRIPTORS` names. Into the descriptor `exit` the rank writes a line as soon as it is in its group, before all that
it may say elsewhere; and this process `exit` and the rank's status as `subprocess` has it, when it has ended.

The standard library's forkserver does the same for multiprocessing, but a process can have only one, with the
environment of its first use, and its children import the tuner's main module. Nothing here may touch a GPU: CUDA works
in no fork of a process that did. A rank that finds it so starts again as a program, and imports for itself.
"""

import contextlib
import ctypes
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import sys
from collections.abc import Sequence
from typing import NoReturn

DESCRIPTORS = ("stdin", "stdout", "stderr", "event", "exit", "rendezvous")
"""The last one is rank 0's alone."""

REQUEST_BYTES = 65536

NO_CUDA_YET = "PYTORCH_NVML_BASED_CUDA_CHECK"
"""With it torch counts GPUs without starting CUDA (https://docs.pytorch.org/docs/stable/notes/cuda.html). Ranks go
without: the count alone does not say whether the driver is of use."""


CUDA_ERROR_NOT_INITIALIZED = 3
"""https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__TYPES.html"""


class ForkServer:
    """The waiting process."""

    def __init__(self, requests: socket.socket) -> None:
        self._requests = requests
        self._exits: dict[int, int] = {}
        """Where the status of each living rank is to go, by process id."""

    def serve(self) -> bool:
        """Forks ranks until the tuner closes its end. True in a rank, with its descriptors and environment in place."""
        woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake)
        with selectors.DefaultSelector() as selector:
            selector.register(self._requests, selectors.EVENT_READ)
            selector.register(woken, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fileobj == woken:
                        os.read(woken, REQUEST_BYTES)
                        self._report_exits()
                        continue
                    message, descriptors, *_ = socket.recv_fds(self._requests, REQUEST_BYTES, len(DESCRIPTORS))
                    if not message:
                        return False
                    if self._fork(json.loads(message), descriptors):
                        os.close(woken)
                        os.close(wake)
                        return True

    def _fork(self, request: dict[str, object], descriptors: Sequence[int]) -> bool:
        """Makes one rank; True in it."""
        given = dict(zip(DESCRIPTORS, descriptors, strict=False))
        group = int(str(request["process_group"]))
        rank = os.fork()
        if rank == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            try:
                os.setpgid(0, group)
            except PermissionError:
                os._exit(1)  # the group is gone, and with it whoever wanted the rank
            with contextlib.suppress(BrokenPipeError):
                os.write(given["exit"], b"forked\n")
            self._requests.close()
            for descriptor in [given.pop("exit"), *self._exits.values()]:
                os.close(descriptor)
            become_rank(given, request["environment"])
            return True
        for name in given.keys() - {"exit"}:
            os.close(given[name])
        self._exits[rank] = given["exit"]
        return False

    def _report_exits(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while True:
                rank, status = os.waitpid(-1, os.WNOHANG)
                if rank == 0:
                    return
                descriptor = self._exits.pop(rank)
                with contextlib.suppress(BrokenPipeError):  # nobody waits for it any more
                    os.write(descriptor, b"exit %d\n" % os.waitstatus_to_exitcode(status))
                os.close(descriptor)


def become_rank(given: dict[str, int], environment: object) -> None:
    """Puts a rank's descriptors and variables where its `main()` looks for them."""
    assert isinstance(environment, dict)
    os.environ.pop(NO_CUDA_YET, None)
    os.environ.update(environment)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        descriptor = given.pop(name)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ["DS_TUNE_EVENT_FD"] = str(given["event"])
    if "rendezvous" in given:
        os.environ["DS_TUNE_RENDEZVOUS_FD"] = str(given["rendezvous"])


def cuda_was_touched() -> bool:
    """Whether this fork comes too late for CUDA: `cuInit` fails where the process that forked has called it."""
    torch = sys.modules.get("torch")
    if torch is None or torch.version.cuda is None or os.environ.get("DS_ACCELERATOR") == "cpu":
        return False
    if torch.cuda._is_in_bad_fork():
        return True
    with contextlib.suppress(OSError):
        return bool(ctypes.CDLL("libcuda.so.1").cuInit(0) == CUDA_ERROR_NOT_INITIALIZED)
    return False


def start_over(module: str) -> NoReturn:
    """Replaces this rank by a program that owes nothing to a fork, with the same descriptors and environment."""
    print("CUDA was touched before this rank was forked: it imports everything by itself", file=sys.stderr, flush=True)
    for variable in ("DS_TUNE_EVENT_FD", "DS_TUNE_RENDEZVOUS_FD"):
        if variable in os.environ:
            os.set_inheritable(int(os.environ[variable]), True)
    os.execv(sys.executable, [sys.executable, "-P", "-m", module])


def main() -> None:
    name, descriptor = sys.argv[1:]
    requests = socket.socket(fileno=int(descriptor))
    requests.set_inheritable(False)
    module = importlib.import_module(name)
    # Neither this process nor a rank need ever walk what the imports made, and ranks share its pages.
    gc.collect()
    gc.freeze()
    if not ForkServer(requests).serve():
        return
    if cuda_was_touched():
        start_over(name)
    module.main()


if __name__ == "__main__":
    main()
