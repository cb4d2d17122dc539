"""Metrics against hand-made corpora, facts on true and false captions, and what an interval must be."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
from intertitle.align import metrics
from intertitle.align.metrics import TITLES, difference, evaluate, tokenize
from intertitle.align.scenes import captions, draw_scene, facts
from intertitle.errors import OptionError

pytest.importorskip("pycocoevalcap")

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="no java")


@pytest.fixture(scope="module")
def scenes():
    return [draw_scene("test", index) for index in range(60)]


def best(scenes):
    return [captions(scene)[0] for scene in scenes]


def last(scenes):
    return [captions(scene)[-1] for scene in scenes]


def figures(scenes, texts, references=None):
    report = evaluate(scenes, texts, references, meteor=False, samples=200)
    return {name: figure.value for name, figure in report.figures.items()}


# --- n-gram metrics, by hand


def test_cider_by_hand(scenes):
    """Two clips of disjoint words: every n-gram is in one of the two, so that each has the weight log 2."""
    references = [["a b c d e"], ["p q r s t"]]
    perfect = figures(scenes[:2], ["A b c d e.", "p q, r s t"], references)
    assert perfect["cider"] == pytest.approx(10.0)
    # The text has a, b, c of a, b, c, d, e: cosines sqrt(n-grams of the text / n-grams of the reference) for n of 1 to
    # 3, none of four words; the lengths differ by 2, sigma is 6. The other clip has nothing right.
    cosines = math.sqrt(3 / 5) + math.sqrt(2 / 4) + math.sqrt(1 / 3)
    got = figures(scenes[:2], ["a b c", "x"], references)["cider"]
    assert got == pytest.approx(10 * cosines / 4 * math.exp(-(2**2) / (2 * 6**2)) / 2)


def test_bleu_and_rouge_by_hand(scenes):
    references = [["a b c d e", "a b"], ["p q r s t"]]
    got = figures(scenes[:2], ["a b c d x", "p q r s"], references)
    # Words right 4 + 4 of 5 + 4, pairs 3 + 3 of 4 + 3, threes 2 + 2 of 3 + 2, fours 1 + 1 of 2 + 1; 9 words for 10.
    bleu = (8 / 9 * 6 / 7 * 4 / 5 * 2 / 3) ** 0.25 * math.exp(1 - 10 / 9)
    assert got["bleu4"] == pytest.approx(bleu, rel=1e-6)
    # First clip: precision 4/5 and recall 4/5 of the long one, recall 1 of the short one; second: 4/4 and 4/5.
    scores = [(1 + 1.44) * p * r / (r + 1.44 * p) for p, r in ((4 / 5, 1.0), (1.0, 4 / 5))]
    assert got["rouge_l"] == pytest.approx(sum(scores) / 2)


def test_bleu_of_summed_counts_is_that_of_pycocoevalcap(scenes):
    from pycocoevalcap.bleu.bleu import Bleu

    texts, references = last(scenes), [captions(scene)[:3] for scene in scenes]
    made = {row: [" ".join(tokenize(text))] for row, text in enumerate(texts)}
    given = {row: [" ".join(tokenize(line)) for line in lines] for row, lines in enumerate(references)}
    want = Bleu(4).compute_score(given, made, verbose=0)[0][3]
    assert figures(scenes, texts, references)["bleu4"] == pytest.approx(want, rel=1e-9)


@needs_java
def test_our_tokens_are_those_of_the_java_tokenizer(scenes):
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    texts = [line for scene in scenes[:30] for line in captions(scene)]
    given = {row: [{"caption": text}] for row, text in enumerate(texts)}
    assert PTBTokenizer().tokenize(given) == {row: [" ".join(tokenize(text))] for row, text in enumerate(texts)}


@needs_java
def test_meteor_where_there_is_java(scenes):
    """One run for all, as Java takes seconds to begin: a text that its protocol could stumble over is only wrong."""
    odd = ["nothing of the kind", "", "||| \n", "\u00e9 \u4e16 \U0001f3a5", "a " * 300]
    report = evaluate(scenes[:8], [*best(scenes)[:2], *odd, best(scenes)[7]])
    assert report.absent == {}
    each = report.statistics["meteor"][:, 0]
    assert each[[0, 1, 7]] == pytest.approx(1.0)
    assert (each[2:7] < 0.2).all()
    assert (each[[3, 4, 5]] == 0).all()


def test_meteor_without_java(scenes, monkeypatch):
    monkeypatch.setattr(metrics.shutil, "which", lambda name: None)
    report = evaluate(scenes[:5], best(scenes[:5]))
    assert report.absent == {"meteor": "java is not on the path"}
    assert "meteor" not in report.figures
    assert ("METEOR", "absent: java is not on the path") in report.rows()


# --- facts and fluency


def test_perfect_captions(scenes):
    got = figures(scenes, best(scenes))
    assert (got["completeness"], got["invention"]) == (1.0, 0.0)
    assert (got["sound_completeness"], got["sound_invention"]) == (1.0, 0.0)
    assert (got["unread"], got["readable"]) == (0.0, 1.0)
    assert got["bleu4"] == pytest.approx(1.0)
    assert got["rouge_l"] == pytest.approx(1.0)


def test_captions_of_another_clip_do_worse_in_everything(scenes):
    texts = best(scenes)
    right, wrong = figures(scenes, texts), figures(scenes, [*texts[1:], texts[0]])
    for name in ("cider", "bleu4", "rouge_l", "completeness", "sound_completeness"):
        assert wrong[name] < 0.9 * right[name], name
    assert wrong["invention"] > 0.3
    assert wrong["sound_invention"] > 0.3
    # They are as well written.
    assert (wrong["unread"], wrong["repetition"]) == (right["unread"], right["repetition"])


def test_facts_are_counted_over_all_clips(scenes):
    """Half of the captions silent: the mentioned facts are those of the other half, of all."""
    texts = [text if row % 2 else "" for row, text in enumerate(best(scenes))]
    got = figures(scenes, texts)
    counts = [len(facts(scene)) for scene in scenes]
    assert got["completeness"] == pytest.approx(sum(counts[1::2]) / sum(counts))
    assert got["invention"] == 0


def test_one_false_statement_in_each_caption(scenes):
    """Of the facts of a scene all but one are mentioned, and one statement of as many is invented."""
    still = [scene for scene in scenes if scene.camera == "still"]
    texts = [text.replace("The camera stays still", "The camera pans left") for text in best(still)]
    assert all(text != true for text, true in zip(texts, best(still), strict=True))
    got = figures(still, texts)
    share = len(still) / sum(len(facts(scene)) for scene in still)
    assert got["invention"] == pytest.approx(share)
    assert got["completeness"] == pytest.approx(1 - share)
    assert (got["sound_completeness"], got["sound_invention"]) == (1, 0)


def test_fluency(scenes):
    got = figures(scenes[:2], ["a red red red red circle", "the glorp wibbles"])
    # Trigrams: a red red, twice red red red, red red circle; the glorp wibbles.
    assert got["repetition"] == pytest.approx(1 / 5)
    assert got["unread"] == 1.0
    assert got["readable"] == 0.5
    assert got["words"] == 4.5


@pytest.mark.parametrize("text", ["", "!!!", "||| \n", "\u00e9 \u4e16 \U0001f3a5", "a " * 300])
def test_any_text_can_be_scored(text, scenes):
    report = evaluate(scenes[:4], [text] * 4, meteor=False, samples=50)
    for figure in report.figures.values():
        assert all(map(math.isfinite, (figure.value, figure.low, figure.high)))


# --- intervals


def test_intervals_hold_the_value_and_shrink_with_clips(scenes):
    many = [draw_scene("test", index) for index in range(400)]
    rng = np.random.default_rng(0)

    def some(given):
        return [captions(scene)[int(rng.integers(5))] if rng.random() < 0.7 else "a red circle" for scene in given]

    small, large = (evaluate(given, some(given), meteor=False) for given in (many[:40], many))
    for name, figure in small.figures.items():
        assert figure.low <= figure.value <= figure.high, name
        other = large.figures[name]
        assert other.low <= other.value <= other.high, name
        if figure.high > figure.low:
            # Ten times the clips: about 0.32 of the width.
            assert other.high - other.low < 0.6 * (figure.high - figure.low), name


def test_the_interval_is_that_of_the_normal_approximation(scenes):
    report = evaluate(scenes, last(scenes), meteor=False, samples=4000)
    values = report.statistics["rouge_l"][:, 0]
    figure = report.figures["rouge_l"]
    assert figure.value == pytest.approx(values.mean())
    assert figure.high - figure.low == pytest.approx(2 * 1.96 * values.std() / math.sqrt(len(values)), rel=0.1)


def test_same_seed_same_interval(scenes):
    one, again = (evaluate(scenes, last(scenes), meteor=False, samples=100) for _ in range(2))
    assert one == again
    assert one != evaluate(scenes, last(scenes), meteor=False, samples=100, seed=1)


def test_differences_are_paired(scenes):
    """A small change in every clip is clear in pairs, though the two intervals overlap."""
    full, short = best(scenes), [text.rsplit(" ", 2)[0] for text in best(scenes)]
    one, other = (evaluate(scenes, texts, meteor=False) for texts in (full, short))
    found = difference(one, other)
    for name, figure in found.items():
        assert figure.value == pytest.approx(one.figures[name].value - other.figures[name].value), name
        assert figure.low <= figure.value <= figure.high, name
    assert one.figures["words"].low < other.figures["words"].high
    assert (found["words"].low, found["words"].high) == pytest.approx((2, 2))
    assert found["completeness"].low > 0
    same = difference(one, one)
    assert all((figure.value, figure.low, figure.high) == (0, 0, 0) for figure in same.values())
    back = difference(other, one)
    assert back["completeness"].low == pytest.approx(-found["completeness"].high)


# --- reports and mistakes


def test_report_as_json_and_as_rows(scenes):
    report = evaluate(scenes[:5], best(scenes[:5]), meteor=False)
    read = json.loads(json.dumps(report.to_json()))
    assert read["clips"] == 5
    assert read["figures"]["completeness"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert read["absent"] == {"meteor": "not asked for"}
    assert [title for title, _ in report.rows()] == list(TITLES.values())
    assert ("facts mentioned", "1.000 [1.000, 1.000]") in report.rows()


def test_what_cannot_be_scored(scenes):
    with pytest.raises(OptionError, match="1 clips cannot be scored"):
        evaluate(scenes[:1], best(scenes[:1]))
    with pytest.raises(OptionError, match="60 scenes, 59 texts"):
        evaluate(scenes, best(scenes)[1:])
    with pytest.raises(OptionError, match="one of each is needed"):
        evaluate(scenes[:2], best(scenes[:2]), [["a"], []])
    one, other = (evaluate(given, best(given), meteor=False, samples=10) for given in (scenes[:5], scenes[1:6]))
    with pytest.raises(OptionError, match="different scenes or references"):
        difference(one, other)
