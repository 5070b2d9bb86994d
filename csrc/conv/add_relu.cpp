#include "conv/add_relu.h"

STABLE_TORCH_LIBRARY_IMPL(fused_cnn, CPU, m) {
  m.impl("add_relu_fwd", FUSED_CNN_BOX(&fused_cnn::add_relu_fwd));
  m.impl("add_relu_bwd", FUSED_CNN_BOX(&fused_cnn::add_relu_bwd));
}
