"""VQAScore and QuestionScore, against their models, one image and question at a time."""

import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import processors

import checkpoints
import tiny
from glassflows import FeynmanKacSteerer
from glassflows.rewards import QuestionScore, VLMReward, VQAScore
from glassflows.rewards.questions import VQA_QUESTION, spellings
from scenes import CALL, load_pipeline
from toy_rewards import PROMPTS, WARNINGS, images

pytestmark = WARNINGS
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: "
)


def pictures(given):
    return [Image.fromarray((image * 255).round().byte().movedim(0, -1).numpy()) for image in given]


@pytest.fixture(scope="module")
def clip_t5(tmp_path_factory):
    """A CLIP-FlanT5 in the published layout: T5's tensors and the projector's, and a config of type clip_t5."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, T5Config, T5ForConditionalGeneration

    root = tmp_path_factory.mktemp("clip_t5")
    torch.manual_seed(0)
    vision = CLIPVisionConfig(**checkpoints.WIDTHS, image_size=checkpoints.SIZE, patch_size=4)
    CLIPVisionModel(vision).save_pretrained(root / "clip")
    config = T5Config(d_model=24, d_kv=8, d_ff=48, num_layers=2, num_heads=3, vocab_size=len(checkpoints.WORDS) + 4,
                      tie_word_embeddings=False, decoder_start_token_id=0)  # fmt: skip
    model = T5ForConditionalGeneration(config)
    model.lm_head.weight.data *= 0.05  # else one token has all the chance
    model.mm_projector = torch.nn.Sequential(torch.nn.Linear(32, 24), torch.nn.GELU(), torch.nn.Linear(24, 24))
    model.save_pretrained(root / "model")
    written = json.loads((root / "model" / "config.json").read_text())
    own = {"model_type": "clip_t5", "architectures": ["CLIPT5ForConditionalGeneration"], "mm_hidden_size": 32}
    own |= {"mm_vision_tower": str(root / "clip"), "mm_vision_select_layer": -2, "mm_projector_type": "mlp2x_gelu"}
    (root / "model" / "config.json").write_text(json.dumps(written | own))
    tokenizer = checkpoints.word_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("$A <s>", special_tokens=[("<s>", 2)])
    tokenizer.save_pretrained(root / "model")
    return root / "model"


def published(folder, picture, prompt):
    """State the published score anew: PIL pads, transformers' processor and T5's own loss do the rest."""
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPVisionModel, T5Config, T5ForConditionalGeneration

    settings = json.loads((folder / "config.json").read_text())
    model = T5ForConditionalGeneration.from_pretrained(
        folder, config=T5Config.from_dict({**settings, "model_type": "t5"})
    )
    model.resize_token_embeddings(len(checkpoints.WORDS))
    state = transformers.modeling_utils.load_state_dict(str(folder / "model.safetensors"))
    first, second = (torch.nn.Linear(*size) for size in ((32, 24), (24, 24)))
    for number, layer in ((0, first), (2, second)):
        layer.load_state_dict({name: state[f"mm_projector.{number}.{name}"] for name in ("weight", "bias")})
    mean, side = checkpoints.MEAN, max(picture.size)
    square = Image.new("RGB", (side, side), tuple(int(255 * one) for one in mean))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    size = {"height": checkpoints.SIZE, "width": checkpoints.SIZE}
    process = CLIPImageProcessor(size={"shortest_edge": checkpoints.SIZE}, crop_size=size)
    pixels = process(square, return_tensors="pt")["pixel_values"]
    vision = CLIPVisionModel.from_pretrained(settings["mm_vision_tower"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        seen = second(torch.nn.functional.gelu(first(vision(pixels, output_hidden_states=True).hidden_states[-2])))
        texts = (SYSTEM, f'\nDoes this figure show "{prompt}"? Please answer yes or no. ASSISTANT: ')
        before, after = (model.shared(torch.tensor([tokenizer(text)["input_ids"]])) for text in texts)
        labels = torch.tensor([tokenizer("Yes")["input_ids"]])
        loss = model(inputs_embeds=torch.cat([before, seen[:, 1:], after], 1), labels=labels).loss
    return float((-loss).exp())


@tiny.TRANSFORMERS_5
def test_vqascore_by_clip_flant5(clip_t5):
    """Padded with questions of other lengths, of images that are no squares."""
    reward = VQAScore(clip_t5, tokenizer=clip_t5)
    prompts = ["a red circle", "two squares two squares two squares", "a"]
    expected = [published(clip_t5, *one) for one in zip(pictures(images()), prompts, strict=True)]
    assert np.std(expected) > 1e-4
    np.testing.assert_allclose(reward(images(), prompts), expected, atol=1e-4)  # of what PIL rounds
    square = images(2, checkpoints.SIZE, checkpoints.SIZE)
    expected = [published(clip_t5, *one) for one in zip(pictures(square), prompts[:2], strict=True)]
    np.testing.assert_allclose(reward(square, prompts[:2]), expected, atol=1e-6)
    fixed = VQAScore(clip_t5, tokenizer=clip_t5, question='Does this figure show "a"? Please answer yes or no.')
    torch.testing.assert_close(fixed(images()), reward(images(), ["a"] * 3))


@tiny.TRANSFORMERS_5
def test_vqascore_by_clip_flant5_is_differentiable(clip_t5):
    reward = VQAScore(clip_t5, tokenizer=clip_t5, dtype=torch.float64)
    given = (0.1 + 0.8 * images(1, 8, 8)).double().requires_grad_()
    way = torch.randn(given.shape, generator=tiny.seeded(), dtype=torch.float64)
    (gradient,) = torch.autograd.grad(reward(given, ["a red circle"]).sum(), given)
    with torch.no_grad():  # T5 takes its variances in float32, so no small step tells anything
        ends = [reward(given + step * way, ["a red circle"]) for step in (-1e-2, 1e-2)]
    torch.testing.assert_close((gradient * way).sum(), (ends[1] - ends[0])[0] / 2e-2, rtol=2e-2, atol=0)
    torch.manual_seed(0)
    steerer = FeynmanKacSteerer(
        load_pipeline(), VQAScore(clip_t5, tokenizer=clip_t5), 2, num_transitions=2, twist=0.5, reward_scale=1e4
    )
    out = steerer("a red circle", num_inference_steps=4, generator=tiny.seeded(), **CALL)
    assert out.ledger.gradients > 0


def test_a_clip_flant5_without_its_projector(clip_t5, tmp_path):
    from safetensors.torch import load_file, save_file

    for file in clip_t5.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    state = load_file(tmp_path / "model.safetensors")
    kept = {name: value for name, value in state.items() if "mm_projector" not in name}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(OSError, match=r"has no mm_projector\.0\.bias, mm_projector\.0\.weight"):
        VQAScore.from_pretrained(tmp_path, tokenizer=tmp_path)


def test_vqascore_by_another_model(folders):
    """That of its chat template, asked the published question."""
    name = folders["VLMReward"]
    expected = VLMReward(name, question=VQA_QUESTION)(images(), PROMPTS)
    torch.testing.assert_close(VQAScore(name)(images(), PROMPTS), expected)


# ---- questions -------------------------------------------------------------------------------------------------------

QUESTIONS = {
    "a red circle": ["Does this image show a circle?", ("Does this image show red?", "Yes")],
    "two squares": [("Does this image show two squares?", "two")],
}


def chance(folder, picture, question, words):
    """Return the chance of any of some words as the next one."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    asked = f"USER : <image> {question} Answer in one word. ASSISTANT :"
    with torch.no_grad():
        logits = model(**processor(images=picture, text=asked, return_tensors="pt")).logits[0, -1]
    return float(logits.softmax(-1)[processor.tokenizer.convert_tokens_to_ids(words)].sum())


def test_questions(folders):
    """Any number of each prompt, in batches of another size, by geometric mean or mean."""
    name = folders["VLMReward"]
    expected = [
        [chance(name, picture, *one) for one in asked]
        for picture, asked in zip(
            pictures(images()),
            [
                [("Does this image show a circle?", ["Yes"]), ("Does this image show red?", ["Yes"])],
                [("Does this image show two squares?", ["two"])],
                [("Does this image show a circle?", ["Yes"]), ("Does this image show red?", ["Yes"])],
            ],
            strict=True,
        )
    ]
    reward = QuestionScore(name, questions=QUESTIONS)
    reward.batch_size = 2
    for mine, theirs in zip(reward.chances(images(), PROMPTS), expected, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-6)
    geometric = [np.exp(np.mean(np.log(one))) for one in expected]
    np.testing.assert_allclose(reward(images(), PROMPTS), geometric, atol=1e-6)
    mean = QuestionScore(name, questions=QUESTIONS.get, aggregate="mean")
    np.testing.assert_allclose(mean(images(), PROMPTS), [np.mean(one) for one in expected], atol=1e-6)
    alike = QuestionScore(name, questions=QUESTIONS["two squares"])
    np.testing.assert_allclose(alike(images()[1:2]), expected[1], atol=1e-6)


def test_spellings():
    assert spellings("Yes") == ("Yes", "yes")
    assert spellings("two") == ("two", "Two", "2")
    assert spellings("2") == ("2", "two", "Two")
    assert spellings("ten") == ("ten", "Ten")


@tiny.TRANSFORMERS_5
def test_questions_steer(folders):
    reward = QuestionScore(folders["VLMReward"], questions=lambda prompt: [f"Does this image show {prompt}?"])
    steerer = FeynmanKacSteerer(load_pipeline(), reward, 2, num_transitions=2, reward_scale=1e4)
    out = steerer("a red circle", num_inference_steps=4, generator=tiny.seeded(), output_type="pt", **CALL)
    torch.testing.assert_close(reward(out.images, ["a red circle"] * 2).double(), out.image_rewards, rtol=0, atol=1e-5)


def test_bad_questions(folders):
    name = folders["VLMReward"]
    with pytest.raises(ValueError, match="aggregate: expected one of"):
        QuestionScore(name, questions=["a?"], aggregate="sum")
    with pytest.raises(ValueError, match="questions: expected a list of texts, .* for the prompt 'a dog', got \\[\\]"):
        QuestionScore(name, questions=QUESTIONS)(images(1), ["a dog"])
    with pytest.raises(ValueError, match="prompts: <image> stands for an image"):
        QuestionScore(name, questions=lambda prompt: [prompt])(images(1), ["an <image>"])
    for reward in (QuestionScore(name, questions=["an <image>?"]), VLMReward(name, question="an <image>?")):
        with pytest.raises(ValueError, match="<image> stands for an image"):
            reward.check_prompts([None])
    with pytest.raises(ValueError, match="QuestionScore has none: detach them"):
        QuestionScore(name, questions=["Yes ?"])(images(1).requires_grad_())
