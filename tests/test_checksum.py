"""A checksum finds what differs, wherever it is."""

import pytest
import torch

from qlora import checksum as module
from qlora.checksum import checksum


@pytest.fixture(params=[4, 2**22])
def chunk(request, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", request.param)


@pytest.mark.parametrize("size", [1, 7, 8, 9, 64, 75])
def test_each_bit_and_the_order_count(chunk, size):
    generator = torch.Generator().manual_seed(size)
    data = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)  # [size]
    found = {checksum(data).item()}
    for place in range(size):
        for bit in (1, 128):
            changed = data.clone()  # [size]
            changed[place] ^= bit
            found.add(checksum(changed).item())
    assert len(found) == 1 + 2 * size
    assert (checksum(data.clone()).item() in found and checksum(data.flip(0)).item() not in found) or size == 1
    longer = torch.cat([data, torch.zeros(1, dtype=torch.uint8)])
    assert checksum(longer).item() not in found


def test_words_that_trade_places_are_found(chunk):
    data = torch.arange(64, dtype=torch.int64)  # [64]
    for one, other in ((0, 1), (3, 4), (0, 63)):
        changed = data.clone()  # [64]
        changed[one], changed[other] = data[other], data[one]
        assert checksum(changed) != checksum(data)


def test_a_checksum_is_of_bytes_whatever_their_dtype_and_place(chunk):
    data = torch.randn(6, 8)  # [6, 8]
    bytes_ = data.flatten().view(torch.uint8)  # [192]
    assert checksum(data) == checksum(bytes_) == checksum(data.view(torch.int32).clone())
    shifted = torch.cat([torch.zeros(3, dtype=torch.uint8), bytes_])  # [195]
    assert checksum(shifted[3:]) == checksum(data)
    assert checksum(data.T) == checksum(data.T.contiguous()) != checksum(data)
    assert checksum(torch.tensor([0.0])) != checksum(torch.tensor([-0.0]))
    assert checksum(torch.tensor([torch.nan])) == checksum(torch.tensor([torch.nan]))
    assert checksum(torch.empty(0)).item() == checksum(torch.empty(0, dtype=torch.int64)).item()
