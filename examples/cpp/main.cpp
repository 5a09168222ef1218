// Runs an exported hybrid encoder without Python: `encode PACKAGE LIBRARY INPUTS OUTPUT`.
//
// PACKAGE comes from `python -m fila.aot`, LIBRARY is libfila_kernels.so. INPUTS is a list of tensors that
// torch.save wrote: views [T, 3, tile, tile], rasters [B, 3, h, w], boxes [T, 4] in raster pixels, image_index [T].
// OUTPUT is one tensor for torch.load: tokens [T, 1 + N, D].

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

std::vector<at::Tensor> read_tensors(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    throw std::runtime_error("cannot read " + path);
  }
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  const c10::IValue value = torch::jit::pickle_load(bytes);
  std::vector<at::Tensor> tensors;
  for (const c10::IValue& element : value.toListRef()) {
    tensors.push_back(element.toTensor());
  }
  return tensors;
}

void write_tensor(const std::string& path, const at::Tensor& tensor) {
  const std::vector<char> bytes = torch::jit::pickle_save(tensor);
  std::ofstream file(path, std::ios::binary);
  if (!file.write(bytes.data(), static_cast<std::streamsize>(bytes.size())) || !file.flush()) {
    throw std::runtime_error("cannot write " + path);
  }
}

// Its operators register themselves as it loads, which has to be before the package looks for them; it stays loaded.
void load_operators(const std::string& library) {
  if (dlopen(library.c_str(), RTLD_NOW | RTLD_GLOBAL) == nullptr) {
    throw std::runtime_error(std::string("cannot load the operators: ") + dlerror());
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) {
    std::cerr << "usage: encode PACKAGE LIBRARY INPUTS OUTPUT\n";
    return 2;
  }
  try {
    load_operators(argv[2]);
    const c10::InferenceMode guard;
    torch::inductor::AOTIModelPackageLoader encoder(argv[1]);
    const at::Tensor tokens = encoder.run(read_tensors(argv[3])).at(0);
    write_tensor(argv[4], tokens);
    std::cout << "tokens " << tokens.sizes() << ", norm " << tokens.norm().item<double>() << '\n';
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << '\n';
    return 1;
  }
  return 0;
}
