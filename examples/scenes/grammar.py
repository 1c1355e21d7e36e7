"""The language of scenes: prompts, what they mean, and which of them the models never see in training."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations, permutations, product

import numpy as np

COLOURS = {
    "red": (0.86, 0.16, 0.16),
    "green": (0.16, 0.66, 0.24),
    "blue": (0.14, 0.34, 0.86),
    "yellow": (0.95, 0.77, 0.10),
    "purple": (0.60, 0.22, 0.72),
}
SHAPES = ("circle", "square", "triangle")
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = {"two": 2, "three": 3}
KINDS = tuple(product(COLOURS, SHAPES))

Kind = tuple[str, str]


@dataclass(frozen=True)
class Scene:
    """What a prompt asks for: its objects (colour, shape) in order and, if said, how the first lies to the second."""

    objects: tuple[Kind, ...]
    relation: str | None = None

    @property
    def prompt(self) -> str:
        if len(self.objects) == 1:
            return f"a {_name(self.objects[0])}"
        if len(set(self.objects)) == 1:
            number = next(word for word, count in NUMBERS.items() if count == len(self.objects))
            return f"{number} {_name(self.objects[0])}s"
        first, second = map(_name, self.objects)
        return f"a {first} {self.relation or 'and'} a {second}"


def _name(kind: Kind) -> str:
    return " ".join(kind)


def _splits() -> tuple[list[list[Scene]], list[list[Scene]]]:
    """Return the scenes (train, held out), each as [singles, counts, pairs]; what is held out are combinations."""
    rng = np.random.default_rng(0)
    repeats = [(kind,) * count for count in NUMBERS.values() for kind in KINDS]
    pairs = list(combinations(KINDS, 2))
    no_repeats = {repeats[i] for i in rng.permutation(len(repeats))[:6]}
    no_pairs = {frozenset(pairs[i]) for i in rng.permutation(len(pairs))[:20]}

    singles = [Scene((kind,)) for kind in KINDS]
    counts = [Scene(objects) for objects in repeats]
    two = [Scene(pair, relation) for pair in permutations(KINDS, 2) for relation in (None, *RELATIONS)]
    train = [
        singles,
        [scene for scene in counts if scene.objects not in no_repeats],
        [scene for scene in two if frozenset(scene.objects) not in no_pairs],
    ]
    held_out = [
        [],
        [scene for scene in counts if scene.objects in no_repeats],
        [scene for scene in two if frozenset(scene.objects) in no_pairs],
    ]
    return train, held_out


TRAIN, HELD_OUT = _splits()
_TRAINING = frozenset(scene for group in TRAIN for scene in group)
_BY_PROMPT = {scene.prompt: scene for split in (TRAIN, HELD_OUT) for group in split for scene in group}


def parse(prompt: str) -> Scene:
    """Return the scene a prompt of the grammar asks for; KeyError for any other sentence."""
    return _BY_PROMPT[prompt]


def training_scene(rng: np.random.Generator) -> Scene:
    """Draw a scene of the training split: one object (15 %), a count (25 %) or a pair (60 %)."""
    group = TRAIN[rng.choice(3, p=(0.15, 0.25, 0.60))]
    return group[rng.integers(len(group))]


def held_out_prompts(number: int, seed: int = 0) -> list[str]:
    """Return `number` prompts whose combination of objects no model has seen: one in eight a count, the rest pairs."""
    rng = np.random.default_rng(seed)
    _, counts, pairs = HELD_OUT
    num_counts = min(len(counts), max(1, number // 8))
    chosen = [counts[i] for i in rng.permutation(len(counts))[:num_counts]]
    chosen += [pairs[i] for i in rng.permutation(len(pairs))[: number - num_counts]]
    return [chosen[i].prompt for i in rng.permutation(number)]


def hard_negatives(scene: Scene, rng: np.random.Generator, number: int) -> list[Scene]:
    """Draw training scenes that share most words with `scene`: another relation, order, colour, shape or count."""
    near: list[Scene] = []
    while len(near) < number:
        objects, relation = list(scene.objects), scene.relation
        move = rng.integers(4)
        if move == 0 and len(set(objects)) == 2:
            relation = (None, *RELATIONS)[rng.integers(5)]
        elif move == 1 and len(set(objects)) == 2:
            objects.reverse()
        elif move == 2 and len(set(objects)) == 1:
            objects = objects[:1] * int(rng.integers(1, 4))
        else:
            changed = objects[rng.integers(len(objects))]
            new = KINDS[rng.integers(len(KINDS))]
            new = (new[0], changed[1]) if rng.random() < 0.5 else (changed[0], new[1])
            objects = [new if kind == changed else kind for kind in objects]
        if len(set(objects)) == 1:
            relation = None
        candidate = Scene(tuple(objects), relation)
        if candidate != scene and candidate in _TRAINING:
            near.append(candidate)
    return near


def other_relations(scene: Scene, rng: np.random.Generator, number: int) -> list[Scene]:
    """Draw `number` scenes with the objects of a pair under another relation: what a bag of words cannot tell apart."""
    others = [relation for relation in RELATIONS if relation != scene.relation]
    return [Scene(scene.objects, others[i]) for i in rng.permutation(len(others))[:number]]
