"""What the registries offer, as text for help pages."""

from __future__ import annotations

from collections.abc import Callable

from ..contract.devices import DEVICES
from ..contract.formats import FORMATS
from ..contract.pipeline import DEFAULT_SHARES
from ..contract.targets import TARGETS, Target

#: The formats of a kind of component that a target takes, the default first.
Formats = Callable[[Target], tuple[str, ...]]


def devices() -> str:
    """``cpu, cuda or ...``."""
    return _either(list(DEVICES))


def targets() -> str:
    """``cpu, cuda, ... or tensorrt-10.3 (JetPack 6)``."""
    return _either([f"{name} ({target.version})" if target.version else name for name, target in TARGETS.items()])


def engine_targets() -> list[str]:
    """The targets whose bundles need engines."""
    return [name for name, target in TARGETS.items() if target.engines]


def formats(of: Formats) -> str:
    """The formats, the smallest first, and the targets that do not take them: ``int4, fp16 (not for cpu) or ...``."""
    named = []
    for name in sorted(FORMATS, key=lambda name: FORMATS[name].bits):
        lacking = [target.name for target in TARGETS.values() if name not in of(target)]
        if len(lacking) < len(TARGETS):
            named.append(f"{name} (not for {_either(lacking)})" if lacking else name)
    return _either(named)


def default_format(of: Formats) -> str:
    """The default format, or ``fp32 for cpu, fp16 for other targets``."""
    takers: dict[str, list[str]] = {}
    for target in TARGETS.values():
        takers.setdefault(of(target)[0], []).append(target.name)
    *few, most = sorted(takers, key=lambda name: len(takers[name]))
    if not few:
        return most
    return ", ".join([*(f"{name} for {_either(takers[name])}" for name in few), f"{most} for other targets"])


def everywhere() -> str:
    """The formats of the decoder that other components get with it: ``with --weights fp32, fp32``."""
    return "; ".join(f"with --weights {name}, {name}" for name, format in FORMATS.items() if format.everywhere)


def block_sizes(format: str) -> str:
    """``32, 64 or 128``."""
    return _either([str(size) for size in sorted({s for t in TARGETS.values() for s in t.block_sizes.get(format, ())})])


def default_block_size(format: str) -> str:
    """``32``."""
    return _either(
        sorted({str(target.block_size(format)) for target in TARGETS.values() if format in target.block_sizes})
    )


def shares() -> str:
    """The shares of visual tokens that are compiled unless others are asked for: ``100%, 50%, 25%, 10%``."""
    return ", ".join(f"{share:.0%}" for share in DEFAULT_SHARES)


def _either(names: list[str]) -> str:
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
