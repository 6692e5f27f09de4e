"""Train the demo model on one GPU. Several recipes run one after another; the lowest validation loss is kept.

    python -m pipelines.demo.train --prepare build/demo-tokens.npz      # token ids of the three splits
    python -m pipelines.demo.train --data build/demo-tokens.npz --out build/demo --budget 540

Writes model.safetensors (bf16, the chosen recipe at its best validation) and training.json (every recipe's history).
The budget in seconds is shared out over the recipes; each measures its own speed and plans its steps to fit. `--steps`
with `--recipes NAME` repeats one run at a fixed length instead.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.demo.model import DemoModel, Shape, save_weights
from pipelines.demo.scoring import total_nats
from pipelines.demo.tokenizer import CHECKPOINT, END_OF_TEXT_ID

BATCH = 32  # sequences of one context each: 65,536 tokens a step
WARMUP_STEPS = 150
CALIBRATION_STEPS = 30
VALIDATIONS = 12
SEED = 20


@dataclass(frozen=True)
class Recipe:
    """Matrices of the layers are trained by Muon or AdamW, embeddings and norms always by AdamW."""

    optimizer: str
    learning_rate: float
    weight_decay: float
    dropout: float


RECIPES = {
    "muon-8e-3": Recipe("muon", 8e-3, 0.1, 0.1),
    "muon-8e-3-decay": Recipe("muon", 8e-3, 0.4, 0.1),
    "muon-1e-2-dropout": Recipe("muon", 1e-2, 0.1, 0.2),
}


def prepare(file: Path) -> None:
    """Tokenize the three splits and store ids and document lengths."""
    from tokenizers import Tokenizer

    from pipelines.demo import corpus

    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    arrays: dict[str, np.ndarray] = {}
    for name, documents in corpus.load().items():
        texts = [document.text for document in documents]
        ids = [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]
        arrays[f"{name}_ids"] = np.concatenate([np.array(row, dtype=np.uint16) for row in ids])
        arrays[f"{name}_lengths"] = np.array([len(row) for row in ids], dtype=np.int64)
        arrays[f"{name}_bytes"] = np.array(sum(len(document.text.encode()) for document in documents))
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    print({name: array.size for name, array in arrays.items()}, file.stat().st_size)


def read_split(file: Path, name: str) -> list[np.ndarray]:
    """The documents of one split as arrays of token ids."""
    with np.load(file) as arrays:
        ids, lengths = arrays[f"{name}_ids"].astype(np.int64), arrays[f"{name}_lengths"]
    return np.split(ids, np.cumsum(lengths)[:-1])


def batches(documents: list[np.ndarray], context: int, batch: int, device: str) -> Iterator[Tensor]:
    """Endless batches [batch, context + 1]. Every epoch joins the documents in a new order, each after an end-of-text
    token, and cuts the stream at a new offset."""
    random = np.random.default_rng(SEED)
    separator = np.array([END_OF_TEXT_ID])
    left = np.empty((0, context + 1), dtype=np.int64)
    while True:
        order = random.permutation(len(documents))
        stream = np.concatenate([part for index in order for part in (separator, documents[index])])
        stream = stream[random.integers(context) :]
        rows = stream[: (len(stream) - 1) // context * context + 1]
        cut = np.stack([rows[i : i + context + 1] for i in range(0, len(rows) - 1, context)])
        left = np.concatenate([left, cut[random.permutation(len(cut))]])
        epoch = torch.from_numpy(left).to(device)
        used = len(left) // batch * batch
        for i in range(0, used, batch):
            yield epoch[i : i + batch]
        left = left[used:]


def optimizers(model: DemoModel, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Weight decay on matrices only; Muon's step is scaled to the size of AdamW's (Liu et al. 2025)."""
    hidden = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    embedding = [p for name, p in model.named_parameters() if "embed" in name]
    norms = [p for p in model.parameters() if p.dim() < 2]
    decay, rate = recipe.weight_decay, recipe.learning_rate
    groups = [{"params": embedding, "weight_decay": decay}, {"params": norms, "weight_decay": 0.0}]
    if recipe.optimizer == "adamw":
        groups.append({"params": hidden, "weight_decay": decay})
    found: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)]
    if recipe.optimizer == "muon":
        found.append(torch.optim.Muon(hidden, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
    return found


def rate_factor(step: int, steps: int) -> float:
    """Linear warm-up, then linear decay to zero."""
    return min((step + 1) / WARMUP_STEPS, (steps - step) / max(1, steps - WARMUP_STEPS))


class Run:
    """One recipe trained from scratch; `best` holds the parameters with the lowest validation loss."""

    def __init__(self, recipe: Recipe, shape: Shape, data: Path, device: str) -> None:
        torch.manual_seed(SEED)
        self.recipe, self.shape, self.device = recipe, shape, device
        self.model = DemoModel(shape, recipe.dropout).to(device)
        self.documents = {name: read_split(data, name) for name in ("train", "validation")}
        self.validation_tokens = sum(map(len, self.documents["validation"]))
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Tensor] = {}
        self.best_loss = math.inf

    def loss(self, ids: Tensor) -> Tensor:
        with torch.autocast(self.device, torch.bfloat16):
            logits = self.model(ids[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())

    def validate(self) -> float:
        """Nats a token on the validation split, with the weights rounded to bf16 as they will be stored."""
        kept = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.model.load_state_dict({name: p.bfloat16().float() for name, p in kept.items()}, strict=True)
        self.model.eval()
        documents = [document.tolist() for document in self.documents["validation"]]
        nats = total_nats(self.model, documents, context=self.shape.context, batch=16, device=self.device)
        loss = nats / self.validation_tokens
        if loss < self.best_loss:
            self.best_loss = loss
            self.best = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.model.load_state_dict(kept, strict=True)
        self.model.train()
        return loss

    def train(self, seconds: float, steps: int | None, batch: int) -> None:
        """Train for about `seconds`, or for exactly `steps` when given."""
        began = time.monotonic()
        step_loss = torch.compile(self.loss) if self.device == "cuda" else self.loss
        optimizer = optimizers(self.model, self.recipe)
        source = batches(self.documents["train"], self.shape.context, batch, self.device)
        planned = steps or 1_000_000
        step, mark, losses = 0, began, []
        while step < planned:
            for group in (group for one in optimizer for group in one.param_groups):
                group["lr"] = self.recipe.learning_rate * rate_factor(step, planned)
            loss = step_loss(next(source))
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            for one in optimizer:
                one.step()
                one.zero_grad(set_to_none=True)
            losses.append(loss.detach())
            step += 1
            if step in (CALIBRATION_STEPS, 2 * CALIBRATION_STEPS) and steps is None:
                if self.device == "cuda":
                    torch.cuda.synchronize()
                now = time.monotonic()
                pace, mark = (now - mark) / CALIBRATION_STEPS, now
                if step == 2 * CALIBRATION_STEPS:
                    planned = step + max(WARMUP_STEPS, int(0.94 * (seconds - (now - began)) / pace))
            if step % max(1, planned // VALIDATIONS) == 0 or step == planned:
                row = {"step": step, "seconds": round(time.monotonic() - began, 1)}
                row |= {"train": torch.stack(losses).mean().item(), "validation": self.validate()}
                self.history.append(row)
                losses = []
                print(f"  of {planned}: {row}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--prepare", type=Path, help="write the token file and stop")
    parser.add_argument("--data", type=Path, help="the token file")
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for all recipes")
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES), help="train these")
    parser.add_argument("--steps", type=int, help="steps of each recipe, in place of the budget")
    parser.add_argument("--batch", type=int, default=BATCH, help="sequences a step")
    parser.add_argument("--layers", type=int, default=Shape().layers, help="fewer layers, for a trial run on a CPU")
    options = parser.parse_args(arguments)
    if options.prepare:
        prepare(options.prepare)
        return 0
    began = time.monotonic()
    torch.set_float32_matmul_precision("high")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = Shape(layers=options.layers)
    options.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, object] = {"shape": asdict(shape), "batch": options.batch, "torch": torch.__version__}
    best = math.inf
    for index, name in enumerate(options.recipes):
        print(name, RECIPES[name], flush=True)
        run = Run(RECIPES[name], shape, options.data, device)
        share = (options.budget - (time.monotonic() - began)) / (len(options.recipes) - index)
        run.train(share, options.steps, options.batch)
        report[name] = {"recipe": asdict(RECIPES[name]), "history": run.history, "best_validation": run.best_loss}
        if run.best_loss < best:
            best, report["chosen"] = run.best_loss, name
            run.model.load_state_dict(run.best)
            save_weights(run.model, options.out / "model.safetensors")
        (options.out / "training.json").write_text(json.dumps(report, indent=1) + "\n")
        print(f"{name}: best validation {run.best_loss:.4f} nats a token, {time.monotonic() - began:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
