"""vLLM's processes end with `pvrt serve`: after its kill -9 none of them keeps memory and port."""

import ctypes
import os
import signal
import sys

#: The process that serves, for those that it starts. Without it vLLM is nobody's.
SERVER_VARIABLE = "PVRT_SERVER_PROCESS"
_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Have the system kill this process once its parent is gone, where pvrt serves (on Linux).

    vLLM's workers are children of its server, and so end as well.
    """
    server = os.environ.get(SERVER_VARIABLE)
    if server is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        os.kill(int(server), 0)
    except ProcessLookupError:  # it went before it could be noticed
        os._exit(1)
