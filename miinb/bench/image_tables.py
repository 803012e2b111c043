"""What `python -m miinb.bench.images` prints and draws of its runs."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from miinb.bench import charts
from miinb.bench.environment import hardware_words
from miinb.bench.pixels import psnr_words
from miinb.bench.records import DEFINITIONS, Runs
from miinb.bench.startup import COLUMNS, phases_words
from miinb.bench.summary import ratio_text
from miinb.wording import number, size_words


def in_process(runs: Runs) -> str:
    """Medians, a line an arm and batch."""
    (env,) = runs.env.values()
    summary, lines = runs.summary, list[str]()
    columns = ("arm", "batch", "s/image", "images/s", "ms/step", "decode s", "speedup", "latents", "PSNR", "warm-up s")
    widths = (14, 5, 9, 9, 9, 9, 8, 9, 10, 9)
    for _, row in summary.iterrows():
        facts, batch = env["arms"][row["arm"]], int(row["batch_size"])
        unlike = f"{facts[f'difference_{batch}']:.1e}" if facts[f"finite_{batch}"] else "NOT FINITE"
        cells = [row["arm"], str(batch), number(row["image_p50_s"]), number(row["img_s"])]
        cells += [number(row["step_p50_s"] * 1e3), number(row["vae_p50_s"])]
        cells += ["" if pd.isna(row["speedup"]) else ratio_text(row["speedup"]), unlike]
        cells += [psnr_words(row["psnr_db"]) if pd.notna(row["psnr_db"]) else "", number(facts[f"warm_{batch}_s"])]
        lines.append(" ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))
    head = " ".join(f"{name:>{width}}" for name, width in zip(columns, widths, strict=True))
    work, first = env["workload"], summary.iloc[0]
    how = f"{work['size']} x {work['size']}, {work['steps']} steps, {first['dtype']}"
    foot = f"Medians of {first['n']}, {env['model']}, {how}; {hardware_words(env['host'])}."
    for arm, facts in env["arms"].items():
        if "compared_with" in facts:
            foot += f"\nLatents and PSNR of {arm} are to those of {facts['compared_with']}."
    return "\n".join([head, *lines, foot])


def served(runs: Runs) -> str:
    """The starts (cold: nothing was compiled yet), and what the server adds where one request is in flight."""
    (env,) = runs.env.values()
    lines = [f"{'start':15} {'ready s':>7} {COLUMNS}  most memory of the load"]
    for arm, facts in env["arms"].items():
        for kind in ("cold_", "") if "cold_ready_s" in facts else ("",):
            peak = size_words(facts[f"{kind}load_peak_bytes"]) if facts[f"{kind}load_peak_bytes"] else "-"
            name, phases = f"{arm}, cold" if kind else arm, phases_words(facts[f"{kind}phases_s"])
            lines.append(f"{name:15} {facts[f'{kind}ready_s']:>7.1f} {phases}  {peak:>24}")
    lines.append("")
    lines.append(f"{'arm':14} {'batch':>5} {'s/image':>9} {'in the model':>13} {'overhead':>9}")
    for _, row in runs.summary.iterrows():
        model, batch = float(row["model_p50_s"]), int(row["batch_size"])
        share = f"{row['overhead']:.2%}" if pd.notna(row["overhead"]) else "-"
        lines.append(
            f"{row['arm']:14} {batch:5d} {number(row['image_p50_s']):>9} {number(model / batch):>13} {share:>9}"
        )
    lines.append(f"Overhead: {DEFINITIONS['overhead']}.")
    return "\n".join(lines)


def draw(runs: Runs, folder: Path, name: str) -> list[Path]:
    """The charts of a run: images by batch with pictures, where the time goes, and scaling where there are batches."""
    kinds = ("images", "time_split", *(["batch_scaling"] if runs.summary["batch_size"].nunique() > 1 else []))
    return [charts.save(charts.draw(kind, runs), folder / f"{name}-{kind.replace('_', '-')}.png") for kind in kinds]
