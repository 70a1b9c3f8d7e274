"""The engine process: reads its setup from standard input, then commands from one socket.

Owns torch and the device; has no listening TCP socket. It ends itself when its parent is gone.
"""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import zmq

from polyadapt.config import EngineConfig
from polyadapt.engine import wire
from polyadapt.engine.output import StepOutput
from polyadapt.errors import StartupError
from polyadapt.logs import configure_logging
from polyadapt_store.sealed_files import FileSealer

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1
# Python's 5 ms are longer than many a whole step: a step takes the interpreter back from the thread
# that reads an adapter hundreds of times.
_SWITCH_INTERVAL_S = 5e-5


def main() -> int:
    """Run until the parent closes standard input or dies; the exit status is 0 unless it failed."""
    setup = json.loads(sys.stdin.readline())
    configure_logging(setup["log_level"], setup["log_format"], "engine")
    _die_with_parent(setup["parent_pid"])
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the edge's to handle
    context = zmq.Context()
    commands = context.socket(zmq.PULL)
    outputs = context.socket(zmq.PUSH)
    outputs.setsockopt(zmq.LINGER, 1000)
    commands.connect(setup["command_address"])
    outputs.connect(setup["output_address"])
    is_receiving = threading.Event()
    try:
        return _serve(setup, commands, outputs, is_receiving)
    finally:
        # A socket is one thread's: closed from here while that thread waits on it, libzmq ends the
        # process by an assertion, or hangs. Told that the context ends, the thread closes it.
        if not is_receiving.is_set():
            commands.close()
        outputs.close()
        context.term()


def _serve(
    setup: dict[str, Any], commands: Any, outputs: Any, is_receiving: threading.Event
) -> int:
    """Run until told to stop. `is_receiving` is set once `commands` is the receiving thread's."""
    # Imported here so that a bad setup is reported before seconds are spent on torch.
    from polyadapt.engine.build import build_engine
    from polyadapt.engine.loop import EngineLoop

    config = EngineConfig.model_validate(setup["config"])
    # Out of what is kept: only the reader of adapters has it from here on.
    file_key = setup.pop("file_key")
    sealer = None if file_key is None else FileSealer.from_text(file_key)

    def emit(output: StepOutput) -> None:
        outputs.send(wire.encode_output(output))

    try:
        loop = EngineLoop(
            lambda wake: build_engine(
                config,
                Path(setup["model_dir"]),
                Path(setup["blob_root"]),
                wake,
                name=setup["base_name"],
                num_sharing=setup["num_sharing"],
                sealer=sealer,
            ),
            emit,
        )
    except StartupError as error:
        outputs.send(wire.encode_startup_error(error.message))
        return 1
    spare_collections()
    outputs.send(wire.encode_info(loop.engine.info))

    def receive() -> None:
        try:
            while True:
                loop.put(wire.decode_command(commands.recv()))
        except zmq.ContextTerminated:  # the process ends
            pass
        finally:
            commands.close(linger=0)

    def watch_parent() -> None:
        sys.stdin.read()  # returns at end of file: the parent wants us to stop, or is gone
        loop.stop()

    is_receiving.set()
    for target in (receive, watch_parent):
        threading.Thread(target=target, daemon=True).start()
    loop.run()
    return 0


def _die_with_parent(parent_pid: int) -> None:
    """Ask Linux for SIGKILL when the parent dies, so that a killed server leaves no engine
    behind.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent_pid:
            os._exit(1)


def spare_collections() -> None:
    """Keep the garbage collector from walking what stays, and from walking at all in most steps.

    What was loaded has 400,000 objects; to walk them now and then held up a step for 200 ms. A
    step of 256 rows makes some 2,000 objects, nearly all without cycles.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


if __name__ == "__main__":
    sys.exit(main())
