// The interface between host code and kernels: plain pointers and sizes. The kernels (cuda/gram.cuh) are compiled twice: by nvcc
// in cuda/launch.cu, and, for tests on a CPU, as an emulation thread by thread in emulation/launch.cpp.
#pragma once

#include <cstdint>
#include <tuple>

namespace bird {

constexpr int MAX_ROWS = 512;     // a block holds all rows of CHUNK features in shared memory
constexpr int MAX_PAIRS = 32;     // in common launches: older toolkits take 4 KB of arguments
constexpr int CHUNK = 32;         // the features that a block holds at a time
constexpr int OUT_ROWS = 16;      // the rows of a gradient that a block computes
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
  int split;              // the first of the splits of this side, numbered over all sides
  int chunk;              // the first of its chunks, likewise: where its locations are
};

inline int64_t chunks_of(const Features& features) { return (features.width + CHUNK - 1) / CHUNK; }

struct Shape {
  int tile;    // rows and columns of a Gram tile: 64 or 128
  int pairs;   // upper tiles of one Gram matrix
  int padded;  // rows, rounded up to whole tiles
};

// Pairs of one number of rows, one mask and one estimator.
struct Forward {
  Features sides[2 * MAX_PAIRS];  // x and y of each pair
  int count;             // the number of these sides
  int splits;            // of all sides: the blocks over which their columns are divided
  int n;                 // rows
  Statistic statistic;   // what the values are
  bool unbiased;         // the estimator
  Shape shape;           // from plan_forward
  const bool* mask;      // [n], or null: all rows count
  float* partials;       // [splits, upper tiles, tile, tile]
  double* slots;         // [pairs, 2, MAX_REDUCE_BLOCKS, MOMENTS]: each block's sums, in the second launch and in the third
  int* counters;         // [pairs]: blocks that have stored their sums; set to 0 by the first launch
  float* locations;      // out, [chunks, 2, CHUNK]: what was subtracted from each feature, first and then
  float* grams;          // out, [sides, n, n]; unbiased: not centred, and diagonals hold the row sums divided by n - 2
  double* coefficients;  // out, [pairs, COEFFICIENTS]
  float* values;         // out, [pairs]
};

// The tiles of the forward: upper tiles of each side, each split over features until the blocks fill the device.
inline void plan_forward(Forward& call, int multiprocessors) {
  int64_t chunks = 0;
  for (int side = 0; side < call.count; ++side) {
    call.sides[side].chunk = static_cast<int>(chunks);
    chunks += chunks_of(call.sides[side]);
  }
  // Three tiles of 64 fill more of the device than one of 128, which reads the features once instead of three times.
  const bool wide = chunks > 8 * multiprocessors;
  Shape& shape = call.shape;
  shape.tile = call.n > 128 || (call.n > 64 && wide) ? 128 : 64;
  const int tiles = (call.n + shape.tile - 1) / shape.tile;
  shape.pairs = tiles * (tiles + 1) / 2;
  shape.padded = tiles * shape.tile;
  call.splits = 0;
  for (int side = 0; side < call.count; ++side) {
    const int64_t own = chunks_of(call.sides[side]), share = 2 * multiprocessors / shape.pairs * own / chunks;
    call.sides[side].split = call.splits;
    call.splits += static_cast<int>(share < 1 ? 1 : share);
  }
}

struct Backward {
  struct Side {
    Features own;  // whose gradient is computed
    void* out;     // out, [n, width], dense: the gradient
    int side;      // its number in the forward
  };
  Side sides[2 * MAX_PAIRS];   // those whose gradients are wanted
  int count;                   // the number of these sides
  int n;                       // rows
  bool unbiased;               // the estimator
  const bool* mask;            // [n], or null: all rows count
  const float* locations;      // of the forward
  const float* grams;          // of the forward
  const double* coefficients;  // of the forward
  const float* grads;          // upstream, [pairs]
};
static_assert(sizeof(Forward) <= 4096 && sizeof(Backward) <= 4096, "arguments of a kernel");

// The blocks of the backward, (x, y, z): one for each chunk of features, tile of rows and side, or for several chunks where there are more
// of them than the device runs at a time, because a block forms its rows of M once.
inline std::tuple<int64_t, int64_t, int64_t> plan_backward(const Backward& call, int multiprocessors) {
  int64_t chunks = 0, most = 0;
  for (int side = 0; side < call.count; ++side) {
    const int64_t own = chunks_of(call.sides[side].own);
    chunks += own;
    most = own > most ? own : most;
  }
  const int64_t tiles = (call.n + OUT_ROWS - 1) / OUT_ROWS, slots = 2 * multiprocessors;
  const int64_t each = (chunks * tiles + slots - 1) / slots;
  return {(most + each - 1) / each, tiles, call.count};
}

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
