"""`trl-ext recipes`: the recipes that come along, which `--config` finds by name from any folder."""

import argparse
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from trl_extensions.core.options import did_you_mean


NO_INPUTS = ("output_dir", "output", "logging_dir", "stop", "guard_stop", "phrases", "patterns", "class_names")
"""Settings that name what is written, from where the command runs, or are words that could look like a file's name."""


def known_recipes() -> dict[str, Path]:
    """Name, such as smollm2-135m/tnt/config_lora -> file; those of the wheel, or of the clone that this is."""
    package = Path(__file__).resolve().parents[1]
    folder = next((path for path in (package / "recipes", package.parent / "recipes") if path.is_dir()), package)
    files = sorted(folder.glob("*/*/config*.yaml"))
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in files}


def config_file(name: str) -> str:
    """The file that `--config` means: a path, or the name of a recipe, also with the folder it has in a clone."""
    known, plain = known_recipes(), name.removeprefix("recipes/").removesuffix(".yaml")
    if Path(name).is_file():
        return name
    if plain in known:
        return str(known[plain])
    hint = did_you_mean(plain, known)
    raise ValueError(f"--config {name}: no such file and no recipe{hint} (`trl-ext recipes` lists the recipes)")


def beside(value: Any, folder: str | os.PathLike[str]) -> Any:
    """A setting of a YAML in `folder`: where it names a file or folder as seen from there, that as seen from here."""
    if isinstance(value, list):
        return [beside(item, folder) for item in value]
    if isinstance(value, dict):
        return {name: beside(item, folder) for name, item in value.items()}
    if not isinstance(value, str) or not {".", "/"} & set(value) or not value.strip("./"):  # a bare word is no path
        return value
    path = os.path.normpath(os.path.join(folder, value))
    if not os.path.exists(path):
        return value
    here = os.path.relpath(path)
    return path if here.startswith("..") else here


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("trl-ext recipes", description="List the recipes.", allow_abbrev=False)
    copy = parser.add_subparsers(dest="command").add_parser("copy", help="copy one and the files it names, to edit")
    copy.add_argument("name")
    copy.add_argument("folder", nargs="?", default=".")
    args = parser.parse_args(argv)
    if args.command == "copy":
        source = Path(config_file(args.name))
        path = _copy(source, Path(args.folder))
        print(f"{path}: edit it, then run `trl-ext {source.parent.name} run --config {path}`")
        return 0
    for name, path in known_recipes().items():
        text = path.read_text(encoding="utf-8")
        about = " ".join(text.split("\n#\n")[0].replace("#", "").split()).partition(". ")[0]
        print(f"{name}\n    {path.parent.name}, {yaml.safe_load(text)['model_name_or_path']}. {about}")
    return 0


def _copy(source: Path, folder: Path) -> Path:
    """Copy a recipe and what it names into one folder; nothing is replaced. Returns the copy's path."""
    text, target = source.read_text(encoding="utf-8"), folder / source.name
    copies = {}
    for name, value in yaml.safe_load(text).items():
        for item in value if isinstance(value, list) else [value]:
            if name not in NO_INPUTS and isinstance(item, str) and (path := beside(item, source.parent)) != item:
                copies[Path(path)] = folder / Path(path).name
                text = text.replace(item, f"./{Path(path).name}")
    if there := [str(path) for path in (target, *copies.values()) if path.exists()]:
        raise ValueError(f"{there[0]} exists already and is not replaced: name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    for path, own in copies.items():
        (shutil.copytree if path.is_dir() else shutil.copyfile)(path, own)
    target.write_text(text, encoding="utf-8")
    return target
