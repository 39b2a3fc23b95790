import json

import pytest

from trl_extensions.tnt.annotate.phrases import PhraseAnnotator, inflected_forms, load_phrases


def found(text, *phrases, **options):
    [spans] = PhraseAnnotator(phrases, **options).annotate([text], [""])
    return [text[span.start : span.end] for span in spans]


@pytest.mark.parametrize(
    "text",
    [
        "cat",
        "A cat.",
        "(cat)",
        "'cat'",
        "“cat”",
        "_cat_",
        "**cat**",
        "cat-like",
        "cat's",
        "cat’s",
        "the\ncat,",
        "🐈cat🐈",
        "❤️cat",
    ],
)
def test_a_whole_word_beside_anything_but_letters_and_digits(text):
    assert found(text, "cat") == ["cat"]


@pytest.mark.parametrize("text", ["category", "bobcat", "catß", "écat", "cat7", "cat́s", "कcat", "concatenate", "CATS"])
def test_not_inside_a_longer_word(text):
    assert found(text, "cat") == []
    assert [part.lower() for part in found(text, "cat", whole_words=False)] == ["cat"]


def test_an_accent_written_as_a_character_of_its_own_belongs_to_its_letter():
    assert found("café", "cafe") == []  # e + combining acute
    assert found("नमस्ते जी", "नमस्त") == []  # cut before a vowel sign
    assert found("नमस्ते जी", "नमस्ते") == ["नमस्ते"]


@pytest.mark.parametrize(
    ("text", "phrase", "expected"),
    [
        ("I can't.", "can", []),
        ("I can’t.", "can", []),
        ("Don't!", "don", []),
        ("Can 'they'?", "can", ["Can"]),
        ("he'll win", "he", ["he"]),
        ("You can't do it", "can't", ["can't"]),
        ("You can’t do it", "can't", ["can’t"]),
        ("You can't do it", "can’t", ["can't"]),
        ("here's one", "here’s", ["here's"]),
    ],
)
def test_apostrophes(text, phrase, expected):
    assert found(text, phrase) == expected


@pytest.mark.parametrize(
    ("text", "phrase", "expected"),
    [
        ("C++ and C++17", "c++", ["C++", "C++"]),
        ("vitamin c", "c++", []),
        ("ObjectiveC++", "c++", []),  # its first character is a letter
        ("#win is #winning", "#win", ["#win"]),
        ("so#win", "#win", ["#win"]),  # none before "#"
        ("wait... what", "...", ["..."]),
        ("a.b axb", "a.b", ["a.b"]),
        ("$5 or 5$", "5$", ["5$"]),
    ],
)
def test_phrases_that_begin_or_end_with_other_characters(text, phrase, expected):
    assert found(text, phrase) == expected


def test_white_space_inside_a_phrase_is_flexible():
    for text in ("as an AI", "As  an\nAI", "as\tan\u00a0ai"):
        assert found(f"Well, {text} model", " as  an AI ") == [text]
    assert found("asan AI", "as an AI") == []


def test_case_can_count():
    assert found("Polish the polish", "polish") == ["Polish", "polish"]
    assert found("Polish the polish", "polish", ignore_case=False) == ["polish"]
    assert found("Größe größe GRÖẞE", "GRÖSSE") == []
    assert found("ÉLAN élan", "Élan") == ["ÉLAN", "élan"]


def test_every_occurrence_counts_overlapping_ones_too():
    assert found("ha ha ha", "ha ha") == ["ha ha", "ha ha"]
    assert found("big big cat", "big", "big cat") == ["big", "big", "big cat"]


def test_spans_name_the_phrase_and_their_place():
    annotator = PhraseAnnotator(["cat"], patterns=[r"\d+"])
    [spans, empty] = annotator.annotate(["7 CATS, 1 Cat", ""], ["cat", ""])
    assert spans == [(0, 1, r"\d+"), (8, 9, r"\d+"), (10, 13, "cat")]
    assert empty == []


def test_patterns_are_used_as_they_are():
    assert found("Concat 12 and 345", patterns=["cat", r"\d{3}"]) == ["cat", "345"]
    assert found("CAT", patterns=["cat"], ignore_case=False) == []
    assert found("a  b", patterns=["a b"]) == []


# Conjugated and declined by hand
FORMS = {
    "cat": "cat cats catted catting",
    "idiot": "idiot idiots idioted idioting",
    "box": "box boxes boxed boxing",
    "church": "church churches churched churching",
    "boss": "boss bosses bossed bossing",
    "lady": "lady ladies ladied ladying",
    "play": "play plays played playing",
    "hate": "hate hates hated hating",
    "die": "die dies died dying",
    "see": "see sees seed seeing",
    "hop": "hop hops hopped hopping",
    "star": "star stars starred starring",
    "fix": "fix fixes fixed fixing",
    "show": "show shows showed showing",
    "kick": "kick kicks kicked kicking",
    "quit": "quit quits quitted quitting",
}
REAL_FORMS = {
    "travel": "travels traveled travelled traveling travelling",
    "hero": "heroes",
    "panic": "panics panicked panicking",
    "quiz": "quizzes quizzed quizzing",
    "bus": "buses busses",
    "argue": "argues argued arguing",
    "whip": "whips whipped whipping",
    "TV": "TVs TVS",
}


@pytest.mark.parametrize("word", FORMS)
def test_regular_inflections(word):
    assert inflected_forms(word) == sorted(FORMS[word].split())


@pytest.mark.parametrize("word", REAL_FORMS)
def test_inflections_with_variants_are_among_the_forms(word):
    assert set(REAL_FORMS[word].split()) <= set(inflected_forms(word))


@pytest.mark.parametrize(
    ("word", "other"),
    [("star", "stared"), ("hop", "hoping"), ("rap", "raped"), ("butt", "butter"), ("be", "bed"), ("lady", "ladys")],
)
def test_other_words_are_no_inflections(word, other):
    assert other not in inflected_forms(word)
    assert found(f"so {other} it", word, inflections=True) == []


def test_only_the_last_word_is_inflected_and_the_possessive_is_part_of_it():
    text = "He kicks buckets, kick the buckets, kick the bucket’s rim, kick-the-buckets."
    assert found(text, "kick the bucket", inflections=True) == ["kick the buckets", "kick the bucket’s"]
    assert found(text, "kick the bucket") == ["kick the bucket"]
    assert found("half-wits and step-mothers'", "half-wit", "mother", inflections=True) == ["half-wits", "mothers"]
    assert found("IDIOTS Idiot's idiots", "idiot", inflections=True, ignore_case=False) == ["idiots"]
    assert found("IDIOTS idiots", "IDIOT", inflections=True, ignore_case=False) == ["IDIOTS"]
    assert found("don'ts C++s", "don't", "C++", inflections=True) == ["C++"]


def test_lists_are_loaded_from_text_and_json(tmp_path):
    text = tmp_path / "list.txt"
    text.write_text("\ufeff# heading\n as an AI \n\ncat  # the animal\nC#\ncat\n", encoding="utf-8")
    assert load_phrases(text) == ["as an AI", "cat", "C#"]
    listed = tmp_path / "list.json"
    listed.write_text(json.dumps(["#win", " a # b ", "#win"]))
    assert load_phrases(str(listed)) == ["#win", "a # b"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("l.doc", "cat", "unknown kind of file"),
        ("l.txt", "# nothing\n\n", "no phrases in it"),
        ("l.json", "[]", "no phrases in it"),
        ("l.json", '{"a": 1}', r"l\.json"),
        ("l.json", '["a", ', r"l\.json.*not"),
        ("l.json", '["a", ""]', r"l\.json\[1\] is empty"),
        ("l.json", '["a", 3]', r"l\.json.* row 2"),
        ("l.txt", b"caf\xe9", "not UTF-8"),
    ],
)
def test_bad_lists(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as error:
        load_phrases(path)
    assert "\n" not in str(error.value)


def test_a_missing_list(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        load_phrases(tmp_path / "missing.txt")


def test_bad_arguments():
    for arguments, message in (
        ({}, "no phrases and no patterns"),
        ({"phrases": ["a", "  "]}, r"phrases\[1\] is empty"),
        ({"patterns": [""]}, r"patterns\[0\] is empty"),
        ({"patterns": ["(a"]}, r"pattern '\(a' is not a regular expression"),
        ({"patterns": ["a*"]}, r"pattern 'a\*' matches the empty string"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            PhraseAnnotator(**arguments)
        assert "\n" not in str(error.value)
    with pytest.raises(TypeError, match="'cat' is one string"):
        PhraseAnnotator("cat")
    with pytest.raises(TypeError, match=r"phrases\[0\] is 5"):
        PhraseAnnotator([5])


def test_a_pattern_that_matches_the_empty_string_only_inside_a_text_is_found_there():
    annotator = PhraseAnnotator(patterns=[r"\b"])
    with pytest.raises(ValueError, match="matches the empty string"):
        annotator.annotate(["word"], [""])


def test_settings_hold_all_that_spans_depend_on():
    base = PhraseAnnotator(["cat"]).settings
    assert json.loads(json.dumps(base)) == base
    others = [
        PhraseAnnotator(["dog"]),
        PhraseAnnotator(["cat"], ["x"]),
        PhraseAnnotator(["cat"], ignore_case=False),
        PhraseAnnotator(["cat"], whole_words=False),
        PhraseAnnotator(["cat"], inflections=True),
    ]
    assert all(other.settings != base for other in others)


def test_only_the_first_word():
    text = "Here's one. HERE  are two; #1 fan."
    spans = PhraseAnnotator(["here's", "here are", "#1 fan"], ["on[ae]"], first_word=True).annotate([text], ["Hi"])[0]
    # patterns are marked whole, and so is a phrase that begins with no word
    assert [text[start:end] for start, end, _ in spans] == ["Here", "one", "HERE", "#1 fan"]


@pytest.mark.parametrize(
    ("text", "phrase", "number"),
    [
        ("大変申し訳ありませんが、お答えできません。", "申し訳ありません", 1),
        ("「申し訳ありません」と、申し訳ありませんでした。", "申し訳ありません", 2),
        ("私はChatGPTです。ＣｈａｔＧＰＴ！", "ChatGPT", 2),
        ("MyChatGPT, ChatGPTs", "ChatGPT", 0),
        ("ＣＡＴとｃａｔ", "cat", 2),
    ],
)
def test_beside_kana_and_kanji_words_begin_and_end_anywhere(text, phrase, number):
    assert len(found(text, phrase)) == number
