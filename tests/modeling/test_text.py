"""Words to class embeddings: the ensemble formula, batching, and the cache."""

import pytest
import torch
from torch.nn import functional as F

from arm_hf.modeling import text
from arm_hf.modeling.prompts import IMAGENET_TEMPLATES
from arm_hf.modeling.text import TextEncoder, encode_prompts

WORDS = ["cat", "a very long name of a thing", "dog"]


@pytest.fixture
def encoder(tiny_clip, tiny_tokenizer) -> TextEncoder:
    return TextEncoder(tiny_clip, tiny_tokenizer)


@torch.no_grad()
@pytest.mark.parametrize("templates", ["single", ["{}", "the {} of {}"[:6], "one {}!"], "imagenet80"])
def test_ensemble_formula(encoder, tiny_clip, tiny_tokenizer, templates):
    embeddings = encoder.class_embeddings(WORDS, templates)
    sentences = {"single": ["a photo of a {}."], "imagenet80": IMAGENET_TEMPLATES}.get(str(templates), templates)
    for word, found in zip(WORDS, embeddings, strict=True):
        prompts = []
        for sentence in sentences:
            tokens = tiny_tokenizer(sentence.format(word), return_tensors="pt")
            prompts.append(F.normalize(tiny_clip.get_text_features(**tokens).pooler_output[0], dim=0))
        expected = F.normalize(torch.stack(prompts).mean(dim=0), dim=0)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        assert found.norm().item() == pytest.approx(1, abs=1e-5)


@torch.no_grad()
def test_batches_and_neighbours_do_not_change_a_word(tiny_clip, tiny_tokenizer, encoder):
    together = encoder.class_embeddings(WORDS, "single")
    one_by_one = TextEncoder(tiny_clip, tiny_tokenizer, batch_size=1)
    for index, word in enumerate(WORDS):
        torch.testing.assert_close(one_by_one.class_embeddings([word], "single")[0], together[index])
    again = encoder.class_embeddings([WORDS[2], WORDS[0], WORDS[2]], "single")
    assert torch.equal(again, together[[2, 0, 2]])


@torch.no_grad()
def test_prompts_with_and_without_mask(tiny_clip, tiny_tokenizer, encoder):
    tokens = tiny_tokenizer([f"a photo of a {word}." for word in WORDS], padding=True, return_tensors="pt")
    found = encode_prompts(tiny_clip, tokens.input_ids, tokens.attention_mask)
    torch.testing.assert_close(found, encoder.class_embeddings(WORDS, "single"))
    grouped = encode_prompts(tiny_clip, tokens.input_ids[None], tokens.attention_mask[None])
    assert grouped.shape == (1, 64)


class TestCache:
    @pytest.fixture
    def encoded(self, encoder, monkeypatch) -> list[str]:
        words: list[str] = []
        encode = encoder._encode

        def record(fresh, templates):
            words.extend(fresh)
            return encode(fresh, templates)

        monkeypatch.setattr(encoder, "_encode", record)
        return words

    def test_words_are_shared_between_label_sets(self, encoder, encoded):
        encoder.class_embeddings(["cat", "dog", "cat"], "single")
        encoder.class_embeddings(["dog", "bird"], "single")
        assert encoded == ["cat", "dog", "bird"]
        encoder.class_embeddings(["dog"], "imagenet80")
        assert encoded[-1] == "dog" and len(encoded) == 4

    def test_another_dtype_is_another_entry(self, encoder, encoded, tiny_clip):
        encoder.class_embeddings(["cat"], "single")
        tiny_clip.to(torch.bfloat16)
        assert encoder.class_embeddings(["cat"], "single").dtype == torch.bfloat16
        assert encoded == ["cat", "cat"]

    def test_the_least_recently_used_goes_first(self, encoder, encoded, monkeypatch):
        monkeypatch.setattr(text, "MAX_CACHED_WORDS", 2)
        encoder.class_embeddings(["cat", "dog"], "single")
        encoder.class_embeddings(["cat"], "single")
        encoder.class_embeddings(["bird"], "single")  # dog leaves
        encoder.class_embeddings(["cat"], "single")
        assert encoded == ["cat", "dog", "bird"]
        result = encoder.class_embeddings(["cat", "dog", "bird", "fish"], "single")  # more than the cache holds
        assert result.shape == (4, 64)
        assert encoded[3:] == ["dog", "fish"]

    def test_no_gradients_are_kept(self, encoder):
        assert not encoder.class_embeddings(["cat"], "single").requires_grad


def test_too_long_words_warn(encoder):
    with pytest.warns(UserWarning, match=r"1 label\(s\) are longer than this text tower's 77 tokens and are cut"):
        encoder.class_embeddings(["cat", "word " * 50], "single")


def test_no_words(encoder):
    with pytest.raises(ValueError, match="no words to embed"):
        encoder.class_embeddings([])
