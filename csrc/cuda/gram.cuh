// Centred Gram matrices, their moments and the gradient, for up to 512 rows: three launches in all, unbiased four.
//
//   partial_grams   a block centres all rows of some features in shared memory and multiplies them into a partial tile of K or L
//   reduce_grams    sums partial tiles into K and L, and takes their moments in fp64; biased, the last block stores the results
//   sum_rows        unbiased only: the row sums of K and L and their moments; the last block stores value and coefficients
//   gradient        dX = (2 alpha L + 4 gamma K) X: centres the features again, applies the upstream gradient
//
// The unbiased HSIC does not depend on the features' origin, but its rounding does: if the mean is the origin, one row that is
// 10^4 times as large as the others enters all of them. So the origin is a robust location, K and L get zero diagonals before
// anything is summed, and the rest is U-centred: off the diagonal, Kc_ij = K_ij - (r_i + r_j) / (n-2) + sum(r) / ((n-1)(n-2))
// with the row sums r. The moments of Kc and Lc follow from those of K and L and of the row sums, all in fp64 (`combine`); the
// gradient centres the entries as it reads them.
//
// The including file provides <cuda_runtime.h> and <mma.h>, or emulation/cuda.h; it defines the namespace BIRD_TARGET and
// launch(kernel, grid, bytes of shared memory, stream, call).
#pragma once

#include <type_traits>

#include "tile.cuh"

namespace bird::BIRD_TARGET {

template <class Call>
void launch(void (*kernel)(Call), dim3 grid, size_t shared, void* stream, const std::remove_const_t<Call>& call);

constexpr int OUT_ROWS = 64;  // rows of the gradient that a block computes at a time

// Row and column of upper tile number `pair`; they are numbered row by row.
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
  const Rows rows = order_rows(call.mask, call.n);
  int row, column;
  locate(blockIdx.x, call.shape.padded / TILE, row, column);

  Product<TILE, TILE, true, EXACT> product;
  const int64_t chunks = (features.width + CHUNK - 1) / CHUNK;
  const int64_t end = chunks * (split + 1) / features.splits;
  for (int64_t chunk = chunks * split / features.splits; chunk < end; ++chunk) {
    load_centred<T, !EXACT>(slice, sums, features, chunk * CHUNK, rows, call.shape.padded, call.unbiased);
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

// The largest self-HSIC that may be rounding alone, from the sum of the squared row norms and the sum of their squares: the error
// of K_ij is eps |x_i| |x_j| off the diagonal, and 64 eps includes what centring adds.
__device__ inline double noise(double sum, double squares) {
  constexpr double ROUNDING = 64.0 * 1.1920928955078125e-07;
  return ROUNDING * ROUNDING * (sum * sum - squares);
}

// moments.combine of m: <K,L>, <K,K>, <L,L>, the same of the row sums, and the totals of K and of L. A side counts as without
// variance if its self-HSIC does not exceed its noise. A test compares this function with Python's.
__device__ inline Combined combine(const double* m, double noise_k, double noise_l, double n, Statistic statistic, bool unbiased) {
  const bool enough = n >= (unbiased ? 4.0 : 2.0);
  if (!enough) n = 4.0;
  const double valid = enough ? 1.0 : nan("");
  const double alpha = unbiased ? -2.0 / (n - 2.0) : -2.0 / n;
  const double beta = unbiased ? 1.0 / ((n - 1.0) * (n - 2.0)) : 1.0 / (n * n);
  const double norm = unbiased ? n * (n - 3.0) : (n - 1.0) * (n - 1.0);
  const double kl = m[0] + alpha * m[3] + beta * m[6] * m[7];
  if (statistic == Statistic::hsic) return {valid * kl / norm, valid / norm, 0.0 * kl, 0.0 * kl};
  double kk = m[1] + alpha * m[4] + beta * m[6] * m[6], ll = m[2] + alpha * m[5] + beta * m[7] * m[7];
  const bool dead_k = kk <= noise_k, dead_l = ll <= noise_l;  // false for NaN
  if (dead_k) kk = 1.0;
  if (dead_l) ll = 1.0;
  const double d_kl = dead_k || dead_l ? 0.0 * valid : valid / (sqrt(kk) * sqrt(ll));
  const double cka = kl * d_kl, d_kk = -0.5 * cka / kk, d_ll = -0.5 * cka / ll;
  if (statistic == Statistic::cka) return {cka, d_kl, d_kk, d_ll};
  return {1.0 - cka, -d_kl, -d_kk, -d_ll};
}

// Stores the sums of `moments` over the threads of a block in the block's own slots.
__device__ inline void deposit(const double (&moments)[MOMENTS], double* slots) {
  __shared__ double sums[MOMENTS][WARPS];
  for (int m = 0; m < MOMENTS; ++m) {
    const double sum = warp_sum(moments[m]);
    if (threadIdx.x % WARP == 0) sums[m][threadIdx.x / WARP] = sum;
  }
  __syncthreads();
  if (threadIdx.x < MOMENTS) {
    double total = 0.0;
    for (int w = 0; w < WARPS; ++w) total += sums[threadIdx.x][w];
    slots[blockIdx.x * MOMENTS + threadIdx.x] = total;
  }
}

// Whether this block is the last of the grid to call it; that block sees everything the others stored before their calls.
__device__ inline bool arrives_last(int* counter) {
  __shared__ bool last;
  __syncthreads();
  // Thread 0 acts for its block: its first fence releases what all threads stored before the barrier above; its second acquires
  // what other blocks released, for the threads that pass the barrier below.
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(counter, 1) == static_cast<int>(gridDim.x) - 1;
    __threadfence();
  }
  __syncthreads();
  return last;
}

// Sums the slots of `blocks` blocks into `totals`, in shared memory, which thread 0 may read afterwards.
__device__ inline void collect(const double* slots, int blocks, double* totals) {
  static_assert(MOMENTS == WARPS, "a warp for each moment");
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  double total = 0.0;
  for (int block = lane; block < blocks; block += WARP) total += __ldcg(slots + block * MOMENTS + warp);
  total = warp_sum(total);
  if (lane == 0) totals[warp] = total;
  __syncthreads();
}

// Stores value and coefficients; m as in `combine`. Called by one thread.
__device__ inline void conclude(const Forward& call, const double* m, double noise_k, double noise_l, double n) {
  const Combined result = combine(m, noise_k, noise_l, n, call.statistic, call.unbiased);
  *call.value = static_cast<float>(result.value);
  const double least = call.unbiased ? 4.0 : 2.0;  // with fewer rows the derivatives are NaN already
  const double coefficients[COEFFICIENTS] = {
      result.d_kl, result.d_kk, result.d_ll, m[0], m[1], m[2], m[6], m[7], 1.0, 1.0, n < least ? least : n};
  for (int c = 0; c < COEFFICIENTS; ++c) call.coefficients[c] = coefficients[c];
}

// The number of blocks over which reduce_grams divides the entries of the upper tiles.
__host__ __device__ inline int reducing_blocks(const Shape& shape) {
  const int blocks = shape.pairs * shape.tile * shape.tile / THREADS;
  return blocks < MAX_REDUCE_BLOCKS ? blocks : MAX_REDUCE_BLOCKS;
}

// Grid: reducing_blocks. Unbiased, K and L are stored with zero diagonals, and moments 3 to 6 are those of what was on them, the
// squared row norms kappa and lambda: <kappa,kappa>, <lambda,lambda>, sum(kappa), sum(lambda).
template <int TILE>
__global__ void __launch_bounds__(THREADS, 2) reduce_grams(const Forward call) {
  __shared__ double totals[MOMENTS];
  const int n = call.n;
  const int64_t stride = static_cast<int64_t>(call.shape.pairs) * TILE * TILE;
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
    float k = static_cast<float>(sum_k), l = static_cast<float>(sum_l);
    if (call.unbiased && i == j) {
      moments[3] += static_cast<double>(k) * k, moments[4] += static_cast<double>(l) * l, moments[5] += k, moments[6] += l;
      k = l = 0.f;
    }
    call.k[i * n + j] = k;
    call.l[i * n + j] = l;
    if (mirrored) {
      call.k[j * n + i] = k;
      call.l[j * n + i] = l;
    }
    const double kl = static_cast<double>(k) * l, kk = static_cast<double>(k) * k, ll = static_cast<double>(l) * l;
    const double weight = mirrored ? 2.0 : 1.0;
    moments[0] += weight * kl, moments[1] += weight * kk, moments[2] += weight * ll;
  }
  deposit(moments, call.slots);
  if (call.unbiased || !arrives_last(call.counter)) return;
  const Rows rows = order_rows(call.mask, n);
  collect(call.slots, gridDim.x, totals);
  if (threadIdx.x == 0) conclude(call, totals, 0.0, 0.0, rows.count);
}

// Grid: blocks of WARPS rows, unbiased only. A warp sums a row of K and of L, and stores r_i / (n-2) on their diagonals, which were
// zero. The moments are those of the row sums r and s, <r,s>, <r,r>, <s,s>, sum(r), sum(s), at their positions in `combine`.
__global__ void __launch_bounds__(THREADS, 2) sum_rows(const Forward call) {
  __shared__ double totals[2][MOMENTS];
  const int lane = threadIdx.x % WARP, n = call.n, i = blockIdx.x * WARPS + threadIdx.x / WARP;
  const Rows rows = order_rows(call.mask, n);
  double r = 0.0, s = 0.0;
  for (int j = lane; i < n && j < n; j += WARP) {
    r += call.k[i * n + j];
    s += call.l[i * n + j];
  }
  r = warp_sum(r);
  s = warp_sum(s);
  double moments[MOMENTS] = {};
  if (i < n && lane == 0) {
    const double others = (rows.count < 4 ? 4.0 : rows.count) - 2.0;
    call.k[i * n + i] = static_cast<float>(r / others);
    call.l[i * n + i] = static_cast<float>(s / others);
    moments[3] = r * s, moments[4] = r * r, moments[5] = s * s, moments[6] = r, moments[7] = s;
  }
  double* const slots = call.slots + MAX_REDUCE_BLOCKS * MOMENTS;
  deposit(moments, slots);
  if (!arrives_last(call.counter)) return;
  collect(call.slots, reducing_blocks(call.shape), totals[0]);
  collect(slots, gridDim.x, totals[1]);
  if (threadIdx.x > 0) return;
  const double *products = totals[0], *sums = totals[1];
  const double m[MOMENTS] = {products[0], products[1], products[2], sums[3], sums[4], sums[5], sums[6], sums[7]};
  conclude(call, m, noise(products[5], products[3]), noise(products[6], products[4]), rows.count);
}

// 2^-e with 2^e > |K| in the Frobenius norm: brings every entry of a Gram matrix below 1.
__device__ inline double inverse_scale(double product) {
  const double norm = sqrt(product);
  return norm > 0.0 && norm < 1e300 ? ldexp(1.0, -ilogb(norm) - 1) : 1.0;
}

// The matrix M = 2 alpha Lc + 4 gamma Kc, whose product with the features is the gradient. Biased, K and L are centred already.
// Unbiased, they are centred here, by the row sums on their diagonals; M's rows sum to zero, so the features' origin is free.
struct Mixture {
  const float *own, *other;  // [n, n]
  int n;
  bool unbiased;
  float scale_own, scale_other;    // powers of two: for features of 1e-12 the coefficients alone exceed fp32's range
  float d_own, d_other, constant;  // for the scaled matrices

  __device__ float entry(int i, int k) const {
    return fmaf(other[i * n + k] * scale_other, d_other, own[i * n + k] * scale_own * d_own);
  }

  __device__ float operator()(int i, int k) const {
    if (!unbiased) return entry(i, k);
    return i == k ? 0.f : entry(i, k) - (entry(i, i) + entry(k, k)) + constant;
  }
};

__device__ inline Mixture mixture(const Backward& call, const Backward::Side& side) {
  const double* c = call.coefficients;  // d_kl, d_kk, d_ll, kl, kk, ll, sum_k, sum_l, -, -, n
  const double own_sum = c[side.second ? 7 : 6], other_sum = c[side.second ? 6 : 7], n = c[10], g = *call.grad;
  const double scale_own = inverse_scale(c[side.second ? 5 : 4]), scale_other = inverse_scale(c[side.second ? 4 : 5]);
  const double d_own = 4.0 * c[side.second ? 2 : 1] * g / scale_own, d_other = 2.0 * c[0] * g / scale_other;
  Mixture m{side.own_gram, side.other_gram, call.n, call.unbiased};
  m.scale_own = static_cast<float>(scale_own), m.scale_other = static_cast<float>(scale_other);
  m.d_own = static_cast<float>(d_own), m.d_other = static_cast<float>(d_other);
  if (call.unbiased)
    m.constant = static_cast<float>(
        (d_other * scale_other * other_sum + d_own * scale_own * own_sum) / ((n - 1.0) * (n - 2.0)));
  return m;
}

// Grid: (chunks of features, blocks over which the rows are divided, sides).
template <class T, bool EXACT>
__global__ void __launch_bounds__(THREADS, 2) gradient(const Backward call) {
  BIRD_DYNAMIC_SHARED(slice);  // [n, rounded up to a multiple of CHUNK][PITCH], then [OUT_ROWS][PITCH]
  __shared__ float sums[WARPS * WARP];
  const Backward::Side& side = call.sides[blockIdx.z];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * CHUNK, width = side.own.width;
  if (first >= width) return;
  const int n = call.n, padded = (n + CHUNK - 1) / CHUNK * CHUNK;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const Rows rows = order_rows(call.mask, n);
  const Mixture m = mixture(call, side);
  load_centred<T, !EXACT>(slice, sums, side.own, first, rows, padded, call.unbiased);
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
  launch(reduce_grams<TILE>, dim3(reducing_blocks(call.shape)), 0, stream, call);
  if (call.unbiased) launch(sum_rows, dim3((call.n + WARPS - 1) / WARPS), 0, stream, call);
}

template <class T, bool EXACT>
void launch_backward(const Backward& call, int multiprocessors, void* stream) {
  int64_t chunks = 0;
  for (int side = 0; side < call.count; ++side) {
    const int64_t own = (call.sides[side].own.width + CHUNK - 1) / CHUNK;
    chunks = own > chunks ? own : chunks;
  }
  // With few features the rows are divided over several blocks, to fill the device; with many, each chunk is centred only once.
  const int row_blocks = (call.n + OUT_ROWS - 1) / OUT_ROWS;
  const dim3 grid(static_cast<unsigned>(chunks), chunks * call.count < 2 * multiprocessors ? row_blocks : 1, call.count);
  const int rows = (call.n + CHUNK - 1) / CHUNK * CHUNK + OUT_ROWS;
  launch(gradient<T, EXACT>, grid, rows * PITCH * sizeof(float), stream, call);
}

template <class T, bool EXACT>
void forward_of(const Forward& call, void* stream) {
  (call.shape.tile == 64 ? launch_forward<T, 64, EXACT> : launch_forward<T, 128, EXACT>)(call, stream);
}

// Half-precision features are always multiplied as tf32 (kernels.h).
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
