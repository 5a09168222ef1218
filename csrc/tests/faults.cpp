// Faults planted for the sanitizers: `faults read|write|overflow` calls the library's own code with arguments that its
// operators refuse, and a sanitizer has to stop it. Status 0 means that no sanitizer saw the fault.

#include <cstring>

#include "../cpu/crop_resize.h"
#include "tensors.h"

int main(int argc, char** argv) {
  using namespace fila;
  const std::string fault = argc == 2 ? argv[1] : "";
  std::vector<float> map(2 * 2 * 8), out(8);
  MapView<float> view{map.data(), 32, 16, 8, 8};
  Taps taps{{0, 0, 1, 1}, {0}, {box_tap<double>(0, 1, 0, 1, 2)}, {box_tap<double>(0, 1, 0, 1, 2)}};
  gather_lines(view, taps, 1, 0, 1, out.data(), 8);  // this one is right
  if (fault == "read") {
    taps.rows[0].first = taps.rows[0].second = 2;  // one row below the map
  } else if (fault == "write") {
    out.resize(4);
    out.shrink_to_fit();
  } else if (fault == "overflow") {
    view.stride_image = std::numeric_limits<int64_t>::max();
    taps.image[0] = 2;
  } else {
    std::cerr << "usage: faults read|write|overflow\n";
    return 2;
  }
  gather_lines(view, taps, 1, 0, 1, out.data(), 8);
  std::cerr << "nobody saw it\n";
  return 0;
}
