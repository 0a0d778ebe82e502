"""What a product can do on this machine, asked in a process of its own, which may crash.

The child imports the product, makes a builder and says on standard output, in one line of JSON,
what came of it.
"""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass

from lcexport.configs.errors import IncompatibleError, LcexportError
from lcexport.engines.trt.options import bf16_targets
from lcexport.engines.trt.product import (
    MessageLog,
    ProductName,
    builder_for,
    logger_for,
    open_product,
)
from lcexport.engines.trt.worker import (
    compiler_environment,
    error_from,
    private_stdout,
    value_from,
)

COMMAND = (sys.executable, "-P", "-c", "from lcexport.engines.trt.probe import main; main()")
SECONDS = 120  # a driver may take some to wake a GPU; a builder that takes longer hangs
SHOWN_LINES = 3


@dataclass(frozen=True)
class ProductState:
    """What was found: up to where it went well, and the error that ended it there.

    Attributes:
        version: None where the module does not load.
        builder: whether a builder can be made.
        targets: GPUs it compiles bf16 for without having one, such as `sm89`: RTX only.
        crashed: the process that asked died, so this one had better not import the module.
    """

    version: str | None = None
    builder: bool = False
    targets: tuple[str, ...] = ()
    error: LcexportError | None = None
    crashed: bool = False


def probe(name: ProductName, gpu: str | None = None) -> ProductState:
    """Ask a child to load `name` and to make a builder; whatever happens to it is an answer."""
    try:
        done = subprocess.run(
            (*COMMAND, name),
            env=compiler_environment(gpu),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return crash(name, f"it took more than {SECONDS} s")
    if done.returncode:
        code = done.returncode
        how = signal.Signals(-code).name if code < 0 else f"status {code}"
        tail = done.stderr.decode(errors="replace").strip().splitlines()[-SHOWN_LINES:]
        return crash(name, " | ".join([how, *tail]))
    value = json.loads(done.stdout)
    error = value.pop("error")
    value["targets"] = tuple(value["targets"])
    return ProductState(**value, error=error and error_from(error))


def require_builder(name: ProductName, gpu: str | None = None) -> None:
    """Raise the error that stands between `name` and a builder on this machine, if one does."""
    if (error := probe(name, gpu).error) is not None:
        raise error


def crash(name: str, got: str) -> ProductState:
    """The answer of a child that gave none."""
    error = IncompatibleError(
        f"{name} crashed or hung while it loaded or made a builder",
        got=got,
        do="Perhaps its native libraries, the driver and the GPU do not fit each other: try "
        "another version of one of them.",
    )
    return ProductState(error=error, crashed=True)


def state_here(name: str) -> ProductState:
    """`probe`, in this process."""
    version, log = None, MessageLog()
    try:
        product = open_product(name)
        version = ".".join(map(str, product.version))
        builder_for(product, logger_for(product, log), log)
        return ProductState(version, True, bf16_targets(product))
    except LcexportError as error:
        return ProductState(version, error=error)


def main() -> None:
    """The child."""
    answers = private_stdout()
    state = state_here(sys.argv[1])
    error = state.error and value_from(state.error)
    answers.write(json.dumps({**vars(state), "error": error}).encode())
    answers.flush()
    os._exit(0)  # all is said: a fault of a library's own clean-up would only confuse
