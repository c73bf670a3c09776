// The kernels of gram.cuh compiled for the emulation on a CPU.
#include "cuda.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <mutex>

#define BIRD_TARGET emulation

#include "../cuda/gram.cuh"

namespace bird::emulation {

// Only one launch runs at a time, because the state of a block is in global variables.
static std::mutex one_at_a_time;
static std::atomic<int64_t> launched{0};

int64_t launches() { return launched; }

template <class Call>
void launch(void (*kernel)(Call), dim3 grid, size_t shared, void*, const std::remove_const_t<Call>& call) {
  const std::lock_guard<std::mutex> alone(one_at_a_time);
  ++launched;
  const size_t bytes = (shared + 127) / 128 * 128;
  const std::unique_ptr<float, decltype(&std::free)> memory(static_cast<float*>(std::aligned_alloc(128, bytes + 128)), &std::free);
  emulated::dynamic_shared = memory.get();
  emulated::Block block(THREADS);
  gridDim = grid;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        std::fill_n(memory.get(), bytes / sizeof(float), std::numeric_limits<float>::quiet_NaN());
        block.run([&] { kernel(call); });
      }
}

}  // namespace bird::emulation
