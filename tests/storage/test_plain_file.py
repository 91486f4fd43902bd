"""Files read without torch say what torch does, for every dtype of safetensors that torch has."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from peft_sapt.errors import PoolFormatError
from peft_sapt.storage.manifest import digest
from peft_sapt.storage.plain_file import DTYPES, Stored, bytes_of, is_finite, read_stored, stored_digest

FLOATS = ["float16", "bfloat16", "float32", "float64", "float8_e5m2", "float8_e4m3fn", "complex64"]


@pytest.mark.parametrize("name", sorted(set(DTYPES.values())))
@pytest.mark.parametrize("shape", [(3, 5), (), (0, 4)], ids=str)
def test_digests_and_sizes_are_those_of_torch(tmp_path, name: str, shape: tuple[int, ...]) -> None:
    kind = getattr(torch, name, None)
    if kind is None:
        pytest.xfail(f"this torch has no {name}")
    numbers = torch.randint(0, 120, (*shape, torch.empty(0, dtype=kind).element_size()), dtype=torch.uint8)
    tensor = (numbers % 2).bool()[..., 0] if kind is torch.bool else numbers.view(kind)[..., 0].contiguous()
    save_file({"x": tensor}, tmp_path / "x.safetensors")
    stored = read_stored(tmp_path / "x.safetensors")["x"]
    assert stored_digest(stored) == digest(tensor)
    assert bytes_of(stored.dtype, stored.shape) == len(stored.data) == tensor.nbytes


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "0.0", "-0.0", "448.0", "-1e-3"])
def test_what_is_finite_is_what_torch_says(tmp_path, name: str, value: str) -> None:
    kind = getattr(torch, name)
    tensor = torch.tensor([1.0, float(value), -2.0]).to(kind)
    save_file({"x": tensor}, tmp_path / "x.safetensors")
    wide = torch.view_as_real(tensor) if tensor.is_complex() else tensor.float()
    assert is_finite(read_stored(tmp_path / "x.safetensors")["x"]) == bool(wide.isfinite().all())


def test_a_dtype_that_no_pool_has_is_refused_by_name() -> None:
    with pytest.raises(PoolFormatError, match="dtype F4"):
        stored_digest(Stored("F4", [2], b"x"))
