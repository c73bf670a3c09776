// Centred Gram matrices, their moments and the gradient, for up to 512 rows: three launches in all, unbiased four, for any number
// of pairs up to MAX_PAIRS.
//
//   partial_grams   a block centres all rows of some features in shared memory and multiplies them into a partial tile of K or L
//   reduce_grams    sums partial tiles into K and L, and takes their moments in fp64; biased, the last block stores the results
//   sum_rows        unbiased only: the row sums of K and L and their moments; the last block stores value and coefficients
//   gradient        dX = (2 alpha L + 4 gamma K) X: subtracts the same locations again, applies the upstream gradient
//
// The unbiased HSIC does not depend on the features' origin, but its rounding does: if the mean is the origin, one row that is
// 10^4 times as large as the others enters all of them. So the origin is a robust location, K and L get zero diagonals before
// anything is summed, and the rest is U-centred: off the diagonal, Kc_ij = K_ij - (r_i + r_j) / (n-2) + sum(r) / ((n-1)(n-2))
// with the row sums r. The moments of Kc and Lc follow from those of K and L and of the row sums, all in fp64 (`combine`); the
// gradient centres the entries as it reads them.
//
// The including file provides <cuda_runtime.h>, or emulation/cuda.h; the instructions of the matrix units (to_tf32, load_matrices,
// multiply); the namespace BIRD_TARGET, and launch(kernel, grid, bytes of shared memory, stream, call).
#pragma once

#include <type_traits>

#include "tile.cuh"

namespace bird::BIRD_TARGET {

template <class Call>
void launch(void (*kernel)(Call), dim3 grid, size_t shared, void* stream, const std::remove_const_t<Call>& call);

// Row and column of upper tile number `pair`; they are numbered row by row.
__device__ inline void locate(int pair, int tiles, int& row, int& column) {
  for (row = 0; pair >= tiles - row; ++row) pair -= tiles - row;
  column = row + pair;
}

// Grid: (upper tiles, splits of all sides).
template <class T, int TILE, bool EXACT>
__global__ void __launch_bounds__(THREADS, 2) partial_grams(const Forward call) {
  BIRD_DYNAMIC_SHARED(slice);  // [padded][PITCH]
  __shared__ float sums[WARPS * WARP];
  __shared__ __align__(16) float locations[2 * CHUNK];
  const int split = blockIdx.y;
  int side = 0;
  while (side + 1 < call.count && call.sides[side + 1].split <= split) ++side;
  const Features& features = call.sides[side];
  if (blockIdx.x == 0 && split == features.split && threadIdx.x == 0) call.counters[side / 2] = 0;  // of either side of a pair
  const Rows rows = order_rows(call.mask, call.n);
  int row, column;
  locate(blockIdx.x, call.shape.padded / TILE, row, column);

  Product<TILE, EXACT> product;
  const int own = split - features.split;
  const int splits = (side + 1 < call.count ? call.sides[side + 1].split : call.splits) - features.split;
  const int64_t chunks = (features.width + CHUNK - 1) / CHUNK;
  const int end = static_cast<int>(chunks * (own + 1) / splits);
  for (int chunk = static_cast<int>(chunks * own / splits); chunk < end; ++chunk) {
    load_centred<T, !EXACT>(slice, sums, locations, features, chunk, rows, call.shape.padded, call.unbiased);
    if (blockIdx.x == 0 && threadIdx.x < 2 * CHUNK)
      call.locations[static_cast<int64_t>(features.chunk + chunk) * 2 * CHUNK + threadIdx.x] = locations[threadIdx.x];
    product.add(slice + row * TILE * PITCH, slice + column * TILE * PITCH);
    __syncthreads();
  }
  product.store(call.partials + (static_cast<int64_t>(split) * gridDim.x + blockIdx.x) * TILE * TILE);
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
    const double sum = sum_over(WARP - 1, moments[m]);
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
  total = sum_over(WARP - 1, total);
  if (lane == 0) totals[warp] = total;
  __syncthreads();
}

// Stores value and coefficients; m as in `combine`. Called by one thread.
__device__ inline void conclude(const Forward& call, int pair, const double* m, double noise_k, double noise_l, double n) {
  const Combined result = combine(m, noise_k, noise_l, n, call.statistic, call.unbiased);
  call.values[pair] = static_cast<float>(result.value);
  const double least = call.unbiased ? 4.0 : 2.0;  // with fewer rows the derivatives are NaN already
  const double coefficients[COEFFICIENTS] = {
      result.d_kl, result.d_kk, result.d_ll, m[0], m[1], m[2], m[6], m[7], 1.0, 1.0, n < least ? least : n};
  for (int c = 0; c < COEFFICIENTS; ++c) call.coefficients[pair * COEFFICIENTS + c] = coefficients[c];
}

// The number of blocks over which reduce_grams divides the entries of the upper tiles.
__host__ __device__ inline int reducing_blocks(const Shape& shape) {
  const int blocks = shape.pairs * shape.tile * shape.tile / THREADS;
  return blocks < MAX_REDUCE_BLOCKS ? blocks : MAX_REDUCE_BLOCKS;
}

// The slots of a pair's blocks in the second launch, or in the third.
__device__ inline double* slots_of(const Forward& call, int pair, int launch) {
  return call.slots + (2 * pair + launch) * MAX_REDUCE_BLOCKS * MOMENTS;
}

// Grid: (reducing_blocks, pairs). Unbiased, K and L are stored with zero diagonals, and moments 3 to 6 are those of what was on
// them, the squared row norms kappa and lambda: <kappa,kappa>, <lambda,lambda>, sum(kappa), sum(lambda).
template <int TILE>
__global__ void __launch_bounds__(THREADS, 2) reduce_grams(const Forward call) {
  __shared__ double totals[MOMENTS];
  const int n = call.n, pair = blockIdx.y;
  const Features *x = call.sides + 2 * pair, *y = x + 1;
  const int last = 2 * pair + 2 < call.count ? x[2].split : call.splits;
  float *const k_out = call.grams + static_cast<int64_t>(2 * pair) * n * n, *const l_out = k_out + n * n;
  const int64_t stride = static_cast<int64_t>(call.shape.pairs) * TILE * TILE;
  double moments[MOMENTS] = {};
  for (int entry = blockIdx.x * THREADS + threadIdx.x; entry < stride; entry += gridDim.x * THREADS) {
    int row, column;
    locate(entry / (TILE * TILE), call.shape.padded / TILE, row, column);
    const bool mirrored = row != column;
    const int i = row * TILE + entry % (TILE * TILE) / TILE, j = column * TILE + entry % TILE;
    if (i >= n || j >= n) continue;
    double sum_k = 0.0, sum_l = 0.0;
    const float* partial = call.partials + x->split * stride + entry;
    for (int split = x->split; split < y->split; ++split, partial += stride) sum_k += *partial;
    for (int split = y->split; split < last; ++split, partial += stride) sum_l += *partial;
    float k = static_cast<float>(sum_k), l = static_cast<float>(sum_l);
    if (call.unbiased && i == j) {
      moments[3] += static_cast<double>(k) * k, moments[4] += static_cast<double>(l) * l, moments[5] += k, moments[6] += l;
      k = l = 0.f;
    }
    k_out[i * n + j] = k;
    l_out[i * n + j] = l;
    if (mirrored) {
      k_out[j * n + i] = k;
      l_out[j * n + i] = l;
    }
    const double kl = static_cast<double>(k) * l, kk = static_cast<double>(k) * k, ll = static_cast<double>(l) * l;
    const double weight = mirrored ? 2.0 : 1.0;
    moments[0] += weight * kl, moments[1] += weight * kk, moments[2] += weight * ll;
  }
  double* const slots = slots_of(call, pair, 0);
  deposit(moments, slots);
  if (call.unbiased || !arrives_last(call.counters + pair)) return;
  const Rows rows = order_rows(call.mask, n);
  collect(slots, gridDim.x, totals);
  if (threadIdx.x == 0) conclude(call, pair, totals, 0.0, 0.0, rows.count);
}

// Grid: (blocks of WARPS rows, pairs), unbiased only. A warp sums a row of K and of L, and stores r_i / (n-2) on their diagonals,
// which were zero. The moments are those of the row sums r and s, <r,s>, <r,r>, <s,s>, sum(r), sum(s), at their positions in `combine`.
__global__ void __launch_bounds__(THREADS, 2) sum_rows(const Forward call) {
  __shared__ double totals[2][MOMENTS];
  const int lane = threadIdx.x % WARP, n = call.n, i = blockIdx.x * WARPS + threadIdx.x / WARP, pair = blockIdx.y;
  float *const k = call.grams + static_cast<int64_t>(2 * pair) * n * n, *const l = k + n * n;
  const Rows rows = order_rows(call.mask, n);
  double r = 0.0, s = 0.0;
  for (int j = lane; i < n && j < n; j += WARP) {
    r += k[i * n + j];
    s += l[i * n + j];
  }
  r = sum_over(WARP - 1, r);
  s = sum_over(WARP - 1, s);
  double moments[MOMENTS] = {};
  if (i < n && lane == 0) {
    const double others = (rows.count < 4 ? 4.0 : rows.count) - 2.0;
    k[i * n + i] = static_cast<float>(r / others);
    l[i * n + i] = static_cast<float>(s / others);
    moments[3] = r * s, moments[4] = r * r, moments[5] = s * s, moments[6] = r, moments[7] = s;
  }
  double* const slots = slots_of(call, pair, 1);
  deposit(moments, slots);
  if (!arrives_last(call.counters + pair)) return;
  collect(slots_of(call, pair, 0), reducing_blocks(call.shape), totals[0]);
  collect(slots, gridDim.x, totals[1]);
  if (threadIdx.x > 0) return;
  const double *products = totals[0], *sums = totals[1];
  const double m[MOMENTS] = {products[0], products[1], products[2], sums[3], sums[4], sums[5], sums[6], sums[7]};
  conclude(call, pair, m, noise(products[5], products[3]), noise(products[6], products[4]), rows.count);
}

// 2^-e with 2^e > |K| in the Frobenius norm: brings every entry of a Gram matrix below 1.
__device__ inline double inverse_scale(double product) {
  const double norm = sqrt(product);
  return norm > 0.0 && norm < 1e300 ? ldexp(1.0, -ilogb(norm) - 1) : 1.0;
}

// The matrix M = 2 alpha Lc + 4 gamma Kc, whose product with the features is the gradient. Biased, K and L are centred already.
// Unbiased, they are centred here, by the row sums on their diagonals; M's rows sum to zero, so the features' origin is free.
struct Mixture {
  float scale_own, scale_other;    // powers of two: for features of 1e-12 the coefficients alone exceed fp32's range
  float d_own, d_other, constant;  // for the scaled matrices

  // From an entry of the Gram matrix of this side and of the other.
  __device__ float operator()(float own, float other) const {
    return fmaf(other * scale_other, d_other, own * scale_own * d_own);
  }
};

__device__ inline Mixture mixture(const Backward& call, int side) {
  const double* c = call.coefficients + side / 2 * COEFFICIENTS;  // d_kl, d_kk, d_ll, kl, kk, ll, sum_k, sum_l, -, -, n
  const int second = side % 2, first = 1 - second;
  const double n = c[10], g = call.grads[side / 2];
  const double scale_own = inverse_scale(c[4 + second]), scale_other = inverse_scale(c[4 + first]);
  const double d_own = 4.0 * c[1 + second] * g / scale_own, d_other = 2.0 * c[0] * g / scale_other;
  const double total = d_other * scale_other * c[6 + first] + d_own * scale_own * c[6 + second];
  return {static_cast<float>(scale_own), static_cast<float>(scale_other), static_cast<float>(d_own), static_cast<float>(d_other),
          call.unbiased ? static_cast<float>(total / ((n - 1.0) * (n - 2.0))) : 0.f};
}

// The columns of M, zero from n on: 16 for each warp at a time.
__host__ __device__ inline int inner_columns(int n) { return (n + 16 * WARPS - 1) / (16 * WARPS) * 16 * WARPS; }

// Floats between rows of M in shared memory, without bank conflicts in loads of 16 bytes.
__host__ __device__ inline int inner_pitch(int n) { return inner_columns(n) + 16; }

// Grid: plan_backward. A block forms OUT_ROWS rows of M in shared memory once and multiplies them with one chunk of features after
// the other, which go from memory to registers; the warps take different rows of them.
template <class T, bool EXACT>
__global__ void __launch_bounds__(THREADS, 2) gradient(const Backward call) {
  BIRD_DYNAMIC_SHARED(m);  // [OUT_ROWS][inner_pitch], then [WARPS][OUT_ROWS][PITCH]
  __shared__ Mixture mix;
  __shared__ float diagonals[2][MAX_ROWS];  // of this side's Gram matrix and of the other's, unbiased
  const Backward::Side& side = call.sides[blockIdx.z];
  const int64_t width = side.own.width, chunks = (width + CHUNK - 1) / CHUNK;
  if (blockIdx.x >= chunks) return;
  const int n = call.n, columns = inner_columns(n), pitch = inner_pitch(n), first_row = blockIdx.y * OUT_ROWS;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const Rows rows{call.mask, nullptr, n, n};
  const auto gram = [&](int number) {
    return Features{call.grams + static_cast<int64_t>(number) * n * n, n, 1, n, 0, 0};
  };
  const Features own = gram(side.side), other = gram(side.side ^ 1);
  if (threadIdx.x == 0) mix = mixture(call, side.side);
  for (int k = threadIdx.x; call.unbiased && k < n; k += THREADS) {
    diagonals[0][k] = static_cast<const float*>(own.data)[k * (n + 1)];
    diagonals[1][k] = static_cast<const float*>(other.data)[k * (n + 1)];
  }
  for (int k = 4 * lane; k < columns; k += 4 * WARP) {
    constexpr int HELD = OUT_ROWS / WARPS;
    Four<float> owns[HELD], others[HELD];
    const auto row = [&](int i) { return first_row + warp + i * WARPS; };
    const auto inside = [&](int i) { return row(i) < n; };
    load_rows(owns, own, k, row, inside);
    load_rows(others, other, k, row, inside);
    if (k < 4 * WARP) __syncthreads();  // for what other threads put into shared memory while these loads are under way
    const auto shift = [&](int i) { return mix(diagonals[0][i], diagonals[1][i]); };
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
      Four<float> v;
      for (int j = 0; j < 4; ++j) {
        float entry = mix(owns[i][j], others[i][j]);
        if (call.unbiased) entry = row(i) == k + j ? 0.f : entry - (shift(row(i)) + shift(k + j)) + mix.constant;
        entry = row(i) < n && k + j < n ? entry : 0.f;
        v[j] = EXACT ? entry : to_tf32(entry);
      }
      *reinterpret_cast<Four<float>*>(m + (warp + i * WARPS) * pitch + k) = v;
    }
  }
  __syncthreads();

  float* const parts = m + OUT_ROWS * pitch;
  for (int64_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    const int64_t column = chunk * CHUNK + lane / 4 * 4;
    const auto* location = reinterpret_cast<const Four<float>*>(call.locations + (side.own.chunk + chunk) * 2 * CHUNK) + lane / 4;
    const Four<float> first = location[0], second = location[CHUNK / 4];
    Gradient<EXACT> product;
    for (int start = 16 * warp; start < columns; start += 16 * WARPS) {
      const int k = start + lane % 4 * 4;
      Four<T> loaded[4];
      load_rows(loaded, side.own, column, [&](int i) { return static_cast<int64_t>(k + i); }, [&](int i) { return k + i < n; });
      float x[4][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool counts = rows[k + i];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float v = counts ? loaded[i][j] - first[j] - second[j] : 0.f;
          x[i][j] = EXACT ? v : to_tf32(v);
        }
      }
      product.add(m + start, pitch, x);
    }
    product.store(parts + warp * OUT_ROWS * PITCH);
    __syncthreads();
    for (int i = warp; i < OUT_ROWS; i += WARPS) {
      const int row = first_row + i;
      float total = 0.f;
      for (int w = 0; w < WARPS; ++w) total += parts[(w * OUT_ROWS + i) * PITCH + lane];
      if (row < n && chunk * CHUNK + lane < width)
        static_cast<T*>(side.out)[row * width + chunk * CHUNK + lane] = static_cast<T>(rows[row] ? total : 0.f);
    }
    __syncthreads();
  }
}

// ------------------------------------------------------------------------------------------------ launches

template <class T, bool EXACT>
void launch_forward(const Forward& call, void* stream) {
  const bool small = call.shape.tile == 64;
  const unsigned pairs = call.count / 2;
  const dim3 tiles(call.shape.pairs, call.splits), sums(reducing_blocks(call.shape), pairs);
  const size_t shared = call.shape.padded * PITCH * sizeof(float);
  launch(small ? partial_grams<T, 64, EXACT> : partial_grams<T, 128, EXACT>, tiles, shared, stream, call);
  launch(small ? reduce_grams<64> : reduce_grams<128>, sums, 0, stream, call);
  if (call.unbiased) launch(sum_rows, dim3((call.n + WARPS - 1) / WARPS, pairs), 0, stream, call);
}

template <class T, bool EXACT>
void launch_backward(const Backward& call, int multiprocessors, void* stream) {
  const auto [x, y, z] = plan_backward(call, multiprocessors);
  const int floats = OUT_ROWS * inner_pitch(call.n) + WARPS * OUT_ROWS * PITCH;
  launch(gradient<T, EXACT>, dim3(static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z)), floats * sizeof(float), stream, call);
}

// Half-precision features are always multiplied as tf32 (kernels.h).
void forward(Type type, bool exact, const Forward& call, void* stream) {
  if (type == Type::f16) return launch_forward<c10::Half, false>(call, stream);
  if (type == Type::bf16) return launch_forward<c10::BFloat16, false>(call, stream);
  (exact ? launch_forward<float, true> : launch_forward<float, false>)(call, stream);
}

void backward(Type type, bool exact, const Backward& call, int multiprocessors, void* stream) {
  if (type == Type::f16) return launch_backward<c10::Half, false>(call, multiprocessors, stream);
  if (type == Type::bf16) return launch_backward<c10::BFloat16, false>(call, multiprocessors, stream);
  (exact ? launch_backward<float, true> : launch_backward<float, false>)(call, multiprocessors, stream);
}

}  // namespace bird::BIRD_TARGET
