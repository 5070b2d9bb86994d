// Blocks of a cluster, from sm_90 on: they run at the same time and read each other's shared memory.
#pragma once
#include <cooperative_groups.h>

namespace fused_cnn {

// Behind it what the cluster's threads wrote into shared memory before is there for all of them.
__device__ inline void cluster_barrier() {
  cooperative_groups::this_cluster().sync();
}

// Where the cluster's block `rank` has what lies at `own` in this block's shared memory.
template <typename T>
__device__ inline const T* in_block(T* own, int rank) {
  return cooperative_groups::this_cluster().map_shared_rank(own, rank);
}

}  // namespace fused_cnn
