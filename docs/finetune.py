"""Fine-tune a raybert checkpoint with transformers on rated sentences, beside the same encoder with random weights.

    python docs/finetune.py CHECKPOINT RATED

RATED has lines of `number<TAB>mean rating<TAB>sentence`, as the movie reviews have them that the source of the package
vaderSentiment 2.5 carries (docs/LEARNING.md says how to get them). A rating above 0 is positive, below 0 negative. Both
encoders see the same sentences in the same order, with the same settings; only where their weights begin differs.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import BatchEncoding, BertConfig, BertForSequenceClassification, BertTokenizer

Example = tuple[str, int]  # a sentence, and 1 if it is positive
STARTS = ("pretrained", "random")
SPLIT_SEED = 0  # which sentences are held out is the same for every seed
EVALUATION_SIZE = 128  # sentences at once


def main(argv: list[str] | None = None) -> None:
    """Print the held-out accuracy of both for every seed, then their means and standard deviations."""
    parser = _parser()
    options = parser.parse_args(argv)
    if not (options.checkpoint / "config.json").is_file():
        parser.error(f"{options.checkpoint} holds no config.json; give the directory of a checkpoint.")
    torch.set_num_threads(options.threads)
    held_out, train = split(read(options.rated), options.num_held_out)
    train = train[: options.num_train]
    majority = max(statistics.fmean(label == kind for _, label in held_out) for kind in (0, 1))
    print(f"{len(train):,} sentences to train on, {len(held_out):,} held out; the majority of them {majority:.3f}")
    accuracies: dict[str, list[float]] = {start: [] for start in options.starts}
    for seed in range(options.seeds):
        for start, known in accuracies.items():
            model = build(options.checkpoint, is_pretrained=start == "pretrained", seed=seed)
            tokenizer = BertTokenizer.from_pretrained(options.checkpoint)
            fit(model, tokenizer, train, seed, options.epochs, options.batch_size, options.learning_rate)
            known.append(accuracy(model, tokenizer, held_out))
            print(f"seed {seed}, {start}: {known[-1]:.3f}", flush=True)
    for start, known in accuracies.items():
        spread = statistics.stdev(known) if len(known) > 1 else float("nan")
        print(f"{start}: {statistics.fmean(known):.3f}, standard deviation {spread:.3f} over {len(known)} seeds")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python docs/finetune.py", description="Fine-tune on rated sentences.")
    parser.add_argument("checkpoint", type=Path, help="directory of a checkpoint")
    parser.add_argument("rated", type=Path, help="lines of number, mean rating and sentence, tabs between them")
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=STARTS, help="which weights to begin from")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--num_train", type=int, default=2000, help="sentences to train on, at most")
    parser.add_argument("--num_held_out", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=1)
    return parser


def read(path: Path) -> list[Example]:
    """The sentences whose mean rating is not 0."""
    examples = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        try:
            _, rating, text = line.split("\t", 2)
            if float(rating) != 0:
                examples.append((text.strip(), int(float(rating) > 0)))
        except ValueError:
            if line.strip():
                raise SystemExit(f"{path}, line {number}: not a number, a rating and a sentence with tabs") from None
    return examples


def split(examples: list[Example], num_held_out: int) -> tuple[list[Example], list[Example]]:
    """Sentences that are held out, and the others; the same text is never in both."""
    by_text = dict(examples)
    shuffled = random.Random(SPLIT_SEED).sample(sorted(by_text.items()), len(by_text))
    return shuffled[:num_held_out], shuffled[num_held_out:]


def build(checkpoint: Path, is_pretrained: bool, seed: int) -> BertForSequenceClassification:
    """The encoder with a new classifier, from the checkpoint or from random weights."""
    torch.manual_seed(seed)
    if is_pretrained:
        return BertForSequenceClassification.from_pretrained(checkpoint)
    return BertForSequenceClassification(BertConfig.from_pretrained(checkpoint))


def fit(
    model: BertForSequenceClassification,
    tokenizer: BertTokenizer,
    examples: list[Example],
    seed: int,
    num_epochs: int,
    batch_size: int,
    learning_rate: float,
) -> None:
    """Train all weights with AdamW; the learning rate rises for a tenth of the steps, then falls to 0."""
    shuffles = random.Random(seed)
    batches = [batch for _ in range(num_epochs) for batch in _cut(shuffles.sample(examples, len(examples)), batch_size)]
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.01)
    warmup_steps = max(1, len(batches) // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup_steps, (len(batches) - step) / (len(batches) - warmup_steps + 1)),
    )
    model.train()
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16):
            labels = torch.tensor([label for _, label in batch])
            loss = model(**_encode(tokenizer, batch, model), labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@torch.no_grad()
def accuracy(model: BertForSequenceClassification, tokenizer: BertTokenizer, examples: list[Example]) -> float:
    """Share of sentences that are put where people put them."""
    model.eval()
    num_right = 0
    for batch in _cut(examples, EVALUATION_SIZE):
        with torch.autocast("cpu", torch.bfloat16):
            guesses = model(**_encode(tokenizer, batch, model)).logits.argmax(-1)
        num_right += int((guesses == torch.tensor([label for _, label in batch])).sum())
    return num_right / len(examples)


def _cut(examples: list[Example], size: int) -> Iterator[list[Example]]:
    for start in range(0, len(examples), size):
        yield examples[start : start + size]


def _encode(tokenizer: BertTokenizer, batch: list[Example], model: BertForSequenceClassification) -> BatchEncoding:
    texts, limit = [text for text, _ in batch], model.config.max_position_embeddings
    return tokenizer(texts, padding=True, truncation=True, max_length=limit, return_tensors="pt")


if __name__ == "__main__":
    main()
