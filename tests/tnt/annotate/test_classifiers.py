import json
import sys
from itertools import pairwise

import pytest

from trl_extensions.tnt.annotate import classifiers
from trl_extensions.tnt.annotate.classifiers import (
    ClassifierAnnotator,
    ProfanityAnnotator,
    pieces,
    split_sentences,
    word_windows,
)


WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "you", "are", "such", "fine", "rude", "kind", "grim", "odd"]
WORDS += ["person", "then", "we", "all", "went", "home"]
TEXTS = [
    "The cat sat on a mat. You are such a rude person! Then we all went home.",
    "Odd. Kind. Grim.",
    "",
    "Fine\n- the rude cat\n- you and we",
]
SENTENCES = [
    ["The cat sat on a mat.", "You are such a rude person!", "Then we all went home."],
    ["Odd.", "Kind.", "Grim."],
    [],
    ["Fine", "the rude cat", "you and we"],
]


def parts_of(text, offsets):
    return [text[start:end] for start, end in offsets]


# Sentences


@pytest.mark.parametrize(
    "sentences",
    [
        ["One.", "Two!", "Three?", "Four"],
        ["What?!", "No way…", "And then... nothing."],
        ["Dr. Smith met Mrs. Jones at 5 p.m.", "They had tea, e.g. Assam, at J. R. Roe's."],
        ["It costs 3.50 or v1.2.3 at a.com.", "See No. 5 of Jan. 3.", "I said no.", "He is older than I.", "Fine."],
        ["“Stop!” he said.", "(He left.)", '"Why?" she asked.', "Done."],
        ["They went to the U.S. Army base, cf. Mr. Poe."],
        ["It ended in 1990.", "3 people came."],
        ["你好。", "再见！", "好"],
    ],
)
def test_sentences_on_one_line(sentences):
    text = "".join(sentences) if "你" in sentences[0] else " ".join(sentences)
    assert parts_of(text, split_sentences(text)) == sentences


def test_lines_and_lists_are_sentences_without_their_markers():
    text = "Title\n\n# Head. Two\n1. First thing. Second\r\n  - a\n* b\n> quoted\n(2) c\na) d\n• e\n- \nlast   \n"
    expected = ["Title", "Head.", "Two", "First thing.", "Second", "a", "b", "quoted", "c", "d", "e", "last"]
    assert parts_of(text, split_sentences(text)) == expected


def test_sentences_lie_apart_and_cover_all_words_of_a_plain_text():
    text = 'A "b" c! D. e f?  G.H. i...\n\n J k; "L m." N\u2028o'
    offsets = split_sentences(text)
    assert all(before[1] <= after[0] for before, after in pairwise(offsets))
    assert " ".join(parts_of(text, offsets)).split() == text.split()
    assert all(piece == piece.strip() for piece in parts_of(text, offsets))


@pytest.mark.parametrize("text", ["", "  \n\t ", "\n"])
def test_nothing_has_no_pieces(text):
    assert split_sentences(text) == []
    assert word_windows(text, 3, 1) == []


# Windows


@pytest.mark.parametrize(
    ("window", "stride", "expected"),
    [
        (3, 3, ["a b, c", "d e f", "e f g"]),
        (3, 2, ["a b, c", "c d e", "e f g"]),
        (4, 3, ["a b, c d", "d e f g"]),
        (6, 5, ["a b, c d e f", "b, c d e f g"]),
        (7, 1, ["a b, c d e f g"]),
        (50, 1, ["a b, c d e f g"]),
        (1, 1, ["a", "b,", "c", "d", "e", "f", "g"]),
    ],
)
def test_windows_reach_every_word_and_end_with_the_text(window, stride, expected):
    text = " a b, c d e f g "
    assert parts_of(text, word_windows(text, window, stride)) == expected


def test_a_very_long_sentence_is_cut_into_pieces():
    words = [f"W{i}" for i in range(130)]
    text = "Short one. " + " ".join(words)
    assert parts_of(text, pieces(text, "sentence")) == [
        "Short one.", " ".join(words[:60]), " ".join(words[60:120]), " ".join(words[70:]),
    ]  # fmt: skip


@pytest.fixture
def small_windows(monkeypatch):
    """Windows of four words, one every two."""
    monkeypatch.setattr(classifiers, "WINDOW", 4)
    monkeypatch.setattr(classifiers, "STRIDE", 2)


# A transformers classifier


def save_classifier(path, labels, **config):
    """A random BERT of one layer over whole words; returns a function from a text to the label's logits."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS, ".", "!"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=len(vocabulary), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=32, initializer_range=0.6, num_labels=len(labels),
            id2label=dict(enumerate(labels)), label2id={label: i for i, label in enumerate(labels)}, **config,
        )
    ).eval()  # fmt: skip
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)

    def logits(text):
        with torch.no_grad():
            return model(**tokenizer(text, return_tensors="pt")).logits[0]

    return logits


def between(scores):
    """A threshold in the widest gap, so that both sides have scores and none is close."""
    scores = sorted(set(scores))
    low, high = max(pairwise(scores), key=lambda pair: pair[1] - pair[0])
    assert high - low > 1e-3
    return (low + high) / 2


def expected_spans(text, parts, scores, threshold):
    """Characters of the parts above the threshold; `parts` come in order."""
    marked, position = [], 0
    for part in parts:
        start = text.index(part, position)
        position = start + 1
        if scores[part] > threshold:
            marked.append((start, start + len(part)))
    return marked


@pytest.mark.parametrize("label", ["rude", None])
def test_sentences_whose_probability_is_above_the_threshold_are_marked(tmp_path, label):
    logits = save_classifier(tmp_path, ["fine", "rude"])
    scores = {part: logits(part).softmax(-1)[1].item() for row in SENTENCES for part in row}
    threshold = between(scores.values())
    annotator = ClassifierAnnotator(str(tmp_path), label, threshold)
    found = annotator.annotate(TEXTS, [""] * 4)
    expected = [expected_spans(text, row, scores, threshold) for text, row in zip(TEXTS, SENTENCES, strict=True)]
    assert [[(span.start, span.end) for span in spans] for spans in found] == expected
    assert {span.label for spans in found for span in spans} == {"rude"}
    assert 0 < sum(map(len, found)) < len(scores)
    assert annotator.annotate(["", " "], ["", ""]) == [[], []]


def test_overlapping_windows_of_a_multi_label_model_become_one_span(tmp_path, small_windows):
    logits = save_classifier(tmp_path, ["rude", "grim", "odd"], problem_type="multi_label_classification")
    text = "the odd cat sat on a grim mat and you are such fine rude kind person"
    words = text.split()
    parts = [" ".join(words[i : i + 4]) for i in range(0, 13, 2)]
    scores = {part: logits(part).sigmoid()[1].item() for part in parts}
    threshold = between(scores.values())
    annotator = ClassifierAnnotator(str(tmp_path), "grim", threshold, unit="window")
    [spans] = annotator.annotate([text], [""])
    marked = {i for start, end in expected_spans(text, parts, scores, threshold) for i in range(start, end)}
    assert {i for span in spans for i in range(span.start, span.end)} == marked
    assert 0 < len(marked) < len(text)
    assert all(before.end < after.start for before, after in pairwise(spans))


def test_a_piece_longer_than_the_model_takes_is_scored_by_its_beginning(tmp_path):
    logits = save_classifier(tmp_path, ["fine", "rude"])
    text = " ".join(["rude cat"] * 25)  # 50 words of 32 positions, of which 30 are used, with [CLS] and [SEP]
    score = logits(" ".join(["rude cat"] * 14)).softmax(-1)[1].item()
    [[span]] = ClassifierAnnotator(str(tmp_path), threshold=score - 1e-4).annotate([text], [""])
    assert (span.start, span.end) == (0, len(text))
    assert ClassifierAnnotator(str(tmp_path), threshold=score + 1e-4).annotate([text], [""]) == [[]]


def test_classifier_arguments(tmp_path):
    save_classifier(tmp_path, ["rude", "grim", "odd"])
    model = str(tmp_path)
    for arguments, message in (
        ({}, "more than two labels; set `label` to one of 'rude', 'grim', 'odd'"),
        ({"label": "mean"}, "no label 'mean'; set `label` to one of 'rude', 'grim', 'odd'"),
        ({"label": "odd", "threshold": 1.0}, "`threshold` is 1.0"),
        ({"label": "odd", "threshold": 0}, "`threshold` is 0"),
        ({"label": "odd", "unit": "word"}, "`unit` is 'word'"),
    ):
        with pytest.raises(ValueError, match=message):
            ClassifierAnnotator(model, **arguments)
    settings = ClassifierAnnotator(model, "odd", unit="window").settings
    assert json.loads(json.dumps(settings)) == {
        "kind": "classifier", "model": model, "label": "odd", "threshold": 0.5,
        "unit": "window", "window": 12, "stride": 6,
    }  # fmt: skip


# alt-profanity-check

INSULT = "Well, you are a damn idiot! Have a nice day. **Damn**, it's late."


def profanity():
    return pytest.importorskip("profanity_check", reason="pip install alt-profanity-check").predict_prob


def test_only_profane_sentences_have_marks():
    predict = profanity()
    sentences = ["Well, you are a damn idiot!", "Have a nice day.", "**Damn**, it's late."]
    scores = dict(zip(sentences, predict(sentences), strict=True))
    assert [score > 0.5 for score in scores.values()] == [True, False, True]
    found = ProfanityAnnotator().annotate([INSULT, "", "Nice."], [""] * 3)
    inside = [
        {
            (start, end)
            for start, end in expected_spans(INSULT, sentences, scores, 0.5)
            if start <= s.start < s.end <= end
        }
        for s in found[0]
    ]
    assert all(inside) and len(set().union(*inside)) == 2 and found[1:] == [[], []]


def test_narrowing_marks_the_profane_words_alone():
    predict = profanity()
    words = ["damn", "idiot", "Damn"]
    assert all(predict(words) > 0.5)
    assert all(predict(["Well", "you", "are", "a", "it's", "late"]) < 0.5)
    [spans] = ProfanityAnnotator().annotate([INSULT], [""])
    assert [INSULT[span.start : span.end] for span in spans] == words
    assert {span.label for span in spans} == {"profanity"}


def test_narrowing_keeps_the_piece_where_no_word_is_above_the_threshold_alone():
    predict = profanity()
    text = "Nice day. What a damn idiot!"
    [whole] = predict(["What a damn idiot!"])
    alone = max(predict(["What", "a", "damn", "idiot"]))
    assert whole > alone, "pick another sentence: one whose words are less profane alone"
    threshold = float(whole + alone) / 2
    [[span]] = ProfanityAnnotator(threshold).annotate([text], [""])
    assert text[span.start : span.end] == "What a damn idiot!"


def test_profanity_by_windows(small_windows):
    predict = profanity()
    text = "we all went home and then the damn idiot sat on a mat with the fine cat"
    words = text.split()
    parts = [" ".join(words[i : i + 4]) for i in range(0, 12, 2)] + [" ".join(words[-4:])]
    scores = dict(zip(parts, predict(parts), strict=True))
    marked = {i for start, end in expected_spans(text, parts, scores, 0.5) for i in range(start, end)}
    assert 0 < len(marked) < len(text)
    [spans] = ProfanityAnnotator(unit="window").annotate([text], [""])
    assert [text[span.start : span.end] for span in spans] == ["damn", "idiot"]
    assert {i for span in spans for i in range(span.start, span.end)} < marked


def test_profanity_arguments():
    profanity()
    with pytest.raises(ValueError, match="`threshold` is 2"):
        ProfanityAnnotator(2)
    with pytest.raises(ValueError, match="`unit` is 'word'"):
        ProfanityAnnotator(unit="word")
    assert ProfanityAnnotator().settings == {
        "kind": "profanity", "threshold": 0.5, "narrow": True, "unit": "sentence", "window": 12, "stride": 6,
    }  # fmt: skip


def test_without_the_package_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "profanity_check", None)
    with pytest.raises(ImportError, match="pip install alt-profanity-check") as error:
        ProfanityAnnotator()
    assert "\n" not in str(error.value)
