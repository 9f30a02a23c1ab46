"""Real dialogues as what users say, English and Chinese in turn, and openings for the long form."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DIALOGUES = Path(__file__).parent.parent.parent / "e2e" / "prompts" / "dialogues.jsonl"
LANGUAGES = ("en", "zh")

Message = dict[str, str]
"""Of the OpenAI chat endpoint: role and content."""

_TURN = re.compile(r"\n(?=(?:User|Assistant): |(?:用户|客服)：)")  # noqa: RUF001
_SPEAKER = re.compile(r"^(User|Assistant|用户|客服)[:：] ?")  # noqa: RUF001


@dataclass
class Session:
    """One user's conversation: what stands before it, and what the user will say."""

    language: str
    opening: list[Message]
    """Messages before the first live turn."""
    says: list[str]


def turns(text: str) -> list[Message]:
    """The messages of a dialogue that is written out."""
    messages = []
    for part in _TURN.split(text):
        speaker = _SPEAKER.match(part)
        if speaker is None:
            continue
        role = "user" if speaker[1] in ("User", "用户") else "assistant"
        messages.append({"role": role, "content": part[speaker.end() :].strip()})
    return messages


class Dialogues:
    """Hands out dialogues, each once."""

    def __init__(self, path: Path = DIALOGUES) -> None:
        self._left: dict[str, Iterator[list[Message]]] = {}
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for language in LANGUAGES:
            texts = [line["text"] for line in lines if line["language"] == language]
            self._left[language] = iter([turns(text) for text in texts])

    def take(self, language: str) -> list[Message]:
        """The next dialogue of this language."""
        try:
            return next(self._left[language])
        except StopIteration:
            raise SystemExit(f"no more {language} dialogues: give fewer sessions") from None

    def plain(self, language: str, turns_min: int) -> Session:
        """A session that begins with nothing; dialogues are joined until it has enough turns."""
        says: list[str] = []
        while len(says) < turns_min:
            says += [said["content"] for said in self.take(language) if said["role"] == "user"]
        return Session(language, [], says[:turns_min])

    def long(self, language: str, opening_characters: int, turns_min: int) -> Session:
        """A session with a history: earlier dialogues joined, asked and answered."""
        history: list[Message] = []
        while sum(len(said["content"]) for said in history) < opening_characters:
            dialogue = self.take(language)
            history += dialogue[: len(dialogue) // 2 * 2]
        session = self.plain(language, turns_min)
        session.opening = history
        return session

    def document(self, characters: int) -> str:
        """A text to open with: what a service's own instructions or a document would be."""
        text = ""
        while len(text) < characters:
            text += "\n".join(said["content"] for said in self.take("en")) + "\n\n"
        return text[:characters]
