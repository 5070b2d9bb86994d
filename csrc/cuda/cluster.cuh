// Blocks of a cluster, from sm_90 on: they run at the same time and read each other's shared memory.
#pragma once
#include <cooperative_groups.h>

namespace fused_cnn {

// A barrier of the cluster's threads: what they did with shared memory before they arrived is done for all of them
// behind the wait.
__device__ inline void cluster_arrive() {
  cooperative_groups::this_cluster().barrier_arrive();
}
__device__ inline void cluster_wait() {
  cooperative_groups::this_cluster().barrier_wait();
}

// Where the cluster's block `rank` has what lies at `own` in this block's shared memory.
template <typename T>
__device__ inline const T* in_block(T* own, int rank) {
  return cooperative_groups::this_cluster().map_shared_rank(own, rank);
}

}  // namespace fused_cnn
