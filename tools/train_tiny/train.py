"""Train the tiny checkpoint: `python tools/train_tiny/train.py -o FOLDER`. Stop it any time; the same command goes on.

With `--start CHECKPOINT` it teaches a checkpoint further instead of beginning with nothing. Seeds, data and order are
fixed. What is left to chance is the order in which torch's threads add (1e-6 a step).
"""

import json
import time
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from shutil import copy
from typing import Annotated

import numpy as np
import torch
import typer
from batches import Batch, collate, collate_by_length
from muon import Muon
from network import HEADS, TrainedGAR
from pictures import HELD_OUT_PHOTOS, photograph, scene
from questions import vocabulary
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from saved import resume, save
from schedule import Schedule
from sequences import Example, ExampleMaker
from torch.utils.data import DataLoader, Dataset

from garserve.checkpoint import Checkpoint
from garserve.config import read_config
from garserve.model.random_checkpoint import write_files
from garserve.presets import preset

TRAINING, HELD_OUT = 1, 2


class Examples(Dataset[Example]):
    """Examples number `start`, `start` + 1, … of the training data; from `groups` on, every other has many regions."""

    def __init__(self, maker: ExampleMaker, start: int, stop: int, groups: int) -> None:
        self.maker, self.start, self.stop, self.groups = maker, start, stop, groups

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int) -> Example:
        number = self.start + index
        many = number >= self.groups and number % 2 == 0
        return self.maker.many((TRAINING, number)) if many else self.maker((TRAINING, number))


def main(
    output: Annotated[Path, typer.Option("-o", help="Folder of the checkpoint; training goes on where it stopped.")],
    start: Annotated[
        Path | None, typer.Option(help="A tiny checkpoint to teach further: the dropped heads first, then everything.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps in all.")] = 4800,
    vision_steps: Annotated[int, typer.Option(min=0, help="First steps, of the tower alone; 0 with --start.")] = 900,
    decoder_steps: Annotated[int, typer.Option(min=0, help="Next steps, of the decoder alone; 0 with --start.")] = 600,
    group_steps: Annotated[
        int, typer.Option(min=0, help="Last steps, where half of the pictures have many regions; 0 with --start.")
    ] = 300,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures a step.")] = 16,
    rate: Annotated[float, typer.Option(help="Learning rate.")] = 2e-3,
    workers: Annotated[int, typer.Option(min=0, help="Processes that make pictures.")] = 1,
    look_every: Annotated[
        int, typer.Option(min=1, help="Steps between looks at held-out data, which also save.")
    ] = 250,
) -> None:
    """Train, and leave a whole checkpoint in the folder at every look."""
    schedule = Schedule.further(steps) if start else Schedule(steps, 0, vision_steps, decoder_steps, group_steps)
    torch.manual_seed(0)
    config, preprocessor = preset("tiny")
    config["replay_box_scale"] = "geometric"
    output.mkdir(parents=True, exist_ok=True)
    write_files(output, config, preprocessor, vocabulary())
    parsed = read_config(output)
    model = TrainedGAR(parsed)
    if start is not None:
        _begin_with(model, start, output)
    maker = ExampleMaker(output, parsed)
    optimizers = _optimizers(model, rate)
    settings = {"rate": rate, "batch_size": batch_size, **schedule.phases}
    done = resume(output, model, optimizers, settings)
    if done >= steps:
        print(f"{output}: trained for {done} steps already; --steps above that would go on")
        return
    held_out = _held_out(maker)
    examples = Examples(maker, done * batch_size, steps * batch_size, (steps - schedule.groups) * batch_size)
    loader = _batches(examples, batch_size, workers)
    with (
        _bar() as progress,
        (output / "log.jsonl").open("a", encoding="utf-8") as log,
        one_threaded(torch.get_num_threads()) as cores,
    ):
        task = progress.add_task("steps", total=steps, completed=done)
        began = time.monotonic()
        for step, parts in enumerate(loader, start=done):
            factor, phase = schedule.rate(step), schedule.phase(step)
            for name, weight in model.named_parameters():
                weight.requires_grad_(phase != "heads" or name.startswith(HEADS))
            decoder, frozen = phase != "tower", phase == "decoder"
            losses = train_step(model, optimizers, parts, rate * factor, cores, decoder=decoder, frozen=frozen)
            row = {"step": step} | losses | {"rate": factor, "seconds": round(time.monotonic() - began, 1)}
            if (step + 1) % look_every == 0 or step + 1 == steps:
                row["held_out"] = {name: look(model, examples) for name, examples in held_out.items()}
                save(output, model, optimizers, step + 1, settings)
            log.write(json.dumps(row) + "\n")
            log.flush()
            progress.update(
                task, completed=step + 1, description=f"loss {row['answers']:.3f}, hints {row['hints']:.3f}"
            )
    plot(output)


def _held_out(maker: ExampleMaker) -> dict[str, list[Example]]:
    """Make what is looked at, and never learnt from."""
    return {
        "scenes": [maker((HELD_OUT, i), scene) for i in range(64)],
        "photographs": [maker((HELD_OUT, i), lambda rng: photograph(rng, HELD_OUT_PHOTOS)) for i in range(64)],
    }


def _batches(examples: Examples, size: int, workers: int) -> DataLoader[Example]:
    """Return the batches of examples in their order, made in processes beside."""
    ahead = 4 if workers else None
    return DataLoader(examples, size, collate_fn=collate_by_length, num_workers=workers, prefetch_factor=ahead)


def _bar() -> Progress:
    columns = (MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(BarColumn(), *columns)


def one_threaded(count: int) -> ThreadPoolExecutor:
    """Return threads in which torch uses one core each.

    Each computes a part of a batch of its own: a fifth faster than both together at one part, where one waits for the
    other after every operation, and for what makes pictures beside them.
    """
    return ThreadPoolExecutor(count, initializer=partial(torch.set_num_threads, 1))


def train_step(
    model: TrainedGAR,
    optimizers: list[torch.optim.Optimizer],
    parts: list[Batch],
    rate: float,
    cores: Executor,
    *,
    decoder: bool,
    frozen: bool,
) -> dict[str, float]:
    """Take one step over the parts of a batch, each of which weighs the same; return the means of what was before."""
    model.train()

    def learn(part: Batch) -> list[float]:
        losses = model(part, decoder=decoder, frozen=frozen)
        ((4 * losses.answers + 0.5 * losses.hints) / len(parts)).backward()
        flat = [right for row in losses.right for right in row]
        right = float(np.mean(flat)) if flat else np.nan
        return [losses.answers.item(), losses.hints.item(), right, losses.colour_right]

    rows = list(cores.map(learn, reversed(parts)))  # the longest first: at the end, no core has much left alone
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
    list(cores.map(_update, optimizers))
    means = torch.tensor(rows).nanmean(dim=0).nan_to_num(0.0).tolist()
    return dict(zip(("answers", "hints", "right", "colour_hint"), means, strict=True))


def _update(optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@torch.inference_mode()
def look(model: TrainedGAR, examples: list[Example]) -> dict[str, float]:
    """Return the share of held-out questions that greedy decoding answers word for word, by attribute and form."""
    model.eval()
    counts: dict[str, list[bool]] = {}
    for start in range(0, len(examples), 32):
        some = examples[start : start + 32]
        losses = model(collate(some), decoder=True)
        counts.setdefault("hint: colour", []).append(losses.colour_right)  # type: ignore[arg-type]
        for example, right in zip(some, losses.right, strict=True):
            for one, correct in zip(example.asked, right, strict=True):
                counts.setdefault(f"{one.attribute} ({one.form})", []).append(correct)
    return {name: round(float(np.mean(values)), 3) for name, values in sorted(counts.items())}


def _begin_with(model: TrainedGAR, start: Path, output: Path) -> None:
    """Take the weights and the tokenizer of a tiny checkpoint."""
    opened = Checkpoint.open(start)
    if opened.config != model.config:
        raise SystemExit(f"--start {start}: expected a checkpoint with the config of the preset tiny")
    copy(opened.folder / "tokenizer.json", output / "tokenizer.json")
    state = {name: tensor.float() for name, tensor in opened.module_state().items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    strange = [name for name in missing if not name.startswith((*HEADS, "language_model.lm_head"))]
    if strange or unexpected:
        raise SystemExit(f"--start {start}: expected all weights of the model and no others, got {strange, unexpected}")


def _optimizers(model: TrainedGAR, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, Adam for everything else."""
    matrices, rest = [], []
    for name, weight in model.named_parameters():
        inner = any(part in name for part in (".blocks.", ".layers.", "projector."))
        (matrices if inner and weight.ndim == 2 else rest).append(weight)
    return [
        Muon(matrices[::2], lr=rate),  # each at a core of its own
        Muon(matrices[1::2], lr=rate),
        torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def plot(output: Path) -> None:
    """Draw the losses and the share of right answers over the steps."""
    from matplotlib.figure import Figure

    rows = {row["step"]: row for row in map(json.loads, (output / "log.jsonl").read_text().splitlines())}
    steps = sorted(rows)
    figure = Figure(figsize=(8, 4), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    for key, label in (("answers", "answers"), ("hints", "hints (dropped heads)")):
        values = [rows[step][key] for step in steps]
        smooth = np.convolve(values, np.ones(25) / 25, mode="valid") if len(values) > 25 else np.array(values)
        left.plot(steps[len(steps) - len(smooth) :], smooth, label=label)
    left.set(yscale="log", xlabel="step", ylabel="loss, mean of 25 steps")
    looks = [step for step in steps if "held_out" in rows[step]]
    for name in ("scenes", "photographs"):
        held = [rows[step]["held_out"][name] for step in looks]
        means = [np.mean([v for key, v in one.items() if not key.startswith("hint")]) for one in held]
        right.plot(looks, means, label=name, marker=".")
    right.set(xlabel="step", ylabel="held-out answers right, mean of kinds", ylim=(0, 1))
    left.legend()
    right.legend()
    figure.savefig(output / "training.png")


if __name__ == "__main__":
    typer.run(main)
