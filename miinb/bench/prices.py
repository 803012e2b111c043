"""What tokens and images cost at the price that the user gives; never a price of our own."""

from __future__ import annotations

import math


def usd_per_mtok(output_tok_s: float, price_usd_per_gpu_hour: float | None, n_gpus: int = 1) -> float:
    """US dollars per million output tokens; NaN without a price or without tokens.

    Args:
        output_tok_s: output tokens a second of the whole deployment.
        price_usd_per_gpu_hour: price of one GPU-hour; of one machine-hour where there is no GPU.
        n_gpus: GPUs that the deployment holds; a machine without a GPU counts as one.
    """
    return _usd_per(output_tok_s, price_usd_per_gpu_hour, n_gpus) * 1e6


def usd_per_1k_images(img_s: float, price_usd_per_gpu_hour: float | None, n_gpus: int = 1) -> float:
    """US dollars per thousand images; NaN without a price or without images."""
    return _usd_per(img_s, price_usd_per_gpu_hour, n_gpus) * 1e3


def usd_per_1k_texts(seq_s: float, price_usd_per_gpu_hour: float | None, n_gpus: int = 1) -> float:
    """US dollars per thousand texts of an encoder task (classifications, ...); NaN without a price or without texts."""
    return _usd_per(seq_s, price_usd_per_gpu_hour, n_gpus) * 1e3


def _usd_per(per_second: float, price: float | None, n_gpus: int) -> float:
    if price is None or not math.isfinite(price) or not per_second > 0:
        return math.nan
    return price * max(n_gpus, 1) / 3600.0 / per_second
