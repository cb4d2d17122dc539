"""What a program imports from the package, and what a type checker knows of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import intertitle
import pytest
from intertitle import errors

USER = """\
from typing_extensions import assert_type

from intertitle import BatchItem, BatchResult, Caption, Captioner, Decoding, IntertitleError, MediaOptions, PreparedClip


def main(bundle: str, clip: str) -> str:
    options: MediaOptions = {"audio": False, "start": 1.0}
    with Captioner.load(bundle, device="cpu") as captioner:
        assert_type(captioner.prepare(clip), PreparedClip)
        try:
            caption = captioner.caption(clip, decoding=Decoding(max_new_tokens=8), deadline=2.5, **options)
        except IntertitleError as error:
            return str(error)
        for result in captioner.caption_batch([BatchItem(clip, start=1.0)]):
            assert_type(result, BatchResult)
        with captioner.stream(clip) as stream:
            assert_type(list(stream), list[str])
        assert_type(stream.caption, Caption | None)
        return caption.text
"""

WRONG = """\
from intertitle import Captioner


def wrong(captioner: Captioner) -> int:
    return captioner.caption("a.mp4", audio="no").text
"""


def test_every_public_name_is_there():
    for name in intertitle.__all__:
        assert getattr(intertitle, name) is not None
        assert name in dir(intertitle)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        intertitle.Nothing  # noqa: B018


def test_every_error_is_public_and_of_one_root():
    found = {name: each for name, each in vars(errors).items() if isinstance(each, type)}
    assert found.keys() <= set(intertitle.__all__)
    assert all(issubclass(each, intertitle.IntertitleError) for each in found.values())


def test_importing_costs_no_runtime():
    """NumPy and ONNX Runtime come with the first name that needs them; the names are there before."""
    program = """
import sys, intertitle
assert "Captioner" in dir(intertitle)
assert not {"numpy", "onnxruntime", "av", "tokenizers"} & set(sys.modules), sorted(sys.modules)
intertitle.Captioner
assert "numpy" in sys.modules and "onnxruntime" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_log_records_are_silent_until_asked_for():
    program = """
import intertitle, logging, sys
log = logging.getLogger("intertitle.runtime.captioner")
log.error("silent")
logging.basicConfig(stream=sys.stderr)
log.error("heard")
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, timeout=60, capture_output=True, text=True)
    assert done.stderr.splitlines() == ["ERROR:intertitle.runtime.captioner:heard"]


def test_a_strict_type_checker_sees_the_types(tmp_path):
    pytest.importorskip("pyright")
    (tmp_path / "user.py").write_text(USER)
    (tmp_path / "wrong.py").write_text(WRONG)
    # A checkout's folder may have any name: the type checker finds the package by a link of the right one.
    found = tmp_path / "found"
    found.mkdir()
    (found / "intertitle").symlink_to(Path(intertitle.__file__).parent)
    config = {
        "typeCheckingMode": "strict",
        "pythonVersion": "3.10",
        "extraPaths": [str(found)],
        "include": ["user.py", "wrong.py"],
    }
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(config))
    assert (found / "intertitle" / "py.typed").exists()
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "-p", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    messages = [(Path(each["file"]).name, each["rule"]) for each in json.loads(done.stdout)["generalDiagnostics"]]
    assert sorted(messages) == [("wrong.py", "reportArgumentType"), ("wrong.py", "reportReturnType")]
