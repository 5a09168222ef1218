// Each limit of a TMA descriptor by itself, at the last value that is accepted and the first that is refused.

#include "../tma.h"

#include <string>

#include "testing.h"

namespace {

using namespace fila;
using namespace fila::testing;

std::string fault(uintptr_t address, int64_t stride, int64_t rows, int64_t columns, int64_t element_bytes = 2) {
  const TmaMatrix good{reinterpret_cast<const void*>(uintptr_t(4096)), 64, 3, 64};
  const TmaMatrix other{reinterpret_cast<const void*>(address), stride, rows, columns};
  const char* last = tma_fault({good, other}, element_bytes);
  const char* first = tma_fault({other, good}, element_bytes);
  EXPECT((first == nullptr) == (last == nullptr), "wherever it stands among others");
  return last == nullptr ? "" : last;
}

bool names(const std::string& fault, const char* what) {
  return fault.find(what) != std::string::npos;
}

void test_addresses() {
  for (uintptr_t offset = 0; offset < 32; ++offset) {
    EXPECT(names(fault(4096 + offset, 64, 3, 64), "at multiples of 16 bytes") == (offset % 16 != 0), offset);
  }
}

void test_strides() {
  for (int64_t stride = 1; stride < 40; ++stride) {
    EXPECT(names(fault(4096, stride, 3, 8), "16 bytes apart") == (stride % 8 != 0), stride);
    EXPECT(names(fault(4096, stride, 3, 8, 4), "16 bytes apart") == (stride % 4 != 0), stride);
  }
  const int64_t most = int64_t(1) << 39;
  EXPECT(fault(4096, most - 8, 3, 64).empty());
  for (const int64_t stride : {int64_t(0), int64_t(-64), most, most + 8, int64_t(1) << 62}) {
    EXPECT(names(fault(4096, stride, 3, 64), "less than 2^40"), stride);
  }
}

void test_extents() {
  const int64_t most = int64_t(1) << 32;
  EXPECT(fault(4096, 64, 1, 1).empty());
  EXPECT(fault(4096, 64, most - 1, most - 1).empty());
  for (const int64_t extent : {int64_t(0), int64_t(-1), most}) {
    EXPECT(names(fault(4096, 64, extent, 64), "fewer than 2^32"), extent);
    EXPECT(names(fault(4096, 64, 3, extent), "fewer than 2^32"), extent);
  }
}

}  // namespace

int main() {
  test_addresses();
  test_strides();
  test_extents();
  return finish();
}
