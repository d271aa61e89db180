"""The text of an answer as its tokens come."""

from dataclasses import dataclass, field

from garserve.inputs.tokenizer import GARTokenizer

_HALF = "\N{REPLACEMENT CHARACTER}"  # what an unfinished character at the end is decoded to: one, of up to 3 bytes
# Where a window begins within a character, its first 3 bytes are decoded otherwise than in the whole text. Eight
# tokens, each a byte or more, have a whole character, of at most 4 bytes, behind those.
_WINDOW = 8


@dataclass
class TextStream:
    """The text of one answer as its tokens come: all pieces together are what `garserve.Engine` returns.

    Only the last tokens are decoded again for each new one, so that an answer's cost grows with its length.
    """

    tokenizer: GARTokenizer
    stop_id: int
    _window: list[int] = field(default_factory=list)
    _sent: int = 0  # characters of the window's text

    def push(self, ids: list[int], *, finished: bool) -> str:
        """Take further tokens and return the text that they add; half a character waits for its other half."""
        if finished and ids and ids[-1] == self.stop_id:
            ids = ids[:-1]
        self._window += [token for token in ids if self.tokenizer.decode([token])]  # control tokens have no bytes
        text = self.tokenizer.decode(self._window)
        kept = 0 if finished else text.endswith(_HALF)
        piece = text[self._sent : len(text) - kept]
        if len(self._window) > 2 * _WINDOW:
            self._window = self._window[-_WINDOW:]
            text = self.tokenizer.decode(self._window)
        self._sent = len(text) - kept
        return piece
