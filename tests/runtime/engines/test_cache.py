"""Engines on disk: found again, said why not, never run when they are not what was built here."""

from __future__ import annotations

import json

import msgspec
import pytest
from intertitle.errors import TargetError
from intertitle.runtime.engines.cache import EngineCache, Origin

pytestmark = pytest.mark.usefixtures("private_engines")

ORIGIN = Origin(
    bundle="tiny",
    component="decoder",
    graph="a" * 64,
    data="b" * 64,
    library="tensorrt-rtx",
    version="1.7",
    platform="linux-x86_64",
    capabilities=("8.6",),
    options={"max_length": 64},
)


def changed(**fields) -> Origin:
    return msgspec.structs.replace(ORIGIN, **fields)


def test_an_engine_is_found_again():
    cache = EngineCache.open()
    assert cache.why_missing(ORIGIN) == "there is no engine yet"
    path = cache.store(ORIGIN, b"engine")
    assert path.read_bytes() == b"engine"
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert EngineCache.open().why_missing(ORIGIN) is None
    assert EngineCache.open().load(ORIGIN) == b"engine"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"graph": "c" * 64}, "the bundle's graph changed"),
        ({"data": "c" * 64}, "the bundle's weights changed"),
        ({"version": "1.8"}, "TensorRT is 1.8, it was built with 1.7"),
        ({"library": "tensorrt"}, "it was built with tensorrt-rtx, not tensorrt"),
        ({"platform": "linux-aarch64"}, "it was built for linux-x86_64, this is linux-aarch64"),
        ({"capabilities": ("8.9", "12.0")}, "it is for compute capability 8.6, not 8.9, 12.0"),
        ({"options": {"max_length": 128}}, "the sizes differ (wanted max_length 128, built max_length 64)"),
        ({"bundle": "another"}, "there is no engine yet"),
        ({"component": "vision"}, "there is no engine yet"),
    ],
)
def test_why_it_is_built_again(fields, said):
    cache = EngineCache.open()
    cache.store(ORIGIN, b"engine")
    assert cache.why_missing(changed(**fields)) == said
    with pytest.raises(TargetError, match="run intertitle build"):
        cache.load(changed(**fields))
    assert cache.load(ORIGIN) == b"engine"


def test_of_several_the_nearest_is_compared():
    cache = EngineCache.open()
    cache.store(changed(version="1.5", capabilities=("7.5",)), b"old")
    cache.store(changed(version="1.6"), b"newer")
    assert cache.why_missing(ORIGIN) == "TensorRT is 1.7, it was built with 1.6"


def test_a_tampered_engine_is_refused():
    cache = EngineCache.open()
    path = cache.store(ORIGIN, b"engine")
    path.write_bytes(b"Engine")
    assert cache.why_missing(ORIGIN) == f"{path.name} is not the engine that was built here"
    with pytest.raises(TargetError, match="is not the engine that was built here"):
        cache.load(ORIGIN)
    cache.store(ORIGIN, b"engine")
    assert cache.load(ORIGIN) == b"engine"


def test_a_foreign_engine_is_refused(tmp_path):
    """A link to a file elsewhere, a file that others may write to, a note that names another engine, a torn note."""
    cache = EngineCache.open()
    path = cache.store(ORIGIN, b"engine")
    path.chmod(0o666)
    with pytest.raises(TargetError, match="open to others"):
        cache.load(ORIGIN)
    path.unlink()
    elsewhere = tmp_path / "planted"
    elsewhere.write_bytes(b"engine")
    path.symlink_to(elsewhere)
    with pytest.raises(TargetError, match="belongs to another user or is open to others"):
        cache.load(ORIGIN)
    path.unlink()
    cache.store(ORIGIN, b"engine")
    note = path.with_suffix(".json")
    text = json.loads(note.read_text())
    text["origin"]["component"] = "vision"
    note.write_text(json.dumps(text))
    with pytest.raises(TargetError, match="is not what intertitle wrote"):
        cache.load(ORIGIN)
    note.write_text(note.read_text()[:-5])
    with pytest.raises(TargetError, match="is not what intertitle wrote"):
        cache.load(ORIGIN)


def test_a_folder_that_others_can_write_to(tmp_path):
    folder = EngineCache.open().folder
    folder.chmod(0o777)
    with pytest.raises(TargetError, match="a cache folder of this user alone"):
        EngineCache.open()


def test_half_an_engine_is_none():
    cache = EngineCache.open()
    path = cache.store(ORIGIN, b"engine")
    path.with_suffix(".json").unlink()
    assert cache.why_missing(ORIGIN) == "its build was interrupted"
    path.unlink()
    assert cache.why_missing(ORIGIN) == "there is no engine yet"


def test_what_a_killed_builder_left_goes():
    cache = EngineCache.open()
    (cache.folder / ".decoder-x.engine.123.partial").write_bytes(b"half")
    with cache.building(pytest.fail):
        pass
    assert [path.name for path in cache.folder.iterdir()] == ["lock"]


def test_timing_is_kept_by_version():
    cache = EngineCache.open()
    assert cache.timing("tensorrt-rtx", "1.7") == b""
    cache.keep_timing("tensorrt-rtx", "1.7", b"fast")
    assert cache.timing("tensorrt-rtx", "1.7") == b"fast"
    assert cache.timing("tensorrt-rtx", "1.8") == b""
