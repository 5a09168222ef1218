// Shared by the tests: an expectation that counts its failures, a fixed source of numbers, tensors over vectors.
//
// A test is a program of its own: it returns 0 when it passes and 77 when this machine cannot run it.

#pragma once

#include <cmath>
#include <cstdint>
#include <functional>
#include <iostream>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace fila::testing {

constexpr int kSkipped = 77;
constexpr int kMostPrinted = 20;

inline int& failures() {
  static int count = 0;
  return count;
}

template <typename... Parts>
void expect(bool condition, const char* file, int line, const char* text, const Parts&... parts) {
  if (condition || ++failures() > kMostPrinted) {
    return;
  }
  std::cerr << file << ':' << line << ": expected " << text;
  (std::cerr << ... << parts) << '\n';
}

// EXPECT(condition, ...): the rest is printed where the condition does not hold.
#define EXPECT(condition, ...) \
  ::fila::testing::expect(condition, __FILE__, __LINE__, #condition __VA_OPT__(, ": ", ) __VA_ARGS__)

// What `call` refuses its arguments with; empty where it does not.
inline std::string refusal(const std::function<void()>& call) {
  try {
    call();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

inline bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

inline std::mt19937_64& source() {
  static std::mt19937_64 generator(20260101);
  return generator;
}

inline double uniform(double low, double high) {
  return std::uniform_real_distribution<double>(low, high)(source());
}

inline int64_t integer(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(source());
}

inline double normal() {
  return std::normal_distribution<double>()(source());
}

template <typename Value>
const Value& pick(const std::vector<Value>& values) {
  return values[integer(0, static_cast<int64_t>(values.size()) - 1)];
}

// The program's exit status.
inline int finish() {
  std::cerr << failures() << " failures\n";
  return failures() == 0 ? 0 : 1;
}

}  // namespace fila::testing
