"""What the user sees of a run: a line now and then, the loss curve as data and as a picture, and a summary.

All of it is rank 0's work; the other ranks compute.

    loss.jsonl     one line a step: {"step": 1, "loss": 5.5, "grad_norm": 2.1, "lr": 0.0001}
    loss.png       the same as a curve
    sample.txt     text written by the trained model
    summary.json   steps, losses, speed, layout
"""

import json
import time
from pathlib import Path
from typing import Any


def read_losses(path: Path) -> list[dict[str, Any]]:
    """The rows of a loss.jsonl; a last line that a killed run left unfinished is not a row."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def format_seconds(seconds: float) -> str:
    """75 -> '1:15', 3700 -> '1:01:40'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Progress:
    """Counts steps, tokens and seconds, prints every `print_every` steps, and keeps loss.jsonl complete.

    Every rank has one, to keep the training loop free of special cases; only rank 0's writes and prints.
    """

    def __init__(self, out: Path, is_writer: bool, steps: tuple[int, int], tokens_per_step: int, print_every: int):
        self.out, self.is_writer, self.print_every = out, is_writer, print_every
        self.first_step, self.last_step = steps
        self.step = self.first_step  # the last one done
        self.tokens_per_step = tokens_per_step
        self.started = self.window_started = time.perf_counter()
        self.window_steps = 0
        self.rows: list[dict[str, Any]] = []
        if is_writer:
            out.mkdir(parents=True, exist_ok=True)
            # A resumed run continues the curve; what was logged beyond the checkpoint will happen again.
            self.rows = [row for row in read_losses(out / "loss.jsonl") if row["step"] <= self.first_step]
            (out / "loss.jsonl").write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    def seconds(self) -> float:
        """Seconds since training began."""
        return time.perf_counter() - self.started

    def step_done(self, row: dict[str, Any]) -> None:
        """Record one step; written at once, so that a killed run loses nothing."""
        self.step = row["step"]
        self.window_steps += 1
        if not self.is_writer:
            return
        self.rows.append(row)
        with (self.out / "loss.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        if row["step"] % self.print_every == 0 or row["step"] in (self.first_step + 1, self.last_step):
            self.print_line(row)

    def print_line(self, row: dict[str, Any]) -> None:
        """One line of progress; the speed is that of the steps since the line before."""
        now = time.perf_counter()
        tokens_per_s = self.window_steps * self.tokens_per_step / (now - self.window_started)
        self.window_started, self.window_steps = now, 0
        left = (self.last_step - row["step"]) * (now - self.started) / (row["step"] - self.first_step)
        print(
            f"step {row['step']:>5}/{self.last_step} | loss {row['loss']:.4f} "
            f"| grad norm {row['grad_norm']:.2f} | lr {row['lr']:.1e} "
            f"| {tokens_per_s:,.0f} tokens/s | {format_seconds(left)} left",
            flush=True,
        )

    def summary(self) -> dict[str, Any]:
        """What the steps of this run came to; call it when they are done."""
        steps = self.step - self.first_step
        seconds = self.seconds()
        return {
            "step": self.step,
            "steps_this_run": steps,
            "seconds": round(seconds, 1),
            "tokens_per_s": round(steps * self.tokens_per_step / seconds),
            "training_loss": self.rows[-1]["loss"] if self.rows else None,
        }

    def finish(self, summary: dict[str, Any], sample: str) -> None:
        """Write sample.txt, summary.json and loss.png, and say where everything is."""
        if not self.is_writer:
            return
        if sample:
            (self.out / "sample.txt").write_text(sample, encoding="utf-8")
        (self.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        draw_curve(self.rows, summary["validation_loss"], self.out / "loss.png")
        files = sorted(path.name + "/" * path.is_dir() for path in self.out.iterdir())
        print(f"in {self.out}: {', '.join(files)}", flush=True)


def draw_curve(rows: list[dict[str, Any]], validation_loss: float, path: Path) -> None:
    """The loss over the steps as a picture, or a line that says why there is none."""
    try:
        import matplotlib
    except ImportError:
        print("loss.png is not drawn: matplotlib is not installed (pip install matplotlib)")
        return
    matplotlib.use("Agg")  # draws to a file; there may be no display
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    axes.plot([row["step"] for row in rows], [row["loss"] for row in rows], linewidth=1, label="training")
    axes.axhline(validation_loss, color="tab:orange", label=f"validation {validation_loss:.3f}")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per byte)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
