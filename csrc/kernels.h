// The interface between host code and kernels: plain pointers and sizes. The kernels (cuda/gram.cuh) are compiled twice: by nvcc
// in cuda/launch.cu, and, for tests on a CPU, as an emulation thread by thread in emulation/launch.cpp.
#pragma once

#include <cstdint>

namespace bird {

constexpr int MAX_ROWS = 512;     // a block holds all rows of CHUNK features in shared memory
constexpr int CHUNK = 32;         // the features that a block holds at a time
constexpr int COEFFICIENTS = 11;  // moments.Coefficients; unbiased, sum_k and sum_l are the totals of K and L without diagonals
constexpr int MOMENTS = 8;        // the sums that each block contributes to
constexpr int MAX_REDUCE_BLOCKS = 128;

enum class Type { f32, f16, bf16 };
enum class Statistic : int { cka_loss, cka, hsic };

// Features [n, width] with any strides, in elements.
struct Features {
  const void* data;       // the first element
  int64_t row_stride;     // between rows
  int64_t column_stride;  // between columns
  int64_t width;          // number of columns
  int splits;             // the number of blocks over which the columns are divided
};

struct Shape {
  int tile;    // rows and columns of a Gram tile: 64 or 128
  int pairs;   // upper tiles of one Gram matrix
  int padded;  // rows, rounded up to whole tiles
};

// The tiles of the forward: upper tiles of K and L, each split over features until the blocks fill the device.
inline Shape plan_forward(int n, Features& x, Features& y, int multiprocessors) {
  const int64_t chunks_x = (x.width + CHUNK - 1) / CHUNK, chunks_y = (y.width + CHUNK - 1) / CHUNK;
  // Three tiles of 64 fill more of the device than one of 128, which reads the features once instead of three times.
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
  Features x;            // the features [n, p]
  Features y;            // the features [n, q]
  Shape shape;           // from plan_forward
  const bool* mask;      // [n], or null: all rows count
  int n;                 // rows
  Statistic statistic;   // what `value` is
  bool unbiased;         // the estimator
  float* partials;       // [x.splits + y.splits, pairs, tile, tile]
  double* slots;         // [2, MAX_REDUCE_BLOCKS, MOMENTS]: each block's sums, in the second launch and in the third
  int* counter;          // of blocks that have stored their sums; set to 0 by the first launch
  float* k;              // out, [n, n]; unbiased: not centred, and the diagonal holds the row sums divided by n - 2
  float* l;              // out, the same of y
  double* coefficients;  // out, [COEFFICIENTS]
  float* value;          // out, 0-d
};

struct Backward {
  struct Side {
    Features own;             // whose gradient is computed
    const float* own_gram;    // [n, n], as the forward leaves it
    const float* other_gram;  // [n, n], of the other side
    void* out;                // out, [n, width], dense: the gradient
    bool second;              // the side is y, whose derivative is d_ll instead of d_kk
  };
  Side sides[2];               // those whose gradients are wanted
  int count;                   // the number of these sides
  const bool* mask;            // [n], or null: all rows count
  int n;                       // rows
  bool unbiased;               // the estimator
  const double* coefficients;  // [COEFFICIENTS], of the forward
  const float* grad;           // upstream, 0-d
};

// `exact`: fp32 products without matrix units; otherwise tf32 on the matrix units. tf32 has the mantissa of fp16, which is longer
// than that of bf16, and the range of fp32, so it serves all three types, and half-precision features need no scaling.
namespace cuda {
void forward(Type type, bool exact, const Forward& call, void* stream);   // two launches, unbiased three
void backward(Type type, bool exact, const Backward& call, int multiprocessors, void* stream);  // one
int multiprocessors(int device);
}  // namespace cuda
namespace emulation {
void forward(Type type, bool exact, const Forward& call, void* stream);
void backward(Type type, bool exact, const Backward& call, int multiprocessors, void* stream);
int64_t launches();  // the number of launches so far, in all threads
}  // namespace emulation

}  // namespace bird
