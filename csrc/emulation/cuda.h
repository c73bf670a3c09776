// The part of CUDA that gram.cuh uses, emulated on a CPU, to test values without a GPU, as Triton's interpreter does for Triton.
//
// A block's threads are fibres that run in turn, each up to its next barrier; blocks run one after the other. The order of threads
// is reversed in every other round, and dynamic shared memory starts as NaN, so that a missing barrier or initialisation changes
// values. It cannot show races within a warp, memory order between blocks, or speed.
#pragma once

#undef _FORTIFY_SOURCE  // its longjmp aborts on a jump to another stack
#include <setjmp.h>
#include <ucontext.h>

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
#define BIRD_DYNAMIC_SHARED(name) float* const name = ::emulated::dynamic_shared

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct float4 {
  float x, y, z, w;
};
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
  std::vector<double> exchange;  // each thread's value in a vote or shuffle

  explicit Block(unsigned threads) : fibres_(threads), exchange(threads) {}

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

}  // namespace emulated

inline void __syncthreads() { emulated::Block::running().barrier(); }

// Here these are barriers, so all threads of a block must call them, not a single warp.
inline unsigned __ballot_sync(unsigned, bool vote) {
  emulated::Block& block = emulated::Block::running();
  block.exchange[threadIdx.x] = vote;
  block.barrier();
  unsigned votes = 0;
  for (unsigned lane = 0; lane < 32; ++lane) votes |= (block.exchange[threadIdx.x / 32 * 32 + lane] != 0.0 ? 1u : 0u) << lane;
  block.barrier();
  return votes;
}

inline double __shfl_down_sync(unsigned, double v, int distance) {
  emulated::Block& block = emulated::Block::running();
  const unsigned self = threadIdx.x;
  block.exchange[self] = v;
  block.barrier();
  const double other = self % 32 + distance < 32 ? block.exchange[self + distance] : v;
  block.barrier();
  return other;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline void __threadfence() {}
inline int atomicAdd(int* address, int v) { return (*address += v) - v; }
inline double __ldcg(const double* address) { return *address; }

// The matrix units: lane 0 holds the whole fragment, which the hardware spreads over a warp.
namespace nvcuda::wmma {

struct row_major;
struct col_major;
struct matrix_a;
struct matrix_b;
struct accumulator;
namespace precision {
struct tf32;
}
enum layout_t { mem_row_major, mem_col_major };

inline float __float_to_tf32(float v) {
  if (!std::isfinite(v)) return v;
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof v);
  bits = (bits + 0x1000u) & ~0x1fffu;  // to nearest, ties away from zero
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

template <class Use, int M, int N, int K, class T, class Layout = void>
struct fragment {
  float x[16][16];
};

inline bool leads() { return threadIdx.x % 32 == 0; }

template <class F>
void fill_fragment(F& f, float v) {
  for (auto& row : f.x)
    for (float& x : row) x = v;
}

inline float operand(float v) {
  if (std::isfinite(v) && v != __float_to_tf32(v)) throw std::logic_error("an operand of the matrix units is not rounded to tf32");
  return v;
}

template <int M, int N, int K, class T, class Layout>
void load_matrix_sync(fragment<matrix_a, M, N, K, T, Layout>& f, const float* data, int pitch) {
  if (reinterpret_cast<uintptr_t>(data) % 32) throw std::logic_error("load_matrix_sync needs 32-byte alignment");
  for (int i = 0; leads() && i < M; ++i)
    for (int k = 0; k < K; ++k) f.x[i][k] = operand(std::is_same_v<Layout, row_major> ? data[i * pitch + k] : data[k * pitch + i]);
}

template <int M, int N, int K, class T, class Layout>
void load_matrix_sync(fragment<matrix_b, M, N, K, T, Layout>& f, const float* data, int pitch) {
  if (reinterpret_cast<uintptr_t>(data) % 32) throw std::logic_error("load_matrix_sync needs 32-byte alignment");
  for (int k = 0; leads() && k < K; ++k)
    for (int j = 0; j < N; ++j) f.x[k][j] = operand(std::is_same_v<Layout, row_major> ? data[k * pitch + j] : data[j * pitch + k]);
}

template <int M, int N, int K, class A, class LayoutA, class LayoutB>
void mma_sync(fragment<accumulator, M, N, K, float>& d, const fragment<matrix_a, M, N, K, A, LayoutA>& a,
              const fragment<matrix_b, M, N, K, A, LayoutB>& b, const fragment<accumulator, M, N, K, float>& c) {
  for (int i = 0; leads() && i < M; ++i)
    for (int j = 0; j < N; ++j) {
      float sum = c.x[i][j];
      for (int k = 0; k < K; ++k) sum += a.x[i][k] * b.x[k][j];
      d.x[i][j] = sum;
    }
}

template <int M, int N, int K>
void store_matrix_sync(float* data, const fragment<accumulator, M, N, K, float>& f, int pitch, layout_t) {
  if (reinterpret_cast<uintptr_t>(data) % 32) throw std::logic_error("store_matrix_sync needs 32-byte alignment");
  for (int i = 0; leads() && i < M; ++i)
    for (int j = 0; j < N; ++j) data[i * pitch + j] = f.x[i][j];
}

}  // namespace nvcuda::wmma
