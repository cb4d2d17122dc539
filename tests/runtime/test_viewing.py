"""How a clip is viewed: budgets told apart by their type, their text, and what cannot be."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields
from fractions import Fraction
from typing import Any

import intertitle
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from intertitle.errors import OptionError
from intertitle.runtime.prepared import MediaOptions, ViewingOptions, viewing_and_arrays, viewing_of
from intertitle.runtime.viewing import Count, Share, Viewing, parse_budget


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("50%", Share(0.5)),
        ("100%", Share(1.0)),
        ("1%", Share(0.01)),
        ("33.3%", Share(0.333)),
        (" 7% ", Share(0.07)),
        ("1", Count(1)),
        ("256", Count(256)),
    ],
)
def test_a_text_says_which_kind_it_is(text: str, budget: Share | Count):
    assert parse_budget(text) == budget
    assert type(parse_budget(text)) is type(budget)
    assert str(budget) == text.strip()


@pytest.mark.parametrize(
    "text", ["", "%", "0.5", "1.0", "-1", "+1", "1e3", "nan", "nan%", "-5%", "50 percent", "½", "٣", "0x10", "9" * 5000]
)
def test_any_other_text_is_refused_with_both_forms(text: str):
    with pytest.raises(OptionError, match="a share such as 50% or a number such as 256, not"):
        parse_budget(text)


@pytest.mark.parametrize("text", ["0", "0%", "101%", "0.0%"])
def test_budgets_that_cannot_be(text: str):
    with pytest.raises(OptionError, match=r"visual tokens is (above 0|a whole number from 1 on)"):
        parse_budget(text)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (Share, True),
        (Share, "1"),
        (Share, 1.5),
        (Share, float("nan")),
        (Share, 10**400),
        (Share, Fraction(1, 10**400)),
        (Count, 1.0),
        (Count, True),
        (Count, np.int64(0)),
        (Count, np.float32(5)),
    ],
)
def test_values_that_cannot_be(kind: Any, value: object):
    with pytest.raises(OptionError):
        kind(value)


@given(st.integers(1, 1000), st.integers(1, 10_000))
def test_a_share_is_read_back_and_rounds_as_fractions_do(thousandths: int, available: int):
    share = parse_budget(f"{thousandths / 10:g}%")
    assert isinstance(share, Share)
    assert share.ratio == thousandths / 1000
    assert parse_budget(str(share)) == share
    assert abs(share.of(available) - max(Fraction(thousandths, 1000) * available, 1)) <= Fraction(1, 2)


@given(st.floats(0, 1, exclude_min=True))
def test_the_text_of_any_share_is_read_back(ratio: float):
    share = Share(ratio)
    assert "e" not in str(share)
    assert parse_budget(str(share)) == share


def test_the_text_of_a_small_share_has_no_exponent():
    assert [str(Share(ratio)) for ratio in (1e-8, 0.333, 0.07, 1.0)] == ["0.000001%", "33.3%", "7%", "100%"]


def test_numbers_of_numpy_are_budgets():
    for budget, plain in ((Count(np.int64(5)), Count(5)), (Share(np.float32(0.5)), Share(0.5)), (Share(1), Share(1.0))):  # type: ignore[arg-type]
        assert budget == plain
        assert str(budget) == str(plain)
        assert msgspec.json.encode(budget) == msgspec.json.encode(plain)


def test_how_many_tokens_a_budget_keeps():
    assert [Share(ratio).of(1352) for ratio in (1.0, 0.5, 0.0001)] == [1352, 676, 1]
    assert [Count(number).of(1352) for number in (1, 100, 5000)] == [1, 100, 1352]
    # Three of eight places.
    assert (Share(0.5).scaled(3, 8), Count(40).scaled(3, 8), Count(1).scaled(3, 8)) == (Share(0.5), Count(15), Count(1))


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"start": -1.0}, r"start of a span is seconds from 0 to 1e\+12, not -1.0"),
        ({"start": float("nan")}, "from 0 to"),
        ({"end": float("inf")}, "from 0 to"),
        ({"start": 1e300}, "start of a span is seconds from 0 to"),
        ({"end": 1.1e12}, "end of a span is seconds from 0 to"),
        ({"end": 0.0}, "ends after it starts"),
        ({"start": 3.0, "end": 3.0}, "ends after it starts"),
        ({"duplicates": -1.0}, "0 to 255"),
        ({"duplicates": float("nan")}, "0 to 255"),
        ({"start": "1"}, "start is a number, not '1'"),
        ({"duplicates": True}, "duplicates is a number, not True"),
        ({"start": 10**400}, "start is a number below 1.8e308"),
        ({"end": 10**400}, "end is a number below 1.8e308"),
        ({"duplicates": 10**400}, "duplicates is a number below 1.8e308"),
        ({"audio": "no"}, "audio is True or False, not 'no'"),
        ({"visual_tokens": 0.5}, r"is Share\(0.5\) for half of them or Count\(256\) for 256, not 0.5"),
        ({"visual_tokens": 1}, "not 1$"),
        ({"visual_tokens": "50%"}, "not '50%'$"),
    ],
)
def test_a_viewing_that_cannot_be(given: dict[str, Any], reason: str):
    with pytest.raises(OptionError, match=reason):
        Viewing(**given)


def test_a_viewing_is_a_record():
    viewing = intertitle.Viewing(audio=False, start=1.0, visual_tokens=intertitle.Share(0.5))
    assert viewing == Viewing(False, 1.0, visual_tokens=Share(0.5))
    with pytest.raises(FrozenInstanceError):
        viewing.audio = True  # type: ignore[misc]
    for budget in (Share(0.5), Count(3), None):
        sent = msgspec.msgpack.encode(Viewing(start=np.int64(3), visual_tokens=budget))  # type: ignore[arg-type]
        assert msgspec.msgpack.decode(sent, type=Viewing).visual_tokens == budget


def test_keywords_take_the_place_of_its_fields():
    assert viewing_of({}) == Viewing()
    assert viewing_of({"viewing": None, "audio": False}) == Viewing(audio=False)
    assert viewing_of({"viewing": Viewing(start=1.0, end=2.0), "end": None}) == Viewing(start=1.0)
    assert {*ViewingOptions.__annotations__} == {"viewing", *(field.name for field in fields(Viewing))}
    media = MediaOptions(frames=[], seconds=3.0, audio=False)
    assert viewing_and_arrays(media) == (Viewing(audio=False), {"frames": [], "seconds": 3.0})
    with pytest.raises(TypeError, match="sound"):
        viewing_of({"sound": False})
    for other in ("x", "", {}, 0):
        with pytest.raises(OptionError, match="viewing is a Viewing, such as"):
            viewing_of({"viewing": other})


def test_one_viewing_for_captions_and_batches(compiled, expected, tmp_path):
    from intertitle.calibration.render import random_scene, write_clip

    path = write_clip(random_scene(1, size=(64, 48), fps=8, seconds=3.0), tmp_path / "a.mp4") or tmp_path / "a.mp4"
    captioner = intertitle.Captioner.load(compiled("av-qwen2"))
    how = intertitle.Decoding(max_new_tokens=4)
    viewing = Viewing(audio=False, start=1.0, end=2.0, visual_tokens=Count(5))
    caption = captioner.caption(path, viewing=viewing, decoding=how)
    named = captioner.caption(path, audio=False, start=1.0, end=2.0, visual_tokens=Count(5), decoding=how)
    assert caption.token_ids == named.token_ids
    assert (caption.start, caption.seconds, caption.mode) == (1.0, 1.0, "video")
    prompt = captioner.caption(path, audio=False, start=1.0, end=2.0, decoding=how).prompt_tokens
    assert prompt - caption.prompt_tokens == 16 - 5
    items = [path, intertitle.BatchItem(path, start=0.5), intertitle.BatchItem(path, start=2.0, end=1.0)]
    found = {one.index: one for one in captioner.caption_batch(items, viewing=viewing, decoding=how)}
    assert found[0].caption is not None
    assert found[0].caption.token_ids == caption.token_ids
    # An item's own span takes the place of the batch's, its end too.
    assert found[1].caption is not None
    assert (found[1].caption.start, found[1].caption.seconds) == (0.5, 2.5)
    assert "ends after it starts" in str(found[2].error)
    frames, times = expected("av-qwen2")["frames_uint8"], np.arange(8) / 2
    clip = captioner.read(frames=frames, frame_times=times, seconds=4.0)
    assert clip.timing is not None
    assert (clip.seconds, clip.timing.seconds, clip.timing.times.tolist()) == (4.0, 4.0, times.tolist())
    said = captioner.caption(frames=frames, frame_times=times, seconds=4.0, decoding=how)
    assert said.seconds == 4.0
    assert said.token_ids == captioner.caption(frames=frames, decoding=how).token_ids
    with pytest.raises(OptionError, match="are for arrays: a file says them itself"):
        captioner.read(path, seconds=1.5)
