"""Judge images of objects, counts, colours and positions by a detector, after GenEval, on transformers alone.

GenEval (Ghosh et al., arXiv:2310.11513) asks a detector of COCO's 80 classes and OpenAI's CLIP whether an image shows
what its prompt names. Here the detector is open-vocabulary: OWLv2 or Grounding DINO. The rules are pure functions of
detections; `Judge` finds these. Its verdicts are near GenEval's and not GenEval's: scores of another detector are on
another scale, which the thresholds have to follow (those given here are guesses), without segmentation masks the crops
that CLIP names a colour of hold their background, and phrases of Grounding DINO that are no class are dropped.

**Public weights were not run here**: `tests/test_paper.py` has an OWLv2 and a CLIP of random weights, and holds the
rules to drawn scenes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import ceil, floor, hypot
from typing import Any, NamedTuple

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
MOST = 16  # detections of a class that are kept
OVERLAP = 0.5  # intersection over union from which on two detections of a class are one object
MARGIN = 0.1  # of the sizes of two objects, by which an offset has to exceed nothing
DETECTOR, CLIP = "google/owlv2-base-patch16-ensemble", "openai/clip-vit-large-patch14"


class Detection(NamedTuple):
    """An object found in an image.

    Args:
        label: Its class.
        box: Left, top, right and bottom, in pixels.
        score: Confidence, from 0 to 1.
    """

    label: str
    box: tuple[float, float, float, float]
    score: float

    @property
    def centre(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    @property
    def size(self) -> tuple[float, float]:
        return self.box[2] - self.box[0], self.box[3] - self.box[1]


ColourOf = Callable[[Detection], str]

# ---- rules -----------------------------------------------------------------------------------------------------------


def overlap(one: Detection, other: Detection) -> float:
    """Return the intersection over the union of two boxes."""
    width = min(one.box[2], other.box[2]) - max(one.box[0], other.box[0])
    height = min(one.box[3], other.box[3]) - max(one.box[1], other.box[1])
    common = max(width, 0.0) * max(height, 0.0)
    union = sum(thing.size[0] * thing.size[1] for thing in (one, other)) - common
    return common / union if union else 0.0


def distinct(detections: Iterable[Detection]) -> list[Detection]:
    """Return detections, the surest first, without those that overlap a surer one of their class."""
    kept: list[Detection] = []
    for one in sorted(detections, key=lambda one: -one.score):
        rivals = [other for other in kept if other.label == one.label]
        if len(rivals) < MOST and all(overlap(one, other) < OVERLAP for other in rivals):
            kept.append(one)
    return kept


def relations(one: Detection, other: Detection) -> set[str]:
    """Return how an object lies to another: the directions within 60° of the offset between their centres.

    The offset is shortened by a tenth of both sizes along each axis, so that objects on top of each other lie nowhere.
    """
    (x, y), (other_x, other_y) = one.centre, other.centre
    across, down = (MARGIN * (a + b) for a, b in zip(one.size, other.size, strict=True))
    half = hypot(x - other_x, y - other_y) / 2
    shares = {
        "left of": other_x - x - across,
        "right of": x - other_x - across,
        "above": other_y - y - down,
        "below": y - other_y - down,
    }
    return {name for name, share in shares.items() if share > half}


def faults(metadata: dict[str, Any], detections: Iterable[Detection], colour_of: ColourOf) -> list[str]:
    """Return what is wrong in an image, by GenEval's rules; nothing is for a right one.

    Of each class that is to be included the `count` surest objects are looked at: all have to be of the colour, and
    lie as asked to all objects of the entry that the position names. An excluded class occurs less than `count` times.

    Args:
        metadata: A line of GenEval's `evaluation_metadata.jsonl`.
        detections: What was found, distinct objects above a threshold.
        colour_of: Names the colour of a detection; asked only where a colour is.
    """
    surest = sorted(detections, key=lambda one: -one.score)
    wrong: list[str] = []
    matched: list[list[Detection]] = []  # for each entry its objects, none if it is not met
    for entry in metadata.get("include", []):
        things = [one for one in surest if one.label == entry["class"]][: entry.get("count", 1)]
        fault = _fault(entry, things, matched, colour_of)
        matched.append([] if fault else things)
        wrong += [fault] if fault else []
    for entry in metadata.get("exclude", []):
        number = sum(one.label == entry["class"] for one in surest)
        wrong += [f"{number} {entry['class']}, not below {entry['count']}"] if number >= entry["count"] else []
    return wrong


def _fault(entry: dict[str, Any], things: list[Detection], matched: list[list[Detection]], colour_of: ColourOf) -> str:
    """Return what is wrong with the objects of an entry, "" for nothing."""
    name, count, colour = entry["class"], entry.get("count", 1), entry.get("color")
    relation, target = entry.get("position") or (None, 0)
    if len(things) < count:
        return f"{len(things)} of {count} {name}"
    if colour and (seen := [colour_of(one) for one in things]) != [colour] * count:
        return f"{name} {' and '.join(seen)}, not {colour}"
    if relation and not matched[target]:
        return f"nothing that {name} could be {relation}"
    if relation and any(relation not in relations(one, other) for one in things for other in matched[target]):
        return f"{name} not {relation} {matched[target][0].label}"
    return ""


def judge(metadata: dict[str, Any], detections: Iterable[Detection], colour_of: ColourOf) -> bool:
    """Return whether an image shows what its prompt names (`faults`)."""
    return not faults(metadata, detections, colour_of)


# ---- detector --------------------------------------------------------------------------------------------------------


class Judge:
    """Verdicts on images, by an open-vocabulary detector and by CLIP for colours.

    Args:
        classes: All classes that may occur, which compete for every object: of GenEval's file COCO's 80.
        detector: Name or folder of an OWLv2 or a Grounding DINO.
        clip: Name or folder of a CLIP.
        threshold: Score from which on a detection counts.
        counting_threshold: The same for prompts of the tag "counting".
        device: Device of both.
    """

    def __init__(
        self,
        classes: Sequence[str],
        detector: str = DETECTOR,
        clip: str = CLIP,
        *,
        threshold: float = 0.2,
        counting_threshold: float = 0.3,
        device: str | torch.device = "cpu",
    ) -> None:
        from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor, CLIPModel, CLIPProcessor

        self.classes = list(classes)
        self.threshold, self.counting_threshold, self.device = threshold, counting_threshold, device
        self.processor: Any = AutoProcessor.from_pretrained(detector)
        self.detector: Any = AutoModelForZeroShotObjectDetection.from_pretrained(detector).to(device).eval()
        self.clip_processor: Any = CLIPProcessor.from_pretrained(clip)
        clip_model: Any = CLIPModel.from_pretrained(clip)
        self.clip = clip_model.to(device).eval()
        owl = self.detector.config.model_type.startswith("owl")  # trained on sentences, the other on names
        self.queries = [f"a photo of a {name}" for name in self.classes] if owl else self.classes

    @torch.no_grad()
    def detections(self, image: Image.Image, threshold: float) -> list[Detection]:
        """Return the distinct objects in an image whose score is above a threshold, the surest first."""
        inputs = self.processor(images=image, text=[self.queries], return_tensors="pt").to(self.device)
        found = self.processor.post_process_grounded_object_detection(
            self.detector(**inputs), threshold=threshold, target_sizes=[image.size[::-1]], text_labels=[self.classes]
        )[0]
        corner = torch.tensor([*image.size, *image.size])
        boxes = found["boxes"].cpu().clamp(min=0).minimum(corner).tolist()
        rows = zip(found["text_labels"], boxes, found["scores"].tolist(), strict=True)
        things = [Detection(label, tuple(box), score) for label, box, score in rows if label in self.classes]
        return distinct(thing for thing in things if min(thing.size) >= 1)

    @torch.no_grad()
    def colour(self, image: Image.Image, thing: Detection) -> str:
        """Return the colour that CLIP sees in the crop of an object, of three ways to say each."""
        ways = (f" {thing.label}", f"-colored {thing.label}", " object")
        texts = [f"a photo of a {colour}{way}" for way in ways for colour in COLOURS]
        crop = image.crop((floor(thing.box[0]), floor(thing.box[1]), ceil(thing.box[2]), ceil(thing.box[3])))
        inputs = self.clip_processor(images=crop, text=texts, padding=True, truncation=True, return_tensors="pt")
        out = self.clip(**inputs.to(self.device))
        named = normalize(normalize(out.text_embeds, dim=-1).view(len(ways), len(COLOURS), -1).mean(0), dim=-1)
        return COLOURS[int((named @ out.image_embeds[0]).argmax())]

    def __call__(self, images: Tensor, metadata: dict[str, Any]) -> list[bool]:
        """Return the verdict on each of the images (N, 3, H, W) in [0, 1] of one prompt."""
        threshold = self.counting_threshold if metadata.get("tag") == "counting" else self.threshold
        pictures = VaeImageProcessor.numpy_to_pil(images.float().cpu().movedim(1, -1).numpy())
        return [
            judge(metadata, self.detections(one, threshold), lambda thing, one=one: self.colour(one, thing))
            for one in pictures
        ]
