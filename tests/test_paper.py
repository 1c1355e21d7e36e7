"""examples/benchmarks/paper.py: its judge on drawn scenes, what it costs, and runs that stop and go on."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from PIL import Image
from transformers import CLIPTokenizer, Owlv2Config, Owlv2ForObjectDetection, Owlv2ImageProcessor, Owlv2Processor

import checkpoints
import tiny
from glassflows import FeynmanKac, MicroBatches
from scenes.draw import draw
from scenes.grammar import near_miss, parse, training_scene
from scenes.verifier import find_objects

BENCHMARKS = Path(__file__).parents[1] / "examples" / "benchmarks"
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
NAMES = ("ode", "best", "ddpm", "ddpm-every", "published", "glass", "late", "twisted")


@pytest.fixture(scope="module")
def paper():
    """The script as a module; what lies beside it has names of its own only while it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import paper
    yield paper
    PartialState._reset_state()
    for name in ("paper", "paper_methods", "paper_report", "geneval"):
        sys.modules.pop(name)


@pytest.fixture(scope="module")
def geneval(paper):
    return paper.geneval


@pytest.fixture(scope="module")
def report(paper):
    return sys.modules["paper_report"]


# ---- the rules -------------------------------------------------------------------------------------------------------


def fits(scene):
    """GenEval's metadata name no sizes, and no class twice."""
    shapes = [shape for _, shape in dict.fromkeys(scene.kinds)]
    return len(set(shapes)) == len(shapes) and not any(thing.size for thing in scene.objects)


def metadata(scene, relations=None):
    """Return a scene as a line of GenEval's metadata; relations are those of the first object to each other one."""
    counts = Counter(scene.kinds)
    include = [{"class": shape, "count": n, "color": colour} for (colour, shape), n in counts.items()]
    for other, relation in enumerate(scene.relations if relations is None else relations, 1):
        include[other]["position"] = [OPPOSITE[relation], 0]
    return {"include": include, "exclude": [{"class": one["class"], "count": one["count"] + 1} for one in include]}


def seen(geneval, image):
    """Return what the scenes' verifier finds, as detections, and the colour of each."""
    colours = {
        geneval.Detection(one.shape, (one.x - one.radius, one.y - one.radius, one.x + one.radius, one.y + one.radius),
                          0.5 + one.radius / 100): one.colour
        for one in find_objects(image)
    }  # fmt: skip
    return list(colours), colours.__getitem__


def scenes(number, seed):
    rng = np.random.default_rng(seed)
    found = []
    while len(found) < number:
        scene = training_scene(rng)
        found += [scene] if fits(scene) else []
    return found, rng


def test_drawn_scenes_are_right_and_their_near_misses_wrong(geneval):
    drawn, rng = scenes(150, 0)
    right, wrong = [], []
    for scene in drawn:
        given = seen(geneval, draw(scene, rng))
        right.append(geneval.judge(metadata(scene), *given))
        near = near_miss(scene, rng)
        if fits(near) and Counter(near.kinds) != Counter(scene.kinds):
            wrong.append(geneval.judge(metadata(near), *given))
        if scene.relations:
            turned = [OPPOSITE[relation] for relation in scene.relations]
            wrong.append(geneval.judge(metadata(scene, turned), *given))
    assert np.mean(right) >= 0.99
    assert len(wrong) > 100
    assert not any(wrong)


@pytest.mark.parametrize(
    ("prompt", "asked", "fault"),
    [
        ("two green triangles", "two green triangles", ""),
        ("two green triangles", "three green triangles", "2 of 3 triangle"),
        ("three green triangles", "two green triangles", "3 triangle, not below 3"),
        ("a red circle and a blue square", "a red circle and a blue triangle", "0 of 1 triangle"),
        ("a red circle and a blue square", "a blue circle and a blue square", "circle red, not blue"),
        ("a red circle left of a blue square", "a red circle right of a blue square", "square not left of circle"),
        ("a red circle left of a blue square", "a green circle left of a blue square", "nothing that square could be"),
    ],
)
def test_says_what_is_wrong(geneval, prompt, asked, fault):
    given = seen(geneval, draw(parse(prompt), np.random.default_rng(1)))
    found = geneval.faults(metadata(parse(asked)), *given)
    assert any(fault in one for one in found) if fault else not found


def box(geneval, label, x, y, score, half=5.0):
    return geneval.Detection(label, (x - half, y - half, x + half, y + half), score)


def test_only_the_surest_of_a_class_are_looked_at(geneval):
    """GenEval counts at least; more is wrong where that is excluded, or is surer and of another colour."""
    red, blue = box(geneval, "cat", 10, 10, 0.9), box(geneval, "cat", 50, 10, 0.5)
    colour = {red: "red", blue: "blue"}.__getitem__
    one = {"class": "cat", "count": 1}
    assert geneval.judge({"include": [one]}, [blue, red], colour)
    assert not geneval.judge({"include": [one], "exclude": [{"class": "cat", "count": 2}]}, [blue, red], colour)
    assert geneval.judge({"include": [one | {"color": "red"}]}, [blue, red], colour)
    assert not geneval.judge({"include": [one | {"color": "blue"}]}, [blue, red], colour)


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (40, 0, {"right of"}),
        (-40, 0, {"left of"}),
        (0, 40, {"below"}),
        (0, -40, {"above"}),
        (30, -30, {"right of", "above"}),
        (40, 20, {"right of"}),  # 26.6° off: 18 of 44.7 is less than half
        (1.9, 0, set()),  # within a tenth of both sizes
    ],
)
def test_relations_have_a_margin(geneval, x, y, expected):
    assert geneval.relations(box(geneval, "cat", x, y, 1.0), box(geneval, "dog", 0, 0, 1.0)) == expected


def test_one_object_is_detected_once(geneval):
    surest, again = box(geneval, "cat", 10, 10, 0.9), box(geneval, "cat", 12, 10, 0.8)  # 80 of 120
    beside, other = box(geneval, "cat", 15, 10, 0.7), box(geneval, "dog", 10, 10, 0.6)  # 50 of 150
    assert geneval.overlap(surest, again) == pytest.approx(80 / 120)
    assert geneval.distinct([other, beside, again, surest]) == [surest, beside, other]


# ---- the detector ----------------------------------------------------------------------------------------------------


CLASSES = ["bus", "cat", "dog"]


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """Folders of an OWLv2 and of a CLIP of random weights."""
    root = tmp_path_factory.mktemp("judge")
    torch.manual_seed(0)
    clip = checkpoints.clip(root / "clip")
    widths = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": 54, "max_position_embeddings": 16, "bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53}
    vision = {"image_size": 32, "patch_size": 8}
    owl = Owlv2ForObjectDetection(
        Owlv2Config(text_config=widths | text, vision_config=widths | vision, projection_dim=32)
    )
    torch.nn.init.normal_(owl.box_head.dense2.weight, std=0.5)  # else all boxes are alike
    owl.save_pretrained(root / "owl")
    pixels = Owlv2ImageProcessor(size={"height": 32, "width": 32})
    Owlv2Processor(pixels, CLIPTokenizer.from_pretrained(clip)).save_pretrained(root / "owl")
    return str(root / "owl"), str(clip)


@pytest.fixture(scope="module")
def judge(geneval, detector):
    return geneval.Judge(CLASSES, *detector, threshold=0.1, counting_threshold=0.3)


@pytest.fixture(scope="module")
def photo():
    pixels = torch.rand(3, 16, 24, generator=tiny.seeded(1))
    return Image.fromarray((pixels * 255).byte().movedim(0, -1).numpy())


@tiny.TRANSFORMERS_5
def test_detections_are_those_of_the_model(geneval, judge, photo):
    """Boxes are shares of the square that the image is padded to, cut off where the image ends."""
    texts = [[f"a photo of a {name}" for name in CLASSES]]
    with torch.no_grad():
        out = judge.detector(**judge.processor(images=photo, text=texts, return_tensors="pt"))
    scores, labels = out.logits[0].sigmoid().max(-1)
    threshold = float(scores.median())
    expected = []
    for score, label, (x, y, width, height) in zip(scores, labels, 24 * out.pred_boxes[0], strict=True):
        edges = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
        left, top, right, bottom = (max(0.0, float(edge)) for edge in edges)
        corners = min(left, 24.0), min(top, 16.0), min(right, 24.0), min(bottom, 16.0)
        if score > threshold and corners[2] - corners[0] >= 1 and corners[3] - corners[1] >= 1:
            expected.append(geneval.Detection(CLASSES[label], corners, float(score)))
    expected, found = geneval.distinct(expected), judge.detections(photo, threshold)
    assert len(found) > 1
    assert [one.label for one in found] == [one.label for one in expected]
    np.testing.assert_allclose([one.box for one in found], [one.box for one in expected], atol=1e-4)
    np.testing.assert_allclose([one.score for one in found], [one.score for one in expected], rtol=1e-4)


@tiny.TRANSFORMERS_5
def test_colours_are_those_of_three_sentences(geneval, judge, photo):
    named = set()
    for left in range(0, 20, 2):
        thing = geneval.Detection("cat", (left + 0.4, 2.5, left + 3.7, 9.1), 1.0)
        crop = photo.crop((left, 2, left + 4, 10))
        sums = np.zeros(len(geneval.COLOURS))
        with torch.no_grad():
            for i, colour in enumerate(geneval.COLOURS):
                ways = [
                    f"a photo of a {colour} cat",
                    f"a photo of a {colour}-colored cat",
                    f"a photo of a {colour} object",
                ]
                given = judge.clip_processor(images=crop, text=ways, padding=True, truncation=True, return_tensors="pt")
                out = judge.clip(**given)
                mean = torch.nn.functional.normalize(out.text_embeds, dim=-1).mean(0)
                sums[i] = torch.cosine_similarity(mean, out.image_embeds[0], dim=0)
        assert judge.colour(photo, thing) == geneval.COLOURS[sums.argmax()]
        named.add(judge.colour(photo, thing))
    assert len(named) > 1


@tiny.TRANSFORMERS_5
def test_counts_have_a_threshold_of_their_own(geneval, judge, monkeypatch):
    asked = []

    def found(image, threshold):
        asked.append((image.size, threshold))
        return [box(geneval, "cat", 10, 10, 0.5)] * len(asked)

    monkeypatch.setattr(judge, "detections", found)
    given = {"tag": "counting", "include": [{"class": "cat", "count": 2}]}
    assert judge(torch.rand(2, 3, 16, 24, generator=tiny.seeded()), given) == [False, True]
    assert judge(torch.rand(1, 3, 16, 24, generator=tiny.seeded()), given | {"tag": "two_object"}) == [True]
    assert asked == [((24, 16), 0.3), ((24, 16), 0.3), ((24, 16), 0.1)]


# ---- the methods -----------------------------------------------------------------------------------------------------


def settings(**others):
    return {
        "calls": 10,
        "particles": 3,
        "transitions": 5,
        "reward_scale": None,
        "late_scale": None,
        "twist": 0.5,
    } | others


def drawn(paper, flux, method, **batches):
    call = tiny.FLUX_CALL | {"num_inference_steps": 10, "generator": tiny.seeded()}
    return paper.draw(method, flux.pipe, tiny.brightness, "a cat", MicroBatches(**batches), call)


@pytest.mark.parametrize("name", NAMES)
def test_costs_what_was_estimated(paper, flux, name):
    """And the pipeline has its own scheduler back."""
    method, native = paper.methods(settings())[name], flux.pipe.scheduler
    row = paper.as_row(drawn(paper, flux, method), None)
    cost = sys.modules["paper_methods"].cost(method, 10)
    assert {key: row[key] for key in cost._fields} == cost._asdict()
    assert row["network_calls"] == 10 * len(row["rewards"])
    assert row["rewards"] == sorted(row["rewards"], reverse=True)
    assert row["reward"] == row["rewards"][0]
    assert flux.pipe.scheduler is native


def test_ancestral_steering_is_scored_as_often_as_glass(paper):
    cost = sys.modules["paper_methods"].cost
    for calls in (20, 50):
        known = paper.methods(settings(calls=calls))
        assert cost(known["ddpm"], calls) == cost(known["glass"], calls) == (3 * calls, 15, 15, 0)
        assert cost(known["ddpm-every"], calls).reward_calls == 3 * calls


def test_best_is_the_native_sampler_from_the_noise_that_all_start_from(paper, flux):
    """One transition by Euler is the native ODE; it is drawn in another way, and in parts."""
    best = drawn(paper, flux, paper.methods(settings())["best"], network=2, reward=1)
    euler = paper.Method("", 3, {"num_transitions": 1, "solver_order": 1}, FeynmanKac(1.0, ess_threshold=0.0))
    other = drawn(paper, flux, euler)
    torch.testing.assert_close(best.images, other.images, atol=1e-4, rtol=0)
    torch.testing.assert_close(best.rewards, other.rewards, atol=1e-2, rtol=0)
    assert best.diversity == pytest.approx(other.diversity, rel=1e-3)


@pytest.mark.parametrize("name", ["clip", "pickscore", "hpsv2", "imagereward", "aesthetic"])
def test_rewards_are_named_and_have_gradients(paper, folders, name):
    classes = {"clip": "CLIPScore", "pickscore": "PickScore", "hpsv2": "HPSv2", "imagereward": "ImageReward"}
    kind = classes.get(name, "AestheticScore")
    reward = paper.load_reward(name, folders[kind], torch.device("cpu"))
    assert type(reward).__name__ == kind
    images = torch.rand(1, 3, 16, 24, generator=tiny.seeded()).requires_grad_()
    assert reward(images, ["a cat"]).requires_grad == (name in paper.DIFFERENTIABLE)


def test_arguments_of_the_pipeline_are_read_as_python(paper, tmp_path):
    pairs = ["height=768", "guidance_scale=3.5", "negative_prompt=a blurry one", "true_cfg=None", "sigmas=[1, 0.5]"]
    args = paper.parsed(["--model", "m", "--prompts", str(tmp_path / "p.txt"), "--call", *pairs])
    assert args.call == {
        "height": 768, "guidance_scale": 3.5, "negative_prompt": "a blurry one", "true_cfg": None, "sigmas": [1, 0.5],
    }  # fmt: skip


# ---- runs ------------------------------------------------------------------------------------------------------------

PROMPTS = [
    {"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "a cat"},
    {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}], "prompt": "a red dog"},
    {"tag": "colors", "include": [{"class": "bus", "count": 1, "color": "blue"}], "prompt": "a blue bus"},
]


@pytest.fixture(scope="module")
def toy(tmp_path_factory, detector):
    """Arguments of a run of a saved pipeline, with prompts like GenEval's and a detector."""
    root = tmp_path_factory.mktemp("toy")
    tiny.flux().save_pretrained(root / "flux")
    (root / "prompts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in PROMPTS))
    owl, clip = detector
    return [
        "--model", str(root / "flux"), "--dtype", "float32", "--device", "cpu", "--reward", "tiny:brightness",
        "--prompts", str(root / "prompts.jsonl"), "--call", "height=16", "width=24", "max_sequence_length=8",
        "--calls", "4", "--particles", "2", "--transitions", "2", "--detector", owl, "--clip", clip,
        "--threshold", "0.1", "--methods", "ode", "best", "--out",
    ]  # fmt: skip


def kept(report, folder):
    """Return the rows of a folder by prompt, method and seed, without their times."""
    rows = {(row["index"], row["method"], row["seed"]): row for row in report.read(folder)}
    return {key: {name: value for name, value in row.items() if name != "seconds"} for key, row in rows.items()}


@pytest.mark.slow
@tiny.TRANSFORMERS_5
def test_runs_stop_and_go_on(paper, report, toy, tmp_path, monkeypatch, capsys):
    paper.main([*toy, str(tmp_path), "--save-images"])
    first, file = kept(report, tmp_path), tmp_path / "rows-0.jsonl"
    assert set(first) == {(index, name, 0) for index in range(3) for name in ("ode", "best")}
    assert first[0, "ode", 0]["reward"] in first[0, "best", 0]["rewards"]
    assert [row["tag"] for row in first.values()] == ["single_object"] * 2 + ["colors"] * 4
    assert all(len(row["verdicts"]) == len(row["rewards"]) for row in first.values())
    assert len(list((tmp_path / "images").glob("*.png"))) == 6
    assert (tmp_path / "paper.png").stat().st_size > 0
    assert "| best of 2, ODE | 8 | 2 | 2 | 0 |" in (said := capsys.readouterr()).out
    assert "| right, % | single_object | colors | mean |" in said.out
    assert "6 of 6, best" in said.err

    text = file.read_text()
    file.write_text(text[:-20])  # cut off while it was written
    assert len(report.read(tmp_path)) == 5
    ran, draw_one = [], paper.draw
    monkeypatch.setattr(paper, "draw", lambda *given: ran.append(given[3]) or draw_one(*given))
    paper.main([*toy, str(tmp_path)])
    assert ran == ["a blue bus"]
    assert kept(report, tmp_path) == first
    paper.main([*toy, str(tmp_path)])
    assert len(ran) == 1
    capsys.readouterr()
    paper.main(["--report-only", "--out", str(tmp_path)])
    assert "best of 2, ODE" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="calls: take another --out"):
        paper.main([*toy, str(tmp_path), "--calls", "6"])


def test_estimates_without_loading_anything(paper, toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(paper, "load_pipe", None)
    paper.main([*toy, str(tmp_path / "none"), "--methods", *NAMES, "--calls", "50", "--seeds", "2", "--dry-run"])
    said = capsys.readouterr().out
    assert "| all, 6 times | 4,500 |" in said  # 3 prompts, 2 seeds, 1 + 7 · 2 particles
    assert not (tmp_path / "none").exists()
    with pytest.raises(SystemExit, match="expected some of ode, best"):
        paper.main([*toy, str(tmp_path), "--methods", "sde", "--dry-run"])


@pytest.mark.slow
@tiny.TRANSFORMERS_5
@pytest.mark.filterwarnings("ignore:.*all the weight|.*within .* of uniform|no particle was scored")
def test_all_methods_run_on_the_scenes(paper, report, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("two green triangles\n")
    paper.main(
        ["--prompts", str(prompts), "--calls", "10", "--particles", "2", "--out", str(tmp_path), "--device", "cpu"]
    )
    rows = kept(report, tmp_path)
    assert [name for _, name, _ in rows] == list(NAMES)
    assert all(isinstance(row["right"], bool) and row["tag"] is None for row in rows.values())
    assert rows[0, "twisted", 0]["gradients"] == 8


@pytest.mark.slow
@tiny.TRANSFORMERS_5
def test_two_processes_draw_what_one_draws(paper, report, toy, tmp_path):
    """`accelerate launch` by torchrun, which is what it does for several GPUs; here over gloo."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    command = [*launch, str(BENCHMARKS / "paper.py"), *toy, str(tmp_path / "two")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    assert [done.stdout.count(head) for head in ("| for a prompt |", "| method |")] == [1, 1]
    lengths = [len((tmp_path / "two" / f"rows-{i}.jsonl").read_text().splitlines()) for i in range(2)]
    assert lengths == [4, 2]
    paper.main([*toy, str(tmp_path / "one")])
    assert kept(report, tmp_path / "two") == kept(report, tmp_path / "one")


# ---- the table -------------------------------------------------------------------------------------------------------


def row(index, method, seed, reward, right=None, **others):
    costs = {"network_calls": 8, "reward_calls": 2, "lineages": 2, "diversity": 0.1, "seconds": {"total": 3.0}}
    named = {"index": index, "method": method, "seed": seed, "tag": None, "reward": reward, "mean": reward - 1}
    return named | costs | {"right": right, "all right": right} | others


TITLES = {"best": "best of 2", "glass": "FK"}


def test_differences_are_paired_over_prompts_of_which_seeds_are_averaged(report):
    rows = [row(i, "best", 0, value) for i, value in enumerate((10.0, 20.0, 60.0))]
    rows += [row(0, "glass", 0, 12.0), row(0, "glass", 1, 14.0), row(1, "glass", 0, 21.0)]
    best, glass = report.table(rows, TITLES).splitlines()[2:]
    assert "| best of 2 | 30 ± 15 | +0.00 ± 0.00 |" in best  # deviation 26.5 over √3
    assert "| FK | 17.0 ± 4.0 | +2.0 ± 1.0 |" in glass
    assert glass.endswith("| 8 | 2 | 3 | 2 | 0.1 | 2 |")
    assert "right" not in report.table(rows, TITLES)


def test_tags_count_alike(report):
    rows = [row(i, "best", 0, 0.0, right, tag=tag) for i, (tag, right) in
            enumerate([("one", True), ("two", True), ("two", False), ("two", False)])]  # fmt: skip
    table = report.table_of_tags(rows, {"best": "best of 2"}).splitlines()
    assert table[0] == "| right, % | one | two | mean |"
    assert table[2] == "| best of 2 | 100.0 | 33.3 | 66.7 |"
    assert "| 50 ± 29 |" in report.table(rows, {"best": "best of 2"})


def test_hours_follow_what_was_timed(paper):
    known = paper.methods(settings())
    rows = [row(0, "best", 0, 1.0, network_calls=30), row(1, "best", 0, 1.0, network_calls=30)]
    assert np.isnan(paper.hours(["best"], known, 10, []))
    assert paper.hours(["best", "ode", "glass"], known, 10, rows) == pytest.approx((3 + 1 + 3) / 3600)


def test_rows_of_all_processes_are_read_and_a_cut_line_is_mended(report, tmp_path):
    lines = [json.dumps(row(i, "best", 0, 1.0)) for i in range(3)]
    (tmp_path / "rows-0.jsonl").write_text(lines[0] + "\n" + lines[1][:30])
    (tmp_path / "rows-1.jsonl").write_text(lines[2])
    assert [one["index"] for one in report.read(tmp_path)] == [0, 2]
    for name in ("rows-0.jsonl", "rows-1.jsonl", "rows-2.jsonl"):
        report.mend(tmp_path / name)
    assert (tmp_path / "rows-0.jsonl").read_text() == lines[0] + "\n"
    assert (tmp_path / "rows-1.jsonl").read_text() == lines[2] + "\n"
