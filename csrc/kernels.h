// What the host code asks of the kernels: plain pointers and sizes. Implemented twice from the same source (cuda/gram.cuh):
// by nvcc in cuda/launch.cu, and thread by thread on a CPU, for tests, in emulation/launch.cpp.
#pragma once

#include <cstdint>

namespace bird {

constexpr int MAX_ROWS = 512;   // all rows of a slice of features stand in shared memory
constexpr int CHUNK = 32;       // features of a slice that are there at a time
constexpr int COEFFICIENTS = 11;  // moments.Coefficients; sum_k and sum_l are the totals of the hollow K and L (unbiased)
constexpr int MOMENTS = 8;        // that a block adds up
constexpr int MAX_REDUCE_BLOCKS = 128;

enum class Type { f32, f16, bf16 };
enum class Statistic : int { cka_loss, cka, hsic };

// Features [n, width] of any strides (in elements); `splits` blocks share the width.
struct Features {
  const void* data;
  int64_t row_stride, column_stride, width;
  int splits;
};

struct Shape {
  int tile;    // rows and columns of a Gram tile: 64 or 128
  int pairs;   // upper tiles of one Gram matrix
  int padded;  // rows, up to a whole tile
};

// Upper tiles of K and L, split over features until the device is busy.
inline Shape plan_forward(int n, Features& x, Features& y, int multiprocessors) {
  const int64_t chunks_x = (x.width + CHUNK - 1) / CHUNK, chunks_y = (y.width + CHUNK - 1) / CHUNK;
  // Three small tiles fill more of the device than one large one, which reads the features once instead of three times.
  const bool wide = chunks_x + chunks_y > 8 * multiprocessors;
  Shape shape;
  shape.tile = n > 128 || (n > 64 && wide) ? 128 : 64;
  const int tiles = (n + shape.tile - 1) / shape.tile;
  shape.pairs = tiles * (tiles + 1) / 2;
  shape.padded = tiles * shape.tile;
  const int64_t blocks = 2 * multiprocessors / shape.pairs;
  const auto share = [&](int64_t own, int64_t other) {
    const int64_t splits = blocks * own / (own + other);
    return static_cast<int>(splits < 1 ? 1 : splits > own ? own : splits);
  };
  x.splits = share(chunks_x, chunks_y);
  y.splits = share(chunks_y, chunks_x);
  return shape;
}

struct Forward {
  Features x, y;
  Shape shape;
  const bool* mask;  // [n] or null
  int n;
  Statistic statistic;
  bool unbiased;
  float* partials;  // [x.splits + y.splits, pairs, tile, tile]
  double* slots;    // [2, MAX_REDUCE_BLOCKS, MOMENTS]: of the second launch and of the third
  int* counter;     // of blocks that have arrived; cleared by the first launch
  float* k;         // [n, n]; unbiased, not centred, and on the diagonal the row sums over n - 2
  float* l;
  double* coefficients;  // [COEFFICIENTS]
  float* value;
};

struct Backward {
  struct Side {
    Features own;
    const float *own_gram, *other_gram;  // [n, n], as the forward leaves them
    void* out;                           // [n, width], dense
    bool second;                         // the side is y: coefficients of ll instead of kk
  } sides[2];
  int count;  // of sides
  const bool* mask;
  int n;
  bool unbiased;
  const double* coefficients;
  const float* grad;  // upstream, 0-d
};

// exact: fp32 products on the ordinary cores; otherwise tf32 on the matrix units. tf32 has fp16's mantissa, a longer one than
// bf16's and the range of fp32, so it serves all three types, and half features need no scaling.
namespace cuda {
void forward(Type type, bool exact, const Forward& call, void* stream);   // two launches, unbiased three
void backward(Type type, bool exact, const Backward& call, int multiprocessors, void* stream);  // one
int multiprocessors(int device);
}  // namespace cuda
namespace emulation {
void forward(Type type, bool exact, const Forward& call, void* stream);
void backward(Type type, bool exact, const Backward& call, int multiprocessors, void* stream);
int64_t launches();  // so far, of all threads
}  // namespace emulation

}  // namespace bird
