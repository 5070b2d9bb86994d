#include "concat/ops.h"

STABLE_TORCH_LIBRARY_IMPL(fused_cnn, CPU, m) {
  m.impl("concat_bias_relu_fwd", FUSED_CNN_BOX(&fused_cnn::concat_bias_relu_fwd));
  m.impl("concat_bias_relu_bwd", FUSED_CNN_BOX(&fused_cnn::concat_bias_relu_bwd));
}
