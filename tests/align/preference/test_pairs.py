"""The file of pairs: the gap rule, records of failures, resuming, and a reader that believes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from intertitle.align.preference import (
    Candidate,
    Endpoint,
    Item,
    Judge,
    Material,
    PairFile,
    PairJob,
    Proposal,
    Scores,
    read_pairs,
    scene_items,
)
from intertitle.errors import MediaError, OptionError
from intertitle.runtime.batch import Entry, Settings, read_inputs


class Texts:
    """A proposer with ready texts: ``good N`` and ``bad N``, which the scorer below tells apart."""

    def __init__(self, texts: Callable[[str], Iterable[str]] = lambda key: (f"good {key}", f"bad {key}")) -> None:
        self.texts, self.asked = texts, []

    def propose(self, items: Iterable[Item]) -> Iterator[Proposal]:
        for item in items:
            self.asked.append(item.key)
            if item.key.endswith(":3"):
                yield Proposal(item, error=MediaError("three is broken"))
                continue
            found = [Candidate(text, ("greedy",), -1.0) for text in self.texts(item.key)]
            yield Proposal(item, Material(item.key, "Describe.", ["a segment"], found, item.scene))


class ByName:
    name, needs_segments, needs_likelihoods = "by name", True, False

    def __init__(self, low: float = 1.0) -> None:
        self.low = low

    def score(self, item: Material, candidates: Iterable[Candidate]) -> list[Scores]:
        return [Scores(5, 5, 3) if one.text.startswith("good") else Scores(5, self.low, 3) for one in candidates]


def run(path: Path, items: Any, proposer: Any = None, scorer: Any = None, gap: float = 4.0, **how: bool):
    with PairFile(path, Settings({}), **how) as records:
        return PairJob(items, records, scorer or ByName(), gap=gap).run(proposer or Texts())


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_records_and_pairs(tmp_path: Path):
    path = tmp_path / "pairs.jsonl"
    tally = run(path, scene_items("train:0:5"))
    assert (tally.captioned, tally.kept, tally.failed, tally.finished) == (4, 4, 1, 5)
    found = lines(path)
    assert [one["key"] for one in found] == [f"train:{index}" for index in range(5)]
    assert found[3] == {
        "key": "train:3", "source": "scene train:3", "error": {"kind": "media", "reason": "three is broken"},
        "run": found[0]["run"], "settings": {},
    }  # fmt: skip
    assert found[0]["candidates"][1] == {
        "text": "bad train:0", "origins": ["greedy"], "mean_logprob": -1.0, "finish_reason": "stop",
        "scores": {"factuality": 5, "fluency": 1.0, "consistency": 3, "total": 9.5},
    }  # fmt: skip
    pairs = list(read_pairs(path))
    assert [pair.key for pair in pairs] == ["train:0", "train:1", "train:2", "train:4"]
    assert (pairs[0].source, pairs[0].chosen, pairs[0].rejected) == ("scene train:0", "good train:0", "bad train:0")
    assert pairs[0].gap == pytest.approx(4)
    assert pairs[0].rejected_scores == Scores(5, 1, 3)


def test_the_gap_rule(tmp_path: Path):
    path = tmp_path / "pairs.jsonl"
    tally = run(path, scene_items("train:0:2"), scorer=ByName(low=1.01))
    assert (tally.captioned, tally.kept) == (2, 0)
    assert list(read_pairs(path)) == []
    assert [pair.gap for pair in read_pairs(path, gap=3)] == pytest.approx([3.99, 3.99])
    # Switched off, whatever differs is kept; what does not never is.
    assert run(tmp_path / "off.jsonl", scene_items("train:0:2"), scorer=ByName(low=4.9), gap=0).kept == 2
    assert run(tmp_path / "same.jsonl", scene_items("train:0:2"), scorer=ByName(low=5), gap=0).kept == 0
    assert run(tmp_path / "one.jsonl", scene_items("train:0:2"), Texts(lambda key: ["good"]), gap=0).kept == 0
    for name in ("same", "one"):
        assert list(read_pairs(tmp_path / f"{name}.jsonl", gap=0)) == []
    with pytest.raises(OptionError, match=r"from 0 to 13\.5"):
        run(tmp_path / "none.jsonl", [], gap=14)


def test_what_is_done_is_not_done_again(tmp_path: Path):
    path, proposer = tmp_path / "pairs.jsonl", Texts()
    run(path, scene_items("train:2:4"), proposer)
    before = path.read_bytes()
    tally = run(path, scene_items("train:0:5"), proposer)
    assert (tally.already, tally.already_failed, tally.captioned, tally.failures) == (1, 1, 3, 1)
    assert proposer.asked == ["train:2", "train:3", "train:0", "train:1", "train:4"]
    assert [one["key"] for one in lines(path)] == [f"train:{index}" for index in range(5)]
    assert all(line in path.read_bytes() for line in before.splitlines())
    assert run(path, scene_items("train:0:5"), proposer, retry_failed=True).failed == 1
    assert proposer.asked[5:] == ["train:3"]
    # In any order the same records.
    other = tmp_path / "other.jsonl"
    run(other, scene_items("train:0:5")[::-1])
    assert sorted(other.read_bytes().splitlines()) == sorted(path.read_bytes().splitlines())


def test_a_torn_line_is_mended_and_other_files_are_left_alone(tmp_path: Path):
    path = tmp_path / "pairs.jsonl"
    run(path, scene_items("train:0:3"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    with pytest.raises(OptionError, match="line 3: is cut short"):
        list(read_pairs(path))
    assert run(path, scene_items("train:0:3")).captioned == 1
    assert path.read_bytes() == whole
    batch = tmp_path / "captions.jsonl"
    batch.write_text('{"id": "x", "settings": {}}\n')
    with pytest.raises(OptionError, match="line 1 is not a record of pairs"):
        run(batch, [])
    with pytest.raises(OptionError, match="is not an output of pairs"):
        run(batch, [], overwrite=True)


def test_files_that_change_or_are_missing(tmp_path: Path):
    clip, path, proposer = tmp_path / "clip.mp4", tmp_path / "pairs.jsonl", Texts()
    clip.write_bytes(b"one")
    entries = [Entry(str(clip)), Entry(str(tmp_path / "gone.mp4"))]
    tally = run(path, entries, proposer)
    assert (tally.captioned, tally.failed) == (1, 1)
    assert lines(path)[1]["error"]["reason"].endswith("no such file")
    assert run(path, entries, proposer).already == 1
    clip.touch()
    assert run(path, entries, proposer).already == 1  # the same content at another time
    clip.write_bytes(b"two")
    (tmp_path / "gone.mp4").write_bytes(b"here")
    tally = run(path, entries, proposer)
    assert (tally.captioned, tally.failures) == (2, 0)
    assert len(lines(path)) == 2
    assert len(list(read_pairs(path))) == 2


def test_lines_of_a_manifest(tmp_path: Path):
    """Their columns go into the records; a line that is mended takes the place of its failure."""
    (tmp_path / "a.mp4").write_bytes(b"a")
    (tmp_path / "b.mp4").write_bytes(b"b")
    manifest, path = tmp_path / "list.jsonl", tmp_path / "pairs.jsonl"
    manifest.write_text('{"file": "a.mp4", "id": "x", "scene": 7, "prompt": "What?", "start": 1}\nnonsense\n')
    tally = run(path, read_inputs([manifest]))
    assert (tally.captioned, tally.failed, tally.finished) == (1, 1, 2)
    assert tally.reasons[0].startswith(f"{manifest}: line 2: ")
    found = lines(path)
    assert (found[0]["key"], found[0]["meta"], found[0]["prompt"], found[0]["start"]) == ("x", {"scene": 7}, "What?", 1)
    assert (found[1]["source"], found[1]["line"]) == (str(manifest), 2)
    manifest.write_text('{"file": "a.mp4", "id": "x", "prompt": "What?", "start": 1}\n{"file": "b.mp4"}\n')
    tally = run(path, read_inputs([manifest]))
    assert (tally.already, tally.captioned, tally.failures) == (1, 1, 0)
    assert [Path(one["source"]).name for one in lines(path)] == ["a.mp4", "b.mp4"]


def test_a_judge_that_fails_for_some(tmp_path: Path, server):
    """Nonsense, silence and errors cost their own clips, nothing else; tried again, they are mended."""
    from .conftest import good

    def answer(question: str, tries: int):
        if "train:0" in question:
            return "Lovely captions!"
        if "train:1" in question:
            return None
        if "train:2" in question:
            return good(question) if tries else (500, {}, b"")
        return good(question)

    server.answer = answer
    path, texts = tmp_path / "pairs.jsonl", Texts(lambda key: [f"a {key}", f"a {key} thing", f"a {key} of any kind"])
    items = [item for item in scene_items("train:0:7") if item.key != "train:3"]

    def judge() -> Judge:
        return Judge(Endpoint(server.url, "stub", timeout=3, retries=1, backoff=0.01))

    tally = run(path, items, texts, judge(), gap=0)
    assert (tally.captioned, tally.kept, tally.failed) == (4, 4, 2)
    found = {one["key"]: one for one in lines(path)}
    assert list(found) == [item.key for item in items]
    assert found["train:0"]["error"]["kind"] == "judge"
    assert "'Lovely captions!'" in found["train:0"]["error"]["reason"]
    assert found["train:1"]["error"]["reason"] == "the judge gave no answer in 2 tries: timed out"
    assert [one["text"] for one in found["train:1"]["candidates"]] == texts.texts("train:1")
    assert [pair.key for pair in read_pairs(path)] == ["train:2", "train:4", "train:5", "train:6"]
    server.answer = good
    assert run(path, items, texts, judge(), gap=0, retry_failed=True).captioned == 2
    assert len(list(read_pairs(path))) == 6
    # A wrong key is no failure of a clip: the run ends, and what is done stays.
    server.answer = lambda *_: (401, {}, b"")
    with pytest.raises(OptionError, match="refuses the API key"):
        run(path, scene_items("train:0:20"), texts, judge(), gap=0)
    assert len(lines(path)) >= 6
    assert not any("API key" in line for line in path.read_text().splitlines())


def good_line(**changes: Any) -> dict[str, Any]:
    scores = {"factuality": 5, "fluency": 5, "consistency": 3, "total": 13.5}
    low = {"factuality": 1, "fluency": 2, "consistency": 0, "total": 3.1}
    record = {
        "key": "a",
        "source": "a.mp4",
        "candidates": [
            {"text": "right", "origins": ["greedy"], "scores": scores},
            {"text": "wrong", "origins": ["sample 0"], "scores": low},
        ],
        "chosen": "right",
        "rejected": "wrong",
        "gap": 10.4,
        "kept": True,
    }
    return {name: value for name, value in {**record, **changes}.items() if value is not ...}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("nonsense", "Expecting value"),
        ("[]", "Expected `object`"),
        ("\n", "Expecting value"),
        ("[" * 100_000, "recursion"),
        (good_line(key=...), "missing required field `key`"),
        (good_line(source=7), "Expected `str`, got `int` - at `$.source`"),
        (good_line(chosen=["right"]), "at `$.chosen`"),
        (good_line(gap="10"), "at `$.gap`"),
        (good_line(kept=...), "'kept' or 'gap' is missing"),
        (good_line(chosen=None, rejected=None), "is kept, but has no pair"),
        (good_line(rejected=None), "the rejected caption is none of the candidates"),
        (good_line(chosen="other"), "the chosen caption is none of the candidates"),
        (good_line(candidates=[]), "the chosen caption is none of the candidates"),
        (good_line(rejected="right"), "is not better"),
        (good_line(chosen="wrong", rejected="right"), "is not better"),
        (good_line(gap=4.0), "the gap is 10.4 by the scores, not 4"),
        (good_line(gap=float("nan")), "the gap is 10.4 by the scores, not nan"),
        (good_line(error={"kind": "judge", "reason": "?"}), "has an error and a pair"),
        (good_line(key="first"), "the key 'first' is that of line 1"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_a_malformed_file_is_refused_by_file_and_line(tmp_path: Path, line: Any, reason: str):
    path = tmp_path / "pairs.jsonl"
    text = line if isinstance(line, str) else json.dumps(line)
    path.write_text(json.dumps(good_line(key="first")) + "\n" + text + "\n")
    with pytest.raises(OptionError) as raised:
        list(read_pairs(path))
    assert str(raised.value).startswith(f"{path}: line 2: ")
    assert reason in str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_else_a_reader_meets(tmp_path: Path):
    path = tmp_path / "pairs.jsonl"
    with pytest.raises(OptionError, match=r"pairs.jsonl: cannot be read: No such file"):
        list(read_pairs(path))
    path.write_text(json.dumps(good_line(source="odd \udcff.mp4", more="fields")) + "\n")
    (pair,) = read_pairs(path)
    assert pair.source == "odd \udcff.mp4"
    path.write_bytes(b"\xff\xfe\n")
    with pytest.raises(OptionError, match="line 1: "):
        list(read_pairs(path))
