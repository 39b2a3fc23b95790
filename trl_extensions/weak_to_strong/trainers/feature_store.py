"""Pooled states of texts under a frozen model, on disk: a linear probe runs every text through its model once."""

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np


_CHUNK = 1024


class FeatureStore:
    """What a frozen model makes of texts, computed when first asked for and kept over seeds, losses and restarts.

    Args:
        path: A `.npz` file, made when needed. Belongs to one model and one `max_length`.
    """

    def __init__(self, path: Path):
        self.path = path
        self._places: dict[str, int] = {}
        self._states: np.ndarray | None = None
        if path.exists():
            with np.load(path) as stored:
                self._places = {key: place for place, key in enumerate(stored["keys"].tolist())}
                self._states = stored["states"]

    def get(self, texts: Sequence[str], compute: Callable[[list[str]], np.ndarray]) -> np.ndarray:
        """States of some texts.

        Args:
            texts: The texts.
            compute: Gives the states `(M, H)` of M texts that are not stored yet; asked for 1,024 at a time, each of
                which is on disk before the next.

        Returns:
            `(N, H)` float32.
        """
        keys = [hashlib.sha256(text.encode()).hexdigest()[:32] for text in texts]
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in self._places}
        # Neighbours in length share a chunk, and so need little padding
        missing = sorted(missing.items(), key=lambda item: len(item[1]))
        for start in range(0, len(missing), _CHUNK):
            chunk = missing[start : start + _CHUNK]
            states = np.asarray(compute([text for _, text in chunk]), dtype=np.float32)
            self._states = states if self._states is None else np.concatenate([self._states, states])
            self._places |= {key: len(self._places) + place for place, (key, _) in enumerate(chunk)}
            self._save()
        return self._states[[self._places[key] for key in keys]]

    def _save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(self.path.name + ".partial")
        with partial.open("wb") as file:
            np.savez(file, keys=np.array(list(self._places)), states=self._states)
        os.replace(partial, self.path)
