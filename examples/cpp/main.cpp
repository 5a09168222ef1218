// Runs an exported hybrid encoder without Python: `encode PACKAGE LIBRARY INPUTS OUTPUT`.
//
// PACKAGE comes from `python -m fila.aot`, LIBRARY is libfila_kernels.so. INPUTS is a list of tensors that
// torch.save wrote: views [T, 3, tile, tile], rasters [B, 3, h, w], boxes [T, 4] in raster pixels, image_index [T].
// OUTPUT is one tensor for torch.load: tokens [T, 1 + N, D].
//
// Compiled code reads its inputs as dense memory of the sizes and dtypes that it was made for, whatever it is given.
// `checked` is therefore what every program has to do before it runs a package.

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <algorithm>
#include <exception>
#include <fstream>
#include <initializer_list>
#include <iostream>
#include <iterator>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>
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

[[noreturn]] void refuse(const std::string& name, const std::string& expected, const std::string& got) {
  throw std::invalid_argument(name + ": expected " + expected + ", got " + got);
}

template <typename Value>
std::string text_of(const Value& value) {
  std::ostringstream text;
  text << value;
  return text.str();
}

// Sizes of -1 are free.
void check(const std::string& name, const at::Tensor& tensor, const std::string& letters, at::IntArrayRef sizes,
           std::initializer_list<const char*> dtypes) {
  if (!tensor.defined() || tensor.layout() != at::kStrided || !tensor.device().is_cpu()) {
    refuse(name, "a dense tensor on the CPU", tensor.defined() ? text_of(tensor.device()) : "none");
  }
  bool same = tensor.dim() == static_cast<int64_t>(sizes.size());
  for (size_t axis = 0; same && axis < sizes.size(); ++axis) {
    same = sizes[axis] < 0 ? tensor.size(axis) > 0 : tensor.size(axis) == sizes[axis];
  }
  if (!same) {
    refuse(name, "shape " + letters + " = " + text_of(sizes) + " (-1: any above 0)", text_of(tensor.sizes()));
  }
  const std::string dtype = c10::toString(tensor.scalar_type());
  if (std::find(dtypes.begin(), dtypes.end(), dtype) == dtypes.end()) {
    refuse(name, std::string("dtype ") + *dtypes.begin(), dtype);
  }
}

int64_t number(const std::unordered_map<std::string, std::string>& metadata, const std::string& key) {
  const auto found = metadata.find(key);
  if (found == metadata.end()) {
    throw std::invalid_argument("the package has no '" + key + "' in its metadata: expected one that fila.aot made");
  }
  return std::stoll(found->second);
}

// The inputs as the package reads them: checked, dense, image_index in int32.
std::vector<at::Tensor> checked(const std::vector<at::Tensor>& inputs,
                                const std::unordered_map<std::string, std::string>& metadata) {
  if (inputs.size() != 4) {
    refuse("inputs", "views, rasters, boxes and image_index", text_of(inputs.size()) + " tensors");
  }
  const int64_t tile = number(metadata, "fila_tile"), stride = number(metadata, "fila_stride");
  const char* dtype = metadata.at("fila_dtype") == "bfloat16" ? "BFloat16" : "Float";
  const at::Tensor &views = inputs[0], &rasters = inputs[1], &boxes = inputs[2], &image_index = inputs[3];
  check("views", views, "[T, 3, tile, tile]", {-1, 3, tile, tile}, {dtype});
  check("rasters", rasters, "[B, 3, h, w]", {-1, 3, -1, -1}, {dtype});
  check("boxes", boxes, "[T, 4]", {views.size(0), 4}, {"Float"});
  check("image_index", image_index, "[T]", {views.size(0)}, {"Int", "Long"});
  if (rasters.size(2) % stride != 0 || rasters.size(3) % stride != 0) {
    refuse("rasters", "sides that are multiples of " + std::to_string(stride), text_of(rasters.sizes()));
  }
  const at::Tensor low = boxes.slice(1, 0, 2), high = boxes.slice(1, 2, 4);
  if (!(boxes.isfinite() & (low < high).repeat({1, 2})).all().item<bool>()) {
    refuse("boxes", "finite y0 < y1 and x0 < x1", "others");
  }
  if (!((image_index >= 0) & (image_index < rasters.size(0))).all().item<bool>()) {
    refuse("image_index", "0 to " + std::to_string(rasters.size(0) - 1), "others");
  }
  return {views.contiguous(), rasters.contiguous(), boxes.contiguous(), image_index.to(at::kInt).contiguous()};
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
    const at::Tensor tokens = encoder.run(checked(read_tensors(argv[3]), encoder.get_metadata())).at(0);
    write_tensor(argv[4], tokens);
    std::cout << "tokens " << tokens.sizes() << ", norm " << tokens.norm().item<double>() << '\n';
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << '\n';
    return 1;
  }
  return 0;
}
