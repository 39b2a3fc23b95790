"""What the recipes' principles ask for can be done: within the token limit, and as the texts say."""

import re
from pathlib import Path

import pytest
import yaml

from trl_extensions.sami.principles import load_principles


ROOT = Path(__file__).resolve().parents[2]
TOKENS_PER_WORD, TOKENS_PER_ITEM = (
    1.5,
    3,
)  # of English with a small vocabulary, on the safe side; a bullet and its line
RECIPES = sorted(ROOT.glob("recipes/*/sami/config*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_checks_ask_for_fits(path):
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    limit = min(recipe[name] for name in ("max_new_tokens", "max_response_tokens") if name in recipe)
    for principle in load_principles(path.parent / recipe["principles"]):
        for part in principle.check.parts if principle.check else ():
            for bounds, tokens in ((part.words, TOKENS_PER_WORD), (part.list_items, TOKENS_PER_ITEM)):
                assert bounds is None or tokens * (bounds.at_least or 0) <= limit, principle.name


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/*/sami/principles*.yaml")), ids=lambda path: path.stem)
def test_numbers_in_the_texts_are_those_of_the_checks(path):
    for principle in load_principles(path):
        if principle.check is not None and principle.check.antithesis is not None:
            for chosen, part in zip((True, False), principle.check.parts, strict=True):
                said = {int(number) for text in principle.wordings(chosen) for number in re.findall(r"\d+", text)}
                own = {part.words.at_least, part.words.at_most} - {None} if part.words else set()
                assert said <= own, principle.name  # a text may say it without a number


def test_recipes_are_found():
    assert RECIPES
