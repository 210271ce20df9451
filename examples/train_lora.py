"""LoRA adapters trained under a plan, so that they make up for what it leaves out.

    python examples/train_lora.py --budget 0.65 --steps 60 -o build/lora

Answers questions about rendered scenes: the loss of the whole model, under the plan, and under the
plan with the trained adapters. The folder holds adapters and plan, and `planner.load` reads both.
Needs peft, and ``planner[train]``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

import planner
from planner.loading import load_model
from planner.training.data import Conversation, SceneConversations

# Linears of the decoder; those of the vision encoder have other names or stay as they are.
TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="tiny-llava", help="alias, local folder or hub id")
    parser.add_argument("--budget", type=float, default=0.65, help="fraction of the FLOPs")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--gradient-checkpointing", action="store_true", help="saves memory")
    parser.add_argument("-o", "--output", type=Path, default=Path("build/lora"), help="folder")
    return parser.parse_args()


def collate(processor: Any, conversations: Sequence[Conversation]) -> dict[str, Tensor]:
    """Conversations to a batch: one question each, the loss on its answer."""
    turns = [conversation.turns[0] for conversation in conversations]
    texts = [f"USER: <image>\n{turn.question} ASSISTANT: {turn.answer}</s>" for turn in turns]
    images = [conversation.image for conversation in conversations]
    options = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    batch = dict(processor(text=texts, images=images, **options))
    labels = torch.full_like(batch["input_ids"], -100)
    for row, turn in zip(labels, turns, strict=True):
        answer = processor.tokenizer(f"{turn.answer}</s>", add_special_tokens=False)["input_ids"]
        row[-len(answer) :] = torch.tensor(answer)
    return {**batch, "labels": labels}


@torch.no_grad()
def loss(model: Any, batches: Sequence[dict[str, Tensor]]) -> float:
    """Mean over batches, in evaluation mode."""
    model.eval()
    return sum(float(model(**batch).loss) for batch in batches) / len(batches)


def main() -> None:
    options = arguments()
    set_seed(0)
    model, processor, _ = load_model(options.model)
    to_batch = partial(collate, processor)
    held_out = SceneConversations("val", 4 * options.batch)
    batches = [
        to_batch([held_out[i] for i in range(start, start + options.batch)])
        for start in range(0, len(held_out), options.batch)
    ]
    print(f"the whole model:           loss {loss(model, batches):.4f}")

    lora = LoraConfig(target_modules=TARGETS, r=options.rank, lora_alpha=2 * options.rank)
    adapted = planner.compile(get_peft_model(model, lora), options.budget, utilities="prior")
    fraction = planner.plan_of(adapted).cost["flops"]["fraction"]
    print(f"under {fraction:.3f} of its FLOPs: loss {loss(adapted, batches):.4f}")

    trainer = Trainer(
        adapted,
        TrainingArguments(
            str(options.output),
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            learning_rate=options.learning_rate,
            gradient_checkpointing=options.gradient_checkpointing,
            use_cpu=not torch.accelerator.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
            remove_unused_columns=False,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
        ),
        train_dataset=SceneConversations("train", options.steps * options.batch),
        data_collator=to_batch,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model()
    processor.save_pretrained(options.output)
    print(f"with adapters trained so:  loss {loss(adapted, batches):.4f}")

    loaded = planner.load(options.output)
    print(f"loaded from {options.output}: loss {loss(loaded, batches):.4f}")


if __name__ == "__main__":
    main()
