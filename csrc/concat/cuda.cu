#include "concat/ops.h"

FUSED_CNN_CUDA_IMPL(m) {
  m.impl("concat_bias_relu_fwd", FUSED_CNN_BOX(&fused_cnn::concat_bias_relu_fwd));
  m.impl("concat_bias_relu_bwd", FUSED_CNN_BOX(&fused_cnn::concat_bias_relu_bwd));
}
