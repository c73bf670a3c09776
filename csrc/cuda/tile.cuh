// What gram.cuh is built from: loads that centre features in shared memory, and products of tiles of them by a block's threads.
//
// The including file provides <cuda_runtime.h> and <mma.h>, or emulation/cuda.h, and defines the namespace BIRD_TARGET.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <type_traits>

#include "../kernels.h"

namespace bird::BIRD_TARGET {

constexpr int THREADS = 256, WARP = 32, WARPS = THREADS / WARP;
static_assert(CHUNK == WARP, "a lane is a feature");
constexpr int PITCH = CHUNK + 4;  // floats between rows in shared memory: aligned for the matrix units, few bank conflicts

struct Rows {
  const bool* mask;
  const short* order;  // [n], all rows: those that count (not masked) in their order, then the others; null without a mask
  int n;
  int count;  // of the rows that count

  __device__ bool operator[](int i) const { return i < n && (mask == nullptr || mask[i]); }
  // The k-th row in that order; from n on, k itself.
  __device__ int at(int k) const { return mask == nullptr || k >= n ? k : order[k]; }
};

// Must be called by all threads of a block, and once in a kernel, since its shared memory holds the result.
__device__ inline Rows order_rows(const bool* mask, int n) {
  __shared__ short order[MAX_ROWS];
  __shared__ int counted[WARPS];
  if (mask == nullptr) return {nullptr, nullptr, n, n};
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  int count = 0;
  for (int start = 0; start < n; start += THREADS) {
    const int i = start + static_cast<int>(threadIdx.x);
    const bool counts = i < n && mask[i];
    const unsigned votes = __ballot_sync(0xffffffffu, counts);
    if (lane == 0) counted[warp] = __popc(votes);
    __syncthreads();
    int before = count + __popc(votes & ((1u << lane) - 1));  // rows before this one that count
    for (int w = 0; w < WARPS; ++w) {
      if (w < warp) before += counted[w];
      count += counted[w];
    }
    if (i < n) order[counts ? before : n - 1 - (i - before)] = static_cast<short>(i);
    __syncthreads();
  }
  return {mask, order, n, count};
}

// The lower median of those of WARPS numbers, WARP apart in memory, that are not NaN; 0 if all are.
__device__ inline float median(const float* numbers) {
  float v[WARPS];
  int count = 0;
#pragma unroll
  for (int i = 0; i < WARPS; ++i) {
    v[i] = numbers[i * WARP];
    count += v[i] == v[i];
  }
  float middle = 0.f;
#pragma unroll
  for (int i = 0; i < WARPS; ++i) {
    int below = 0;
#pragma unroll
    for (int j = 0; j < WARPS; ++j) below += j < i ? v[j] <= v[i] : v[j] < v[i];
    if (v[i] == v[i] && below == (count - 1) / 2) middle = v[i];
  }
  return middle;
}

// Loads rows 0..padded of CHUNK features into shared memory and subtracts their location; zero where no row counts.
//
// The location is the mean of the rows that count. If `robust`, it is the median of the means of eight groups of them, to which
// they are assigned in turn (a group without rows is ignored): a few rows cannot move it far, however large they are.
//
// It is subtracted twice: the second location is the rounding error of the first, so a constant column becomes exactly zero.
template <class T, bool ROUND>
__device__ void load_centred(
    float* slice, float* sums, const Features& features, int64_t first, const Rows& rows, int padded, bool robust) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const int64_t column = first + lane;
  const bool inside = column < features.width;
  const T* data = static_cast<const T*>(features.data) + column * features.column_stride;
  float total = 0.f;  // over the rows of this warp, which are one group
  const float counted = static_cast<float>((rows.count - warp + WARPS - 1) / WARPS);
  for (int k = warp; k < padded; k += WARPS) {
    const int i = rows.at(k);
    const float v = inside && k < rows.count ? static_cast<float>(data[i * features.row_stride]) : 0.f;
    slice[i * PITCH + lane] = v;
    total += v;
  }
  for (int pass = 0; pass < 2; ++pass) {
    sums[warp * WARP + lane] = robust ? total / counted : total;  // NaN of a group without rows
    __syncthreads();
    float location = 0.f;
    if (robust) {
      location = median(sums + lane);
    } else {
      for (int w = 0; w < WARPS; ++w) location += sums[w * WARP + lane];
      location /= static_cast<float>(rows.count);
    }
    __syncthreads();
    total = 0.f;
    for (int k = warp; k < rows.count; k += WARPS) {
      const int i = rows.at(k);
      float v = slice[i * PITCH + lane] - location;
      total += v;
      if (ROUND && pass == 1) v = nvcuda::wmma::__float_to_tf32(v);
      slice[i * PITCH + lane] = v;
    }
  }
  __syncthreads();
}

// A tile [ROWS, COLUMNS] of a product of matrices in shared memory that the whole block accumulates: A B^T if TRANSPOSED, else
// A B. EXACT: in fp32 without matrix units.
template <int ROWS, int COLUMNS, bool TRANSPOSED, bool EXACT>
class Product;

template <int ROWS, int COLUMNS, bool TRANSPOSED>
class Product<ROWS, COLUMNS, TRANSPOSED, true> {
  static constexpr int M = ROWS / 16, N = COLUMNS / 16;
  float tile_[M][N] = {};

 public:
  __device__ void add(const float* a, const float* b) {
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    for (int k = 0; k < CHUNK; k += 4) {
      float4 rows[M];
#pragma unroll
      for (int i = 0; i < M; ++i) rows[i] = *reinterpret_cast<const float4*>(a + (ty + 16 * i) * PITCH + k);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        float4 v;
        if (TRANSPOSED) {
          v = *reinterpret_cast<const float4*>(b + (tx + 16 * j) * PITCH + k);
        } else {
          const float* column = b + k * PITCH + tx + 16 * j;
          v = make_float4(column[0], column[PITCH], column[2 * PITCH], column[3 * PITCH]);
        }
#pragma unroll
        for (int i = 0; i < M; ++i) {
          tile_[i][j] = fmaf(rows[i].x, v.x, tile_[i][j]);
          tile_[i][j] = fmaf(rows[i].y, v.y, tile_[i][j]);
          tile_[i][j] = fmaf(rows[i].z, v.z, tile_[i][j]);
          tile_[i][j] = fmaf(rows[i].w, v.w, tile_[i][j]);
        }
      }
    }
  }

  __device__ void store(float* out, int pitch) const {
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
#pragma unroll
    for (int i = 0; i < M; ++i)
#pragma unroll
      for (int j = 0; j < N; ++j) out[(ty + 16 * i) * pitch + tx + 16 * j] = tile_[i][j];
  }
};

// On the matrix units; the operands in shared memory must be rounded to tf32 already.
template <int ROWS, int COLUMNS, bool TRANSPOSED>
class Product<ROWS, COLUMNS, TRANSPOSED, false> {
  // The eight warps are 2 x 4 over a tile of at least 64 columns, 4 x 2 over a narrower one.
  static constexpr int ACROSS = COLUMNS >= 64 ? 4 : 2, DOWN = WARPS / ACROSS;
  static constexpr int M = ROWS / DOWN / 16, N = COLUMNS / ACROSS / 16, K = 8;
  using A = nvcuda::wmma::fragment<nvcuda::wmma::matrix_a, 16, 16, K, nvcuda::wmma::precision::tf32, nvcuda::wmma::row_major>;
  using Layout = std::conditional_t<TRANSPOSED, nvcuda::wmma::col_major, nvcuda::wmma::row_major>;
  using B = nvcuda::wmma::fragment<nvcuda::wmma::matrix_b, 16, 16, K, nvcuda::wmma::precision::tf32, Layout>;
  using C = nvcuda::wmma::fragment<nvcuda::wmma::accumulator, 16, 16, K, float>;
  C tile_[M][N];

 public:
  __device__ Product() {
#pragma unroll
    for (int i = 0; i < M; ++i)
#pragma unroll
      for (int j = 0; j < N; ++j) nvcuda::wmma::fill_fragment(tile_[i][j], 0.f);
  }

  __device__ void add(const float* a, const float* b) {
    const int warp = threadIdx.x / WARP, row = warp / ACROSS * M * 16, column = warp % ACROSS * N * 16;
    for (int k = 0; k < CHUNK; k += K) {
      A rows[M];
#pragma unroll
      for (int i = 0; i < M; ++i) nvcuda::wmma::load_matrix_sync(rows[i], a + (row + 16 * i) * PITCH + k, PITCH);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const int start = column + 16 * j;
        B columns;
        nvcuda::wmma::load_matrix_sync(columns, TRANSPOSED ? b + start * PITCH + k : b + k * PITCH + start, PITCH);
#pragma unroll
        for (int i = 0; i < M; ++i) nvcuda::wmma::mma_sync(tile_[i][j], rows[i], columns, tile_[i][j]);
      }
    }
  }

  __device__ void store(float* out, int pitch) const {
    const int warp = threadIdx.x / WARP, row = warp / ACROSS * M * 16, column = warp % ACROSS * N * 16;
#pragma unroll
    for (int i = 0; i < M; ++i)
#pragma unroll
      for (int j = 0; j < N; ++j)
        nvcuda::wmma::store_matrix_sync(
            out + (row + 16 * i) * pitch + column + 16 * j, tile_[i][j], pitch, nvcuda::wmma::mem_row_major);
  }
};

}  // namespace bird::BIRD_TARGET
