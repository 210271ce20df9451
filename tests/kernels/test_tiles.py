import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.ir.cost.device_table import device
from planner.ir.errors import InputError
from planner.kernels.triton.tiles import (
    TARGETS,
    Product,
    attention_tile,
    decode_splits,
    decode_tile,
    matmul_tile,
    target_of,
)

targets = st.sampled_from(list(TARGETS.values()))
sizes = st.integers(1, 20000)


@given(sizes, sizes, sizes, targets, st.sampled_from([2, 4]), st.sampled_from([1, 2]))
def test_tiles_fit_the_machine(rows, columns, depth, target, element_bytes, parts):
    tile = matmul_tile(Product(rows, columns, depth, target, 1, element_bytes, parts))
    step = (tile.block_m + parts * tile.block_n) * tile.block_k * element_bytes
    assert tile.stages * step <= target.shared_bytes
    assert tile.block_m * tile.block_n * parts <= 64 * 32 * tile.warps
    assert min(tile.block_m, tile.block_n, tile.block_k) >= 16


@given(st.integers(1, 5000), sizes, sizes, targets)
def test_one_more_token_does_not_change_the_tile(rows, columns, depth, target):
    bucket = 1 << (rows - 1).bit_length()
    one, more = (matmul_tile(Product(n, columns, depth, target)) for n in (rows, bucket))
    assert one == more


def test_prefill_is_tiled_for_tensor_cores_and_decode_for_bandwidth():
    for target in TARGETS.values():
        prefill = matmul_tile(Product(640, 12288, 4096, target))
        decode = matmul_tile(Product(1, 12288, 4096, target))
        assert prefill.block_m * prefill.block_n >= 128 * 128
        assert decode.block_m == 16
        programs = 12288 // decode.block_n
        assert programs >= target.processors


@given(st.integers(1, 5000), st.sampled_from([32, 64, 80, 96, 128, 256]), targets)
def test_attention_tiles_fit_the_machine(tokens, head_dim, target):
    width = 1 << (head_dim - 1).bit_length()
    for tile in (attention_tile(tokens, head_dim, target), decode_tile(head_dim, target)):
        keys_and_values = 2 * tile.stages * tile.block_n * width * 2
        assert tile.block_m * width * 2 + keys_and_values <= target.shared_bytes


def test_decode_splits_fill_the_gpu_but_leave_work_for_each():
    h100 = TARGETS["sm_90"]
    assert decode_splits(32, 4096, h100) == 16
    assert decode_splits(1024, 4096, h100) == 1
    assert decode_splits(32, 64, h100) == 1
    assert decode_splits(1, 10**6, h100) == 64


def test_targets_by_capability():
    assert target_of((9, 0)) is TARGETS["sm_90"]
    assert target_of((8, 7)) is TARGETS["sm_86"]
    assert target_of((10, 0)) is TARGETS["sm_90"]
    assert target_of((12, 0)) is TARGETS["sm_89"]
    with pytest.raises(InputError, match=r"7\.5 is not supported"):
        target_of((7, 5))


def test_peaks_are_the_device_table_s():
    for target in TARGETS.values():
        row = device(target.device)
        assert target.roofline(row.operations_per_second, 0) == 1
        assert target.roofline(0, row.bytes_per_second) == 1
