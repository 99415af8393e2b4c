#include "isa.h"

#include <torch/csrc/stable/library.h>

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace fastscarce::cpu {
namespace {

bool runs(Isa level) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (level == Isa::avx512)
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq");
  if (level == Isa::avx2 || level == Isa::emulated) return avx2;
#endif
  return level == Isa::scalar;
}

struct Named {
  const char* name;
  Isa level;
};
// "avx512-emulated" runs the 16-lane body on AVX2: slower than avx2, for tests.
constexpr Named kNames[] = {{"scalar", Isa::scalar},
                            {"avx2", Isa::avx2},
                            {"avx512", Isa::avx512},
                            {"avx512-emulated", Isa::emulated}};

Isa best() { return runs(Isa::avx512) ? Isa::avx512 : runs(Isa::avx2) ? Isa::avx2 : Isa::scalar; }

Isa parse(const std::string& name) {
  if (name.empty()) return best();
  for (const Named& known : kNames) {
    if (name != known.name) continue;
    if (!runs(known.level))
      throw std::invalid_argument("FASTSCARCE_ISA is " + name + ", which this processor lacks.");
    return known.level;
  }
  throw std::invalid_argument("FASTSCARCE_ISA needs scalar, avx2, avx512 or avx512-emulated, got " +
                              name + ".");
}

std::atomic<Isa>& current() {
  static std::atomic<Isa> level = [] {
    const char* name = std::getenv("FASTSCARCE_ISA");
    return parse(name ? name : "");
  }();
  return level;
}

std::string isa_op() { return isa_name(); }
std::string set_isa_op(std::string name) {
  set_isa(name);
  return isa_name();
}

}  // namespace

Isa isa() { return current().load(std::memory_order_relaxed); }

std::string isa_name() {
  for (const Named& known : kNames)
    if (known.level == isa()) return known.name;
  return "";
}

void set_isa(const std::string& name) { current().store(parse(name)); }

}  // namespace fastscarce::cpu

STABLE_TORCH_LIBRARY_IMPL(fastscarce, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&fastscarce::cpu::isa_op));
  m.impl("set_isa", TORCH_BOX(&fastscarce::cpu::set_isa_op));
}
