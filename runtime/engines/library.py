"""The installed TensorRT. TensorRT and TensorRT for RTX have the same Python interface under two names.

Other differences are found by looking at the module, not at its name.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...contract.devices import DEVICES
from ...errors import TargetError
from ..cuda import Cuda


@dataclass(frozen=True)
class Library:
    """An installed TensorRT. ``target``: its name in bundles; ``module``: its Python interface."""

    target: str
    module: Any

    @property
    def version(self) -> str:
        return str(self.module.__version__)

    @property
    def ahead_of_time(self) -> tuple[str, ...]:
        """The compute capabilities (such as ``8.6``) that engines can be built for without a GPU."""
        capabilities = getattr(self.module, "ComputeCapability", None)
        if capabilities is None or not hasattr(self.module.IBuilderConfig, "set_compute_capability"):
            return ()
        names = [name.removeprefix("SM") for name in dir(capabilities) if name.startswith("SM")]
        return tuple(sorted((f"{name[:-1]}.{name[-1]}" for name in names), key=lambda name: float(name)))

    def check_gpu(self, capability: str) -> None:
        """``TargetError`` if no engine runs on a GPU of this compute capability.

        Such a GPU is older than the newest one that the library builds for, and is not in its list. GPUs that are newer
        than the list may run portable engines.
        """
        known = self.ahead_of_time
        if known and capability not in known and float(capability) < float(known[-1]):
            raise TargetError(
                f"{self.target} {self.version} does not run on compute capability {capability}, but on "
                f"{', '.join(known)}: compile the checkpoint with --target cuda or tensorrt"
            )

    def logger(self, heard: list[str]) -> Any:
        """A logger that puts errors into ``heard`` instead of printing them."""
        trt = self.module

        class Quiet(trt.ILogger):
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                    heard.append(" ".join(message.split()))

        return Quiet()


def load_library(target: str) -> Library:
    """The TensorRT of a device. ``TargetError`` if it is not installed or does not load."""
    device = DEVICES[target]
    for name in device.modules:
        try:
            return Library(target, importlib.import_module(name))
        except ModuleNotFoundError as error:
            if error.name not in device.modules:
                raise TargetError(f"{target}: {name} does not load: {error}") from error
        except (ImportError, OSError, RuntimeError) as error:
            raise TargetError(f"{target}: {name} does not load: {' '.join(str(error).split())}") from error
    raise TargetError(f"{target} is not installed: {device.install}")


def parse_capabilities(text: str, library: Library) -> tuple[str, ...]:
    """``86,8.9,120`` as ``("8.6", "8.9", "12.0")``, sorted and without repeats.

    ``TargetError`` for a capability that the library cannot build for ahead of time.
    """
    known, found = library.ahead_of_time, set[str]()
    if not known:
        raise TargetError(
            f"{library.target} {library.version} builds for the GPU of this machine only: use current, not {text}"
        )
    for part in text.split(","):
        digits = part.strip().replace(".", "")
        name = f"{digits[:-1]}.{digits[-1:]}"
        if name not in known:
            raise TargetError(
                f"{library.target} {library.version} does not build for compute capability {part.strip()!r}; "
                f"it does for {', '.join(known)}"
            )
        found.add(name)
    return tuple(sorted(found, key=float))


def built_for(text: str, library: Library) -> tuple[tuple[str, ...], bool]:
    """The compute capabilities of ``current`` or of a list, and whether the GPU of this machine is meant.

    ``TargetError`` for ``current`` without a GPU; it says what to do instead.
    """
    if text.strip() != "current":
        return parse_capabilities(text, library), False
    try:
        return (Cuda().capability,), True
    except TargetError as error:
        known = library.ahead_of_time
        instead = f"; without one, --compute-capability takes a list of {', '.join(known)}" if known else ""
        raise TargetError(f"no GPU to build for: {error}{instead}") from None


def check_device(built_for: Sequence[str], device: str, where: str) -> None:
    """``TargetError`` unless engines of these capabilities run on a GPU of the capability ``device``."""
    if device not in built_for:
        raise TargetError(
            f"{where} was built for compute capability {', '.join(built_for)}, but this GPU has {device}: run "
            "intertitle build on this machine"
        )
