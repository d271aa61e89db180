"""The checkpoint's tokenizer, used so that text from users can never become a control token."""

import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer

from garserve.config import GARConfig, read_json
from garserve.errors import CheckpointError

PROMPT_NAME = re.compile(r"<Prompt([0-9]+)>")


class GARTokenizer:
    """Byte-level BPE of a checkpoint with its special tokens looked up by name, never matched in text."""

    def __init__(self, path: Path, config: GARConfig) -> None:
        data = read_json(path)
        try:
            self._full = Tokenizer.from_str(json.dumps(data))
            # A twin that knows no special token at all: whatever a user writes comes out of it as ordinary text.
            self._text = Tokenizer.from_str(json.dumps({**data, "added_tokens": [], "post_processor": None}))
            self._text.no_truncation()
            self._text.no_padding()
            self._special = {str(token["content"]): int(token["id"]) for token in data["added_tokens"]}
        except Exception as error:  # the library raises bare Exceptions
            raise CheckpointError(f"{path}: not a tokenizer ({error})") from None
        self.prompt_names = [
            name for name in map("<Prompt{}>".format, range(config.prompt_count)) if name in self._special
        ]
        if len(self.prompt_names) != config.prompt_count:
            raise CheckpointError(f"{path}: expected the tokens <Prompt0> .. <Prompt{config.prompt_count - 1}>")

        for name in ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"):
            if name not in self._special:
                raise CheckpointError(f"{path}: no special token {name}")

    def special(self, name: str) -> int:
        """Return the id of a special token; CheckpointError where the tokenizer has none of that name."""
        try:
            return self._special[name]
        except KeyError:
            raise CheckpointError(f"tokenizer.json: no special token {name}") from None

    def encode(self, text: str) -> list[int]:
        """Encode text in which `<PromptK>` (and `<NO_Prompt>`) are names of regions and nothing else is special."""
        ids: list[int] = []
        for piece in self._names.split(text):
            if piece in self._known_names:
                ids.append(self._special[piece])
            elif piece:
                ids.extend(self._text.encode(piece, add_special_tokens=False).ids)
        return ids

    def encode_parts(self, parts: Sequence[str | int]) -> list[int]:
        """Encode a prompt given as texts and token ids; neighbouring texts are joined before they are encoded."""
        ids: list[int] = []
        pending = ""
        for part in parts:
            if isinstance(part, str):
                pending += part
                continue
            if pending:
                ids.extend(self.encode(pending))
                pending = ""
            ids.append(part)
        return ids + (self.encode(pending) if pending else [])

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of generated tokens: control tokens are left out, names of regions stay."""
        return str(self._full.decode([token for token in ids if token not in self._hidden], skip_special_tokens=False))

    @cached_property
    def _known_names(self) -> frozenset[str]:
        return frozenset(name for name in (*self.prompt_names, "<NO_Prompt>") if name in self._special)

    @cached_property
    def _names(self) -> re.Pattern[str]:
        return re.compile("(" + "|".join(map(re.escape, sorted(self._known_names))) + ")")

    @cached_property
    def _hidden(self) -> frozenset[int]:
        return frozenset(token for name, token in self._special.items() if name not in self._known_names)
