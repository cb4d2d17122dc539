"""From tokens to a caption's text, as they come: detokenization, stop texts, and why it ended."""

from __future__ import annotations

from typing import Literal

from tokenizers import Tokenizer

from .decoding import Token
from .text import IncrementalDecoder, StopStrings

FinishReason = Literal["stop", "length", "stop_string", "deadline", "closed"]


class Transcript:
    """The text of one caption while it is generated.

    ``push`` takes tokens; ``text`` is what can be shown so far. After ``finish`` the text is whole and ``reason`` says
    why it ended: an end-of-sequence token, a stop text, or the limit of tokens.
    """

    def __init__(self, tokenizer: Tokenizer, stops: tuple[str, ...]) -> None:
        self.tokens: list[Token] = []
        self.text = ""
        self.reason: FinishReason = "length"
        self._decoder, self._stops = IncrementalDecoder(tokenizer), StopStrings(stops)

    def push(self, token: Token) -> bool:
        """Take a token; True when the caption ends with it before the decoder would end it."""
        self.tokens.append(token)
        if token.is_eos:
            self.reason = "stop"
            return True
        piece, stopped = self._stops.push(self._decoder.push(token.id))
        self.text += piece
        if stopped:
            self.reason = "stop_string"
        return stopped

    def finish(self) -> None:
        """No token follows: show what was held back."""
        if self.reason == "stop_string":
            return
        piece, stopped = self._stops.push(self._decoder.finish())
        self.text += piece + self._stops.finish()
        if stopped:
            self.reason = "stop_string"

    def stop(self, reason: FinishReason) -> None:
        """It is broken off here. A character whose bytes are not all there is left out."""
        self.text += self._stops.finish()
        self.reason = reason


def contains_stop(tokenizer: Tokenizer, stops: tuple[str, ...], token_ids: list[int]) -> bool:
    """Whether one of the stop texts is in the text of the tokens."""
    text = tokenizer.decode(token_ids, skip_special_tokens=True)
    return any(stop in text for stop in stops)
