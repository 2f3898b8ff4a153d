"""A small byte-pair vocabulary of our own in the format of transformers' ``CLIPTokenizer``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
END_OF_WORD = "</w>"


def word_weights(everyday: Iterable[str], named: Iterable[str], phrases: Iterable[str]) -> dict[str, int]:
    """How often each text counts when merges are learnt.

    Args:
        everyday: words, most frequent first; weights fall with the rank (Zipf).
        named: class names and synonyms; they count much, so that they become few tokens.
        phrases: prompt templates.

    Returns:
        text -> count.
    """
    weights = {word: 2 + 40_000 // (rank + 200) for rank, word in enumerate(everyday)}
    for text in named:
        weights[text] = weights.get(text, 0) + 500
    for text in phrases:
        weights[text.replace("{}", "")] = 1000
    return weights


def train_tokenizer(weights: Mapping[str, int], vocab_size: int, max_length: int) -> CLIPTokenizer:
    """Learn merges and build a CLIPTokenizer.

    The vocabulary is laid out as CLIP's: 256 bytes, the same bytes at the end of a word, merged tokens, start and end
    of text. All 512 byte tokens are present, so any text can be spelt and the unknown token never appears (it is the
    end-of-text token, at which the text tower would stop reading).

    Args:
        weights: text -> count.
        vocab_size: number of tokens.
        max_length: `model_max_length` of the result, start and end included.

    Returns:
        A fast tokenizer; padding is by the end-of-text token, as in CLIP.
    """
    template = CLIPTokenizer()  # supplies normalizer and pre-tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = Tokenizer(models.BPE(end_of_word_suffix=END_OF_WORD, continuing_subword_prefix=""))
    learner.normalizer = template.backend_tokenizer.normalizer
    learner.pre_tokenizer = template.backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        min_frequency=2,
        initial_alphabet=alphabet,
        end_of_word_suffix=END_OF_WORD,
        continuing_subword_prefix="",
        show_progress=False,
    )
    texts = (text for text, count in weights.items() for _ in range(count))
    learner.train_from_iterator(texts, trainer)
    merges = merges_of(learner)
    tokens = [*alphabet, *(letter + END_OF_WORD for letter in alphabet)]
    known = set(tokens)
    kept: list[tuple[str, str]] = []
    for left, right in merges:
        if len(tokens) == vocab_size - 2:
            break
        if left in known and right in known:
            kept.append((left, right))
            if left + right not in known:
                tokens.append(left + right)
                known.add(left + right)
    tokens += [BOS, EOS]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=kept, model_max_length=max_length)


def merges_of(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """The merge rules of a BPE tokenizer in order."""
    import json

    rules = json.loads(tokenizer.to_str())["model"]["merges"]
    pairs = (rule.split(" ") if isinstance(rule, str) else rule for rule in rules)
    return [(left, right) for left, right in pairs]


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json, vocab.json and merges.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))
