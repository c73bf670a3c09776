// What gram.cuh is built from: loads that centre features in shared memory, and products of tiles of them by a block's threads.
//
// The including file says what it provides (gram.cuh).
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "../kernels.h"

namespace bird::BIRD_TARGET {

constexpr int THREADS = 256, WARP = 32, WARPS = THREADS / WARP;
static_assert(CHUNK == WARP, "a lane is a feature, or eight lanes have four each");
constexpr int PITCH = CHUNK + 4;  // floats between rows in shared memory: for loads of 16 bytes without bank conflicts

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

// Four adjacent numbers of a row, which one instruction loads if they are aligned. Halves stay in one integer: otherwise the
// compiler unpacks each load where it stands, and so waits for it before the next.
template <class T>
struct Four {
  unsigned long long bits = 0;

  __device__ float operator[](int j) const { return T(static_cast<unsigned short>(bits >> 16 * j), T::from_bits()); }
  __device__ void set(int j, T v) { bits |= static_cast<unsigned long long>(v.x) << 16 * j; }
};

template <>
struct alignas(16) Four<float> {
  float v[4] = {};

  __device__ float& operator[](int j) { return v[j]; }
  __device__ float operator[](int j) const { return v[j]; }
  __device__ void set(int j, float value) { v[j] = value; }
};

// Loads columns column..column + 4 of COUNT rows, all before the first is used: row(i) is the i-th of them, taken if wanted(i).
// Zero elsewhere.
template <class T, int COUNT, class Row, class Wanted>
__device__ inline void load_rows(Four<T> (&to)[COUNT], const Features& from, int64_t column, Row row, Wanted wanted) {
  const T* const data = static_cast<const T*>(from.data) + column * from.column_stride;
  const bool aligned = reinterpret_cast<uintptr_t>(data) % sizeof(Four<T>) == 0 && from.row_stride % 4 == 0;
  const bool whole = aligned && from.column_stride == 1 && column + 4 <= from.width;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    to[i] = {};
    if (!wanted(i)) continue;
    const T* const first = data + row(i) * from.row_stride;
    if (whole) {
      to[i] = *reinterpret_cast<const Four<T>*>(first);
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (column + j < from.width) to[i].set(j, first[j * from.column_stride]);
    }
  }
}

// The sum of v over lanes that differ in the bits of `lanes`, the same in each of them.
template <class V>
__device__ inline V sum_over(int lanes, V v) {
  for (int bit = WARP / 2; bit > 0; bit /= 2)
    if (lanes & bit) v += __shfl_xor_sync(0xffffffffu, v, bit);
  return v;
}

// Loads rows 0..padded of CHUNK features into shared memory and subtracts their location; zero where no row counts.
//
// The location is the mean of the rows that count. If `robust`, it is the median of the means of eight groups of them, to which
// they are assigned in turn (a group without rows is ignored): a few rows cannot move it far, however large they are.
//
// It is subtracted twice: the second location is the rounding error of the first, so a constant column becomes exactly zero. Both
// are stored in `locations` [2, CHUNK], in shared memory.
template <class T, bool ROUND>
__device__ void load_centred(
    float* slice, float* sums, float* locations, const Features& features, int chunk, const Rows& rows, int padded, bool robust) {
  constexpr int AT_ONCE = 4, ROWS = WARP / 8;  // loads of a thread before it uses the first; rows of a warp's load
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, own = lane % 8 * 4;
  // The rows of a warp are one group: numbers warp, warp + WARPS, ... in the order. Eight lanes share a row.
  const int begin = warp + lane / 8 * WARPS;
  const float counted = static_cast<float>((rows.count - warp + WARPS - 1) / WARPS);
  float total[4] = {};
  for (int start = begin; start < padded; start += AT_ONCE * ROWS * WARPS) {
    const auto number = [&](int i) { return start + i * ROWS * WARPS; };
    Four<T> loaded[AT_ONCE];
    load_rows(loaded, features, static_cast<int64_t>(chunk) * CHUNK + own, [&](int i) { return static_cast<int64_t>(rows.at(number(i))); },
              [&](int i) { return number(i) < rows.count; });
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      Four<float> v;
      for (int j = 0; j < 4; ++j) total[j] += v[j] = loaded[i][j];
      if (number(i) < padded) *reinterpret_cast<Four<float>*>(slice + rows.at(number(i)) * PITCH + own) = v;
    }
  }
  for (int pass = 0; pass < 2; ++pass) {
    for (int j = 0; j < 4; ++j) {
      const float sum = sum_over(8 | 16, total[j]);
      sums[warp * WARP + own + j] = robust ? sum / counted : sum;  // NaN of a group without rows
      total[j] = 0.f;
    }
    __syncthreads();
    if (warp == 0) {
      float location = 0.f;
      for (int w = 0; w < WARPS; ++w) location += sums[w * WARP + lane];
      locations[pass * CHUNK + lane] = robust ? median(sums + lane) : location / static_cast<float>(rows.count);
    }
    __syncthreads();
    const Four<float> location = *reinterpret_cast<const Four<float>*>(locations + pass * CHUNK + own);
    for (int k = begin; k < rows.count; k += ROWS * WARPS) {
      auto* const row = reinterpret_cast<Four<float>*>(slice + rows.at(k) * PITCH + own);
      Four<float> v = *row;
      for (int j = 0; j < 4; ++j) {
        v[j] -= location[j];
        total[j] += v[j];
        if (ROUND && pass == 1) v[j] = to_tf32(v[j]);
      }
      *row = v;
    }
  }
  __syncthreads();
}

// A tile [TILE, TILE] of a product A B^T of matrices [TILE, CHUNK] in shared memory that the whole block accumulates. EXACT: in
// fp32 without matrix units.
template <int TILE, bool EXACT>
class Product;

template <int TILE>
class Product<TILE, true> {
  static constexpr int N = TILE / 16;
  float tile_[N][N] = {};

 public:
  __device__ void add(const float* a, const float* b) {
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    for (int k = 0; k < CHUNK; k += 4) {
      float4 rows[N];
#pragma unroll
      for (int i = 0; i < N; ++i) rows[i] = *reinterpret_cast<const float4*>(a + (ty + 16 * i) * PITCH + k);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float4 v = *reinterpret_cast<const float4*>(b + (tx + 16 * j) * PITCH + k);
#pragma unroll
        for (int i = 0; i < N; ++i)
          tile_[i][j] = fmaf(rows[i].w, v.w, fmaf(rows[i].z, v.z, fmaf(rows[i].y, v.y, fmaf(rows[i].x, v.x, tile_[i][j]))));
      }
    }
  }

  __device__ void store(float* out) const {
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
#pragma unroll
    for (int i = 0; i < N; ++i)
#pragma unroll
      for (int j = 0; j < N; ++j) out[(ty + 16 * i) * TILE + tx + 16 * j] = tile_[i][j];
  }
};

// On the matrix units; the operands in shared memory must be rounded to tf32 already. The eight warps are 2 x 4 over the tile.
template <int TILE>
class Product<TILE, false> {
  static constexpr int M = TILE / 2 / 16, N = TILE / 4 / 8;
  float tile_[M][N][4] = {};

 public:
  __device__ void add(const float* a, const float* b) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    // The rows of 16 bytes whose addresses this lane gives: of four matrices 8 x 4, which are a fragment of A, or two of B.
    a += (warp / 4 * M * 16 + lane % 16) * PITCH + lane / 16 * 4;
    b += (warp % 4 * N * 8 + lane / 16 * 8 + lane % 8) * PITCH + lane / 8 % 2 * 4;
#pragma unroll(TILE == 64 ? 4 : 1)
    for (int k = 0; k < CHUNK; k += 8) {
      float rows[M][4];
#pragma unroll
      for (int i = 0; i < M; ++i) load_matrices(rows[i], a + 16 * i * PITCH + k);
#pragma unroll
      for (int j = 0; j < N; j += 2) {
        float columns[4];
        load_matrices(columns, b + 8 * j * PITCH + k);
#pragma unroll
        for (int i = 0; i < M; ++i) {
          multiply(tile_[i][j], rows[i], columns);
          multiply(tile_[i][j + 1], rows[i], columns + 2);
        }
      }
    }
  }

  __device__ void store(float* out) const {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    out += (warp / 4 * M * 16 + lane / 4) * TILE + warp % 4 * N * 8 + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < M; ++i)
#pragma unroll
      for (int j = 0; j < N; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          *reinterpret_cast<float2*>(out + (16 * i + 8 * half) * TILE + 8 * j) =
              make_float2(tile_[i][j][2 * half], tile_[i][j][2 * half + 1]);
  }
};

// A tile [OUT_ROWS, CHUNK] of M X that one warp accumulates, 16 rows of X at a time: its lane 4 g + t gives four rows, 4 t to
// 4 t + 3, of four features, 4 g to 4 g + 3. Sums may be taken in any order, so the fragments of the matrix units (cuda/launch.cu)
// take what a lane has loaded in 16 bytes: inner index t of a step is row 4 t or 4 t + 2, t + 4 the row after it, and column g of
// the j-th product is feature 4 g + j.
template <bool EXACT>
class Gradient {
  float tile_[4][4] = {};

 public:
  // m: OUT_ROWS rows of M in shared memory, from the first of the 16 columns on; x: rows and features of this lane.
  __device__ void add(const float* m, int pitch, const float (&x)[4][4]) {
    const int lane = threadIdx.x % WARP;
    m += lane / 4 * pitch + lane % 4 * 4;
    const float4 low = *reinterpret_cast<const float4*>(m), high = *reinterpret_cast<const float4*>(m + 8 * pitch);
    const float steps[2][4] = {{low.x, high.x, low.y, high.y}, {low.z, high.z, low.w, high.w}};
#pragma unroll
    for (int step = 0; step < 2; ++step)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float features[2] = {x[2 * step][j], x[2 * step + 1][j]};
        multiply(tile_[j], steps[step], features);
      }
  }

  __device__ void store(float* out) const {  // [OUT_ROWS][PITCH]
    const int lane = threadIdx.x % WARP;
    out += lane / 4 * PITCH + lane % 4 * 8;
#pragma unroll
    for (int c = 0; c < 4; ++c)
      *reinterpret_cast<float4*>(out + c / 2 * 8 * PITCH + c % 2 * 4) = make_float4(tile_[0][c], tile_[1][c], tile_[2][c], tile_[3][c]);
  }
};

template <>
class Gradient<true> {
  float tile_[OUT_ROWS][4] = {};  // of the lane's own rows of X; the four lanes of a feature are added at the end

 public:
  __device__ void add(const float* m, int pitch, const float (&x)[4][4]) {
    m += threadIdx.x % 4 * 4;
#pragma unroll
    for (int i = 0; i < OUT_ROWS; ++i) {
      const float4 v = *reinterpret_cast<const float4*>(m + i * pitch);
#pragma unroll
      for (int j = 0; j < 4; ++j)
        tile_[i][j] = fmaf(v.w, x[3][j], fmaf(v.z, x[2][j], fmaf(v.y, x[1][j], fmaf(v.x, x[0][j], tile_[i][j]))));
    }
  }

  // Of the four lanes of a feature, each keeps half of its sums and gives the other half away, twice.
  __device__ void store(float* out) const {
    const int lane = threadIdx.x % WARP, upper = lane / 2 % 2, odd = lane % 2;
    float halves[8][4];
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) halves[i][j] = exchange(upper, 2, tile_[i][j], tile_[i + 8][j]);
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        out[(8 * upper + 4 * odd + i) * PITCH + lane / 4 * 4 + j] = exchange(odd, 1, halves[i][j], halves[i + 4][j]);
  }

 private:
  __device__ static float exchange(bool second, int bit, float a, float b) {
    return (second ? b : a) + __shfl_xor_sync(0xffffffffu, second ? a : b, bit);
  }
};

}  // namespace bird::BIRD_TARGET
