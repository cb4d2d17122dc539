from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner
from intertitle.benchmarks.make_checkpoint import main
from intertitle.models import open_checkpoint


def test_a_checkpoint_is_written_once(tmp_path: Path) -> None:
    out = tmp_path / "new" / "tiny"
    ran = CliRunner().invoke(main, [str(out), "--size", "tiny", "--seed", "3"])
    assert ran.exit_code == 0
    assert ran.stdout.startswith(f"{out}: 0.00 GB in ")
    assert open_checkpoint(out).config.sampling.count == 8
    again = CliRunner().invoke(main, [str(out), "--size", "tiny", "--quiet"])
    assert (again.exit_code, again.stdout) == (2, "")
    assert again.stderr == f"intertitle: {out} exists already: give a new path, or remove it first\n"
