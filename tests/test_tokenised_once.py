"""`datasets` finds what was tokenised before: the same rows and tokenizer have the same fingerprint in every run."""

from functools import partial

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from tests.sami.conftest import sami_rows
from tests.tnt.conftest import tnt_rows
from tests.weak_to_strong.conftest import w2s_rows
from trl_extensions.sami.data import prepare_rows as prepare_sami
from trl_extensions.tnt.data import prepare_rows as prepare_tnt
from trl_extensions.weak_to_strong.data.prepare import prepare_rows as prepare_w2s


@pytest.mark.parametrize(
    ("prepare", "rows"),
    [
        (partial(prepare_sami, overlong_policy="error"), sami_rows(3)),
        (prepare_tnt, tnt_rows(3)),
        (partial(prepare_w2s, num_labels=2, class_names=None, overlong_policy="error"), w2s_rows(3)),
    ],
    ids=["SAMI", "TNT", "weak-to-strong"],
)
def test_a_second_run_finds_the_tokens_of_the_first(tmp_path, tiny_model_dir, prepare, rows):
    Dataset.from_list(rows).save_to_disk(tmp_path / "rows")
    files = []
    for _ in range(2):  # as in two processes: tokenizer and rows are loaded anew
        tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
        prepared = prepare(Dataset.load_from_disk(tmp_path / "rows"), tokenizer, max_length=512)
        tokenizer("and used meanwhile", padding="max_length", max_length=30)
        files.append([file["filename"] for file in prepared.cache_files])
    assert files[0] == files[1] and files[0]
