"""Characters to tokens: hand-derived cases, and every token's bytes counted by a second path."""

import random

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from trl_extensions.tnt.data import check_spans, cover_text, negative_tokens


# One character of 1, 2, 3 and 4 bytes, a flag (two characters), a skin tone, a family joined by U+200D, a loose accent
TEXTS = [
    "Put the egg here, not there.",
    "naïve café — 日本語 eggs",
    "👩‍👩‍👧 eggs 🇩🇪 and 👍🏽!",
    "e\u0301clair\n\n  two  spaces\tand tabs ",
    "👧",
]


def byte_of() -> dict[str, int]:
    """The byte that each letter of a byte-level vocabulary stands for: printable ones themselves, others from 256."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def negative_by_bytes(tokens: list[str], text: str, spans: list[tuple[int, int]]) -> list[bool]:
    """Reads the tokens one by one into bytes and marks those that hold a byte of a span."""
    letters, data = byte_of(), b""
    unwanted = {
        byte
        for start, end in spans
        for byte in range(len(text[:start].encode()), len(text[:end].encode()))
    }  # fmt: skip
    marks = []
    for token in tokens:
        begin = len(data)
        data += bytes(letters[letter] for letter in token)
        marks.append(not unwanted.isdisjoint(range(begin, len(data))))
    assert data.decode() == text
    return marks


def tokens_and_offsets(tokenizer, text):
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return tokenizer.convert_ids_to_tokens(encoded["input_ids"]), encoded["offset_mapping"]


class TestOverlap:
    """The tokens of "not here": "not" and " here", as byte-level tokenizers cut it."""

    OFFSETS = ((0, 3), (3, 8))

    @pytest.mark.parametrize(
        ("spans", "expected"),
        [
            ([], [False, False]),
            ([(4, 8)], [False, True]),  # "here": the token with its space
            ([(0, 3)], [True, False]),  # "not": its end is the beginning of " here"
            ([(3, 4)], [False, True]),  # the space alone belongs to " here"
            ([(2, 4)], [True, True]),  # "t "
            ([(6, 7)], [False, True]),  # in the middle of " here"
            ([(0, 1), (1, 2)], [True, False]),  # touching
            ([(0, 2), (1, 5)], [True, True]),  # overlapping
            ([(5, 6), (0, 1)], [True, True]),  # in any order
            ([(1, 1)], [False, False]),  # empty, inside a token
            ([(3, 3)], [False, False]),  # empty, between two
            ([(0, 8)], [True, True]),
        ],
    )
    def test_by_hand(self, spans, expected):
        assert negative_tokens(self.OFFSETS, spans) == expected

    def test_tokens_without_characters(self):
        assert negative_tokens([(0, 0), (0, 3), (2, 2), (3, 3)], [(0, 3)]) == [False, True, False, False]

    def test_the_bytes_of_a_character_share_its_fate(self, tiny_tokenizer):
        tokens, offsets = tokens_and_offsets(tiny_tokenizer, "x日y")
        assert len(tokens) == 5  # three of them bytes of one character
        assert negative_tokens(offsets, [(1, 2)]) == [False, True, True, True, False]
        assert negative_tokens(offsets, [(0, 1)]) == [True, False, False, False, False]

    def test_a_part_of_a_joined_emoji(self, tiny_tokenizer):
        """A family is woman (4 bytes), joiner (3), woman (4), joiner (3), girl (4); the span is the first joiner."""
        text = "👩‍👩‍👧"
        tokens, offsets = tokens_and_offsets(tiny_tokenizer, text)
        assert len(text) == 5 and len(tokens) == 18
        assert negative_tokens(offsets, [(1, 2)]) == [False] * 4 + [True] * 3 + [False] * 11

    @pytest.mark.parametrize("text", TEXTS)
    def test_all_spans_against_bytes(self, tiny_tokenizer, text):
        tokens, offsets = tokens_and_offsets(tiny_tokenizer, text)
        for start in range(len(text) + 1):
            for end in range(start, len(text) + 1):
                expected = negative_by_bytes(tokens, text, [(start, end)])
                assert negative_tokens(cover_text(offsets, text), [(start, end)]) == expected, (start, end)

    @pytest.mark.parametrize("text", TEXTS)
    def test_many_spans_against_bytes(self, tiny_tokenizer, text):
        tokens, offsets = tokens_and_offsets(tiny_tokenizer, text)
        rng = random.Random(0)
        for _ in range(100):
            spans = [tuple(sorted(rng.choices(range(len(text) + 1), k=2))) for _ in range(rng.randint(0, 4))]
            expected = negative_by_bytes(tokens, text, spans)
            assert negative_tokens(cover_text(offsets, text), spans) == expected, spans


class TestCover:
    """Characters that a tokenizer reports for no token."""

    def test_by_hand(self):
        assert cover_text([(0, 2), (3, 5)], "ab cd") == [(0, 2), (2, 5)]  # a space goes to the token behind it
        assert cover_text([(0, 1), (2, 3)], "e\u0301x") == [(0, 2), (2, 3)]  # an accent to the one before
        assert cover_text([(0, 1), (0, 1), (3, 4)], "e\u0301 x") == [(0, 2), (0, 2), (2, 4)]  # both bytes of it
        assert cover_text([(1, 2)], "\u0301x") == [(0, 2)]  # nothing before it
        assert cover_text([(0, 1)], "e\u0301") == [(0, 2)]  # nothing behind it
        assert cover_text([(0, 1), (2, 2)], "a ") == [(0, 1), (1, 2)]  # a space whose offsets were trimmed away
        assert cover_text([], "") == []

    @pytest.mark.parametrize(
        "offsets", [[(0, 2), (2, 5)], [(0, 1), (0, 1), (1, 5)], [(0, 5), (0, 5)], [(0, 5), (0, 3)]]
    )
    def test_what_covers_everything_stays(self, offsets):
        assert cover_text(offsets, "ab cd") == offsets

    @pytest.mark.parametrize("text", TEXTS)
    def test_trimmed_offsets_are_restored(self, tiny_tokenizer, text):
        whole = tokens_and_offsets(tiny_tokenizer, text)
        tiny_tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
        trimmed = tokens_and_offsets(tiny_tokenizer, text)
        assert trimmed[0] == whole[0] and (trimmed[1] != whole[1]) == (" " in text)
        assert cover_text(trimmed[1], text) == whole[1]

    def test_an_accent_that_normalisation_merges(self, tiny_tokenizer):
        """Under NFC e + U+0301 is one character of two bytes, and its two tokens must know of both."""
        tiny_tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
        text = "ae\u0301 b"
        tokens, offsets = tokens_and_offsets(tiny_tokenizer, text)
        assert tokens[:3] == ["a", "Ã", "©"]
        for span in [(1, 2), (2, 3), (1, 3)]:
            marks = negative_tokens(cover_text(offsets, text), [span])
            assert marks[:3] == [False, True, True] and not any(marks[3:])

    def test_a_vocabulary_of_words_and_fallback_bytes(self):
        """As Llama 2 cuts text: a space is part of the word behind it, and unknown characters are bytes."""
        vocab = {"<unk>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)}
        vocab |= {piece: 257 + i for i, piece in enumerate(["▁", "e", "g", "s", "eg", "▁eg", "▁egg"])}
        merges = [("e", "g"), ("▁", "eg"), ("▁eg", "g")]
        backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
        text = "egg 👧 eggs"
        encoded = backend.encode(text)
        assert encoded.tokens == ["▁egg", "▁", "<0xF0>", "<0x9F>", "<0x91>", "<0xA7>", "▁egg", "s"]
        offsets = cover_text(encoded.offsets, text)
        assert negative_tokens(offsets, [(4, 5)]) == [False, False, True, True, True, True, False, False]
        assert negative_tokens(offsets, [(8, 9)]) == [False] * 6 + [True, False]
        assert negative_tokens(offsets, [(0, 1)]) == [True] + [False] * 7


class TestCheck:
    @pytest.mark.parametrize(
        "spans",
        [
            [[0, 2], [2, 5]],
            [(0, 2), (2, 5)],
            ([0, 2], [2, 5]),
            np.array([[0, 2], [2, 5]]),
            [np.array([0, 2], dtype=np.int32), [np.int64(2), np.uint8(5)]],
        ],
    )
    def test_what_is_accepted(self, spans):
        checked = check_spans(spans, 5, "row 0")
        assert checked == [(0, 2), (2, 5)]
        assert {type(offset) for span in checked for offset in span} == {int}

    def test_none_and_nothing(self):
        assert check_spans(None, 5, "row 0") == check_spans([], 5, "row 0") == []
        assert check_spans([[0, 0], [5, 5]], 5, "row 0") == [(0, 0), (5, 5)]
        assert check_spans([[0, 0]], 0, "row 0") == [(0, 0)]

    @pytest.mark.parametrize(
        ("span", "message"),
        [
            ([3, 2], r"is reversed: it starts at 3, behind its end 2"),
            ([-1, 2], r"is \[-1, 2\), outside the completion, which has 5 characters"),
            ([2, 6], r"is \[2, 6\), outside the completion, which has 5 characters"),
            ([7, 9], r"outside the completion"),
            ([0.0, 2.0], r"must hold two integers .*, got \[0.0, 2.0\]"),
            ([0, True], "must hold two integers"),
            ([np.float32(0), np.float32(2)], "must hold two integers"),
            (np.array([False, True]), "must hold two integers"),
            (["0", "2"], "must hold two integers"),
            ([0, None], "must hold two integers"),
            ([0, 1, 2], r"must be a pair \[start, end\]"),
            ([0], r"must be a pair"),
            (3, r"must be a pair"),
            (None, r"must be a pair"),
            ("02", r"must be a pair"),
            ({"start": 0, "end": 2}, r"must be a pair .*'start': 0"),
            ([0, "a" * 500 + "\n"], "must hold two integers"),
        ],
    )
    def test_errors_name_row_and_span(self, span, message):
        with pytest.raises(ValueError, match=message) as caught:
            check_spans([[0, 2], span], 5, "train row 7")
        assert str(caught.value).startswith("train row 7: `negative_spans[1]` ")
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300

    @pytest.mark.parametrize("spans", ["0-2", 3, {"start": 0, "end": 2}])
    def test_no_list_at_all(self, spans):
        with pytest.raises(ValueError, match=r"row 7: `negative_spans` must be a list of \[start, end\] pairs"):
            check_spans(spans, 5, "row 7")
