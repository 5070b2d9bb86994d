// The ops' schemas, as Python's `define` calls state them: the build reads them there and passes them on.
namespace fused_cnn {
extern const char* const schemas[];
const char* const schemas[] = {FUSED_CNN_SCHEMAS nullptr};
}  // namespace fused_cnn
