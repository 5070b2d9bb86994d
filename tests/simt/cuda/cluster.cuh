// csrc/cuda/cluster.cuh for this processor, which runs a cluster's blocks by turns.
#pragma once
#include <cuda_runtime.h>

namespace fused_cnn {

inline void cluster_arrive() {
  simt::cluster_arrive();
}
inline void cluster_wait() {
  simt::cluster_wait();
}

template <typename T>
inline const T* in_block(T* own, int rank) {
  const ptrdiff_t blocks = rank - static_cast<int>(simt::cluster_rank());
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(own) + blocks * simt::kMostShared);
}

}  // namespace fused_cnn
