"""The language of scenes: prompts, what they mean, and which combinations of objects no model sees in training."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import combinations, permutations, product
from typing import NamedTuple

import numpy as np

COLOURS = {
    "red": (0.86, 0.16, 0.16),
    "green": (0.16, 0.66, 0.24),
    "blue": (0.14, 0.34, 0.86),
    "yellow": (0.95, 0.77, 0.10),
    "purple": (0.60, 0.22, 0.72),
}
SHAPES = ("circle", "square", "triangle")
SIZES = ("small", "big")
RELATIONS = ("left of", "right of", "above", "below")
ROWS = (frozenset(("left of", "right of")), frozenset(("above", "below")))
NUMBERS = {"two": 2, "three": 3, "four": 4}
KINDS = tuple(product(COLOURS, SHAPES))
WORDS = {*" ".join((*COLOURS, *SHAPES, *SIZES, *RELATIONS, *NUMBERS, "a", "and")).split(), *(f"{s}s" for s in SHAPES)}

Kind = tuple[str, str]


class Object(NamedTuple):
    """One object of a scene: its colour, its shape and, if said, its size."""

    colour: str
    shape: str
    size: str | None = None

    @property
    def kind(self) -> Kind:
        return self.colour, self.shape

    def __str__(self) -> str:
        return " ".join(filter(None, (self.size, self.colour, self.shape)))


@dataclass(frozen=True)
class Scene:
    """What a prompt asks for: its objects in order and, if said, how some lie to others (`related`).

    There are one object, two to four of a kind, two kinds with or without a relation, three kinds of which the first
    has a relation to each of the others, where the second goes without saying if it is the first, or four kinds in two
    pairs that each have a relation.
    """

    objects: tuple[Object, ...]
    relations: tuple[str, ...] = ()

    @property
    def prompt(self) -> str:
        first, *others = self.objects
        if not others:
            return f"a {first}"
        if self.is_count:
            number = next(word for word, count in NUMBERS.items() if count == len(self.objects))
            return f"{number} {first}s"
        if len(others) == 1:
            return f"a {first} {self.relations[0] if self.relations else 'and'} a {others[0]}"
        one, two = self.relations
        start = f"a {first} {one} a {others[0]} and"
        if len(others) == 2:
            return f"{start} {'' if two == one else two + ' '}a {others[1]}"
        return f"{start} a {others[1]} {two} a {others[2]}"

    @property
    def related(self) -> list[tuple[int, str, int]]:
        """Which object has which relation to which."""
        if len(self.objects) == 4:
            return [(2 * i, relation, 2 * i + 1) for i, relation in enumerate(self.relations)]
        return [(0, relation, i + 1) for i, relation in enumerate(self.relations)]

    @property
    def kinds(self) -> tuple[Kind, ...]:
        return tuple(thing.kind for thing in self.objects)

    @property
    def is_count(self) -> bool:
        """Whether the scene is several objects of one kind."""
        return len(self.objects) > 1 and len(set(self.objects)) == 1 and not self.relations

    @property
    def is_possible(self) -> bool:
        """Whether kinds differ unless they are counted, and all fits: of three kinds one is big, and none in a row.

        Of four objects no size is said.
        """
        sizes = [thing.size for thing in self.objects]
        if len(sizes) == 4 and any(sizes):
            return False
        if self.is_count or len(sizes) == 1:
            return True
        most = 2 if len(sizes) == 2 else 0 if frozenset(self.relations) in ROWS else 1
        return sizes.count("big") <= most and len(set(self.kinds)) == len(sizes)

    @property
    def is_held_out(self) -> bool:
        """Whether the scene has a combination of objects that no model is trained on: a pair of kinds, or a count."""
        return self.kinds in _NO_COUNTS or any(frozenset(pair) in _NO_PAIRS for pair in combinations(self.kinds, 2))


def _held_out() -> tuple[frozenset[tuple[Kind, ...]], frozenset[frozenset[Kind]]]:
    """Return the counts and the pairs of kinds that are held out."""
    rng = np.random.default_rng(0)
    counts = [(kind,) * number for number in (2, 3) for kind in KINDS]
    pairs = list(combinations(KINDS, 2))
    no_counts = [counts[i] for i in rng.permutation(len(counts))[:6]]
    no_pairs = [frozenset(pairs[i]) for i in rng.permutation(len(pairs))[:20]]
    no_counts += [(KINDS[i],) * 4 for i in rng.permutation(len(KINDS))[:3]]
    return frozenset(no_counts), frozenset(no_pairs)


_NO_COUNTS, _NO_PAIRS = _held_out()

_OBJECT = rf"(?:({'|'.join(SIZES)}) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_RELATION = f"(?:{'|'.join(RELATIONS)})"
NUMBERS_OF_RELATIONS = {1: (0,), 2: (0, 1), 3: (2,), 4: (2,)}  # by the number of kinds


def parse(prompt: str) -> Scene:
    """Return the scene a prompt of the grammar asks for; KeyError for any other sentence."""
    objects = tuple(Object(colour, shape, size or None) for size, colour, shape in re.findall(_OBJECT, prompt))
    relations = tuple(re.findall(_RELATION, prompt))
    if number := NUMBERS.get(prompt.partition(" ")[0]):
        scene = Scene(objects[:1] * number)
    else:
        scene = Scene(objects, relations * 2 if (len(objects), len(relations)) == (3, 1) else relations)
    number_fits = scene.is_count or len(scene.relations) in NUMBERS_OF_RELATIONS.get(len(objects), ())
    if number_fits and scene.is_possible and scene.prompt == prompt:
        return scene
    raise KeyError(prompt)


# ---- draws -----------------------------------------------------------------------------------------------------------


def _kinds(number: int, rng: np.random.Generator) -> list[Kind]:
    return [KINDS[i] for i in rng.permutation(len(KINDS))[:number]]


def _sized(kinds: list[Kind], rng: np.random.Generator, share: float) -> tuple[Object, ...]:
    """Name the sizes of a share of the objects."""
    return tuple(Object(*kind, size=SIZES[rng.integers(2)] if rng.random() < share else None) for kind in kinds)


def _single(rng: np.random.Generator) -> Scene:
    return Scene(_sized(_kinds(1, rng), rng, 0.4))


def _count(rng: np.random.Generator) -> Scene:
    return Scene(_sized(_kinds(1, rng), rng, 0.3) * int(rng.integers(2, 5)))


def _pair(rng: np.random.Generator) -> Scene:
    relation = (None, *RELATIONS)[rng.integers(5)]
    return Scene(_sized(_kinds(2, rng), rng, 0.3), (relation,) if relation else ())


def _triple(rng: np.random.Generator) -> Scene:
    relations = (RELATIONS[rng.integers(4)],) * 2 if rng.random() < 0.3 else _two_relations(rng)
    return Scene(_sized(_kinds(3, rng), rng, 0.3), relations)


def _quadruple(rng: np.random.Generator) -> Scene:
    return Scene(tuple(Object(*kind) for kind in _kinds(4, rng)), tuple(RELATIONS[i] for i in rng.integers(4, size=2)))


def _two_relations(rng: np.random.Generator) -> tuple[str, ...]:
    return tuple(RELATIONS[i] for i in rng.permutation(4)[:2])


def _drawn(draw: Callable[[np.random.Generator], Scene], rng: np.random.Generator, *, held_out: bool) -> Scene:
    """Draw possible scenes until one is of the split."""
    while True:
        scene = draw(rng)
        if scene.is_possible and scene.is_held_out == held_out:
            return scene


MIX = (0.08, 0.16, 0.20, 0.26, 0.30)  # of one object, counts, pairs, three and four kinds in training


def training_scene(rng: np.random.Generator, mix: tuple[float, ...] = MIX) -> Scene:
    """Draw a scene of the training split: one object, a count, or two to four kinds, with these probabilities."""
    draw = (_single, _count, _pair, _triple, _quadruple)[rng.choice(5, p=mix)]
    return _drawn(draw, rng, held_out=False)


def training_prompts(number: int, seed: int = 0) -> list[str]:
    """Return the first prompts of a stream of the training split."""
    rng = np.random.default_rng(seed)
    return [training_scene(rng).prompt for _ in range(number)]


def held_out_prompts(number: int, seed: int = 0) -> list[str]:
    """Return `number` prompts of one or two kinds of objects whose combination no model has seen, without sizes.

    One in eight is a count, the rest are pairs.
    """
    rng = np.random.default_rng(seed)
    counts = [Scene((Object(*kind),) * n) for n in (2, 3) for kind in KINDS]
    pairs = [
        Scene((Object(*a), Object(*b)), (relation,) if relation else ())
        for a, b in permutations(KINDS, 2)
        for relation in (None, *RELATIONS)
    ]
    counts, pairs = ([scene for scene in group if scene.is_held_out] for group in (counts, pairs))
    num_counts = min(len(counts), max(1, number // 8))
    chosen = [counts[i] for i in rng.permutation(len(counts))[:num_counts]]
    chosen += [pairs[i] for i in rng.permutation(len(pairs))[: number - num_counts]]
    return [chosen[i].prompt for i in rng.permutation(number)]


def hard_prompts(number: int, seed: int = 0) -> list[str]:
    """Return `number` different prompts of four kinds in two relations, of combinations that no model has seen."""
    rng = np.random.default_rng(seed)
    prompts: dict[str, None] = {}
    while len(prompts) < number:
        prompts[_drawn(_quadruple, rng, held_out=True).prompt] = None
    return list(prompts)


def near_miss(scene: Scene, rng: np.random.Generator) -> Scene:
    """Draw a scene that shares most words with `scene`: another relation, order, count, colour, shape or size."""
    moves = [_another_object]
    if len(scene.objects) == 1 or scene.is_count:
        moves += [_another_count]
    else:
        moves += [_another_relation, _another_order]
    near = scene
    while near == scene or not near.is_possible:
        near = moves[rng.integers(len(moves))](scene, rng)
    return near


def _another_object(scene: Scene, rng: np.random.Generator) -> Scene:
    """Change the colour, the shape or the size of one object, or of all that are of its kind."""
    changed = scene.objects[rng.integers(len(scene.objects))]
    new = [
        changed._replace(colour=list(COLOURS)[rng.integers(len(COLOURS))]),
        changed._replace(shape=SHAPES[rng.integers(len(SHAPES))]),
        changed._replace(size={"small": "big", "big": "small"}.get(changed.size or "")),
    ][rng.integers(3)]
    return replace(scene, objects=tuple(new if thing == changed else thing for thing in scene.objects))


def _another_count(scene: Scene, rng: np.random.Generator) -> Scene:
    return Scene(scene.objects[:1] * int(rng.integers(1, 5)))


def _another_relation(scene: Scene, rng: np.random.Generator) -> Scene:
    relations = list(scene.relations) or [RELATIONS[rng.integers(4)]]
    relations[rng.integers(len(relations))] = RELATIONS[rng.integers(4)]
    return replace(scene, relations=tuple(relations))


def _another_order(scene: Scene, rng: np.random.Generator) -> Scene:
    """Exchange two objects, of three the first and another one."""
    objects = list(scene.objects)
    one = 0 if len(objects) < 4 else int(rng.integers(3))
    other = int(rng.integers(one + 1, len(objects)))
    objects[one], objects[other] = objects[other], objects[one]
    return replace(scene, objects=tuple(objects))
