import gzip
import json
import random
import sys
from itertools import product
from types import SimpleNamespace

import pytest

from trl_extensions.codeclm.config import CodecLMConfig
from trl_extensions.codeclm.pipeline.codec import CodecLM
from trl_extensions.codeclm.pipeline.filters import (
    REASONS,
    Benchmarks,
    InstructionFilters,
    NearDuplicates,
    Screens,
    count_words,
    plain_words,
    shingles,
    without_spaces,
)


LETTERS = [
    "alpha",
    "bravo",
    "charlie",
    "delta",
    "echo",
    "foxtrot",
    "golf",
    "hotel",
    "india",
    "juliet",
    "kilo",
    "lima",
    "mike",
    "november",
    "oscar",
    "papa",
]
SENTENCE = "Write a short story about a dog who finds a map in the garden of an old house."


def filters(**settings):
    return InstructionFilters(CodecLMConfig(**settings))


class TestWords:
    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("Don’t, *stop*!", ["don", "t", "stop"]),
            ("C++ is > 2+2 €", ["c++", "is", ">", "2+2", "€"]),
            ("“ＡＢＣ” 1２3", ["abc", "123"]),
            ("STRASSE Straße 🙂", ["strasse", "strasse"]),
            ("हिन्दी में लिखो।", ["हिन्दी", "में", "लिखो"]),
            ("写一首诗。Python 3", ["写", "一", "首", "诗", "python", "3"]),
            ("a\u200bb soft\u00adhyphen", ["ab", "softhyphen"]),
            ("...\n\t", []),
        ],
    )
    def test_lower_case_without_punctuation(self, text, words):
        assert plain_words(text) == words

    def test_two_characters_of_a_script_without_spaces_are_a_word(self):
        assert count_words(plain_words("写一首关于狗的诗")) == 4
        assert count_words(plain_words("写一首 poem about dogs")) == 2 + 3
        assert count_words(plain_words("three plain words")) == 3

    def test_a_script_is_told_by_most_of_the_text(self):
        assert without_spaces(plain_words("用 Python 写一首诗"))
        assert not without_spaces(plain_words("What does the sign 狗 mean?"))
        assert not without_spaces([])


class TestLength:
    def test_reasons_in_their_order(self):
        own = filters(min_words=3, max_words=5)
        assert own.check("a", "  ... \n") == "empty"
        assert own.check("b", "two words") == "too short"
        assert own.check("c", "now there are three") is None
        assert own.check("d", "one two three four five") is None
        assert own.check("e", "one two three four five six") == "too long"
        assert all(reason in REASONS for reason in ("empty", "too short", "too long"))

    def test_languages_without_spaces_are_not_one_word(self):
        own = filters(min_words=3, max_words=5)
        assert own.check("a", "写一首诗") == "too short"  # four characters
        assert own.check("b", "写一首关于狗的诗") is None  # eight
        assert own.check("c", "请写一首关于一只狗的诗") == "too long"  # eleven: five and a half

    def test_no_length_left(self):
        with pytest.raises(ValueError, match=r"`min_words` 6 is above `max_words` 5"):
            filters(min_words=6, max_words=5)


class TestNearDuplicates:
    # Ten words have 8 trigrams; with another last word 7 are shared, of 9 in all
    TEN = " ".join(LETTERS[:10])
    CHANGED = " ".join([*LETTERS[:9], "zulu"])

    @pytest.mark.parametrize(
        ("threshold", "reason"), [(0.77, "near-duplicate"), (7 / 9, "near-duplicate"), (0.78, None)]
    )
    def test_the_threshold_is_the_share_of_trigrams(self, threshold, reason):
        own = filters(dedup_threshold=threshold)
        assert own.check("one", self.TEN) is None
        assert own.check("two", self.CHANGED) == reason
        if reason:
            assert own.details["two"] == "0.78 of one"

    def test_case_and_punctuation_do_not_count_and_the_first_text_is_named(self):
        own = filters(dedup_threshold=1.0)
        own.add("seed", SENTENCE)
        assert own.check("a", SENTENCE.upper().replace(" ", ", ") + "!!") == "near-duplicate"
        assert own.details["a"] == "1.00 of seed"
        assert own.check("b", SENTENCE + " Please.") is None

    def test_what_was_dropped_is_not_remembered(self):
        own = filters(dedup_threshold=0.7, max_words=10)
        assert own.check("a", self.TEN + " more") == "too long"
        assert own.check("b", self.TEN) is None
        assert own.check("c", self.CHANGED) == "near-duplicate"
        # Shares 6 of 10 with the first (0.6), 7 of 9 with the one that was dropped
        assert own.check("d", " ".join([*LETTERS[:8], "yankee", "zulu"])) is None

    def test_order_decides(self):
        first, second = filters(dedup_threshold=0.7), filters(dedup_threshold=0.7)
        assert [first.check(text, text) for text in (self.TEN, self.CHANGED)] == [None, "near-duplicate"]
        assert [second.check(text, text) for text in (self.CHANGED, self.TEN)] == [None, "near-duplicate"]

    def test_short_texts_are_compared_by_characters(self):
        assert len(shingles(["hello", "world"])) == 7  # 11 characters
        assert len(shingles(["hey"])) == 1
        own = filters(min_words=1, dedup_threshold=0.6)
        assert own.check("a", "Explain photosynthesis") is None  # 22 characters: 18 pieces
        assert own.check("b", "explain Photosynthesis?") == "near-duplicate"
        assert own.check("c", "Explain photosyntheses") == "near-duplicate"  # 16 shared of 20
        assert own.check("d", "Explain photography") is None

    @pytest.mark.parametrize(("threshold", "reason"), [(0.69, "near-duplicate"), (0.71, None)])
    def test_languages_without_spaces(self, threshold, reason):
        own = filters(dedup_threshold=threshold)
        assert own.check("a", "请写一个关于一只狗在花园里找到地图的短故事。") is None  # 21 characters: 17 pieces
        assert own.check("b", "请写一个关于一只狗在花园里找到地图的长故事。") == reason  # 14 shared of 20
        assert own.check("c", "请写一个，关于一只狗在花园里，找到地图的短故事！") == "near-duplicate"

    @staticmethod
    def texts(number):
        draw = random.Random(7)
        vocabulary = [f"w{i}" for i in range(300)]
        texts = [draw.choices(vocabulary, k=draw.randint(8, 30)) for _ in range(number // 2)]
        for _ in range(number - len(texts)):
            copy = list(draw.choice(texts))
            for _ in range(draw.randint(0, 4)):
                copy[draw.randrange(len(copy))] = draw.choice(vocabulary)
            texts.append(copy)
        return texts

    def test_against_every_pair(self):
        threshold, near = 0.5, NearDuplicates(0.5)
        seen, found_at_all = [], 0
        for number, words in enumerate(self.texts(400)):
            own = {tuple(words[i : i + 3]) for i in range(len(words) - 2)}
            overlaps = [len(own & other) / len(own | other) for other in seen]
            found = near.find(words)
            if found:
                found_at_all += 1
                assert found[1] == pytest.approx(overlaps[int(found[0])]) and found[1] >= threshold
            # At 0.65 a pair stays unseen with (1 - 0.65**3) ** 42 = 1e-6
            assert found or max(overlaps, default=0) < 0.65
            near.add(str(number), words)
            seen.append(own)
        assert found_at_all > 80


def write_benchmark(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


class TestContamination:
    LONG = " ".join(LETTERS)  # 16 words

    def test_thirteen_words_in_a_row(self, tmp_path):
        file = write_benchmark(tmp_path / "b.jsonl", {"prompt": "Something else entirely here"}, {"prompt": self.LONG})
        own = filters(decontaminate_against=[file], dedup_threshold=1.0)
        assert own.check("a", "Say: " + ", ".join(LETTERS[2:15]).upper() + "; thanks.") == "contaminated"
        assert own.details["a"] == f"{file}, row 2"
        assert own.check("b", "Say " + " ".join(LETTERS[2:14]) + " thanks a lot") is None
        assert own.check("c", " ".join([*LETTERS[:8], "break", *LETTERS[8:]])) is None

    def test_a_shorter_prompt_must_be_there_as_a_whole(self, tmp_path):
        file = write_benchmark(tmp_path / "b.jsonl", {"instruction": "What is the capital of France?"})
        own = filters(decontaminate_against=[file])
        assert own.check("a", "Answer in one word: what is the capital of France, and why?") == "contaminated"
        assert own.check("b", "What is the capital of Spain and of France?") is None

    def test_a_prompt_of_three_words_must_be_all_there_is(self, tmp_path):
        file = write_benchmark(tmp_path / "b.jsonl", {"instruction": "Tell a joke!"})
        own = filters(decontaminate_against=[file])
        assert own.check("a", "tell a joke") == "contaminated"
        assert own.check("b", "Tell a joke about cats") is None

    def test_languages_without_spaces_take_twice_as_many_characters(self, tmp_path):
        text = "请写一个关于一只小黄狗在老房子的大花园里找到一张旧地图的有趣短故事给孩子听"
        file = write_benchmark(tmp_path / "b.jsonl", {"prompt": text})
        own = filters(decontaminate_against=[file], dedup_threshold=1.0)
        assert own.check("a", "你好：" + text[3:29] + "。") == "contaminated"
        assert own.check("b", "你好：" + text[3:28] + "。") is None

    def test_finds_what_comparing_every_run_of_words_finds(self, tmp_path):
        draw = random.Random(3)
        prompts = [draw.choices("abc", k=draw.randint(1, 20)) for _ in range(12)]
        instructions = [draw.choices("abc", k=draw.randint(1, 30)) for _ in range(300)]

        def runs(words, size):
            return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}

        def contaminated(words, prompt):
            size = min(13, len(prompt))
            return (size >= 4 or size == len(words)) and bool(runs(words, size) & runs(prompt, size))

        answers = [any(contaminated(words, prompt) for prompt in prompts) for words in instructions]
        assert 30 < sum(answers) < 270
        file = write_benchmark(tmp_path / "b.jsonl", *({"prompt": " ".join(words)} for words in prompts))
        benchmarks = Benchmarks([file])
        assert [benchmarks.find(words) is not None for words in instructions] == answers

    @pytest.mark.parametrize(
        "row",
        [
            {"question": "{}", "answer": "four words of answer"},
            {"id": 3, "task": "{}"},
            {"turns": ["An opening of four words", "{}"], "category": "writing"},
            {"messages": [{"role": "system", "content": "Be a good assistant."}, {"role": "user", "content": "{}"}]},
            {"instruction": "Summarise this text for me", "input": "{}"},
        ],
    )
    def test_columns(self, tmp_path, row):
        text = json.dumps(row).replace("{}", self.LONG)
        (tmp_path / "b.jsonl").write_text(text + "\n")
        own = Benchmarks([str(tmp_path / "b.jsonl")])
        assert own.find(plain_words(self.LONG)) is not None
        # Answers, system turns and answers of benchmarks may be in an instruction
        assert own.find(plain_words("Give four words of answer and be a good assistant.")) is None

    def test_the_first_of_two_rows_is_named(self, tmp_path):
        file = write_benchmark(
            tmp_path / "b.jsonl", {"prompt": "red green blue grey"}, {"prompt": "one two three four"}
        )
        assert Benchmarks([file]).find(plain_words("One two three four; red green blue grey")) == (file, 1)

    def test_an_instruction_and_its_input_are_one_prompt(self, tmp_path):
        file = write_benchmark(
            tmp_path / "b.jsonl", {"instruction": "Find the verb in this", "input": "I love my dog"}
        )
        own = Benchmarks([file])
        assert own.find(plain_words("Tell me why I love my dog")) is None
        assert own.find(plain_words("Find the verb in this sentence of mine")) is None
        assert own.find(plain_words("Please find the verb in this: I love my dog!")) == (file, 1)

    def test_kinds_of_files(self, tmp_path):
        (tmp_path / "b.txt").write_text(f"first line of text\n\n{self.LONG}\n")
        (tmp_path / "b.csv").write_text(f'id,prompt\n1,"other words, all four"\n2,"{self.LONG}"\n')
        (tmp_path / "b.json").write_text(json.dumps([{"text": "nothing of the kind"}, {"text": self.LONG}]))
        with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
            file.write(json.dumps({"text": self.LONG}) + "\n")
        rows = {"b.txt": 2, "b.csv": 2, "b.json": 2, "b.jsonl.gz": 1}
        for name, row in rows.items():
            path = str(tmp_path / name)
            assert Benchmarks([path]).find(plain_words(self.LONG)) == (path, row)

    def test_the_first_of_two_files_is_named(self, tmp_path):
        one = write_benchmark(tmp_path / "1.jsonl", {"prompt": "not at all this one"})
        two = write_benchmark(tmp_path / "2.jsonl", {"prompt": "and nor is it this"}, {"prompt": self.LONG})
        three = write_benchmark(tmp_path / "3.jsonl", {"prompt": self.LONG})
        assert Benchmarks([one, two, three]).find(plain_words(self.LONG)) == (two, 2)

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("none.jsonl", None, "no such file"),
            ("none", None, "is no file here"),
            ("none.txt", None, "no such file"),
            ("a.txt", "\n...\n", "holds no text"),
            ("a.jsonl", '{"prompt": 3}\n', "holds no text"),
            ("a.jsonl", '{"prompt": "x"\n', "line 1 is not JSON"),
            ("a.parquet", "x", "cannot be read as parquet"),
            ("a.doc", "x", "unknown kind of file"),
        ],
    )
    def test_bad_files(self, tmp_path, name, content, message):
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=message) as error:
            filters(decontaminate_against=[str(tmp_path / name)])
        assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


class TestAlone:
    def test_neither_compares_nor_remembers(self, tmp_path):
        file = write_benchmark(tmp_path / "b.jsonl", {"prompt": "What is the capital of France?"})
        own = filters(decontaminate_against=[file])
        assert own.check("a", SENTENCE) is None
        assert own.check_alone("b", SENTENCE) is None
        assert own.check_alone("c", "Another fine sentence that nobody has written before") is None
        assert own.check("d", "Another fine sentence that nobody has written before") is None
        assert own.check_alone("e", "So what is the capital of France?") == "contaminated"
        assert own.check_alone("f", "short one") == "too short"
        assert own.check_alone("g", "!") == "empty"


class TestLanguage:
    ENGLISH = "Write a short story about a dog and a garden."
    GERMAN = "Schreibe eine kurze Geschichte über einen Hund und einen Garten."

    def test_others_are_dropped(self):
        pytest.importorskip("py3langid")
        own = filters(languages=["en"])
        assert own.check("a", self.ENGLISH) is None
        assert own.check("b", self.GERMAN) == "language"
        assert own.details["b"] == "de"
        both = filters(languages=["en", "de"])
        assert both.check("a", self.ENGLISH) is both.check("b", self.GERMAN) is None

    def test_short_ones_pass(self):
        pytest.importorskip("py3langid")
        own = filters(languages=["en"])
        assert own.check("a", "Schreibe eine kurze Geschichte") is None
        assert own.check("b", "Schreibe eine kurze Geschichte über Hunde") == "language"

    def test_what_is_no_language(self):
        pytest.importorskip("py3langid")
        with pytest.raises(ValueError, match=r"`languages`: 'english' is no language that is told apart.* de, .* en,"):
            filters(languages=["en", "english"])

    def test_missing_package(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "py3langid", None)
        filters()
        with pytest.raises(ImportError, match=r"pip install .*py3langid"):
            filters(languages=["en"])


class TestScreens:
    RUDE = "You are a fucking idiot."

    def test_profanity_in_either_text(self):
        pytest.importorskip("profanity_check")
        screens = Screens(CodecLMConfig(screens=["profanity"]))
        kind = "Boil the egg for seven minutes."
        pairs = list(product((kind, self.RUDE), repeat=2))
        assert screens.find(pairs) == [None, "profanity", "profanity", "profanity"]
        assert screens.find([]) == []

    @pytest.mark.parametrize(
        ("text", "personal"),
        [
            ("Write to anna.smith@example.com about the rent.", True),
            ("大家さんのメールはtaro@example.jpです。", True),
            ("メールはｔａｒｏ＠ｅｘａｍｐｌｅ．ｊｐです。", True),
            ("Ma boîte: rené.dupont@example.fr, merci.", True),
            ("집주인의 주소는taro@example.kr입니다.", True),
            ("My phone number is 212-555-0123, so call me.", True),
            ("Pay it to IBAN DE89370400440532013000.", True),
            ("Convert 1234567890 seconds to days.", False),
            ("See https://www.example.com on 3 May 2020.", False),
            ("十二月三日に三百円を払ってください。", False),
        ],
    )
    def test_personal_data(self, text, personal):
        pytest.importorskip("presidio_analyzer")
        screens = Screens(CodecLMConfig(screens="pii"))
        found = "pii" if personal else None
        assert screens.find([("Boil an egg.", text), (text, "An egg."), ("Boil it.", "Yes.")]) == [found, found, None]

    @pytest.mark.parametrize(
        ("screen", "error", "message"),
        [
            ("pii", ImportError, "pip install presidio-analyzer"),
            ("profanity", ImportError, "pip install alt-profanity-check"),
            ("/no/profannity", ValueError, "`screens`: '/no/profannity' is none of profanity, pii"),
        ],
    )
    def test_what_cannot_be_loaded_is_said_before_all(self, monkeypatch, tmp_path, screen, error, message):
        for module in ("presidio_analyzer", "profanity_check"):
            monkeypatch.setitem(sys.modules, module, None)
        (tmp_path / "m.yaml").write_text("- {use_case: poems, skills: [rhyme]}\n")
        engine = SimpleNamespace(name="endpoint:x")  # cannot be asked
        config = CodecLMConfig(metadata=str(tmp_path / "m.yaml"), screens=[screen], selection="all")
        with pytest.raises(error, match=message) as raised:
            CodecLM(config, tmp_path / "run", strong=engine).run()
        assert "\n" not in str(raised.value)

    @pytest.mark.parametrize(
        ("setting", "arguments"),
        [
            ("some/model", ("some/model", None)),
            ("some/model:toxic", ("some/model", "toxic")),
            ("bias", ("unitary/unbiased-toxic-roberta", "identity_attack")),
        ],
    )
    def test_a_classifier_and_its_label(self, monkeypatch, setting, arguments):
        asked = []

        def classifier(*given):
            asked.append(given)
            return SimpleNamespace(score=lambda texts: [0.1 * len(text) for text in texts])

        monkeypatch.setattr("trl_extensions.core.text.TextClassifier", classifier)
        screens = Screens(CodecLMConfig(screens=[setting], screen_threshold=0.5))
        assert asked == [arguments]
        assert screens.find([("a", "bb"), ("a" * 5, "b"), ("a", "b" * 6), ("a" * 4, "b" * 4)]) == [
            None, setting, setting, None
        ]  # fmt: skip

    def test_the_first_that_finds_something_is_named_and_the_next_sees_what_is_left(self, monkeypatch):
        seen = []

        def classifier(name, label):
            def score(texts):
                seen.append((name, list(texts)))
                return [float(name in text) for text in texts]

            return SimpleNamespace(score=score)

        monkeypatch.setattr("trl_extensions.core.text.TextClassifier", classifier)
        screens = Screens(CodecLMConfig(screens=["one", "two"]))
        assert screens.find([("one two", "x"), ("x", "two"), ("x", "y")]) == ["one", "two", None]
        assert seen[1] == ("two", ["x", "two", "x", "y"])

    def test_a_path_with_a_colon_has_no_label(self, monkeypatch, tmp_path):
        (tmp_path / "a:b").mkdir()
        asked = []
        monkeypatch.setattr(
            "trl_extensions.core.text.TextClassifier",
            lambda *given: asked.append(given) or SimpleNamespace(score=len),
        )
        Screens(CodecLMConfig(screens=[str(tmp_path / "a:b")]))
        assert asked == [(str(tmp_path / "a:b"), None)]


def test_what_was_forgotten_is_new_again():
    own = InstructionFilters(CodecLMConfig(prompts="-"))
    text = "Describe the way in which bees make honey"
    assert [own.check("a", text), own.check("b", text)] == [None, "near-duplicate"] and own.details
    own.forget()
    assert not own.details and own.check("c", text) is None
