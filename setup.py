"""What setup.cfg has no words for: the recipes, which lie beside the package, go into the wheel as a part of it."""

from setuptools import find_packages, setup


setup(
    packages=[*find_packages(include=["trl_extensions", "trl_extensions.*"]), "trl_extensions.recipes"],
    package_dir={"trl_extensions.recipes": "recipes"},
)
