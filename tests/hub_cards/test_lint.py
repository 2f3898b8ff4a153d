"""The lint finds what the Hub refuses and what readers hate, and nothing in a good card."""

from pathlib import Path

import pytest

from arm_hf.hub_cards.lint import SECTIONS, problems

GOOD = (
    "---\nlibrary_name: transformers\npipeline_tag: image-segmentation\nlicense: mit\nlanguage: en\ntags: [clip]\n"
    "base_model: openai/clip-vit-base-patch16\ndatasets: [org/data]\nmodel-index:\n- name: m\n  results:\n"
    "  - task: {type: image-segmentation}\n    dataset: {name: VOC, type: org/voc}\n"
    "    metrics:\n    - {type: mean_iou, name: mIoU, value: 44.5}\n---\n# m\n\n"
    + "".join(f"## {title}\n\nWords.\n\n" for title in SECTIONS)
    + "```python\nprint(1)\n```\n\n[page](https://arxiv.org/abs/1) ![picture](a.jpg)\n"
)


def test_a_good_card(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"")
    assert problems(GOOD, tmp_path) == []


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("license: mit\n", "", "the metadata lacks license"),
        ("license: mit", "license: null", "no value for license"),
        ("license: mit", "license: [", "is no YAML"),
        ("library_name: transformers", "library_name: arm_hf", "library_name is 'arm_hf'"),
        ("image-segmentation\nl", "Image Segmentation\nl", "not a task of the Hub"),
        ("language: en", "language: English", "no ISO 639 code"),
        ("base_model: openai/clip-vit-base-patch16", "base_model: the CLIP of OpenAI", "base_model"),
        ("[org/data]", "['COCO, 2017']", "datasets 'COCO, 2017' is no id"),
        ("value: 44.5", "value: about 44", "not a percentage"),
        ("value: 44.5", "value: .nan", "not a percentage"),
        ("value: 44.5", "value: null", "no value for model-index.0.results.0.metrics.0.value"),
        ("value: 44.5", "value: true", "not a percentage"),
        ("value: 44.5", "value: 144.5", "not a percentage"),
        ("task: {type: image-segmentation}", "task: {}", "task.type is missing"),
        ("type: org/voc", "type: Pascal VOC", "'Pascal VOC' is no id"),
        ("## Training\n\nWords.", "## Schooling\n\nWords.", "the section 'Training' is missing"),
        ("## Results\n\nWords.", "## Results", "the section 'Results' is empty"),
        ("Words.", "[More Information Needed]", "More Information Needed"),
        ("Words.", "{{ name }}", "the text holds '{{'"),
        ("Words.", "see /home/me/model", "a path of some machine: /home/me/model"),
        ("https://arxiv.org/abs/1", "http://arxiv.org", "is no https address"),
        ("(a.jpg)", "(b.jpg)", "'b.jpg' leads nowhere"),
        ("(a.jpg)", "(../a.jpg)", "leaves the repository"),
        ("print(1)", "print(1", "python block 1 does not compile"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, old: str, new: str, line: str) -> None:
    (tmp_path / "a.jpg").write_bytes(b"")
    assert old in GOOD
    found = problems(GOOD.replace(old, new, 1), tmp_path)
    assert any(line in each for each in found), found


def test_no_metadata() -> None:
    assert problems("# A card") == ["the card has no metadata between --- lines at its head"]
    assert problems("---\n- a\n---\n") == ["the metadata is no mapping of keys to values"]
