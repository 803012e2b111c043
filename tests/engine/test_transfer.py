"""Pieces of files end where they belong, whatever their number, order and dtype, and broken files say so."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from miinb import checkpoint
from miinb.engine import transfer
from miinb.engine.readers import Region, SafetensorsReader
from miinb.engine.transfer import Room, Transfer
from miinb.errors import BrokenCheckpoint

CPU = torch.device("cpu")


class Files:
    """What a reader asks of a model: its files and their tensors."""

    def __init__(self, file: Path) -> None:
        self.source = "here"
        self.files = [file]
        self.tensors = {entry.name: entry for entry in checkpoint.read_safetensors(file)}


@pytest.fixture
def stored(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    torch.manual_seed(0)
    tensors = {
        "bf16": torch.randn(60, 40).bfloat16(),
        "fp32": torch.randn(60, 40),
        "vector": torch.randn(60),
        "vector16": torch.randn(60).half(),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors", tensors


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("piece", [1, 300, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_regions(
    threads: int,
    piece: int,
    dtype: torch.dtype,
    stored: tuple[Path, dict[str, Tensor]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transfer, "PIECE_BYTES", piece)
    file, tensors = stored
    rows, columns = slice(12, 48), slice(10, 30)
    with ExitStack() as stack:
        copies = Transfer(CPU, threads)
        stack.callback(copies.close)
        reader = SafetensorsReader(Files(file), "", copies, stack)  # type: ignore[arg-type]

        def filled(name: str, region: Region, *shape: int) -> Tensor:
            target = torch.empty(shape[0] + 2, *shape[1:], dtype=dtype)[1:-1]
            reader.fill(target, name, region)
            return target

        for name in ("bf16", "fp32"):
            x = tensors[name].to(dtype)
            assert torch.equal(filled(name, Region((60, 40), rows, slice(0, 40)), 36, 40), x[rows])
            assert torch.equal(filled(name, Region((60, 40), rows, columns), 36, 20), x[rows, columns])
            flipped = Region((40, 60), columns, rows, transposed=True)
            assert torch.equal(filled(name, flipped, 20, 36), x.t()[columns, rows])
            by_head = Region((60, 40), rows, columns, head_size=4)
            expected = x[rows, columns].view(3, 3, 4, 20).transpose(0, 1).reshape(36, 20)
            assert torch.equal(filled(name, by_head, 36, 20), expected)
        for name in ("vector", "vector16"):
            x = tensors[name].to(dtype)
            assert torch.equal(filled(name, Region((60,), rows), 36), x[rows])
            expected = x[rows].view(3, 3, 4).transpose(0, 1).reshape(36)
            assert torch.equal(filled(name, Region((60,), rows, head_size=4), 36), expected)


def test_a_file_that_shrank_is_told(stored: tuple[Path, dict[str, Tensor]]) -> None:
    file, _ = stored
    with ExitStack() as stack:
        reader = SafetensorsReader(Files(file), "", Transfer(CPU), stack)  # type: ignore[arg-type]
        file.write_bytes(file.read_bytes()[:1000])
        with pytest.raises(BrokenCheckpoint, match="cannot be read to its end"):
            reader.fill(torch.empty(60, 40), "fp32", Region((60, 40), slice(0, 60), slice(0, 40)))


def test_bytes_are_read_to_where_they_stay() -> None:
    """Of the right dtype and order nothing is copied a second time."""
    target, seen = torch.zeros(8, 4, dtype=torch.bfloat16), []

    def read(first: int, last: int, room: Room) -> Tensor:
        memory = room((last - first) * 4, torch.bfloat16)
        seen.append(memory.data_ptr())
        return memory.fill_(1)

    Transfer(CPU).fill(target, 8, read)
    assert seen == [target.data_ptr()]
    assert bool((target == 1).all())
