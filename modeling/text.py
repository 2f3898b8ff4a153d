"""Words to class embeddings: prompt ensembling on CLIP's text tower, with a cache."""

import hashlib
import threading
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .prompts import resolve_templates

MAX_CACHED_WORDS = 50_000

# Threads may share a pipeline; neither the cache nor the tokenizer, whose padding is set for each call, can be shared.
_ONE_AT_A_TIME = threading.Lock()


def ensemble(prompt_embeddings: Tensor) -> Tensor:
    """Mean of L2-normalised prompt embeddings, normalised again: (..., P, D) -> (..., D).

    This is the prompt ensembling of Radford et al. (2021), section 3.1.4, as every reference code here does it.
    """
    return F.normalize(F.normalize(prompt_embeddings, dim=-1).mean(dim=-2), dim=-1)


def encode_prompts(clip: Any, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Class embeddings from token ids.

    Args:
        clip: A `CLIPModel`.
        input_ids: (Q, T), one prompt per query, or (Q, P, T), P prompts per query that are ensembled.
        attention_mask: Same shape, or None.

    Returns:
        L2-normalised embeddings (Q, D).

    Raises:
        ValueError: The ids have another number of dimensions.
    """
    if input_ids.ndim not in (2, 3):
        raise ValueError(f"input_ids must be (Q, T) or (Q, P, T), got {tuple(input_ids.shape)}")
    prompts = input_ids if input_ids.ndim == 3 else input_ids[:, None]  # (Q, P, T)
    if attention_mask is not None:
        attention_mask = attention_mask.reshape(-1, input_ids.shape[-1])
    features = clip.get_text_features(prompts.flatten(0, 1), attention_mask=attention_mask).pooler_output
    return ensemble(features.unflatten(0, prompts.shape[:2]))


class TextEncoder:
    """Class embeddings of words, each averaged over prompt templates and remembered.

    The cache is keyed by word, templates, device and dtype, and belongs to one model: a word that was seen in one label
    set is not encoded again in another. The least recently used words go first when `MAX_CACHED_WORDS` is reached.

    Args:
        clip: A `CLIPModel` (its text tower must be loaded).
        tokenizer: The matching tokenizer.
        batch_size: Prompts per text-tower call.
    """

    def __init__(self, clip: Any, tokenizer: Any, batch_size: int = 256):
        self.clip, self.tokenizer, self.batch_size = clip, tokenizer, batch_size
        self._cache: OrderedDict[tuple, Tensor] = OrderedDict()

    @property
    def max_tokens(self) -> int:
        """Longest prompt of the text tower in tokens."""
        return self.clip.config.text_config.max_position_embeddings

    def class_embeddings(self, words: Sequence[str], templates: str | Sequence[str] = "imagenet80") -> Tensor:
        """Embed words.

        Args:
            words: The queries, e.g. `Vocabulary.queries`.
            templates: A name of `TEMPLATE_SETS` or own templates with one `{}` each.

        Returns:
            L2-normalised embeddings (Q, D) in the order of the words, on the model's device and in its dtype.

        Raises:
            ValueError: No word was given, or a template is malformed.
        """
        if not words:
            raise ValueError("no words to embed; give at least one label")
        templates = resolve_templates(templates)
        parameter = next(self.clip.text_model.parameters())
        digest = hashlib.sha256("\0".join(templates).encode()).hexdigest()
        keys = [(word, digest, str(parameter.device), parameter.dtype) for word in words]
        with _ONE_AT_A_TIME:
            missing = {key: word for key, word in zip(keys, words, strict=True) if key not in self._cache}
            fresh = dict(zip(missing, self._encode(list(missing.values()), templates), strict=True)) if missing else {}
            result = torch.stack([fresh[key] if key in fresh else self._cache[key] for key in keys])
            self._cache.update(fresh)
            for key in keys:
                self._cache.move_to_end(key)
            while len(self._cache) > MAX_CACHED_WORDS:
                self._cache.popitem(last=False)
        return result

    @torch.no_grad()
    def _encode(self, words: list[str], templates: tuple[str, ...]) -> Tensor:
        prompts = [template.replace("{}", word) for word in words for template in templates]
        encoded = self.tokenizer(prompts)["input_ids"]
        lengths = [len(ids) for ids in encoded]
        known, highest = self.clip.config.text_config.vocab_size, max(map(max, encoded))
        if highest >= known:
            raise ValueError(
                f"the tokenizer is not this model's: it gives token {highest}, but the text tower knows {known} tokens"
            )
        too_long = [
            word
            for i, word in enumerate(words)
            if max(lengths[i * len(templates) :][: len(templates)]) > self.max_tokens
        ]
        if too_long:
            warnings.warn(
                f"{len(too_long)} label(s) are longer than this text tower's {self.max_tokens} tokens and are cut, "
                f"for example {too_long[0][:60]!r}",
                stacklevel=3,
            )
        # Prompts of similar length share a batch, so that little padding is computed.
        order = sorted(range(len(prompts)), key=lengths.__getitem__)
        device = next(self.clip.text_model.parameters()).device
        parts = []
        for start in range(0, len(order), self.batch_size):
            batch = [prompts[i] for i in order[start : start + self.batch_size]]
            tokens = self.tokenizer(
                batch, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
            ).to(device)
            features = self.clip.get_text_features(tokens.input_ids, attention_mask=tokens.attention_mask)
            parts.append(F.normalize(features.pooler_output, dim=-1))
        features = torch.empty_like(torch.cat(parts))
        features[torch.tensor(order, device=device)] = torch.cat(parts)
        return ensemble(features.unflatten(0, (len(words), len(templates))))  # (words, D)
