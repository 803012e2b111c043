import torch

from miinb.kernels import reference


def test_philox_is_the_published_generator() -> None:
    words = reference.philox(torch.tensor([0]), torch.tensor([0]), 4)
    assert words.tolist() == [[0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]]  # Random123's known answer


def test_noise_does_not_depend_on_the_batch() -> None:
    seeds, positions = torch.tensor([7, 2**63 - 1, 7]), torch.tensor([5, 2**33, 6])
    together = reference.gumbel(seeds, positions, 11)
    assert torch.isfinite(together).all()
    for row in range(3):
        assert torch.equal(reference.gumbel(seeds[row : row + 1], positions[row : row + 1], 11)[0], together[row])
    assert not torch.equal(together[0], together[2])


def test_rows_attend_to_their_own_pages() -> None:
    q, cache = torch.randn(3, 2, 4), torch.randn(4, 2, 1, 4)
    tables, starts, lengths = torch.tensor([[1, 3], [2, 0]]), torch.tensor([0, 2, 3]), torch.tensor([3, 1])
    out = reference.paged_attention(q, cache, cache, tables, starts, lengths, scale=1.0)
    assert torch.equal(out[2], cache[2, 0].expand(2, 4))
    keys = torch.cat((cache[1, :, 0], cache[3, :1, 0]))
    torch.testing.assert_close(out[1], (q[1] @ keys.T).softmax(-1) @ keys)
    torch.testing.assert_close(out[0], (q[0] @ keys[:2].T).softmax(-1) @ keys[:2])


def test_sampling_keeps_what_the_parameters_keep() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    kept = {}
    for name, top_k, top_p, min_p in [("k", 2, 1.0, 0.0), ("p", 0, 0.7, 0.0), ("m", 0, 1.0, 0.2), ("all", 0, 1.0, 0.0)]:
        rows = 400
        tokens, finite = reference.sample(
            logits.expand(rows, 4),
            torch.arange(rows),
            torch.ones(rows, dtype=torch.int64),
            torch.ones(rows),
            torch.full((rows,), top_k),
            torch.full((rows,), top_p),
            torch.full((rows,), min_p),
        )
        assert finite.all()
        kept[name] = set(tokens.tolist())
    assert kept == {"k": {0, 1}, "p": {0, 1}, "m": {0, 1, 2}, "all": {0, 1, 2, 3}}
