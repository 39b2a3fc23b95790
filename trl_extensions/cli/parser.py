"""TRL's parser, with an error that is one line."""

from typing import NoReturn

from trl import TrlParser


class OneLineParser(TrlParser):
    """`TrlParser` that raises `ValueError` where it would print every option there is and leave."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (`{self.prog} --help` lists what it takes)")
