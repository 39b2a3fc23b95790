"""The prompts of the codec: Jinja files that come along, each of which a file of the user's can take the place of."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import jinja2


PROMPTS = Path(__file__).parent.with_name("prompts")

# What a prompt is about: a file that leaves one of these out would ask the same whatever it is given.
_NEEDED = {
    "encode": ("instruction",),
    "decode": ("use_case", "skills"),
    "rubrics": ("use_case", "skills"),
    "rewrite": ("instruction", "action"),
    "evol": ("instruction", "action"),
    "answer": ("instruction",),
    "score": ("instruction", "first", "second"),
    "score_one": ("instruction", "first", "second", "which"),
    "propose": ("description",),
    "again": (),
}
_OPTIONAL = {
    "encode": ("max_skills",),
    "decode": ("number",),
    "rubrics": ("number",),
    "rewrite": ("use_case", "skills"),
    "propose": ("number", "max_skills"),
    "again": ("reason",),
}
_SAMPLES: dict[str, Any] = {"skills": ["reading", "writing"], "number": 2, "max_skills": 3, "which": "first"}


class PromptTemplate:
    """A prompt that can be filled in.

    Args:
        path: The file, for error messages.
        template: What is in it.
    """

    def __init__(self, path: Path, template: jinja2.Template):
        self.path = path
        self._template = template

    def render(self, **values: Any) -> str:
        """The prompt with its values; braces inside these are left alone.

        Raises:
            ValueError: The file cannot be filled in; one line with its path and the reason.
        """
        import jinja2

        try:
            return self._template.render(**values)
        except (jinja2.TemplateError, TypeError, ArithmeticError) as error:
            raise ValueError(f"{self.path}: cannot be filled in ({_line(error)}); correct the file") from None


def load_template(name: str, folder: str | os.PathLike | None = None) -> PromptTemplate:
    """Load a prompt.

    Args:
        name: Name of the step: the file is `<name>.jinja`.
        folder: Folder of the user; if the file is there, it wins. It may include the files that come along.

    Raises:
        ValueError: The file cannot be read or filled in, names a variable that this step does not have, or leaves out
            one without which the prompt makes no sense; or the folder holds a prompt of which there is no step.
    """
    import jinja2
    import jinja2.meta

    folders = [PROMPTS] if folder is None else [Path(folder), PROMPTS]
    if folder is not None:
        _check_names(Path(folder))
    path = next((place for f in folders if (place := f / f"{name}.jinja").is_file()), PROMPTS / f"{name}.jinja")
    needed, optional = _NEEDED[name], _OPTIONAL.get(name, ())
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folders),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    try:
        source = path.read_text(encoding="utf-8-sig")
        used = jinja2.meta.find_undeclared_variables(environment.parse(source))
        template = environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"{path}, line {error.lineno}: {_line(error)}; correct the file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as UTF-8 text ({_line(error)}); rewrite the file") from None
    if unknown := sorted(used - {*needed, *optional}):
        available = ", ".join((*needed, *optional))
        raise ValueError(f"{path}: unknown variable {unknown[0]!r}; it may use {available}")
    template.globals = dict(template.globals)  # a chain of mappings, which is slow to copy for every prompt
    prompt = PromptTemplate(path, template)
    _try(name, prompt)
    return prompt


def sample_values(name: str) -> dict[str, Any]:
    """Values to fill a prompt in with, to see what it is like."""
    return {key: _SAMPLES.get(key, f"({key})") for key in (*_NEEDED[name], *_OPTIONAL.get(name, ()))}


def _try(name: str, prompt: PromptTemplate) -> None:
    """Fill the prompt in with samples: what is wrong with it shows now and not after the first thousand calls."""
    values = sample_values(name)
    text = prompt.render(**values)
    for key in _NEEDED[name]:
        # Used in whatever way: joined, shortened or compared, another value must give another prompt.
        other = {"skills": ["counting"], "which": "second"}.get(key, "[another]")
        if prompt.render(**{**values, key: other}) == text:
            raise ValueError(
                f"{prompt.path}: the prompt does not depend on {key!r}; write {{{{ {key} }}}} where it belongs"
            )


def _check_names(folder: Path) -> None:
    for path in sorted(folder.glob("*.jinja")):
        if path.stem not in _NEEDED:
            raise ValueError(f"{path}: there is no prompt of that name; rename it to one of {', '.join(_NEEDED)}")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
