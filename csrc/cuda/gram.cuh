// Centred Gram matrices, their moments and the gradient, for up to 512 rows: three launches in all.
//
//   partial_grams   one block: all rows of some features, centred in shared memory, times themselves: a partial tile of K or L
//   reduce_grams    K and L from the partial tiles, the eight moments in fp64, value and coefficients in the last block
//   gradient        dX = (2 alpha L + 4 gamma K) X, the features centred again, the upstream gradient folded in
//
// The including file provides <cuda_runtime.h> and <mma.h>, or emulation/cuda.h, and defines BIRD_TARGET, the namespace of what
// is made here, and launch(kernel, grid, bytes of shared memory, stream, call).
#pragma once

#include <type_traits>

#include "tile.cuh"

namespace bird::BIRD_TARGET {

template <class Call>
void launch(void (*kernel)(Call), dim3 grid, size_t shared, void* stream, const std::remove_const_t<Call>& call);

constexpr int OUT_ROWS = 64;  // rows of the gradient that a block computes at a time

// Row and column of the upper tile number `pair`, row by row.
__device__ inline void locate(int pair, int tiles, int& row, int& column) {
  for (row = 0; pair >= tiles - row; ++row) pair -= tiles - row;
  column = row + pair;
}

// Grid: (upper tiles, splits of x, then of y).
template <class T, int TILE, bool EXACT>
__global__ void __launch_bounds__(THREADS, 2) partial_grams(const Forward call) {
  BIRD_DYNAMIC_SHARED(slice);  // [padded][PITCH]
  __shared__ float sums[WARPS * WARP];
  if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) *call.counter = 0;
  const bool second = static_cast<int>(blockIdx.y) >= call.x.splits;
  const Features& features = second ? call.y : call.x;
  const int64_t split = second ? blockIdx.y - call.x.splits : blockIdx.y;
  const Rows rows = count_rows(call.mask, call.n);
  int row, column;
  locate(blockIdx.x, call.shape.padded / TILE, row, column);

  Product<TILE, TILE, true, EXACT> product;
  const int64_t chunks = (features.width + CHUNK - 1) / CHUNK;
  const int64_t end = chunks * (split + 1) / features.splits;
  for (int64_t chunk = chunks * split / features.splits; chunk < end; ++chunk) {
    load_centred<T, !EXACT>(slice, sums, features, chunk * CHUNK, rows, call.shape.padded);
    product.add(slice + row * TILE * PITCH, slice + column * TILE * PITCH);
    __syncthreads();
  }
  product.store(call.partials + (static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x) * TILE * TILE, TILE);
}

// The sum over a warp, in lane 0.
__device__ inline double warp_sum(double v) {
  for (int distance = WARP / 2; distance > 0; distance /= 2) v += __shfl_down_sync(0xffffffffu, v, distance);
  return v;
}

struct Combined {
  double value, d_kl, d_kk, d_ll;
};

// HSIC of one side with itself, made safe to divide by. "Without variance" is not above 64 eps times the sum of its terms.
__device__ inline bool self_hsic(double product, double rows, double total, double alpha, double beta, double& value) {
  const double constant = beta * total * total;
  value = product + alpha * rows + constant;
  const bool dead = value <= 64.0 * 1.1920928955078125e-07 * (product + rows + constant);  // false for NaN
  if (dead) value = 1.0;
  return dead;
}

// estimators.combine of linear moments; a test holds the two equal.
__device__ inline Combined combine(const double* m, double n, Statistic statistic, bool unbiased) {
  const bool enough = n >= (unbiased ? 4.0 : 2.0);
  if (!enough) n = 4.0;
  const double valid = enough ? 1.0 : nan("");
  const double alpha = unbiased ? -2.0 / (n - 2.0) : -2.0 / n;
  const double beta = unbiased ? 1.0 / ((n - 1.0) * (n - 2.0)) : 1.0 / (n * n);
  const double norm = unbiased ? n * (n - 3.0) : (n - 1.0) * (n - 1.0);
  const double kl = m[0] + alpha * m[3] + beta * m[6] * m[7];
  if (statistic == Statistic::hsic) return {valid * kl / norm, valid / norm, 0.0 * kl, 0.0 * kl};
  double kk, ll;
  const bool dead_k = self_hsic(m[1], m[4], m[6], alpha, beta, kk);
  const bool dead_l = self_hsic(m[2], m[5], m[7], alpha, beta, ll);
  const double d_kl = dead_k || dead_l ? 0.0 * valid : valid / (sqrt(kk) * sqrt(ll));
  const double cka = kl * d_kl, d_kk = -0.5 * cka / kk, d_ll = -0.5 * cka / ll;
  if (statistic == Statistic::cka) return {cka, d_kl, d_kk, d_ll};
  return {1.0 - cka, -d_kl, -d_kk, -d_ll};
}

// Grid: up to MAX_REDUCE_BLOCKS blocks that share the entries of the upper tiles.
template <int TILE>
__global__ void __launch_bounds__(THREADS, 2) reduce_grams(const Forward call) {
  __shared__ double sums[MOMENTS][WARPS];
  __shared__ bool last;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, n = call.n, pairs = call.shape.pairs;
  const int64_t stride = static_cast<int64_t>(pairs) * TILE * TILE;
  double moments[MOMENTS] = {};
  for (int entry = blockIdx.x * THREADS + threadIdx.x; entry < stride; entry += gridDim.x * THREADS) {
    int row, column;
    locate(entry / (TILE * TILE), call.shape.padded / TILE, row, column);
    const bool mirrored = row != column;
    const int i = row * TILE + entry % (TILE * TILE) / TILE, j = column * TILE + entry % TILE;
    if (i >= n || j >= n) continue;
    double sum_k = 0.0, sum_l = 0.0;
    const float* partial = call.partials + entry;
    for (int split = 0; split < call.x.splits; ++split, partial += stride) sum_k += *partial;
    for (int split = 0; split < call.y.splits; ++split, partial += stride) sum_l += *partial;
    const float k = static_cast<float>(sum_k), l = static_cast<float>(sum_l);
    call.k[i * n + j] = k;
    call.l[i * n + j] = l;
    if (mirrored) {
      call.k[j * n + i] = k;
      call.l[j * n + i] = l;
    }
    const double kl = static_cast<double>(k) * l, kk = static_cast<double>(k) * k, ll = static_cast<double>(l) * l;
    if (call.unbiased && i == j) {
      moments[3] += kl, moments[4] += kk, moments[5] += ll, moments[6] += k, moments[7] += l;
    } else {
      const double weight = mirrored ? 2.0 : 1.0;
      moments[0] += weight * kl, moments[1] += weight * kk, moments[2] += weight * ll;
    }
  }
  for (int m = 0; m < MOMENTS; ++m) {
    const double sum = warp_sum(moments[m]);
    if (lane == 0) sums[m][warp] = sum;
  }
  __syncthreads();
  if (threadIdx.x < MOMENTS) {
    double total = 0.0;
    for (int w = 0; w < WARPS; ++w) total += sums[threadIdx.x][w];
    call.slots[blockIdx.x * MOMENTS + threadIdx.x] = total;
  }
  __syncthreads();
  // The thread that arrives speaks for its block: it releases what the others stored before the barrier, and acquires
  // what other blocks released for those behind the next one.
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(call.counter, 1) == static_cast<int>(gridDim.x) - 1;
    __threadfence();
  }
  __syncthreads();
  if (!last) return;

  const Rows rows = count_rows(call.mask, n);
  static_assert(MOMENTS == WARPS, "a warp for each moment");
  double total = 0.0;
  for (int block = lane; block < static_cast<int>(gridDim.x); block += WARP) total += __ldcg(call.slots + block * MOMENTS + warp);
  total = warp_sum(total);
  if (lane == 0) sums[0][warp] = total;
  __syncthreads();
  if (threadIdx.x > 0) return;
  const double* m = sums[0];
  const Combined result = combine(m, rows.count, call.statistic, call.unbiased);
  *call.value = static_cast<float>(result.value);
  const double least = call.unbiased ? 4.0 : 2.0;  // with fewer rows the derivatives are NaN already
  const double coefficients[COEFFICIENTS] = {
      result.d_kl, result.d_kk, result.d_ll, m[0], m[1], m[2], m[6], m[7], 1.0, 1.0, rows.count < least ? least : rows.count};
  for (int c = 0; c < COEFFICIENTS; ++c) call.coefficients[c] = coefficients[c];
}

// 2^-e with 2^e > |K| in the Frobenius norm: brings every entry of a Gram matrix below 1.
__device__ inline double inverse_scale(double product, double diagonal) {
  const double norm = sqrt(product + diagonal);
  return norm > 0.0 && norm < 1e300 ? ldexp(1.0, -ilogb(norm) - 1) : 1.0;
}

// The matrix of which the gradient is a product with the centred features: M = 2 alpha L + 4 gamma K, biased.
//
// Unbiased, M's diagonal D = 2 alpha lambda + 4 gamma kappa makes place for w = -2 D / (n-2) + (2 alpha sum(lambda) + 4 gamma
// sum(kappa)) / ((n-1)(n-2)). The gradient's columns are then centred, which is centring the columns of M: their sums are w - D,
// because those of the Gram matrices of centred features vanish.
struct Mixture {
  const float *own, *other;  // [n, n]
  int n;
  bool unbiased;
  float scale_own, scale_other;    // powers of two: at scales of 1e-12 the coefficients alone would leave fp32
  float d_own, d_other, constant;  // of the scaled matrices
  float weight, rows;

  __device__ float operator()(int i, int k) const {
    const float m = fmaf(other[i * n + k] * scale_other, d_other, own[i * n + k] * scale_own * d_own);
    if (!unbiased) return m;
    const float diagonal = fmaf(other[k * n + k] * scale_other, d_other, own[k * n + k] * scale_own * d_own);
    const float w = fmaf(diagonal, weight, constant);
    return (i == k ? w : m) - (w - diagonal) / rows;
  }
};

__device__ inline Mixture mixture(const Backward& call, const Backward::Side& side) {
  const double* c = call.coefficients;  // d_kl, d_kk, d_ll, kl, kk, ll, sum_k, sum_l, -, -, n
  const double own_sum = c[side.second ? 7 : 6], other_sum = c[side.second ? 6 : 7], n = c[10], g = *call.grad;
  // Row norms: |x_i|^2 <= their sum, which bounds the diagonal that kk and ll leave out.
  const double scale_own = inverse_scale(c[side.second ? 5 : 4], own_sum * own_sum);
  const double scale_other = inverse_scale(c[side.second ? 4 : 5], other_sum * other_sum);
  const double d_own = 4.0 * c[side.second ? 2 : 1] * g / scale_own, d_other = 2.0 * c[0] * g / scale_other;
  Mixture m{side.own_gram, side.other_gram, call.n, call.unbiased};
  m.scale_own = static_cast<float>(scale_own), m.scale_other = static_cast<float>(scale_other);
  m.d_own = static_cast<float>(d_own), m.d_other = static_cast<float>(d_other);
  m.rows = static_cast<float>(n);
  if (call.unbiased) {
    m.weight = static_cast<float>(-2.0 / (n - 2.0));
    m.constant = static_cast<float>(
        (d_other * scale_other * other_sum + d_own * scale_own * own_sum) / ((n - 1.0) * (n - 2.0)));
  }
  return m;
}

// Grid: (chunks of features, blocks that share the rows, sides).
template <class T, bool EXACT>
__global__ void __launch_bounds__(THREADS, 2) gradient(const Backward call) {
  BIRD_DYNAMIC_SHARED(slice);  // [n up to a whole CHUNK][PITCH], then [OUT_ROWS][PITCH]
  __shared__ float sums[WARPS * WARP];
  const Backward::Side& side = call.sides[blockIdx.z];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * CHUNK, width = side.own.width;
  if (first >= width) return;
  const int n = call.n, padded = (n + CHUNK - 1) / CHUNK * CHUNK;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const Rows rows = count_rows(call.mask, n);
  const Mixture m = mixture(call, side);
  load_centred<T, !EXACT>(slice, sums, side.own, first, rows, padded);
  float* const tile = slice + padded * PITCH;
  for (int row = blockIdx.y * OUT_ROWS; row < n; row += gridDim.y * OUT_ROWS) {
    Product<OUT_ROWS, CHUNK, false, EXACT> product;
    for (int start = 0; start < padded; start += CHUNK) {
      for (int i = warp; i < OUT_ROWS; i += WARPS) {
        const int k = start + lane;
        const float v = row + i < n && k < n ? m(row + i, k) : 0.f;
        tile[i * PITCH + lane] = EXACT ? v : nvcuda::wmma::__float_to_tf32(v);
      }
      __syncthreads();
      product.add(tile, slice + start * PITCH);
      __syncthreads();
    }
    product.store(tile, PITCH);
    __syncthreads();
    for (int i = warp; i < OUT_ROWS && row + i < n; i += WARPS)
      if (first + lane < width)
        static_cast<T*>(side.out)[(row + i) * width + first + lane] = static_cast<T>(rows[row + i] ? tile[i * PITCH + lane] : 0.f);
    __syncthreads();
  }
}

// ------------------------------------------------------------------------------------------------ launches

template <class T, int TILE, bool EXACT>
void launch_forward(const Forward& call, void* stream) {
  const dim3 grid(call.shape.pairs, call.x.splits + call.y.splits);
  launch(partial_grams<T, TILE, EXACT>, grid, call.shape.padded * PITCH * sizeof(float), stream, call);
  const int blocks = call.shape.pairs * TILE * TILE / THREADS;
  launch(reduce_grams<TILE>, dim3(blocks < MAX_REDUCE_BLOCKS ? blocks : MAX_REDUCE_BLOCKS), 0, stream, call);
}

template <class T, bool EXACT>
void launch_backward(const Backward& call, int multiprocessors, void* stream) {
  int64_t chunks = 0;
  for (int side = 0; side < call.count; ++side) {
    const int64_t own = (call.sides[side].own.width + CHUNK - 1) / CHUNK;
    chunks = own > chunks ? own : chunks;
  }
  // Blocks that share the rows fill the device where features are few; where they are many each one centres only once.
  const int row_blocks = (call.n + OUT_ROWS - 1) / OUT_ROWS;
  const dim3 grid(static_cast<unsigned>(chunks), chunks * call.count < 2 * multiprocessors ? row_blocks : 1, call.count);
  const int rows = (call.n + CHUNK - 1) / CHUNK * CHUNK + OUT_ROWS;
  launch(gradient<T, EXACT>, grid, rows * PITCH * sizeof(float), stream, call);
}

template <class T, bool EXACT>
void forward_of(const Forward& call, void* stream) {
  (call.shape.tile == 64 ? launch_forward<T, 64, EXACT> : launch_forward<T, 128, EXACT>)(call, stream);
}

// Half-precision features are always multiplied as tf32, see kernels.h.
void forward(Type type, bool exact, const Forward& call, void* stream) {
  if (type == Type::f16) return forward_of<c10::Half, false>(call, stream);
  if (type == Type::bf16) return forward_of<c10::BFloat16, false>(call, stream);
  (exact ? forward_of<float, true> : forward_of<float, false>)(call, stream);
}

void backward(Type type, bool exact, const Backward& call, int multiprocessors, void* stream) {
  if (type == Type::f16) return launch_backward<c10::Half, false>(call, multiprocessors, stream);
  if (type == Type::bf16) return launch_backward<c10::BFloat16, false>(call, multiprocessors, stream);
  (exact ? launch_backward<float, true> : launch_backward<float, false>)(call, multiprocessors, stream);
}

}  // namespace bird::BIRD_TARGET
