"""Templates, labels, background policy and vocabulary."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arm_hf.modeling.prompts import (
    CLIPER_TEMPLATES,
    IMAGENET_TEMPLATES,
    TEMPLATE_SETS,
    Background,
    Label,
    Vocabulary,
    format_labels,
    parse_labels,
    resolve_templates,
)

# Anything a user may type but the three signs of the string form; a name must not end in ":" either.
words = (
    st.text(st.characters(blacklist_characters=",=|:", blacklist_categories=["Cs", "Cc"]), min_size=1, max_size=20)
    .map(lambda text: " ".join(text.split()))
    .filter(bool)
)
labels = st.lists(
    st.builds(Label, name=words, words=st.lists(words, min_size=1, max_size=4).map(tuple)),
    min_size=1,
    max_size=6,
    unique_by=lambda label: label.name.casefold(),
)


def by_name(parsed):
    return {label.name: label.words for label in parsed}


class TestTemplates:
    def test_sets_have_their_sizes_and_no_duplicates(self):
        assert {name: len(set(templates)) for name, templates in TEMPLATE_SETS.items()} == {
            "imagenet80": 80,
            "cliper15": 15,
            "single": 1,
        }
        assert len(IMAGENET_TEMPLATES) == 80
        assert len(CLIPER_TEMPLATES) == 15

    @pytest.mark.parametrize("name", TEMPLATE_SETS)
    def test_every_template_of_a_set_is_valid(self, name):
        assert resolve_templates(list(TEMPLATE_SETS[name])) == TEMPLATE_SETS[name] == resolve_templates(name)
        assert all(template.format("dog").count("dog") == 1 for template in TEMPLATE_SETS[name])

    def test_own_templates(self):
        assert resolve_templates("a {} at night") == ("a {} at night",)
        assert resolve_templates(["{}", "a map of {}"]) == ("{}", "a map of {}")

    @pytest.mark.parametrize(
        ("templates", "message"),
        [
            ("imagenet", "choose one of imagenet80, cliper15, single"),
            ("{} and {}", "exactly once"),
            ("a {0}", "exactly once"),
            ([], "is empty"),
            (["a photo"], "exactly once"),
            ([3], "must be a string, not int"),
            (80, "not int"),
        ],
    )
    def test_errors(self, templates, message):
        with pytest.raises(ValueError, match=message) as caught:
            resolve_templates(templates)
        assert "\n" not in str(caught.value)


class TestLabels:
    def test_string(self):
        parsed = parse_labels(" cat, dog = puppy |hound,sky|  blue   sky \nanimal:=cow|horse")
        assert by_name(parsed) == {
            "cat": ("cat",),
            "dog": ("dog", "puppy", "hound"),
            "sky": ("sky", "blue sky"),
            "animal": ("cow", "horse"),
        }

    @pytest.mark.parametrize(
        "given_labels",
        [
            "cat, dog=puppy|hound",
            ["cat", "dog=puppy|hound"],
            ("cat", "dog|puppy|hound"),
            [["cat"], ["dog", "puppy", "hound"]],
            [Label("cat", ("cat",)), "dog=puppy|hound"],
            {"cat": "cat", "dog": "dog|puppy|hound"},
            {"cat": ["cat"], "dog": ("dog", "puppy", "hound")},
        ],
    )
    def test_all_forms_mean_the_same(self, given_labels):
        assert parse_labels(given_labels) == (Label("cat", ("cat",)), Label("dog", ("dog", "puppy", "hound")))

    def test_a_comma_in_a_list_is_part_of_the_word(self):
        assert by_name(parse_labels(["person with clothes, people, human"])) == {
            "person with clothes, people, human": ("person with clothes, people, human",)
        }

    def test_a_synonym_given_twice_counts_once(self):
        assert parse_labels("dog=Dog|puppy|puppy")[0].words == ("dog", "puppy")

    def test_two_classes_may_share_a_word(self):
        assert len(parse_labels("background=bed|wall, bed")) == 2

    @pytest.mark.parametrize(
        ("given_labels", "message"),
        [
            ("", "no labels"),
            (" , ", "no labels"),
            ([], "is empty"),
            ({}, "is empty"),
            ("cat,,dog", "label 2 is empty"),
            ("cat,", "label 2 is empty"),
            ("cat, Cat ", "given twice"),
            ("dog=", "synonym of label 'dog' is empty"),
            ("dog=puppy||hound", "synonym of label 'dog' is empty"),
            ("=puppy", "name is empty"),
            ([["cat"], []], "label 2 is an empty list"),
            (["cat", 3], "label 2 must be a string"),
            ([["cat", 3]], "must be a string, not int"),
            ({"cat": []}, "has no words"),
            ({3: "cat"}, "must be a string, not int"),
            ({"cat": 3}, "must be a list"),
            ([Label("cat", ())], "has no words"),
            (7, "not int"),
            (b"cat", "not bytes"),
        ],
    )
    def test_errors(self, given_labels, message):
        with pytest.raises(ValueError, match=message) as caught:
            parse_labels(given_labels)
        assert "\n" not in str(caught.value)

    @given(labels)
    def test_the_string_form_reads_back_the_same(self, given_labels):
        assert parse_labels(format_labels(given_labels)) == tuple(given_labels)

    @pytest.mark.parametrize("name", ["a,b", "a=b", "a|b", "a:"])
    def test_what_the_string_form_cannot_say_is_an_error(self, name):
        with pytest.raises(ValueError, match="cannot be written"):
            format_labels([Label(name, (name,))])


class TestBackground:
    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            (None, Background()),
            ("none", Background()),
            ("None", Background()),
            (0.3, Background(threshold=0.3)),
            (np.float32(0.5), Background(threshold=0.5)),
            ("0.3", Background(threshold=0.3)),
            ("sky|wall", Background(words=("sky", "wall"))),
            ("sky, blue wall", Background(words=("sky", "blue wall"))),
            (["sky", "wall"], Background(words=("sky", "wall"))),
            ("0.3|sky", Background(threshold=0.3, words=("sky",))),
            ([0.3, "sky"], Background(threshold=0.3, words=("sky",))),
            ({"threshold": 0.3, "words": "sky|wall"}, Background(threshold=0.3, words=("sky", "wall"))),
            ({"threshold": None, "words": ["sky"], "name": "rest"}, Background(words=("sky",), name="rest")),
            (Background(threshold=0.1), Background(threshold=0.1)),
        ],
    )
    def test_forms(self, value, expected):
        assert Background.parse(value) == expected

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            (0, "between 0 and 1"),
            (1.0, "between 0 and 1"),
            (float("nan"), "between 0 and 1"),
            ("-0.5", "between 0 and 1"),
            (True, "not True"),
            ("0.2|0.3", "2 thresholds"),
            ("sky||wall", "is empty"),
            ("", "is empty"),
            ({"treshold": 0.3}, "unknown background key 'treshold'"),
            ({"threshold": "high"}, "must be a number"),
            (3j, "not complex"),
            ([["sky"]], "must be a string"),
        ],
    )
    def test_errors(self, value, message):
        with pytest.raises(ValueError, match=message) as caught:
            Background.parse(value)
        assert "\n" not in str(caught.value)


class TestVocabulary:
    def test_without_background_every_class_is_the_users(self):
        vocabulary = Vocabulary.build("cat, dog=puppy")
        assert vocabulary.queries == ("cat", "dog", "puppy")
        assert vocabulary.class_of_query == (0, 1, 1)
        assert vocabulary.id2label == {0: "cat", 1: "dog"}
        assert (vocabulary.num_classes, vocabulary.background_index, vocabulary.threshold) == (2, None, None)

    def test_background_words_come_first(self):
        vocabulary = Vocabulary.build("cat", "0.2|sky|wall")
        assert vocabulary.queries == ("sky", "wall", "cat")
        assert vocabulary.class_of_query == (0, 0, 1)
        assert vocabulary.id2label == {0: "background", 1: "cat"}
        assert (vocabulary.background_index, vocabulary.threshold) == (0, 0.2)

    def test_a_threshold_alone_has_a_class_but_no_query(self):
        vocabulary = Vocabulary.build("cat, dog", 0.2)
        assert vocabulary.queries == ("cat", "dog")
        assert vocabulary.class_of_query == (1, 2)
        assert vocabulary.num_classes == 3

    def test_a_label_named_background_is_the_background(self):
        vocabulary = Vocabulary.build("cat, Background=sky|wall, dog", 0.2)
        assert vocabulary.id2label == {0: "cat", 1: "Background", 2: "dog"}
        assert (vocabulary.background_index, vocabulary.threshold) == (1, 0.2)
        assert Vocabulary.build("background, dog").background_index == 0

    def test_another_name_for_the_background(self):
        vocabulary = Vocabulary.build("cat, rest=sky", {"name": "rest", "threshold": 0.4})
        assert (vocabulary.background_index, vocabulary.num_classes) == (1, 2)
        assert Vocabulary.build("cat", {"name": "rest", "threshold": 0.4}).id2label == {0: "rest", 1: "cat"}

    def test_background_words_in_both_places_are_an_error(self):
        with pytest.raises(ValueError, match="not in both"):
            Vocabulary.build("background=sky, cat", "wall")

    @given(labels, st.sampled_from([None, 0.5, "sky|wall", "0.5|sky"]))
    def test_queries_and_classes_agree(self, given_labels, background):
        if any(label.name.casefold() == "background" for label in given_labels):
            background = None
        vocabulary = Vocabulary.build(given_labels, background)
        assert len(vocabulary.queries) == len(vocabulary.class_of_query)
        assert list(vocabulary.class_of_query) == sorted(vocabulary.class_of_query)
        for query, index in zip(vocabulary.queries, vocabulary.class_of_query, strict=True):
            assert query in vocabulary.classes[index].words
        assert vocabulary.classes[-len(given_labels) :] == tuple(given_labels)
        assert hash(vocabulary) == hash(Vocabulary.build(given_labels, background))
