// The kernels of gram.cuh compiled for NVIDIA GPUs.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#define BIRD_TARGET cuda
#define BIRD_DYNAMIC_SHARED(name) extern __shared__ __align__(128) float name[]

namespace bird::cuda {

// The instructions of the matrix units, by a whole warp. Fragments are those of PTX, "mma.m16n8k8" with .tf32: of A [16, 8], lane
// 4 g + t has (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4); of B [8, 8] (t, g), (t + 4, g); of C [16, 8] (g, 2 t), (g, 2 t + 1),
// (g + 8, 2 t), (g + 8, 2 t + 1).
__device__ inline float to_tf32(float v) {
  unsigned bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(v));
  return __uint_as_float(bits);
}

// Four matrices of 8 rows of 4 floats in shared memory; lane 8 i + r gives the address of row r of matrix i, a multiple of 16. Lane
// 4 g + t gets (g, t) of each.
__device__ inline void load_matrices(float (&to)[4], const float* row) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=f"(to[0]), "=f"(to[1]), "=f"(to[2]), "=f"(to[3]) : "r"(address) : "memory");
}

// C += A B.
__device__ inline void multiply(float (&c)[4], const float (&a)[4], const float* b) {
  const auto bits = [](float v) { return __float_as_uint(v); };
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(bits(a[0])), "r"(bits(a[1])), "r"(bits(a[2])), "r"(bits(a[3])), "r"(bits(b[0])), "r"(bits(b[1])));
}

}  // namespace bird::cuda

#include "gram.cuh"

namespace bird::cuda {

constexpr size_t SHARED_WITHOUT_ASKING = 48 * 1024;

static void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("bird_kernels: CUDA error: ") + cudaGetErrorString(error));
}

template <class Call>
void launch(void (*kernel)(Call), dim3 grid, size_t shared, void* stream, const std::remove_const_t<Call>& call) {
  if (shared > SHARED_WITHOUT_ASKING)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)));
  kernel<<<grid, THREADS, shared, static_cast<cudaStream_t>(stream)>>>(call);
  check(cudaGetLastError());
}

int multiprocessors(int device) {
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));  // a lookup in the runtime, no call of the driver
  return count;
}

}  // namespace bird::cuda
