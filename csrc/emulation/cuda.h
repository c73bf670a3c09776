// The part of CUDA that gram.cuh uses, emulated on a CPU, to test values without a GPU, as Triton's interpreter does for Triton.
//
// A block's threads are fibres that run in turn, each up to its next barrier; blocks run one after the other. The order of threads
// is reversed in every other round, and dynamic shared memory starts as NaN, so that a missing barrier or initialisation changes
// values. It cannot show races within a warp, memory order between blocks, or speed.
#pragma once

#undef _FORTIFY_SOURCE  // its longjmp aborts on a jump to another stack
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <limits>
#include <memory>
#include <stdexcept>
#include <type_traits>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __shared__ static
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define BIRD_DYNAMIC_SHARED(name) float* const name = ::emulated::dynamic_shared

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline dim3 threadIdx, blockIdx, gridDim;

namespace emulated {

inline float* dynamic_shared;

class Block {
  static constexpr size_t STACK = 64 * 1024;
  struct Fibre {
    ucontext_t start;
    jmp_buf resume;
    std::unique_ptr<char[]> stack = std::make_unique_for_overwrite<char[]>(STACK);
    bool started, done;
  };
  jmp_buf scheduler_;
  std::vector<Fibre> fibres_;
  std::function<void()> body_;
  std::exception_ptr error_;
  unsigned current_ = 0;
  inline static Block* running_ = nullptr;

  static void enter() {
    Block& block = *running_;
    try {
      block.body_();
    } catch (...) {
      block.error_ = std::current_exception();
    }
    block.fibres_[block.current_].done = true;
    _longjmp(block.scheduler_, 1);
  }

  // ucontext only starts the fibres; setjmp and longjmp switch between them, since swapcontext makes a system call each time.
  void resume(Fibre& fibre) {
    if (_setjmp(scheduler_)) return;
    if (fibre.started) _longjmp(fibre.resume, 1);
    fibre.started = true;
    setcontext(&fibre.start);
  }

 public:
  std::vector<const void*> offered;  // by each thread, for its warp: a value on its stack

  explicit Block(unsigned threads) : fibres_(threads), offered(threads) {}

  static Block& running() { return *running_; }

  void barrier() {
    if (!_setjmp(fibres_[current_].resume)) _longjmp(scheduler_, 1);
  }

  void run(std::function<void()> body) {
    running_ = this;
    body_ = std::move(body);
    for (Fibre& fibre : fibres_) {
      getcontext(&fibre.start);
      fibre.start.uc_stack.ss_sp = fibre.stack.get();
      fibre.start.uc_stack.ss_size = STACK;
      makecontext(&fibre.start, enter, 0);
      fibre.started = fibre.done = false;
    }
    const unsigned threads = fibres_.size();
    for (unsigned round = 0, finished = 0; finished < threads; ++round) {
      if (finished > 0) throw std::logic_error("some threads of a block end while others wait at a barrier");
      for (unsigned step = 0; step < threads; ++step) {
        current_ = round % 2 ? threads - 1 - step : step;
        threadIdx = dim3(current_);
        resume(fibres_[current_]);
        if (error_) std::rethrow_exception(error_);
        finished += fibres_[current_].done;
      }
    }
  }
};

// What `use` returns for the values that the threads of this thread's warp offer: it is given a function from lane to value. This is
// a barrier, so all threads of a block must call it, not a single warp.
template <class V, class Use>
auto with_warp(const V& own, Use use) {
  Block& block = Block::running();
  const unsigned first = threadIdx.x / 32 * 32;
  block.offered[threadIdx.x] = &own;
  block.barrier();
  const auto result = use([&](unsigned lane) -> const V& { return *static_cast<const V*>(block.offered[first + lane]); });
  block.barrier();
  return result;
}

}  // namespace emulated

inline void __syncthreads() { emulated::Block::running().barrier(); }

inline unsigned __ballot_sync(unsigned, bool vote) {
  return emulated::with_warp(vote, [](auto of) {
    unsigned votes = 0;
    for (unsigned lane = 0; lane < 32; ++lane) votes |= (of(lane) ? 1u : 0u) << lane;
    return votes;
  });
}

template <class V>
V __shfl_xor_sync(unsigned, V v, int bits) {
  const unsigned other = threadIdx.x % 32 ^ bits;
  return emulated::with_warp(v, [&](auto of) { return of(other); });
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline void __threadfence() {}
inline int atomicAdd(int* address, int v) { return (*address += v) - v; }
inline double __ldcg(const double* address) { return *address; }

// The matrix units. Every lane holds its own part of a fragment, as the PTX ISA says for mma.m16n8k8 with .tf32 and for ldmatrix, so
// a kernel that takes another layout computes other values here, too.
namespace bird::emulation {

inline float to_tf32(float v) {
  if (!std::isfinite(v)) return v;
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof v);
  bits = (bits + 0x1000u) & ~0x1fffu;  // to nearest, ties away from zero
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

inline void load_matrices(float (&to)[4], const float* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16) throw std::logic_error("ldmatrix needs rows that are aligned to 16 bytes");
  const unsigned lane = threadIdx.x % 32;
  const auto loaded = emulated::with_warp(row, [&](auto of) {
    std::array<float, 4> found;
    for (unsigned matrix = 0; matrix < 4; ++matrix) found[matrix] = of(8 * matrix + lane / 4)[lane % 4];
    return found;
  });
  std::copy(loaded.begin(), loaded.end(), to);
}

inline void multiply(float (&c)[4], const float (&a)[4], const float* b) {
  const std::array<float, 6> own = {a[0], a[1], a[2], a[3], b[0], b[1]};
  for (float v : own)
    if (std::isfinite(v) && v != to_tf32(v)) throw std::logic_error("an operand of the matrix units is not rounded to tf32");
  const unsigned group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
  const auto sums = emulated::with_warp(own, [&](auto of) {
    std::array<float, 4> found = {c[0], c[1], c[2], c[3]};
    for (unsigned i = 0; i < 4; ++i)  // row group, or group + 8, and column 2 member, or the next, of C
      for (unsigned k = 0; k < 8; ++k)
        found[i] += of(4 * group + k % 4)[k / 4 * 2 + i / 2] * of(4 * (2 * member + i % 2) + k % 4)[4 + k / 4];
    return found;
  });
  std::copy(sums.begin(), sums.end(), c);
}

}  // namespace bird::emulation
