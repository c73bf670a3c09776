// The kernels of gram.cuh compiled for NVIDIA GPUs.
#include <cuda_runtime.h>
#include <mma.h>

#include <stdexcept>
#include <string>

#define BIRD_TARGET cuda
#define BIRD_DYNAMIC_SHARED(name) extern __shared__ __align__(128) float name[]

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
