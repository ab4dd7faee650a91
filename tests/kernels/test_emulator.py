"""The emulator itself: kernels whose results are known, and mistakes that it must find."""

from __future__ import annotations

from pathlib import Path

import emulated
import pytest
import torch

SOURCE = """
#include "block.h"
#include "host_device.h"

extern "C" __global__ void reverse_kernel(const float* source, float* target, std::int64_t count) {
  extern __shared__ float values[];
  const std::int64_t place = blockIdx.x * static_cast<std::int64_t>(blockDim.x) + threadIdx.x;
  if (place < count) values[threadIdx.x] = source[place];
  __syncthreads();
  const std::int64_t last = min(static_cast<std::int64_t>(blockDim.x), count - blockIdx.x * blockDim.x) - 1;
  if (place < count) target[place] = values[last - threadIdx.x];
}

extern "C" __global__ void __launch_bounds__(engine::kBlockThreads) sum_kernel(const float* values, float* sums) {
  const float sum = engine::block_sum(values[threadIdx.x]), twice = engine::block_sum(2 * values[threadIdx.x]);
  sums[threadIdx.x] = twice - 2 * sum;
  if (threadIdx.x == 0) sums[0] = sum;
}

extern "C" __global__ void warp_kernel(std::int64_t* target) {
  const int lane = threadIdx.x % 32;
  std::int64_t* const row = target + threadIdx.x * 8;
  row[0] = __shfl_sync(0xffffffffu, lane, 3);
  row[1] = __shfl_up_sync(0xffffffffu, lane, 1);
  row[2] = __shfl_down_sync(0xffffffffu, lane, 2, 8);
  row[3] = __shfl_xor_sync(0xffffffffu, static_cast<std::int64_t>(lane), 16);
  row[4] = __ballot_sync(0xffffffffu, lane % 5 == 0);
  if (lane < 16) row[5] = __popc(__ballot_sync(0xffffu, lane > 2));
  row[6] = __any_sync(0xffffffffu, lane == 31) + 2 * __all_sync(0xffffffffu, lane < 31);
  row[7] = __syncthreads_count(threadIdx.x < 5);
}

extern "C" __global__ void count_kernel(int* counter, const bool* chosen, int* order) {
  if (chosen[blockIdx.x * blockDim.x + threadIdx.x]) order[atomicAdd(counter, 1)] = blockIdx.x;
}

// Every block adds its number, waits for all, and reads the sum.
extern "C" __global__ void grid_kernel(unsigned* sum, volatile unsigned* arrived, unsigned* seen) {
  __shared__ unsigned own;
  if (threadIdx.x == 0) {
    own = blockIdx.x;
    atomicAdd(sum, own);
    __threadfence();
    atomicAdd(const_cast<unsigned*>(arrived), 1u);
    while (*arrived < gridDim.x) __nanosleep(100);
    seen[own] = atomicAdd(sum, 0u);
  }
  __syncthreads();
}

extern "C" __global__ void race_kernel(float* values) {
  __shared__ float last;
  last = 0;
  __syncthreads();
  if (threadIdx.x == 20) last = 1;
  values[threadIdx.x] = last;  // a barrier is missing
}

extern "C" __global__ void early_kernel(bool ends) {
  if (ends && threadIdx.x == 7) return;
  __syncthreads();
}

extern "C" __global__ void diverging_kernel() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

extern "C" __global__ void lanes_kernel(int* target) {
  if (threadIdx.x < 4) target[threadIdx.x] = __shfl_sync(0xfu, threadIdx.x, 9);
}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory):
    source = tmp_path_factory.mktemp("emulator") / "cases.cu"
    source.write_text(SOURCE)

    def launch(kernel: str, grid: int, block: int, *arguments: object, **options: int) -> None:
        emulated.launch(Path(source), kernel, grid, block, arguments, **options)

    return launch


def test_blocks_have_shared_memory_and_barriers(run):
    source, target = torch.arange(150.0), torch.full((151,), -1.0)
    run("reverse_kernel", 3, 64, source, target, 150, shared_bytes=256)
    parts = [part.flip(0) for part in source.split(64)]
    assert torch.equal(target, torch.cat([*parts, torch.tensor([-1.0])]))


def test_a_sum_over_a_block_may_follow_another(run):
    values, sums = torch.rand(256), torch.empty(256)
    run("sum_kernel", 1, 256, values, sums)
    torch.testing.assert_close(sums[0], values.sum())
    assert not sums[1:].any()


def test_lanes_of_a_warp_exchange_values(run):
    target = torch.empty(64, 8, dtype=torch.int64)
    run("warp_kernel", 1, 64, target)
    lanes = torch.arange(64) % 32
    assert target[:, 0].eq(3).all()
    assert torch.equal(target[:, 1], (lanes - 1).clamp(min=0))
    assert torch.equal(target[:, 2], torch.where(lanes % 8 < 6, lanes + 2, lanes))
    assert torch.equal(target[:, 3], lanes ^ 16)
    assert target[:, 4].eq(sum(1 << lane for lane in range(0, 32, 5))).all()
    assert target[lanes < 16, 5].eq(13).all()
    assert target[:, 6].eq(1).all() and target[:, 7].eq(5).all()


def test_atomics_count_across_blocks(run):
    chosen = torch.rand(3 * 40) < 0.5
    counter, order = torch.zeros(1, dtype=torch.int32), torch.full((120,), -1, dtype=torch.int32)
    run("count_kernel", 3, 40, counter, chosen, order)
    assert int(counter) == int(chosen.sum())
    assert order[: int(counter)].bincount(minlength=3).tolist() == chosen.view(3, 40).sum(1).tolist()


def test_blocks_of_a_cooperative_launch_wait_for_each_other(run):
    total, arrived, seen = (torch.zeros(size, dtype=torch.int32) for size in (1, 1, 6))
    run("grid_kernel", 6, 40, total, arrived, seen, cooperative=True)
    assert seen.tolist() == [15] * 6


def test_a_race_shows_by_the_order_of_threads(run):
    results = []
    for descending in (False, True):
        values = torch.empty(64)
        with emulated.cuda_backend(descending=descending):
            run("race_kernel", 1, 64, values)
        results.append((values == 1).tolist())
    assert results == [[thread >= 20 for thread in range(64)], [thread <= 20 for thread in range(64)]]


@pytest.mark.parametrize(
    ("kernel", "arguments", "message"),
    [
        ("early_kernel", (True,), "early_kernel: block .0, 0, 0.: thread 0 waits in __syncthreads.*thread 7 has ended"),
        ("diverging_kernel", (), "diverging_kernel: block .* waits in __syncthreads in line"),
        ("lanes_kernel", (torch.zeros(4, dtype=torch.int32),), "lane 0 reads lane 9, which takes no part"),
        ("early_kernel", (), "early_kernel: takes 1 arguments, got 0"),
        ("early_kernel", (1,), "early_kernel: takes 1 bytes as argument 0, got 8"),
    ],
)
def test_what_hardware_leaves_undefined_is_an_error(run, kernel, arguments, message):
    with pytest.raises(RuntimeError, match=message):
        run(kernel, 2, 64, *arguments)
    run("early_kernel", 2, 64, False)
