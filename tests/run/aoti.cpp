// Runs an AOTInductor package without Python: aoti PACKAGE INPUT ROWS COLUMNS OUTPUT [LIBRARY OF OPS]
// INPUT holds int64 tokens, OUTPUT gets the floats of the first result.
#include <ATen/ops/from_blob.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <vector>

int main(int argc, char** argv) {
  if (argc > 6 && !dlopen(argv[6], RTLD_NOW | RTLD_GLOBAL)) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  const int64_t rows = std::atoll(argv[3]), columns = std::atoll(argv[4]);
  std::vector<int64_t> tokens(rows * columns);
  std::ifstream(argv[2], std::ios::binary).read(reinterpret_cast<char*>(tokens.data()), tokens.size() * sizeof(int64_t));
  torch::inductor::AOTIModelPackageLoader model(argv[1]);
  const at::Tensor y = model.run({at::from_blob(tokens.data(), {rows, columns}, at::kLong)}).at(0).contiguous();
  std::ofstream(argv[5], std::ios::binary).write(static_cast<const char*>(y.data_ptr()), y.nbytes());
  return 0;
}
