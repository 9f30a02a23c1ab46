"""Prompts of an exact length in tokens, made of real dialogues.

Every prompt begins with the model's BOS token (the tokenizer made from the GGUF adds none) and
then runs through dialogues that no other prompt uses: no two share a block, so that each measures
its own hit and nobody else's.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

BOS_TOKEN = 2
LANGUAGES = ("en", "zh")
DIALOGUES = Path(__file__).parent / "prompts" / "dialogues.jsonl"


class Tokenizer(Protocol):
    """The part of a tokenizer that is used here."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text."""


@dataclass(frozen=True)
class Prompt:
    """One prompt, as the token ids that are sent."""

    name: str
    language: str
    tokens: tuple[int, ...]

    def full_block_tokens(self, block_tokens: int) -> int:
        """Tokens that another engine's cache can give back: all but the last, in whole blocks."""
        return (len(self.tokens) - 1) // block_tokens * block_tokens


class PromptMaker:
    """Cuts prompts off the dialogues, language by language."""

    def __init__(self, tokenizer: Tokenizer, dialogues: Path = DIALOGUES) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[str, list[str]] = {language: [] for language in LANGUAGES}
        with dialogues.open(encoding="utf-8") as lines:
            for line in lines:
                dialogue = json.loads(line)
                self._texts[dialogue["language"]].append(dialogue["text"])

    def make(self, name: str, language: str, length_tokens: int) -> Prompt:
        """The next prompt of this length; the dialogues it takes are gone afterwards."""
        tokens = [BOS_TOKEN]
        texts = self._texts[language]
        while len(tokens) < length_tokens:
            if not texts:
                raise SystemExit(f"{DIALOGUES.name} has too little {language} text for {name}")
            tokens += self._tokenizer.encode(texts.pop(0), add_special_tokens=False)
        return Prompt(name, language, tuple(tokens[:length_tokens]))

    def series(self, lengths_tokens: list[int], prompts_a_length: int) -> list[Prompt]:
        """Prompts of all lengths, the languages taking turns."""
        return [
            self.make(f"{length}-{number}", LANGUAGES[number % len(LANGUAGES)], length)
            for length in lengths_tokens
            for number in range(prompts_a_length)
        ]
