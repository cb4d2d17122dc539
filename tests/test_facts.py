"""Pages that code cites are in the repository, and so are the sections."""

from __future__ import annotations

import re


def test_cited_pages_and_sections_exist(repo_dir):
    headings = set(re.findall(r"^##+ ([\d.]+?)\.? ", (repo_dir / "docs/facts.md").read_text(), re.MULTILINE))
    cited: set[str] = set()
    for path in repo_dir.rglob("*.py"):
        if any(part.startswith(".") for part in path.relative_to(repo_dir).parts):
            continue
        text = path.read_text()
        for page in re.findall(r"\bdocs/[\w/-]+\.md\b", text):
            assert (repo_dir / page).exists(), f"{path}: {page}"
        for sections in re.findall(r"docs/facts\.md[\s#:]+((?:\d[\d.]*(?:, | to )?)+)", text):
            cited |= {section.rstrip(".") for section in re.split(", | to ", sections) if section}
    assert len(cited) > 10
    assert cited <= headings
