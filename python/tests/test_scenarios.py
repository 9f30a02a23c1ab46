"""The ceiling, and the dialogues that scenarios speak: what needs no engine."""

from ceiling import Ceiling
from dialogues import Dialogues, turns


def test_whole_blocks_are_known_and_never_the_last_token() -> None:
    ceiling = Ceiling(block_tokens=4)
    assert ceiling.tokens(range(9)) == 0
    ceiling.learn(range(8))
    assert ceiling.tokens(range(9)) == 8
    # The last token is computed, so the block it ends is no use.
    assert ceiling.tokens(range(8)) == 4
    ceiling.learn(range(11))
    assert ceiling.tokens(range(100)) == 8


def test_a_block_is_known_only_behind_the_same_tokens() -> None:
    ceiling = Ceiling(block_tokens=2)
    ceiling.learn([1, 2, 3, 4])
    assert ceiling.tokens([1, 2, 3, 4, 5]) == 4
    assert ceiling.tokens([9, 2, 3, 4, 5]) == 0
    assert ceiling.tokens([3, 4, 1, 2, 5]) == 0


def test_dialogues_are_cut_at_speakers_in_both_languages() -> None:
    assert turns("User: a\nb\nAssistant: c\nUser: d") == [
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d"},
    ]
    chinese = "用户：你好\n客服：不客气。"  # noqa: RUF001
    assert [said["role"] for said in turns(chinese)] == ["user", "assistant"]


def test_sessions_have_the_turns_asked_for_and_take_no_dialogue_twice() -> None:
    dialogues = Dialogues()
    plain = [dialogues.plain(language, 6) for language in ("en", "zh", "en", "zh")]
    assert all(len(session.says) == 6 for session in plain)
    assert len({session.says[0] for session in plain}) == 4
    long = dialogues.long("zh", 2_000, 3)
    assert sum(len(said["content"]) for said in long.opening) >= 2_000
    assert [said["role"] for said in long.opening[:2]] == ["user", "assistant"]
