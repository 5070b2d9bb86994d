// What a library was built of and for, as JSON. Its file holds the text, so that the next build finds it without
// loading anything, and Python asks the loaded library. Part of both libraries.
extern "C" __attribute__((visibility("default"))) const char* fused_cnn_build_facts() {
  static const char marked[] = "fused_cnn build facts: " FUSED_CNN_BUILD_FACTS;
  return marked + sizeof("fused_cnn build facts: ") - 1;
}
