"""VLMReward, against the model and its processor, one image and question at a time."""

import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import checkpoints
from glassflows.rewards import VLMReward
from toy_rewards import PROMPTS, WARNINGS, images, load

pytestmark = WARNINGS


def test_vlm_reward_is_the_probability_of_yes(folders):
    """One image and question at a time, without padding."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folders["VLMReward"])
    processor = AutoProcessor.from_pretrained(folders["VLMReward"])
    yes = processor.tokenizer.convert_tokens_to_ids("Yes")
    expected = []
    for image, prompt in zip(images(), PROMPTS, strict=True):
        picture = Image.fromarray((image * 255).byte().movedim(0, -1).numpy())
        asked = f'USER : <image> Does this image show "{prompt}"? Answer Yes or No. ASSISTANT :'
        with torch.no_grad():
            logits = model(**processor(images=picture, text=asked, return_tensors="pt")).logits[0, -1]
        expected.append(logits.softmax(-1)[yes])
    reward = load("VLMReward", folders)
    torch.testing.assert_close(reward(images(), PROMPTS), torch.stack(expected), rtol=0, atol=1e-6)
    fixed = load("VLMReward", folders, question="Does this image show a red circle?", answer="No")
    assert fixed(images()).shape == (3,)
    for answer in ("Definitely", ""):
        with pytest.raises(ValueError, match=f"has no token with which '{answer}' begins"):
            load("VLMReward", folders, answer=answer)(images(), PROMPTS)
    with pytest.raises(ValueError, match="prompts: <image> stands for an image"):
        reward(images(), ["an <image> of a circle", *PROMPTS[1:]])
    with pytest.raises(ValueError, match="VLMReward has none: detach them"):
        reward(images().requires_grad_(), PROMPTS)


def test_vlms_are_read_in_their_dtype(folders):
    """Not cast: rotary frequencies stay in float32, whatever the weights are."""
    vlm = load("VLMReward", folders, dtype=torch.bfloat16).networks
    assert next(vlm.parameters()).dtype == torch.bfloat16
    assert {buffer.dtype for name, buffer in vlm.named_buffers() if "inv_freq" in name} == {torch.float32}


def test_a_template_that_begins_the_text_itself(folders):
    """The text then begins once, not twice."""
    reward, seen = load("VLMReward", folders), []
    model = reward.networks["vlm"]
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    plain = reward(images(), PROMPTS)
    reward.processor.chat_template = "<s>" + reward.processor.chat_template
    assert torch.equal(reward(images(), PROMPTS), plain)
    assert torch.equal(*seen)
    assert (seen[0] == 2).sum(1).tolist() == [1, 1, 1]


@pytest.mark.parametrize("language", ["opt", "t5"])
def test_vlms_without_a_chat_template(language, tmp_path):
    """BLIP-2's processor puts the image in by itself; beside T5 the answer is a text of its own."""
    reward = VLMReward.from_pretrained(checkpoints.blip2(tmp_path, language))
    whole = reward(images(), PROMPTS)
    single = torch.cat([reward(image[None], [prompt]) for image, prompt in zip(images(), PROMPTS, strict=True)])
    torch.testing.assert_close(single, whole, rtol=1e-4, atol=1e-6)
    picture = Image.fromarray((images()[0] * 255).byte().movedim(0, -1).numpy())
    asked = f'Does this image show "{PROMPTS[0]}"? Answer Yes or No.'
    inputs = dict(reward.processor(images=picture, text=asked, return_tensors="pt"))
    if language == "t5":
        inputs["decoder_input_ids"] = torch.zeros(1, 1, dtype=torch.long)
    with torch.no_grad():
        logits = reward.networks["vlm"](**inputs).logits[0, -1]
    torch.testing.assert_close(whole[0], logits.softmax(-1)[checkpoints.WORDS.index("Yes")], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("end", ["Assistant:", "Assistant:\n"])
def test_the_answer_may_begin_with_a_space(folders, end):
    """As models with byte-level tokens write it after a colon."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    raw.train_from_iterator(["User: q\nAssistant: Yes", "Yes it is. Yes No", "Assistant: No"] * 50, trainer)
    reward = load("VLMReward", folders)
    reward.processor.tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw)
    tokens = reward.processor.tokenizer.convert_ids_to_tokens(reward._first_tokens(f"User: q\n{end}", ["Yes"]))
    assert set(tokens) == {"Yes", "ĠYes"}
