"""From labels to losses: which words are right, which are wrong and which are left alone for a labelled pixel.

The loss of a feature with label y is ``logsumexp(allowed) - logsumexp(permitted)`` over its scaled cosines with the
words: *permitted* words are right, the other *allowed* words are wrong, all others do not take part. So sets
with different granularity ("person" here, "face" and "body" there, "background" elsewhere) train one common space.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .vocabulary import clash_groups, concept_of, concept_words

# What "background" is in sets that label objects only: the 26 words that common evaluation code uses for it.
BACKGROUND_CONCEPTS = (
    "sky", "wall", "tree", "wood", "grass", "road", "sea", "river", "mountain", "sand", "desk", "bed", "building",
    "clouds", "lamp", "door", "window", "wardrobe", "ceiling", "shelf", "curtain", "stairs", "floor", "hill", "railing",
    "fence",
)  # fmt: skip
NUM_THINGS = 80  # the first 80 of COCO's 171 classes are things, the other 91 stuff


@dataclass
class RuleTable:
    """Masks for every (set, label), in a closed and an open form.

    Attributes:
        concepts: names of the C concepts.
        first_rule: set -> row of its label 0; the rule of label y is ``first_rule[set] + y``.
        permitted: (2, R, C) bool, form 0 closed and form 1 open.
        allowed: (2, R, C) bool, a superset of `permitted`.
        is_object: (R,) False for "background" rules, whose permitted words are many.
        main_concept: (R,) the concept of the label; 0 where `is_object` is False.
    """

    concepts: list[str]
    first_rule: dict[str, int]
    permitted: Tensor
    allowed: Tensor
    is_object: Tensor
    main_concept: Tensor


def all_concepts(classes: Mapping[str, Sequence[str]]) -> list[str]:
    """Every concept of the sets and of the background list, in a fixed order."""
    names = [concept_of(name, label) for name, labels in classes.items() for label in labels if label != "background"]
    return list(dict.fromkeys([*names, *BACKGROUND_CONCEPTS]))


def build_rules(
    classes: Mapping[str, Sequence[str]], open_set: Sequence[str], similarity: Tensor, max_similarity: float = 0.35
) -> RuleTable:
    """Build the masks.

    Args:
        classes: set -> names of its labels in order.
        open_set: names of COCO-Stuff's 171 classes (80 things first): the further wrong words of the open form.
        similarity: (C, C) cosines between the concepts of `all_concepts(classes)`.
        max_similarity: words closer than this to the right one are not used as further wrong words.

    Returns:
        The table; sets appear in the order of `classes`.
    """
    concepts = all_concepts(classes)
    index = {name: i for i, name in enumerate(concepts)}
    groups = clash_groups()
    opened = [index[concept_of("coco_stuff171", name)] for name in open_set]
    background = {index[name] for name in BACKGROUND_CONCEPTS}
    rows: dict[str, list[Tensor]] = {"permitted0": [], "permitted1": [], "allowed0": [], "allowed1": []}
    is_object: list[bool] = []
    main: list[int] = []
    first_rule: dict = {}

    def mask(members: set[int]) -> Tensor:
        out = torch.zeros(len(concepts), dtype=torch.bool)
        out[list(members)] = True
        return out

    def clashing(name: str) -> set[int]:
        return {index[other] for group in groups if name in group for other in group if other in index}

    for dataset, labels in classes.items():
        first_rule[dataset] = len(is_object)
        own = {index[concept_of(dataset, label)] for label in labels if label != "background"}
        has_background = "background" in labels
        taken = own.copy()
        for c in own:
            near = (similarity[c] >= 0.5).nonzero().flatten().tolist()
            taken |= set(near) | {index[n] for n in ("clothes", "table") if n in index}
            if concepts[c] == "any table":
                taken |= {index[n] for n in ("desk", "dining table", "table") if n in index}
        for label in labels:
            if label == "background":
                rest = {c for c in opened if c not in taken}
                if dataset == "coco_object":
                    rest -= {index[n] for n in ("flower", "plant", "food", "fruit", "vegetable") if n in index}
                closed_right, open_right = background - own, (rest | background) - own
                closed, opened_all = closed_right | own, open_right | own
                is_object.append(False)
                main.append(0)
            else:
                name = concept_of(dataset, label)
                c = index[name]
                closed_right = open_right = {c}
                closed = own | (background - clashing(name) if has_background else set())
                far = {o for o in opened if similarity[c, o] < max_similarity} - clashing(name)
                opened_all = closed | far
                is_object.append(True)
                main.append(c)
            rows["permitted0"].append(mask(closed_right))
            rows["permitted1"].append(mask(open_right))
            rows["allowed0"].append(mask(closed | closed_right))
            rows["allowed1"].append(mask(opened_all | open_right))
    stacked = {key: torch.stack(value) for key, value in rows.items()}
    return RuleTable(
        concepts,
        first_rule,
        torch.stack([stacked["permitted0"], stacked["permitted1"]]),
        torch.stack([stacked["allowed0"], stacked["allowed1"]]),
        torch.tensor(is_object),
        torch.tensor(main),
    )


class ConceptWords:
    """The word vectors of every concept, one of which is drawn at each step.

    Args:
        concepts: names.
        embed: word -> unit vector, for every word of every concept.
        main_probability: how often the concept's first word is taken.
    """

    def __init__(self, concepts: Sequence[str], embed: Mapping[str, Tensor], main_probability: float = 0.5) -> None:
        words = [concept_words(name) for name in concepts]
        self.counts = torch.tensor([len(group) for group in words])
        self.starts = torch.cumsum(self.counts, 0) - self.counts
        self.table = torch.stack([embed[word] for group in words for word in group])
        self.main_probability = main_probability

    def main(self) -> Tensor:
        """(C, D) vectors of the first words."""
        return self.table[self.starts]

    def draw(self, generator: torch.Generator) -> Tensor:
        """(C, D) vectors: the first word with `main_probability`, else any of the concept's words."""
        shape = self.counts.shape
        pick = (torch.rand(shape, generator=generator) * self.counts).long()
        main = torch.rand(shape, generator=generator) < self.main_probability
        return self.table[self.starts + torch.where(main, 0, pick)]


def words_nll(logits: Tensor, permitted: Tensor, allowed: Tensor, by_best: Tensor | None = None) -> Tensor:
    """``logsumexp(allowed) - logsumexp(permitted)`` per row.

    Args:
        logits: (N, C) scaled cosines.
        permitted: (N, C) bool.
        allowed: (N, C) bool, a superset of `permitted`.
        by_best: (N,) bool, rows in which the best permitted word alone stands for all permitted ones, as it does when a
            label of several words is decided by its best word.

    Returns:
        (N,) non-negative losses.
    """
    low = torch.finfo(logits.dtype).min
    permitted_logits = logits.masked_fill(~permitted, low)
    right = permitted_logits.logsumexp(dim=1)
    if by_best is not None:
        right = torch.where(by_best, permitted_logits.amax(dim=1), right)
    wrong = logits.masked_fill(~allowed | permitted, low).logsumexp(dim=1)
    return F.softplus(wrong - right)


@dataclass
class Regions:
    """Samples grouped by (image, label).

    Attributes:
        of_sample: (N,) region of each sample.
        image: (M,) image of each region.
        rule: (M,) rule of each region.
        area: (M,) number of samples.
    """

    of_sample: Tensor
    image: Tensor
    rule: Tensor
    area: Tensor

    @classmethod
    def group(cls, image: Tensor, rule: Tensor, num_rules: int) -> Regions:
        """Group samples by their image (N,) and rule (N,)."""
        keys, of_sample, area = torch.unique(image * num_rules + rule, return_inverse=True, return_counts=True)
        return cls(of_sample, keys // num_rules, keys % num_rules, area)

    def mean(self, features: Tensor) -> Tensor:
        """Mean of the samples' features per region: (N, D) -> (M, D)."""
        out = features.new_zeros(len(self.area), features.shape[1])
        return out.index_add(0, self.of_sample, features) / self.area[:, None]


@dataclass
class LossParts:
    """Losses of a step: `patch`, `region` and `image` as in `dense_and_image_loss`."""

    patch: Tensor
    region: Tensor
    image: Tensor


def dense_and_image_loss(
    features: Tensor,
    image_features: Tensor,
    image_of: Tensor,
    rule_of: Tensor,
    form_of_image: Tensor,
    table: RuleTable,
    words: Tensor,
    extra_words: Tensor,
    scale: Tensor,
    views_samples: int,
    background_weight: float = 1.0,
    background_by_best: bool = False,
) -> LossParts:
    """All losses of one step, without a loop over regions.

    Args:
        features: (N, D) features of labelled patches, any length.
        image_features: (B, D) image-level embeddings.
        image_of: (N,) image of each patch.
        rule_of: (N,) rule of each patch.
        form_of_image: (B,) 0 closed, 1 open.
        table: the masks.
        words: (C, D) unit vectors of the concepts' words.
        extra_words: (K, D) unit vectors of words that nothing in the pictures is called; wrong in the open form.
        scale: factor of the cosines.
        views_samples: samples of a whole view; regions below 1.5 % of it do not count for the image-level loss.
        background_weight: factor on the weights of "background" patches and regions.
        background_by_best: decide "background" in the closed form by its best word, as the finished model does.

    Returns:
        Mean losses: per patch with weight area^-0.5, per region on the mean feature, and per (image, object) on the
        image-level embedding, with the other objects of the image left out of the wrong words.
    """
    all_words = torch.cat([words, extra_words])
    features = F.normalize(features, dim=-1)
    regions = Regions.group(image_of, rule_of, len(table.is_object))
    form = form_of_image[regions.image]
    extra = (form == 1)[:, None].expand(-1, len(extra_words))
    permitted = torch.cat([table.permitted[form, regions.rule], torch.zeros_like(extra)], dim=1)  # (M, C + K)
    allowed = torch.cat([table.allowed[form, regions.rule], extra], dim=1)

    of = regions.of_sample
    is_background = ~table.is_object[regions.rule]
    by_best = is_background & (form == 0) if background_by_best else None
    emphasis = torch.where(is_background, background_weight, 1.0)
    patch_by_best = None if by_best is None else by_best[of]
    nll = words_nll(scale * features @ all_words.T, permitted[of], allowed[of], patch_by_best)
    weight = regions.area.float().rsqrt() * emphasis
    patch_loss = (nll * weight[of]).sum() / weight[of].sum()

    pooled = F.normalize(regions.mean(features), dim=-1)
    weight = regions.area.float().pow(0.25) * emphasis
    region_nll = words_nll(scale * pooled @ all_words.T, permitted, allowed, by_best)
    region_loss = (region_nll * weight).sum() / weight.sum()

    shown = table.is_object[regions.rule] & (regions.area >= 0.015 * views_samples)
    if not shown.any():
        return LossParts(patch_loss, region_loss, image_features.sum() * 0)
    present = torch.zeros(len(image_features), all_words.shape[0], dtype=torch.bool)
    present[regions.image[shown], table.main_concept[regions.rule[shown]]] = True
    image = regions.image[shown]
    opened = torch.ones_like(form[shown])
    wrong = torch.cat([table.allowed[opened, regions.rule[shown]], torch.ones_like(extra[shown])], dim=1)
    right = torch.cat([table.permitted[opened, regions.rule[shown]], torch.zeros_like(extra[shown])], dim=1)
    logits = scale * F.normalize(image_features, dim=-1)[image] @ all_words.T
    image_nll = words_nll(logits, right, (wrong & ~present[image]) | right)
    weight = regions.area[shown].float().sqrt()
    return LossParts(patch_loss, region_loss, (image_nll * weight).sum() / weight.sum())
