"""LoRA fine-tuning of a reduced model, end to end, on the needle task with the shipped model."""

import copy
import inspect

import pytest
import torch
from transformers import Qwen2VLForConditionalGeneration

import fftriton
from fftriton.needle import generate_sample
from fftriton.needle.vocabulary import IDS
from fftriton.runtime.processing import load_processor
from fftriton.runtime.shipped import MODEL

METHOD = fftriton.FrameFusion(0.3)
KNOWN = inspect.signature(Qwen2VLForConditionalGeneration.forward).parameters


def lesson(processor, index):
    """Inputs of a prompt, and the same with a new answer: each digit is to be called the next one."""
    sample = generate_sample("easy", seed=7, index=index)
    inputs = {name: part for name, part in processor(sample.video, sample.question).items() if name in KNOWN}
    answer = torch.tensor([[IDS[str((int(sample.answer) + 1) % 10) if sample.answer.isdigit() else "0"]]])
    ids = torch.cat([inputs["input_ids"], answer], 1)
    longer = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.full_like(ids, -100)}
    longer["labels"][:, -1] = answer
    if "mm_token_type_ids" in inputs:
        longer["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(answer)], 1)
    return inputs, inputs | longer, int(answer)


@torch.no_grad()
def answers(model, prompts):
    with fftriton.reduce(model.eval(), METHOD) as reduction:
        found = [int(model.generate(**prompt, max_new_tokens=1, do_sample=False)[0, -1]) for prompt in prompts]
        assert abs(reduction.report.budget_achieved - 0.3) < 0.01
    return found


def test_lora(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is in the test extra")
    plain, processor = (
        Qwen2VLForConditionalGeneration.from_pretrained(MODEL, dtype=torch.float32),
        load_processor(MODEL),
    )
    prompts, batches, wanted = zip(*(lesson(processor, index) for index in range(2)), strict=True)
    torch.manual_seed(0)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    model = peft.get_peft_model(copy.deepcopy(plain), peft.LoraConfig(r=8, target_modules=targets))
    base = model.get_base_model()
    getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)()
    base.enable_input_require_grads()
    before = answers(model, prompts)
    assert before != list(wanted)
    optimizer = torch.optim.AdamW([part for part in model.parameters() if part.requires_grad], lr=5e-3)
    losses = []
    with fftriton.reduce(model.train(), METHOD):
        for _ in range(8):
            loss = sum(model(**batch).loss for batch in batches)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 4
    after = answers(model, prompts)
    assert after == list(wanted)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    assert answers(loaded, prompts) == after
    with fftriton.reduce(loaded, METHOD), fftriton.reduce(model, METHOD), torch.no_grad():
        assert torch.equal(loaded(**prompts[0]).logits, model(**prompts[0]).logits)
